"""Where settings come from: YAML files and options of the command line, merged in the order they are given in.

Sections are merged key by key. What stands at any other key is replaced as a whole, also a mapping whose names are
the user's, such as those of modalities; an option can set one thing below such a name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from jmvae_dist.config_keys import (
    check_names_below,
    declared_default,
    declared_type,
    describe,
    explain_unknown,
    is_mapping,
    join,
    optional_texts,
    section_keys,
    split_declared,
    takes_list,
    takes_null,
)
from jmvae_dist.config_yaml import NULLS, load_value, load_yaml
from jmvae_dist.errors import ConfigError

_CONFIG = "config"
_MAX_SHOWN_CHARACTERS = 60
# A file can name any other one for a section, such as a shard.
_MAX_FILE_CHARACTERS = 10_000_000


class Settings:
    """What has been set so far. Types are not checked, and what nothing sets is left out.

    Attributes:
        values: Nested as in a file. An option for a key that takes neither a mapping nor a list leaves its text.
        files: The file that set a declared key, unless an option has set it since.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.files: dict[str, str] = {}
        self._reading: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        """What stands at a key; `default` where nothing does."""
        value: Any = self.values
        for name in key.split("."):
            if not isinstance(value, dict) or name not in value:
                return default
            value = value[name]
        return value

    def put(self, key: str, value: Any, file: str | None = None) -> None:
        """Set what stands at a key, and leave what stands elsewhere.

        Args:
            key: A declared key, or names of the user's below one.
            value: What it is from now on.
            file: Where it is from; None is the command line.

        Raises:
            ConfigError: Something above the key is no mapping.
        """
        section, place = self.values, ""
        *above, last = key.split(".")
        for name in above:
            place = join(place, name)
            current = section.get(name)
            if not isinstance(current, (dict, type(None))):
                raise ConfigError(f"{key}: {place} is {current!r}, which has no keys of its own")
            # A copy, since an alias can put one mapping in many places.
            section[name] = dict(current or {})
            section = section[name]
        section[last] = value
        declared, _ = split_declared(key)
        self.files.pop(declared, None)
        if file is not None:
            self.files[declared] = file

    def merge(self, key: str, value: Any, file: str | None = None) -> None:
        """Merge what a source gives for a key, or for several where the key is a section.

        Args:
            key: Its names can be joined by dots; '' is the top level.
            value: What has been read.
            file: Where it is from; None is the command line.

        Raises:
            ConfigError: There is no such key, or it is a section and the value is not.
        """
        declared, names = split_declared(key)
        if names:
            _refuse_names(key, declared, names)
        if section_keys(key):
            self._merge_section(key, value, file)
            return
        if value is None and not takes_null(key):  # jsonargparse would take it for a key that is not set
            raise ConfigError(f"{key}: null is not allowed; it must be {describe(declared_type(key))}")
        if is_mapping(key):
            _check_names(value, key, set())
        self.put(key, value, file)

    def merge_file(self, file: str, section: str = "") -> None:
        """Merge a file with any sections, or with the content of one.

        Raises:
            ConfigError: It cannot be read, names itself, or something in it has no place.
        """
        place = os.path.realpath(os.path.expanduser(file))
        if place in self._reading:
            raise ConfigError(f"{file}: it is being read already; a section cannot name the file that it stands in")
        content = _read(file)
        self._reading.append(place)
        try:
            loaded = _load(content)
            if not section and not isinstance(loaded, dict):
                shown, sections = _shown(content) or "an empty file", ", ".join(section_keys(""))
                raise ConfigError(f"{shown} is not allowed; a file has the sections {sections}")
            self.merge(section, loaded, file)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
        finally:
            self._reading.pop()

    def set_option(self, key: str, text: str) -> None:
        """Set what an option of the command line says; with a ``+`` after its key, add to a list.

        Raises:
            ConfigError: There is no such key, or the text can have two meanings.
        """
        declared, names = split_declared(key)
        if key.endswith("+") and takes_list(key[:-1]):
            self._add_to_list(key[:-1], text)
        elif names and not section_keys(declared):
            check_names_below(declared, names)
            value = load_value(text)
            _check_names(value, key, set())
            self.put(key, value)
        elif key in optional_texts() and text.strip() in NULLS:
            if text.strip() != "null":
                raise ConfigError(
                    f"{key}: {text} could mean null or text; write null, or {text!r} in a --config file"
                )
            self.merge(key, None)
        else:
            # The type of any other key decides what the text is: 2024 can be a number or the name of a directory.
            is_yaml = section_keys(key) or is_mapping(key) or takes_list(key)
            self.merge(key, load_value(text) if is_yaml else text)

    def _add_to_list(self, key: str, text: str) -> None:
        current, added = self.get(key, declared_default(key)) or [], load_value(text)
        if not isinstance(current, list):
            raise ConfigError(f"{key}: {current!r} is no list, to which {text} could be added")
        self.merge(key, [*current, *(added if isinstance(added, list) else [text])])

    def _merge_section(self, key: str, value: Any, file: str | None) -> None:
        if isinstance(value, str) and os.path.isfile(path := _path_in(value, file)):
            self.merge_file(path, key)
        elif isinstance(value, dict):
            for name, inner in value.items():
                if name == "":
                    raise ConfigError(explain_unknown(f"{key}."))
                self.merge(join(key, str(name)), inner, file)
        else:
            keys = ", ".join(section_keys(key))
            if value is None:
                raise ConfigError(f"{key}: the section is empty; set {keys} in it, or leave it out")
            shown = _shown(repr(value))
            raise ConfigError(f"{key}: {shown} is not allowed; it must be a section with some of {keys}")


def read_settings(arguments: list[str]) -> Settings:
    """All that arguments such as ``--config FILE``, ``--section.key value`` and ``--section.key=value`` set.

    Raises:
        ConfigError: One line that names the file, the key and what is wrong.
    """
    settings = Settings()
    for key, text in _options(arguments):
        if key == _CONFIG:
            settings.merge_file(text)
        else:
            settings.set_option(key, text)
    return settings


def _options(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Keys and values of options; a value can be joined by ``=`` or follow."""
    rest = list(reversed(arguments))
    while rest:
        option = rest.pop()
        key, is_joined, text = option.removeprefix("--").partition("=")
        if not option.startswith("--") or not key:
            raise ConfigError(f"unexpected argument {option!r}; settings are given as --section.key value")
        if not is_joined:
            if not rest or rest[-1].startswith("--"):
                declared, names = split_declared(key)
                is_unknown = names and section_keys(declared) and key != _CONFIG
                raise ConfigError(explain_unknown(key) if is_unknown else f"{key}: a value must follow --{key}")
            text = rest.pop()
        yield key, text


def _read(file: str) -> str:
    if file == "-":
        return sys.stdin.read()
    try:
        with open(os.path.expanduser(file), encoding="utf-8") as stream:
            content = stream.read(_MAX_FILE_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config: {file} is not UTF-8 text ({error})") from None
    except FileNotFoundError:
        raise ConfigError(f"--config: {file} does not exist") from None
    except OSError as error:
        raise ConfigError(f"--config: {file} cannot be read ({error.strerror})") from None
    if len(content) > _MAX_FILE_CHARACTERS:
        raise ConfigError(
            f"--config: {file} has more than {_MAX_FILE_CHARACTERS:,} characters; it is no configuration"
        )
    return content


def _load(content: str) -> Any:
    import yaml

    try:
        return load_yaml(content)
    except yaml.YAMLError as error:
        raise ConfigError(f"Problems parsing config: {' '.join(str(error).split())}") from None


def _path_in(value: str, file: str | None) -> str:
    """The file that a section names, relative to the one it is named in."""
    folder = os.path.dirname(os.path.expanduser(file or ""))
    return os.path.join(folder, os.path.expanduser(value))


def _check_names(values: Any, key: str, seen: set[int]) -> None:
    """Refuse names joined by dots in a mapping of the user's; arguments of a class may have any names.

    Args:
        values: What has been read.
        key: Where it stands.
        seen: Mappings and lists in it that are done, by id: aliases can put one in many places.
    """
    if not isinstance(values, (dict, list)) or id(values) in seen:
        return
    seen.add(id(values))
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        inner = f"{key}[{name}]" if isinstance(values, list) else f"{key}.{name}"
        if isinstance(name, str) and "." in name:
            _refuse_dots(inner, key, name.split("."))
        if not inner.endswith(".init_args"):
            _check_names(value, inner, seen)


def _refuse_names(key: str, declared: str, names: list[str]) -> NoReturn:
    """Say what is wrong with a key of a file that has names below what is declared."""
    if section_keys(declared):
        raise ConfigError(explain_unknown(key))
    check_names_below(declared, names)
    _refuse_dots(key, declared, names)


def _refuse_dots(key: str, section: str, names: list[str]) -> NoReturn:
    nested = "..."
    for name in reversed(names[1:]):
        nested = f"{{{name}: {nested}}}"
    raise ConfigError(
        f"{key}: names below {section} are nested, not joined by dots; write {names[0]}: {nested} in it"
    )


def _shown(text: str) -> str:
    """The beginning of a value on one line; a whole file could be in it."""
    line = " ".join(text.split())
    return f"{line[:_MAX_SHOWN_CHARACTERS]}..." if len(line) > _MAX_SHOWN_CHARACTERS else line

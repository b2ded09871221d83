"""Reading, overriding, printing and saving a `RunConfig`.

Later sources win: defaults < first ``--config`` < second ``--config`` < ``--section.key value``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jmvae_dist.config import RunConfig
from jmvae_dist.config_keys import (
    check_names_below,
    declared_type,
    describe,
    explain_unknown,
    is_mapping,
    join,
    optional_texts,
    section_keys,
    split_declared,
)
from jmvae_dist.errors import ConfigError
from jmvae_dist.files import write_text_atomic
from jmvae_dist.user_code import path_of

if TYPE_CHECKING:
    import jsonargparse
    import yaml

# Handled before the parser: they ask for something else than a run.
CHECK_OPTION = "--check"
DRY_RUN_OPTION = "--dry_run"

_PARSER_MODE = "strict_yaml"
_MAX_SHOWN_CHARACTERS = 60
# Numbers to jsonargparse, but text to PyYAML, which follows YAML 1.1: there an exponent needs a point and a sign.
_MORE_FLOATS = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
# Stands before text that jsonargparse would take for YAML once more, and read as null. YAML allows this character,
# and no text has it: Unicode reserves it for such uses (fonts have icons at the private ones).
_TEXT_MARK = "\ufdd0"
# Marked too while jsonargparse reads: it would import the class when a later source changes its section, and fail
# with a traceback since the section is declared as a mapping. As one like others, it is replaced by a later one.
_CLASS_KEY = re.compile(r"(?<![^.])(?=(class_path|init_args)(\.|$))")
# Joins the names below a mapping of the user's while jsonargparse reads: if they were joined by dots it would replace
# all that stands at the first one, or take them for a single name.
_NAME_SEPARATOR = "\ufdd1"
# YAML's words for null.
_NULLS = ("null", "Null", "NULL", "~")


def make_parser(prog: str = "jmvae-dist train") -> jsonargparse.ArgumentParser:
    """A parser of `RunConfig` with ``--config`` (repeatable) and ``--print_config``."""
    import jsonargparse
    import yaml

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            for mark, meaning in ((_TEXT_MARK, ""), (_NAME_SEPARATOR, ".")):
                # It quotes values as they are, or as Python writes them.
                message = message.replace(mark, meaning).replace(repr(mark)[1:-1], meaning)
            raise ConfigError(_one_line(message))

        def parse_path(self, cfg_path: Any, *arguments: Any, **options: Any) -> jsonargparse.Namespace:
            try:
                return super().parse_path(cfg_path, *arguments, **options)
            except ConfigError as error:
                raise ConfigError(f"{cfg_path}: {error}") from None

        def parse_string(self, content: str, *arguments: Any, **options: Any) -> jsonargparse.Namespace:
            _check_keys(_load_value(content), "")
            return super().parse_string(content, *arguments, **options)

    jsonargparse.set_loader(_PARSER_MODE, _load_yaml, exceptions=(yaml.YAMLError,))
    # By itself it would import, and build, a class that stands in the place of any other value: no file may do that.
    # Classes of the user's are plain mappings to it; they are imported after the configuration has been checked.
    jsonargparse.set_parsing_settings(instantiate_subclass_spec_in_any=False, import_path_denylist=["*"])
    parser = Parser(
        prog=prog,
        parser_mode=_PARSER_MODE,
        allow_abbrev=False,
        description="Train a JMVAE, or resume the run in output_dir.",
        epilog=f"{CHECK_OPTION}: check configuration and data, say what would run, and exit. {DRY_RUN_OPTION} "
        f"[{DRY_RUN_OPTION}.ranks N] [{DRY_RUN_OPTION}.samples N]: say what the run needs (parameters, memory per "
        "rank for each engine, steps, checkpoints) and exit; the data need not exist",
    )
    parser.add_argument("--config", action="config", help="YAML file; may be repeated, later files win")
    parser.add_class_arguments(RunConfig)
    return parser


def parse_run_config(arguments: list[str], prog: str = "jmvae-dist train") -> RunConfig:
    """The configuration that command-line `arguments` describe.

    ``--print_config`` prints the resolved YAML, with every default written out, and exits.

    Raises:
        ConfigError: One line that names the key, the value and what is allowed.
    """
    parser = make_parser(prog)
    arguments = _mark_arguments(arguments)
    try:
        return _parse(parser, arguments)
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config: a file is not UTF-8 text ({error})") from None
    except OverflowError as error:
        raise ConfigError(f"a number is too large ({error})") from None


def _parse(parser: jsonargparse.ArgumentParser, arguments: list[str]) -> RunConfig:
    if any(re.match(r"--print_config(=|$)", argument) for argument in arguments):
        # Validated like a run: a file that cannot run must not be printed as if it could.
        kept = [argument for argument in arguments if not re.match(r"--print_config(=|$)", argument)]
        print(dump_run_config(_instantiate(parser, parser.parse_args(kept))), end="")
        raise SystemExit(0)
    return _instantiate(parser, parser.parse_args(arguments))


def dump_run_config(config: RunConfig) -> str:
    """YAML with every key, also those that are null: a file that reproduces the run."""
    return _dump(to_plain(config))


def _dump(values: Any, **options: Any) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes also the text that would be read back as a number, such as the name 1e3."""

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _MORE_FLOATS, list("-+0123456789"))
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, **options)


def save_run_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration atomically."""
    write_text_atomic(path, dump_run_config(config))


def to_plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested dictionaries of plain JSON and YAML values."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return path_of("model.decoders_dist", value) if callable(value) else value

    return plain(dataclasses.asdict(config))


def _load_yaml(text: str) -> Any:
    """jsonargparse's loader, for text in which no key occurs twice: YAML would silently take the last one."""
    import jsonargparse
    import yaml

    try:
        node = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if node is not None:
            _refuse_repeated_keys(node, {})
    except RecursionError:
        raise yaml.YAMLError("lists and mappings are nested too deeply") from None
    try:
        values = jsonargparse.get_loader("yaml")(text)
    except TypeError:  # from its handling of keys without values, such as {0: null}
        raise yaml.YAMLError("keys must be text") from None
    except ValueError as error:  # a number of thousands of digits
        raise yaml.YAMLError(str(error)) from None
    _mark_texts(values)
    _mark_class_keys(values, set())
    return values


def _refuse_repeated_keys(node: yaml.Node, is_checked: dict[int, bool]) -> None:
    """Raise a YAMLError for a repeated key, and for an alias to a list or mapping that it is part of.

    Args:
        node: What to check, with everything in it.
        is_checked: Nodes met so far, by id; False for those that the check is still inside of.
    """
    import yaml

    if not isinstance(node, yaml.CollectionNode) or is_checked.get(id(node)):
        return
    if id(node) in is_checked:
        raise yaml.constructor.ConstructorError(None, None, "an alias refers to itself", node.start_mark)
    is_checked[id(node)] = False
    children = node.value
    if isinstance(node, yaml.MappingNode):
        children = [value for _, value in node.value]
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        names = [key.value for key in keys]
        for number, key in enumerate(keys):
            if key.value in names[:number]:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
    for child in children:
        _refuse_repeated_keys(child, is_checked)
    is_checked[id(node)] = True


def _mark(text: str) -> str:
    """Text of an optional key in the form in which it stays text."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return text
    is_null = node is None or node.tag == "tag:yaml.org,2002:null"
    return _TEXT_MARK + text if is_null and text.strip() else text


def _mark_arguments(arguments: list[str]) -> list[str]:
    """Arguments in which only ``null`` is null where a key takes text, and with marks on the user's own names.

    Raises:
        ConfigError: A key that takes text has another of YAML's words for null; something is set below a plain value.
    """
    marked: list[tuple[str, list[str]]] = []  # by key, '' for what is not a setting
    for option, value in _settings(arguments):
        key, equals, joined = option.removeprefix("--").partition("=")
        value = joined if equals else value
        if value is None or not option.startswith("--"):
            marked.append(("", [option]))
            continue
        # All that stands at a user's name replaces what was set below it; a section keeps the rest of its keys.
        if not section_keys(key):
            marked = [entry for entry in marked if not entry[0].startswith(f"{key}.")]
        option, value = _mark_setting(key, value)
        marked.append((key, [f"--{option}={value}"] if equals else [f"--{option}", value]))
    return [part for _, parts in marked for part in parts]


def _settings(arguments: list[str]) -> Iterator[tuple[str, str | None]]:
    """The arguments one by one, each option with the value that is given apart from it."""
    rest = iter([*arguments, "--"])
    argument = next(rest)
    for following in rest:
        takes_value = argument.startswith("--") and "=" not in argument and not following.startswith("--")
        yield argument, following if takes_value else None
        argument = next(rest, "--") if takes_value else following


def _mark_setting(key: str, value: str) -> tuple[str, str]:
    """Key and value of an argument in the form in which jsonargparse reads them as they are meant."""
    declared, names = split_declared(key)
    if not names or not section_keys(declared):  # else there is no such key, as jsonargparse will say
        loaded = _load_value(value)
        check_names_below(declared, names)
        _check_keys(loaded, key)
        if len(names) > 1:
            return f"{declared}.{_NAME_SEPARATOR.join(names)}", _dump({names[-1]: loaded}, default_flow_style=True)
    if key in optional_texts() and value.strip() != "null":
        if value.strip() in _NULLS:
            raise ConfigError(f"{key}: {value} could mean null or text; write null, or {value!r} in a --config file")
        value = _mark(value)
    return _CLASS_KEY.sub(_TEXT_MARK, key), value


def _load_value(value: str) -> Any:
    """The value of an argument; text where it is not YAML, or is nothing but a comment, such as #1."""
    import yaml

    try:
        loaded = _load_yaml(value)
    except yaml.YAMLError:  # jsonargparse explains it where a value needs to be YAML
        return value
    return value if loaded is None and value.strip() not in _NULLS else loaded


def _check_keys(values: Any, key: str) -> None:
    """Raise a ConfigError for names that do not exist, and for those of the user's that are joined by dots.

    Args:
        values: What has been read.
        key: Where it stands; '' is the top level.
    """
    if not section_keys(key):
        if is_mapping(split_declared(key)[0]):
            _check_names(values, key, set())
        return
    for name, value in values.items() if isinstance(values, dict) else ():
        inner = join(key, str(name).replace(_TEXT_MARK, ""))
        declared, names = split_declared(inner)
        if not names:
            _check_keys(value, inner)
        elif section_keys(declared):
            raise ConfigError(explain_unknown(inner))
        else:
            check_names_below(declared, names)
            _refuse_dots(inner, declared, names)


def _check_names(values: Any, key: str, seen: set[int]) -> None:
    """Like `_check_keys` for what stands in a mapping of the user's; arguments of a class may have any names."""
    if not isinstance(values, (dict, list)) or id(values) in seen:
        return
    seen.add(id(values))
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        inner = f"{key}[{name}]" if isinstance(values, list) else f"{key}.{name}".replace(_TEXT_MARK, "")
        if isinstance(name, str) and "." in name:
            _refuse_dots(inner, key, inner.removeprefix(f"{key}.").split("."))
        if not inner.endswith(".init_args"):
            _check_names(value, inner, seen)


def _refuse_dots(key: str, section: str, names: list[str]) -> NoReturn:
    nested = "..."
    for name in reversed(names[1:]):
        nested = f"{{{name}: {nested}}}"
    raise ConfigError(
        f"{key}: names below {section} are nested, not joined by dots; write {names[0]}: {nested} in it"
    )


def _mark_texts(values: Any) -> None:
    """Mark the texts of optional keys in the content of a file, which can be that of a single section."""
    for key in optional_texts():
        parts = key.split(".")
        for start in range(len(parts)):
            _mark_at(values, parts[start:])


def _mark_at(values: Any, parts: list[str]) -> None:
    """Mark the text of one key; also a file's keys may be names that are joined by dots."""
    for stop in range(1, len(parts) + 1) if isinstance(values, dict) else ():
        name = ".".join(parts[:stop])
        if stop < len(parts):
            _mark_at(values.get(name), parts[stop:])
        elif isinstance(values.get(name), str):
            values[name] = _mark(values[name])


def _mark_class_keys(values: Any, seen: set[int]) -> None:
    """Mark ``class_path`` and ``init_args`` wherever they are keys, also among names that are joined by dots."""
    _rename_keys(values, lambda key: _CLASS_KEY.sub(_TEXT_MARK, key), seen)


def _rename_keys(values: Any, rename: Callable[[str], str], seen: set[int]) -> None:
    """Rename the keys of mappings in place, which keep their order.

    Args:
        values: What has been read.
        rename: From the old key to the new one.
        seen: Mappings and lists in it that are done, by id: aliases can put one in many places.
    """
    if not isinstance(values, (dict, list)) or id(values) in seen:
        return
    seen.add(id(values))
    if isinstance(values, dict):
        renamed = {rename(key) if isinstance(key, str) else key: value for key, value in values.items()}
        values.clear()
        values.update(renamed)
    for value in values.values() if isinstance(values, dict) else values:
        _rename_keys(value, rename, seen)


def _unmark(values: jsonargparse.Namespace) -> None:
    """Remove all marks: a mapping of the user's may have keys with the names of ours."""
    seen: set[int] = set()
    for value in values.values():
        _rename_keys(value, lambda key: key.replace(_TEXT_MARK, ""), seen)
    _unmark_texts(values, set())
    for key, value in values.items():
        _separate_names(value, key)


def _separate_names(values: Any, key: str) -> None:
    """Put what arguments set below names of the user's in its place, beside what stands there."""
    for joined, holder in list(values.items()) if isinstance(values, dict) else ():
        *above, last = str(joined).split(_NAME_SEPARATOR)
        if not above or not isinstance(holder, dict) or list(holder) != [last]:
            continue  # not ours
        del values[joined]
        section, place = values, key
        for name in above:
            place = f"{place}.{name}"
            current = section.get(name)
            if not isinstance(current, (dict, type(None))):
                whole = f"{key}.{joined.replace(_NAME_SEPARATOR, '.')}"
                raise ConfigError(f"{whole}: {place} is {current!r}, which has no keys of its own")
            # A copy, since an alias can put one mapping in many places.
            section[name] = dict(current or {})
            section = section[name]
        section[last] = holder[last]


def _unmark_texts(values: jsonargparse.Namespace | dict[Any, Any], seen: set[int]) -> None:
    """Remove the marks of texts.

    Args:
        values: What has been read.
        seen: Mappings in it that are done, by id: aliases can put one in many places.
    """
    for key, value in list(values.items()):
        if isinstance(value, str):
            values[key] = value.removeprefix(_TEXT_MARK)
        elif isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            _unmark_texts(value, seen)


def _refuse_empty_sections(values: Any, section: str = "") -> None:
    """Raise a ConfigError for a section without any key, which YAML reads as null."""
    for name in section_keys(section):
        key = join(section, name)
        if keys := section_keys(key):
            if values[name] is None:
                raise ConfigError(f"{key}: the section is empty; set {', '.join(keys)} in it, or leave it out")
            _refuse_empty_sections(values[name], key)


def _instantiate(parser: jsonargparse.ArgumentParser, namespace: jsonargparse.Namespace) -> RunConfig:
    _refuse_empty_sections(namespace)
    _unmark(namespace)
    sections = parser.instantiate(namespace)
    values = {item.name: sections[item.name] for item in dataclasses.fields(RunConfig)}
    return RunConfig(**values)


def _one_line(message: str) -> str:
    """jsonargparse's explanation as one line that names the key and what is allowed."""
    if match := re.search(r"(?:Group|Parser key) '([\w.]+)' does not accept option '([\w.]+)'", message):
        return explain_unknown(f"{match[1]}.{match[2]}")
    if match := re.search(r"Option '([\w.]+)' is not accepted", message):
        return explain_unknown(match[1])
    if match := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        argument = match[1].split("=")[0]
        if argument.startswith("--"):
            return explain_unknown(argument[2:])
        return f"unexpected argument {argument!r}; settings are given as --section.key value"
    if match := re.search(r"[Kk]ey \"?'?([\w.]+)\"?'? is required|required: (.+)$", message):
        return f"missing setting(s): {match[1] or match[2]}; give them in a --config file or as --section.key"
    if match := re.search(r"Unexpected config:(.*)", message, re.DOTALL):
        return f"{_shown(match[1])} is not allowed; a file has the sections {', '.join(section_keys(''))}"
    if match := re.search(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL):
        return f"{match[1]}: {_explain_value(match[1], match[2])}"
    return " ".join(message.split())


def _shown(text: str) -> str:
    """The beginning of a value on one line; a whole file could be in it."""
    line = " ".join(text.split())
    if len(line) > _MAX_SHOWN_CHARACTERS:
        line = f"{line[:_MAX_SHOWN_CHARACTERS]}..."
    return line or "an empty file"


def _explain_value(key: str, detail: str) -> str:
    section = re.match(r"Unable to load config (.*)", detail)
    if section is not None and (keys := section_keys(key)):
        return f"{section[1]} is not allowed; it must be a section with some of {', '.join(keys)}"
    declared = declared_type(key)
    given = re.search(r"(?:Given value|Got value|Value): (.*)", detail)
    if declared is None or given is None:
        return " ".join(detail.split())
    return f"{given[1].strip()} is not allowed; it must be {describe(declared)}"

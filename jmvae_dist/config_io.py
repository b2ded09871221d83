"""Reading, overriding, printing and saving a `RunConfig`.

Later sources win: defaults < first ``--config`` < second ``--config`` < ``--section.key value``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

from jmvae_dist.config import RunConfig
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


def make_parser(prog: str = "jmvae-dist train") -> jsonargparse.ArgumentParser:
    """A parser of `RunConfig` with ``--config`` (repeatable) and ``--print_config``."""
    import jsonargparse
    import yaml

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            # It quotes values as they are, or as Python writes them.
            raise ConfigError(_one_line(message.replace(_TEXT_MARK, "").replace(repr(_TEXT_MARK)[1:-1], "")))

        def parse_path(self, cfg_path: Any, *arguments: Any, **options: Any) -> jsonargparse.Namespace:
            try:
                return super().parse_path(cfg_path, *arguments, **options)
            except ConfigError as error:
                raise ConfigError(f"{cfg_path}: {error}") from None

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
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes also the text that would be read back as a number, such as the name 1e3."""

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _MORE_FLOATS, list("-+0123456789"))
    return yaml.dump(to_plain(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)


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
    values = jsonargparse.get_loader("yaml")(text)
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


@functools.cache
def _optional_texts(section: str = "") -> tuple[str, ...]:
    """The keys that take text or null, such as ``tracking.wandb.name``."""
    keys: list[str] = []
    for name in _section_keys(section):
        key = f"{section}.{name}" if section else name
        keys += [key] if _declared_type(key) == (str | None) else _optional_texts(key)
    return tuple(keys)


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
    """Arguments in which only ``null`` is null where a key takes text, and with marks on the keys of a class.

    Raises:
        ConfigError: A key that takes text has another of YAML's words for null; a single argument of a class is set.
    """
    marked = list(arguments)
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        key = option.removeprefix("--")
        if key == option:
            continue
        section, of_class, name = key.partition(".init_args.")
        if of_class and _declared_type(section.partition(".")[0]):
            # jsonargparse would take any value of it for text.
            whole = f"--{section} '{{class_path: module.Class, init_args: {{{name}: ...}}}}'"
            raise ConfigError(f"{key}: one argument of a class cannot be set alone; write all of it: {whole}")
        marked[place] = f"{_CLASS_KEY.sub(_TEXT_MARK, option)}{equals}{value}"
        if key not in _optional_texts():
            continue
        if not equals and place + 1 < len(arguments):
            value = arguments[place + 1]
        if value.strip() in ("~", "Null", "NULL"):
            raise ConfigError(f"{key}: {value} could mean null or text; write null, or {value!r} in a --config file")
        text = value if value.strip() == "null" else _mark(value)
        if equals:
            marked[place] = f"{option}={text}"
        elif place + 1 < len(arguments):
            marked[place + 1] = text
    return marked


def _mark_texts(values: Any) -> None:
    """Mark the texts of optional keys in the content of a file, which can be that of a single section."""
    for key in _optional_texts():
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
    for name in _section_keys(section):
        key = f"{section}.{name}" if section else name
        if keys := _section_keys(key):
            if values[name] is None:
                raise ConfigError(f"{key}: the section is empty; set {', '.join(keys)} in it, or leave it out")
            _refuse_empty_sections(values[name], key)


def _instantiate(parser: jsonargparse.ArgumentParser, namespace: jsonargparse.Namespace) -> RunConfig:
    _refuse_empty_sections(namespace)
    _unmark(namespace)
    sections = parser.instantiate(namespace)
    values = {item.name: sections[item.name] for item in dataclasses.fields(RunConfig)}
    return RunConfig(**values)


def _declared_type(key: str) -> Any:
    """The annotation of a (nested) key such as ``schedule.annealing.shape``; None if there is no such key."""
    current: Any = RunConfig
    for part in filter(None, key.split(".")):
        current = get_type_hints(current).get(part) if dataclasses.is_dataclass(current) else None
    return current


def _section_keys(section: str) -> list[str]:
    """Names of the keys of a section; of the top level for ''; nothing if it is not a section."""
    declared = _declared_type(section)
    return [item.name for item in dataclasses.fields(declared)] if dataclasses.is_dataclass(declared) else []


def _unknown_key(key: str) -> str:
    section, _, name = key.rpartition(".")
    allowed = _section_keys(section)
    if not allowed:
        return _unknown_key(section) if section else f"{key}: unknown key"
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"{key}: unknown key{hint}; allowed in {section or 'the configuration'}: {', '.join(allowed)}"


def _one_line(message: str) -> str:
    """jsonargparse's explanation as one line that names the key and what is allowed."""
    if match := re.search(r"(?:Group|Parser key) '([\w.]+)' does not accept option '([\w.]+)'", message):
        return _unknown_key(f"{match[1]}.{match[2]}")
    if match := re.search(r"Option '([\w.]+)' is not accepted", message):
        return _unknown_key(match[1])
    if match := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        argument = match[1].split("=")[0]
        if argument.startswith("--"):
            return _unknown_key(argument[2:])
        return f"unexpected argument {argument!r}; settings are given as --section.key value"
    if match := re.search(r"[Kk]ey \"?'?([\w.]+)\"?'? is required|required: (.+)$", message):
        return f"missing setting(s): {match[1] or match[2]}; give them in a --config file or as --section.key"
    if match := re.search(r"Unexpected config:(.*)", message, re.DOTALL):
        return f"{_shown(match[1])} is not allowed; a file has the sections {', '.join(_section_keys(''))}"
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
    if section is not None and (keys := _section_keys(key)):
        return f"{section[1]} is not allowed; it must be a section with some of {', '.join(keys)}"
    declared = _declared_type(key)
    given = re.search(r"(?:Given value|Got value|Value): (.*)", detail)
    if declared is None or given is None:
        return " ".join(detail.split())
    allowed = declared.__name__ if isinstance(declared, type) else str(declared).replace("typing.", "")
    allowed = re.sub(r"Literal\[(.*?)\]", r"one of \1", allowed).replace("| None", "or null")
    return f"{given[1].strip()} is not allowed; it must be {allowed}"

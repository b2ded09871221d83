"""Reading, overriding, printing and saving a `RunConfig`.

Later sources win: defaults < first ``--config`` < second ``--config`` < ``--section.key value``.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

from jmvae_dist.config import RunConfig
from jmvae_dist.errors import ConfigError
from jmvae_dist.files import write_text_atomic

if TYPE_CHECKING:
    import jsonargparse

# Handled before the parser: it asks for something else than a run.
CHECK_OPTION = "--check"


def make_parser(prog: str = "jmvae-dist train") -> jsonargparse.ArgumentParser:
    """A parser of `RunConfig` with ``--config`` (repeatable) and ``--print_config``."""
    import jsonargparse

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise ConfigError(_one_line(message))

    parser = Parser(
        prog=prog,
        allow_abbrev=False,
        description="Train a JMVAE, or resume the run in output_dir.",
        epilog=f"{CHECK_OPTION}: check configuration and data, say what would run, and exit",
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
    try:
        return _parse(parser, arguments)
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config: a file is not UTF-8 text ({error})") from None


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

    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


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
        return value

    return plain(dataclasses.asdict(config))


def _instantiate(parser: jsonargparse.ArgumentParser, namespace: jsonargparse.Namespace) -> RunConfig:
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
    if match := re.search(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL):
        return f"{match[1]}: {_explain_value(match[1], match[2])}"
    return " ".join(message.split())


def _explain_value(key: str, detail: str) -> str:
    declared = _declared_type(key)
    given = re.search(r"(?:Given value|Got value|Value): (.*)", detail)
    if declared is None or given is None:
        return " ".join(detail.split())
    allowed = declared.__name__ if isinstance(declared, type) else str(declared).replace("typing.", "")
    allowed = re.sub(r"Literal\[(.*?)\]", r"one of \1", allowed).replace("| None", "or null")
    return f"{given[1].strip()} is not allowed; it must be {allowed}"

"""Parsing, printing and saving a `RunConfig`: `config_sources` merges what is given, jsonargparse checks types."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jmvae_dist.config import RunConfig
from jmvae_dist.config_keys import declared_type, describe, optional_texts
from jmvae_dist.config_sources import Settings, read_settings
from jmvae_dist.config_yaml import PARSER_MODE, dump_yaml, load_yaml
from jmvae_dist.errors import ConfigError
from jmvae_dist.files import write_text_atomic
from jmvae_dist.user_code import path_of

if TYPE_CHECKING:
    import jsonargparse

# Handled before the parser: they ask for something else than a run.
CHECK_OPTION = "--check"
DRY_RUN_OPTION = "--dry_run"

_PRINT_OPTION = re.compile(r"--print_config(=|$)")


def make_parser(prog: str = "jmvae-dist train") -> jsonargparse.ArgumentParser:
    """A parser of `RunConfig`, for types and ``--help``."""
    import jsonargparse
    import yaml

    jsonargparse.set_loader(PARSER_MODE, load_yaml, exceptions=(yaml.YAMLError,))
    # By itself it would import, and build, a class that stands in the place of any other value: no file may do that.
    # Classes of the user's are plain mappings to it; they are imported after the configuration has been checked.
    jsonargparse.set_parsing_settings(instantiate_subclass_spec_in_any=False, import_path_denylist=["*"])
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        parser_mode=PARSER_MODE,
        allow_abbrev=False,
        exit_on_error=False,
        description="Train a JMVAE, or resume the run in output_dir.",
        epilog=f"{CHECK_OPTION}: check configuration and data, say what would run, and exit. {DRY_RUN_OPTION} "
        f"[{DRY_RUN_OPTION}.ranks N] [{DRY_RUN_OPTION}.samples N]: say what the run needs (parameters, memory per "
        "rank for each engine, steps, checkpoints) and exit; the data need not exist",
    )
    parser.add_argument("--config", action="config", help="YAML file; may be repeated, later files win")
    parser.add_class_arguments(RunConfig)
    return parser


def parse_run_config(arguments: list[str], prog: str = "jmvae-dist train") -> RunConfig:
    """The configuration that command-line `arguments` describe; later ones win over earlier ones and the defaults.

    ``--print_config`` prints the resolved YAML, with every default written out, and exits.

    Raises:
        ConfigError: One line that names the key, the value and what is allowed.
    """
    parser = make_parser(prog)
    if {"--help", "-h"} & set(arguments):
        parser.parse_args(["--help"])
    kept = [argument for argument in arguments if not _PRINT_OPTION.match(argument)]
    config = _build(parser, read_settings(kept))
    if len(kept) < len(arguments):
        # Validated like a run: a file that cannot run must not be printed as if it could.
        print(dump_run_config(config), end="")
        raise SystemExit(0)
    return config


def dump_run_config(config: RunConfig) -> str:
    """YAML with every key, also those that are null: a file that reproduces the run."""
    return dump_yaml(to_plain(config))


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


def _build(parser: jsonargparse.ArgumentParser, settings: Settings) -> RunConfig:
    # jsonargparse would take text for YAML once more, and read some, such as "#5", as null.
    texts = {key: text for key in optional_texts() if isinstance(text := settings.get(key), str)}
    for key in texts:
        settings.put(key, None)
    try:
        namespace = parser.parse_object(settings.values)
        for key, text in texts.items():
            namespace[key] = text
        sections = parser.instantiate(namespace)
    except argparse.ArgumentError as error:
        raise ConfigError(_explain(error.message, settings)) from None
    except OverflowError as error:
        raise ConfigError(f"a number is too large ({error})") from None
    return RunConfig(**{item.name: sections[item.name] for item in dataclasses.fields(RunConfig)})


def _explain(message: str, settings: Settings) -> str:
    """jsonargparse's explanation as one line that names the file, the key and what is allowed."""
    if match := re.search(r"required: (.+)$", message):
        return f"missing setting(s): {match[1]}; give them in a --config file or as --section.key"
    match = re.search(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL)
    if match is None:
        return " ".join(message.split())
    key, detail = match.groups()
    where = f"{settings.files[key]}: " if key in settings.files else ""
    declared = declared_type(key)
    given = re.search(r"(?:Given value|Got value|Value): (.*)", detail)
    if declared is None or given is None:
        return f"{where}{key}: {' '.join(detail.split())}"
    return f"{where}{key}: {given[1].strip()} is not allowed; it must be {describe(declared)}"

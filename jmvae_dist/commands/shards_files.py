"""`jmvae-dist shards write folder` and `shards write csv`: a user's own files and tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jmvae_dist.commands.modality_options import add_modality_options, by_name, named, with_modality_options
from jmvae_dist.commands.split_options import (
    add_label_options,
    add_split_options,
    add_standardize_options,
    split_choice,
    standardization,
)
from jmvae_dist.data.indexing.inspection import ModalityRequest
from jmvae_dist.data.modality import DTYPES
from jmvae_dist.data.sources.base import Source
from jmvae_dist.data.untrusted import printable
from jmvae_dist.errors import ConfigError

_ENCODING_OF_KIND = {"vector": "npy", "class": "cls", "text": "text", "path": ""}
_MAX_NOTES = 20


def add_folder_parser(sources: Any) -> argparse.ArgumentParser:
    """Add the source `folder`."""
    folder: argparse.ArgumentParser = sources.add_parser("folder", help="paired files: a/0001.jpg with a/0001.txt")
    folder.add_argument("--root", type=Path, required=True, metavar="DIR", help="holds the files")
    folder.add_argument(
        "--modality",
        type=named(None),
        action="append",
        default=[],
        required=True,
        metavar="NAME=PATTERN",
        help="files below DIR, such as image=images/*.jpg; files pair up where * stands for the same",
    )
    add_modality_options(folder)
    folder.add_argument(
        "--incomplete",
        choices=("error", "skip"),
        default="error",
        help="samples that lack a file or have an unreadable one: refuse (default), or leave out",
    )
    folder.add_argument("--folder-is-split", action="store_true", help="DIR holds the samples of --split only")
    add_split_options(folder, None)
    folder.set_defaults(source=_folder)
    return folder


def add_csv_parser(sources: Any) -> argparse.ArgumentParser:
    """Add the source `csv`."""
    table: argparse.ArgumentParser = sources.add_parser("csv", help="a table with numbers, classes, texts or paths")
    table.add_argument("--file", type=Path, required=True, help="UTF-8, with a header")
    table.add_argument("--delimiter", default=",", help="between cells; default ','; 'tab' for tabs")
    table.add_argument(
        "--root", type=Path, metavar="DIR", help="paths are relative to it; default: the table's folder"
    )
    for kind, metavar, text in (
        ("vector", "NAME=COLUMN[,COLUMN]", "numbers, stored as an array; pixel* stands for all such columns"),
        ("class", "NAME=COLUMN", "class indices, or names, which get numbers in alphabetical order"),
        ("text", "NAME=COLUMN", "text"),
        ("path", "NAME=COLUMN", "paths of image, npy, text or JSON files, which are copied byte for byte"),
    ):
        table.add_argument(
            f"--{kind}", type=_column(kind), action="append", dest="columns", default=[], metavar=metavar, help=text
        )
    table.add_argument("--dtype", type=named(DTYPES), action="append", default=[], metavar="NAME=DTYPE")
    table.add_argument(
        "--shape", type=_named_shape, action="append", default=[], metavar="NAME=1x28x28", help="of a vector"
    )
    add_modality_options(table)
    table.add_argument(
        "--class-names",
        type=named(None),
        action="append",
        default=[],
        metavar="NAME=A,B,C",
        help="all names of a class, in the order of their numbers; the same for every file",
    )
    table.add_argument(
        "--key", metavar="COLUMN", help="names the samples, such as a patient's id; default: numbers of rows"
    )
    table.add_argument(
        "--incomplete",
        choices=("error", "skip"),
        default="error",
        help="rows with an empty or wrong cell, or an unreadable file: refuse (default), or leave out",
    )
    table.add_argument("--file-is-split", action="store_true", help="the file holds the samples of --split only")
    add_split_options(table, None)
    add_label_options(table, "COLUMN")
    table.add_argument(
        "--split-column", metavar="COLUMN", help="says train or test of each row, in place of --test-fraction"
    )
    add_standardize_options(table)
    table.set_defaults(source=_csv)
    return table


def _folder(arguments: argparse.Namespace) -> Source:
    from jmvae_dist.data.sources.folder import load_folder_source

    patterns = by_name("--modality", arguments.modality)
    source, notes = load_folder_source(
        arguments.root,
        patterns,
        with_modality_options([ModalityRequest(name, (), "") for name in patterns], arguments),
        split_choice(arguments, "--folder-is-split", arguments.folder_is_split),
        arguments.incomplete == "skip",
    )
    print_notes(notes)
    return source


def _csv(arguments: argparse.Namespace) -> Source:
    from dataclasses import replace

    from jmvae_dist.data.sources.table import Column, load_table_source

    choice = split_choice(arguments, "--file-is-split", arguments.file_is_split)
    if not arguments.columns:
        raise ConfigError("csv: name the columns of each modality: --vector, --class, --text or --path NAME=COLUMN")
    parsed = by_name("--vector, --class, --text or --path", arguments.columns)
    columns = {name: Column(kind, names) for name, (kind, names) in parsed.items()}
    for option, attribute, pairs in (("--dtype", "dtype", arguments.dtype), ("--shape", "shape", arguments.shape)):
        for name, value in by_name(option, pairs).items():
            if name not in columns or columns[name].kind != "vector":
                raise ConfigError(f"{option} {name}=...: there is no --vector {name}")
            columns[name] = replace(columns[name], **{attribute: value})
    for name in arguments.standardize:
        if name not in columns or columns[name].kind != "vector":
            raise ConfigError(f"--standardize {name}: there is no --vector {name}")
    for name, listed in by_name("--class-names", arguments.class_names).items():
        if name not in columns or columns[name].kind != "class":
            raise ConfigError(f"--class-names {name}=...: there is no --class {name}")
        names = tuple(part.strip() for part in listed.split(","))
        if not all(names) or len(set(names)) < len(names):
            raise ConfigError(f"--class-names {name}={listed}: a name is empty or occurs twice")
        columns[name] = replace(columns[name], class_names=names)
    requests = [
        ModalityRequest(name, (_extension(name, column.kind),), _ENCODING_OF_KIND[column.kind])
        for name, column in columns.items()
    ]
    delimiter = "\t" if arguments.delimiter == "tab" else arguments.delimiter
    if len(delimiter) != 1:
        raise ConfigError(f"--delimiter {delimiter!r} must be one character, or 'tab'")
    source, notes = load_table_source(
        arguments.file,
        columns,
        with_modality_options(requests, arguments),
        choice,
        arguments.root,
        delimiter,
        key_column=arguments.key,
        skip_incomplete=arguments.incomplete == "skip",
        standardization=standardization(arguments, choice),
    )
    print_notes(notes)
    return source


def _extension(name: str, kind: str) -> str:
    return f"{name}.{ {'vector': 'npy', 'class': 'cls', 'text': 'txt', 'path': ''}[kind] }"


def print_notes(notes: list[str]) -> None:
    """What the user may want to know about a source."""
    for note in notes[:_MAX_NOTES]:
        print(f"note: {printable(note)}")
    if len(notes) > _MAX_NOTES:
        print(f"note: and {len(notes) - _MAX_NOTES:,} more")


def _column(kind: str) -> Callable[[str], tuple[str, tuple[str, tuple[str, ...]]]]:
    def parse(text: str) -> tuple[str, tuple[str, tuple[str, ...]]]:
        name, separator, listed = text.partition("=")
        columns = tuple(listed.split(",")) if kind == "vector" else (listed,)
        if not separator or not name or not all(columns):
            raise argparse.ArgumentTypeError(f"{text!r} must have the form NAME=COLUMN")
        return name, (kind, columns)

    return parse


def _named_shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, separator, sizes = text.partition("=")
    parts = sizes.split("x")
    if not separator or not name or not all(part.isdecimal() and int(part[:10]) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} must have the form NAME=SIZExSIZE, such as image=1x28x28")
    return name, tuple(int(part) for part in parts)

"""`jmvae-dist shards index`: manifest and indexes for tars that others wrote."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jmvae_dist.commands.options import named_number, named_size, positive
from jmvae_dist.data.inspection import ModalityRequest, encoding_of_extension
from jmvae_dist.data.manifest import ENCODINGS
from jmvae_dist.errors import ConfigError

_IMAGE_MODES = ("gray", "rgb")


def add_index_parser(verbs: Any, run: Callable[[argparse.Namespace], int]) -> None:
    """Add the verb with its options to the subparsers of `shards`."""
    index = verbs.add_parser("index", help="make manifest and indexes for WebDataset tars that others wrote")
    index.add_argument(
        "shards", nargs="+", metavar="SHARD", help="tars, folders of tars, globs, URLs, or shard-{0000..0099}.tar"
    )
    index.add_argument("--out", type=Path, required=True, metavar="MANIFEST", help="manifest.json to write")
    index.add_argument(
        "--modality",
        type=_modality,
        action="append",
        default=[],
        metavar="NAME=EXT[,EXT]",
        help="a modality and its extension, for example image=jpg,png; default: guessed from the first samples",
    )
    for option, kind, metavar, text in (
        ("--encoding", _named(ENCODINGS), "NAME=ENCODING", f"{', '.join(ENCODINGS)}; default: told by the extension"),
        (
            "--classes",
            named_size,
            "NAME=K",
            "classes of a cls modality; default: the largest index of all samples + 1",
        ),
        ("--text-length", named_size, "NAME=N", "tokens of a text; default: the longest one"),
        ("--image-mode", _named(_IMAGE_MODES), "NAME=MODE", "gray or rgb; default: gray if all images are"),
        ("--json-field", _named(None), "NAME=FIELD", "where the numbers are in the JSON document: a.b.0"),
        ("--offset", named_number, "NAME=NUMBER", "the model sees (value - offset) * scale"),
        ("--scale", named_number, "NAME=NUMBER", "default 1/255 for images, else 1"),
    ):
        index.add_argument(option, type=kind, action="append", default=[], metavar=metavar, help=text)
    index.add_argument(
        "--incomplete",
        choices=("error", "skip", "keep"),
        default="error",
        help="samples that lack a modality: refuse (default), leave out, or index without it",
    )
    index.add_argument("--workers", type=positive, help="processes (default: the available CPUs, 1 if faster)")
    index.add_argument("--overwrite", action="store_true", help="replace a manifest of other data")
    index.set_defaults(run=run)


def requests_of(
    arguments: argparse.Namespace, inferred: Callable[[], Sequence[ModalityRequest]]
) -> list[ModalityRequest]:
    """The modalities that the options ask for, or the inferred ones with what the options say of them.

    Raises:
        ConfigError: an option names a modality that is not there, or does not fit its encoding.
    """
    encodings = _by_name("--encoding", arguments.encoding)
    requests = []
    for name, extensions in _by_name("--modality", arguments.modality).items():
        found = {encodings.get(name) or encoding_of_extension(extension) or "" for extension in extensions}
        if len(found) > 1 or "" in found:
            raise ConfigError(f"--modality {name}={','.join(extensions)}: which encoding? add --encoding {name}=...")
        requests.append(ModalityRequest(name, extensions, found.pop()))
    requests = requests or list(inferred())
    requests = [replace(request, encoding=encodings.get(request.name, request.encoding)) for request in requests]
    names = {request.name for request in requests}
    for option, attribute, encodings_of_option in (
        ("--encoding", "encoding", None),
        ("--classes", "num_classes", ("cls",)),
        ("--text-length", "length", ("text",)),
        ("--image-mode", "image_mode", ("image",)),
        ("--json-field", "field", ("json",)),
        ("--offset", "offset", ("npy", "image", "json")),
        ("--scale", "scale", ("npy", "image", "json")),
    ):
        values = _by_name(option, getattr(arguments, option.removeprefix("--").replace("-", "_")))
        for name in values.keys() - names:
            raise ConfigError(
                f"{option} {name}=...: there is no modality {name!r}; there are {', '.join(sorted(names))}"
            )
        for position, request in enumerate(requests):
            if request.name not in values:
                continue
            if encodings_of_option is not None and request.encoding not in encodings_of_option:
                raise ConfigError(f"{option} does not apply to {request.name!r}, which is {request.encoding}")
            requests[position] = replace(requests[position], **{attribute: values[request.name]})
    return requests


def _by_name(option: str, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ConfigError(f"{option} names a modality twice")
    return values


def _modality(text: str) -> tuple[str, tuple[str, ...]]:
    name, separator, extensions = text.partition("=")
    listed = tuple(extension.lower().removeprefix(".") for extension in extensions.split(","))
    if not separator or not name or not all(listed):
        raise argparse.ArgumentTypeError(f"{text!r} must have the form NAME=EXTENSION, such as image=jpg")
    return name, listed


def _named(choices: Sequence[str] | None) -> Callable[[str], tuple[str, str]]:
    def parse(text: str) -> tuple[str, str]:
        name, separator, value = text.partition("=")
        if not separator or not name or not value or (choices is not None and value not in choices):
            of = f" with one of {', '.join(choices)}" if choices is not None else ""
            raise argparse.ArgumentTypeError(f"{text!r} must have the form NAME=VALUE{of}")
        return name, value

    return parse

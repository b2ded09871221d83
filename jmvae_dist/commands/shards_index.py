"""`jmvae-dist shards index`: manifest and indexes for tars that others wrote."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jmvae_dist.commands.modality_options import add_modality_options, by_name, with_modality_options
from jmvae_dist.commands.options import positive
from jmvae_dist.data.indexing.inspection import ModalityRequest, encoding_of_extension
from jmvae_dist.errors import ConfigError


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
    add_modality_options(index)
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
    encodings = by_name("--encoding", arguments.encoding)
    requests = []
    for name, extensions in by_name("--modality", arguments.modality).items():
        found = {encodings.get(name) or encoding_of_extension(extension) or "" for extension in extensions}
        if len(found) > 1 or "" in found:
            raise ConfigError(f"--modality {name}={','.join(extensions)}: which encoding? add --encoding {name}=...")
        requests.append(ModalityRequest(name, extensions, found.pop()))
    requests = requests or list(inferred())
    return with_modality_options(requests, arguments)


def _modality(text: str) -> tuple[str, tuple[str, ...]]:
    name, separator, extensions = text.partition("=")
    listed = tuple(extension.lower().removeprefix(".") for extension in extensions.split(","))
    if not separator or not name or not all(listed):
        raise argparse.ArgumentTypeError(f"{text!r} must have the form NAME=EXTENSION, such as image=jpg")
    return name, listed

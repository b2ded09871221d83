"""Options that say more of a modality than its files or members do."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jmvae_dist.commands.options import named_number, named_size
from jmvae_dist.data.indexing.inspection import ModalityRequest
from jmvae_dist.data.modality import ENCODINGS
from jmvae_dist.errors import ConfigError

_IMAGE_MODES = ("gray", "rgb")
_ENCODINGS_OF_OPTION = {
    "--encoding": ("encoding", None),
    "--classes": ("num_classes", ("cls",)),
    "--text-length": ("length", ("text",)),
    "--image-mode": ("image_mode", ("image",)),
    "--json-field": ("field", ("json",)),
    "--offset": ("offset", ("npy", "image", "json")),
    "--scale": ("scale", ("npy", "image", "json")),
}


def add_modality_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `with_modality_options` reads."""
    for option, kind, metavar, text in (
        ("--encoding", named(ENCODINGS), "NAME=ENCODING", f"{', '.join(ENCODINGS)}; default: told by the extension"),
        ("--classes", named_size, "NAME=K", "number of classes; default: the largest index + 1"),
        ("--text-length", named_size, "NAME=N", "tokens of a text; default: the longest one"),
        ("--image-mode", named(_IMAGE_MODES), "NAME=MODE", "gray or rgb; default: gray if all images are"),
        ("--json-field", named(None), "NAME=FIELD", "where the numbers are in the JSON document: a.b.0"),
        ("--offset", named_number, "NAME=NUMBER", "the model sees (value - offset) * scale"),
        ("--scale", named_number, "NAME=NUMBER", "default 1/255 for images, else 1"),
    ):
        parser.add_argument(option, type=kind, action="append", default=[], metavar=metavar, help=text)


def with_modality_options(
    requests: Sequence[ModalityRequest], arguments: argparse.Namespace
) -> list[ModalityRequest]:
    """The requests with what the options say of them.

    Raises:
        ConfigError: an option names a modality that is not there, or does not fit its encoding.
    """
    described = {request.name: request for request in requests}
    for option, (attribute, encodings) in _ENCODINGS_OF_OPTION.items():
        for name, value in by_name(option, getattr(arguments, option.removeprefix("--").replace("-", "_"))).items():
            if name not in described:
                there = ", ".join(sorted(described))
                raise ConfigError(f"{option} {name}=...: there is no modality {name!r}; there are {there}")
            encoding = described[name].encoding
            if encodings is not None and encoding and encoding not in encodings:
                raise ConfigError(f"{option} does not apply to {name!r}, which is {encoding}")
            described[name] = replace(described[name], **{attribute: value})
    return list(described.values())


def by_name(option: str, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Values by name; raises ConfigError if there are two for one name."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ConfigError(f"{option} names a modality twice")
    return values


def named(choices: Sequence[str] | None) -> Callable[[str], tuple[str, str]]:
    """A parser of NAME=VALUE, with one of the given values if there are any."""

    def parse(text: str) -> tuple[str, str]:
        name, separator, value = text.partition("=")
        if not separator or not name or not value or (choices is not None and value not in choices):
            of = f" with one of {', '.join(choices)}" if choices is not None else ""
            raise argparse.ArgumentTypeError(f"{text!r} must have the form NAME=VALUE{of}")
        return name, value

    return parse

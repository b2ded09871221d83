"""Files that become members of a shard: looked at once for what they have in common, and read again while packing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from jmvae_dist.data.encodings import decode_member
from jmvae_dist.data.files import open_regular
from jmvae_dist.data.index import MAX_MEMBER_BYTES
from jmvae_dist.data.indexing.inspection import (
    Facts,
    Inspector,
    ModalityRequest,
    conclude,
    encoding_of_extension,
    make_inspector,
)
from jmvae_dist.data.modality import Modality, check_distinct_names
from jmvae_dist.data.sources.base import EncodedMember, SampleValue, check_finite, samples_for_shuffle
from jmvae_dist.errors import ConfigError, DataError

DEFAULT_SHARD_BYTES = 256 * 2**20
MAX_DEFAULT_SAMPLES_PER_SHARD = 10_000

# What a user's own name of a sample must be to become its key: webdataset cuts keys at the first dot.
PLAIN_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,49}")

_MEMBER_EXTENSIONS = {"npy": "npy", "cls": "cls", "text": "txt", "json": "json"}


def check_names(requests: Sequence[ModalityRequest]) -> None:
    """Raise ConfigError if names of modalities are unsuitable; before any data is read, which can take long."""
    try:
        check_distinct_names([Modality(request.name, "uint8", ()) for request in requests])
    except ValueError as error:
        raise ConfigError(f"names of modalities: {error}") from None


def file_extension(path: str) -> str:
    """What decides how a file is read: the part after the last dot of its name, in lower case."""
    return path.rpartition("/")[2].rpartition(".")[2].lower()


def member_extension(name: str, encoding: str, path: str) -> str:
    """What follows the key in the name of the member that a file becomes; images keep their format."""
    return f"{name}.{file_extension(path) if encoding == 'image' else _MEMBER_EXTENSIONS[encoding]}"


def request_for_files(request: ModalityRequest, paths: Iterable[str]) -> ModalityRequest:
    """The request with encoding and extensions that fit these files.

    Raises:
        ConfigError: their extensions do not tell the encoding.
    """
    extensions = {file_extension(path) for path in paths}
    encodings = {request.encoding or encoding_of_extension(extension) or "" for extension in extensions}
    if len(encodings) != 1 or "" in encodings:
        raise ConfigError(
            f"modality {request.name!r}: cannot tell the encoding of files with extensions "
            f"{', '.join(sorted(extensions))}; choose files of one kind, or give --encoding {request.name}=..."
        )
    (encoding,) = encodings
    members = sorted({member_extension(request.name, encoding, f"x.{extension}") for extension in extensions})
    return replace(request, encoding=encoding, extensions=tuple(members))


def inspect_file(inspector: Inspector, path: Path) -> int:
    """Let an inspector see a file; returns its size.

    Raises:
        DataError: it cannot be read, or is not what it should be; names it.
    """
    try:
        with open_regular(path) as file:
            content = file.read(inspector.limit_bytes)
            size = file.seek(0, 2)
        if size > MAX_MEMBER_BYTES:
            raise DataError(f"{size} bytes exceed the limit of {MAX_MEMBER_BYTES} per member")
        inspector.see(content, size, str(path))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    return size


def inspect_sample(
    requests: Sequence[ModalityRequest], paths: Mapping[str, Path], facts: Mapping[str, Facts]
) -> list[int]:
    """Add the files of a sample to what is known of its modalities, or none if one of them is not what it should be.

    Args:
        requests: the modalities, with their encodings.
        paths: by modality.
        facts: by modality.

    Returns:
        The sizes of the files in bytes, in the order of the requests.

    Raises:
        DataError: like `inspect_file`.
    """
    inspectors = make_inspectors(requests)
    sizes = [inspect_file(inspector, paths[name]) for name, inspector in inspectors.items()]
    for name, inspector in inspectors.items():
        facts[name].merge(inspector.facts)
    return sizes


def pack_file(path: Path, modality: Modality) -> SampleValue:
    """What is stored of a file: its bytes as they are, or the index of a class.

    Raises:
        DataError: it cannot be read or decoded; names it.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_MEMBER_BYTES + 1)
        return pack_content(content, modality, member_extension(modality.name, modality.encoding, str(path)))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (DataError, ValueError) as error:
        raise DataError(f"{path}: modality {modality.name!r}: {error}") from None


def pack_content(content: bytes, modality: Modality, extension: str) -> SampleValue:
    """Like `pack_file`, for content that is in memory.

    Raises:
        DataError, ValueError: it cannot be decoded, or is not finite.
    """
    value = decode_member(content, modality)
    if modality.encoding == "cls":
        return int(value)
    if modality.encoding in ("npy", "json"):
        check_finite(modality, np.asarray(value))
    return EncodedMember(extension, content)


def make_inspectors(requests: Sequence[ModalityRequest]) -> dict[str, Inspector]:
    """An inspector for each modality."""
    return {request.name: make_inspector(request) for request in requests}


def conclude_all(
    requests: Sequence[ModalityRequest], facts: Mapping[str, Facts]
) -> tuple[tuple[Modality, ...], list[str]]:
    """The modalities that fit all files, and notes for the user; raises like `conclude`."""
    concluded = [conclude(request, facts[request.name]) for request in requests]
    return tuple(modality for modality, _ in concluded), [note for _, notes in concluded for note in notes]


def default_samples_per_shard(sample_bytes: int, num_samples: int) -> int:
    """So many that a shard has about 256 MiB, at most 10,000, and fewer of little data."""
    return min(
        samples_for_shuffle(num_samples, MAX_DEFAULT_SAMPLES_PER_SHARD), max(1, DEFAULT_SHARD_BYTES // sample_bytes)
    )

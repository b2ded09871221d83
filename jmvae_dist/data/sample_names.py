"""How messages name a sample: its shard, its number, and its key, which is found in the tar headers of its members.

Also where the shard is damaged or not open, since that is what most messages are about. Keys serve people alone:
samples are read by number, and never by a path that a tar states.

Shape suffixes: M modalities.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import numpy as np

from jmvae_dist.data.files import open_regular
from jmvae_dist.data.index import read_records_of_sample
from jmvae_dist.data.indexing.tar_scan import name_before
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.shard_bytes import TAR_BLOCK_BYTES
from jmvae_dist.data.urls import shown
from jmvae_dist.errors import DataError

# As much is read before a member to find its name, with extended headers for long names.
_MOST_HEADER_BYTES = 16 * TAR_BLOCK_BYTES

# What webdataset calls the key: the path up to the first dot of the file's name.
_KEY = re.compile(r"((?:.*/)?[^./]+)\.[^/]*$", re.DOTALL)


def key_of_sample(records_M: np.ndarray, column: int, read: Callable[[int, int], bytes], modality: Modality) -> str:
    """The key of a sample, from the tar headers before its member; for messages only, never a path.

    Args:
        records_M: the sample's records in the index.
        column: the member's.
        read: gives bytes of the tar, by offset and size.
        modality: the member's.
    """
    # Where the sample has no such member, another one knows the key as well.
    offset = int(records_M["offset"][column]) or int(records_M["offset"].max())
    if offset == 0:
        return "unknown"
    start = max(0, offset - _MOST_HEADER_BYTES)
    blocks = read(start, offset - start)
    full_name = name_before(blocks) or _stated_name(blocks[-TAR_BLOCK_BYTES:])
    for extension in modality.extensions:
        if full_name.lower().endswith(f".{extension.lower()}"):
            return full_name[: -len(extension) - 1]
    match = _KEY.match(full_name)  # of another member of the sample
    return match[1] if match else "unknown"


def _stated_name(header: bytes) -> str:
    """What a tar header that may be damaged says of the name."""
    prefix, name = (
        field.split(b"\0")[0].decode("ascii", "backslashreplace") for field in (header[345:500], header[:100])
    )
    return f"{prefix}/{name}" if prefix else name


def describe_sample(manifest: Manifest, shard_number: int, index: int, modality: str) -> str:
    """Where a sample is, for messages: shard, number, key and modality, as `ShardReader.fail` names them."""
    key = key_in_unsound_shard(manifest, shard_number, index, modality)
    return f"{shown(manifest.shard_location(shard_number))}: sample {index} (key {key!r}), modality {modality!r}"


def key_in_unsound_shard(manifest: Manifest, shard_number: int, index: int, modality: str) -> str:
    """The key of a sample of a shard that is not open or cannot be trusted, from what is there of it."""
    shard, num_modalities = manifest.shards[shard_number], len(manifest.modalities)
    column = [entry.name for entry in manifest.modalities].index(modality)
    with contextlib.suppress(DataError, OSError):
        path = manifest.index_path(shard_number)
        records_M = read_records_of_sample(path, index, shard.num_samples, num_modalities)
        if int(records_M["offset"].max()) > shard.num_bytes:
            return "unknown"
        with open_regular(manifest.shard_path(shard_number)) as file:

            def read(offset: int, size: int) -> bytes:
                file.seek(offset)
                return file.read(size)

            return key_of_sample(records_M, column, read, manifest.modalities[column])
    return "unknown"

"""The sidecar index of a shard: where each member's bytes lie.

Little-endian binary: an 8-byte magic, version (u32), members per sample (u32), number of samples (u64); then
one 12-byte record per member (offset u64, size u32), sample by sample, in the manifest's order of modalities.
Offsets point at the member's content; its 512-byte tar header lies directly before. Offset and size 0 say that
the sample has no such member.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np

from jmvae_dist.data.files import open_regular, read_exactly
from jmvae_dist.data.urls import Location
from jmvae_dist.errors import DataError

INDEX_VERSION = 1
RECORD_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4")])
MAX_MEMBER_BYTES = 2**32 - 1
# 22 million members: whoever reads a shard holds its index in memory.
MAX_INDEX_BYTES = 256 * 2**20

_MAGIC = b"JMVAEIDX"
_HEADER = struct.Struct("<8sIIQ")


def index_bytes(records_NM: np.ndarray) -> bytes:
    """The content of an index file for records of shape (samples, modalities)."""
    assert records_NM.dtype == RECORD_DTYPE
    assert records_NM.ndim == 2
    num_samples, num_modalities = records_NM.shape
    return _HEADER.pack(_MAGIC, INDEX_VERSION, num_modalities, num_samples) + records_NM.tobytes()


def index_num_bytes(num_samples: int, num_modalities: int) -> int:
    """Size of the index file of a shard."""
    return _HEADER.size + num_samples * num_modalities * RECORD_DTYPE.itemsize


def read_index(
    path: str | Path,
    num_samples: int,
    num_modalities: int,
    shard_num_bytes: int,
    sha256: str | None,
    manifest: Location | None = None,
) -> np.ndarray:
    """Read and check an index file; arguments, result and errors are those of `parse_index`.

    Args:
        manifest: the one that names the file; see `read_exactly`.

    Raises:
        DataError: the file cannot be read, besides.
        UnreachableError: for a reason that says nothing against it.
    """
    content = read_exactly(path, "index", index_num_bytes(num_samples, num_modalities), manifest)
    return parse_index(content, path, num_samples, num_modalities, shard_num_bytes, sha256)


def read_records_of_sample(path: str | Path, index: int, num_samples: int, num_modalities: int) -> np.ndarray:
    """The records of one sample, (num_modalities,), for messages: nothing else of the file is read or checked.

    Raises:
        DataError: it is not an index of so many samples and modalities.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        header = file.read(_HEADER.size)
        if header != _HEADER.pack(_MAGIC, INDEX_VERSION, num_modalities, num_samples):
            raise DataError(f"{path}: not an index of {num_samples} samples with {num_modalities} modalities")
        file.seek(_HEADER.size + index * num_modalities * RECORD_DTYPE.itemsize)
        content = file.read(num_modalities * RECORD_DTYPE.itemsize)
    if len(content) != num_modalities * RECORD_DTYPE.itemsize:
        raise DataError(f"{path}: the index is cut off")
    return np.frombuffer(content, RECORD_DTYPE)


def parse_index(
    content: bytes, path: str | Path, num_samples: int, num_modalities: int, shard_num_bytes: int, sha256: str | None
) -> np.ndarray:
    """Check the content of an index file, which has the right length.

    Args:
        content: `index_num_bytes(num_samples, num_modalities)` bytes.
        path: the index file, for messages.
        num_samples, num_modalities, shard_num_bytes: what the manifest says of the shard.
        sha256: checked unless None.

    Returns:
        Read-only records of shape (num_samples, num_modalities), fields `offset` and `size`, without a copy.

    Raises:
        DataError: it is damaged, of another shape, or points outside its shard.
    """
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path}: index does not have the sha256 of the manifest: it is damaged or was replaced")
    magic, version, modalities, samples = _HEADER.unpack_from(content)
    if magic != _MAGIC or version != INDEX_VERSION:
        raise DataError(f"{path}: not a version {INDEX_VERSION} index")
    if (samples, modalities) != (num_samples, num_modalities):
        raise DataError(
            f"{path}: index of {samples} samples with {modalities} modalities; "
            f"the manifest says {num_samples} with {num_modalities}"
        )
    records = np.frombuffer(content, RECORD_DTYPE, offset=_HEADER.size).reshape(num_samples, num_modalities)
    # Compared without adding, so that a hostile offset near 2**64 cannot wrap around.
    is_missing = (records["offset"] == 0) & (records["size"] == 0)
    outside = ((records["offset"] < 512) & ~is_missing) | (records["offset"] > shard_num_bytes)
    outside |= records["size"] > np.uint64(shard_num_bytes) - np.minimum(records["offset"], shard_num_bytes)
    if outside.any():
        sample, modality = np.argwhere(outside)[0]
        raise DataError(
            f"{path}: member {modality} of sample {sample} lies outside the shard's {shard_num_bytes} bytes"
        )
    return records

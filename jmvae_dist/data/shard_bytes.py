"""The bytes of one open shard: mapped from a file, or read over the network member by member."""

from __future__ import annotations

import contextlib
import mmap
from bisect import bisect_right
from collections.abc import Callable
from functools import partial

import numpy as np

from jmvae_dist.data.cache import CachedFile, ShardCache
from jmvae_dist.data.sums import MemberChecks
from jmvae_dist.data.transfer import RemoteFile
from jmvae_dist.errors import DataError

TAR_BLOCK_BYTES = 512
# Bytes between two members that are read along, because another request would take longer.
_MAX_GAP_BYTES = 64 * 2**10
_MAX_REQUEST_BYTES = 8 * 2**20


class DamagedCopyError(DataError):
    """A member of a shard's copy in the cache is not what it should be; that says nothing against the shard."""

    def __init__(self, message: str, shard_number: int) -> None:
        super().__init__(message)
        self.shard_number = shard_number


class MappedShard:
    """A shard of which all bytes are at hand.

    Attributes:
        name: path or URL, for messages.
        buffer: the whole tar, mapped into memory.
        records_NM: the index.
        checks: how members are to be checked when they are used; None: not at all.
    """

    def __init__(
        self,
        name: str,
        buffer: mmap.mmap,
        records_NM: np.ndarray,
        checks: MemberChecks | None,
        file: CachedFile | None = None,
    ) -> None:
        self.name = name
        self.buffer: mmap.mmap | None = buffer
        self.records_NM = records_NM
        self.checks = checks
        self._map = buffer
        self._file = file

    def read(self, offset: int, size: int) -> bytes:
        """Some bytes of the tar."""
        return self._map[offset : offset + size]

    def read_member(self, offset: int, size: int, most_bytes: int) -> bytes:
        """The first up to `most_bytes` of the content of a member."""
        return self.read(offset, min(size, most_bytes))

    @property
    def is_copy(self) -> bool:
        """Whether it is a file in the cache."""
        return self._file is not None

    def remove_copy(self, cache: ShardCache) -> None:
        """Close it and remove it from the cache, from where whoever opens it next will not get it again."""
        assert self._file is not None
        cache.remove_damaged(self._file)
        self._file = None
        self.close()

    def close(self) -> None:
        # A traceback may still refer to a view; the mapping then goes when the view does.
        with contextlib.suppress(BufferError):
            self._map.close()
        if self._file is not None:
            self._file.close()
            self._file = None


class RangedShard:
    """A shard on a server, of which only the members that are asked for are read, and kept until the next ones are.

    Its sha256 cannot be checked. Each member's tar header is, and its digest if there are `checks`.
    """

    buffer = None
    is_copy = False

    def __init__(self, name: str, remote: RemoteFile, records_NM: np.ndarray, checks: MemberChecks | None) -> None:
        self.name = name
        self.records_NM = records_NM
        self.checks = checks
        self._remote = remote
        self._starts: list[int] = []
        self._pieces: list[bytes] = []

    def load(self, members: np.ndarray) -> list[Callable[[], None]]:
        """Requests that bring the given members (records, any shape), to be run in any order and by any threads."""
        members = np.unique(members[members["offset"] >= TAR_BLOCK_BYTES])
        starts = members["offset"].astype(np.int64) - TAR_BLOCK_BYTES
        groups = _coalesce(starts, members["offset"].astype(np.int64) + members["size"])
        self._starts = [start for start, _ in groups]
        # Bound now: a request that outlives its batch, because another one failed, must not write into the next one.
        self._pieces = pieces = [b""] * len(groups)
        return [partial(self._load_piece, pieces, number, start, stop) for number, (start, stop) in enumerate(groups)]

    def unload(self) -> None:
        """Forget what was loaded."""
        self._starts, self._pieces = [], []

    def _load_piece(self, pieces: list[bytes], number: int, start: int, stop: int) -> None:
        pieces[number] = self._remote.read_range(start, stop)

    def read(self, offset: int, size: int) -> bytes:
        """Some bytes of the tar; over the network unless they have been loaded."""
        number = bisect_right(self._starts, offset) - 1
        if number >= 0:
            start = offset - self._starts[number]
            if start + size <= len(self._pieces[number]):
                return self._pieces[number][start : start + size]
        return self._remote.read_range(offset, offset + size) if size else b""

    def read_member(self, offset: int, size: int, most_bytes: int) -> bytes:
        """The first up to `most_bytes` of the content of a member.

        Raises:
            DataError: The tar header before it is damaged, or that of another member.
        """
        content = self.read(offset - TAR_BLOCK_BYTES, TAR_BLOCK_BYTES + min(size, most_bytes))
        if not _is_header_of(content[:TAR_BLOCK_BYTES], size):
            raise DataError("the tar header before it is damaged, or that of another member")
        return content[TAR_BLOCK_BYTES:]

    def close(self) -> None:
        self.unload()


ShardBytes = MappedShard | RangedShard


def _coalesce(starts: np.ndarray, stops: np.ndarray) -> list[tuple[int, int]]:
    """Joins ranges, in ascending order of their starts, that lie close together."""
    groups: list[tuple[int, int]] = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if groups:
            first, last = groups[-1]
            if start - last <= _MAX_GAP_BYTES and stop - first <= _MAX_REQUEST_BYTES:
                groups[-1] = first, max(last, stop)
                continue
        groups.append((start, stop))
    return groups


def _is_header_of(header: bytes, size: int) -> bool:
    """Whether 512 bytes are a tar header of a member of this size, with a sound checksum."""
    try:
        checksum = int(header[148:156].strip(b"\0 "), 8)
        # A size that octal digits cannot hold is in another form; such a member is too large anyway.
        stated_size = int(header[124:136].strip(b"\0 "), 8)
    except ValueError:
        return False
    content = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(content)
    signed = unsigned - 256 * sum(byte > 127 for byte in content)  # as some old programs have it
    return checksum in (unsigned, signed) and stated_size == size

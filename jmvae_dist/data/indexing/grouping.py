"""Which members of a tar make a sample: the rules of webdataset, with what it would pass over in silence counted.

The key of a member is its path up to the first dot of the base name; the rest, in lower case, is its extension.
Members with one key are one sample. webdataset joins adjacent ones only; here they may lie anywhere in the shard,
as `tar` leaves them when it packs one folder per modality.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jmvae_dist.data.index import RECORD_DTYPE
from jmvae_dist.data.indexing.tar_scan import TarMember
from jmvae_dist.data.untrusted import printable
from jmvae_dist.errors import DataError

MAX_KEY_BYTES_PER_SHARD = 256 * 2**20

_MAX_EXTENSIONS = 100
_OTHER_EXTENSIONS = "(others)"
# webdataset keeps notes of its own in names such as __index__ and __meta__/count.txt.
_META = re.compile(r"__[^/]*__(/|$)")


class MemberName(NamedTuple):
    """What webdataset makes of a member's path."""

    key: str
    extension: str


def split_name(path: str) -> MemberName | None:
    """Key and extension of a member; None for what belongs to no sample: hidden files, no extension, `__meta__`."""
    folder, slash, base = path.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or _META.match(path):
        return None
    return MemberName(f"{folder}{slash}{stem}", extension.lower())


class SampleGrouper:
    """Collects the members of one shard into samples, in the order in which samples begin.

    Args:
        columns: which columns of the index an extension fills.
        num_columns: members per sample.
        path: names the shard in messages.

    Attributes:
        keys: by sample.
        ignored: how many members have which other extension.
        skipped: members that belong to no sample.
        scattered: keys of samples whose members are not adjacent: the first one, and how many there are.
    """

    def __init__(self, columns: Mapping[str, tuple[int, ...]], num_columns: int, path: str) -> None:
        self.keys: list[str] = []
        self.ignored: Counter[str] = Counter()
        self.skipped = 0
        self._columns, self._num_columns, self._path = columns, num_columns, path
        self._offsets, self._sizes, self._digests = array("Q"), array("I"), array("Q")
        self._rows: dict[str, int] = {}
        self._scattered: set[int] = set()
        self._current = -1
        self._key_bytes = 0

    def add(self, member: TarMember) -> tuple[int, ...]:
        """Take the next member; returns the columns that it fills.

        Raises:
            DataError: the sample has such a member already, or there are too many keys.
        """
        name = split_name(member.name)
        if name is None:
            self.skipped += 1
            return ()
        columns = self._columns.get(name.extension, ())
        if not columns:
            known = name.extension in self.ignored or len(self.ignored) < _MAX_EXTENSIONS
            self.ignored[name.extension if known else _OTHER_EXTENSIONS] += 1
            return ()
        row = self._row(name.key)
        for column in columns:
            place = row * self._num_columns + column
            if self._offsets[place]:
                raise DataError(
                    f"{self._path}: member {printable(member.name)!r} is the second one of sample "
                    f"{printable(name.key)!r} for one modality; keys must be unique within a shard"
                )
            self._offsets[place], self._sizes[place] = member.offset, member.size
        return columns

    def set_digest(self, columns: Sequence[int], digest: int) -> None:
        """Take the digest of the member that was added last."""
        for column in columns:
            self._digests[self._current * self._num_columns + column] = digest

    def forget_last(self, columns: Sequence[int]) -> None:
        """Take back the member that was added last: it cannot be read."""
        for column in columns:
            place = self._current * self._num_columns + column
            self._offsets[place] = self._sizes[place] = self._digests[place] = 0

    def _row(self, key: str) -> int:
        if self._current >= 0 and self.keys[self._current] == key:
            return self._current
        row = self._rows.setdefault(key, len(self.keys))
        if row < len(self.keys):
            self._scattered.add(row)
        else:
            self._key_bytes += len(key)
            if self._key_bytes > MAX_KEY_BYTES_PER_SHARD:
                raise DataError(f"{self._path}: the keys take more than {MAX_KEY_BYTES_PER_SHARD} bytes")
            self.keys.append(key)
            self._offsets.extend([0] * self._num_columns)
            self._sizes.extend([0] * self._num_columns)
            self._digests.extend([0] * self._num_columns)
        self._current = row
        return row

    @property
    def scattered(self) -> tuple[str, int]:
        return (self.keys[min(self._scattered)] if self._scattered else "", len(self._scattered))

    def records(self) -> np.ndarray:
        """Index records (samples, columns); offset and size 0 where a sample lacks the member."""
        records = np.empty(len(self._offsets), RECORD_DTYPE)
        records["offset"], records["size"] = self._offsets, self._sizes
        return records.reshape(-1, self._num_columns)

    def digests(self) -> np.ndarray:
        """Of the members in those places, uint64 (samples, columns); 0 where one is lacking."""
        return np.array(self._digests, np.uint64).reshape(-1, self._num_columns)

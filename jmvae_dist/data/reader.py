"""Reads samples of one tar shard by number, through the index, without unpacking or scanning.

A shard is mapped into memory. Where the members of a modality have one size and lie at even distances, which is how
`jmvae-dist shards write` lays them out, the modality is a strided array over the tar itself: any set of samples is
one gather, and their headers are compared with that of the first member. Otherwise, and where a header differs, each
sample is decoded by its index entry. Both paths give the same values. Batches from many shards: `shard_set`.

Shape suffixes: N samples of the shard, B samples asked for, M modalities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from jmvae_dist.data.columns import Alike, Column, Columns, Kind, open_column
from jmvae_dist.data.encodings import decode_member, max_member_bytes
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.sample_names import key_of_sample
from jmvae_dist.data.shard_bytes import DamagedCopyError, ShardBytes
from jmvae_dist.data.store import ShardStore, Verify
from jmvae_dist.errors import DataError, UnreachableError


class ShardReader:
    """One open shard.

    Args:
        manifest: the data set.
        shard_number: which of its shards.
        verify: when the bytes of the shard are checked; see `ShardStore`.
        content: the opened shard; opened here without it.

    Raises:
        DataError: the shard or its index is missing, truncated, damaged, or not what the manifest says.
    """

    def __init__(
        self,
        manifest: Manifest,
        shard_number: int,
        verify: Verify = "first_use",
        content: ShardBytes | None = None,
    ) -> None:
        self.content = content or ShardStore(manifest, verify).open(shard_number)
        self.path = self.content.name
        self._shard_number = shard_number
        self.num_samples = manifest.shards[shard_number].num_samples
        self._modalities = {modality.name: modality for modality in manifest.modalities}
        self._columns = {modality.name: column for column, modality in enumerate(manifest.modalities)}
        self._records_NM = self.content.records_NM
        self._opened_columns: dict[tuple[str, ...], Columns] = {}

    def close(self) -> None:
        """Release the mapping; the reader cannot be used afterwards."""
        self._opened_columns.clear()
        self.content.close()

    def read(self, indices: Sequence[int] | np.ndarray, modality: str) -> np.ndarray:
        """What the model sees of some samples without transforms of a run: float32 (B, *shape), finite.

        For modalities of a fixed shape.

        Raises:
            DataError: names shard, key, modality and cause.
        """
        index_B = np.asarray(indices, dtype=np.int64)
        values = self._modalities[modality].to_model(self.read_stored(index_B, modality))
        bad_row = first_non_finite_row(values)
        if bad_row is not None:
            self.fail(int(index_B[bad_row]), modality, "value is not finite (NaN or infinite)")
        return values

    def read_stored(self, index_B: np.ndarray, modality: str) -> np.ndarray:
        """Decoded values (B, *stored_shape) of the modality's dtype, for modalities of a fixed shape.

        Raises like `read`, except that values may be non-finite.
        """
        self._check_indices(index_B)
        columns = self.columns((modality,))
        if columns.others:
            return self._decode_each(index_B, modality)
        alike = Alike(columns, len(index_B), len(index_B))
        stored: dict[str, np.ndarray] = {}
        alike.take(columns, np.arange(len(index_B)), index_B)
        if (damage := alike.find_damage()) is not None:
            self.fail_damaged(int(index_B[damage[1]]), modality)
        # The general path knows what else a member may be, and explains what is wrong.
        return self._decode_each(index_B, modality) if alike.parse_into(stored) else stored[modality]

    def columns(self, modalities: tuple[str, ...]) -> Columns:
        """Those of some modalities that are an array over the tar: their members have one size and distance."""
        if modalities not in self._opened_columns:
            opened = {name: self._open_column(name) for name in modalities}
            columns = {name: column for name, column in opened.items() if column is not None}
            numbers = tuple(self._columns[name] for name in columns)
            self._opened_columns[modalities] = Columns(
                modalities=tuple(self._modalities[name] for name in columns),
                contents=tuple(column.contents for column in columns.values()),
                kind=Kind(numbers, tuple(column.layout for column in columns.values())),
                checks=None if self.content.checks is None or not numbers else self.content.checks.of(numbers),
                others=tuple(name for name in modalities if name not in columns),
            )
        return self._opened_columns[modalities]

    def _open_column(self, modality: str) -> Column | None:
        if self.content.buffer is None:
            return None
        number = self._columns[modality]
        return open_column(self.content.buffer, self._records_NM, number, self._modalities[modality])

    def key(self, index: int, modality: str) -> str:
        """The key of a sample, from the tar header before its member; for messages, which can do without it."""
        try:
            return self.stated_key(index, modality)
        except DataError:  # to read it over the network may fail
            return "unknown"

    def stated_key(self, index: int, modality: str) -> str:
        """The same for a user who works with it; never a path. Raises DataError if it cannot be read."""
        return key_of_sample(
            self._records_NM[index], self._columns[modality], self.content.read, self._modalities[modality]
        )

    def members(self, index_B: np.ndarray, modalities: Sequence[str]) -> np.ndarray:
        """What `member_bytes` reads of some samples, as index records (B, len(modalities))."""
        self._check_indices(index_B)
        columns = np.array([self._columns[modality] for modality in modalities])
        records = self._records_NM[index_B[:, None], columns]
        records["size"] = np.minimum(records["size"], [self._most_bytes(modality) for modality in modalities])
        return records

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in the order of the index."""
        return tuple(self._columns)

    @property
    def records(self) -> np.ndarray:
        """The index: fields `offset` and `size`, (samples, modalities)."""
        return self._records_NM

    def location(self, index: int, modality: str) -> tuple[int, int]:
        """Offset and size in bytes of a member's content in the tar."""
        record = self._records_NM[index, self._columns[modality]]
        return int(record["offset"]), int(record["size"])

    def fail(self, index: int, modality: str, problem: str) -> NoReturn:
        """Raise the DataError of one sample."""
        raise DataError(self._message(index, modality, problem))

    def _message(self, index: int, modality: str, problem: str) -> str:
        return f"{self.path}: sample {index} (key {self.key(index, modality)!r}), modality {modality!r}: {problem}"

    def fail_damaged(self, index: int, modality: str) -> NoReturn:
        """Raise the DataError of a sample whose member does not have its digest."""
        problem = "its bytes are not those that the shard's sums were made of: it is damaged; copy the shard again"
        if self.content.is_copy:
            raise DamagedCopyError(self._message(index, modality, problem), self._shard_number)
        self.fail(index, modality, problem)

    def _check_indices(self, index_B: np.ndarray) -> None:
        """Raise DataError unless the shard has all these samples."""
        # As unsigned numbers negative ones are large: one comparison finds both kinds.
        outside = index_B.view(np.uint64) >= self.num_samples
        if outside.any():
            index = int(index_B[np.argmax(outside)])
            raise DataError(f"{self.path}: sample {index} does not exist; the shard has {self.num_samples} samples")

    def _most_bytes(self, modality: str) -> int:
        """So much of a member is read: one byte more than it may have shows that it has too many."""
        return max_member_bytes(self._modalities[modality]) + 1

    def member_bytes(self, index: int, modality: str) -> bytes:
        """The content of a member, not all of one that is too long.

        Raises:
            DataError: the sample has none, or it is damaged.
        """
        offset, size = self.location(index, modality)
        if offset == 0:
            names = " or ".join(repr(name) for name in self._modalities[modality].extensions)
            self.fail(index, modality, f"the sample has no member {names}")
        try:
            content = self.content.read_member(offset, size, self._most_bytes(modality))
        except UnreachableError:
            raise
        except DataError as error:
            self.fail(index, modality, str(error))
        checks = self.content.checks
        # One that is too long was not read as a whole, and will be refused.
        is_whole = len(content) == size
        if checks is not None and is_whole and not checks.is_sound(self._columns[modality], index, content):
            self.fail_damaged(index, modality)
        return content

    # General path

    def _decode_each(self, index_B: np.ndarray, modality: str) -> np.ndarray:
        spec = self._modalities[modality]
        stored = np.empty((len(index_B), *spec.stored_shape), dtype=spec.dtype)
        for row, index in enumerate(index_B.tolist()):
            stored[row] = self.decode(index, modality)
        return stored

    def decode(self, index: int, modality: str) -> np.ndarray | int:
        """The decoded value of one sample; raises like `read`."""
        content = self.member_bytes(index, modality)
        try:
            return decode_member(content, self._modalities[modality])
        except DataError as error:
            self.fail(index, modality, str(error))


def first_non_finite_row(values: np.ndarray) -> int | None:
    """The first row of (B, ...) that holds a NaN or an infinity, or None."""
    finite = np.isfinite(values)
    if finite.all():
        return None
    return int(np.argmin(finite.reshape(len(values), -1).all(axis=1)))

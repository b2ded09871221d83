"""Members of one size at even distances, which are a strided array over the tar: a batch of them is one gather.

Their headers and, where they are new to the process, their digests are compared for the whole batch at once,
whichever shards its members are from. What is compared is what is used: the values are views of what was gathered.

Shape suffixes: N samples of the shard, B samples of the batch, C of them that are compared, M modalities,
S bytes of a member, W 64-bit words of it.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple

import numpy as np

from jmvae_dist.data.digest import digests_of_rows
from jmvae_dist.data.encodings import MAX_NPY_HEADER_BYTES, max_member_bytes, parse_npy_header
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.sums import ColumnChecks
from jmvae_dist.errors import DataError

_ASCII_ZERO = np.uint8(ord("0"))


class Layout(NamedTuple):
    """What members must have in common to be parsed together.

    Attributes:
        num_bytes: of each.
        header: how they must begin to be read all alike; empty for `cls`.
    """

    num_bytes: int
    header: bytes


class Column(NamedTuple):
    """The members of a modality in a shard as one array over the tar.

    Attributes:
        contents: void (N,), each of all the bytes of a member: they are copied twice as fast as rows of bytes.
        layout: of each.
    """

    contents: np.ndarray
    layout: Layout


class Kind(NamedTuple):
    """What columns of several shards must have in common: modalities, as numbers in the index, and their layouts."""

    numbers: tuple[int, ...]
    layouts: tuple[Layout, ...]


class Columns(NamedTuple):
    """Modalities of an open shard that are read together.

    Attributes:
        modalities: those that are read by columns.
        contents: of the members of each, void (N,).
        kind: what those of other shards may have in common with them.
        checks: what the members are to be compared with; None: nothing.
        others: names of those that have to be decoded one by one.
    """

    modalities: tuple[Modality, ...]
    contents: tuple[np.ndarray, ...]
    kind: Kind
    checks: ColumnChecks | None
    others: tuple[str, ...]


def open_column(buffer: mmap.mmap, records_NM: np.ndarray, number: int, modality: Modality) -> Column | None:
    """The members of a modality as one array, or None if they differ in size or distance, or have to be decoded.

    Args:
        buffer: the whole tar.
        records_NM: its index.
        number: of the modality in the index.
        modality: what the manifest says of it.
    """
    if modality.encoding not in ("npy", "cls"):
        return None
    offset_N, size_N = records_NM["offset"][:, number], records_NM["size"][:, number]
    stride = int(offset_N[1]) - int(offset_N[0]) if len(offset_N) > 1 else 0
    # No product can wrap around unnoticed: the offsets it is compared with all lie inside the file.
    evenly_spaced = stride >= 0 and np.array_equal(
        offset_N, np.uint64(offset_N[0]) + np.arange(len(offset_N), dtype=np.uint64) * np.uint64(stride)
    )
    if not evenly_spaced or np.any(size_N != size_N[0]):
        return None
    offset, size = int(offset_N[0]), int(size_N[0])
    most_bytes = modality.class_digits if modality.encoding == "cls" else max_member_bytes(modality)
    if not 1 <= size <= most_bytes:
        return None
    header: bytes | None = b""
    if modality.encoding == "npy":
        header = _npy_header(buffer[offset : offset + min(size, MAX_NPY_HEADER_BYTES)], size, modality)
    if header is None:
        return None
    contents_N = np.ndarray((len(offset_N),), f"V{size}", buffer, offset, (stride,))
    return Column(contents_N, Layout(size, header))


def _npy_header(start: bytes, num_bytes: int, modality: Modality) -> bytes | None:
    """The header of a member that begins like this, if it is what the manifest says."""
    try:
        dtype, shape, fortran_order, header_bytes = parse_npy_header(start)
    except DataError:
        return None
    if (dtype, shape) != (np.dtype(modality.dtype), modality.fixed_shape) or fortran_order:
        return None
    return start[:header_bytes] if num_bytes == header_bytes + modality.stored_bytes else None


class Alike:
    """The samples of a batch whose columns have the same layouts, whichever shards they are from.

    They are compared and parsed together: a batch may have a few samples of each of very many shards.

    Args:
        first: columns of one of the shards.
        num_rows: of the batch.
        room: for how many samples there is memory at first. For all of the batch: each is put in the place of its
            row, and usually nothing has to be moved later. For less: one after another, and the memory grows with
            them. A batch may be of very many layouts, too, which must not all take memory for all of it.
    """

    def __init__(self, first: Columns, num_rows: int, room: int) -> None:
        self._members = [
            _Members(modality, layout, room)
            for modality, layout in zip(first.modalities, first.kind.layouts, strict=True)
        ]
        self._num_rows = num_rows
        self._is_in_order = room == num_rows
        self._num_taken = 0
        # Of each sample that was taken: its row in the batch.
        self._rows: list[np.ndarray] = []
        # Of samples that may have to be compared: places here, samples in their shards, and what with.
        self._uncompared: list[tuple[np.ndarray, np.ndarray, ColumnChecks]] = []

    def take(self, columns: Columns, rows: np.ndarray, index_B: np.ndarray) -> None:
        """Copy some samples of a shard, of the same kind as the first, for some rows of the batch.

        At once: the shard may be closed afterwards.
        """
        places = rows if self._is_in_order else np.arange(self._num_taken, self._num_taken + len(rows))
        self._num_taken += len(rows)
        for members, contents_N in zip(self._members, columns.contents, strict=True):
            members.make_room(self._num_taken)
            members.contents_B[places] = contents_N[index_B]
        self._rows.append(rows)
        checks = columns.checks
        if checks is not None and not checks.checked.are_all:
            self._uncompared.append((places, index_B, checks))

    def find_damage(self) -> tuple[str, int] | None:
        """Modality and row of a member, of those taken since the last call, that does not have its digest.

        Until all samples of its shard have been compared, a sample that comes again is compared again: to find out
        which have been takes longer.
        """
        parts, self._uncompared = self._uncompared, []
        if not parts:
            return None
        places_C = np.concatenate([places for places, _, _ in parts])
        expected_CM = np.concatenate([checks.digests.take(index, axis=0) for _, index, checks in parts])
        for number, members in enumerate(self._members):
            is_wrong_C = members.digests(places_C) != expected_CM[:, number]
            if np.count_nonzero(is_wrong_C):
                place = int(places_C[np.argmax(is_wrong_C)])
                return members.modality.name, place if self._is_in_order else int(np.concatenate(self._rows)[place])
        for _, index, checks in parts:
            checks.checked.add(index)
        return None

    def parse_into(self, stored: dict[str, np.ndarray]) -> list[tuple[str, int]]:
        """Put decoded values, by modality, into the rows that were taken.

        Returns:
            Modality and row of members that are something else than the first one of their shard.
        """
        others: list[tuple[str, int]] = []
        is_batch = self._is_in_order and self._num_taken == self._num_rows
        rows = None if is_batch else np.concatenate(self._rows)
        for members in self._members:
            name = members.modality.name
            values, is_other_B = members.parse()
            if rows is None:
                stored[name] = values
                other_rows = np.flatnonzero(is_other_B)
            else:
                places = rows if self._is_in_order else slice(self._num_taken)
                stored[name][rows] = values[places]
                other_rows = rows[is_other_B[places]]
            others += [(name, row) for row in other_rows.tolist()]
        return others


class _Members:
    """The members of one modality in a batch, in B places.

    Attributes:
        modality: theirs.
        contents_B: void (B,), to be filled in.
    """

    def __init__(self, modality: Modality, layout: Layout, room: int) -> None:
        self.modality = modality
        self._layout = layout
        self._allocate(room)

    def _allocate(self, room: int) -> None:
        num_words = -(-self._layout.num_bytes // 8)
        self._words_BW = np.empty((room, num_words), np.uint64)
        self._words_BW[:, -1] = 0  # in a digest, zeros follow the content
        self.contents_B = np.ndarray((room,), f"V{self._layout.num_bytes}", self._words_BW, 0, (8 * num_words,))

    def make_room(self, num_samples: int) -> None:
        """See that there are so many places; what has been filled in stays where it is."""
        filled_BW = self._words_BW
        if num_samples > len(filled_BW):
            self._allocate(max(num_samples, 2 * len(filled_BW)))
            self._words_BW[: len(filled_BW)] = filled_BW

    def digests(self, places_C: np.ndarray) -> np.ndarray:
        """Of the members in some places: uint64 (C,)."""
        if len(places_C) == len(self._words_BW):
            return digests_of_rows(self._words_BW, self._layout.num_bytes)[places_C]
        return digests_of_rows(self._words_BW[places_C], self._layout.num_bytes)

    def parse(self) -> tuple[np.ndarray, np.ndarray]:
        """Decoded values (B, *stored_shape), a view if possible, and in which places they are not: bool (B,).

        Places that have not been filled in have any values.
        """
        members_BS = self._words_BW.view(np.uint8)[:, : self._layout.num_bytes]
        if self.modality.encoding == "cls":
            return _parse_classes(members_BS, self.modality)
        header = self._layout.header
        is_other_B = _any_in_row(members_BS[:, : len(header)] != np.frombuffer(header, np.uint8))
        values = members_BS[:, len(header) :].view(self.modality.dtype)
        return values.reshape(len(members_BS), *self.modality.fixed_shape), is_other_B


def _parse_classes(members_BS: np.ndarray, modality: Modality) -> tuple[np.ndarray, np.ndarray]:
    """Class indices from their digits, int64 (B,), and where they are none: bool (B,)."""
    assert modality.num_classes is not None
    digits_BS = members_BS - _ASCII_ZERO  # what is below "0" wraps around to a large number
    class_B = digits_BS[:, 0].astype(np.int64)
    for column in range(1, digits_BS.shape[1]):
        class_B = class_B * 10 + digits_BS[:, column]
    is_too_large_B: np.ndarray = class_B >= modality.num_classes
    return class_B, _any_in_row(digits_BS > 9) | is_too_large_B


def _any_in_row(is_true_BN: np.ndarray) -> np.ndarray:
    """`any` along the second axis; fast where nothing is true."""
    return np.asarray(is_true_BN.any(axis=1)) if is_true_BN.any() else np.zeros(len(is_true_BN), bool)

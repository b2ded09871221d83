"""The sums of a shard: a digest of every member, so that each can be checked when it is first used.

Without them the sha256 of a whole shard has to be computed before its first sample can be trusted. A sums file has,
for each record of the shard's index and in the same order, the eight bytes of the member's digest (see
`jmvae_dist.data.digest`), little-endian; zeros where the sample has no such member. The manifest has the sha256 of
the sums file. Sums tell damaged members from sound ones; they are no protection against forged ones.

Shape suffixes: N samples of the shard, M modalities, B samples of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jmvae_dist.data.digest import DIGEST_BYTES, member_digest
from jmvae_dist.data.files import read_exactly
from jmvae_dist.data.urls import Location
from jmvae_dist.errors import DataError


def sums_num_bytes(num_samples: int, num_modalities: int) -> int:
    """Size of the sums file of a shard."""
    return num_samples * num_modalities * DIGEST_BYTES


def sums_bytes(digests: np.ndarray | Sequence[int]) -> bytes:
    """A sums file of digests, uint64 (N, M) or sample by sample."""
    return np.asarray(digests, "<u8").tobytes()


def read_sums(
    path: str | Path, num_samples: int, num_modalities: int, sha256: str, manifest: Location | None = None
) -> np.ndarray:
    """Read and check a sums file; arguments, result and errors are those of `parse_sums`.

    Args:
        manifest: the one that names the file; see `read_exactly`.

    Raises:
        DataError: the file cannot be read, besides.
        UnreachableError: for a reason that says nothing against it.
    """
    content = read_exactly(path, "sums file", sums_num_bytes(num_samples, num_modalities), manifest)
    return parse_sums(content, path, num_samples, num_modalities, sha256)


def parse_sums(content: bytes, path: str | Path, num_samples: int, num_modalities: int, sha256: str) -> np.ndarray:
    """Check the content of a sums file.

    Args:
        content: `sums_num_bytes(num_samples, num_modalities)` bytes.
        path: the sums file, for messages.
        num_samples, num_modalities, sha256: what the manifest says.

    Returns:
        Read-only digests, uint64 (N, M), without a copy.

    Raises:
        DataError: it is damaged.
    """
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path}: sums do not have the sha256 of the manifest: they are damaged or were replaced")
    return np.frombuffer(content, "<u8").reshape(num_samples, num_modalities)


class CheckedMembers:
    """Which members of a shard have been compared with their digests; outlives the shard's being open.

    Kept for sets of modalities that are read together, given by their numbers in the index.
    """

    def __init__(self, records_NM: np.ndarray) -> None:
        self._num_modalities = records_NM.shape[1]
        self._samples: dict[tuple[int, ...], CheckedSamples] = {}

    @property
    def are_all(self) -> bool:
        """Whether nothing is left to be compared."""
        done = {number for numbers, samples in self._samples.items() if samples.are_all for number in numbers}
        return len(done) == self._num_modalities

    def of(self, numbers: tuple[int, ...], records_NM: np.ndarray) -> CheckedSamples:
        """The samples whose members of some modalities have been compared."""
        if numbers not in self._samples:
            is_missing_N = (records_NM["offset"][:, numbers] == 0).all(axis=1)  # there is nothing to compare
            self._samples[numbers] = CheckedSamples(is_missing_N)
        return self._samples[numbers]


class CheckedSamples:
    """Which samples have been compared: a byte each, until all have been.

    Several threads may use it at a time: whoever has an old array, or lost a count, compares some samples again.

    Attributes:
        are_all: whether all have been.
    """

    def __init__(self, is_checked_N: np.ndarray) -> None:
        self._is_checked_N = is_checked_N  # empty: all have been
        self._added: list[np.ndarray] = []
        self._count()

    def are_in(self, index_B: np.ndarray) -> np.ndarray:
        """Which of some samples have been compared, bool (B,)."""
        is_checked_N = self._mark()
        return is_checked_N.take(index_B) if len(is_checked_N) else np.ones(len(index_B), bool)

    def add(self, index_B: np.ndarray) -> None:
        """Some samples have been compared, or compared again."""
        if self.are_all:
            return
        # A batch has few samples of a shard: to mark and count them at once would take longer than to compare them.
        self._added.append(index_B)
        self._least_left -= len(index_B)
        if self._least_left <= 0:
            self._count()

    def _mark(self) -> np.ndarray:
        is_checked_N, added = self._is_checked_N, self._added
        if added and len(is_checked_N):
            self._added = []
            is_checked_N[np.concatenate(added)] = True
        return is_checked_N

    def _count(self) -> None:
        is_checked_N = self._mark()
        self._least_left = len(is_checked_N) - int(np.count_nonzero(is_checked_N))
        self.are_all = self._least_left == 0
        if self.are_all:
            self._is_checked_N = np.empty(0, bool)


class MemberChecks:
    """Compares members of an open shard with their digests.

    Args:
        digests_NM: from `parse_sums`.
        records_NM: the index.
        checked: what need not be compared again; None: everything must be, each time it is read.
    """

    def __init__(self, digests_NM: np.ndarray, records_NM: np.ndarray, checked: CheckedMembers | None) -> None:
        self._digests_NM = digests_NM
        self._records_NM = records_NM
        self._checked = checked

    def of(self, numbers: tuple[int, ...]) -> ColumnChecks | None:
        """What members of some modalities are to be compared with, given by numbers in the index; None: nothing."""
        assert self._checked is not None, "shards that are not at hand have no columns"
        samples = self._checked.of(numbers, self._records_NM)
        # Contiguous, or else every `take` would copy all of it.
        return None if samples.are_all else ColumnChecks(self._digests_NM.take(numbers, axis=1), samples)

    def is_sound(self, number: int, index: int, content: bytes) -> bool:
        """Whether one member is what it should be, as far as that is still to be found out."""
        samples = None if self._checked is None else self._checked.of((number,), self._records_NM)
        if samples is not None and (samples.are_all or samples.are_in(np.array([index]))[0]):
            return True
        if member_digest(content) != int(self._digests_NM[index, number]):
            return False
        if samples is not None:
            samples.add(np.array([index]))
        return True


class ColumnChecks(NamedTuple):
    """Digests of the members that are read together, uint64 (samples, modalities), and what has been compared."""

    digests: np.ndarray
    checked: CheckedSamples

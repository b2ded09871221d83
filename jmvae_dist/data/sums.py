"""The sums of a shard: a digest of every member, so that each can be checked when it is first used.

Without them the sha256 of a whole shard has to be computed before its first sample can be trusted. A sums file has,
for each record of the shard's index and in the same order, the first 16 bytes of the sha256 of the member's content;
zeros where the sample has no such member. The manifest has the sha256 of the sums file.

Shape suffixes: N samples of the shard, M modalities, B members that are compared; 2 is a digest as two numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jmvae_dist.data.files import read_exactly
from jmvae_dist.data.urls import Location
from jmvae_dist.errors import DataError

DIGEST_BYTES = 16

_NOTHING = np.empty(0, np.int64)


def member_digest(content: bytes) -> bytes:
    """What the sums say of a member with this content."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


def sums_num_bytes(num_samples: int, num_modalities: int) -> int:
    """Size of the sums file of a shard."""
    return num_samples * num_modalities * DIGEST_BYTES


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
        Read-only digests, uint64 (N, M, 2), without a copy.

    Raises:
        DataError: it is damaged.
    """
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path}: sums do not have the sha256 of the manifest: they are damaged or were replaced")
    return np.frombuffer(content, np.uint64).reshape(num_samples, num_modalities, 2)


class CheckedMembers:
    """Which members of a shard have been compared with their digests; outlives the shard's being open.

    A byte per member of the modalities in use, until all of a modality have been compared.
    """

    def __init__(self, records_NM: np.ndarray) -> None:
        self._num_modalities = records_NM.shape[1]
        self._is_checked: dict[int, np.ndarray | None] = {}

    @property
    def are_all(self) -> bool:
        """Whether nothing is left to be compared."""
        return len(self._is_checked) == self._num_modalities and not any(
            is_checked_N is not None for is_checked_N in self._is_checked.values()
        )

    def of(self, column: int, records_NM: np.ndarray) -> np.ndarray | None:
        """Which members of a modality have been compared, bool (N,) to be read only; None: all."""
        if column not in self._is_checked:
            self._is_checked[column] = records_NM["offset"][:, column] == 0  # there is nothing to compare
        return self._is_checked[column]

    def add(self, column: int, index_B: np.ndarray) -> None:
        """Members of a modality, of which `of` has been asked for, have been compared."""
        is_checked_N = self._is_checked[column]
        if is_checked_N is not None:
            is_checked_N[index_B] = True
            if is_checked_N.all():
                self._is_checked[column] = None


class MemberChecks:
    """Compares the members of an open shard with their digests.

    Args:
        digests_NM2: from `parse_sums`.
        records_NM: the index.
        checked: what need not be compared again; None: everything must be, each time it is read.
    """

    def __init__(self, digests_NM2: np.ndarray, records_NM: np.ndarray, checked: CheckedMembers | None) -> None:
        self._digests_NM2 = digests_NM2
        self._records_NM = records_NM
        self._checked = checked

    def unchecked(self, column: int, index_B: np.ndarray) -> np.ndarray:
        """Places in `index_B` of the samples whose member of a modality is still to be compared."""
        if self._checked is None:
            return np.arange(len(index_B))
        is_checked_N = self._checked.of(column, self._records_NM)
        return _NOTHING if is_checked_N is None else np.flatnonzero(~is_checked_N[index_B])

    def compare(self, column: int, index_B: np.ndarray, contents: Iterable[bytes | memoryview]) -> np.ndarray:
        """Whether the members of a modality are what they should be: bool (B,); remembers those that are."""
        sha256 = hashlib.sha256
        digests = b"".join([sha256(content).digest()[:DIGEST_BYTES] for content in contents])
        found_B2 = np.frombuffer(digests, np.uint64).reshape(len(index_B), 2)
        is_right_B: np.ndarray = (found_B2 == self._digests_NM2[index_B, column]).all(axis=1)
        if self._checked is not None:
            self._checked.add(column, index_B[is_right_B])
        return is_right_B

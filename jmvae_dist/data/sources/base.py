"""What a source is, and the pieces that sources share: in-memory arrays, splits, checksums of input files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from jmvae_dist.data.modality import Modality
from jmvae_dist.data.philox import PURPOSE_SPLIT, permutation
from jmvae_dist.errors import ConfigError

SPLITS = ("train", "test")
TAR_BLOCK_BYTES = 512

# What the defaults give little data, as far as it goes.
MIN_SHARDS = 8
MIN_SAMPLES_PER_SHARD = 256

_NPY_HEADER_BYTES = 128


class EncodedMember(NamedTuple):
    """A member that is stored as it is.

    Attributes:
        extension: one of those of its modality.
        content: its bytes, which the source has checked.
    """

    extension: str
    content: bytes


SampleValue = np.ndarray | int | EncodedMember
"""An array of the modality's dtype and shape, a class index for `cls`, or bytes that are stored as they are."""


def samples_for_shuffle(num_samples: int, at_most: int) -> int:
    """Samples per shard that give little data 8 shards, as far as these have 256 samples.

    In a single shard each lane would keep to the same samples in every epoch: what is far apart is mixed by the order
    of shards alone.
    """
    return min(at_most, max(MIN_SAMPLES_PER_SHARD, -(-num_samples // MIN_SHARDS)))


class Source(Protocol):
    """Raw samples with random access. Must be picklable: shards are written by several processes."""

    @property
    def modalities(self) -> Sequence[Modality]: ...

    @property
    def default_samples_per_shard(self) -> int: ...

    @property
    def sample_bytes(self) -> int:
        """What a sample takes in a tar, on average."""
        ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The sample's name in the shards: unique, without dots or slashes, at most 50 characters."""
        ...

    def sample(self, index: int) -> Mapping[str, SampleValue]:
        """Stored values by modality."""
        ...

    def description(self) -> dict[str, Any]:
        """Where the data comes from, as JSON for the manifest."""
        ...


@dataclass(frozen=True)
class ArraySource:
    """Samples held in memory as one array per modality.

    Attributes:
        name, split: become part of the keys.
        arrays: by modality, (raw rows, *shape), or class indices (raw rows,) for `cls`.
        rows: which raw rows belong to the split; the key of a sample carries its raw row, so that a message
            about a sample leads back to the raw data.
        details: further JSON for the manifest.
    """

    name: str
    split: str
    modalities: tuple[Modality, ...]
    arrays: dict[str, np.ndarray]
    rows: np.ndarray
    default_samples_per_shard: int
    details: dict[str, Any]

    @property
    def sample_bytes(self) -> int:
        headers = {"npy": _NPY_HEADER_BYTES, "cls": 0}
        return sum(member_bytes(headers[modality.encoding] + modality.stored_bytes) for modality in self.modalities)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        return f"{self.name}-{self.split}-{int(self.rows[index]):08d}"

    def sample(self, index: int) -> dict[str, SampleValue]:
        row = self.rows[index]
        return {
            modality.name: int(self.arrays[modality.name][row])
            if modality.encoding == "cls"
            else self.arrays[modality.name][row]
            for modality in self.modalities
        }

    def description(self) -> dict[str, Any]:
        return {"name": self.name, "split": self.split, **self.details}


def member_bytes(content_bytes: int) -> int:
    """What a member takes in a tar, with its header."""
    return TAR_BLOCK_BYTES * (1 + -(-content_bytes // TAR_BLOCK_BYTES))


def check_finite(modality: Modality, array: np.ndarray) -> None:
    """Raise ValueError if a value, as stored or as the model sees it, is not finite."""
    if np.isfinite(modality.to_model(array[None])).all():
        return
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("is not finite (NaN or infinite)")
    raise ValueError("(value - offset) * scale, which the model sees, is not finite as float32")


def split_rows(
    num_rows: int, split: str, test_fraction: float, split_seed: int, classes: np.ndarray | None = None
) -> np.ndarray:
    """The rows of a split, in ascending order: int64.

    The test split takes the first `round(test_fraction * n)` rows of a keyed permutation; with `classes` (one
    integer per row) this is done within each class, so that both splits have the classes in equal proportion.

    Raises:
        ConfigError: the fraction or seed is out of range, or the split would be empty.
    """
    assert split in SPLITS
    check_fraction(test_fraction)
    check_seed("--split-seed", split_seed)
    groups = [np.arange(num_rows)]
    if classes is not None:
        groups = [np.flatnonzero(classes == value) for value in np.unique(classes)]
    is_test = np.zeros(num_rows, dtype=bool)
    for number, group in enumerate(groups):
        order = permutation(len(group), seed=split_seed, purpose=PURPOSE_SPLIT, lane=number)
        is_test[group[order[: round(test_fraction * len(group))]]] = True
    rows = np.flatnonzero(is_test if split == "test" else ~is_test).astype(np.int64)
    if len(rows) == 0:
        raise ConfigError(f"--test-fraction {test_fraction} of {num_rows} samples leaves the {split} split empty")
    return rows


def check_fraction(test_fraction: float) -> None:
    """Raise ConfigError unless both splits get a share."""
    if not 0 < test_fraction < 1:
        raise ConfigError(f"--test-fraction must lie between 0 and 1 (exclusive), not {test_fraction}")


def check_seed(option: str, seed: int) -> None:
    """Raise ConfigError unless a seed fits in 64 bits."""
    if not 0 <= seed < 2**64:
        raise ConfigError(f"{option} must be between 0 and 2**64 - 1, not {seed}")

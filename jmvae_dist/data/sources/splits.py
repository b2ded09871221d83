"""Which rows are the train split and which the test split: by row, by group, by class, or as the data says itself."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jmvae_dist.data.sources.base import SPLITS, check_fraction, check_seed, split_rows
from jmvae_dist.data.untrusted import printable
from jmvae_dist.errors import ConfigError, DataError

MAX_STRATA = 1000

# Part of what is hashed, so that no other use of sha256 draws the same numbers. Changing it changes every split.
_GROUP_DOMAIN = b"jmvae-dist group split\0"
_MAX_VALUES_SHOWN = 8


@dataclass(frozen=True)
class SplitChoice:
    """Which samples of a source are written.

    Attributes:
        split: `train` or `test`.
        test_fraction: share of the test split. None without `column`: all samples are the split, which is only named.
        seed: of the permutation of rows, or of the hash of groups.
        group: the column of rows that must stay together, such as those of one patient.
        stratify: the column whose values both splits have in equal proportion.
        column: the column that says `train` or `test`.

    Raises:
        ConfigError: the choices contradict each other, or a number is out of range.
    """

    split: str
    test_fraction: float | None = None
    seed: int = 0
    group: str | None = None
    stratify: str | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        assert self.split in SPLITS
        check_seed("--split-seed", self.seed)
        if self.test_fraction is not None:
            check_fraction(self.test_fraction)
            if self.column is not None:
                raise ConfigError("--split-column says which rows are the test split; leave out --test-fraction")
        if self.group is not None and self.stratify is not None:
            raise ConfigError("--group and --stratify exclude each other: whole groups do not come in equal shares")
        if self.group is not None and self.test_fraction is None and self.column is None:
            raise ConfigError("--group needs --test-fraction: it says what stays together when a file is split")
        if self.stratify is not None and self.test_fraction is None:
            raise ConfigError("--stratify needs --test-fraction: it says how a file is split")

    @property
    def is_whole(self) -> bool:
        """Whether all samples are the split."""
        return self.test_fraction is None and self.column is None

    @property
    def label_columns(self) -> dict[str, str]:
        """The columns that `rows_of` needs, by option."""
        columns = {"--group": self.group, "--stratify": self.stratify, "--split-column": self.column}
        return {option: title for option, title in columns.items() if title is not None}

    def description(self) -> dict[str, Any]:
        """How the data was split, as JSON for the manifest."""
        settings = {"group": self.group, "stratify": self.stratify, "split_column": self.column}
        described: dict[str, Any] = {key: title for key, title in settings.items() if title is not None}
        if self.test_fraction is not None:
            described = {"test_fraction": self.test_fraction, "split_seed": self.seed, **described}
        return described


class Labels(NamedTuple):
    """What a column says of every row.

    Attributes:
        title: of the column, for messages.
        values: the different ones.
        codes: int64 (rows,), the number of each row's value among them.
    """

    title: str
    values: Sequence[str]
    codes: np.ndarray


class LabelCollector:
    """Makes `Labels` of values that come one by one; 8 bytes per row."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._numbers: dict[str, int] = {}
        self._codes = array("q")

    def add(self, value: str) -> None:
        """Take the value of the next row."""
        self._codes.append(self._numbers.setdefault(value, len(self._numbers)))

    def labels(self) -> Labels:
        """Of the rows so far."""
        return Labels(self.title, list(self._numbers), np.array(self._codes, np.int64))


def label_of(text: str) -> str:
    """A value without the blanks around it; raises DataError if nothing is left."""
    value = text.strip()
    if not value:
        raise DataError("is empty")
    return value


def is_test_group(value: str, seed: int, test_fraction: float) -> bool:
    """Whether a group is in the test split: a pure function of the arguments.

    So a group stays where it is when rows or other groups are added, and is in the same split in every file; and a
    larger fraction keeps what was in the test split before.
    """
    content = _GROUP_DOMAIN + seed.to_bytes(8, "little") + value.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") < test_fraction * 2**64


def rows_of(choice: SplitChoice, split: str, num_rows: int, labels: Mapping[str, Labels]) -> np.ndarray:
    """The rows of a split, in ascending order: int64.

    Args:
        choice: how the rows are split.
        split: `train` or `test`; the one of the choice if that takes all rows.
        num_rows: of both splits.
        labels: by title, those of `choice.label_columns`.

    Raises:
        ConfigError: the split would be empty, or a column has unsuitable values.
        DataError: a group is in both splits of a column.
    """
    if choice.column is not None:
        return _rows_by_column(choice, split, labels)
    if choice.test_fraction is None:
        assert split == choice.split
        return np.arange(num_rows, dtype=np.int64)
    if choice.group is not None:
        return _rows_by_group(choice, split, labels[choice.group])
    classes = None if choice.stratify is None else _strata(labels[choice.stratify])
    return split_rows(num_rows, split, choice.test_fraction, choice.seed, classes)


def split_notes(choice: SplitChoice, labels: Mapping[str, Labels]) -> list[str]:
    """What came of a choice, as far as the choice does not say it: for the user."""
    if choice.column is not None:
        values, codes = labels[choice.column].values, labels[choice.column].codes
        others = int(np.isin(codes, [number for number, value in enumerate(values) if value not in SPLITS]).sum())
        return [f"{others:,} rows are in neither split: {_counts(labels[choice.column])}"] if others else []
    if choice.group is None or choice.test_fraction is None:
        return []
    is_test = _is_test_value(choice, labels[choice.group])
    codes = labels[choice.group].codes
    num_rows = int(is_test[codes].sum())
    return [
        f"the test split has {int(is_test.sum()):,} of the {len(is_test):,} different values of {choice.group!r}, "
        f"with {num_rows:,} of {len(codes):,} samples ({num_rows / len(codes):.1%})"
    ]


def _rows_by_group(choice: SplitChoice, split: str, labels: Labels) -> np.ndarray:
    is_test = _is_test_value(choice, labels)[labels.codes]
    rows = np.flatnonzero(is_test if split == "test" else ~is_test).astype(np.int64)
    if len(rows) == 0:
        raise ConfigError(
            f"--test-fraction {choice.test_fraction} leaves the {split} split empty: it got none of the "
            f"{len(labels.values):,} different values of {labels.title!r}; take another --split-seed"
        )
    return rows


def _is_test_value(choice: SplitChoice, labels: Labels) -> np.ndarray:
    assert choice.test_fraction is not None
    return np.array([is_test_group(value, choice.seed, choice.test_fraction) for value in labels.values], bool)


def _strata(labels: Labels) -> np.ndarray:
    """Numbers of the values in alphabetical order, per row: the split does not depend on which one comes first."""
    if len(labels.values) > MAX_STRATA:
        raise ConfigError(
            f"--stratify {labels.title}: {len(labels.values):,} different values are no classes, "
            f"of which there may be {MAX_STRATA:,}"
        )
    ranks = {value: rank for rank, value in enumerate(sorted(labels.values))}
    strata: np.ndarray = np.array([ranks[value] for value in labels.values], np.int64)[labels.codes]
    return strata


def _rows_by_column(choice: SplitChoice, split: str, labels: Mapping[str, Labels]) -> np.ndarray:
    assert choice.column is not None
    column = labels[choice.column]
    numbers = {value: number for number, value in enumerate(column.values)}
    rows = {name: np.flatnonzero(column.codes == numbers.get(name, -1)).astype(np.int64) for name in SPLITS}
    if len(rows[split]) == 0:
        raise ConfigError(f"--split-column {choice.column}: no row says {split!r}: {_counts(column)}")
    if choice.group is not None:
        _check_groups_apart(choice.column, labels[choice.group], rows)
    return rows[split]


def _check_groups_apart(column: str, groups: Labels, rows: Mapping[str, np.ndarray]) -> None:
    shared = np.intersect1d(groups.codes[rows["train"]], groups.codes[rows["test"]])
    if len(shared):
        raise DataError(
            f"--split-column {column} puts samples of {len(shared):,} of the {len(groups.values):,} different values "
            f"of {groups.title!r} into both splits, first {printable(groups.values[shared[0]])!r}: those in the test "
            "split would not be held out"
        )


def _counts(labels: Labels) -> str:
    counts = np.bincount(labels.codes, minlength=len(labels.values))
    most = np.argsort(-counts, kind="stable")
    shown = ", ".join(
        f"{printable(labels.values[number])[:40]!r} ({counts[number]:,})" for number in most[:_MAX_VALUES_SHOWN]
    )
    return f"{labels.title!r} has {shown}" + (", ..." if len(most) > _MAX_VALUES_SHOWN else "")

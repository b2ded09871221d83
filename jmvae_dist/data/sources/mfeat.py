"""UCI Multiple Features: handwritten digits in six views, one CSV file per view."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jmvae_dist.data.modality import Modality
from jmvae_dist.data.sources.base import ArraySource, split_rows
from jmvae_dist.data.sources.files import input_files, read_plain_or_gzip
from jmvae_dist.errors import ConfigError, DataError

VIEWS = ("fac", "fou", "kar", "mor", "pix", "zer")
_LABEL = "label"


def load_mfeat_source(
    folder: Path, split: str, test_fraction: float, split_seed: int, with_label: bool = True
) -> ArraySource:
    """The six views as float32 vectors and, with `with_label`, `label`.

    The files are sorted by class, so the split is made within each class. Offset and scale standardise every
    column with mean and standard deviation of the *train* split, whichever split is written: both splits see
    the same transform, and nothing of the test split leaks into it.

    Raises:
        ConfigError: a file is missing, or the split settings are out of range.
        DataError: a file is malformed, or the views disagree on the label of a row.
    """
    paths = [_view_path(folder, view) for view in VIEWS]
    views, labels = {}, None
    for view, path in zip(VIEWS, paths, strict=True):
        views[view], view_labels = _read_view(path)
        if labels is None:
            labels = view_labels
        _check_same_labels(paths[0], labels, path, view_labels)
    assert labels is not None
    train_rows = split_rows(len(labels), "train", test_fraction, split_seed, classes=labels)
    modalities = [_standardised(view, views[view], train_rows) for view in VIEWS]
    arrays = dict(views)
    if with_label:
        modalities.append(Modality.classes(_LABEL, int(labels.max()) + 1))
        arrays[_LABEL] = labels
    return ArraySource(
        name="mfeat",
        split=split,
        modalities=tuple(modalities),
        arrays=arrays,
        rows=split_rows(len(labels), split, test_fraction, split_seed, classes=labels),
        default_samples_per_shard=256,
        details={"files": input_files(*paths), "test_fraction": test_fraction, "split_seed": split_seed},
    )


def _view_path(folder: Path, view: str) -> Path:
    candidates = [folder / f"mfeat-{view}.csv", folder / f"mfeat-{view}.csv.gz"]
    for path in candidates:
        if path.is_file():
            return path
    raise ConfigError(f"--folder {folder} has neither {candidates[0].name} nor {candidates[1].name}")


def _read_view(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 (rows, columns) and labels int64 (rows,) of one file."""
    text = read_plain_or_gzip(path).decode("ascii", "replace")
    lines = text.splitlines()
    header = lines[0].split(",") if lines else []
    num_features = len(header) - 1
    # The header is numeric and would pass for a sample: it must be exactly 0, 1, 2, ... before the label.
    if num_features < 1 or header[:-1] != [str(column) for column in range(num_features)]:
        raise DataError(f"{path}: line 1 is not the expected header 0,1,2,...: is it a Multiple Features file?")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = [float(field) for field in line.split(",")]
        except ValueError as error:
            raise DataError(f"{path}: line {number}: {error}") from None
        if len(row) != len(header):
            raise DataError(f"{path}: line {number} has {len(row)} columns, the header has {len(header)}")
        rows.append(row)
    table = np.array(rows, dtype=np.float64).reshape(len(rows), len(header))
    _check_table(path, table)
    return table[:, :-1].astype(np.float32), table[:, -1].astype(np.int64)


def _check_table(path: Path, table: np.ndarray) -> None:
    if len(table) == 0:
        raise DataError(f"{path}: no samples after the header")
    finite = np.isfinite(table).all(axis=1)
    if not finite.all():
        raise DataError(f"{path}: line {int(np.argmin(finite)) + 2} holds a value that is not finite")
    labels = table[:, -1]
    bad = (labels != np.floor(labels)) | (labels < 0) | (labels > 9)
    if bad.any():
        line = int(np.argmax(bad))
        raise DataError(f"{path}: line {line + 2}: label {labels[line]:g} is not a digit 0..9")


def _check_same_labels(first: Path, labels: np.ndarray, path: Path, view_labels: np.ndarray) -> None:
    if len(labels) != len(view_labels):
        raise DataError(f"{path} has {len(view_labels)} samples, but {first} has {len(labels)}")
    differs = labels != view_labels
    if differs.any():
        row = int(np.argmax(differs))
        raise DataError(
            f"row {row}: {path} says label {view_labels[row]}, but {first} says {labels[row]}: "
            "the files do not describe the same samples in the same order"
        )


def _standardised(view: str, features: np.ndarray, train_rows: np.ndarray) -> Modality:
    train = features[train_rows].astype(np.float64)
    deviation = train.std(axis=0)
    scale = 1 / np.where(deviation > 0, deviation, 1.0)
    return Modality(view, "float32", (features.shape[1],), offset=train.mean(axis=0).tolist(), scale=scale.tolist())

"""Any data as one `.npz` file: one array per modality, samples along the first dimension."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from jmvae_dist.data.modality import DTYPES, MAX_CLASSES, Modality
from jmvae_dist.data.sources.base import ArraySource, samples_for_shuffle
from jmvae_dist.data.sources.files import input_files
from jmvae_dist.data.sources.splits import LabelCollector, Labels, SplitChoice, label_of, rows_of, split_notes
from jmvae_dist.data.sources.standardization import (
    SAMPLES_AT_ONCE,
    Moments,
    Standardization,
    standardized,
)
from jmvae_dist.errors import ConfigError, DataError


def load_npz_source(
    path: Path,
    choice: SplitChoice,
    class_modalities: Mapping[str, int | None] | None = None,
    offsets: Mapping[str, float] | None = None,
    scales: Mapping[str, float] | None = None,
    standardization: Standardization | None = None,
) -> tuple[ArraySource, list[str]]:
    """One modality per array, in the order of the file; one-dimensional arrays become vectors of length 1.

    An array that the choice names, to group or to stratify by, is a modality only if it is one of classes.

    Args:
        path: written by `numpy.savez`; never unpickled.
        choice: which samples to take.
        class_modalities: integer arrays to store as class indices, and how many classes each has; None takes
            the largest index of the file + 1, which may differ between files.
        offsets, scales: by modality; the model sees (value - offset) * scale.
        standardization: what else gets an offset and a scale, of every element.

    Returns:
        The source, and what its user may want to know.

    Raises:
        ConfigError: the file cannot be opened, or an option names an array that is not there.
        DataError: an array has an unsuitable dtype, length, or value.
    """
    standardization = standardization or Standardization()
    arrays = _read_arrays(path)
    class_modalities, offsets, scales = class_modalities or {}, offsets or {}, scales or {}
    labels = {title: _labels(path, title, _named(path, arrays, title)) for title in choice.label_columns.values()}
    arrays = {name: array for name, array in arrays.items() if name not in labels or name in class_modalities}
    if not arrays:
        raise DataError(f"{path}: no array is left to be a modality")
    for name in (*class_modalities, *offsets, *scales, *standardization.names):
        if name in labels and name not in arrays:
            raise ConfigError(
                f"array {name!r} says how {path} is split and is no modality; "
                "add --class-modalities to store it as classes"
            )
        _named(path, arrays, name)
    modalities = []
    for name, array in arrays.items():
        if name in class_modalities:
            if name in offsets or name in scales or name in standardization.names:
                raise ConfigError(f"class modality {name!r} takes no --offset, --scale or --standardize")
            arrays[name], modality = _as_classes(path, name, array, class_modalities[name])
        else:
            offset, scale = offsets.get(name, 0.0), scales.get(name, 1.0)
            arrays[name], modality = _as_samples(path, name, array, offset, scale)
        modalities.append(modality)
    num_rows = len(next(iter(arrays.values())))
    rows = rows_of(choice, choice.split, num_rows, labels)

    def train_moments() -> dict[str, Moments]:
        train_rows = rows_of(choice, "train", num_rows, labels)
        return {name: _moments(arrays[name], train_rows) for name in standardization.names}

    transformed, notes = standardized(modalities, standardization, train_moments)
    source = ArraySource(
        name="npz",
        split=choice.split,
        modalities=transformed,
        arrays=arrays,
        rows=rows,
        default_samples_per_shard=samples_for_shuffle(len(rows), 4096),
        details={"files": input_files(path), **choice.description(), **standardization.description()},
    )
    return source, split_notes(choice, labels) + notes


def _moments(array: np.ndarray, rows: np.ndarray) -> Moments:
    moments = Moments()
    for start in range(0, len(rows), SAMPLES_AT_ONCE):
        moments.add(array[rows[start : start + SAMPLES_AT_ONCE]])
    return moments


def _named(path: Path, arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in arrays:
        raise ConfigError(f"{path} has no array {name!r}; it has {', '.join(arrays)}")
    return arrays[name]


def _labels(path: Path, name: str, array: np.ndarray) -> Labels:
    if array.ndim != 1 or array.dtype.kind not in "biuUS":
        raise DataError(
            f"{path}: array {name!r} is {array.dtype} {list(array.shape)}; to split by it, it must "
            "have one integer or string per sample"
        )
    collector = LabelCollector(name)
    for row, value in enumerate(array.tolist()):
        try:
            collector.add(label_of(value.decode("utf-8") if isinstance(value, bytes) else str(value)))
        except (DataError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: array {name!r}: row {row}: {error}") from None
    return collector.labels()


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DataError(f"{path}: a single array, not an .npz file of named arrays")
        with file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{path}: too large for the memory: {error or 'an array cannot be read'}") from None
    # RuntimeError: an encrypted member or an unknown compression; OverflowError: a shape beyond 64 bits.
    except (ValueError, EOFError, OverflowError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as .npz: {error}") from None
    if not arrays:
        raise DataError(f"{path}: holds no arrays")
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy returns what is not .npy as bytes
            raise DataError(f"{path}: {name!r} is not an array; write the file with numpy.savez")
    lengths = {name: array.shape[0] if array.ndim else None for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        described = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise DataError(f"{path}: the arrays must have the same first dimension, but have {described}")
    if 0 in lengths.values():
        raise DataError(f"{path}: the arrays are empty")
    return arrays


def _as_classes(path: Path, name: str, array: np.ndarray, num_classes: int | None) -> tuple[np.ndarray, Modality]:
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{path}: class modality {name!r} must be a one-dimensional integer array, not {array.dtype} "
            f"{list(array.shape)}; numpy.unique(classes, return_inverse=True) numbers names"
        )
    if array.min() < 0:
        raise DataError(f"{path}: class modality {name!r}: row {int(array.argmin())} is negative")
    # Before the cast, in which large unsigned numbers would become negative.
    limit = MAX_CLASSES if num_classes is None else num_classes
    if int(array.max()) >= limit:
        raise DataError(
            f"{path}: class modality {name!r}: row {int(array.argmax())} is {int(array.max())}, not below "
            + (f"the {limit} classes given" if num_classes is not None else f"the limit of {limit} classes")
        )
    with _named_in_errors(path, name):
        modality = Modality.classes(name, num_classes or int(array.max()) + 1)
    return array.astype(np.int64), modality


def _as_samples(path: Path, name: str, array: np.ndarray, offset: float, scale: float) -> tuple[np.ndarray, Modality]:
    if array.dtype.name not in DTYPES:
        raise DataError(f"{path}: array {name!r} has dtype {array.dtype}; use one of {', '.join(DTYPES)}")
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if array.ndim == 1:
        array = array[:, None]
    if array.dtype.kind == "f":
        finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if not finite.all():
            raise DataError(f"{path}: array {name!r}: row {int(np.argmin(finite))} is not finite (NaN or infinite)")
    with _named_in_errors(path, name):
        return array, Modality(name, array.dtype.name, array.shape[1:], offset=offset, scale=scale)


@contextmanager
def _named_in_errors(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DataError(f"{path}: array {name!r}: {error}") from None

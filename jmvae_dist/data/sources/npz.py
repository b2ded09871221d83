"""Any data as one `.npz` file: one array per modality, samples along the first dimension."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jmvae_dist.data.modality import DTYPES, MAX_CLASSES, Modality
from jmvae_dist.data.sources.base import ArraySource, samples_for_shuffle, split_rows
from jmvae_dist.data.sources.files import input_files
from jmvae_dist.errors import ConfigError, DataError


def load_npz_source(
    path: Path,
    split: str,
    test_fraction: float | None,
    split_seed: int,
    class_modalities: Mapping[str, int | None] | None = None,
    offsets: Mapping[str, float] | None = None,
    scales: Mapping[str, float] | None = None,
) -> ArraySource:
    """One modality per array, in the order of the file; one-dimensional arrays become vectors of length 1.

    Args:
        path: written by `numpy.savez`; never unpickled.
        split: with `test_fraction` the part to take; without it the file is the split and this only names it.
        test_fraction, split_seed: see `split_rows`.
        class_modalities: integer arrays to store as class indices, and how many classes each has; None takes
            the largest index of the file + 1, which may differ between files.
        offsets, scales: by modality; the model sees (value - offset) * scale.

    Raises:
        ConfigError: the file cannot be opened, or an option names an array that is not there.
        DataError: an array has an unsuitable dtype, length, or value.
    """
    arrays = _read_arrays(path)
    class_modalities, offsets, scales = class_modalities or {}, offsets or {}, scales or {}
    for name in (*class_modalities, *offsets, *scales):
        if name not in arrays:
            raise ConfigError(f"{path} has no array {name!r}; it has {', '.join(arrays)}")
    modalities = []
    for name in list(arrays):
        if name in class_modalities:
            if name in offsets or name in scales:
                raise ConfigError(f"class modality {name!r} takes no --offset or --scale")
            arrays[name] = _as_classes(path, name, arrays[name], class_modalities[name])
        else:
            arrays[name] = _as_samples(path, name, arrays[name])
        try:
            if name in class_modalities:
                modality = Modality.classes(name, class_modalities[name] or int(arrays[name].max()) + 1)
            else:
                dtype, shape = arrays[name].dtype.name, arrays[name].shape[1:]
                modality = Modality(name, dtype, shape, offset=offsets.get(name, 0.0), scale=scales.get(name, 1.0))
        except ValueError as error:
            raise DataError(f"{path}: array {name!r}: {error}") from None
        modalities.append(modality)
    num_rows = len(next(iter(arrays.values())))
    rows = np.arange(num_rows, dtype=np.int64)
    details: dict[str, object] = {"files": input_files(path)}
    if test_fraction is not None:
        rows = split_rows(num_rows, split, test_fraction, split_seed)
        details |= {"test_fraction": test_fraction, "split_seed": split_seed}
    return ArraySource("npz", split, tuple(modalities), arrays, rows, samples_for_shuffle(len(rows), 4096), details)


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


def _as_classes(path: Path, name: str, array: np.ndarray, num_classes: int | None) -> np.ndarray:
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
    return array.astype(np.int64)


def _as_samples(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.name not in DTYPES:
        raise DataError(f"{path}: array {name!r} has dtype {array.dtype}; use one of {', '.join(DTYPES)}")
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if array.ndim == 1:
        array = array[:, None]
    if array.dtype.kind == "f":
        finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if not finite.all():
            raise DataError(f"{path}: array {name!r}: row {int(np.argmin(finite))} is not finite (NaN or infinite)")
    return array

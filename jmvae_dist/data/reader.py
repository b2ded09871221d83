"""Reads samples out of tar shards by number, through the index, without unpacking or scanning.

A shard is mapped into memory. Where all samples of a modality have one layout (same size, same distance, same
npy header), which is how `jmvae-dist shards write` lays them out, the modality is a strided array over the
tar itself and any set of samples is one gather. Otherwise each sample is decoded by its index entry. Both
paths give the same values.

Shape suffixes: N samples of the shard, B samples asked for.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import resource
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import numpy as np

from jmvae_dist.data.files import open_regular
from jmvae_dist.data.index import read_index
from jmvae_dist.data.manifest import Manifest, Modality
from jmvae_dist.errors import ConfigError, DataError
from jmvae_dist.files import sha256_of

Verify = Literal["always", "first_use", "never"]

DEFAULT_MAX_OPEN = 128
_TAR_BLOCK_BYTES = 512
_MAX_NPY_HEADER_BYTES = 4096
_ASCII_ZERO = ord("0")

# Files whose sha256 this process has checked. The identity includes inode and modification time, so a file
# that is replaced while the process runs is checked again.
_checked_files: set[tuple[int, int, int, int, str]] = set()


class ShardReader:
    """One open shard.

    Args:
        manifest: the data set.
        shard_number: which of its shards.
        verify: when to compare the sha256 of shard and index with the manifest: `always` (each opening),
            `first_use` (once per process) or `never` (sizes only).

    Raises:
        DataError: the shard or its index is missing, truncated, damaged, or not what the manifest says.
    """

    def __init__(self, manifest: Manifest, shard_number: int, verify: Verify = "first_use") -> None:
        check_verify(verify)
        shard = manifest.shards[shard_number]
        self.path = manifest.shard_path(shard_number)
        self.num_samples = shard.num_samples
        self._modalities = {modality.name: modality for modality in manifest.modalities}
        self._columns = {modality.name: column for column, modality in enumerate(manifest.modalities)}
        self._map = _map_shard(self.path, shard.num_bytes, shard.sha256, verify)
        self._records_NM = read_index(
            manifest.index_path(shard_number),
            shard.num_samples,
            len(manifest.modalities),
            shard.num_bytes,
            None if verify == "never" else shard.index.sha256,
        )
        self._strided: dict[str, np.ndarray | None] = {}

    def close(self) -> None:
        """Release the mapping; the reader cannot be used afterwards."""
        self._strided.clear()
        # A traceback may still refer to a view; the mapping then goes when the view does.
        with contextlib.suppress(BufferError):
            self._map.close()

    def read(self, indices: Sequence[int] | np.ndarray, modality: str) -> np.ndarray:
        """What the model sees of some samples: float32 (B, *shape), finite.

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
        """Stored values (B, *shape) in the stored dtype; for `cls` the class indices, int64 (B,).

        Raises like `read`, except that values may be non-finite.
        """
        self._check_indices(index_B)
        if modality not in self._strided:
            self._strided[modality] = self._open_strided(modality)
        view = self._strided[modality]
        if view is None:
            return self._decode_each(index_B, modality)
        if self._modalities[modality].encoding == "npy":
            return view[index_B]
        return self._parse_classes(view[index_B], index_B, modality)

    def is_strided(self, modality: str) -> bool:
        """Whether the modality is read as one strided array."""
        if modality not in self._strided:
            self._strided[modality] = self._open_strided(modality)
        return self._strided[modality] is not None

    def key(self, index: int, modality: str) -> str:
        """The key of a sample, from the tar header before its member; for messages only, never a path."""
        offset = int(self._records_NM["offset"][index, self._columns[modality]])
        header = self._map[offset - _TAR_BLOCK_BYTES : offset]
        prefix, name = (
            field.split(b"\0")[0].decode("ascii", "backslashreplace") for field in (header[345:500], header[:100])
        )
        full_name = f"{prefix}/{name}" if prefix else name
        return full_name.removesuffix(f".{self._modalities[modality].extension}") or "unknown"

    def location(self, index: int, modality: str) -> tuple[int, int]:
        """Offset and size in bytes of a member's content in the tar."""
        record = self._records_NM[index, self._columns[modality]]
        return int(record["offset"]), int(record["size"])

    def fail(self, index: int, modality: str, problem: str) -> NoReturn:
        """Raise the DataError of one sample."""
        raise DataError(
            f"{self.path}: sample {index} (key {self.key(index, modality)!r}), modality {modality!r}: {problem}"
        )

    def _check_indices(self, index_B: np.ndarray) -> None:
        outside = (index_B < 0) | (index_B >= self.num_samples)
        if outside.any():
            index = int(index_B[np.argmax(outside)])
            raise DataError(f"{self.path}: sample {index} does not exist; the shard has {self.num_samples} samples")

    def _member_bytes(self, index: int, modality: str) -> bytes:
        offset, size = self.location(index, modality)
        return self._map[offset : offset + size]

    # Strided path

    def _open_strided(self, modality: str) -> np.ndarray | None:
        """The modality as one array over the tar, or None if its samples differ in layout.

        `npy`: (N, *shape) in the stored dtype; `cls`: the ASCII digits, uint8 (N, digits).
        """
        offset_N, size_N = (self._records_NM[name][:, self._columns[modality]] for name in ("offset", "size"))
        stride = int(offset_N[1]) - int(offset_N[0]) if self.num_samples > 1 else 0
        # No product can wrap around unnoticed: the offsets it is compared with all lie inside the file.
        evenly_spaced = stride >= 0 and np.array_equal(
            offset_N,
            np.uint64(offset_N[0]) + np.arange(self.num_samples, dtype=np.uint64) * np.uint64(stride),
        )
        if not evenly_spaced or np.any(size_N != size_N[0]):
            return None
        offset, size = int(offset_N[0]), int(size_N[0])
        member_N = np.ndarray((self.num_samples, size), np.uint8, self._map, offset, (stride, 1))
        spec = self._modalities[modality]
        if spec.encoding == "cls":
            return member_N if 1 <= size <= spec.class_digits else None
        return self._open_strided_npy(member_N, modality, offset, stride)

    def _open_strided_npy(self, member_N: np.ndarray, modality: str, offset: int, stride: int) -> np.ndarray | None:
        spec = self._modalities[modality]
        try:
            dtype, shape, fortran_order, header_bytes = parse_npy_header(bytes(member_N[0]))
        except DataError:
            return None
        declared = (np.dtype(spec.dtype), spec.shape)
        if (dtype, shape) != declared or fortran_order:
            return None
        if member_N.shape[1] != header_bytes + spec.stored_bytes:
            return None
        if np.any(member_N[:, :header_bytes] != member_N[0, :header_bytes]):
            return None
        inner_strides = np.empty(shape, dtype).strides
        return np.ndarray(
            (self.num_samples, *shape), dtype, self._map, offset + header_bytes, (stride, *inner_strides)
        )

    def _parse_classes(self, ascii_BD: np.ndarray, index_B: np.ndarray, modality: str) -> np.ndarray:
        digits_BD = ascii_BD.astype(np.int64) - _ASCII_ZERO
        place_values = 10 ** np.arange(ascii_BD.shape[1] - 1, -1, -1, dtype=np.int64)
        class_B = digits_BD @ place_values
        num_classes = self._modalities[modality].num_classes
        bad_B = ((digits_BD < 0) | (digits_BD > 9)).any(axis=1) | (class_B >= num_classes)
        if bad_B.any():
            # The general path explains what is wrong with this one.
            self._decode_one(int(index_B[np.argmax(bad_B)]), modality)
            raise AssertionError("the strided and the general path disagree")
        return class_B

    # General path

    def _decode_each(self, index_B: np.ndarray, modality: str) -> np.ndarray:
        spec = self._modalities[modality]
        stored = np.empty((len(index_B), *spec.stored_shape), dtype=spec.dtype)
        for row, index in enumerate(index_B.tolist()):
            stored[row] = self._decode_one(index, modality)
        return stored

    def _decode_one(self, index: int, modality: str) -> np.ndarray | int:
        content = self._member_bytes(index, modality)
        try:
            return decode_member(content, self._modalities[modality])
        except DataError as error:
            self.fail(index, modality, str(error))


class ShardSet:
    """Samples from any shards of a manifest; keeps the most recently used shards open.

    Can be pickled: the copy opens its own shards.
    """

    def __init__(self, manifest: Manifest, verify: Verify = "first_use", max_open: int = DEFAULT_MAX_OPEN) -> None:
        check_verify(verify)
        assert max_open >= 1
        self._manifest = manifest
        self._verify: Verify = verify
        self._max_open = max_open
        self._open: OrderedDict[int, ShardReader] = OrderedDict()

    def reader(self, shard_number: int) -> ShardReader:
        """The open reader of a shard; valid until `max_open` other shards have been used."""
        if shard_number in self._open:
            self._open.move_to_end(shard_number)
            return self._open[shard_number]
        while len(self._open) >= self._max_open:
            self._open.popitem(last=False)[1].close()
        self._open[shard_number] = ShardReader(self._manifest, shard_number, self._verify)
        return self._open[shard_number]

    def gather(
        self, shard_B: np.ndarray, index_B: np.ndarray, modalities: Sequence[Modality]
    ) -> dict[str, np.ndarray]:
        """What the model sees of the given samples, in order: finite float32 (B, *shape) by modality.

        Raises:
            DataError: names shard, key, modality and cause.
        """
        stored = {}
        for modality in modalities:
            stored[modality.name] = np.empty((len(shard_B), *modality.stored_shape), dtype=modality.dtype)
        by_shard = np.argsort(shard_B, kind="stable")
        shard_numbers, first = np.unique(shard_B[by_shard], return_index=True)
        for shard_number, rows in zip(shard_numbers.tolist(), np.split(by_shard, first[1:]), strict=True):
            reader = self.reader(shard_number)
            for modality in modalities:
                stored[modality.name][rows] = reader.read_stored(index_B[rows], modality.name)
        values = {modality.name: modality.to_model(stored[modality.name]) for modality in modalities}
        for name, values_B in values.items():
            bad_row = first_non_finite_row(values_B)
            if bad_row is not None:
                self.reader(int(shard_B[bad_row])).fail(
                    int(index_B[bad_row]), name, "value is not finite (NaN or infinite)"
                )
        return values

    def close(self) -> None:
        """Close all shards; using the set again opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def open_files_limit() -> int:
    """How many shards a process may reasonably keep open: half its limit of open files."""
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**16 if soft_limit == resource.RLIM_INFINITY else max(8, soft_limit // 2)


def check_verify(verify: str) -> None:
    """Raise ConfigError unless `verify` is one of always, first_use, never."""
    if verify not in get_args(Verify):
        raise ConfigError(f"data.verify must be one of {', '.join(get_args(Verify))}, not {verify!r}")


def first_non_finite_row(values: np.ndarray) -> int | None:
    """The first row of (B, ...) that holds a NaN or an infinity, or None."""
    finite = np.isfinite(values)
    if finite.all():
        return None
    return int(np.argmin(finite.reshape(len(values), -1).all(axis=1)))


def decode_member(content: bytes, modality: Modality) -> np.ndarray | int:
    """One member's bytes to the stored array (`npy`) or class index (`cls`).

    Raises:
        DataError: the content is not what the modality declares.
    """
    if modality.encoding == "cls":
        return _decode_class(content, modality)
    dtype, shape, fortran_order, header_bytes = parse_npy_header(content)
    if dtype != np.dtype(modality.dtype):
        raise DataError(f"stored dtype is {dtype.str}, the manifest says {np.dtype(modality.dtype).str}")
    if shape != modality.shape:
        raise DataError(f"stored shape is {list(shape)}, the manifest says {list(modality.shape)}")
    if len(content) != header_bytes + modality.stored_bytes:
        raise DataError(f"{len(content)} bytes, expected {header_bytes + modality.stored_bytes}")
    return np.ndarray(shape, dtype, content, header_bytes, order="F" if fortran_order else "C")


def parse_npy_header(content: bytes) -> tuple[np.dtype, tuple[int, ...], bool, int]:
    """dtype, shape, Fortran order and length in bytes of an npy header (versions 1 and 2).

    numpy's own parser reads the header as a literal, never as code; object dtypes, which would need pickle,
    are refused.

    Raises:
        DataError: not a sound npy header.
    """
    file = io.BytesIO(content[: _MAX_NPY_HEADER_BYTES + 16])
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(file, max_header_size=_MAX_NPY_HEADER_BYTES)
        elif version == (2, 0):
            header = np.lib.format.read_array_header_2_0(file, max_header_size=_MAX_NPY_HEADER_BYTES)
        else:
            raise DataError(f"npy version {version} is not supported")
    except DataError:
        raise
    except Exception as error:  # numpy raises ValueError, TypeError, SyntaxError, tokenize errors on damaged headers
        raise DataError(f"not a valid npy array: {str(error)[:200]}") from None
    shape, fortran_order, dtype = header
    if dtype.hasobject:
        raise DataError("holds Python objects, which are never loaded")
    return dtype, shape, fortran_order, file.tell()


def _decode_class(content: bytes, modality: Modality) -> int:
    assert modality.num_classes is not None
    if not 1 <= len(content) <= modality.class_digits or not content.isdigit():
        shown = content[:20].decode("ascii", "backslashreplace")
        raise DataError(f"{shown!r} is not a class index of at most {modality.class_digits} digits")
    class_index = int(content)
    if class_index >= modality.num_classes:
        raise DataError(f"class index {class_index} is not below num_classes {modality.num_classes}")
    return class_index


def _map_shard(path: Path, num_bytes: int, sha256: str, verify: Verify) -> mmap.mmap:
    """Map a shard read-only after checking its size and, as `verify` says, its sha256."""
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            if status.st_size != num_bytes:
                what = "truncated" if status.st_size < num_bytes else "replaced"
                raise DataError(
                    f"{path}: {status.st_size} bytes, the manifest says {num_bytes}: "
                    f"the shard was {what}; copy it again"
                )
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, sha256)
            if verify == "always" or (verify == "first_use" and identity not in _checked_files):
                if sha256_of(path) != sha256:
                    raise DataError(
                        f"{path}: sha256 differs from the manifest's: the shard is damaged or was "
                        "replaced; copy it again"
                    )
                _checked_files.add(identity)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path}: cannot read shard: {error.strerror}") from None

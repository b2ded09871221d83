"""Reads samples out of tar shards by number, through the index, without unpacking or scanning.

A shard is mapped into memory. Where all samples of a modality have one layout (same size, same distance, same
npy header), which is how `jmvae-dist shards write` lays them out, the modality is a strided array over the
tar itself and any set of samples is one gather. Otherwise each sample is decoded by its index entry, by several
threads. Both paths give the same values.

Shape suffixes: N samples of the shard, B samples asked for.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import resource
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, get_args

import numpy as np

from jmvae_dist.data.encodings import decode_member, parse_npy_header
from jmvae_dist.data.files import open_regular
from jmvae_dist.data.index import read_index
from jmvae_dist.data.manifest import Manifest, Modality
from jmvae_dist.data.views import SampleKeys, View
from jmvae_dist.errors import ConfigError, DataError
from jmvae_dist.files import sha256_of

Verify = Literal["always", "first_use", "never"]

DEFAULT_MAX_OPEN = 128
_TAR_BLOCK_BYTES = 512
_ASCII_ZERO = ord("0")

# What webdataset calls the key: the path up to the first dot of the file's name.
_KEY = re.compile(r"((?:.*/)?[^./]+)\.[^/]*$", re.DOTALL)

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
        values = self.read_strided(index_B, modality)
        return self._decode_each(index_B, modality) if values is None else values

    def read_strided(self, index_B: np.ndarray, modality: str) -> np.ndarray | None:
        """Like `read_stored`; None if the modality is not one strided array."""
        self._check_indices(index_B)
        if modality not in self._strided:
            self._strided[modality] = self._open_strided(modality)
        array = self._strided[modality]
        if array is None:
            return None
        if self._modalities[modality].encoding == "npy":
            return array[index_B]
        return self._parse_classes(array[index_B], index_B, modality)

    def is_strided(self, modality: str) -> bool:
        """Whether the modality is read as one strided array."""
        if modality not in self._strided:
            self._strided[modality] = self._open_strided(modality)
        return self._strided[modality] is not None

    def key(self, index: int, modality: str) -> str:
        """The key of a sample, from the tar header before its member; for messages only, never a path."""
        offset = int(self._records_NM["offset"][index, self._columns[modality]])
        if offset == 0:  # the sample has no such member: another one knows the key as well
            offset = int(self._records_NM["offset"][index].max())
        return _key_in(self._map[max(0, offset - _TAR_BLOCK_BYTES) : offset], self._modalities[modality])

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

    def member_bytes(self, index: int, modality: str) -> bytes:
        """The content of a member; raises DataError if the sample has none."""
        offset, size = self.location(index, modality)
        if offset == 0:
            names = " or ".join(repr(name) for name in self._modalities[modality].extensions)
            self.fail(index, modality, f"the sample has no member {names}")
        return self._map[offset : offset + size]

    # Strided path

    def _open_strided(self, modality: str) -> np.ndarray | None:
        """The modality as one array over the tar, or None if its samples differ in layout.

        `npy`: (N, *shape) in the stored dtype; `cls`: the ASCII digits, uint8 (N, digits).
        """
        spec = self._modalities[modality]
        if spec.encoding not in ("npy", "cls"):
            return None
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
        if spec.encoding == "cls":
            return member_N if 1 <= size <= spec.class_digits else None
        return self._open_strided_npy(member_N, modality, offset, stride)

    def _open_strided_npy(self, member_N: np.ndarray, modality: str, offset: int, stride: int) -> np.ndarray | None:
        spec = self._modalities[modality]
        try:
            dtype, shape, fortran_order, header_bytes = parse_npy_header(bytes(member_N[0]))
        except DataError:
            return None
        declared = (np.dtype(spec.dtype), spec.fixed_shape)
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
        # The general path knows what else may stand for a class index, and explains what is wrong.
        return self._decode_each(index_B, modality) if bad_B.any() else class_B

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


class _Member(NamedTuple):
    """A member to be decoded: row of the batch, its bytes, and where they came from."""

    view: View
    row: int
    content: bytes


class ShardSet:
    """Samples from any shards of a manifest; keeps the most recently used shards open.

    Can be pickled: the copy opens its own shards.

    Args:
        manifest: the data set.
        verify: when to compare checksums; see `ShardReader`.
        max_open: how many shards to keep open.
        threads: how many decode members that are not strided arrays.
    """

    def __init__(
        self,
        manifest: Manifest,
        verify: Verify = "first_use",
        max_open: int = DEFAULT_MAX_OPEN,
        threads: int = 1,
    ) -> None:
        check_verify(verify)
        assert max_open >= 1
        assert threads >= 1
        self._manifest = manifest
        self._verify: Verify = verify
        self._max_open = max_open
        self._threads = threads
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None
        # What is wrong with shards that could not be opened: a damaged one is not hashed again for every sample.
        self._unsound: dict[int, str] = {}

    def reader(self, shard_number: int) -> ShardReader:
        """The open reader of a shard; valid until `max_open` other shards have been used."""
        if shard_number in self._open:
            self._open.move_to_end(shard_number)
            return self._open[shard_number]
        if shard_number in self._unsound:
            raise DataError(self._unsound[shard_number])
        while len(self._open) >= self._max_open:
            self._open.popitem(last=False)[1].close()
        try:
            self._open[shard_number] = ShardReader(self._manifest, shard_number, self._verify)
        except DataError as error:
            self._unsound[shard_number] = str(error)
            raise
        return self._open[shard_number]

    def gather(
        self, shard_B: np.ndarray, index_B: np.ndarray, views: Sequence[View], keys: SampleKeys
    ) -> dict[str, np.ndarray]:
        """What the model sees of the given samples, in order: finite float32 (B, *shape) by modality.

        Raises:
            DataError: names shard, key, modality and cause.
        """
        stored = {view.name: np.empty((len(shard_B), *view.stored_shape), view.dtype) for view in views}
        members: list[_Member] = []
        for shard_number, rows in _rows_by_shard(shard_B):
            wanted = index_B[rows]
            reader = self._reader_for(shard_number, wanted, views[0].name)
            for view in views:
                values = reader.read_strided(wanted, view.name)
                if values is not None:
                    stored[view.name][rows] = values
                    continue
                for row, index in zip(rows.tolist(), wanted.tolist(), strict=True):
                    members.append(_Member(view, row, reader.member_bytes(index, view.name)))
        for member, error in self._decode(members, stored):
            self._fail(shard_B, index_B, member.row, member.view.name, str(error))
        return {view.name: self._to_model(view, stored[view.name], shard_B, index_B, keys) for view in views}

    def gather_valid(
        self, shard_B: np.ndarray, index_B: np.ndarray, views: Sequence[View], keys: SampleKeys
    ) -> tuple[dict[str, np.ndarray], dict[int, str]]:
        """Like `gather`, without the samples that cannot be read, and what is wrong with those, by row.

        Batches are halved until a bad sample is alone: sound batches, nearly all of them, pay nothing for it.
        """
        try:
            return self.gather(shard_B, index_B, views, keys), {}
        except DataError as error:
            if len(shard_B) == 1:
                return {view.name: np.empty((0, *view.shape), np.float32) for view in views}, {0: str(error)}
        middle = len(shard_B) // 2
        halves = [
            self.gather_valid(shard_B[part], index_B[part], views, keys.take(part))
            for part in (slice(None, middle), slice(middle, None))
        ]
        values = {view.name: np.concatenate([half[view.name] for half, _ in halves]) for view in views}
        return values, halves[0][1] | {middle + row: problem for row, problem in halves[1][1].items()}

    def close(self) -> None:
        """Close all shards; using the set again opens them again."""
        while self._open:
            self._open.popitem()[1].close()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._unsound.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_pool": None}

    def _reader_for(self, shard_number: int, index_B: np.ndarray, modality: str) -> ShardReader:
        """The reader of a shard; if it cannot be opened, the error also names a sample that needs it."""
        try:
            return self.reader(shard_number)
        except DataError as error:
            index = int(index_B[0])
            key = _key_in_unsound(self._manifest, shard_number, index, modality)
            raise DataError(f"{error} (needed for sample {index}, key {key!r}, modality {modality!r})") from None

    def _fail(self, shard_B: np.ndarray, index_B: np.ndarray, row: int, modality: str, problem: str) -> NoReturn:
        self.reader(int(shard_B[row])).fail(int(index_B[row]), modality, problem)

    def _decode(self, members: list[_Member], stored: dict[str, np.ndarray]) -> list[tuple[_Member, DataError]]:
        """Decode members into their rows; returns those that cannot be."""
        # Pillow decodes beside the interpreter; the others would only take turns.
        images = [member for member in members if member.view.modality.encoding == "image"]
        if self._threads == 1 or len(images) < 2:
            return _decode_members(members, stored)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, "decode")
        # Several parts per thread, since pictures differ in size.
        size = -(-len(images) // (4 * self._threads))
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        others = [member for member in members if member.view.modality.encoding != "image"]
        waiting = [self._pool.submit(_decode_members, part, stored) for part in parts]
        failed = _decode_members(others, stored)
        for future in waiting:
            failed += future.result()
        return failed

    def _to_model(
        self, view: View, stored: np.ndarray, shard_B: np.ndarray, index_B: np.ndarray, keys: SampleKeys
    ) -> np.ndarray:
        try:
            values = view.to_model(stored, keys)
        except DataError:
            for row in range(len(stored)):
                part = slice(row, row + 1)
                try:
                    view.to_model(stored[part], keys.take(part))
                except DataError as error:
                    self._fail(shard_B, index_B, row, view.name, str(error))
            raise
        bad_row = first_non_finite_row(values)
        if bad_row is not None:
            self._fail(shard_B, index_B, bad_row, view.name, "value is not finite (NaN or infinite)")
        return values


def _decode_members(members: Sequence[_Member], stored: dict[str, np.ndarray]) -> list[tuple[_Member, DataError]]:
    failed = []
    for member in members:
        try:
            stored[member.view.name][member.row] = member.view.decode(member.content)
        except DataError as error:
            failed.append((member, error))
    return failed


def _rows_by_shard(shard_B: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Shard numbers, and which rows of the batch each one has."""
    by_shard = np.argsort(shard_B, kind="stable")
    shard_numbers, first = np.unique(shard_B[by_shard], return_index=True)
    yield from zip(shard_numbers.tolist(), np.split(by_shard, first[1:]), strict=True)


def _key_in(header: bytes, modality: Modality) -> str:
    """The key in the tar header of a member; for messages only, never a path."""
    prefix, name = (
        field.split(b"\0")[0].decode("ascii", "backslashreplace") for field in (header[345:500], header[:100])
    )
    full_name = f"{prefix}/{name}" if prefix else name
    for extension in modality.extensions:
        if full_name.lower().endswith(f".{extension.lower()}"):
            return full_name[: -len(extension) - 1]
    match = _KEY.match(full_name)  # of another member of the sample
    return match[1] if match else "unknown"


def describe_sample(manifest: Manifest, shard_number: int, index: int, modality: str) -> str:
    """Where a sample is, for messages: shard, number, key and modality, as `ShardReader.fail` names them."""
    key = _key_in_unsound(manifest, shard_number, index, modality)
    return f"{manifest.shard_path(shard_number)}: sample {index} (key {key!r}), modality {modality!r}"


def _key_in_unsound(manifest: Manifest, shard_number: int, index: int, modality: str) -> str:
    """The key of a sample of a shard that is not open or cannot be trusted, from what is there of it."""
    shard, num_modalities = manifest.shards[shard_number], len(manifest.modalities)
    column = [entry.name for entry in manifest.modalities].index(modality)
    with contextlib.suppress(DataError, OSError):
        path = manifest.index_path(shard_number)
        records_NM = read_index(path, shard.num_samples, num_modalities, shard.num_bytes, None)
        offset = int(records_NM["offset"][index, column]) or int(records_NM["offset"][index].max())
        with open_regular(manifest.shard_path(shard_number)) as file:
            file.seek(max(0, offset - _TAR_BLOCK_BYTES))
            return _key_in(file.read(_TAR_BLOCK_BYTES), manifest.modalities[column])
    return "unknown"


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

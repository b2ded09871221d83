"""Reads samples out of tar shards by number, through the index, without unpacking or scanning.

A shard is mapped into memory. Where all samples of a modality have one layout (same size, same distance, same
npy header), which is how `jmvae-dist shards write` lays them out, the modality is a strided array over the
tar itself and any set of samples is one gather. Otherwise each sample is decoded by its index entry, by several
threads. Both paths give the same values.

Shape suffixes: N samples of the shard, B samples asked for.
"""

from __future__ import annotations

import contextlib
import math
import re
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn

import numpy as np

from jmvae_dist.data.encodings import decode_member, max_member_bytes, parse_npy_header
from jmvae_dist.data.files import open_regular
from jmvae_dist.data.index import read_index
from jmvae_dist.data.manifest import Manifest, Modality
from jmvae_dist.data.store import TAR_BLOCK_BYTES, RangedShard, RemoteAccess, ShardBytes, ShardStore, Verify
from jmvae_dist.data.urls import shown
from jmvae_dist.data.views import SampleKeys, View
from jmvae_dist.errors import DataError, UnreachableError

DEFAULT_MAX_OPEN = 128
# Members of a batch are decoded as soon as so many bytes of them are in memory.
_MOST_UNDECODED_BYTES = 256 * 2**20
# How often an idle process looks whether another one waits for room in the cache.
_LOOK_EVERY_S = 0.5
_ASCII_ZERO = ord("0")

# What webdataset calls the key: the path up to the first dot of the file's name.
_KEY = re.compile(r"((?:.*/)?[^./]+)\.[^/]*$", re.DOTALL)


class ShardReader:
    """One open shard.

    Args:
        manifest: the data set.
        shard_number: which of its shards.
        verify: when to compare the sha256 of shard and index with the manifest: `always` (each opening),
            `first_use` (once per process) or `never` (that of the index alone).
        content: the opened shard; opened here without it.

    Raises:
        DataError: the shard or its index is missing, truncated, damaged, or not what the manifest says.
    """

    def __init__(
        self,
        manifest: Manifest,
        shard_number: int,
        verify: Verify = "first_use",
        content: ShardBytes | None = None,
    ) -> None:
        self.content = content or ShardStore(manifest, verify).open(shard_number)
        self.path = self.content.name
        self.num_samples = manifest.shards[shard_number].num_samples
        self._modalities = {modality.name: modality for modality in manifest.modalities}
        self._columns = {modality.name: column for column, modality in enumerate(manifest.modalities)}
        self._records_NM = self.content.records_NM
        self._strided: dict[str, np.ndarray | None] = {}

    def close(self) -> None:
        """Release the mapping; the reader cannot be used afterwards."""
        self._strided.clear()
        self.content.close()

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
        if offset == 0:
            return "unknown"
        return _key_in(self.content.read(offset - TAR_BLOCK_BYTES, TAR_BLOCK_BYTES), self._modalities[modality])

    def members(self, index_B: np.ndarray, modalities: Sequence[str]) -> np.ndarray:
        """What `member_bytes` reads of some samples, as index records (B, len(modalities))."""
        self._check_indices(index_B)
        columns = np.array([self._columns[modality] for modality in modalities])
        records = self._records_NM[index_B[:, None], columns]
        records["size"] = np.minimum(records["size"], [self._most_bytes(modality) for modality in modalities])
        return records

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in the order of the index."""
        return tuple(self._columns)

    @property
    def records(self) -> np.ndarray:
        """The index: fields `offset` and `size`, (samples, modalities)."""
        return self._records_NM

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

    def _most_bytes(self, modality: str) -> int:
        """So much of a member is read: one byte more than it may have shows that it has too many."""
        return max_member_bytes(self._modalities[modality]) + 1

    def member_bytes(self, index: int, modality: str) -> bytes:
        """The content of a member, not all of one that is too long; raises DataError if the sample has none."""
        offset, size = self.location(index, modality)
        if offset == 0:
            names = " or ".join(repr(name) for name in self._modalities[modality].extensions)
            self.fail(index, modality, f"the sample has no member {names}")
        try:
            return self.content.read_member(offset, size, self._most_bytes(modality))
        except UnreachableError:
            raise
        except DataError as error:
            self.fail(index, modality, str(error))

    # Strided path

    def _open_strided(self, modality: str) -> np.ndarray | None:
        """The modality as one array over the tar, or None if its samples differ in layout.

        `npy`: (N, *shape) in the stored dtype; `cls`: the ASCII digits, uint8 (N, digits).
        """
        spec = self._modalities[modality]
        if self.content.buffer is None or spec.encoding not in ("npy", "cls"):
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
        if size >= self._most_bytes(modality):
            return None
        member_N = np.ndarray((self.num_samples, size), np.uint8, self.content.buffer, offset, (stride, 1))
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
            (self.num_samples, *shape), dtype, self.content.buffer, offset + header_bytes, (stride, *inner_strides)
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
        access: how remote shards are read.
    """

    def __init__(
        self,
        manifest: Manifest,
        verify: Verify = "first_use",
        max_open: int = DEFAULT_MAX_OPEN,
        threads: int = 1,
        access: RemoteAccess | None = None,
    ) -> None:
        assert max_open >= 1
        assert threads >= 1
        self._manifest = manifest
        self._verify: Verify = verify
        self._max_open = max_open
        self._threads = threads
        self._store = ShardStore(manifest, verify, access)
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None
        # What is wrong with shards that could not be opened: a damaged one is not hashed again for every sample.
        self._unsound: dict[int, str] = {}
        # Held while shards are in use; whoever gets it otherwise may close them.
        self._busy = threading.RLock()
        self._ended: threading.Event | None = None

    def reader(self, shard_number: int) -> ShardReader:
        """The open reader of a shard; valid until `max_open` other shards have been used."""
        if shard_number in self._open:
            self._open.move_to_end(shard_number)
            return self._open[shard_number]
        if shard_number in self._unsound:
            raise DataError(self._unsound[shard_number])
        try:
            content = self._store.open(shard_number, self._close_oldest)
        except UnreachableError:
            raise
        except DataError as error:
            self._unsound[shard_number] = str(error)
            raise
        return self._add(shard_number, content)

    def _add(self, shard_number: int, content: ShardBytes) -> ShardReader:
        while len(self._open) >= self._max_open:
            self._close_oldest()
        self._open[shard_number] = ShardReader(self._manifest, shard_number, self._verify, content)
        if self._store.cache is not None and self._ended is None:
            self._ended = threading.Event()
            arguments = weakref.ref(self), self._ended
            threading.Thread(target=_give_way, args=arguments, name="jmvae-give-way", daemon=True).start()
        return self._open[shard_number]

    def _close_oldest(self) -> bool:
        """Close the least recently used shard; False if none is open."""
        if not self._open:
            return False
        self._open.popitem(last=False)[1].close()
        return True

    def _load(self, index_by_shard: dict[int, np.ndarray], modalities: Sequence[str]) -> None:
        """Bring the members of a batch that lie on a server, with several requests at a time."""
        if not self._store.reads_ranges:
            return
        for number, done_with in self._open.items():
            if number not in index_by_shard and isinstance(done_with.content, RangedShard):
                done_with.content.unload()
        known = self._open.keys() | self._unsound.keys()
        missing = [number for number in index_by_shard if self._store.is_ranged(number) and number not in known]
        # Those that are open and needed must not be closed for the missing ones.
        for number in index_by_shard.keys() & self._open.keys():
            self._open.move_to_end(number)
        for number, content in self._store.open_ranged(missing).items():
            self._add(number, content)
        requests = []
        for number, index_B in index_by_shard.items():
            reader = self._open.get(number)
            if reader is not None and isinstance(reader.content, RangedShard):
                requests.append((reader.content, reader.members(index_B, modalities)))
        self._store.load(requests)

    def close_if_idle(self) -> None:
        """Close all shards if a process of the node waits for room in the cache, and no batch is being read."""
        assert self._store.cache is not None
        if self._store.cache.is_room_asked_for() and self._busy.acquire(blocking=False):
            try:
                while self._close_oldest():
                    pass
            finally:
                self._busy.release()

    def _make_room_for_others(self, in_use: set[int]) -> None:
        """Close what the last batch did not need, if a process of the node waits for room in the cache."""
        if self._store.cache is not None and self._store.cache.is_room_asked_for():
            for number in self._open.keys() - in_use:
                self._open.pop(number).close()

    def gather(
        self, shard_B: np.ndarray, index_B: np.ndarray, views: Sequence[View], keys: SampleKeys
    ) -> dict[str, np.ndarray]:
        """What the model sees of the given samples, in order: finite float32 (B, *shape) by modality.

        Raises:
            DataError: names shard, key, modality and cause.
            UnreachableError: the batch does not fit into memory, besides.
        """
        try:
            return self._gather(shard_B, index_B, views, keys)
        except MemoryError:
            largest = max(views, key=lambda view: math.prod(view.shape))
            raise UnreachableError(
                f"memory is too small for a batch of {len(shard_B)} samples; one of modality {largest.name!r} has "
                f"the shape {list(largest.shape)}: use more ranks, or a smaller training.global_batch_size"
            ) from None

    def _gather(
        self, shard_B: np.ndarray, index_B: np.ndarray, views: Sequence[View], keys: SampleKeys
    ) -> dict[str, np.ndarray]:
        stored = {view.name: np.empty((len(shard_B), *view.stored_shape), view.dtype) for view in views}
        with self._busy:
            for members in _portions(self._read(shard_B, index_B, views, stored)):
                for member, error in self._decode(members, stored):
                    self._fail(shard_B, index_B, member.row, member.view.name, str(error))
            self._make_room_for_others(set(shard_B.tolist()))
            return {view.name: self._to_model(view, stored[view.name], shard_B, index_B, keys) for view in views}

    def _read(
        self, shard_B: np.ndarray, index_B: np.ndarray, views: Sequence[View], stored: dict[str, np.ndarray]
    ) -> Iterator[_Member]:
        """Fill in what lies in strided arrays, and yield the members that are still to be decoded."""
        parts = list(_rows_by_shard(shard_B))
        for start in range(0, len(parts), self._max_open):
            part = parts[start : start + self._max_open]
            self._load({shard_number: index_B[rows] for shard_number, rows in part}, [view.name for view in views])
            for shard_number, rows in part:
                wanted = index_B[rows]
                reader = self._reader_for(shard_number, wanted, views[0].name)
                for view in views:
                    values = reader.read_strided(wanted, view.name)
                    if values is not None:
                        stored[view.name][rows] = values
                        continue
                    for row, index in zip(rows.tolist(), wanted.tolist(), strict=True):
                        yield _Member(view, row, reader.member_bytes(index, view.name))

    def gather_valid(
        self, shard_B: np.ndarray, index_B: np.ndarray, views: Sequence[View], keys: SampleKeys
    ) -> tuple[dict[str, np.ndarray], dict[int, str]]:
        """Like `gather`, without the samples that cannot be read, and what is wrong with those, by row.

        Batches are halved until a bad sample is alone: sound batches, nearly all of them, pay nothing for it.
        """
        try:
            return self.gather(shard_B, index_B, views, keys), {}
        except UnreachableError:
            raise  # the samples may be sound
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
        if self._ended is not None:
            self._ended.set()
            self._ended = None
        with self._busy:
            while self._close_oldest():
                pass
        self._store.close()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._unsound.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_pool": None, "_busy": None, "_ended": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _busy=threading.RLock())

    def _reader_for(self, shard_number: int, index_B: np.ndarray, modality: str) -> ShardReader:
        """The reader of a shard; if it cannot be opened, the error also names a sample that needs it."""
        try:
            return self.reader(shard_number)
        except DataError as error:
            index = int(index_B[0])
            key = _key_in_unsound(self._manifest, shard_number, index, modality)
            what = f"needed for sample {index}, key {key!r}, modality {modality!r}"
            raise type(error)(f"{error} ({what})") from None

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


def _give_way(shards: weakref.ref[ShardSet], ended: threading.Event) -> None:
    """Until it is closed, have an idle set close its shards when others of the node wait for room in the cache.

    A process that waits for its turn would keep them for as long, and may be waiting for the others.
    """
    while not ended.wait(_LOOK_EVERY_S):
        current = shards()
        if current is None:
            return
        current.close_if_idle()
        del current  # else nobody would ever collect it


def _portions(members: Iterator[_Member]) -> Iterator[list[_Member]]:
    """The members in lists that do not take too much memory."""
    portion: list[_Member] = []
    num_bytes = 0
    for member in members:
        portion.append(member)
        num_bytes += len(member.content)
        if num_bytes >= _MOST_UNDECODED_BYTES:
            yield portion
            portion, num_bytes = [], 0
    if portion:
        yield portion


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
    return f"{shown(manifest.shard_location(shard_number))}: sample {index} (key {key!r}), modality {modality!r}"


def _key_in_unsound(manifest: Manifest, shard_number: int, index: int, modality: str) -> str:
    """The key of a sample of a shard that is not open or cannot be trusted, from what is there of it."""
    shard, num_modalities = manifest.shards[shard_number], len(manifest.modalities)
    column = [entry.name for entry in manifest.modalities].index(modality)
    with contextlib.suppress(DataError, OSError):
        path = manifest.index_path(shard_number)
        records_NM = read_index(path, shard.num_samples, num_modalities, shard.num_bytes, None)
        offset = int(records_NM["offset"][index, column]) or int(records_NM["offset"][index].max())
        with open_regular(manifest.shard_path(shard_number)) as file:
            file.seek(max(0, offset - TAR_BLOCK_BYTES))
            return _key_in(file.read(TAR_BLOCK_BYTES), manifest.modalities[column])
    return "unknown"


def most_open_shards(files_per_shard: int = 1) -> int:
    """How many shards a process may reasonably keep open: half its limit of open files is for them."""
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**16 if soft_limit == resource.RLIM_INFINITY else max(8, soft_limit // 2 // files_per_shard)


def first_non_finite_row(values: np.ndarray) -> int | None:
    """The first row of (B, ...) that holds a NaN or an infinity, or None."""
    finite = np.isfinite(values)
    if finite.all():
        return None
    return int(np.argmin(finite.reshape(len(values), -1).all(axis=1)))

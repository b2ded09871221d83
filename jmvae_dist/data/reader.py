"""Reads samples out of tar shards by number, through the index, without unpacking or scanning.

A shard is mapped into memory. Where the members of a modality have one size and lie at even distances, which is how
`jmvae-dist shards write` lays them out, the modality is a strided array over the tar itself: any set of samples is
one gather, and their headers are compared with that of the first member. Otherwise, and where a header differs, each
sample is decoded by its index entry, images by several threads. Both paths give the same values.

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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

import numpy as np

from jmvae_dist.data.columns import Alike, Column, Columns, Kind, open_column
from jmvae_dist.data.encodings import decode_member, max_member_bytes
from jmvae_dist.data.files import open_regular
from jmvae_dist.data.index import read_records_of_sample
from jmvae_dist.data.indexing.tar_scan import name_before
from jmvae_dist.data.manifest import Manifest, Modality
from jmvae_dist.data.store import (
    TAR_BLOCK_BYTES,
    DamagedCopyError,
    Explain,
    MappedShard,
    RangedShard,
    RemoteAccess,
    ShardBytes,
    ShardStore,
    Verify,
)
from jmvae_dist.data.urls import shown
from jmvae_dist.data.views import SampleKeys, View
from jmvae_dist.errors import DataError, UnreachableError

DEFAULT_MAX_OPEN = 128
# Members of a batch are decoded as soon as so many bytes of them are in memory.
_MOST_UNDECODED_BYTES = 256 * 2**20
# How often an idle process looks whether another one waits for room in the cache.
_LOOK_EVERY_S = 0.5
# As much is read before a member to find its name, with extended headers for long names.
_MOST_HEADER_BYTES = 16 * TAR_BLOCK_BYTES

# What webdataset calls the key: the path up to the first dot of the file's name.
_KEY = re.compile(r"((?:.*/)?[^./]+)\.[^/]*$", re.DOTALL)


class ShardReader:
    """One open shard.

    Args:
        manifest: the data set.
        shard_number: which of its shards.
        verify: when the bytes of the shard are checked; see `ShardStore`.
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
        self._shard_number = shard_number
        self.num_samples = manifest.shards[shard_number].num_samples
        self._modalities = {modality.name: modality for modality in manifest.modalities}
        self._columns = {modality.name: column for column, modality in enumerate(manifest.modalities)}
        self._records_NM = self.content.records_NM
        self._opened_columns: dict[tuple[str, ...], Columns] = {}

    def close(self) -> None:
        """Release the mapping; the reader cannot be used afterwards."""
        self._opened_columns.clear()
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
        self._check_indices(index_B)
        columns = self.columns((modality,))
        if columns.others:
            return self._decode_each(index_B, modality)
        alike = Alike(columns, len(index_B), len(index_B))
        stored: dict[str, np.ndarray] = {}
        alike.take(columns, np.arange(len(index_B)), index_B)
        if (damage := alike.find_damage()) is not None:
            self.fail_damaged(int(index_B[damage[1]]), modality)
        # The general path knows what else a member may be, and explains what is wrong.
        return self._decode_each(index_B, modality) if alike.parse_into(stored) else stored[modality]

    def columns(self, modalities: tuple[str, ...]) -> Columns:
        """Those of some modalities that are an array over the tar: their members have one size and distance."""
        if modalities not in self._opened_columns:
            opened = {name: self._open_column(name) for name in modalities}
            columns = {name: column for name, column in opened.items() if column is not None}
            numbers = tuple(self._columns[name] for name in columns)
            self._opened_columns[modalities] = Columns(
                modalities=tuple(self._modalities[name] for name in columns),
                contents=tuple(column.contents for column in columns.values()),
                kind=Kind(numbers, tuple(column.layout for column in columns.values())),
                checks=None if self.content.checks is None or not numbers else self.content.checks.of(numbers),
                others=tuple(name for name in modalities if name not in columns),
            )
        return self._opened_columns[modalities]

    def _open_column(self, modality: str) -> Column | None:
        if self.content.buffer is None:
            return None
        number = self._columns[modality]
        return open_column(self.content.buffer, self._records_NM, number, self._modalities[modality])

    def key(self, index: int, modality: str) -> str:
        """The key of a sample, from the tar header before its member; for messages only, never a path."""
        try:
            return _key_of(
                self._records_NM[index], self._columns[modality], self.content.read, self._modalities[modality]
            )
        except DataError:  # to read it over the network may fail
            return "unknown"

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
        raise DataError(self._message(index, modality, problem))

    def _message(self, index: int, modality: str, problem: str) -> str:
        return f"{self.path}: sample {index} (key {self.key(index, modality)!r}), modality {modality!r}: {problem}"

    def fail_damaged(self, index: int, modality: str) -> NoReturn:
        """Raise the DataError of a sample whose member does not have its digest."""
        problem = "its bytes are not those that the shard's sums were made of: it is damaged; copy the shard again"
        if self.content.is_copy:
            raise DamagedCopyError(self._message(index, modality, problem), self._shard_number)
        self.fail(index, modality, problem)

    def _check_indices(self, index_B: np.ndarray) -> None:
        """Raise DataError unless the shard has all these samples."""
        # As unsigned numbers negative ones are large: one comparison finds both kinds.
        outside = index_B.view(np.uint64) >= self.num_samples
        if outside.any():
            index = int(index_B[np.argmax(outside)])
            raise DataError(f"{self.path}: sample {index} does not exist; the shard has {self.num_samples} samples")

    def _most_bytes(self, modality: str) -> int:
        """So much of a member is read: one byte more than it may have shows that it has too many."""
        return max_member_bytes(self._modalities[modality]) + 1

    def member_bytes(self, index: int, modality: str) -> bytes:
        """The content of a member, not all of one that is too long.

        Raises:
            DataError: the sample has none, or it is damaged.
        """
        offset, size = self.location(index, modality)
        if offset == 0:
            names = " or ".join(repr(name) for name in self._modalities[modality].extensions)
            self.fail(index, modality, f"the sample has no member {names}")
        try:
            content = self.content.read_member(offset, size, self._most_bytes(modality))
        except UnreachableError:
            raise
        except DataError as error:
            self.fail(index, modality, str(error))
        checks = self.content.checks
        # One that is too long was not read as a whole, and will be refused.
        is_whole = len(content) == size
        if checks is not None and is_whole and not checks.is_sound(self._columns[modality], index, content):
            self.fail_damaged(index, modality)
        return content

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
        verify: when the bytes of shards are checked; see `ShardStore`.
        max_open: how many shards to keep open.
        threads: how many decode images; texts, JSON and arrays are decoded by the calling one.
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
        # What is wrong with shards that could not be opened, and the state of their files then: a damaged one is not
        # hashed again for every sample, but it is once it has been repaired.
        self._unsound: dict[int, tuple[str, object]] = {}
        # Held while shards are in use; whoever gets it otherwise may close them.
        self._busy = threading.RLock()
        self._ended: threading.Event | None = None

    def reader(self, shard_number: int) -> ShardReader:
        """The open reader of a shard; valid until `max_open` other shards have been used."""
        if shard_number in self._open:
            self._open.move_to_end(shard_number)
            return self._open[shard_number]
        problem = self._known_problem(shard_number)
        if problem is not None:
            raise DataError(problem)
        state = self._store.state_of_files(shard_number)
        try:
            content = self._store.open(shard_number, self._close_oldest)
        except UnreachableError:
            raise
        except DataError as error:
            self._unsound[shard_number] = str(error), state
            raise
        return self._add(shard_number, content)

    def _known_problem(self, shard_number: int) -> str | None:
        """What was wrong with a shard when it was opened last, unless its files have changed since."""
        problem, state = self._unsound.get(shard_number, (None, None))
        if problem is not None and self._store.state_of_files(shard_number) != state:
            del self._unsound[shard_number]
            return None
        return problem

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

    def _remove_copy(self, shard_number: int) -> None:
        """Remove the damaged copy of an open shard from the cache: it is downloaded again when it is needed again."""
        content = self._open.pop(shard_number).content
        assert isinstance(content, MappedShard)
        assert self._store.cache is not None
        content.remove_copy(self._store.cache)

    def _open_together(self, shard_numbers: Sequence[int], explain: Explain) -> None:
        """Open what is not open yet with several threads: sums over whole shards and answers of servers take time."""
        missing = [
            number for number in shard_numbers if number not in self._open and self._known_problem(number) is None
        ]
        if not missing:
            return
        # Those that are open and needed must not be closed for the missing ones.
        for number in shard_numbers:
            if number in self._open:
                self._open.move_to_end(number)
        states = {number: self._store.state_of_files(number) for number in missing}
        for number, content in self._store.open_together(missing, explain).items():
            if isinstance(content, DataError):
                # Whoever needs the shard meets the error again, and knows which sample needs it.
                self._unsound[number] = str(content), states[number]
            else:
                self._add(number, content)

    def _load(self, index_by_shard: dict[int, np.ndarray], modalities: Sequence[str], explain: Explain) -> None:
        """Bring the members of a batch that lie on a server, with several requests at a time."""
        for number, done_with in self._open.items():
            if number not in index_by_shard and isinstance(done_with.content, RangedShard):
                done_with.content.unload()
        requests = []
        for number, index_B in index_by_shard.items():
            reader = self._open.get(number)
            if reader is not None and isinstance(reader.content, RangedShard):
                requests.append((number, reader.content, reader.members(index_B, modalities)))
        self._store.load(requests, explain)

    def close_if_idle(self) -> None:
        """Close all shards if a process of the node waits for room in the cache, and no batch is being read."""
        assert self._store.cache is not None
        if self._store.cache.is_room_asked_for() and self._busy.acquire(blocking=False):
            try:
                while self._close_oldest():
                    pass
            finally:
                self._busy.release()

    def _make_room_for_others(self, shard_B: np.ndarray) -> None:
        """Close what the last batch did not need, if a process of the node waits for room in the cache."""
        if self._store.cache is not None and self._store.cache.is_room_asked_for():
            for number in self._open.keys() - set(shard_B.tolist()):
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
            return self._gather_replacing_copies(shard_B, index_B, views, keys)
        except MemoryError:
            largest = max(views, key=lambda view: math.prod(view.shape))
            raise UnreachableError(
                f"memory is too small for a batch of {len(shard_B)} samples; one of modality {largest.name!r} has "
                f"the shape {list(largest.shape)}: use more ranks, or a smaller training.global_batch_size"
            ) from None

    def _gather_replacing_copies(
        self, shard_B: np.ndarray, index_B: np.ndarray, views: Sequence[View], keys: SampleKeys
    ) -> dict[str, np.ndarray]:
        """`_gather`; a copy in the cache that turns out to be damaged is removed, and with that downloaded again."""
        replaced: set[int] = set()
        with self._busy:  # all along: the copy must still be open when it turns out to be damaged
            while True:
                try:
                    return self._gather(shard_B, index_B, views, keys)
                except DamagedCopyError as error:
                    if error.shard_number in replaced:
                        message = f"{error} (the copy is damaged again and again; is the disk of the cache sound?)"
                        raise UnreachableError(message) from None
                    replaced.add(error.shard_number)
                    self._remove_copy(error.shard_number)

    def _gather(
        self, shard_B: np.ndarray, index_B: np.ndarray, views: Sequence[View], keys: SampleKeys
    ) -> dict[str, np.ndarray]:
        assert index_B.min(initial=0) >= 0, "numpy would count from the end"
        check_views(views, self._manifest)
        stored = {view.name: np.empty((len(shard_B), *view.stored_shape), view.dtype) for view in views}
        for members in _portions(self._read(shard_B, index_B, views, stored)):
            for member, error in self._decode(members, stored):
                self._fail(shard_B, index_B, member.row, member.view.name, str(error))
        self._make_room_for_others(shard_B)
        return {view.name: self._to_model(view, stored[view.name], shard_B, index_B, keys) for view in views}

    def _read(
        self, shard_B: np.ndarray, index_B: np.ndarray, views: Sequence[View], stored: dict[str, np.ndarray]
    ) -> Iterator[_Member]:
        """Fill in what lies in strided arrays, and yield the members that are still to be decoded."""
        alike: dict[Kind, Alike] = {}
        view_by_name = {view.name: view for view in views}
        names = tuple(view_by_name)
        parts = list(_rows_by_shard(shard_B))
        for start in range(0, len(parts), self._max_open):
            part = parts[start : start + self._max_open]
            index_by_shard = {number: index_B[rows] for number, rows in part}
            explain = partial(self._explain, index_by_shard, names[0])
            self._open_together(list(index_by_shard), explain)
            if self._store.reads_ranges:
                self._load(index_by_shard, names, explain)
            for shard_number, rows in part:
                wanted = index_by_shard[shard_number]
                try:
                    reader = self.reader(shard_number)
                except DataError as error:
                    raise explain(shard_number, error) from None
                columns = reader.columns(names)
                if columns.modalities:
                    if columns.kind not in alike:
                        # Usually the first kind is the only one; more of them must not add up to many batches.
                        alike[columns.kind] = Alike(columns, len(shard_B), len(rows) if alike else len(shard_B))
                    alike[columns.kind].take(columns, rows, wanted)
                for name in columns.others:
                    for row, index in zip(rows.tolist(), wanted.tolist(), strict=True):
                        yield _Member(view_by_name[name], row, reader.member_bytes(index, name))
            for samples in alike.values():  # before their shards make way for others
                if (damage := samples.find_damage()) is not None:
                    name, row = damage
                    self.reader(int(shard_B[row])).fail_damaged(int(index_B[row]), name)
        for samples in alike.values():
            for name, row in samples.parse_into(stored):
                content = self.reader(int(shard_B[row])).member_bytes(int(index_B[row]), name)
                yield _Member(view_by_name[name], row, content)

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

    def cancel(self) -> None:
        """Make another thread, which waits for a server, end with TransferCancelled."""
        self._store.cancel()

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

    def _explain(
        self, index_by_shard: dict[int, np.ndarray], modality: str, shard_number: int, error: DataError
    ) -> DataError:
        """The error of a shard, which also names a sample that needs it."""
        index = int(index_by_shard[shard_number][0])
        key = _key_in_unsound(self._manifest, shard_number, index, modality)
        return type(error)(f"{error} (needed for sample {index}, key {key!r}, modality {modality!r})")

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
        bad_row = None if view.is_always_finite else first_non_finite_row(values)
        if bad_row is not None:
            self._fail(shard_B, index_B, bad_row, view.name, "value is not finite (NaN or infinite)")
        return values


def check_views(views: Sequence[View], manifest: Manifest) -> None:
    """Assert that views are of a manifest's modalities: those of another data set may have other columns."""
    assert all(view.modality in manifest.modalities for view in views), "views of another manifest"


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
    ordered_B = shard_B[by_shard]
    bounds = [0, *(np.flatnonzero(ordered_B[1:] != ordered_B[:-1]) + 1).tolist(), len(ordered_B)]
    for start, stop in pairwise(bounds):
        yield int(ordered_B[start]), by_shard[start:stop]


def _key_of(records_M: np.ndarray, column: int, read: Callable[[int, int], bytes], modality: Modality) -> str:
    """The key of a sample, from the tar headers before its member; for messages only, never a path.

    Args:
        records_M: the sample's records in the index.
        column: the member's.
        read: gives bytes of the tar, by offset and size.
        modality: the member's.
    """
    # Where the sample has no such member, another one knows the key as well.
    offset = int(records_M["offset"][column]) or int(records_M["offset"].max())
    if offset == 0:
        return "unknown"
    start = max(0, offset - _MOST_HEADER_BYTES)
    blocks = read(start, offset - start)
    full_name = name_before(blocks) or _stated_name(blocks[-TAR_BLOCK_BYTES:])
    for extension in modality.extensions:
        if full_name.lower().endswith(f".{extension.lower()}"):
            return full_name[: -len(extension) - 1]
    match = _KEY.match(full_name)  # of another member of the sample
    return match[1] if match else "unknown"


def _stated_name(header: bytes) -> str:
    """What a tar header that may be damaged says of the name."""
    prefix, name = (
        field.split(b"\0")[0].decode("ascii", "backslashreplace") for field in (header[345:500], header[:100])
    )
    return f"{prefix}/{name}" if prefix else name


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
        records_M = read_records_of_sample(path, index, shard.num_samples, num_modalities)
        if int(records_M["offset"].max()) > shard.num_bytes:
            return "unknown"
        with open_regular(manifest.shard_path(shard_number)) as file:

            def read(offset: int, size: int) -> bytes:
                file.seek(offset)
                return file.read(size)

            return _key_of(records_M, column, read, manifest.modalities[column])
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

"""Reads batches of samples out of any shards of a manifest: which shards are open, and the batch put together.

Samples that lie in strided arrays (see `reader`) are gathered from all shards of a batch at once; other members are
decoded one by one, images by several threads. Copies that turn out to be damaged are fetched again, and shards are
closed where others of the node need the room.

Shape suffixes: B samples asked for.
"""

from __future__ import annotations

import math
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

import numpy as np

from jmvae_dist.data.columns import Alike, Kind
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.reader import ShardReader, first_non_finite_row
from jmvae_dist.data.sample_names import key_in_unsound_shard
from jmvae_dist.data.shard_bytes import DamagedCopyError, MappedShard, RangedShard, ShardBytes
from jmvae_dist.data.store import Explain, RemoteAccess, ShardStore, Verify
from jmvae_dist.data.views import SampleKeys, View
from jmvae_dist.errors import DataError, UnreachableError

DEFAULT_MAX_OPEN = 128
# Members of a batch are decoded as soon as so many bytes of them are in memory.
_MOST_UNDECODED_BYTES = 256 * 2**20
# How often an idle process looks whether another one waits for room in the cache.
_LOOK_EVERY_S = 0.5


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
        key = key_in_unsound_shard(self._manifest, shard_number, index, modality)
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


def most_open_shards(files_per_shard: int = 1) -> int:
    """How many shards a process may reasonably keep open: half its limit of open files is for them."""
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**16 if soft_limit == resource.RLIM_INFINITY else max(8, soft_limit // 2 // files_per_shard)


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

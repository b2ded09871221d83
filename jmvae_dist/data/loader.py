"""Batches of a rank as torch tensors, with any number of worker processes.

A training batch is a pure function of the global step (`SamplePlan.batch`), so worker processes simply take
whole steps in turn: which worker made a batch cannot change it, and any number of workers will do.

Shape suffix: B samples of this rank's batch.
"""

from __future__ import annotations

import atexit
import copy
import itertools
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.plan import SamplePlan
from jmvae_dist.data.prefetch import Prefetcher
from jmvae_dist.data.sample_names import describe_sample
from jmvae_dist.data.shard_set import ShardSet, check_views, most_open_shards
from jmvae_dist.data.store import RemoteAccess, Verify, check_verify, shard_files
from jmvae_dist.data.views import SampleKeys, View, make_views
from jmvae_dist.errors import ConfigError, DataError

OnBadSample = Literal["stop", "mask"]

PREFETCH_BATCHES_PER_WORKER = 2
_MOST_DECODE_THREADS = 8
# Workers get this long to end what they are doing.
_WORKERS_STOP_S = 2.0
# A rank's share of a step is often so small that what is done once per shard and call takes as long as what is done
# per sample. Steps are read together up to so many samples, and so many bytes of what the model sees of them.
_SAMPLES_AT_ONCE = 1024
_BYTES_AT_ONCE = 2**23
_SCHEDULER_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Batch:
    """One rank's share of a global batch.

    Attributes:
        inputs: modality name to finite float32 (B, *shape).
        rows: int64 (B,): rows of the global batch (training) or positions in the data set (evaluation).
        global_step: the training step, or the number of the batch on this rank (evaluation).
        problems: of the samples that are masked, one message each. Their rows are left out of `inputs` and `rows`,
            which is what a weight of zero comes to; the others keep their place, and what is keyed by it.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    global_step: int
    problems: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory (torch's DataLoader calls this)."""
        inputs = {name: values.pin_memory() for name, values in self.inputs.items()}
        return Batch(inputs, self.rows.pin_memory(), self.global_step, self.problems)

    def without(self, problems: dict[int, str]) -> Batch:
        """The batch without the samples at the given positions of it, with what is wrong with them."""
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[list(problems)] = False
        inputs = {name: values[kept] for name, values in self.inputs.items()}
        return Batch(inputs, self.rows[kept], self.global_step, (*self.problems, *problems.values()))


def check_batch(
    batch: Batch,
    check: Callable[[dict[str, Tensor]], None],
    manifest: Manifest,
    locate: Callable[[int], tuple[int, int]],
    on_bad_sample: OnBadSample,
) -> Batch:
    """The batch, of which every sample passes a check; the others are masked if they may be.

    Args:
        batch: from a loader.
        check: raises DataError for inputs, of all samples or of one and of all modalities or of one.
        manifest: the data set.
        locate: shard number and number in the shard, by entry of `batch.rows`.
        on_bad_sample: `stop` raises.

    Raises:
        DataError: names shard, key, modality and cause.
    """
    try:
        check(batch.inputs)
    except DataError:
        problems = _find_problems(batch, check, manifest, locate)
        assert problems, "no sample of the batch fails the check that the batch failed"
        if on_bad_sample == "stop":
            raise DataError(next(iter(problems.values()))) from None
        return batch.without(problems)
    return batch


def _find_problems(
    batch: Batch,
    check: Callable[[dict[str, Tensor]], None],
    manifest: Manifest,
    locate: Callable[[int], tuple[int, int]],
) -> dict[int, str]:
    """What is wrong with which samples of a batch, by their place in it, with the place in the shards."""
    problems = {}
    for place, row in enumerate(batch.rows.tolist()):
        for name, values in batch.inputs.items():
            try:
                check({name: values[place : place + 1]})
            except DataError as error:
                problems[place] = f"{describe_sample(manifest, *locate(row), name)}: {error}"
                break
    return problems


class TrainLoader:
    """The training batches of one rank.

    Args:
        manifest: the data set.
        plan: the order; made from the same manifest.
        rank, world_size: this rank's place.
        views: what the model sees of which modalities, in this order (None: of all, as they are).
        workers: worker processes; 0 reads in this process.
        threads: threads that decode images, in each process that reads.
        verify: when the bytes of shards are checked; see `ShardStore`.
        on_bad_sample: `stop` raises; `mask` leaves the sample out of its batch and says so in `Batch.problems`.
        pin_memory: copy batches to page-locked memory (only useful with a GPU).
        access: how remote shards are read.

    Raises:
        ConfigError: a setting is out of range, or there are more ranks than lanes.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: SamplePlan,
        *,
        rank: int,
        world_size: int,
        views: Sequence[View] | None = None,
        workers: int = 0,
        threads: int = 1,
        verify: Verify = "first_use",
        on_bad_sample: OnBadSample = "stop",
        pin_memory: bool = False,
        access: RemoteAccess | None = None,
    ) -> None:
        assert plan.shard_sizes == manifest.shard_sizes, "the plan was made for another manifest"
        _check_loader_settings(workers, verify)
        lanes = plan.lanes_of_rank(rank, world_size)
        self._workers = workers
        self._pin_memory = pin_memory
        self._manifest = manifest
        self._plan = plan
        self._lanes = lanes
        self._access = access or RemoteAccess()
        most_open = most_open_shards(self._access.files_per_shard(manifest))
        max_open = max(2, min(count_shards_in_use(plan, len(lanes)), most_open))
        shards = ShardSet(manifest, verify, max_open, threads, self._access)
        views = make_views(manifest.modalities) if views is None else views
        check_views(views, manifest)
        # A worker takes only some of the steps, and remote shards are brought step by step.
        reads_ahead = workers == 0 and not manifest.has_remote_shards and all(view.is_array for view in views)
        self._dataset = _TrainSteps(plan, lanes, views, shards, on_bad_sample, reads_ahead)

    def iterate(self, start_step: int, stop_step: int) -> Generator[Batch, None, None]:
        """The batches of steps start_step .. stop_step - 1, in order.

        Closing the iterator, or abandoning it, ends its worker processes, whatever they are waiting for.

        Raises:
            DataError: a sample cannot be read, or a worker process died.
        """
        assert 0 <= start_step <= stop_step
        prefetcher = None
        if self._manifest.has_remote_shards and start_step < stop_step:
            # A copy, because a plan remembers what it computed last, and threads will ask this one.
            upcoming = copy.deepcopy(self._plan).upcoming_shards(start_step, self._lanes)
            needed = itertools.takewhile(lambda item: item[0] < stop_step, upcoming)
            prefetcher = _make_prefetcher(self._manifest, self._access, start_step, needed, len(self._lanes))
        self._dataset.stop_step = stop_step
        return _iterate(self._dataset, range(start_step, stop_step), self._workers, self._pin_memory, prefetcher)

    def cancel(self) -> None:
        """Make an iterator that waits for a server, in another thread of this process, end with TransferCancelled.

        It ends with the next piece that the server sends, or when the server has been silent for too long. Worker
        processes do not hear of this; closing the iterator ends them. The loader cannot be used afterwards.
        """
        self._dataset.cancel()


class EvaluationLoader:
    """Every sample of a data set exactly once over all ranks, in stored order, without padding.

    A rank reads one contiguous block of the data set; with fewer samples than ranks some ranks get no batch,
    so collective operations belong after the loop, not inside. Arguments as for `TrainLoader`; `batch_size`
    is per rank, and the last batch may be smaller.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        rank: int,
        world_size: int,
        batch_size: int,
        views: Sequence[View] | None = None,
        workers: int = 0,
        threads: int = 1,
        verify: Verify = "first_use",
        on_bad_sample: OnBadSample = "stop",
        pin_memory: bool = False,
        access: RemoteAccess | None = None,
    ) -> None:
        _check_loader_settings(workers, verify)
        if batch_size < 1:
            raise ConfigError(f"evaluation batch size must be at least 1, not {batch_size}")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of world size {world_size} does not exist")
        self._manifest = manifest
        self._access = access or RemoteAccess()
        self._workers = workers
        self._pin_memory = pin_memory
        block = range(rank * manifest.num_samples // world_size, (rank + 1) * manifest.num_samples // world_size)
        views = make_views(manifest.modalities) if views is None else views
        check_views(views, manifest)
        shards = ShardSet(manifest, verify, 2, threads, self._access)
        self._dataset = _EvaluationBatches(manifest, block, batch_size, views, shards, on_bad_sample)

    def __len__(self) -> int:
        """Number of batches of this rank."""
        return len(self._dataset)

    def locate(self, position: int) -> tuple[int, int]:
        """Shard number and number in the shard of a position in the data set."""
        shard_B, index_B = self._dataset.locate(np.array([position]))
        return int(shard_B[0]), int(index_B[0])

    def __iter__(self) -> Iterator[Batch]:
        """The rank's batches; raises and closes like `TrainLoader.iterate`."""
        prefetcher = None
        if self._manifest.has_remote_shards:
            prefetcher = _make_prefetcher(self._manifest, self._access, 0, self._dataset.upcoming_shards(), 1)
        return _iterate(self._dataset, range(len(self._dataset)), self._workers, self._pin_memory, prefetcher)


@dataclass
class _Failure:
    """A DataError on its way from a worker: DataLoader would bury the message in a traceback."""

    message: str


class _Batches(Dataset[Batch | _Failure]):
    """Map-style data set whose items are whole batches."""

    def __init__(self, views: Sequence[View], shards: ShardSet, on_bad_sample: OnBadSample) -> None:
        self._views = views
        self._shards = shards
        self._masks = on_bad_sample == "mask"

    def __getitem__(self, number: int) -> Batch | _Failure:
        try:
            return self._load(number)
        except DataError as error:
            return _Failure(str(error))

    def _load(self, number: int) -> Batch:
        raise NotImplementedError

    def _gather(
        self, shard_B: np.ndarray, index_B: np.ndarray, keys: SampleKeys
    ) -> tuple[dict[str, np.ndarray], dict[int, str]]:
        """What the model sees of samples that are not masked, and what is wrong with the others, in their order."""
        if self._masks:
            return self._shards.gather_valid(shard_B, index_B, self._views, keys)
        return self._shards.gather(shard_B, index_B, self._views, keys), {}

    def cancel(self) -> None:
        self._shards.cancel()

    def close(self) -> None:
        self._shards.close()


class _TrainSteps(_Batches):
    """A rank's shares of steps; small ones are read several at a time.

    Attributes:
        stop_step: nothing is read for this step or later ones.
    """

    stop_step = 0

    def __init__(
        self,
        plan: SamplePlan,
        lanes: range,
        views: Sequence[View],
        shards: ShardSet,
        on_bad_sample: OnBadSample,
        reads_ahead: bool,
    ) -> None:
        super().__init__(views, shards, on_bad_sample)
        self._plan = plan
        self._lanes = lanes
        self._rows_B = np.arange(
            lanes.start * plan.samples_per_lane, lanes.stop * plan.samples_per_lane, dtype=np.int64
        )
        bytes_per_sample = 4 * sum(math.prod(view.shape) for view in views)
        self._steps_at_once = steps_at_once(len(self._rows_B), bytes_per_sample) if reads_ahead else 1
        self._read_ahead: dict[int, Batch] = {}
        self._one_by_one_until = 0

    def _load(self, number: int) -> Batch:
        if number not in self._read_ahead:
            self._read_ahead = self._read(self._steps_from(number))
        return self._read_ahead.pop(number)

    def _steps_from(self, number: int) -> range:
        """What to read at once, from a step on."""
        is_alone = number < self._one_by_one_until
        return range(number, number + 1 if is_alone else min(number + self._steps_at_once, self.stop_step))

    def _read(self, steps: range) -> dict[int, Batch]:
        """The batches of some steps; of the first one alone, if a sample of any of them cannot be read.

        Raises:
            DataError: A sample of the first step cannot be read, and may not be masked.
        """
        places = [self._plan.batch(step, self._lanes) for step in steps]
        shards, indices = (np.concatenate(column) for column in zip(*places, strict=True))
        keys = SampleKeys(np.concatenate([step * self._plan.global_batch_size + self._rows_B for step in steps]))
        try:
            values, problems = self._gather(shards, indices, keys)
        except DataError:
            if len(steps) == 1:
                raise
            # What is wrong with a sample is the matter of its own step; the others are not tried together again.
            self._one_by_one_until = steps.stop
            return self._read(steps[:1])
        is_kept = np.ones((len(steps), len(self._rows_B)), bool)
        is_kept.reshape(-1)[list(problems)] = False
        counts = is_kept.sum(axis=1).tolist()
        inputs = {name: torch.from_numpy(values_B).split(counts) for name, values_B in values.items()}
        messages = iter(problems.values())
        return {
            step: Batch(
                {name: parts[at] for name, parts in inputs.items()},
                torch.from_numpy(self._rows_B[is_kept[at]]),
                step,
                tuple(itertools.islice(messages, len(self._rows_B) - counts[at])),
            )
            for at, step in enumerate(steps)
        }

    def close(self) -> None:
        self._read_ahead, self._one_by_one_until = {}, 0
        super().close()


def steps_at_once(rows_per_step: int, bytes_per_sample: int) -> int:
    """How many steps a rank reads together, where that is cheap; bytes are those of what the model sees."""
    most_samples = min(_SAMPLES_AT_ONCE, _BYTES_AT_ONCE // max(1, bytes_per_sample))
    return max(1, most_samples // rows_per_step)


class _EvaluationBatches(_Batches):
    def __init__(
        self,
        manifest: Manifest,
        block: range,
        batch_size: int,
        views: Sequence[View],
        shards: ShardSet,
        on_bad_sample: OnBadSample,
    ) -> None:
        super().__init__(views, shards, on_bad_sample)
        self._block = block
        self._batch_size = batch_size
        self._sizes = np.array(manifest.shard_sizes, dtype=np.int64)
        self._shard_starts = np.cumsum(self._sizes) - self._sizes

    def __len__(self) -> int:
        return -(-len(self._block) // self._batch_size)

    def locate(self, position_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard numbers and numbers in the shards of positions in the data set."""
        shard_B = np.searchsorted(self._shard_starts, position_B, side="right") - 1
        return shard_B, position_B - self._shard_starts[shard_B]

    def upcoming_shards(self) -> Iterator[tuple[int, int]]:
        """(First batch that needs it, shard number) in order."""
        for shard_number in range(len(self._shard_starts)):
            first = max(self._block.start, int(self._shard_starts[shard_number]))
            stop = min(self._block.stop, int(self._shard_starts[shard_number]) + int(self._sizes[shard_number]))
            if first < stop:
                yield (first - self._block.start) // self._batch_size, shard_number

    def _load(self, number: int) -> Batch:
        part = self._block[number * self._batch_size : (number + 1) * self._batch_size]
        position_B = np.arange(part.start, part.stop, dtype=np.int64)
        shard_B, index_B = self.locate(position_B)
        values, problems = self._gather(shard_B, index_B, SampleKeys(position_B, is_training=False))
        inputs = {name: torch.from_numpy(values_B) for name, values_B in values.items()}
        rows = torch.from_numpy(np.delete(position_B, list(problems)))
        return Batch(inputs, rows, number, tuple(problems.values()))


def decode_threads(setting: int | None, workers: int) -> int:
    """`data.decode_threads`, or its default."""
    if setting is not None:
        return setting
    return 1 if workers > 0 else min(_MOST_DECODE_THREADS, len(os.sched_getaffinity(0)))


def _make_prefetcher(
    manifest: Manifest, access: RemoteAccess, first_step: int, upcoming: Iterator[tuple[int, int]], num_lanes: int
) -> Prefetcher | None:
    """What downloads `upcoming`, (first step that needs it, shard number), ahead of use; None without a cache."""
    cache = access.open_cache()
    if cache is None or access.cache.prefetch_shards == 0:
        return None
    return Prefetcher(
        ((step, shard_number, shard_files(manifest, shard_number)) for step, shard_number in upcoming),
        cache,
        first_step=first_step,
        shards_ahead=access.cache.prefetch_shards * num_lanes,
        connections=access.remote.connections,
    )


def _iterate(
    dataset: _Batches, numbers: range, workers: int, pin_memory: bool, prefetcher: Prefetcher | None = None
) -> Generator[Batch, None, None]:
    if not numbers:
        return
    with _signals_left_to_the_rank(), _child_signal_kept():
        batches = _start(dataset, numbers, workers, pin_memory)
    # Something may still refer to the iterator at exit, such as a traceback: multiprocessing then sends SIGTERM, and
    # waits for ever, as workers never see it.
    kill_at_exit = partial(_kill, _workers_of(batches), os.getpid())
    atexit.register(kill_at_exit)
    try:
        # After the workers have been forked: they would inherit its locks in whatever state they are.
        if prefetcher is not None:
            prefetcher.start()
        for number in numbers:
            if prefetcher is not None:
                prefetcher.advance(number)
            batch = _next_batch(batches, workers)
            if isinstance(batch, _Failure):
                raise DataError(batch.message)
            yield batch
    finally:
        if prefetcher is not None:
            prefetcher.stop()
        _shut_down(batches)
        atexit.unregister(kill_at_exit)
        dataset.close()


def _start(dataset: _Batches, numbers: range, workers: int, pin_memory: bool) -> Iterator[Batch | _Failure]:
    if workers == 0 and not pin_memory:
        return map(dataset.__getitem__, numbers)  # DataLoader would do the same, with some work around each batch
    loader: DataLoader[Batch | _Failure] = DataLoader(
        dataset,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCH_BATCHES_PER_WORKER if workers else None,
        # It would draw from torch's global generator, whose numbers would then depend on how data are read.
        generator=torch.Generator(),
    )
    return iter(loader)


def _next_batch(batches: Iterator[Batch | _Failure], workers: int) -> Batch | _Failure:
    try:
        return next(batches)
    except (RuntimeError, OSError, EOFError) as error:
        # A worker's death shows as a message of torch, or as a broken connection to it, whichever comes first.
        if workers == 0 or _was_raised_in_worker(error):
            raise
        if isinstance(error, RuntimeError) and not _tells_of_a_dead_worker(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"a data worker process died ({reason}); it may have run out of memory or of space in /dev/shm: "
            "lower data.workers (0 reads in the training process), or leave /dev/shm to them with "
            "training.gradient_reduction: process_group"
        ) from error


def _shut_down(batches: Iterator[Batch | _Failure]) -> None:
    """End the worker processes now: a traceback that refers to the iterator would otherwise keep them alive.

    A worker that waits for a silent server does not hear of it, and torch's SIGTERM is one of the signals that
    workers never see: this process would wait for it as long as it waits for the server. It has nothing to lose.
    """
    shut_down_workers = getattr(batches, "_shutdown_workers", None)
    if shut_down_workers is None or sys.is_finalizing():  # then they are killed, and no thread can be started
        return
    killer = threading.Timer(_WORKERS_STOP_S, _kill, [_workers_of(batches), os.getpid()])
    killer.daemon = True
    killer.start()
    try:
        shut_down_workers()
    finally:
        killer.cancel()


def _workers_of(batches: Iterator[Batch | _Failure]) -> list[Any]:
    return getattr(batches, "_workers", [])


def _kill(workers: Sequence[Any], pid: int) -> None:
    """End worker processes of the process `pid`; one that was forked from it also has them, and leaves them alone."""
    if os.getpid() == pid:
        for worker in workers:
            worker.kill()


def _tells_of_a_dead_worker(error: RuntimeError) -> bool:
    return str(error).startswith("DataLoader worker")


def _was_raised_in_worker(error: Exception) -> bool:
    """Whether code in a worker, such as a user's transform, raised it: torch sends such errors on in these words."""
    return str(error).startswith("Caught ")


def _unchanged(batch: Any) -> Any:
    return batch


@contextmanager
def _signals_left_to_the_rank() -> Iterator[None]:
    """Worker processes started inside never see the signals that a scheduler sends to every process of a job.

    The rank decides when to stop and writes a checkpoint first; a worker that died of the same signal would turn
    that into a crash. Blocked signals are inherited by new processes, so there is no unprotected moment while a
    worker starts; this process receives what arrived meanwhile when the block ends. Workers end when the rank
    tells them to, or dies.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SCHEDULER_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _child_signal_kept() -> Iterator[None]:
    """Take back the SIGCHLD handler that torch installs with the first workers.

    It raises as soon as a worker dies, wherever this process happens to be: in the middle of an optimizer step or
    of a checkpoint. Without it the same is found where the next batch is asked for, within seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def count_shards_in_use(plan: SamplePlan, num_lanes: int) -> int:
    """How many shards to have open, so that no lane's window makes shards be opened again and again."""
    mean_shard_size = plan.num_samples / len(plan.shard_sizes)
    shards_per_lane = 2 + int(plan.shuffle_window / mean_shard_size)
    return min(len(plan.shard_sizes), num_lanes * shards_per_lane)


def _check_loader_settings(workers: int, verify: str) -> None:
    if workers < 0:
        raise ConfigError(f"data.workers must be at least 0, not {workers}")
    check_verify(verify)

"""Runs a function over items in several processes, with results as they finish."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jmvae_dist.errors import DataError

Context = TypeVar("Context")
Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[int], None]
"""Takes how many units of work of its item are finished by now."""

# Below both, starting processes takes longer than the work.
_PARALLEL_FROM_SAMPLES = 20_000
_PARALLEL_FROM_BYTES = 256 * 2**20
_MAPPED_FROM_BYTES = 2**16
_PROGRESS_INTERVAL_S = 0.5

# What this worker process works with; set once per process instead of being sent with every item.
_worker_context: Any = None
_worker_progress: Any = None


def default_workers(num_samples: int, num_bytes: int) -> int:
    """The CPUs that this process may use (a Slurm job has fewer than the machine); one for little work."""
    is_little = num_samples < _PARALLEL_FROM_SAMPLES and num_bytes < _PARALLEL_FROM_BYTES
    return 1 if is_little else len(os.sched_getaffinity(0))


def run_in_processes(
    function: Callable[[Context, Item, Report], Result],
    context: Context,
    items: Sequence[Item],
    workers: int,
    *,
    folder: Path,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, Result]]:
    """Yield (position of the item, function(context, item, report)) as results come in.

    With one worker everything runs in this process. `function` must be importable, `context` and items
    picklable. The processes are started afresh ("spawn"), so threads and locks of this process cannot harm
    them, and they end when this process does, even if it is killed. Being started afresh, they import the main
    script: it must not start work outside `if __name__ == "__main__":`.

    Args:
        folder: an existing folder, to which large arrays inside `context` are written, each as one `.npy` file
            that all workers map into memory. The caller removes it.
        advance: called in this process with the number of units of work that finished since the last call.

    Raises:
        DataError: a process died. Errors of `function` are raised as they are.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        for position, item in enumerate(items):
            yield position, function(context, item, _differences(advance))
        return
    spawn = multiprocessing.get_context("spawn")
    # Shared memory, because what a new process gets through its pipe must fit in the pipe's buffer: the parent
    # would wait for ever for a process that died before reading the rest.
    content = _pickle_with_arrays_in(folder, context)
    pickled = spawn.RawArray("B", len(content))
    memoryview(pickled).cast("B")[:] = content
    done = spawn.RawArray("q", len(items))
    report_total = _differences(advance)
    executor = ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(pickled, folder, done))
    try:
        pending = {executor.submit(_call, function, position, item): position for position, item in enumerate(items)}
        while pending:
            finished, _ = wait(pending, timeout=_PROGRESS_INTERVAL_S, return_when=FIRST_COMPLETED)
            report_total(sum(done))
            for future in finished:
                yield pending.pop(future), future.result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process died: perhaps memory ran out (use a smaller --workers), or a script calls this "
            'without `if __name__ == "__main__":`'
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _differences(advance: Callable[[int], None]) -> Report:
    """Turns a running total into calls of `advance` with what was added."""
    reported = 0

    def report(total: int) -> None:
        nonlocal reported
        advance(total - reported)
        reported = total

    return report


class _Pickler(pickle.Pickler):
    """Leaves large arrays out of the pickle: each becomes an .npy file in a folder."""

    def __init__(self, file: io.BytesIO, folder: Path) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._folder = folder
        self._names: dict[int, str] = {}

    def persistent_id(self, value: Any) -> str | None:
        if not isinstance(value, np.ndarray) or value.nbytes < _MAPPED_FROM_BYTES or value.dtype.hasobject:
            return None
        name = self._names.get(id(value))
        if name is None:
            name = self._names[id(value)] = f"array-{len(self._names)}.npy"
            np.save(self._folder / name, value, allow_pickle=False)
        return name


class _Unpickler(pickle.Unpickler):
    """Maps the arrays that `_Pickler` left out; their pages are shared by all processes."""

    def __init__(self, file: io.BytesIO, folder: Path) -> None:
        super().__init__(file)
        self._folder = folder

    def persistent_load(self, name: str) -> np.ndarray:
        # As a plain array: indexing a numpy.memmap is several times slower.
        return np.asarray(np.load(self._folder / name, mmap_mode="r", allow_pickle=False))


def _pickle_with_arrays_in(folder: Path, context: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, folder).dump(context)
    return file.getvalue()


def _start_worker(pickled: Any, folder: Path, progress: Any) -> None:
    global _worker_context, _worker_progress
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_context = _Unpickler(io.BytesIO(bytes(pickled)), folder).load()
    _worker_progress = progress


def _end_with_parent() -> None:
    """Without this, workers of a killed parent would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_any([parent.sentinel])
    os._exit(1)


def _call(function: Callable[[Any, Item, Report], Result], position: int, item: Item) -> Result:
    # One slot per item, written by one process: no lock that a dying process could keep.
    def report(total: int) -> None:
        _worker_progress[position] = total

    return function(_worker_context, item, report)

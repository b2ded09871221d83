"""Runs a function over items in several processes, with results as they finish."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_any
from typing import Any, TypeVar

from jmvae_dist.errors import DataError

Context = TypeVar("Context")
Item = TypeVar("Item")
Result = TypeVar("Result")

_PARALLEL_FROM_SAMPLES = 20_000  # below, starting processes takes longer than the work

# The context of this worker process; set once per process instead of being sent with every item.
_worker_context: Any = None


def default_workers(num_samples: int) -> int:
    """The CPUs that this process may use (a Slurm job has fewer than the machine); one for little work."""
    return len(os.sched_getaffinity(0)) if num_samples >= _PARALLEL_FROM_SAMPLES else 1


def run_in_processes(
    function: Callable[[Context, Item], Result], context: Context, items: Sequence[Item], workers: int
) -> Iterator[tuple[int, Result]]:
    """Yield (position of the item, function(context, item)) as results come in.

    With one worker everything runs in this process. `function` must be importable, `context` and items
    picklable. The processes are started afresh ("spawn"), so threads and locks of this process cannot harm
    them, and they end when this process does, even if it is killed.

    Raises:
        DataError: a process was killed from outside. Errors of `function` are raised as they are.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        for position, item in enumerate(items):
            yield position, function(context, item)
        return
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(context,)
    )
    try:
        pending = {executor.submit(_call, function, item): position for position, item in enumerate(items)}
        while pending:
            finished, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                yield pending.pop(future), future.result()
    except BrokenProcessPool:
        raise DataError("a worker process was killed, perhaps for lack of memory; use a smaller --workers") from None
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker(context: Any) -> None:
    global _worker_context
    _worker_context = context
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, workers of a killed parent would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_any([parent.sentinel])
    os._exit(1)


def _call(function: Callable[[Any, Item], Result], item: Item) -> Result:
    return function(_worker_context, item)

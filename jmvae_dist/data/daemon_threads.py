"""Threads for work that may never end, such as a request to a server that says nothing."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

_Work = tuple[Future[None], Callable[[], None]]


class DaemonThreads:
    """Threads that take calls in the order in which they are given.

    Unlike those of concurrent.futures they keep no process from ending, whatever they are waiting for, and `stop`
    does not wait for them.

    Args:
        number: How many.
        name: The beginning of their names.
    """

    def __init__(self, number: int, name: str) -> None:
        self._calls: SimpleQueue[_Work | None] = SimpleQueue()
        for thread in range(number):
            threading.Thread(target=_work, args=(self._calls,), name=f"{name}-{thread}", daemon=True).start()
        # The threads know only the queue: they also end if nobody calls `stop`.
        self._end = weakref.finalize(self, _end, self._calls, number)

    def submit(self, call: Callable[[], None]) -> Future[None]:
        """What becomes of a call, which can be cancelled until a thread takes it."""
        future: Future[None] = Future()
        self._calls.put((future, call))
        return future

    def stop(self) -> None:
        """Let each thread end once it has done what it is doing; calls that are still waiting must be cancelled."""
        self._end()


def _end(calls: SimpleQueue[_Work | None], number: int) -> None:
    for _ in range(number):
        calls.put(None)


def _work(calls: SimpleQueue[_Work | None]) -> None:
    while (work := calls.get()) is not None:
        _run(*work)
        del work  # an idle thread would keep what it refers to


def _run(future: Future[None], call: Callable[[], None]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        call()
    except BaseException as error:  # whatever it is, whoever waits for the result has to hear of it
        future.set_exception(error)
    else:
        future.set_result(None)

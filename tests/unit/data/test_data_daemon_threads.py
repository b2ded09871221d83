"""Threads for work that may never end: calls in order, errors where they are waited for, and ends without waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import wait

import pytest

from jmvae_dist.data.daemon_threads import DaemonThreads

DEADLINE_S = 60.0


def named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def test_calls_are_taken_in_order_and_their_errors_arrive() -> None:
    threads, taken = DaemonThreads(1, "order"), []

    def call(number: int) -> Callable[[], None]:
        def take() -> None:
            taken.append(number)
            if number == 2:
                raise ZeroDivisionError("in a request")

        return take

    futures = [threads.submit(call(number)) for number in range(4)]
    wait(futures, timeout=DEADLINE_S)
    assert taken == [0, 1, 2, 3]
    with pytest.raises(ZeroDivisionError, match="in a request"):
        futures[2].result()
    assert futures[3].result() is None
    threads.stop()


def test_what_hangs_is_not_waited_for_and_what_waits_can_be_cancelled() -> None:
    threads, begun, answer, taken = DaemonThreads(1, "hang"), threading.Event(), threading.Event(), []
    hanging = threads.submit(lambda: (begun.set(), answer.wait(), None)[2])
    waiting = threads.submit(lambda: taken.append(1))
    assert begun.wait(DEADLINE_S)
    assert waiting.cancel()
    assert not hanging.cancel()
    threads.stop()
    (thread,) = named("hang")
    assert thread.daemon
    assert not hanging.done()
    answer.set()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert hanging.done()
    assert taken == []


def test_threads_end_when_nobody_has_them_any_more() -> None:
    threads = DaemonThreads(3, "forgotten")
    found = named("forgotten")
    assert len(found) == 3
    del threads
    for thread in found:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()

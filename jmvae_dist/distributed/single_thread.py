"""Threads whose operations use no further threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


def settle_number_of_threads() -> None:
    """Have MKL use as many threads as torch does from now on, whatever else the machine does.

    By itself it may take fewer. `torch.set_num_threads` switches that off for the whole process: a thread that limits
    its own number would otherwise change how the products of all others are cut, and with that their last bits.
    """
    torch.set_num_threads(torch.get_num_threads())


def start_single_thread(target: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread in whose operations no other thread takes part.

    Every thread that computes in parallel has a team of OpenMP threads of its own. With two teams there soon are more
    threads than cores, upon which GNU's OpenMP has all of them sleep between operations instead of spinning: beside a
    second team, however idle, steps of a small model on two threads took as long as on one.
    """
    is_limited = threading.Event()

    def work() -> None:
        torch.get_num_threads()  # at the first call in a thread, torch sets its number to the default
        torch.set_num_threads(1)
        is_limited.set()
        target()

    threads = torch.get_num_threads()
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    is_limited.wait()
    torch.set_num_threads(threads)  # again the default of all threads to come
    return thread

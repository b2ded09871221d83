"""Faults of every kind that fuzzing must notice, planted to see that it does."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.mutations import PICKLE, Random

BAD_CASE = 3


class RefusedError(ValueError):
    """What a target may raise."""


REFUSALS = (RefusedError,)


class _Planted:
    """Correct and refused in turn, but for one case."""

    def __init__(self, act: Callable[[Path], None]) -> None:
        self._act = act

    def run(self, rng: Random, folder: Path, number: int) -> None:
        if number == BAD_CASE:
            self._act(folder)
        elif number % 2:
            raise RefusedError("refused")

    def close(self) -> None:
        pass


def _raise(error: Exception) -> None:
    raise error


def _loop(folder: Path) -> None:
    while True:
        pass


def _loop_without_signals(folder: Path) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    _loop(folder)


def _in_a_thread(folder: Path) -> None:
    def run() -> None:
        with contextlib.suppress(BaseException):  # swallowed, and noticed all the same
            (folder.parent / "elsewhere").write_bytes(b"")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


_ACTS: dict[str, Callable[[Path], None]] = {
    "exception": lambda folder: _raise(KeyError("surprise")),
    "endless": _loop,
    "stuck": _loop_without_signals,
    "memory": lambda folder: bytes(2**31) and None,
    "outside": lambda folder: (folder.parent / "elsewhere").write_bytes(b"") and None,
    "renamed": lambda folder: os.rename(folder, folder.parent / "elsewhere"),
    "thread": _in_a_thread,
    "program": lambda folder: os.system("true") and None,
    "code": lambda folder: exec("1 + 1"),
    "pickle": lambda folder: pickle.loads(PICKLE),
    "canary": lambda folder: (folder / "canary").write_bytes(b"") and None,
    "escape": lambda folder: _raise(RefusedError("\x1b[2J")),
    "flood": lambda folder: _raise(RefusedError("x" * 10**6)),
    "crash": lambda folder: os.kill(os.getpid(), signal.SIGSEGV),
}
TARGETS: dict[str, Callable[[], _Planted]] = {name: lambda act=act: _Planted(act) for name, act in _ACTS.items()}

"""Progress of long commands: a bar on a terminal, plain lines elsewhere, nothing at all for short work.

All of it goes to standard error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SILENT_S = 2.0
_LINE_INTERVAL_S = 10.0
_BAR_INTERVAL_S = 0.1
_RATE_WINDOW_S = 60.0


class _Progress:
    """Counts finished units of work and shows them once the work has taken two seconds."""

    def __init__(self, total: int, label: str) -> None:
        self._total, self._label = total, label
        self._done = 0
        self._start_s = time.monotonic()
        self._next_s = _SILENT_S
        self._bar: Any = None
        self._task: Any = None

    def advance(self, count: int) -> None:
        self._done += count
        elapsed_s = self._elapsed_s()
        if elapsed_s < self._next_s:
            return
        if sys.stderr.isatty():
            self._next_s = elapsed_s + _BAR_INTERVAL_S
            self._update_bar()
        else:
            self._next_s = elapsed_s + _LINE_INTERVAL_S
            self._print(f"{self._done:,} of {self._total:,}")

    def close(self) -> None:
        """Remove the bar; one line says how much was done, also when the work failed half-way."""
        if self._bar is not None:
            self._bar.stop()
        if self._elapsed_s() >= _SILENT_S:
            self._print(f"{self._done:,}" if self._done == self._total else f"{self._done:,} of {self._total:,}")

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._start_s

    def _update_bar(self) -> None:
        if self._bar is None:
            self._bar = make_bar(transient=True)
            self._task = self._bar.add_task(self._label, total=self._total)
            self._bar.start()
        self._bar.update(self._task, completed=self._done)

    def _print(self, amount: str) -> None:
        print(f"{self._label}: {amount} in {format_duration(self._elapsed_s())}", file=sys.stderr, flush=True)


@contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """Show the progress of a command; yields `advance(count)`, which is cheap enough for every sample.

    Nothing is shown in the first two seconds. After that a terminal shows a bar; elsewhere a line appears at most
    every ten seconds. Work that took longer than two seconds ends with one line.
    """
    shown = _Progress(total, label)
    try:
        yield shown.advance
    finally:
        shown.close()


def make_bar(values: str = "", transient: bool = False) -> Any:
    """A `rich.progress.Progress` on standard error; `values` is the format of a column of its own."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
    if values:
        columns.append(TextColumn(values, markup=False))
    columns.append(TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=transient, speed_estimate_period=_RATE_WINDOW_S)


def format_duration(duration_s: float) -> str:
    """A duration in the units that a person needs: 0.4 s, 42 s, 3 min 05 s, 2 h 07 min, 3 d 04 h."""
    if duration_s < 10:
        return f"{duration_s:.1f} s"
    seconds = round(duration_s)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    minutes = round(duration_s / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(duration_s / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def format_bytes(size_bytes: float) -> str:
    """A size in the unit that a person needs: 40 B, 1.5 KiB, 2.0 TiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"

"""Progress of long data commands: a bar on a terminal, plain lines elsewhere, nothing for short work."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SILENT_S = 2.0
_LINE_EVERY_S = 10.0


class Progress:
    """Counts finished units of work and shows them on stderr once the work has taken two seconds."""

    def __init__(self, action: str, total: int, unit: str) -> None:
        self._action, self._total, self._unit = action, total, unit
        self._done = 0
        self._started_s = time.monotonic()
        self._next_line_s = _SILENT_S
        self._bar: Any = None
        self._task: Any = None

    def advance(self, count: int) -> None:
        """`count` more units are finished."""
        self._done += count
        self._show()

    def _show(self) -> None:
        elapsed_s = time.monotonic() - self._started_s
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif elapsed_s >= self._next_line_s and sys.stderr.isatty():
            self._start_bar()
        elif elapsed_s >= self._next_line_s:
            self._next_line_s = elapsed_s + _LINE_EVERY_S
            print(
                f"{self._action}: {self._done:,} of {self._total:,} {self._unit} ({elapsed_s:.0f} s)",
                file=sys.stderr,
                flush=True,
            )

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn(self._action),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(self._unit),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(self._action, total=self._total, completed=self._done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress(action: str, total: int, unit: str) -> Iterator[Progress]:
    """A `Progress` that is closed at the end."""
    shown = Progress(action, total, unit)
    try:
        yield shown
    finally:
        shown.close()

"""What a person sees while something runs: one progress bar on a terminal, plain lines everywhere else.

All of it goes to standard error. Nothing here is a record: that is `metrics.jsonl`.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

from jmvae_dist.progress import format_duration, make_bar

_PLAIN_INTERVAL_S = 10.0
_RATE_WINDOW_S = 60.0
# Of an evaluation's line, which should fit on a screen.
_MAX_ACCURACIES = 4
# A target has it where there are several others.
_FROM_OTHERS = "/from_others"


class Console:
    """Progress of a training run.

    On a terminal: one bar with loss, samples/s and remaining time. Elsewhere (a batch job's log): one line for
    the first record, for the last one, and at most every ten seconds between them.

    Args:
        total_steps: Global steps of the whole run.
        start_step: Global step at which this process starts (not 0 after a resume).
        enabled_bar: Show the bar; None shows it when standard error is a terminal.
    """

    def __init__(self, total_steps: int, start_step: int, enabled_bar: bool | None = None) -> None:
        self.total_steps = total_steps
        self.enabled_bar = sys.stderr.isatty() if enabled_bar is None else enabled_bar
        self._step = start_step
        self._history: deque[tuple[float, int]] = deque([(time.monotonic(), start_step)])
        self._record: dict[str, Any] | None = None
        self._unprinted = False
        self._last_printed_s = -float("inf")
        self._bar: Any = None
        self._bar_task: Any = None

    def __enter__(self) -> Console:
        if self.enabled_bar:
            self._bar = make_bar("{task.fields[values]}")
            self._bar_task = self._bar.add_task("training", total=self.total_steps, completed=self._step, values="")
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._unprinted:
            self._print_line()

    def start_pace(self) -> None:
        """Count the pace of steps from now on: what has been prepared until here will not be repeated."""
        self._history = deque([(time.monotonic(), self._step)])

    def advance(self, global_step: int) -> None:
        """Note that `global_step` steps are done; cheap enough for every step."""
        self._step = global_step
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=global_step)

    def update(self, record: dict[str, Any]) -> None:
        """Show a record of `metrics.jsonl`; an evaluation record gets a line of its own."""
        self.advance(record["global_step"])
        if "loss/total" not in record:
            self.message(_format_evaluation(record))
            return
        now = time.monotonic()
        self._history.append((now, self._step))
        while len(self._history) > 2 and now - self._history[0][0] > _RATE_WINDOW_S:
            self._history.popleft()
        self._record = record
        if self._bar is not None:
            self._bar.update(self._bar_task, values=_format_values(record, short=True))
        else:
            self._unprinted = True
            if now - self._last_printed_s >= _PLAIN_INTERVAL_S:
                self._print_line()

    def message(self, text: str) -> None:
        """Print a line; a bar stays intact below it."""
        if self._bar is not None:
            # Not as markup: brackets in paths and error messages are text.
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def remaining_s(self) -> float | None:
        """Seconds until `total_steps` at the pace of the last minute; None before there is a pace."""
        (first_s, first_step), (last_s, last_step) = self._history[0], self._history[-1]
        if last_step <= first_step or last_s <= first_s:
            return None
        return (self.total_steps - self._step) * (last_s - first_s) / (last_step - first_step)

    def _print_line(self) -> None:
        assert self._record is not None
        width = len(str(self.total_steps))
        parts = [f"step {self._record['global_step']:>{width}}/{self.total_steps}"]
        parts.append(_format_values(self._record, short=False))
        remaining_s = self.remaining_s()
        if remaining_s is not None and self._step < self.total_steps:
            parts.append(f"{format_duration(remaining_s)} left")
        self.message("  ".join(parts))
        self._last_printed_s = time.monotonic()
        self._unprinted = False


def _format_values(record: dict[str, Any], short: bool) -> str:
    names = {"loss/total": "loss {:.4g}"}
    if not short:
        names |= {"elbo": "elbo {:.4g}", "loss/kl_prior": "kl {:.4g}"}
    names["speed/samples_per_s"] = "{:,.0f} samples/s"
    return "  ".join(text.format(record[name]) for name, text in names.items() if record.get(name) is not None)


def _format_evaluation(record: dict[str, Any]) -> str:
    """One line with the numbers that sum up an evaluation; the others are in the record."""
    accuracies = _select_accuracies(record)
    summing = [name for name in ("eval/elbo", "eval/joint_nll") if name in record]
    names = [*summing, *accuracies[:_MAX_ACCURACIES]]
    parts = [f"{name.removeprefix('eval/')} {record[name]:.4g}" for name in names]
    if len(accuracies) > _MAX_ACCURACIES:
        parts.append(f"({len(accuracies) - _MAX_ACCURACIES} more in metrics.jsonl)")
    return f"step {record['global_step']} evaluation  {'  '.join(parts)}"


def _select_accuracies(record: dict[str, Any]) -> list[str]:
    """Accuracy keys, one per target: given all other modalities; there are as many pairs as modalities squared."""
    names = [name for name in record if name.startswith("eval/accuracy/")]
    targets = {name.rpartition("/")[0] for name in names if name.endswith(_FROM_OTHERS)}
    return [name for name in names if name.endswith(_FROM_OTHERS) or name.rpartition("/")[0] not in targets]

"""What the files of a run say about it: read for its report, as far as they are there and sound.

All of it is untrusted. A source that is missing or damaged is left out with a note.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jmvae_dist.errors import DataError
from jmvae_dist.progress import format_bytes
from jmvae_dist.tracking.jsonl import iterate_records, newest_values
from jmvae_dist.tracking.ledger import RunSummary, read_attempts, summarize

if TYPE_CHECKING:
    from typing import TypeGuard

_MAX_TEXT_BYTES = 4 << 20
_MAX_FIGURE_BYTES = 8 << 20
_MAX_FIGURES_BYTES = 40 << 20
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass
class Series:
    """One metric over the global step."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def sort(self) -> None:
        """Order the points by step: an old checkpoint may have been evaluated after newer ones."""
        if any(step > following for step, following in itertools.pairwise(self.steps)):
            order = sorted(range(len(self.steps)), key=self.steps.__getitem__)
            self.steps = array("d", (self.steps[place] for place in order))
            self.values = array("d", (self.values[place] for place in order))


@dataclass
class RunData:
    """What the run directory holds; None and empty where it does not."""

    run_dir: Path
    notes: list[str] = field(default_factory=list)
    series: dict[str, Series] = field(default_factory=dict)
    last_values: dict[str, Any] = field(default_factory=dict)
    last_step: int = 0
    last_change_s: float | None = None
    config_text: str | None = None
    total_steps: int | None = None
    schedule: dict[str, list[float]] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    suite: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    checkpoints: list[tuple[str, str, str]] = field(default_factory=list)
    figures: list[tuple[str, bytes]] = field(default_factory=list)
    ledger: RunSummary = field(default_factory=lambda: summarize([]))

    @property
    def metrics(self) -> dict[str, Any]:
        """The final evaluation's metrics, without the prefix `eval/`."""
        metrics = (self.evaluation or {}).get("metrics")
        metrics = metrics if isinstance(metrics, dict) else {}
        return {str(name).removeprefix("eval/"): value for name, value in metrics.items()}

    @property
    def is_evaluated_later(self) -> bool:
        """Whether the run has gone on after its final evaluation, and was evaluated again."""
        step = (self.evaluation or {}).get("global_step")
        newest = max(
            (series.steps[-1] for name, series in self.series.items() if name.startswith("eval/")), default=0
        )
        return isinstance(step, int) and step < newest

    @property
    def is_complete(self) -> bool:
        return self.total_steps is not None and self.last_step >= self.total_steps


def collect(run_dir: Path) -> RunData:
    """Read everything that the report shows."""
    data = RunData(run_dir)
    _read_metrics(data)
    _read_config(data)
    schedule = _read_json(data, "schedule.json") or {}
    data.schedule = {
        str(name): [float(value) for value in values]
        for name, values in schedule.items()
        if isinstance(values, list) and all(is_number(value) and math.isfinite(value) for value in values)
    }
    planned = data.schedule.get("global_step")
    if data.total_steps is None and planned:
        data.total_steps = int(planned[-1])
    data.evaluation = _read_json(data, "evaluation.json")
    data.suite = _read_json(data, "evaluation/latest.json")
    data.environment = _read_json(data, "environment.json")
    _read_checkpoints(data)
    _read_figures(data)
    data.ledger = summarize(read_attempts(run_dir, data.notes.append))
    return data


def _read_metrics(data: RunData) -> None:
    path = data.run_dir / "metrics.jsonl"
    if not path.is_file():
        data.notes.append("There is no metrics.jsonl: no step was logged yet.")
        return
    data.last_change_s = path.stat().st_mtime
    data.last_values = newest_values(_noted(data, path))
    for series in data.series.values():
        series.sort()


def _noted(data: RunData, path: Path) -> Iterator[dict[str, Any]]:
    """The records, each of which has gone into the series when it is yielded."""
    try:
        for record in iterate_records(path):
            step = record["global_step"]
            data.last_step = max(step, data.last_step)
            for name, value in record.items():
                if is_number(value):
                    series = data.series.setdefault(name, Series())
                    series.steps.append(step)
                    series.values.append(value)
            yield record
    except DataError as error:
        data.notes.append(f"The record is damaged, and shown up to there: {error}")


def _read_config(data: RunData) -> None:
    data.config_text = _read_text(data, "config.yaml")
    if data.config_text is None:
        return
    import yaml

    try:
        steps = yaml.safe_load(data.config_text)["training"]["steps"]
    # ValueError: what looks like a date or a number but is none, such as 2026-13-01.
    except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError):
        return
    if isinstance(steps, int) and steps > 0:
        data.total_steps = steps


def _read_text(data: RunData, name: str) -> str | None:
    path = data.run_dir / name
    if _is_irregular(path):
        data.notes.append(f"{name} is left out: not a regular file.")
        return None
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_TEXT_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        data.notes.append(f"{name} cannot be read: {error.strerror}")
        return None
    if len(content) > _MAX_TEXT_BYTES:
        data.notes.append(f"{name} is larger than {_MAX_TEXT_BYTES >> 20} MiB and is left out.")
        return None
    return content.decode("utf-8", errors="replace")


def _is_irregular(path: Path) -> bool:
    """Whether a path is there but no regular file: a pipe would be waited for, a device read, for ever."""
    return path.exists() and not path.is_file()


def _read_json(data: RunData, name: str) -> dict[str, Any] | None:
    text = _read_text(data, name)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        data.notes.append(f"{name} is damaged and left out.")
        return None
    return value


def _read_checkpoints(data: RunData) -> None:
    for directory in sorted((data.run_dir / "checkpoints").glob("step-*")):
        # A checkpoint without its manifest, or whose files vanish while they are counted, is being deleted.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            written_s = (directory / "manifest.json").stat().st_mtime
            size_bytes = sum(path.stat().st_size for path in directory.iterdir())
            written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(written_s))
            data.checkpoints.append((directory.name, format_bytes(size_bytes), written))


def _read_figures(data: RunData) -> None:
    left_bytes = _MAX_FIGURES_BYTES
    for path in sorted((data.run_dir / "figures").glob("*.png")):
        if _is_irregular(path):
            data.notes.append(f"Figure {path.name} is left out: not a regular file.")
            continue
        try:
            size_bytes = path.stat().st_size
            if size_bytes > min(_MAX_FIGURE_BYTES, left_bytes):
                data.notes.append(f"Figure {path.name} is left out: too large for the page.")
                continue
            content = path.read_bytes()
        except OSError as error:
            data.notes.append(f"Figure {path.name} cannot be read: {error.strerror}")
            continue
        if not content.startswith(_PNG_SIGNATURE):
            data.notes.append(f"Figure {path.name} is left out: not a PNG file.")
            continue
        left_bytes -= len(content)
        data.figures.append((path.stem, content))


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number that fits in a float, or NaN or infinite."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, float)

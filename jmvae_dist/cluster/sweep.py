"""Sweeps: one run per row of a table of settings, each a task of an array job (`slurm/sweep.sbatch`).

The table is tab-separated, or comma-separated in a file named `.csv`. Its first line has configuration keys such as
`schedule.learning_rate.peak`; an empty cell leaves the setting as it is. A column `name` names run directories, which
are `<output_dir>/<name>`, or `<output_dir>/row-0001` without one.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jmvae_dist.cluster.attempts import newest_step, read_attempts
from jmvae_dist.config import RunConfig
from jmvae_dist.config_io import parse_run_config, to_plain
from jmvae_dist.errors import EXIT_STOPPED, ConfigError
from jmvae_dist.files import write_text_atomic
from jmvae_dist.tracking.jsonl import newest_values, readable_records

logger = logging.getLogger(__name__)

NAME_COLUMN = "name"
SUMMARY_NAME = "sweep.tsv"
_MAX_ERRORS = 20
# A run may go on for longer than it was begun for.
_MAY_GROW = {"training.steps", "training.epochs"}
# What is printed of all metrics, and which of two values is better.
_BEST: dict[str, Callable[[Iterable[float]], float]] = {
    "loss/total": min,
    "eval/loss/total": min,
    "eval/elbo": max,
    "eval/joint_nll": min,
}


@dataclass(frozen=True)
class SweepRow:
    """One row of the table, which is one run.

    Attributes:
        number: From 1, as the array's task.
        name: Of its run directory.
        settings: By configuration key, as text; without empty cells.
        run_dir: The run directory.
        arguments: Of the training.
    """

    number: int
    name: str
    settings: dict[str, str]
    run_dir: Path
    arguments: list[str]


@dataclass(frozen=True)
class Outcome:
    """Where a row stands.

    Attributes:
        state: complete, running, requeued, stopped, failed, lost, or `-` before its first attempt.
        step: Newest step in its record.
        metrics: Newest finite value of every loss and every held-out metric.
    """

    state: str
    step: int
    metrics: dict[str, float]


def read_sweep(table: Path, arguments: Sequence[str]) -> list[SweepRow]:
    """The rows of a table, for trainings with `arguments` in common.

    Raises:
        ConfigError: The table cannot be read, or is not one; or the common configuration is wrong.
    """
    header, lines = _read_table(table)
    output_dir = _output_dir(table, [[*arguments, *_options(header, cells)] for cells in lines])
    rows = []
    for number, cells in enumerate(lines, start=1):
        settings = {key: cell for key, cell in zip(header, cells, strict=True) if cell and key != NAME_COLUMN}
        name = (cells[header.index(NAME_COLUMN)] if NAME_COLUMN in header else "") or f"row-{number:04d}"
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+=,-]*", name):
            raise ConfigError(
                f"{table}, row {number}: the name {name!r} is not allowed; use letters, digits and ._+=,-"
            )
        run_dir = output_dir / name
        options = [*_options(header, cells), "--output_dir", str(run_dir)]
        rows.append(SweepRow(number, name, settings, run_dir, [*arguments, *options]))
    names = [row.name for row in rows]
    if repeated := [name for name in names if names.count(name) > 1]:
        numbers = [row.number for row in rows if row.name == repeated[0]]
        raise ConfigError(f"{table}: rows {numbers} have the same name {repeated[0]!r}, and so the same directory")
    return rows


def check_rows(table: Path, rows: Sequence[SweepRow], world_size: int) -> None:
    """Check the configuration of every row as its training would, and that its run directory belongs to it.

    Raises:
        ConfigError: With one line for each row that is wrong.
    """
    from jmvae_dist.training.setup import resolve_run

    errors = []
    for row in rows:
        try:
            resolve_run(check_row(table, row), world_size)
        except ConfigError as error:
            errors.append(str(error) if str(error).startswith(str(table)) else f"{table}, row {row.number}: {error}")
    if errors:
        more = f"\n... and {len(errors) - _MAX_ERRORS} more" if len(errors) > _MAX_ERRORS else ""
        raise ConfigError("\n".join(errors[:_MAX_ERRORS]) + more)


def check_row(table: Path, row: SweepRow) -> RunConfig:
    """The row's configuration, after checking that its run directory was not made with other settings.

    Raises:
        ConfigError: A setting is wrong, or the table has changed since the run was begun.
    """
    config = _config_of(row.arguments, f"{table}, row {row.number}")
    before = _saved_settings(row.run_dir)
    if before is not None and newest_step(row.run_dir) >= 0:
        current = to_plain(config)
        for key in row.settings.keys() - _MAY_GROW:
            if _look_up(before, key) != _look_up(current, key):
                raise ConfigError(
                    f"{table}, row {row.number}: {row.run_dir} was trained with {key} {_look_up(before, key)}, the "
                    f"table says {_look_up(current, key)}; rows that moved keep their runs if a column "
                    f"{NAME_COLUMN!r} names them; otherwise choose another output_dir"
                )
    return config


def is_complete(row: SweepRow, world_size: int) -> bool:
    """Whether the row's training has ended, with all the steps that it would have now.

    Raises:
        ConfigError: Its configuration is wrong.
    """
    from jmvae_dist.training.setup import resolve_run

    attempts = read_attempts(row.run_dir)
    if not attempts or attempts[-1].exit_code != 0:
        return False
    return newest_step(row.run_dir) == resolve_run(parse_run_config(row.arguments), world_size).total_steps


def read_outcome(row: SweepRow) -> Outcome:
    """Where a row stands, from its run directory."""
    records = readable_records(row.run_dir / "metrics.jsonl")
    newest = newest_values(
        {key: value for key, value in record.items() if _is_summed_up(key, value)} for record in records
    )
    step = newest.pop("global_step", 0)
    return Outcome(_state(row.run_dir), step, newest)


def _is_summed_up(key: str, value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return is_number and key.startswith(("global_step", "loss/", "elbo", "eval/"))


def _state(run_dir: Path) -> str:
    attempts = read_attempts(run_dir)
    if not attempts:
        return "-"
    last = attempts[-1]
    if not last.has_ended:
        return "running"
    if last.exit_code is None:
        return "lost"
    if last.requeued:
        return "requeued"
    return {0: "complete", EXIT_STOPPED: "stopped"}.get(last.exit_code, "failed")


def is_done(outcome: Outcome) -> bool:
    """Whether no job works on the row, or is about to."""
    return outcome.state in ("complete", "stopped", "failed")


def write_summary(rows: Sequence[SweepRow]) -> tuple[Path, list[Outcome]]:
    """Write `<output_dir>/sweep.tsv`: settings, state and final metrics of all rows.

    Rows end at the same time, on different nodes: the lock makes the last table the complete one.
    """
    folder = rows[0].run_dir.parent
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SUMMARY_NAME
    with _locked(folder / ".sweep.lock"):
        outcomes = [read_outcome(row) for row in rows]
        settings = list(dict.fromkeys(key for row in rows for key in row.settings))
        metrics = list(dict.fromkeys(key for outcome in outcomes for key in outcome.metrics))
        lines = [["row", "name", *settings, "state", "step", *metrics, "run_dir"]]
        for row, outcome in zip(rows, outcomes, strict=True):
            values = [_format(outcome.metrics.get(key)) for key in metrics]
            cells = [row.settings.get(key, "") for key in settings]
            lines.append(
                [str(row.number), row.name, *cells, outcome.state, str(outcome.step), *values, str(row.run_dir)]
            )
        write_text_atomic(path, "".join("\t".join(map(_one_line, line)) + "\n" for line in lines))
    return path, outcomes


def print_summary(rows: Sequence[SweepRow], outcomes: Sequence[Outcome]) -> None:
    """Print the table's settings with state and the metrics that sum it up; the best value has a star."""
    from jmvae_dist.cluster.text_table import print_columns

    settings = list(dict.fromkeys(key for row in rows for key in row.settings))
    metrics = [key for key in _BEST if any(key in outcome.metrics for outcome in outcomes)]
    best = {key: _BEST[key](item.metrics[key] for item in outcomes if key in item.metrics) for key in metrics}
    lines = []
    for row, outcome in zip(rows, outcomes, strict=True):
        cells = [row.name, *(row.settings.get(key, "") for key in settings), outcome.state, str(outcome.step)]
        for key in metrics:
            value = outcome.metrics.get(key)
            star = "*" if value is not None and value == best[key] and len(rows) > 1 else ""
            cells.append("" if value is None else f"{value:.6g}{star}")
        lines.append(cells)
    print_columns(["name", *settings, "state", "step", *metrics], lines)


def _format(value: float | None) -> str:
    return "" if value is None else f"{value:.8g}"


def _one_line(cell: str) -> str:
    return " ".join(cell.split())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s)", path, error.strerror)
        yield


def _read_table(table: Path) -> tuple[list[str], list[list[str]]]:
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{table}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    delimiter = "," if table.suffix.lower() == ".csv" else "\t"
    try:
        lines = [
            [cell.strip() for cell in line]
            for line in csv.reader(text.splitlines(), delimiter=delimiter, strict=True)
        ]
    except csv.Error as error:
        raise ConfigError(f"{table}: not a table ({error})") from None
    lines = [line for line in lines if any(line)]
    if len(lines) < 2:
        raise ConfigError(f"{table}: needs a line of configuration keys and at least one row of values")
    header, *rows = lines
    for key in header:
        if not re.fullmatch(r"[A-Za-z_][\w.]*", key) or header.count(key) > 1 or key in ("output_dir", "config"):
            separator = "commas" if delimiter == "," else "tabs"
            raise ConfigError(
                f"{table}: the first line has {key!r}; it must name different configuration keys, separated by "
                f"{separator}, and {NAME_COLUMN!r} where run directories (output_dir/name) are to be chosen"
            )
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise ConfigError(f"{table}, row {number}: {len(row)} cells instead of {len(header)}: {row}")
    return header, rows


def _output_dir(table: Path, candidates: Sequence[list[str]]) -> Path:
    """The common output_dir, from the first row that has a configuration; what others lack is said later."""
    errors = []
    for number, arguments in enumerate(candidates, start=1):
        try:
            return Path(_config_of(arguments, f"{table}, row {number}").output_dir).expanduser()
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _options(header: Sequence[str], cells: Sequence[str]) -> list[str]:
    pairs = [(key, cell) for key, cell in zip(header, cells, strict=True) if cell and key != NAME_COLUMN]
    return [f"--{key}={cell}" for key, cell in pairs]


def _config_of(arguments: Sequence[str], where: str) -> RunConfig:
    try:
        return parse_run_config(list(arguments))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _saved_settings(run_dir: Path) -> dict[str, Any] | None:
    import yaml

    try:
        values = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return values if isinstance(values, dict) else None


def _look_up(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values

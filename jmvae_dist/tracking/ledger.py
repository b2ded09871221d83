"""The goodput ledger: where the wall time of a run went, over all its attempts.

An attempt is one start of the run. Rank 0 keeps a file about it, `RUN/attempts/attempt-0001.json`, replaced
atomically every ten seconds: after `kill -9` the last one is that old. This module reads and writes these files and
adds them up; `training/goodput.py` measures what is in them.

    summary = summarize(read_attempts(run_dir))
    summary.goodput                         # share of the wall time spent on steps that count
    summary.seconds["restart"]              # seconds between attempts; the keys are those of CATEGORIES
    summary.attempts[-1].outcome            # "running", "complete", "stopped", "failed: ..." or "died"
    summary.attempts[-1].attempt.last_step  # and whatever else its file says

The seconds of all categories add up to the wall time. A file that is damaged or not ours is left out with a warning.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jmvae_dist.files import write_text_atomic

logger = logging.getLogger(__name__)

# In the order in which they are shown. Each second of a run belongs to exactly one.
CATEGORIES = {
    "productive": "productive steps",
    "data_wait": "waiting for data",
    "checkpoint": "checkpoints",
    "evaluation": "evaluation",
    "startup": "start-up",
    "recomputed": "steps taken again",
    "restart": "queue and restart",
    "other": "other",
}
# The time between attempts belongs to none of them; `summarize` finds it.
ATTEMPT_CATEGORIES = tuple(name for name in CATEGORIES if name != "restart")

COMPLETE, STOPPED, FAILED, DIED, RUNNING = "complete", "stopped", "failed", "died", "running"

# A living attempt writes every ten seconds, whatever it does; several writes may be late on a slow file system.
_SILENCE_S = 60.0
_FORMAT = 1
_MAX_FILE_BYTES = 4 << 20
_MAX_SECONDS = 1e11  # later than the year 5000, or longer than any run
_MAX_STEP = 2**63 - 1
_ROUNDING_S = 0.1


@dataclass(frozen=True)
class Attempt:
    """What the file of one attempt says.

    Args:
        number: 1, 2, ... in the order of their starts.
        started_s: When the process of rank 0 was started, in seconds since 1970 (UTC).
        updated_s: When this was last written; the sum of `seconds` later than `started_s`.
        outcome: "complete", "stopped" (on request, with a checkpoint; exit code 75), "failed: <why>", or None while
            it runs and ever after if it was killed; `AttemptSummary.outcome` tells the two apart.
        launcher: single, torchrun, accelerate, deepspeed or srun.
        engine: ddp or zero0 .. zero3.
        world_size: Number of processes.
        hosts: Where they ran, each host once, in the order of ranks.
        submitted_s: When the job was submitted, in seconds since 1970, if the launcher said so
            (JMVAE_DIST_SUBMITTED_S).
        slurm: `job_id`, `restart_count`, `node_list` and, in an array, `array_job_id` and `array_task_id`, as Slurm
            writes them; empty elsewhere.
        resumed_from: Step of the checkpoint it continued from; None: it began at the beginning.
        first_step: Number of the first step it took; None before that.
        last_step: Number of steps that the run had finished when this was written: where it stands.
        highest_step: Highest step that this or any former attempt had reached. Larger than `last_step` while steps
            are taken again.
        steps: Steps that it took, those taken again included.
        recomputed_steps: Steps that it took although the run had taken them before.
        checkpoint_step: Step of the last checkpoint that it committed; None before the first.
        checkpoint_save_s: Seconds from the begin of that checkpoint until it was committed.
        seconds: By name of `ATTEMPT_CATEGORIES`, from the start of the process to `updated_s`.
    """

    number: int
    started_s: float
    updated_s: float
    outcome: str | None = None
    launcher: str = "single"
    engine: str = "ddp"
    world_size: int = 1
    hosts: tuple[str, ...] = ()
    submitted_s: float | None = None
    slurm: dict[str, str] = field(default_factory=dict)
    resumed_from: int | None = None
    first_step: int | None = None
    last_step: int = 0
    highest_step: int = 0
    steps: int = 0
    recomputed_steps: int = 0
    checkpoint_step: int | None = None
    checkpoint_save_s: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def wall_s(self) -> float:
        """Seconds that it took, up to the last time it was written."""
        return math.fsum(self.seconds.values())


@dataclass(frozen=True)
class AttemptSummary:
    """An attempt among the others of its run.

    Args:
        attempt: What its file says.
        outcome: "complete", "stopped", "failed: <why>", "running" or "died".
        restart_s: Seconds before it in which nobody trained: since the former attempt last wrote its file, or for the
            first attempt since it was submitted. Zero after a complete attempt, whose run nobody waited for.
        queue_s: The part of `restart_s` that this attempt was in the queue; None if its submission time is unknown.
    """

    attempt: Attempt
    outcome: str
    restart_s: float
    queue_s: float | None


@dataclass(frozen=True)
class RunSummary:
    """All attempts of a run, added up.

    Args:
        attempts: In the order of their starts.
        seconds: By name of `CATEGORIES`.
    """

    attempts: tuple[AttemptSummary, ...]
    seconds: dict[str, float]

    @property
    def wall_s(self) -> float:
        """Seconds from the first start (or submission) to the last sign of life."""
        return math.fsum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Productive share of the wall time, 0..1; 0 if there was none."""
        return goodput(self.seconds)

    @property
    def recomputed_steps(self) -> int:
        """Steps taken again after a rewind, or after an attempt that ended behind its last checkpoint."""
        return sum(item.attempt.recomputed_steps for item in self.attempts)

    @property
    def checkpoint_save_s(self) -> float | None:
        """How long the newest checkpoint took from its begin to its commit; None if no attempt committed one."""
        known = [item.attempt.checkpoint_save_s for item in self.attempts]
        return next((value for value in reversed(known) if value is not None), None)


def goodput(seconds: dict[str, float]) -> float:
    """Productive share of seconds by category; 0 if there are none."""
    wall_s = math.fsum(seconds.values())
    return seconds["productive"] / wall_s if wall_s > 0 else 0.0


def summarize(attempts: Sequence[Attempt], now_s: float | None = None) -> RunSummary:
    """Add up the attempts of a run.

    Args:
        attempts: In the order of their starts, as `read_attempts` returns them; there may be none.
        now_s: Seconds since 1970; tells whether a last attempt without an outcome still runs. By default: now.
    """
    now_s = time.time() if now_s is None else now_s
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    items: list[AttemptSummary] = []
    former: Attempt | None = None
    for place, attempt in enumerate(attempts):
        for name, value in attempt.seconds.items():
            seconds[name] += value
        restart_s, queue_s = _restart(former, attempt)
        seconds["restart"] += restart_s
        is_last = place == len(attempts) - 1
        is_running = attempt.outcome is None and is_last and now_s - attempt.updated_s < _SILENCE_S
        outcome = attempt.outcome or (RUNNING if is_running else DIED)
        items.append(AttemptSummary(attempt, outcome, restart_s, queue_s))
        former = attempt
    return RunSummary(tuple(items), seconds)


def _restart(former: Attempt | None, attempt: Attempt) -> tuple[float, float | None]:
    """Seconds without training before an attempt, and how many of them it was queued; clocks of hosts may differ."""
    submitted_s = attempt.started_s if attempt.submitted_s is None else min(attempt.submitted_s, attempt.started_s)
    since_s = submitted_s if former is None or former.outcome == COMPLETE else former.updated_s
    restart_s = max(0.0, attempt.started_s - since_s)
    queue_s = min(restart_s, attempt.started_s - submitted_s)
    return restart_s, None if attempt.submitted_s is None else queue_s


# Files


def attempts_directory(run_dir: Path) -> Path:
    """Where a run's attempt files are."""
    return Path(run_dir) / "attempts"


def attempt_path(run_dir: Path, number: int) -> Path:
    """The file of an attempt."""
    return attempts_directory(run_dir) / f"attempt-{number:04d}.json"


def next_number(run_dir: Path) -> int:
    """Number of the attempt to come; a file that cannot be read keeps its number too."""
    return max(_paths_by_number(run_dir), default=0) + 1


def write_attempt(run_dir: Path, attempt: Attempt) -> None:
    """Write or replace the file of an attempt.

    Raises:
        OSError: It cannot be written; a former one is still there.
    """
    path = attempt_path(run_dir, attempt.number)
    path.parent.mkdir(exist_ok=True)
    write_text_atomic(path, json.dumps(_to_json(attempt), indent=2, allow_nan=False) + "\n")


def read_attempts(run_dir: Path, warn: Callable[[str], None] = logger.warning) -> list[Attempt]:
    """The attempts of a run, in the order of their starts; none for a run without a ledger.

    Args:
        run_dir: The run directory.
        warn: Told in one line of each file that is left out because it is damaged or not ours.
    """
    attempts = []
    for number, path in sorted(_paths_by_number(run_dir).items()):
        try:
            attempts.append(_read(path, number))
        except OSError as error:
            warn(f"{path}: cannot be read ({error.strerror}); its time is left out of the goodput")
        except (ValueError, RecursionError) as error:
            warn(f"{path}: not the file of an attempt ({error}); its time is left out of the goodput")
    return attempts


def _paths_by_number(run_dir: Path) -> dict[int, Path]:
    found = {}
    for path in attempts_directory(run_dir).glob("attempt-*.json"):
        match = re.fullmatch(r"attempt-([0-9]{4,9})\.json", path.name)
        if match:
            found[int(match[1])] = path
    return found


def _to_json(attempt: Attempt) -> dict[str, Any]:
    times = {name: getattr(attempt, f"{name}_s") for name in ("submitted", "started", "updated")}
    values = {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(attempt).items()}
    return {
        "format": _FORMAT,
        # For people; the program reads the seconds.
        **{name: _utc(time_s) for name, time_s in times.items() if time_s is not None},
        **{name: value for name, value in values.items() if name != "submitted_s" or value is not None},
        "seconds": {name: round(value, 3) for name, value in attempt.seconds.items()},
    }


def _utc(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds")


def _read(path: Path, number: int) -> Attempt:
    if not path.is_file():  # a pipe would be waited for, for ever
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise ValueError("too large")
    values = json.loads(content)
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise ValueError(f"no JSON object with format {_FORMAT}")
    attempt = _from_json(values)
    if attempt.number != number:
        raise ValueError(f"it says that it is number {attempt.number}")
    if abs(attempt.wall_s - (attempt.updated_s - attempt.started_s)) > _ROUNDING_S:
        raise ValueError("its seconds do not add up to its duration")
    return attempt


def _from_json(values: dict[str, Any]) -> Attempt:
    seconds, slurm, hosts = (values.get(name) for name in ("seconds", "slurm", "hosts"))
    if not isinstance(seconds, dict) or seconds.keys() != set(ATTEMPT_CATEGORIES):
        raise ValueError(f"seconds: not by {', '.join(ATTEMPT_CATEGORIES)}")
    if not isinstance(slurm, dict) or not isinstance(hosts, list):
        raise ValueError("slurm or hosts are missing")
    return Attempt(
        number=_step(values, "number"),
        started_s=_seconds(values, "started_s"),
        updated_s=_seconds(values, "updated_s"),
        outcome=None if values.get("outcome") is None else _text(values, "outcome"),
        launcher=_text(values, "launcher"),
        engine=_text(values, "engine"),
        world_size=_step(values, "world_size"),
        hosts=tuple(str(host) for host in hosts),
        submitted_s=None if values.get("submitted_s") is None else _seconds(values, "submitted_s"),
        slurm={str(name): str(value) for name, value in slurm.items()},
        resumed_from=_optional_step(values, "resumed_from"),
        first_step=_optional_step(values, "first_step"),
        last_step=_step(values, "last_step"),
        highest_step=_step(values, "highest_step"),
        steps=_step(values, "steps"),
        recomputed_steps=_step(values, "recomputed_steps"),
        checkpoint_step=_optional_step(values, "checkpoint_step"),
        checkpoint_save_s=None if values.get("checkpoint_save_s") is None else _seconds(values, "checkpoint_save_s"),
        seconds={name: _seconds(seconds, name) for name in ATTEMPT_CATEGORIES},
    )


def _seconds(values: dict[str, Any], name: str) -> float:
    value = values.get(name)
    # NaN fails the comparison.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MAX_SECONDS:
        raise ValueError(f"{name}: {value!r:.40} is no number of seconds")
    return float(value)


def _step(values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_STEP:
        raise ValueError(f"{name}: {value!r:.40} is no count")
    return value


def _optional_step(values: dict[str, Any], name: str) -> int | None:
    return None if values.get(name) is None else _step(values, name)


def _text(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name}: {value!r:.40} is no text")
    return value

"""Measures where the wall time of an attempt goes, for the goodput ledger (`tracking/ledger.py`)."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from jmvae_dist.config import EvaluationSection
from jmvae_dist.distributed.runtime import Runtime
from jmvae_dist.progress import format_duration
from jmvae_dist.tracking.jsonl import last_recorded_step
from jmvae_dist.tracking.ledger import (
    ATTEMPT_CATEGORIES,
    CATEGORIES,
    FAILED,
    Attempt,
    attempt_path,
    attempts_directory,
    goodput,
    next_number,
    read_attempts,
    summarize,
    write_attempt,
)
from jmvae_dist.tracking.wandb_process import redact

logger = logging.getLogger(__name__)

_INTERVAL_S = 10.0
# Evaluations that take more of a run than this are worth a word, unless they took little time.
_MAX_EVALUATION_SHARE = 1 / 3
_MIN_ADVISED_S = 30.0
_MAX_OUTCOME_CHARACTERS = 300
_SUBMITTED_VARIABLE = "JMVAE_DIST_SUBMITTED_S"
_SLURM_VARIABLES = {
    "job_id": ("SLURM_JOB_ID",),
    "restart_count": ("SLURM_RESTART_COUNT",),
    "node_list": ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"),
    "array_job_id": ("SLURM_ARRAY_JOB_ID",),
    "array_task_id": ("SLURM_ARRAY_TASK_ID",),
}

# What the training loop does, by the names that it also tells the watchdog; steps are sorted out one by one.
_CATEGORY_OF_PHASE = {
    "starting": "startup",
    "waiting for data": "data_wait",
    "checkpoint": "checkpoint",
    "evaluation": "evaluation",
    "figures": "evaluation",
    "profiling": "other",
    "going back": "recomputed",
    "finishing": "other",
}


class PhaseClock:
    """Seconds by category: at every moment exactly one of them counts.

    Args:
        category: The one that counts first.
        already_s: Seconds that it has at the beginning.
        clock: Seconds that never go back.
    """

    def __init__(self, category: str, already_s: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> None:
        self._seconds = dict.fromkeys(ATTEMPT_CATEGORIES, 0.0)
        self._seconds[category] = already_s
        self._category = category
        self._clock = clock
        self._since_s = clock()
        self._lock = threading.Lock()  # the ledger's thread reads what the main thread changes

    def enter(self, category: str) -> None:
        """Another category counts from now on."""
        with self._lock:
            now_s = self._clock()
            self._seconds[self._category] += now_s - self._since_s
            self._category, self._since_s = category, now_s

    def read(self) -> dict[str, float]:
        """Seconds by category up to now."""
        with self._lock:
            seconds = dict(self._seconds)
            seconds[self._category] += self._clock() - self._since_s
        return seconds


class AttemptLedger:
    """Where the time of this attempt goes, as the main thread of rank 0 sees it, and the attempt's file.

    A thread of rank 0 writes the file every few seconds, whatever the main thread does; on other ranks there is
    none. Trouble with the file is said once and stops nothing.

    Args:
        run_dir: The run directory, which this process holds.
        launch: From `describe_launch`.
        is_main: Whether this is rank 0.
        interval_s: Time between two writes.
    """

    def __init__(
        self, run_dir: Path, launch: dict[str, Any], *, is_main: bool, interval_s: float = _INTERVAL_S
    ) -> None:
        self._run_dir = run_dir
        self._launch = launch
        self._is_main = is_main
        self._interval_s = interval_s
        age_s = _process_age_s()
        self._started_s = time.time() - age_s
        self._clock = PhaseClock("startup", already_s=age_s)
        self._number = 0
        self._outcome: str | None = None
        self._resumed_from: int | None = None
        self._first_step: int | None = None
        self._last_step = 0
        self._highest_step = 0
        self._steps = 0
        self._recomputed_steps = 0
        self._checkpoint: tuple[int, float] | tuple[None, None] = (None, None)
        self._before_s = dict.fromkeys(CATEGORIES, 0.0)
        self._is_withdrawn = False
        self._has_complained = False
        self._writing = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_written, name="goodput ledger", daemon=True)

    def __enter__(self) -> AttemptLedger:
        if self._is_main:
            self._begin()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            self._outcome = redact(f"{FAILED}: {why}")[:_MAX_OUTCOME_CHARACTERS]
        self._stop_thread()
        self._write()

    def resumed(self, global_step: int) -> None:
        """The run goes on from the checkpoint of this step: at its start, or after a rewind."""
        if self._first_step is None:
            self._resumed_from = global_step
        self._last_step = global_step

    def enter(self, phase: str, global_step: int) -> None:
        """Say what the main thread does from now on; costs about a microsecond.

        Args:
            phase: "step", or one of the loop's other phases.
            global_step: Number of steps finished before it.
        """
        self._clock.enter(_CATEGORY_OF_PHASE.get(phase) or self._category_of_step(global_step + 1))

    def _category_of_step(self, number: int) -> str:
        if self._first_step is None:
            return "startup"  # it compiles kernels, allocates memory and connects
        return "recomputed" if number <= self._highest_step else "productive"

    def step_taken(self, global_step: int) -> None:
        """The step of this number is done."""
        if self._first_step is None:
            self._first_step = global_step
        self._steps += 1
        self._recomputed_steps += global_step <= self._highest_step
        self._last_step = global_step
        self._highest_step = max(self._highest_step, global_step)

    def checkpoint_committed(self, global_step: int, save_s: float) -> None:
        """A checkpoint is complete, `save_s` seconds after it was begun."""
        self._checkpoint = (global_step, save_s)

    def seconds(self) -> dict[str, float]:
        """Seconds by name of `CATEGORIES` over all attempts of the run so far; of rank 0, which knows them."""
        attempt_s = self._attempt().seconds
        return {name: before_s + attempt_s.get(name, 0.0) for name, before_s in self._before_s.items()}

    def metrics(self) -> dict[str, float]:
        """Seconds by category over all attempts of the run so far, and their productive share; rank 0 only."""
        if not self._is_main:
            return {}
        seconds = self.seconds()
        by_name = {f"goodput/{name}_s": value for name, value in seconds.items()}
        return {"goodput/fraction": goodput(seconds), **by_name}

    def finish(self, outcome: str) -> None:
        """Note how the attempt ends, unless an error follows; what is still done belongs to it."""
        self._outcome = outcome
        self._write()

    def withdraw(self) -> None:
        """There was nothing to do: this start is no attempt."""
        self._stop_thread()
        self._is_withdrawn = True
        if self._is_main:
            with contextlib.suppress(OSError):
                attempt_path(self._run_dir, self._number).unlink()

    def _begin(self) -> None:
        """Find out what was before, and leave a first file, in case that this attempt dies early."""
        for torn in attempts_directory(self._run_dir).glob(".attempt-*.tmp"):
            with contextlib.suppress(OSError):
                torn.unlink()
        former = read_attempts(self._run_dir)
        self._number = next_number(self._run_dir)
        # The record may know of a few steps that the last attempt took after it had written its file for the last
        # time; it is about to be cut back to the checkpoint.
        recorded = last_recorded_step(self._run_dir / "metrics.jsonl")
        self._highest_step = max([recorded, *(attempt.highest_step for attempt in former)])
        self._before_s = summarize(former).seconds
        self._before_s["restart"] += summarize([*former, self._attempt()]).attempts[-1].restart_s
        self._write()

    def _attempt(self) -> Attempt:
        """This attempt up to now."""
        seconds = self._clock.read()
        measured_s = sum(seconds.values())
        # The clock of the machine also went on while it was suspended, and may have been set.
        wall_s = max(measured_s, time.time() - self._started_s)
        seconds["other"] += wall_s - measured_s
        checkpoint_step, checkpoint_save_s = self._checkpoint
        return Attempt(
            number=self._number,
            started_s=self._started_s,
            updated_s=self._started_s + wall_s,
            outcome=self._outcome,
            resumed_from=self._resumed_from,
            first_step=self._first_step,
            last_step=self._last_step,
            highest_step=self._highest_step,
            steps=self._steps,
            recomputed_steps=self._recomputed_steps,
            checkpoint_step=checkpoint_step,
            checkpoint_save_s=checkpoint_save_s,
            seconds=seconds,
            **self._launch,
        )

    def _keep_written(self) -> None:
        while not self._stopping.wait(self._interval_s):
            self._write()

    def _stop_thread(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _write(self) -> None:
        if not self._is_main or self._is_withdrawn:
            return
        with self._writing:
            try:
                write_attempt(self._run_dir, self._attempt())
            except OSError as error:
                if not self._has_complained:
                    self._has_complained = True
                    logger.warning(
                        "%s: cannot be written (%s); the goodput of the run will lack this attempt",
                        *(attempt_path(self._run_dir, self._number), error.strerror),
                    )


def advise_on_evaluation(seconds: Mapping[str, float], section: EvaluationSection) -> str | None:
    """What to set if evaluations took a large part of a run; None if they did not.

    Args:
        seconds: By name of `CATEGORIES`, of the whole run.
        section: The run's settings.
    """
    evaluation_s = seconds["evaluation"]
    running_s = math.fsum(seconds.values()) - seconds["restart"]
    if evaluation_s < _MIN_ADVISED_S or evaluation_s < _MAX_EVALUATION_SHARE * running_s:
        return None
    settings = [f"evaluation.figure_samples ({section.figure_samples})"]
    if section.every_steps is not None:
        settings.insert(0, f"evaluation.every_steps ({section.every_steps}; null: only at the end)")
    if section.joint_nll_samples > 0:
        settings.append(f"evaluation.joint_nll_samples ({section.joint_nll_samples}; at the end)")
    share = evaluation_s / running_s
    return (
        f"evaluations and their figures took {format_duration(evaluation_s)} of {format_duration(running_s)} "
        f"({100 * share:.0f} %); how long they take depends on {', '.join(settings)}"
    )


def _process_age_s() -> float:
    """Seconds since this process was started, imports included."""
    if sys.platform != "linux":
        return max(0.0, time.time() - psutil.Process().create_time())
    # psutil counts from a time of boot that Linux gives in whole seconds.
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK"))


def describe_launch(runtime: Runtime, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """How this attempt was started, as arguments of `Attempt`; every rank calls it together.

    Args:
        runtime: Processes and engine.
        environment: Variables of Slurm and of its job script; by default those of this process.
    """
    variables = os.environ if environment is None else environment
    hosts = runtime.collectives.gather(socket.gethostname())
    return {
        "launcher": runtime.process.launcher,
        "engine": runtime.engine_name,
        "world_size": runtime.process.world_size,
        "hosts": tuple(dict.fromkeys(hosts)),
        "submitted_s": _submitted_s(variables),
        "slurm": _describe_job(variables),
    }


def _describe_job(variables: Mapping[str, str]) -> dict[str, str]:
    if "SLURM_JOB_ID" not in variables:
        return {}
    found = {
        key: next((variables[name] for name in names if name in variables), None)
        for key, names in _SLURM_VARIABLES.items()
    }
    # Slurm leaves it out in the first run of a job.
    return {"restart_count": "0", **{key: value for key, value in found.items() if value is not None}}


def _submitted_s(variables: Mapping[str, str]) -> float | None:
    text = variables.get(_SUBMITTED_VARIABLE)
    if text is None:
        return None
    try:
        submitted_s = float(text)
    except ValueError:
        submitted_s = -1.0
    if not 0 < submitted_s < 2 * time.time():  # NaN fails it too
        logger.warning("%s=%r is no time in seconds since 1970; it is ignored", _SUBMITTED_VARIABLE, text)
        return None
    return submitted_s

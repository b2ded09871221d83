"""The attempts of a run under Slurm: when a job may go on, and which nodes have failed it.

`slurm/train.sbatch` calls `begin` before its ranks start and `end` after them. What they note is in
`RUN/slurm/attempts.jsonl`, one line for each beginning and each end. An attempt without an end was lost: the node of
its batch script failed, or Slurm killed the job.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jmvae_dist.cluster.provenance import write_provenance
from jmvae_dist.cluster.scheduler import find_failed_nodes
from jmvae_dist.errors import EXIT_STOPPED, LaunchError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """One attempt of a job at a run.

    Attributes:
        job_id: As scheduler commands take it; `12_3` for a task of an array.
        restart: How often Slurm had requeued the job before.
        begin_s, end_s: Seconds since the epoch; `end_s` is None for an attempt that is running or was lost.
        nodes: Its hosts.
        begin_step, end_step: Newest checkpoint before and after; -1: none.
        exit_code: Of the ranks together; None while it is running, or if it was lost.
        requeued: Whether the job was put back because of this attempt's end, by its own script.
        reason: Why it ended as it did, for people.
        failed_nodes: Those of its hosts that failed meanwhile, as far as Slurm knows.
    """

    job_id: str
    restart: int
    begin_s: float
    nodes: list[str]
    begin_step: int
    end_s: float | None = None
    end_step: int | None = None
    exit_code: int | None = None
    requeued: bool = False
    reason: str = ""
    failed_nodes: tuple[str, ...] = ()

    @property
    def has_ended(self) -> bool:
        """Whether its end was noted."""
        return self.end_s is not None

    @property
    def has_progressed(self) -> bool:
        """Whether it left a checkpoint that was not there before."""
        return self.end_step is not None and self.end_step > self.begin_step


def begin_attempt(run_dir: Path, *, max_attempts: int, environment: Mapping[str, str] | None = None) -> Attempt:
    """Note the beginning of an attempt; close a former one that was lost.

    Args:
        run_dir: The run directory; created.
        max_attempts: Attempts of one job in a row that may leave no new checkpoint.
        environment: In place of the process's own.

    Raises:
        LaunchError: The job has had `max_attempts` attempts without progress, or this is no job.
    """
    variables = os.environ if environment is None else environment
    attempts = read_attempts(run_dir)
    step = newest_step(run_dir)
    job_id = current_job_id(variables)
    if attempts and not attempts[-1].has_ended:
        attempts[-1] = _close_lost(attempts[-1], step)
        _append(run_dir, "end", attempts[-1])
    fruitless = _fruitless(attempts, job_id)
    if len(fruitless) >= max_attempts:
        raise LaunchError(
            f"{run_dir}: {len(fruitless)} attempts of job {job_id} in a row have left no checkpoint after "
            f"{'the beginning' if step < 0 else f'step {step}'} (the last: {fruitless[-1].reason}); giving up. "
            "Look at the logs there; submit again to go on (MAX_ATTEMPTS_WITHOUT_PROGRESS in slurm/site.env)"
        )
    attempt = Attempt(
        job_id=job_id,
        restart=int(variables.get("SLURM_RESTART_COUNT") or 0),
        begin_s=time.time(),
        nodes=_hosts(variables),
        begin_step=step,
    )
    folder = run_dir / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    write_provenance(folder / f"job-{job_id}-{attempt.restart}", variables)
    _append(run_dir, "begin", attempt)
    return attempt


def end_attempt(
    run_dir: Path, *, exit_code: int, max_attempts: int, got_usr1: bool, got_term: bool, job_state: Mapping[str, str]
) -> Attempt:
    """Note the end of the newest attempt and decide whether its job goes back to the queue.

    It does after a stop that Slurm asked for, with USR1 or because of a preemption, and that left the ranks with
    exit code 75; not after `scancel`, which sends TERM; and not if that would be one attempt too many.

    Args:
        run_dir: The run directory.
        exit_code: Of the ranks together.
        max_attempts: As for `begin_attempt`.
        got_usr1, got_term: What the batch script has received.
        job_state: Fields of `scontrol show job`.

    Raises:
        LaunchError: No attempt was begun.
    """
    attempts = read_attempts(run_dir)
    if not attempts or attempts[-1].has_ended:
        raise LaunchError(f"{run_dir}/slurm/attempts.jsonl: no attempt has begun")
    attempt = attempts[-1]
    is_preempted = job_state.get("PreemptTime", "None") not in ("None", "")
    is_asked = got_usr1 or is_preempted
    ended = _ended(
        attempt,
        end_s=time.time(),
        end_step=newest_step(run_dir),
        exit_code=exit_code,
        failed_nodes=find_failed_nodes(attempt.nodes, attempt.begin_s),
    )
    requeued = False
    if exit_code == EXIT_STOPPED and is_asked:
        why = "stopped before the time limit" if not is_preempted else "preempted"
        fruitless = _fruitless([*attempts[:-1], ended], attempt.job_id)
        requeued = len(fruitless) < max_attempts
        reason = why if requeued else f"{why}; not requeued: {len(fruitless)} attempts without a new checkpoint"
    elif exit_code == EXIT_STOPPED:
        reason = "cancelled, with a checkpoint" if got_term else "stopped on request"
    elif job_state.get("JobState", "") == "PENDING":
        reason = "Slurm has requeued the job"
    elif got_term and exit_code != 0:
        reason = f"ended by Slurm without a checkpoint of the last step (exit code {exit_code})"
    else:
        reason = "complete" if exit_code == 0 else f"failed (exit code {exit_code})"
    if ended.failed_nodes:
        reason += f"; failed nodes: {', '.join(ended.failed_nodes)}"
    ended = _ended(ended, requeued=requeued, reason=reason)
    _append(run_dir, "end", ended)
    return ended


def read_attempts(run_dir: Path) -> list[Attempt]:
    """All attempts that were noted, oldest first; a torn last line is left out."""
    try:
        lines = (run_dir / "slurm" / "attempts.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    attempts: list[Attempt] = []
    for line in lines:
        try:
            record = json.loads(line)
            event, fields = record.pop("event"), {**record, "failed_nodes": tuple(record["failed_nodes"])}
            attempt = Attempt(**fields)
        except (ValueError, TypeError, KeyError, AttributeError):
            logger.warning("%s/slurm/attempts.jsonl: a damaged line is left out", run_dir)
            continue
        if event == "end" and attempts and not attempts[-1].has_ended:
            attempts[-1] = attempt
        else:
            attempts.append(attempt)
    return attempts


def newest_step(run_dir: Path) -> int:
    """Step of the newest committed checkpoint; -1 without one."""
    try:
        name = (run_dir / "checkpoints" / "LATEST").read_text(encoding="utf-8").strip()
    except OSError:
        return -1
    match = re.fullmatch(r"step-(\d+)", name)
    return int(match[1]) if match else -1


def _close_lost(attempt: Attempt, step: int) -> Attempt:
    failed = find_failed_nodes(attempt.nodes, attempt.begin_s)
    reason = f"lost{'; failed nodes: ' + ', '.join(failed) if failed else ', killed or its first node failed'}"
    return _ended(attempt, end_s=time.time(), end_step=step, reason=reason, failed_nodes=failed)


def _ended(attempt: Attempt, **changes: Any) -> Attempt:
    return Attempt(**{**asdict(attempt), **changes})


def _fruitless(attempts: list[Attempt], job_id: str) -> list[Attempt]:
    """The newest attempts of this job that left no new checkpoint; another job starts to count anew."""
    fruitless: list[Attempt] = []
    for attempt in reversed(attempts):
        if attempt.job_id != job_id or attempt.has_progressed:
            break
        fruitless.insert(0, attempt)
    return fruitless


def current_job_id(variables: Mapping[str, str]) -> str:
    """The job that this process belongs to, as scheduler commands take it.

    Raises:
        LaunchError: It belongs to none.
    """
    if "SLURM_JOB_ID" not in variables:
        raise LaunchError("SLURM_JOB_ID is not set: this is part of a batch script (slurm/train.sbatch)")
    if "SLURM_ARRAY_TASK_ID" in variables:
        return f"{variables['SLURM_ARRAY_JOB_ID']}_{variables['SLURM_ARRAY_TASK_ID']}"
    return variables["SLURM_JOB_ID"]


def _hosts(variables: Mapping[str, str]) -> list[str]:
    from jmvae_dist.distributed.environment import expand_node_list

    return expand_node_list(variables["SLURM_JOB_NODELIST"]) if variables.get("SLURM_JOB_NODELIST") else []


def _append(run_dir: Path, event: str, attempt: Attempt) -> None:
    """Add a line with a single write, so that a kill leaves at most a torn last one, which no later line joins."""
    path = run_dir / "slurm" / "attempts.jsonl"
    line = (json.dumps({"event": event, **asdict(attempt)}) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The attempts of a run under Slurm: when a job may go on, and which nodes have failed it.

`slurm/train.sbatch` calls `begin` before its ranks start and `end` after them. What they note is in
`RUN/slurm/attempts.jsonl`, one line for each beginning and each end. An attempt without an end was lost: the node of
its batch script failed, or Slurm killed the job.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from jmvae_dist.checkpoint.layout import list_checkpoints, measure_progress, step_of
from jmvae_dist.cluster.provenance import write_provenance
from jmvae_dist.cluster.scheduler import find_failed_nodes, job_fields, parse_time_s
from jmvae_dist.errors import EXIT_STOPPED, EXIT_USAGE, LaunchError

logger = logging.getLogger(__name__)

# Of ranks that a signal reached before they could heed it. A preemption may come as TERM, USR1 is passed on by the
# batch script; kill -9 follows on TERM.
_KILLED_BY_TERM = (128 + signal.SIGTERM, 128 + signal.SIGKILL)
_KILLED_BY_USR1 = 128 + signal.SIGUSR1
_MAX_SKEW_S = 60.0  # between the clocks of the controller and of a node


@dataclass(frozen=True)
class Attempt:
    """One attempt of a job at a run.

    Attributes:
        job_id: As scheduler commands take it; `12_3` for a task of an array.
        restart: How often Slurm had requeued the job before.
        begin_s, end_s: Seconds since the epoch; `end_s` is None for an attempt that is running or was lost.
        nodes: Its hosts.
        begin_step, end_step: Newest readable checkpoint before and after; -1: none.
        exit_code: Of the ranks together; None while it is running, or if it was lost.
        requeued: Whether the job was put back because of this attempt's end, by its own script.
        reason: Why it ended as it did, for people.
        failed_nodes: Those of its hosts that failed meanwhile, as far as Slurm knows.
        begin_rewinds, end_rewinds: Rewinds that those checkpoints have behind them.
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
    begin_rewinds: int = 0
    end_rewinds: int = 0

    @property
    def has_ended(self) -> bool:
        """Whether its end was noted."""
        return self.end_s is not None

    @property
    def begin_progress(self) -> tuple[int, int]:
        """How far the run was before, as rewinds and step: after a rewind new checkpoints begin at a lower step."""
        return self.begin_rewinds, self.begin_step

    @property
    def end_progress(self) -> tuple[int, int]:
        """How far the run was after it; as before it while no end was noted."""
        return self.begin_progress if self.end_step is None else (self.end_rewinds, self.end_step)


def begin_attempt(run_dir: Path, *, max_attempts: int, environment: Mapping[str, str] | None = None) -> Attempt:
    """Note the beginning of an attempt; close a former one that was lost.

    Args:
        run_dir: The run directory; created.
        max_attempts: Attempts of one job in a row that may leave no new checkpoint.
        environment: In place of the process's own.

    Raises:
        LaunchError: The job has had `max_attempts` attempts without progress, another job is at the run, or this is
            no job.
    """
    variables = os.environ if environment is None else environment
    attempts = read_attempts(run_dir)
    rewinds, step = measure_progress(run_dir / "checkpoints")
    job_id = current_job_id(variables)
    for place, former in enumerate(attempts):
        if not former.has_ended:
            _check_not_running(run_dir, former, job_id)
            attempts[place] = _close_lost(former, step, rewinds)
            _append(run_dir, "end", attempts[place])
    restart = _restart(variables)
    fruitless = _fruitless(attempts, job_id, before=restart)
    if len(fruitless) >= max_attempts:
        _, best_step = max(attempt.begin_progress for attempt in fruitless)
        raise LaunchError(
            f"{run_dir}: {len(fruitless)} attempts of job {job_id} in a row have left no checkpoint after "
            f"{'the beginning' if best_step < 0 else f'step {best_step}'} (the last: {fruitless[-1].reason}); "
            "giving up. Look at the logs there; "
            "submit again to go on (MAX_ATTEMPTS_WITHOUT_PROGRESS in slurm/site.env)"
        )
    attempt = Attempt(
        job_id=job_id,
        restart=restart,
        begin_s=time.time(),
        nodes=_hosts(variables),
        begin_step=step,
        begin_rewinds=rewinds,
    )
    folder = run_dir / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    write_provenance(folder / f"job-{job_id}-{attempt.restart}", variables)
    _append(run_dir, "begin", attempt)
    return attempt


def end_attempt(
    run_dir: Path,
    *,
    exit_code: int,
    max_attempts: int,
    got_usr1: bool,
    got_term: bool,
    job_state: Mapping[str, str],
    requeues_failures: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Attempt:
    """Note the end of this job's attempt and decide whether the job goes back to the queue.

    It does after a stop that Slurm asked for, with USR1 or because of a preemption, and after a failure where that is
    wanted; not after `scancel`, which sends TERM; and not if Slurm may not requeue the job, or if that would be one
    attempt too many.

    Args:
        run_dir: The run directory.
        exit_code: Of the ranks together.
        max_attempts: As for `begin_attempt`.
        got_usr1, got_term: What the batch script has received.
        job_state: Fields of `scontrol show job`.
        requeues_failures: Whether a failure brings the job back, other than a wrong configuration.
        environment: In place of the process's own.

    Raises:
        LaunchError: No attempt was begun, or this is no job.
    """
    variables = os.environ if environment is None else environment
    job_id, restart = current_job_id(variables), _restart(variables)
    attempts = read_attempts(run_dir)
    # Another job may have taken it for lost.
    mine = [item for item in attempts if (item.job_id, item.restart, item.exit_code) == (job_id, restart, None)]
    if not mine:
        raise LaunchError(f"{run_dir}/slurm/attempts.jsonl: no attempt of job {job_id} has begun")
    attempt = mine[-1]
    is_fine = exit_code in (0, EXIT_STOPPED)
    rewinds, step = measure_progress(run_dir / "checkpoints")
    ended = replace(
        attempt,
        end_s=time.time(),
        end_step=step,
        end_rewinds=rewinds,
        exit_code=exit_code,
        # A service that was merely started anew has failed nobody.
        failed_nodes=() if is_fine else find_failed_nodes(attempt.nodes, attempt.begin_s),
    )
    reason, goes_back = _judge(
        ended, got_usr1=got_usr1, got_term=got_term, job_state=job_state, requeues_failures=requeues_failures
    )
    if goes_back and job_state.get("Requeue") == "0":
        goes_back = False
        reason += "; not requeued: Slurm may not (Requeue=0)"
    if goes_back:
        fruitless = _fruitless([*(other for other in attempts if other is not attempt), ended], job_id)
        if len(fruitless) >= max_attempts:
            goes_back = False
            reason += f"; not requeued: {len(fruitless)} attempts without a new checkpoint"
    if ended.failed_nodes:
        reason += f"; failed nodes: {', '.join(ended.failed_nodes)}"
    ended = replace(ended, requeued=goes_back, reason=reason)
    _append(run_dir, "end", ended)
    return ended


def _judge(
    ended: Attempt, *, got_usr1: bool, got_term: bool, job_state: Mapping[str, str], requeues_failures: bool
) -> tuple[str, bool]:
    """Why an attempt ended, and whether the job may therefore go back to the queue."""
    code = ended.exit_code
    is_preempted = job_state.get("PreemptTime", "None") not in ("None", "")
    restarts = job_state.get("Restarts", "")
    if restarts.isdigit() and int(restarts) > ended.restart:
        return "Slurm has requeued the job", False
    # Then `scancel` means what it says, also after USR1. The end of the time limit looks alike but for the reason.
    has_been_ended = job_state.get("JobState") in ("COMPLETING", "CANCELLED")
    is_cancelled = has_been_ended and not is_preempted and job_state.get("Reason") != "TimeLimit"
    if (got_usr1 or is_preempted) and not is_cancelled:
        why = "preempted" if is_preempted else "stopped before the time limit"
        if code == EXIT_STOPPED:
            return why, True
        if code in _KILLED_BY_TERM if is_preempted else code == _KILLED_BY_USR1:
            return f"{why}, while the ranks still started (exit code {code})", True
    if code == EXIT_STOPPED:
        if not got_term:
            return "stopped on request", False
        has_new = ended.end_progress > ended.begin_progress
        return "cancelled, with a checkpoint" if has_new else "cancelled, without a new checkpoint", False
    if code == 0:
        return "complete", False
    if got_term:
        return f"ended by Slurm without a checkpoint of the last step (exit code {code})", False
    goes_back = requeues_failures and code != EXIT_USAGE and not has_been_ended
    return f"failed (exit code {code})", goes_back


def read_attempts(run_dir: Path) -> list[Attempt]:
    """All attempts that were noted, oldest first; a torn last line is left out.

    Fields of a later version are ignored: one of its attempts counts as well.
    """
    try:
        lines = (run_dir / "slurm" / "attempts.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    known = {item.name for item in fields(Attempt)}
    attempts: list[Attempt] = []
    for line in lines:
        try:
            record = json.loads(line)
            event, failed_nodes = record["event"], tuple(record["failed_nodes"])
            values = {name: value for name, value in record.items() if name in known}
            attempt = Attempt(**{**values, "failed_nodes": failed_nodes})
        except (ValueError, TypeError, KeyError, AttributeError):
            logger.warning("%s/slurm/attempts.jsonl: a damaged line is left out", run_dir)
            continue
        begun = _find_begun(attempts, attempt) if event == "end" else None
        if begun is None:
            attempts.append(attempt)
        else:
            attempts[begun] = attempt
    return attempts


def _find_begun(attempts: list[Attempt], ended: Attempt) -> int | None:
    """Which one has now ended; None if its beginning is not known."""
    for place in reversed(range(len(attempts))):
        attempt = attempts[place]
        if (attempt.job_id, attempt.begin_s) == (ended.job_id, ended.begin_s):
            return place
    return None


def newest_step(run_dir: Path) -> int:
    """Step of the newest committed checkpoint; -1 without one."""
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    return step_of(checkpoints[-1].name) if checkpoints else -1


def _close_lost(attempt: Attempt, step: int, rewinds: int) -> Attempt:
    failed = find_failed_nodes(attempt.nodes, attempt.begin_s)
    reason = f"lost{'; failed nodes: ' + ', '.join(failed) if failed else ', killed or its first node failed'}"
    return replace(attempt, end_s=time.time(), end_step=step, end_rewinds=rewinds, reason=reason, failed_nodes=failed)


def _fruitless(attempts: list[Attempt], job_id: str, before: float = math.inf) -> list[Attempt]:
    """The newest attempts of this job that left no new checkpoint; another job starts to count anew.

    So does one that has an old number again, after Slurm has begun to count anew: it restarts less often.

    A checkpoint is new beyond the furthest of all attempts of the job. Compared with what its own attempt began with,
    one that a rewind gave up would be new again when it is written again, after each end without one.
    """
    in_a_row: list[Attempt] = []
    for attempt in reversed(attempts):
        if attempt.job_id != job_id or attempt.restart >= before:
            break
        in_a_row.insert(0, attempt)
        before = attempt.restart
    best = (0, -1)
    fruitless: list[Attempt] = []
    for attempt in in_a_row:
        best = max(best, attempt.begin_progress)
        fruitless = [] if attempt.end_progress > best else [*fruitless, attempt]
        best = max(best, attempt.end_progress)
    return fruitless


def _check_not_running(run_dir: Path, attempt: Attempt, job_id: str) -> None:
    """Two jobs in one directory: the second one must not declare the first one lost.

    Raises:
        LaunchError: The job of this attempt is running.
    """
    if attempt.job_id == job_id:
        return
    state = job_fields(attempt.job_id)
    # A job of this number that has started since is another one, or another attempt.
    has_stayed = parse_time_s(state.get("StartTime", "")) <= attempt.begin_s + _MAX_SKEW_S
    if state.get("JobState") in ("RUNNING", "SUSPENDED") and has_stayed:
        raise LaunchError(
            f"{run_dir}: job {attempt.job_id} is training in it on {', '.join(attempt.nodes)}; wait for its end, "
            f"scancel it, or submit with --dependency=afterany:{attempt.job_id}"
        )


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


def _restart(variables: Mapping[str, str]) -> int:
    return int(variables.get("SLURM_RESTART_COUNT") or 0)


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

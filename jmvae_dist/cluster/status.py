"""Where a run stands: what the queue says, its attempts, its progress, and where its time went.

Works for runs that were never under Slurm, and on machines without it: then there is only less to say.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jmvae_dist.cluster import attempts as batch
from jmvae_dist.cluster.history import History, read_history
from jmvae_dist.cluster.resources import parse_duration_s
from jmvae_dist.cluster.scheduler import Job, choose_jobs
from jmvae_dist.cluster.submission import find_failed_nodes, submitted_evaluations, submitted_jobs
from jmvae_dist.cluster.text_table import format_columns
from jmvae_dist.errors import EXIT_STOPPED, ConfigError
from jmvae_dist.progress import format_duration
from jmvae_dist.tracking.ledger import CATEGORIES, RUNNING, AttemptSummary

_MAX_NODES_SHOWN = 3
_REQUEUED = "; requeued"


@dataclass(frozen=True)
class AttemptStatus:
    """One start of the run, as its batch script and its own ledger tell.

    Attributes:
        job_id: None for one that was not under Slurm.
        restart: How often Slurm had requeued the job before.
        nodes: Its hosts.
        begin_s: Seconds since the epoch.
        end_s: None while it is running, or if nobody knows.
        first_step, last_step: Finished steps at its begin and its end; None if it took none.
        exit_code: Of the ranks together; None if unknown.
        outcome: Why it ended, in words.
    """

    job_id: str | None
    restart: int
    nodes: tuple[str, ...]
    begin_s: float
    end_s: float | None
    first_step: int | None
    last_step: int | None
    exit_code: int | None
    outcome: str


@dataclass(frozen=True)
class RunStatus:
    """A run at this moment.

    Attributes:
        run_dir: The run directory.
        state: In words: the queue's, if it has a job of the run, else what the last attempt left.
        jobs: Its trainings in the queue.
        evaluations: Its evaluations in the queue.
        knows_queue: Whether Slurm could be asked.
        history: Progress, speed, and the ledger.
        attempts: Oldest first.
        failed_nodes: Nodes that failed any of them.
    """

    run_dir: Path
    state: str
    jobs: list[Job]
    evaluations: list[Job]
    knows_queue: bool
    history: History
    attempts: list[AttemptStatus]
    failed_nodes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values: times in seconds (since the epoch where they are points in time)."""
        history = self.history
        return {
            "run_dir": str(self.run_dir),
            "state": self.state,
            "knows_queue": self.knows_queue,
            "jobs": [asdict(job) for job in self.jobs],
            "evaluations": [asdict(job) for job in self.evaluations],
            "progress": {
                "step": history.step,
                "total_steps": history.total_steps,
                "checkpoint_step": history.checkpoint_step,
                "samples_per_s": history.samples_per_s,
                "remaining_s": history.remaining_s,
                "checkpoint_save_s": history.save_s,
            },
            "attempts": [asdict(attempt) for attempt in self.attempts],
            "failed_nodes": list(self.failed_nodes),
            "time": {
                "wall_s": history.ledger.wall_s,
                "goodput": history.ledger.goodput,
                "recomputed_steps": history.ledger.recomputed_steps,
                "seconds": history.ledger.seconds,
            },
        }


def find_runs(folder: Path) -> list[Path]:
    """The folder itself if it is a run directory; otherwise those in it, which a sweep has made.

    Raises:
        ConfigError: There are none.
    """
    if _is_run(folder):
        return [folder]
    runs = sorted(path for path in folder.iterdir() if _is_run(path)) if folder.is_dir() else []
    if not runs:
        raise ConfigError(f"{folder}: not a run directory (an output_dir), and there are none in it")
    return runs


def _is_run(folder: Path) -> bool:
    marks = ("config.yaml", "metrics.jsonl", "slurm/attempts.jsonl", "attempts")
    if any((folder / mark).exists() for mark in marks):
        return True
    # Submitted, and not begun.
    is_sweep = any((path / "config.yaml").exists() for path in folder.glob("*/"))
    return not is_sweep and any((folder / "slurm").glob("[0-9]*.sbatch"))


def read_status(run_dir: Path, queue: list[Job] | None) -> RunStatus:
    """What the run directory says, and the jobs in the queue (`scheduler.list_jobs`)."""
    jobs = choose_jobs(queue or [], submitted_jobs(run_dir))
    history = read_history(run_dir)
    attempts = _merge(batch.read_attempts(run_dir), list(history.ledger.attempts))
    return RunStatus(
        run_dir=run_dir,
        state=_describe_state(jobs, attempts, knows_queue=queue is not None),
        jobs=jobs,
        evaluations=choose_jobs(queue or [], submitted_evaluations(run_dir)),
        knows_queue=queue is not None,
        history=history,
        attempts=attempts,
        failed_nodes=find_failed_nodes([run_dir]),
    )


def _merge(scripts: list[batch.Attempt], ledger: list[AttemptSummary]) -> list[AttemptStatus]:
    """Attempts of batch scripts and of the run's own ledger, which know different things about the same ones."""
    of_job = {_key_of(item): item for item in ledger if item.attempt.slurm}
    merged = [_of_script(attempt, of_job.pop((attempt.job_id, attempt.restart), None)) for attempt in scripts]
    matched = {id(item) for key, item in ((_key_of(item), item) for item in ledger) if key not in of_job}
    merged += [_of_ledger(item) for item in ledger if not item.attempt.slurm or id(item) not in matched]
    return sorted(merged, key=lambda attempt: attempt.begin_s)


def _key_of(item: AttemptSummary) -> tuple[str, int]:
    slurm = item.attempt.slurm
    job_id = slurm.get("job_id", "")
    if "array_task_id" in slurm:
        job_id = f"{slurm.get('array_job_id', job_id)}_{slurm['array_task_id']}"
    restart = slurm.get("restart_count", "0")
    return job_id, int(restart) if restart.isdigit() else 0


def _of_script(attempt: batch.Attempt, item: AttemptSummary | None) -> AttemptStatus:
    first_step, last_step = max(0, attempt.begin_step), attempt.end_step
    if item is not None:
        first_step, last_step = item.attempt.resumed_from or 0, item.attempt.last_step
    outcome = attempt.reason + (_REQUEUED if attempt.requeued else "")
    if not attempt.has_ended:
        outcome = "running" if item is None or item.outcome == RUNNING else "no sign of life"
    return AttemptStatus(
        job_id=attempt.job_id,
        restart=attempt.restart,
        nodes=tuple(attempt.nodes),
        begin_s=attempt.begin_s,
        end_s=attempt.end_s,
        first_step=first_step,
        last_step=None if last_step is None else max(0, last_step),
        exit_code=attempt.exit_code,
        outcome=outcome,
    )


def _of_ledger(item: AttemptSummary) -> AttemptStatus:
    attempt = item.attempt
    job_id, restart = _key_of(item)
    return AttemptStatus(
        job_id=job_id or None,
        restart=restart,
        nodes=attempt.hosts,
        begin_s=attempt.started_s,
        end_s=None if item.outcome == RUNNING else attempt.updated_s,
        first_step=attempt.resumed_from or 0,
        last_step=attempt.last_step,
        exit_code={"complete": 0, "stopped": EXIT_STOPPED}.get(item.outcome),
        outcome=item.outcome,
    )


def _describe_state(jobs: list[Job], attempts: list[AttemptStatus], *, knows_queue: bool) -> str:
    training = [job for job in jobs if job.state != "PENDING"] or jobs
    if training:
        job = training[0]
        why = f" ({job.reason})" if job.state == "PENDING" and job.reason not in ("", "None") else ""
        return f"job {job.job_id} is {job.state}{why}"
    if not attempts:
        return "not started"
    last = attempts[-1]
    if last.end_s is None and last.job_id is not None and knows_queue:
        return "lost: its job is not in the queue any more"
    if last.outcome.endswith(_REQUEUED) and knows_queue:
        return f"{last.outcome}, but its job is not in the queue any more"
    return last.outcome


# Text


def format_status(status: RunStatus) -> str:
    """A page about one run."""
    lines = [f"run         {status.run_dir}", f"state       {status.state}"]
    if not status.knows_queue:
        lines.append("queue       unknown: squeue is not here, or does not answer")
    lines += [f"queue       {_format_job(job)}" for job in status.jobs]
    lines += [f"queue       evaluation: {_format_job(job)}" for job in status.evaluations]
    lines += [f"progress    {line}" for line in _format_progress(status)]
    lines += _format_time(status.history)
    if status.failed_nodes:
        lines.append(f"failed      {', '.join(status.failed_nodes)} (submit --exclude-failed avoids them)")
    if status.attempts:
        lines += ["", _format_attempts(status.attempts)]
    return "\n".join(lines)


def _format_job(job: Job) -> str:
    if job.state == "PENDING":
        start = "" if job.start in ("", "N/A") else f", expected to start {job.start}"
        return f"job {job.job_id} waits for {job.num_nodes} node(s): {job.reason}{start}"
    return f"job {job.job_id} {job.state} on {job.nodes} for {job.elapsed} of {job.time_limit}"


def _format_progress(status: RunStatus) -> list[str]:
    history = status.history
    total = "?" if history.total_steps is None else f"{history.total_steps:,}"
    share = f" ({history.step / history.total_steps:.1%})" if history.total_steps else ""
    line = f"step {history.step:,} of {total}{share}; newest checkpoint: "
    line += f"step {history.checkpoint_step:,}" if history.checkpoint_step else "none"
    if history.save_s is not None:
        line += f", which took {format_duration(history.save_s)}"
    lines = [line]
    if history.samples_per_s:
        line = f"{history.samples_per_s:,.0f} samples/s with {history.world_size or '?'} process(es)"
        if history.remaining_s:
            line += f"; {format_duration(history.remaining_s)} of steps left"
            line += _compare_with_limit(status, history.remaining_s)
        lines.append(line)
    return lines


def _compare_with_limit(status: RunStatus, remaining_s: float) -> str:
    running = next((job for job in status.jobs if job.state == "RUNNING"), None)
    left_s = parse_duration_s(running.time_left) if running else None
    if running is None or left_s is None:
        return ""
    if remaining_s <= left_s:
        return f", and {running.time_left} of the time limit"
    limit_s = parse_duration_s(running.time_limit) or left_s
    more = -(-(remaining_s - left_s) // max(limit_s, 1.0))
    return f", but only {running.time_left} of the time limit: about {more:.0f} more attempt(s)"


def _format_time(history: History) -> list[str]:
    ledger = history.ledger
    if not ledger.wall_s:
        return []
    shares = [
        f"{seconds / ledger.wall_s:.1%} {CATEGORIES[name]}"
        for name, seconds in sorted(ledger.seconds.items(), key=lambda item: -item[1])
        if seconds >= 0.0005 * ledger.wall_s
    ]
    lines = [f"time        {format_duration(ledger.wall_s)}, goodput {ledger.goodput:.1%}: {', '.join(shares)}"]
    lost = []
    if ledger.seconds["restart"] > 0:
        lost.append(f"{format_duration(ledger.seconds['restart'])} queued and between attempts")
    if ledger.recomputed_steps:
        recomputed = format_duration(ledger.seconds["recomputed"])
        lost.append(f"{recomputed} for {ledger.recomputed_steps:,} steps taken again")
    if lost:
        lines.append(f"lost        {', '.join(lost)}")
    return lines


def _format_attempts(attempts: list[AttemptStatus]) -> str:
    header = ["attempt", "job", "restart", "nodes", "started", "duration", "steps", "exit", "outcome"]
    lines = [
        [
            str(number),
            attempt.job_id or "-",
            str(attempt.restart) if attempt.job_id else "-",
            _format_nodes(attempt.nodes),
            datetime.fromtimestamp(attempt.begin_s).strftime("%Y-%m-%d %H:%M:%S"),
            _format_span(attempt),
            "-" if attempt.first_step is None else f"{attempt.first_step}-{_or_unknown(attempt.last_step)}",
            "-" if attempt.exit_code is None else str(attempt.exit_code),
            attempt.outcome,
        ]
        for number, attempt in enumerate(attempts, start=1)
    ]
    return format_columns(header, lines)


def _format_span(attempt: AttemptStatus) -> str:
    if attempt.end_s is None and attempt.outcome != "running":
        return "?"
    return format_duration(max(0.0, (attempt.end_s or time.time()) - attempt.begin_s))


def _or_unknown(value: int | None) -> str:
    return "?" if value is None else str(value)


def _format_nodes(nodes: tuple[str, ...]) -> str:
    shown = ",".join(nodes[:_MAX_NODES_SHOWN]) or "-"
    return shown if len(nodes) <= _MAX_NODES_SHOWN else f"{shown},+{len(nodes) - _MAX_NODES_SHOWN}"


def format_overview(statuses: list[RunStatus]) -> str:
    """A line for each run of a sweep."""
    header = ["run", "state", "step", "of", "attempts", "goodput", "left"]
    lines = []
    for status in statuses:
        history = status.history
        left = "" if not history.remaining_s else format_duration(history.remaining_s)
        goodput = f"{history.ledger.goodput:.1%}" if history.ledger.wall_s else ""
        total = _or_unknown(history.total_steps)
        cells = [
            status.run_dir.name,
            status.state,
            str(history.step),
            total,
            str(len(status.attempts)),
            goodput,
            left,
        ]
        lines.append(cells)
    return format_columns(header, lines)

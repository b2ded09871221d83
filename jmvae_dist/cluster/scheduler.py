"""What Slurm says about jobs and nodes, through its own commands."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path

logger = logging.getLogger(__name__)

# States of a node that nothing runs on, and the marks that Slurm appends to one that does not answer.
_FAILED_STATES = re.compile(r"DOWN|FAIL|NOT_RESPONDING|REBOOT|\*")
_COMMAND_TIMEOUT_S = 30.0
_SQUEUE_FIELDS = "%i|%T|%M|%l|%L|%D|%N|%S|%r"


@dataclass(frozen=True)
class Job:
    """A job that Slurm has in its queue.

    Attributes:
        job_id: `12`, or `12_3` for a task of an array.
        state: PENDING, RUNNING, COMPLETING, ...
        elapsed: How long it has run, as Slurm writes durations.
        time_limit: The same for its limit.
        time_left: The same for the rest.
        num_nodes: Number of nodes, as text.
        nodes: Node list; empty while it waits.
        start: When it started, or is expected to; `N/A` if Slurm does not know.
        reason: Why it waits; `None` otherwise.
    """

    job_id: str
    state: str
    elapsed: str
    time_limit: str
    time_left: str
    num_nodes: str
    nodes: str
    start: str
    reason: str


def has_slurm() -> bool:
    """Whether Slurm's commands are on PATH."""
    return shutil.which("squeue") is not None and shutil.which("scontrol") is not None


def list_jobs(folder: Path | None = None) -> list[Job] | None:
    """Jobs in the queue: waiting, running, or on their way out; None if Slurm is not here, or does not answer.

    Args:
        folder: Those of its owner, too; else the user's own.
    """
    if not has_slurm():
        return None
    users = {os.getuid()}
    if folder is not None:
        with contextlib.suppress(OSError):
            users.add(folder.stat().st_uid)
    chosen = f"--user={','.join(map(str, sorted(users)))}"
    text = _run("squeue", chosen, "--array", "--noheader", f"--format={_SQUEUE_FIELDS}")
    if text is None:
        return None
    rows = [[field.strip() for field in line.split("|", 8)] for line in text.splitlines()]
    return [Job(*row) for row in rows if len(row) == len(fields(Job))]


def choose_jobs(jobs: Sequence[Job], job_ids: Sequence[str]) -> list[Job]:
    """Those of `jobs` that are named: by number, a task of an array as `12_3`, all of its tasks as `12`."""
    return [job for job in jobs if job.job_id in job_ids or job.job_id.partition("_")[0] in job_ids]


def gpus_of_partition(partition: str | None) -> int | None:
    """GPUs of each node of a partition, by default of the default one; None if its nodes differ, or it is unknown."""
    counts = set()
    for line in ask("sinfo", "--noheader", "--format=%P|%G").splitlines():
        name, _, resources = line.strip().partition("|")
        if name.endswith("*") if partition is None else name.rstrip("*") in partition.split(","):
            counts.add(count_gpus(resources))
    return counts.pop() if len(counts) == 1 else None


def count_gpus(resources: str) -> int:
    """GPUs in a list of generic resources, such as `gpu:2`, `gpu:a100:8(S:0-1),tmp:5` or `(null)`."""
    found = re.findall(r"(?:^|,)(?:gres[:/])?gpu(?::[^:,(]*[^:,(\d][^:,(]*)?(?::(\d+))?(?=[,(]|$)", resources)
    return sum(int(count or 1) for count in found)


def job_fields(job_id: str) -> dict[str, str]:
    """What `scontrol show job` says of a job; empty if it does not answer."""
    text = ask("scontrol", "show", "job", job_id, "--oneliner")
    return _parse_fields(text.splitlines()[0]) if text else {}


def find_failed_nodes(nodes: Sequence[str], since_s: float) -> tuple[str, ...]:
    """Those of `nodes` that do not work now, or have started anew since then."""
    if not nodes:
        return ()
    failed = []
    for line in ask("scontrol", "show", "node", ",".join(nodes), "--oneliner").splitlines():
        node = _parse_fields(line)
        if _FAILED_STATES.search(node.get("State", "")) or parse_time_s(node.get("SlurmdStartTime", "")) > since_s:
            failed.append(node.get("NodeName", "?"))
    return tuple(failed)


def _parse_fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", line))


def parse_time_s(text: str) -> float:
    """A time of Slurm's, which is local and without a zone, as seconds since the epoch; 0 if there is none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


def ask(*command: str) -> str:
    """Output of a Slurm command; empty if it fails, since what it would add must not end a run."""
    return _run(*command) or ""


def _run(*command: str) -> str | None:
    """Output of a Slurm command; None if it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("%s: %s", " ".join(command), error)
        return None
    return result.stdout if result.returncode == 0 else None

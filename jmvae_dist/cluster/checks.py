"""What can be known about a job before it is submitted, as rows of a table; what cannot work raises."""

from __future__ import annotations

import shutil
from pathlib import Path

from jmvae_dist.cluster.attempts import newest_step
from jmvae_dist.cluster.doctor.table import Row
from jmvae_dist.cluster.history import History, read_history
from jmvae_dist.cluster.scheduler import choose_jobs, list_jobs
from jmvae_dist.cluster.site import find_python_problem
from jmvae_dist.cluster.submission import Job, ask_sbatch, submitted_jobs
from jmvae_dist.cluster.sweep import check_rows
from jmvae_dist.config_io import parse_run_config
from jmvae_dist.errors import LaunchError
from jmvae_dist.progress import format_bytes, format_duration
from jmvae_dist.training.setup import ResolvedRun, resolve_run, summarize

# Slurm looks at its clock every 30 s: USR1 may come that much late, and the end that much early.
_TICK_S = 30.0


def check_job(job: Job, table: Path | None, like: Path | None) -> list[Row]:
    """Check a job.

    Args:
        job: What would be submitted.
        table: Of its sweep.
        like: A former run that tells the speed of one that has no past.

    Raises:
        ConfigError: Configuration, table or number of processes are wrong.
        DataError: A manifest is damaged.
        LaunchError: The run is in the queue already, or sbatch refuses the job.
    """
    world_size = job.max_ranks or 1
    if job.rows:
        assert table is not None
        check_rows(table, job.rows, world_size)
        # One stands for all: they may differ in anything, but seldom differ in size.
        run = resolve_run(parse_run_config(job.rows[0].arguments), world_size)
    else:
        run = resolve_run(parse_run_config(list(job.script.arguments)), world_size)
    rows = [
        Row("configuration", "", "pass", summarize(run, world_size).splitlines()[0] + _of_sweep(job)),
        _check_site(job),
        _check_ranks(job, run),
        _check_queue(job),
    ]
    if not job.rows:
        history = read_history(job.folder)
        rows += [_check_time(job, run, history, like), _check_lead(job, history)]
    rows.append(_check_space(job, run))
    if job.excluded:
        rows.append(Row("failed nodes", "", "pass", f"avoids {', '.join(job.excluded)}, which failed before"))
    if shutil.which("sbatch") is None:
        rows.append(Row("sbatch", "", "warn", "not on PATH: its options were not checked", "use a login node"))
    else:
        rows.append(Row("sbatch", "", "pass", ask_sbatch(job.script, job.folder).removeprefix("sbatch: ")))
    return rows


def _of_sweep(job: Job) -> str:
    return f"; {len(job.rows)} rows, all checked" if job.rows else ""


def _check_site(job: Job) -> Row:
    file = "no slurm/site.env" if job.site.file is None else str(job.site.file)
    problem = find_python_problem()
    if problem is None:
        return Row("site", "", "pass", f"{file}; its Python imports jmvae_dist here")
    return Row("site", "", "warn", problem, "ignore this if it is true only here, not on the nodes")


def _check_ranks(job: Job, run: ResolvedRun) -> Row:
    lanes = run.plan.lanes
    if job.min_ranks is None or job.max_ranks is None:
        found = f"the number of processes is known only in the job; at most {lanes} can share the {lanes} lanes"
        return Row("ranks", "", "warn", found, "give --nodes, and --ntasks-per-node or --gpus-per-node")
    nodes = _range(job.resources.min_nodes, job.resources.max_nodes)
    found = (
        f"{nodes} node(s) x {job.ranks_per_node} = {_range(job.min_ranks, job.max_ranks)} process(es), {lanes} lanes"
    )
    if lanes % job.max_ranks:
        shares = f"{lanes // job.max_ranks} or {-(-lanes // job.max_ranks)}"
        found += f": {shares} lanes each, and all wait for those with more"
        divisors = [number for number in range(1, lanes + 1) if lanes % number == 0]
        return Row(
            "ranks", "", "warn", found, f"equal shares: {', '.join(map(str, divisors))} processes, or data.lanes"
        )
    return Row("ranks", "", "pass", found)


def _range(first: int | None, last: int | None) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _check_queue(job: Job) -> Row:
    queue = list_jobs(job.folder)
    if queue is None:
        found = f"squeue is not here, or does not answer: whether a job of {job.folder} is in the queue is not known"
        return Row("queue", "", "warn", found, "use a login node; two jobs cannot train in one directory")
    waiting = choose_jobs(queue, submitted_jobs(job.folder))
    if not waiting:
        return Row("queue", "", "pass", f"no job of {job.folder} is in the queue")
    first = waiting[0]
    found = f"job {first.job_id} of {job.folder} is {first.state}"
    if "dependency" in job.directives:
        return Row("queue", "", "pass", f"{found}; this one has --dependency={job.directives['dependency']}")
    raise LaunchError(
        f"{found}; two jobs cannot train in one directory: wait for it, `scancel {first.job_id}` it, or continue it "
        f"with --dependency=afterany:{first.job_id}"
    )


def _check_time(job: Job, run: ResolvedRun, history: History, like: Path | None) -> Row:
    limit = f"time limit {job.directives['time']}" if job.directives.get("time") else "time limit of the partition"
    source, speed = history, "of its last attempt"
    if source.samples_per_s is None and like is not None:
        source, speed = read_history(like), f"of {like}"
    remaining_steps = max(0, run.total_steps - max(0, newest_step(job.folder)))
    if not remaining_steps:
        return Row("time", "", "warn", "the run is complete", "raise training.steps or training.epochs to go on")
    if not source.samples_per_s:
        found = f"{limit}; how long {remaining_steps:,} steps take is not known yet"
        return Row("time", "", "pass", f"{found} (--like RUN compares with a former run)")
    expected_s = remaining_steps * run.config.training.global_batch_size / source.samples_per_s
    found = f"{limit}; {remaining_steps:,} steps take about {format_duration(expected_s)} at the speed {speed}: "
    found += f"{source.samples_per_s:,.0f} samples/s with {source.world_size} process(es)"
    if job.time_limit_s is None or expected_s <= job.time_limit_s - (job.lead_s or 0):
        return Row("time", "", "pass", found)
    useful_s = job.time_limit_s - (job.lead_s or 0)
    if useful_s <= 0:
        return Row("time", "", "warn", f"{found}; the run is asked to stop at once", "raise --time, or lower --lead")
    return Row(
        "time", "", "pass", f"{found}: about {-(-expected_s // useful_s):.0f} attempts, requeued by themselves"
    )


def _check_lead(job: Job, history: History) -> Row:
    if job.lead_s is None:
        found = "the run is not asked to stop before its time limit: what comes after its last checkpoint is lost"
        return Row("lead time", "", "warn", found, "--lead SECONDS")
    if job.time_limit_s is not None and job.time_limit_s <= job.lead_s + _TICK_S:
        found = f"USR1 comes {job.lead_s} s before a limit of {job.directives['time']}: nearly at the start"
        return Row("lead time", "", "warn", found, "raise --time, or lower --lead")
    if history.save_s is None:
        return Row("lead time", "", "pass", f"USR1 comes {job.lead_s} s before the time limit")
    needed_s = 2 * history.save_s + 2 * _TICK_S
    found = (
        f"USR1 comes {job.lead_s} s before the time limit; the last checkpoint took {format_duration(history.save_s)}"
    )
    if job.lead_s < needed_s:
        advice = f"--lead {needed_s:.0f}: twice that, and the {_TICK_S:.0f} s by which Slurm is late or early"
        return Row("lead time", "", "warn", found, advice)
    return Row("lead time", "", "pass", found)


def _check_space(job: Job, run: ResolvedRun) -> Row:
    from jmvae_dist.cluster.doctor.job import BYTES_PER_PARAMETER, count_checkpoints, count_parameters

    each, count = BYTES_PER_PARAMETER * count_parameters(run), count_checkpoints(run)
    folders = [row.run_dir for row in job.rows] or [job.folder]
    needed = max(0, each * count * len(folders) - sum(_size(folder / "checkpoints") for folder in folders))
    free = shutil.disk_usage(job.folder).free
    found = f"{count} checkpoints of {format_bytes(each)}{f' for each of {len(folders)} rows' if job.rows else ''}: "
    found += f"{format_bytes(needed)} more, {format_bytes(free)} free in {job.folder} (a quota may be lower)"
    if needed > free:
        return Row("disk space", "", "warn", found, "free space, lower checkpoint.keep_last, or another output_dir")
    return Row("disk space", "", "pass", found)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("step-*/*") if path.is_file())

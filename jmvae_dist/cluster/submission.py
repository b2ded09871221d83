"""From what a user asks for to a job in the queue: the batch script, its header and arguments, and sbatch."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jmvae_dist.cluster.attempts import read_attempts
from jmvae_dist.cluster.resources import Resources, parse_duration_s
from jmvae_dist.cluster.scheduler import gpus_of_partition
from jmvae_dist.cluster.script import (
    BatchScript,
    Directives,
    closest_variable,
    directives_of_variables,
    escape_file_name,
    read_directives,
)
from jmvae_dist.cluster.site import SITE_VARIABLE, Site, count_ranks_per_node, read_site, repository
from jmvae_dist.cluster.sweep import SweepRow, read_sweep
from jmvae_dist.config_io import parse_run_config
from jmvae_dist.data.urls import scheme_of
from jmvae_dist.errors import ConfigError, LaunchError
from jmvae_dist.files import write_text_atomic

logger = logging.getLogger(__name__)

_SBATCH_TIMEOUT_S = 120.0
# What sbatch itself needs; the rest of a surrounding job's variables would become those of the new job.
_SLURM_VARIABLES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
_OF_EVALUATION = "-evaluate"
# Say when and how the training runs, and nothing about an evaluation after it.
_OF_TRAINING = ("signal", "array", "dependency", "begin", "job-name", "output", "error")


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        options: Of sbatch.
        training: Arguments of `train`.
        lead_s: Seconds before the time limit at which the run is asked to stop; None leaves the script's.
        excludes_failed: Avoid nodes that failed former attempts.
        table: Of a sweep.
    """

    options: Directives
    training: list[str]
    lead_s: int | None = None
    excludes_failed: bool = False
    table: Path | None = None


@dataclass(frozen=True)
class Job:
    """A job that could be submitted.

    Attributes:
        script: Its batch script.
        folder: The run directory; for a sweep the directory of all of them.
        rows: Of the sweep.
        site: The site's settings.
        directives: All options of the header.
        resources: What they ask for.
        ranks_per_node: None if it depends on the node.
        excluded: Nodes left out because they failed.
    """

    script: BatchScript
    folder: Path
    site: Site
    directives: Directives
    resources: Resources
    ranks_per_node: int | None
    rows: list[SweepRow] = field(default_factory=list)
    excluded: tuple[str, ...] = ()

    @property
    def min_ranks(self) -> int | None:
        """Fewest processes that the job may get; None if unknown."""
        return _times(self.resources.min_nodes, self.ranks_per_node)

    @property
    def max_ranks(self) -> int | None:
        """Most processes that the job may get; None if unknown."""
        return _times(self.resources.max_nodes, self.ranks_per_node)

    @property
    def time_limit_s(self) -> float | None:
        """Seconds; None without a limit of its own."""
        return parse_duration_s(self.directives.get("time") or "")

    @property
    def lead_s(self) -> int | None:
        """Seconds between the request to stop and the time limit."""
        match = re.fullmatch(r"B:USR1@(\d+)", self.directives.get("signal") or "")
        return int(match[1]) if match else None


def _times(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first * second


def make_job(request: Request) -> Job:
    """Read everything that the job depends on, and make its script; the run directory gets a folder for its logs.

    Raises:
        ConfigError: Options, site, configuration or table are wrong.
        LaunchError: The run directory cannot be written.
    """
    root = repository()
    arguments = _with_config(request.training)
    rows: list[SweepRow] = []
    if request.table is None:
        folder = Path(parse_run_config(arguments).output_dir).expanduser().absolute()
        template = root / "slurm" / "train.sbatch"
    else:
        rows = read_sweep(request.table, arguments)
        folder = rows[0].run_dir.parent.absolute()
        template = root / "slurm" / "sweep.sbatch"
        if len(arguments) < 2 or arguments[0] != "--config":
            raise ConfigError("a sweep's arguments begin with --config FILE")
    # Slurm does not make the folder of --output: the job would fail without a word.
    _make_folder(folder / "slurm")
    site = read_site()
    of_site, unknown = directives_of_variables(site.sbatch)
    for name in unknown:
        close = closest_variable(name)
        hint = f"; did you mean {close}?" if close else ""
        logger.warning("%s is no variable that sbatch reads%s", name, hint)
    failed = find_failed_nodes([folder, *(row.run_dir for row in rows)]) if request.excludes_failed else ()
    own = _own_directives(request, folder, rows, failed)
    directives = {**read_directives(template), **of_site, **own}
    resources = Resources.of(directives)
    fixed = [*arguments[1:2], str(request.table.absolute()), *arguments[2:]] if request.table else arguments
    return Job(
        script=BatchScript(template, {**of_site, **own}, fixed, _variables(root)),
        folder=folder,
        site=site,
        directives=directives,
        resources=resources,
        ranks_per_node=_ranks_per_node(site, resources, directives),
        rows=rows,
        excluded=failed,
    )


def _with_config(training: list[str]) -> list[str]:
    """Arguments of `train`; the first may be a file without `--config`, as for slurm/train.sbatch."""
    if not training:
        raise ConfigError("which training? jmvae-dist slurm submit [options of sbatch] -- --config configs/x.yaml")
    return training if training[0].startswith("-") else ["--config", *training]


def _own_directives(request: Request, folder: Path, rows: list[SweepRow], failed: tuple[str, ...]) -> Directives:
    options = dict(request.options)
    if "wrap" in options:
        raise ConfigError("--wrap: the script is given; arguments of the training come after --")
    if request.lead_s is not None:
        if "signal" in options:
            raise ConfigError("--lead and --signal: give one of them")
        options["signal"] = f"B:USR1@{request.lead_s}"
    if not re.fullmatch(r"B:USR1@\d+", options.get("signal") or "B:USR1@0"):
        raise ConfigError(f"--signal: {options['signal']!r}: the script needs B:USR1@SECONDS; or use --lead SECONDS")
    if rows:
        options["array"] = _array(options.get("array"), len(rows))
    elif "array" in options:
        raise ConfigError("--array: only for sweeps, with --sweep TABLE")
    if failed:
        options["exclude"] = ",".join(dict.fromkeys([*(options.get("exclude") or "").split(","), *failed])).strip(",")
    pattern = "%A_%a.out" if rows else "%j.out"
    return {
        "job-name": folder.name,
        "chdir": os.getcwd(),
        "output": f"{escape_file_name(folder / 'slurm')}/{pattern}",
        **options,
    }


def _array(text: str | None, num_rows: int) -> str:
    """All rows by default; `%4` runs all of them, four at a time."""
    text = text or ""
    if not text or text.startswith("%"):
        text = f"1-{num_rows}{text}"
    numbers = [int(number) for number in re.findall(r"\d+", re.sub(r"[%:]\d+", "", text))]
    if not numbers or min(numbers) < 1 or max(numbers) > num_rows:
        raise ConfigError(f"--array: {text!r} must name rows 1 to {num_rows} of the table, such as 1-{num_rows}%4")
    return text


def _variables(root: Path) -> dict[str, str]:
    variables = {"JMVAE_DIST_ROOT": str(root)}
    if site := os.environ.get(SITE_VARIABLE):
        variables[SITE_VARIABLE] = os.path.abspath(site)
    return variables


def _ranks_per_node(site: Site, resources: Resources, directives: Directives) -> int | None:
    is_given = bool(site.settings["RANKS_PER_NODE"]) or resources.ntasks_per_node is not None
    takes_all = "exclusive" in directives and "oversubscribe" not in directives
    if not is_given and resources.gpus_per_node == 0 and takes_all:
        # Whole nodes come with all their GPUs.
        resources = replace(resources, gpus_per_node=gpus_of_partition(directives.get("partition")))
    if not is_given and resources.gpus_per_node is None:
        return None
    return count_ranks_per_node(site, resources)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"output_dir: {folder} cannot be made ({error.strerror})") from None


def find_failed_nodes(run_dirs: Iterable[Path]) -> tuple[str, ...]:
    """Nodes that failed an attempt at one of these runs."""
    attempts = [attempt for run_dir in run_dirs for attempt in read_attempts(run_dir)]
    return tuple(dict.fromkeys(node for attempt in attempts for node in attempt.failed_nodes))


def submitted_jobs(folder: Path) -> list[str]:
    """Numbers of the trainings that were submitted for this directory, or have run there."""
    scripts = [path.stem for path in (folder / "slurm").glob("*.sbatch")]
    numbers = [name for name in scripts if name.isdigit()] + [attempt.job_id for attempt in read_attempts(folder)]
    return list(dict.fromkeys(numbers))


def submitted_evaluations(folder: Path) -> list[str]:
    """Numbers of the evaluations that were submitted for this directory."""
    return [path.name.partition("-")[0] for path in (folder / "slurm").glob(f"*{_OF_EVALUATION}.sbatch")]


def evaluation_after(job: Job, job_id: str, manifest: str) -> BatchScript:
    """The script that evaluates the run when the job is complete, with the same resources.

    Args:
        job: The training.
        job_id: Its number.
        manifest: Path or URL of the manifest of held-out shards.
    """
    kept = {name: value for name, value in job.script.directives.items() if name not in _OF_TRAINING}
    own: Directives = {
        "job-name": f"{job.folder.name}-evaluate",
        "output": f"{escape_file_name(job.folder / 'slurm')}/%j.out",
        "dependency": f"afterok:{job_id}",
    }
    template = repository() / "slurm" / "evaluate.sbatch"
    location = os.path.abspath(manifest) if scheme_of(manifest) is None else manifest
    arguments = [str(job.folder), "--manifest", location]
    return BatchScript(template, {**kept, **own}, arguments, job.script.variables)


def submit(script: BatchScript, folder: Path) -> str:
    """Hand a script to sbatch; returns the job's number. A copy is in `folder`.

    It is `slurm/12.sbatch`, or `slurm/12-evaluate.sbatch` for an evaluation.

    Raises:
        LaunchError: There is no sbatch, or it refuses.
    """
    with _written(script, folder) as path:
        output = _run_sbatch(["--parsable", str(path)])
        job_id = output.splitlines()[-1].partition(";")[0]
        kind = _OF_EVALUATION if script.template.stem == "evaluate" else ""
        os.replace(path, folder / "slurm" / f"{job_id}{kind}.sbatch")
    return job_id


def ask_sbatch(script: BatchScript, folder: Path) -> str:
    """What sbatch says about a script that it does not submit: when and where it would start.

    Raises:
        LaunchError: There is no sbatch, or it refuses.
    """
    with _written(script, folder) as path:
        return _run_sbatch(["--test-only", str(path)])


@contextlib.contextmanager
def _written(script: BatchScript, folder: Path) -> Iterator[Path]:
    path = folder / "slurm" / f".submit-{os.getpid()}.sbatch"
    write_text_atomic(path, script.render())
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _run_sbatch(arguments: Sequence[str]) -> str:
    """Output of sbatch, with the header of the script as its only options.

    Raises:
        LaunchError: There is no sbatch, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise LaunchError("sbatch is not on PATH; run this on a login node of the cluster")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SBATCH_")) or name in _SLURM_VARIABLES
    }
    try:
        result = subprocess.run(
            ["sbatch", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_SBATCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(f"sbatch did not answer within {_SBATCH_TIMEOUT_S:g} s") from None
    said = " ".join(line.strip() for line in result.stderr.splitlines() if line.strip())
    if result.returncode != 0:
        raise LaunchError(f"sbatch refuses the job: {said or f'exit code {result.returncode}'}")
    return result.stdout.strip() or said

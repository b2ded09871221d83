"""`jmvae-dist slurm`: what batch scripts and their users need."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jmvae_dist.commands.cli import make_parser
from jmvae_dist.config_io import parse_run_config
from jmvae_dist.errors import ConfigError

if TYPE_CHECKING:
    from jmvae_dist.cluster.submission import Job


def main(argv: list[str]) -> int:
    """Run one subcommand.

    Raises:
        ConfigError: The command line, the training's configuration or the site's settings are wrong.
        LaunchError: The job may not go on, or cannot be submitted.
    """
    parser = make_parser("jmvae-dist slurm", "Run under Slurm: check, submit and follow batch jobs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    _add_submit(
        commands, "render", "check everything, and print the batch script that `submit` would submit", _render
    )
    _add_submit(commands, "submit", "check everything, and submit a training, or a sweep", _submit)
    _add_status(commands)
    _add_sweep(commands)
    _add_begin(commands)
    _add_end(commands)
    # What comes after -- is for `train`; its options must not be taken for ours.
    end = argv.index("--") if "--" in argv else len(argv)
    options, others = parser.parse_known_args(argv[:end])
    options.training = argv[end + 1 :]
    if others and options.command not in ("render", "submit"):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if options.training and options.command in ("status", "end"):
        parser.error(f"unrecognized arguments: {' '.join(options.training)}")
    options.sbatch = others
    return options.run(options)


# Submission


def _add_submit(commands: Any, name: str, summary: str, run: Any) -> None:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        usage=f"jmvae-dist slurm {name} [options] [any options of sbatch] -- --config FILE [--section.key value ...]",
        epilog="All other options before -- are those of sbatch, such as --nodes 4 --time 2:00:00 --partition gpu; "
        "they go before those of slurm/site.env.",
    )
    parser.add_argument(
        "--lead", metavar="SECONDS", type=int, help="stop so long before the time limit (default: 300)"
    )
    parser.add_argument("--exclude-failed", action="store_true", help="avoid nodes that failed former attempts")
    parser.add_argument(
        "--sweep", metavar="TABLE", type=Path, help="one task per row; --array chooses, or %%4 throttles"
    )
    parser.add_argument("--like", metavar="RUN", type=Path, help="a former run, to tell how long this one will take")
    help_text = "then evaluate, in a job of its own (submit only)"
    parser.add_argument("--evaluate", metavar="MANIFEST", help=help_text)
    parser.set_defaults(run=run)


def _prepare(options: argparse.Namespace) -> Job:
    """Make the job, check it, and show on standard error what was found."""
    from jmvae_dist.cluster.checks import check_job
    from jmvae_dist.cluster.doctor.table import print_table
    from jmvae_dist.cluster.script import parse_sbatch_options
    from jmvae_dist.cluster.submission import Request, make_job

    if options.lead is not None and options.lead < 1:
        raise ConfigError(f"--lead: {options.lead} must be at least 1")
    if options.like is not None and not options.like.is_dir():
        raise ConfigError(f"--like: {options.like}: no such run directory")
    request = Request(
        options=parse_sbatch_options(options.sbatch),
        training=options.training,
        lead_s=options.lead,
        excludes_failed=options.exclude_failed,
        table=options.sweep,
    )
    job = make_job(request)
    print_table(check_job(job, options.sweep, options.like), sys.stderr)
    return job


def _render(options: argparse.Namespace) -> int:
    if options.evaluate is not None:
        raise ConfigError("--evaluate: for submit only, since it needs the training's job; see slurm/evaluate.sbatch")
    print(_prepare(options).script.render(), end="")
    return 0


def _submit(options: argparse.Namespace) -> int:
    from jmvae_dist.cluster.submission import evaluation_after, submit

    if options.evaluate is not None:
        _check_evaluation(options)
    job = _prepare(options)
    job_id = submit(job.script, job.folder)
    print(f"submitted job {job_id}")
    if options.evaluate is not None:
        evaluation_id = submit(evaluation_after(job, job_id, options.evaluate), job.folder)
        print(f"submitted job {evaluation_id}, which evaluates when job {job_id} is complete")
    folder = shlex.quote(str(job.folder))
    print(f"follow it: jmvae-dist slurm status {folder}")
    print(f"log: tail -F {folder}/slurm/{job_id}{'_1' if job.rows else ''}.out")
    print(f"stop it for good: scancel {job_id}{f' (one row: scancel {job_id}_1)' if job.rows else ''}")
    return 0


def _check_evaluation(options: argparse.Namespace) -> None:
    from jmvae_dist.data.manifest import Manifest

    if options.sweep is not None:
        raise ConfigError("--evaluate: not with --sweep; set evaluation.every_steps, or data.eval_manifest")
    Manifest.load(options.evaluate)


# Status


def _add_status(commands: Any) -> None:
    summary = "where a run stands: queue, attempts, progress, time lost; for a sweep, a line for each run"
    parser = commands.add_parser("status", help=summary, description=summary)
    parser.add_argument("folder", metavar="RUN", type=Path, help="run directory, or the output_dir of a sweep")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_status)


def _status(options: argparse.Namespace) -> int:
    import json

    from jmvae_dist.cluster.scheduler import list_jobs
    from jmvae_dist.cluster.status import find_runs, format_overview, format_status, read_status

    queue = list_jobs(options.folder)
    statuses = [read_status(run_dir, queue) for run_dir in find_runs(options.folder)]
    is_single = statuses[0].run_dir == options.folder
    if options.json:
        values = [status.to_json() for status in statuses]
        print(json.dumps(values[0] if is_single else values, indent=2))
    else:
        print(format_status(statuses[0]) if is_single else format_overview(statuses))
    return 0


# Sweeps


def _add_sweep(commands: Any) -> None:
    summary = "for sweeps: check all rows of a table, or write their summary; `row` is for slurm/sweep.sbatch"
    parser = commands.add_parser("sweep", help=summary, description=summary)
    whats = parser.add_subparsers(dest="what", required=True, metavar="check|summary|row")
    for name, help_text, run in (
        ("check", "check the configuration of every row", _sweep_check),
        ("summary", "write and print <output_dir>/sweep.tsv", _sweep_summary),
        ("row", "for batch scripts: print a row's arguments, each with a NUL; nothing if it is complete", _sweep_row),
    ):
        subparser = whats.add_parser(name, help=help_text, description=help_text)
        subparser.add_argument("table", metavar="TABLE", type=Path, help="TSV or CSV; its first line: settings")
        if name == "row":
            subparser.add_argument("number", metavar="N", type=int, help="number of the row, from 1")
        if name != "summary":
            subparser.add_argument("--ranks", metavar="N", type=int, default=1, help="processes that will train")
        else:
            subparser.add_argument("--if-done", action="store_true", help="print it only when no row is left to do")
        subparser.set_defaults(run=run)


def _sweep_check(options: argparse.Namespace) -> int:
    from jmvae_dist.cluster.sweep import check_rows, read_sweep

    rows = read_sweep(options.table, options.training)
    check_rows(options.table, rows, options.ranks)
    for row in rows:
        print(f"{row.number:>4}  {row.run_dir}  {' '.join(f'{key}={value}' for key, value in row.settings.items())}")
    print(f"{len(rows)} rows; all are valid for {options.ranks} process(es)")
    return 0


def _sweep_row(options: argparse.Namespace) -> int:
    from jmvae_dist.cluster.sweep import check_row, is_complete, read_sweep

    rows = read_sweep(options.table, options.training)
    if not 1 <= options.number <= len(rows):
        raise ConfigError(
            f"{options.table}: there is no row {options.number}; it has 1 to {len(rows)}, so --array must"
        )
    row = rows[options.number - 1]
    check_row(options.table, row)
    if is_complete(row, options.ranks):
        print(f"slurm: row {row.number} ({row.run_dir}) is complete", file=sys.stderr)
        return 0
    print(f"slurm: row {row.number}: {row.run_dir}", file=sys.stderr)
    sys.stdout.write("".join(f"{argument}\0" for argument in row.arguments))
    return 0


def _sweep_summary(options: argparse.Namespace) -> int:
    from jmvae_dist.cluster.sweep import is_done, print_summary, read_sweep, write_summary

    rows = read_sweep(options.table, options.training)
    path, outcomes = write_summary(rows)
    num_done = sum(is_done(outcome) for outcome in outcomes)
    if num_done == len(rows) or not options.if_done:
        print_summary(rows, outcomes)
    print(f"{num_done} of {len(rows)} rows have ended; all values: {path}", flush=True)
    return 0


# For slurm/train.sbatch


def _add_begin(commands: Any) -> None:
    summary = "for batch scripts: check everything, note an attempt, print the run directory"
    parser = commands.add_parser("begin", help=summary, description=summary)
    parser.add_argument("--ranks", metavar="N", type=int, required=True, help="processes that will train")
    parser.add_argument("--max-attempts", metavar="N", type=int, default=3, help="in a row, without a new checkpoint")
    parser.set_defaults(run=_begin)


def _begin(options: argparse.Namespace) -> int:
    from jmvae_dist.cluster.attempts import begin_attempt
    from jmvae_dist.training.setup import resolve_run

    run = resolve_run(parse_run_config(options.training), options.ranks)
    begin_attempt(run.output_dir, max_attempts=options.max_attempts)
    print(run.output_dir.absolute())
    return 0


def _add_end(commands: Any) -> None:
    summary = "for batch scripts: note the attempt's end; print `requeue` or `end`, and which nodes have failed"
    parser = commands.add_parser("end", help=summary, description=summary)
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--exit-code", metavar="N", type=int, required=True, help="of the ranks together")
    parser.add_argument("--max-attempts", metavar="N", type=int, default=3, help="in a row, without a new checkpoint")
    parser.add_argument("--usr1", action="store_true", help="the script has received USR1")
    parser.add_argument("--term", action="store_true", help="the script has received TERM")
    parser.add_argument("--requeue-failed", action="store_true", help="a failure brings the job back")
    parser.set_defaults(run=_end)


def _end(options: argparse.Namespace) -> int:
    from jmvae_dist.cluster.attempts import current_job_id, end_attempt
    from jmvae_dist.cluster.scheduler import job_fields

    attempt = end_attempt(
        options.run_dir,
        exit_code=options.exit_code,
        max_attempts=options.max_attempts,
        got_usr1=options.usr1,
        got_term=options.term,
        job_state=job_fields(current_job_id(os.environ)),
        requeues_failures=options.requeue_failed,
    )
    print("requeue" if attempt.requeued else "end", ",".join(attempt.failed_nodes))
    print(f"slurm: {attempt.reason}; newest checkpoint: step {attempt.end_step}", file=sys.stderr)
    return 0

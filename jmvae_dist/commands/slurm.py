"""`jmvae-dist slurm`: what batch scripts and their users need."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from jmvae_dist.commands.cli import make_parser
from jmvae_dist.config_io import parse_run_config


def main(argv: list[str]) -> int:
    """Run one subcommand.

    Raises:
        ConfigError: The command line or the training's configuration is wrong.
        LaunchError: The job may not go on.
    """
    parser = make_parser("jmvae-dist slurm", "Run under Slurm.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    _add_begin(commands)
    _add_end(commands)
    options = parser.parse_args(argv)
    return options.run(options)


def _add_begin(commands: Any) -> None:
    summary = "for batch scripts: check everything, note an attempt, print the run directory"
    parser = commands.add_parser("begin", help=summary, description=summary)
    parser.add_argument("--ranks", metavar="N", type=int, required=True, help="processes that will train")
    parser.add_argument("--max-attempts", metavar="N", type=int, default=3, help="in a row, without a new checkpoint")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="what `train` will get")
    parser.set_defaults(run=_begin)


def _begin(options: argparse.Namespace) -> int:
    from jmvae_dist.cluster.attempts import begin_attempt
    from jmvae_dist.training.setup import resolve_run

    run = resolve_run(parse_run_config(options.arguments), options.ranks)
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
    )
    print("requeue" if attempt.requeued else "end", ",".join(attempt.failed_nodes))
    print(f"slurm: {attempt.reason}; newest checkpoint: step {attempt.end_step}", file=sys.stderr)
    return 0

"""`jmvae-dist doctor`: check ranks, nodes, network, data and disks before a run, and print one table."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jmvae_dist.commands.cli import check_writable, make_parser
from jmvae_dist.config_io import parse_run_config
from jmvae_dist.errors import EXIT_FAILURE, ConfigError, LaunchError, mark_on_all_ranks

if TYPE_CHECKING:
    from jmvae_dist.cluster.doctor.diagnosis import Doctor
    from jmvae_dist.config import RunConfig

_PROG = "jmvae-dist doctor"
_DESCRIPTION = (
    "Check ranks, nodes, network, data and disks before a run. Start it as the run would be started: plain, with "
    "launch/local.sh, torchrun, accelerate launch, or srun inside an allocation. Exit code 1 if anything failed."
)


def main(arguments: list[str]) -> int:
    """Print the table on rank 0; returns 0 if nothing failed.

    Raises:
        ConfigError: The options or the configuration cannot be read.
        LaunchError: Something failed.
    """
    options, config = _parse(arguments)
    # What torch logs about sockets is in the table, without its pages of stack frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from jmvae_dist.cluster.doctor.diagnosis import Doctor
    from jmvae_dist.distributed.environment import detect_process

    process = detect_process()
    try:
        doctor = Doctor(process, config, options.timeout_s)
    except LaunchError:
        # Without rank 0 nobody can speak for all: one rank of each node does.
        if process.local_rank == 0 or process.rank == 1:
            raise
        return EXIT_FAILURE
    return _examine(doctor, options.json)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, RunConfig | None]:
    parser = make_parser(_PROG, _DESCRIPTION)
    parser.epilog = "without --config, what depends on a run is left out"
    parser.add_argument("--config", action="append", metavar="FILE", help="as for train; so is --section.key VALUE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write rows and the facts behind them there")
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=60.0,
        metavar="S",
        help="longest wait for ranks that have not come, and for the checks of a stage (default: 60)",
    )
    options, rest = parser.parse_known_args(arguments)
    if not (math.isfinite(options.timeout_s) and options.timeout_s > 0):
        raise ConfigError(f"--timeout-s: {options.timeout_s:g} is not allowed; it must be greater than 0")
    if options.json is not None:
        check_writable("--json", options.json)
    files = [argument for file in options.config or [] for argument in ("--config", file)]
    config = parse_run_config([*files, *rest], _PROG) if files or rest else None
    return options, config


def _examine(doctor: Doctor, json_path: Path | None) -> int:
    from jmvae_dist.cluster.doctor.table import print_table
    from jmvae_dist.training.state import write_json

    with doctor.examine() as diagnosis:
        word = None
        if diagnosis is not None:
            print_table(diagnosis.rows)
            word = {"failed": diagnosis.failed, "is_complete": diagnosis.is_complete}
            if json_path is not None:
                write_json(json_path, diagnosis.to_json())
    word = doctor.meeting.part("verdict", word)
    failed = word["failed"]
    message = f"{len(failed)} check(s) failed: {', '.join(failed)}"
    if doctor.hangs:
        # A thread that hangs in the kernel would keep the process from ending.
        if doctor.context.rank == 0:
            print(f"{_PROG}: {message}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(EXIT_FAILURE)
    if not failed:
        return 0
    if word["is_complete"]:
        raise mark_on_all_ranks(LaunchError(message))
    # Launchers wait for ranks that never came or hang, unless another one fails.
    if doctor.context.rank == 0:
        raise LaunchError(message)
    return EXIT_FAILURE

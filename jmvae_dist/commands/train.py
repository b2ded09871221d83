"""`jmvae-dist train`: create or resume the run that a configuration describes."""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING

from jmvae_dist.config_io import CHECK_OPTION, DRY_RUN_OPTION, parse_run_config
from jmvae_dist.errors import ConfigError, PeerError, is_on_all_ranks
from jmvae_dist.training.signals import StopSignals

if TYPE_CHECKING:
    from jmvae_dist.config import RunConfig
    from jmvae_dist.distributed.environment import ProcessInfo
    from jmvae_dist.training.setup import ResolvedRun


def main(arguments: list[str]) -> int:
    """Train; returns 0 when the run is complete, 75 when it was stopped with a checkpoint written."""
    # From here on a scheduler's request to stop is neither lost nor kills a rank that still starts.
    with StopSignals() as signals:
        return _main(arguments, signals)


def _main(arguments: list[str], signals: StopSignals) -> int:
    # Everything up to the runtime is checked without torch and without other processes, so that a mistake is
    # one line after half a second.
    check_only = CHECK_OPTION in arguments
    arguments, dry_run = _take_dry_run([argument for argument in arguments if argument != CHECK_OPTION])
    config = parse_run_config(arguments)
    if dry_run is not None:
        return _plan(config, dry_run)
    from jmvae_dist.distributed.environment import detect_process
    from jmvae_dist.training.setup import check_machine, check_output_dir, resolve_run, summarize

    process = detect_process()
    run = resolve_run(config, process.world_size)
    check_machine(config)
    check_output_dir(run.output_dir)
    # launch/local.sh has checked, and thus said, it before.
    if process.rank == 0 and (check_only or "JMVAE_DIST_EXIT_CODE_FILE" not in os.environ):
        print(summarize(run, process.world_size), flush=True)
    return 0 if check_only else _train(run, process, signals)


def _take_dry_run(arguments: list[str]) -> tuple[list[str], dict[str, int] | None]:
    """The other arguments, and the options of a dry run by name; None without one."""
    kept, options, asked = [], {}, False
    remaining = iter(arguments)
    for argument in remaining:
        name, has_value, value = argument.partition("=")
        if name == DRY_RUN_OPTION and not has_value:
            asked = True
        elif name in (f"{DRY_RUN_OPTION}.ranks", f"{DRY_RUN_OPTION}.samples"):
            text = value if has_value else next(remaining, "")
            if not (text.isascii() and text.isdigit() and int(text) >= 1):
                raise ConfigError(f"{name}: {text!r} is not allowed; it must be an integer and at least 1")
            options[name.rpartition(".")[2]], asked = int(text), True
        else:
            kept.append(argument)
    return kept, options if asked else None


def _plan(config: RunConfig, options: dict[str, int]) -> int:
    from jmvae_dist.distributed.environment import detect_process
    from jmvae_dist.training.dry_run import estimate_run, render

    process = detect_process()
    num_ranks = options.get("ranks", process.world_size)
    estimate = estimate_run(config, num_ranks, options.get("samples"))
    if process.rank == 0:
        print(render(estimate, config))
    return 0


def _train(run: ResolvedRun, process: ProcessInfo, signals: StopSignals) -> int:
    from jmvae_dist.training.assembly import start_run
    from jmvae_dist.training.goodput import AttemptLedger, describe_launch
    from jmvae_dist.training.loop import Trainer
    from jmvae_dist.training.recorder import configure_logging
    from jmvae_dist.training.state import locked_run_directory
    from jmvae_dist.training.watchdog import Watchdog

    training = run.config.training
    configure_logging(process.rank)
    signals.catch_all()
    with (
        start_run(run, process) as runtime,
        locked_run_directory(run.output_dir, runtime),
        Watchdog(
            run.output_dir,
            rank=process.rank,
            world_size=process.world_size,
            attempt=runtime.collectives.broadcast(uuid.uuid4().hex),
            step_timeout_s=training.watchdog.step_timeout_s,
            peer_timeout_s=training.watchdog.peer_timeout_s,
        ) as watchdog,
        AttemptLedger(run.output_dir, describe_launch(runtime), is_main=runtime.is_main) as ledger,
    ):
        try:
            return Trainer(run, runtime, signals, watchdog, ledger).train()
        except RuntimeError as error:
            # Collectives fail with this when a peer has died; their message does not say which.
            lost = None if is_on_all_ranks(error) or process.world_size == 1 else watchdog.describe_lost_peers()
            if lost is None:
                raise
            raise PeerError(lost) from error

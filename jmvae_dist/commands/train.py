"""`jmvae-dist train`: create or resume the run that a configuration describes."""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING

from jmvae_dist.config_io import CHECK_OPTION, parse_run_config
from jmvae_dist.errors import PeerError, is_on_all_ranks
from jmvae_dist.training.signals import StopSignals

if TYPE_CHECKING:
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
    config = parse_run_config([argument for argument in arguments if argument != CHECK_OPTION])
    from jmvae_dist.distributed.environment import detect_process
    from jmvae_dist.training.setup import check_machine, resolve_run, summarize

    process = detect_process()
    run = resolve_run(config, process.world_size)
    check_machine(config)
    # launch/local.sh has checked, and thus said, it before.
    if process.rank == 0 and (check_only or "JMVAE_DIST_EXIT_CODE_FILE" not in os.environ):
        print(summarize(run, process.world_size), flush=True)
    return 0 if check_only else _train(run, process, signals)


def _train(run: ResolvedRun, process: ProcessInfo, signals: StopSignals) -> int:
    from jmvae_dist.distributed.runtime import start_runtime
    from jmvae_dist.training.goodput import AttemptLedger, describe_launch
    from jmvae_dist.training.loop import Trainer
    from jmvae_dist.training.recorder import configure_logging
    from jmvae_dist.training.state import locked_run_directory
    from jmvae_dist.training.watchdog import Watchdog

    training = run.config.training
    configure_logging(process.rank)
    signals.catch_all()
    with (
        start_runtime(
            process,
            device=training.device,
            precision=training.precision,
            engine=training.engine,
            deepspeed_config=run.deepspeed_config,
            timeout_s=training.process_group_timeout_s,
        ) as runtime,
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

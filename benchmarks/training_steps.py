"""Our training step alone, on batches that have been read before, as benchmarks call it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from workload import LOG_EVERY_STEPS, settings

from jmvae_dist.config_io import parse_run_config
from jmvae_dist.data.loader import Batch, TrainLoader
from jmvae_dist.distributed.engine import Engine
from jmvae_dist.distributed.environment import detect_process
from jmvae_dist.distributed.runtime import Runtime, start_runtime
from jmvae_dist.training.assembly import make_engine, make_guard
from jmvae_dist.training.ready_batches import Preparation
from jmvae_dist.training.setup import ResolvedRun, resolve_run
from jmvae_dist.training.step import TrainStep

BATCHES = 8


@contextmanager
def training_steps(
    manifest: Path, global_batch: int, variants: Sequence[Sequence[str]]
) -> Iterator[tuple[Runtime, list[tuple[Callable[[], None], Engine]]]]:
    """Steps of this process, one of the ranks that its launcher started.

    Args:
        manifest: Shards.
        global_batch: Samples per step of all ranks.
        variants: Further options of `jmvae-dist train`, for each step; of one engine.

    Yields:
        The process group, and by variant what takes its next step, and its engine.
    """
    process = detect_process()
    with tempfile.TemporaryDirectory() as folder:
        arguments = settings(manifest, Path(folder) / "run", 1_000_000, global_batch)
        runs = [resolve_run(parse_run_config([*arguments, *more]), process.world_size) for more in variants]
    run = runs[0]
    loader = TrainLoader(
        run.train_manifest, run.plan, rank=process.rank, world_size=process.world_size, views=run.views
    )
    batches = list(loader.iterate(0, BATCHES))
    engine, deepspeed_config = run.config.training.engine, run.deepspeed_config
    with start_runtime(process, device="cpu", engine=engine, deepspeed_config=deepspeed_config) as runtime:
        yield runtime, [_training_step(one, runtime, batches) for one in runs]


def _training_step(run: ResolvedRun, runtime: Runtime, batches: list[Batch]) -> tuple[Callable[[], None], Engine]:
    _, engine = make_engine(run, runtime)
    take_step = TrainStep(run, runtime, engine, make_guard(run, runtime, engine))
    prepare = Preparation(run)
    numbers = iter(range(10**9))
    if not engine.is_settled:
        take_step.rehearse(prepare(batches[0]))

    def step() -> None:
        number = next(numbers)
        take_step(prepare(batches[number % len(batches)]), is_recorded=number % LOG_EVERY_STEPS == 0)

    return step, engine

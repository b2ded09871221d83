"""The parts of a training step, made as a run describes them."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from contextlib import AbstractContextManager, ExitStack

import torch

from jmvae_dist.data.loader import PREFETCH_BATCHES_PER_WORKER, TrainLoader, decode_threads
from jmvae_dist.distributed.engine import Engine
from jmvae_dist.distributed.environment import ProcessInfo
from jmvae_dist.distributed.runtime import Runtime, start_runtime
from jmvae_dist.kernels.gaussian import choose
from jmvae_dist.model import JMVAE
from jmvae_dist.training.batches import CheckedBatches
from jmvae_dist.training.cores import has_spare_core
from jmvae_dist.training.device_copies import DeviceCopies
from jmvae_dist.training.guards import StepGuard
from jmvae_dist.training.optimizer import make_optimizer
from jmvae_dist.training.ready_batches import Preparation, ReadyBatches
from jmvae_dist.training.setup import ResolvedRun, num_micro_batches

logger = logging.getLogger(__name__)


def start_run(run: ResolvedRun, process: ProcessInfo) -> AbstractContextManager[Runtime]:
    """The process group and engine that a run's configuration asks for; see `start_runtime`."""
    training = run.config.training
    return start_runtime(
        process,
        device=training.device,
        precision=training.precision,
        engine=training.engine,
        deepspeed_config=run.deepspeed_config,
        timeout_s=training.process_group_timeout_s,
    )


def make_engine(run: ResolvedRun, runtime: Runtime) -> tuple[JMVAE, Engine]:
    """The model on its device, with initial weights that are equal on every rank and for every world size."""
    torch.manual_seed(run.config.training.seed)
    section = run.config.model
    choose(section.kernels, runtime.device.type)  # says which, and complains now rather than in the first step
    model = JMVAE(run.model_config, networks=section.networks, kernels=section.kernels).to(runtime.device)
    training = run.config.training
    if training.activation_checkpointing:
        _recompute_activations(model, runtime)
    engine = runtime.prepare(
        model,
        make_optimizer(model, run.config.optimizer),
        num_micro_batches=num_micro_batches(run, runtime.process.world_size),
        is_compiled=training.compile != "off",
        gradient_reduction=training.gradient_reduction,
        reader_bytes=_reader_bytes(run, runtime.process.world_size),
    )
    return model, engine


def _reader_bytes(run: ResolvedRun, world_size: int) -> int:
    """What the reader processes of all ranks may hold in shared memory; these are on one machine if gradients are."""
    if run.config.data.workers == 0:
        return 0
    return sum(prefetched_bytes(run, rank, world_size) for rank in range(world_size))


def prefetched_bytes(run: ResolvedRun, rank: int, world_size: int) -> int:
    """Bytes of batches that a rank's worker processes hold in shared memory: made ahead, and in use by the rank."""
    start, stop = run.plan.rows_of_rank(rank, world_size)
    values = sum(math.prod(view.shape) for view in run.views)
    batches = run.config.data.workers * PREFETCH_BATCHES_PER_WORKER + 1
    return batches * (stop - start) * values * torch.float32.itemsize


def _recompute_activations(model: JMVAE, runtime: Runtime) -> None:
    left = model.recompute_activations()
    if left and runtime.is_main:
        logger.warning(
            "training.activation_checkpointing: %s keep all activations: they have buffers, which a second "
            "forward pass might change again; call torch.utils.checkpoint inside of them",
            ", ".join(left),
        )


def make_guard(run: ResolvedRun, runtime: Runtime, engine: Engine) -> StepGuard:
    """The guard of the engine's steps, without a history."""
    training = run.config.training
    return StepGuard(
        training.guards,
        precision=training.precision,
        gradient_clip_norm=training.gradient_clip_norm,
        global_batch_size=training.global_batch_size,
        device=runtime.device,
        is_partitioned=engine.is_partitioned,
        world_size=runtime.process.world_size,
        mask_tolerance=run.config.data.bad_sample_tolerance,
    )


def open_batches(run: ResolvedRun, runtime: Runtime, model: JMVAE, steps: range) -> ReadyBatches:
    """This rank's batches of the steps after so many finished ones.

    Raises:
        DataError: One of the ranks cannot even begin, or has another manifest; on all ranks.
    """
    process, data = runtime.process, run.config.data
    fingerprint = f"fingerprint {run.train_manifest.fingerprint}"
    runtime.collectives.require_equal(str(data.train_manifest), fingerprint)
    # A plan remembers what it computed last, and after a rewind the thread from before may still ask its own.
    run = dataclasses.replace(run, plan=copy.deepcopy(run.plan))
    has_thread = data.workers == 0 and _has_room_for_a_thread(runtime)
    with ExitStack() as opened:  # and closed again, if another rank cannot begin
        with runtime.collectives.together():
            loader = TrainLoader(
                run.train_manifest,
                run.plan,
                rank=process.rank,
                world_size=process.world_size,
                views=run.views,
                workers=data.workers,
                threads=decode_threads(data.decode_threads, data.workers),
                verify=data.verify,
                on_bad_sample=data.on_bad_sample,
                access=run.remote_access,
                pin_memory=runtime.device.type == "cuda",
            )
            lanes = run.plan.lanes_of_rank(process.rank, process.world_size)
            batches = CheckedBatches(loader.iterate(steps.start, steps.stop), run, model.likelihoods, lanes)
            batches.fetch_ahead()
            batches.raise_failure()
            # Worker processes run ahead by themselves, and do not hear of an interruption.
            prepare = Preparation(run, _copies_of(run, lanes, runtime.device))
            ready = ReadyBatches(batches, prepare, loader.cancel if has_thread else None)
            opened.callback(ready.close)
        opened.pop_all()
    return ready


def _copies_of(run: ResolvedRun, lanes: range, device: torch.device) -> DeviceCopies | None:
    """What copies the batches of some lanes to a GPU; None elsewhere."""
    if device.type != "cuda":
        return None
    shapes = run.model_config.input_dims
    assert shapes is not None
    return DeviceCopies(shapes, len(lanes) * run.plan.samples_per_lane, device)


def _has_room_for_a_thread(runtime: Runtime) -> bool:
    """Whether batches are to be made ready in a thread; called by all ranks.

    Where the threads of operations have all cores, it gains nothing: they spin while they wait for each other, and
    what it computes is taken from one of them.
    """
    if runtime.device.type != "cpu":
        return True
    threads = torch.get_num_threads()
    return has_spare_core(runtime.collectives, threads) or threads == 1

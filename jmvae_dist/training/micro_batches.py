"""`training.micro_batch_size: auto`: the largest micro-batch that fits, found before the first step and written down.

On a CPU what fits is decided by theory (`memory`) against a budget, so that it is the same at every start with the
same budget; on CUDA by real forward and backward passes. Splitting a batch otherwise changes the last bits of its
gradient: the number found is kept in the run directory and in every checkpoint, and a resume under the same
circumstances uses it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import socket
from collections.abc import Callable
from typing import Any

import torch

from jmvae_dist.checkpoint.layout import list_checkpoints, read_manifest
from jmvae_dist.checks import is_integer
from jmvae_dist.config import JMVAEConfig, RunConfig
from jmvae_dist.distributed.engine import ForwardPass
from jmvae_dist.distributed.runtime import Runtime
from jmvae_dist.errors import CheckpointError, ConfigError
from jmvae_dist.model import JMVAE
from jmvae_dist.progress import format_bytes
from jmvae_dist.training.memory import BYTES_PER_ELEMENT, PassTheory, available_bytes, engine_memory, forget_gradient
from jmvae_dist.training.setup import ResolvedRun, largest_share
from jmvae_dist.training.state import MICRO_BATCH_NAME, read_json

logger = logging.getLogger(__name__)

# Of the memory that is there; the rest is for the data, workspaces of kernels and fragmentation.
CPU_FRACTION = 0.8
CUDA_FRACTION = 0.9


def largest_that_fits(most: int, fits: Callable[[int], bool]) -> int:
    """The largest size from 1 to `most` that fits, where everything smaller fits too; 0 if not even 1 does."""
    if fits(most):
        return most
    fitting, too_large = 0, most
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        if fits(middle):
            fitting = middle
        else:
            too_large = middle
    return fitting


def even_size(share: int, size: int) -> int:
    """The most samples of a micro-batch when `share` of them are split evenly, and none gets more than `size`."""
    return math.ceil(share / math.ceil(share / size))


def memory_budget(config: RunConfig, num_local_ranks: int) -> tuple[int, str]:
    """Bytes that a rank on a CPU may take besides the interpreter and its libraries, and where that comes from."""
    budget = config.training.memory_budget_bytes
    if budget is not None:
        return budget, "training.memory_budget_bytes"
    available = available_bytes()
    origin = f"{CPU_FRACTION:.0%} of the {format_bytes(available)} available here, for {num_local_ranks} rank(s)"
    return int(CPU_FRACTION * available / num_local_ranks), origin


def largest_by_theory(
    config: RunConfig, model_config: JMVAEConfig, share: int, budget: tuple[int, str], engine_bytes: int
) -> int:
    """The largest micro-batch for which state and activations stay within a budget.

    Args:
        config: The run.
        model_config: Its model, with shapes.
        share: Most samples of a step on one rank.
        budget: From `memory_budget`.
        engine_bytes: What the engine holds throughout a step.

    Raises:
        ConfigError: Not even one sample fits, or a network does not run without values.
    """
    budget_bytes, origin = budget

    try:
        theory = PassTheory(config, model_config)
        size = largest_that_fits(share, lambda size: engine_bytes + theory(size) <= budget_bytes)
        needed_bytes = engine_bytes + theory(1)
    except Exception as error:  # a network of the user's may look at values
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(
            "training.micro_batch_size: auto cannot estimate a model that does not run without values; give a "
            f"number ({reason})"
        ) from error
    if size == 0:
        raise _nothing_fits(needed_bytes, engine_bytes, budget_bytes, origin)
    return even_size(share, size)


def settle_micro_batch(run: ResolvedRun, runtime: Runtime) -> ResolvedRun:
    """The run with the micro-batch that all ranks use; without auto, the run as it is.

    Called by all ranks together, before they build the model: what memory is there is looked at now.

    Raises:
        ConfigError: Not even one sample fits on some rank; on all ranks.
    """
    if run.config.training.micro_batch_size != "auto":
        return run
    return dataclasses.replace(run, micro_batch=_choose(run, runtime))


def _choose(run: ResolvedRun, runtime: Runtime) -> dict[str, Any]:
    """JSON values: `micro_batch_size`, and `found_for` which circumstances."""
    collectives = runtime.collectives
    found_for = _circumstances(run.config, runtime)
    recorded = collectives.on_main(lambda: _recorded(run))
    is_sound = is_integer(recorded.get("micro_batch_size")) and recorded["micro_batch_size"] >= 1
    if is_sound and recorded.get("found_for") == found_for:
        if runtime.is_main:
            logger.info("micro-batches of at most %d samples, as recorded", recorded["micro_batch_size"])
        return recorded
    hosts = collectives.gather(socket.gethostname())
    share = largest_share(run.plan, runtime.process.world_size)
    size = 0
    with collectives.together():
        size = _search(run, runtime, share, hosts.count(socket.gethostname()))
    chosen = {"micro_batch_size": even_size(share, min(collectives.gather(size))), "found_for": found_for}
    if runtime.is_main:
        logger.info(
            "training.micro_batch_size: auto found micro-batches of at most %d of a rank's %d samples",
            *(chosen["micro_batch_size"], share),
        )
        if is_sound:
            logger.warning(
                "micro-batches of at most %d samples were used for %s; searched anew for %s, so the last bits may "
                "differ from those of an uninterrupted run",
                *(recorded["micro_batch_size"], recorded.get("found_for"), found_for),
            )
    return chosen


def _circumstances(config: RunConfig, runtime: Runtime) -> dict[str, Any]:
    """What the memory that a rank needs, or may take, depends on."""
    training = config.training
    return {
        "world_size": runtime.process.world_size,
        "device": runtime.device.type,
        "engine": training.engine,
        "precision": training.precision,
        "activation_checkpointing": training.activation_checkpointing,
        "memory_budget_bytes": training.memory_budget_bytes,
    }


def _recorded(run: ResolvedRun) -> dict[str, Any]:
    """What the newest checkpoint says; before the first one, what the run directory says; else nothing."""
    for checkpoint in reversed(list_checkpoints(run.output_dir / "checkpoints")):
        with contextlib.suppress(CheckpointError):  # `CheckpointManager.resume` will tell
            return read_manifest(checkpoint).micro_batch
    record = read_json(run.output_dir / MICRO_BATCH_NAME)
    return record if isinstance(record, dict) else {}


def _search(run: ResolvedRun, runtime: Runtime, share: int, num_local_ranks: int) -> int:
    """What fits on this rank; without collectives, as another rank may fail meanwhile."""
    config = run.config
    with torch.device("meta"):
        networks = config.model.networks
        model = JMVAE(run.model_config, networks=networks, kernels="reference")
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
    engine_bytes = engine_memory(config.training.engine, num_parameters, runtime.process.world_size).total
    if runtime.device.type == "cuda":
        return _largest_on_device(run, runtime.device, share, engine_bytes, BYTES_PER_ELEMENT * num_parameters)
    budget = memory_budget(config, num_local_ranks)
    return largest_by_theory(config, run.model_config, share, budget, engine_bytes)


def _largest_on_device(
    run: ResolvedRun, device: torch.device, share: int, engine_bytes: int, weights_bytes: int
) -> int:
    """The largest micro-batch whose passes run through on a GPU beside all that the engine will hold.

    Written for CUDA, and not run on a GPU yet.
    """
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    budget = run.config.training.memory_budget_bytes
    budget_bytes = min(free_bytes, budget or int(CUDA_FRACTION * free_bytes))
    origin = "training.memory_budget_bytes" if budget else f"{CUDA_FRACTION:.0%} of what is free on {device}"
    trial = PassTrial(run, device, free_bytes - budget_bytes + max(0, engine_bytes - weights_bytes))
    size = largest_that_fits(share, trial)
    if size == 0:
        raise _nothing_fits(None, engine_bytes, budget_bytes, origin)
    return even_size(share, size)


class PassTrial:
    """Tries whether a forward and backward pass run through; without an engine, so that no rank waits for another.

    Args:
        run: The run.
        device: Where.
        reserved_bytes: To be left alone meanwhile: what the engine will hold besides weights, and a margin.
    """

    def __init__(self, run: ResolvedRun, device: torch.device, reserved_bytes: int) -> None:
        self._run = run
        self._device = device
        self._reserved_bytes = reserved_bytes
        self._forward_pass: ForwardPass | None = None

    def __call__(self, size: int) -> bool:
        """Whether a micro-batch of this size fits."""
        try:
            self._take_pass(size)
            fits = True
        except torch.cuda.OutOfMemoryError:
            fits = False
        # Not inside of `except`, where the error still holds the tensors of the pass.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return fits

    def _take_pass(self, size: int) -> None:
        forward_pass = self._forward_pass = self._forward_pass or self._build()
        reserved = torch.empty(self._reserved_bytes, dtype=torch.uint8, device=self._device)
        shapes = self._run.model_config.input_dims
        assert shapes is not None
        inputs = {name: torch.zeros(size, *shape, device=self._device) for name, shape in shapes.items()}
        noise = torch.zeros(size, self._run.model_config.latent_dim, device=self._device)
        loss_sum, _ = forward_pass(inputs, noise=noise, check_inputs=False)
        loss_sum.backward()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        del reserved

    def _build(self) -> ForwardPass:
        section, training = self._run.config.model, self._run.config.training
        model = JMVAE(self._run.model_config, networks=section.networks, kernels=section.kernels).to(self._device)
        if training.activation_checkpointing:
            model.recompute_activations()
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(forget_gradient)
        return ForwardPass(model, training.precision, self._device.type)


def _nothing_fits(needed_bytes: int | None, engine_bytes: int, budget_bytes: int, origin: str) -> ConfigError:
    state = f"{format_bytes(engine_bytes)} for weights, gradients and moments"
    if needed_bytes is not None:
        state = f"{format_bytes(needed_bytes)} are needed, of which {state}"
    return ConfigError(
        f"training.micro_batch_size: auto: not even one sample fits on a rank: {state}, and there are "
        f"{format_bytes(budget_bytes)} ({origin}); set training.activation_checkpointing, take training.engine zero2 "
        "or zero3 on more ranks, make model.networks smaller, or raise training.memory_budget_bytes"
    )

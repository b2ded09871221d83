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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from jmvae_dist.checkpoint.layout import list_checkpoints, read_manifest
from jmvae_dist.checks import is_integer
from jmvae_dist.config import RunConfig
from jmvae_dist.data.loader import PREFETCH_BATCHES_PER_WORKER, steps_at_once
from jmvae_dist.distributed.engine import ForwardPass
from jmvae_dist.distributed.runtime import Runtime
from jmvae_dist.errors import CheckpointError, ConfigError
from jmvae_dist.model import JMVAE
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.progress import format_bytes
from jmvae_dist.training.batches import STEPS_AHEAD
from jmvae_dist.training.device_copies import make_places
from jmvae_dist.training.memory import (
    BYTES_PER_ELEMENT,
    EngineMemory,
    PassTheory,
    available_bytes,
    engine_memory,
    forget_gradient,
)
from jmvae_dist.training.setup import ResolvedRun, largest_share
from jmvae_dist.training.state import MICRO_BATCH_NAME, read_json

logger = logging.getLogger(__name__)

# Of the memory that is there; the rest is for workspaces of kernels and fragmentation. On a CPU glibc's allocator
# keeps pieces that were freed: up to 1.48 times the theory was measured (docs/performance.md, "Memory").
CPU_FRACTION = 0.65
CUDA_FRACTION = 0.9
_OUT_OF_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "out of memory",
)


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


@dataclass(frozen=True)
class RankNeeds:
    """What a rank needs besides the activations of its passes, which depends on their number.

    Args:
        config: The run.
        num_parameters: Of its model.
        num_ranks: Of the run.
        share: Most samples of a step on one rank.
        sample_bytes: Of one sample, as the model gets it, with its noise.
        deepspeed_config: Of zero0 .. zero3.
        device_type: Where it trains.
    """

    config: RunConfig
    num_parameters: int
    num_ranks: int
    share: int
    sample_bytes: int
    deepspeed_config: dict[str, Any] | None
    device_type: str = "cpu"

    def state(self, size: int) -> EngineMemory:
        """What the engine holds with micro-batches of so many samples."""
        return engine_memory(
            self.config.training.engine,
            self.num_parameters,
            self.num_ranks,
            num_micro_batches=math.ceil(self.share / size),
            deepspeed_config=self.deepspeed_config,
            device_type=self.device_type,
            gradient_reduction=self.config.training.gradient_reduction,
        )

    def data_bytes(self, size: int) -> int:
        """On a CPU, batches beside what one micro-batch takes: the rest of the step's, and those of coming steps."""
        workers = self.config.data.workers
        ahead = workers * PREFETCH_BATCHES_PER_WORKER
        if workers == 0:
            # Those that are read together, and the rest of those before them, which share their memory.
            ahead = 2 * steps_at_once(self.share, self.sample_bytes)
        batches = 1 + STEPS_AHEAD + ahead
        return (batches * self.share - size) * self.sample_bytes


def rank_needs(
    config: RunConfig,
    model_config: JMVAEConfig,
    num_parameters: int,
    num_ranks: int,
    share: int,
    deepspeed_config: dict[str, Any] | None,
    device_type: str = "cpu",
) -> RankNeeds:
    """The needs of a run's rank, before it has a model."""
    assert model_config.input_dims is not None
    values = sum(map(math.prod, model_config.input_dims.values())) + model_config.latent_dim
    sample_bytes = BYTES_PER_ELEMENT * values
    return RankNeeds(config, num_parameters, num_ranks, share, sample_bytes, deepspeed_config, device_type)


def largest_by_theory(needs: RankNeeds, model_config: JMVAEConfig, budget: tuple[int, str]) -> int:
    """The largest micro-batch for which state, data and activations stay within a budget.

    Args:
        needs: Of the rank, on a CPU.
        model_config: The run's model, with shapes.
        budget: From `memory_budget`.

    Raises:
        ConfigError: Not even one sample fits, or a network does not run without values.
    """
    budget_bytes, origin = budget
    try:
        theory = PassTheory(needs.config, model_config)

        def needed_bytes(size: int) -> int:
            return needs.state(size).peak(theory(size)) + needs.data_bytes(size)

        size = largest_that_fits(needs.share, lambda size: needed_bytes(size) <= budget_bytes)
        least_bytes = needed_bytes(1)
    except Exception as error:  # a network of the user's may look at values
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(
            "training.micro_batch_size: auto cannot estimate a model that does not run without values; give a "
            f"number ({reason})"
        ) from error
    if size == 0:
        raise _nothing_fits(least_bytes, needs.state(1).peak(), budget_bytes, origin)
    return even_size(needs.share, size)


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
    hosts = collectives.gather(socket.gethostname())
    memories = collectives.gather(_device_bytes(runtime.device))
    found_for = _circumstances(run, runtime, max(map(hosts.count, hosts)), min(memories))
    recorded, others = collectives.on_main(lambda: _recorded(run, found_for))
    if recorded:
        if runtime.is_main:
            logger.info("micro-batches of at most %d samples, as recorded", recorded["micro_batch_size"])
        return recorded
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
        if others:
            logger.warning(
                "micro-batches of at most %d samples were used for %s; searched anew for %s, so the last bits may "
                "differ from those of an uninterrupted run",
                *(others[0]["micro_batch_size"], others[0].get("found_for"), found_for),
            )
    return chosen


def _circumstances(run: ResolvedRun, runtime: Runtime, ranks_per_node: int, device_bytes: int) -> dict[str, Any]:
    """What the memory that a rank needs, or may take, depends on: JSON values."""
    training = run.config.training
    return {
        "world_size": runtime.process.world_size,
        "ranks_per_node": ranks_per_node,
        "device": runtime.device.type,
        "device_memory_bytes": device_bytes,
        "engine": training.engine,
        "gradient_reduction": training.gradient_reduction,
        "deepspeed": (run.deepspeed_config or {}).get("zero_optimization", {}),
        "precision": training.precision,
        "compile": training.compile,
        "activation_checkpointing": training.activation_checkpointing,
        "memory_budget_bytes": training.memory_budget_bytes,
    }


def _device_bytes(device: torch.device) -> int:
    """All memory of a GPU; 0 on a CPU, where what is there changes from one start to the next."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def _is_found_for(record: dict[str, Any], present: dict[str, Any]) -> bool:
    """Whether a record was made under these circumstances; more memory than then does no harm."""
    found_for = record.get("found_for")
    if not isinstance(found_for, dict) or not is_integer(found_for.get("device_memory_bytes")):
        return False
    has_enough = present["device_memory_bytes"] >= found_for["device_memory_bytes"]
    return has_enough and {**found_for, "device_memory_bytes": 0} == {**present, "device_memory_bytes": 0}


def _recorded(run: ResolvedRun, present: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The newest record that was made under the present circumstances, or nothing; and newer ones of other ones.

    First the run directory's, which may be of a start that came to no checkpoint; then those of the checkpoints, of
    which the newest may be damaged.
    """
    others: list[dict[str, Any]] = []
    for record in _records(run):
        size: Any = record.get("micro_batch_size")
        if is_integer(size) and size >= 1:
            if _is_found_for(record, present):
                return record, others
            others.append(record)
    return {}, others


def _records(run: ResolvedRun) -> Iterator[dict[str, Any]]:
    record = read_json(run.output_dir / MICRO_BATCH_NAME)
    if isinstance(record, dict):
        yield record
    for checkpoint in reversed(list_checkpoints(run.output_dir / "checkpoints")):
        with contextlib.suppress(CheckpointError):  # `CheckpointManager.resume` will tell
            yield read_manifest(checkpoint).micro_batch


def _search(run: ResolvedRun, runtime: Runtime, share: int, num_local_ranks: int) -> int:
    """What fits on this rank; without collectives, as another rank may fail meanwhile."""
    config, model_config, device = run.config, run.model_config, runtime.device
    with torch.device("meta"):
        model = JMVAE(model_config, networks=config.model.networks, kernels="reference")
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
    world_size, deepspeed_config = runtime.process.world_size, run.deepspeed_config
    needs = rank_needs(config, model_config, num_parameters, world_size, share, deepspeed_config, device.type)
    if device.type == "cuda":
        return _largest_on_device(run, device, needs)
    return largest_by_theory(needs, model_config, memory_budget(config, num_local_ranks))


def _largest_on_device(run: ResolvedRun, device: torch.device, needs: RankNeeds) -> int:
    """The largest micro-batch whose passes run through on a GPU beside all that the engine will hold.

    Written for CUDA, and not run on a GPU yet.
    """
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    budget = run.config.training.memory_budget_bytes
    budget_bytes = min(free_bytes, budget or int(CUDA_FRACTION * free_bytes))
    origin = "training.memory_budget_bytes" if budget else f"{CUDA_FRACTION:.0%} of what is free on {device}"
    trial = PassTrial(run, device, needs.share, lambda size: free_bytes - budget_bytes + reserved_bytes(needs, size))
    size = largest_that_fits(needs.share, trial)
    if size == 0:
        raise _nothing_fits(None, needs.state(1).peak(), budget_bytes, origin)
    return even_size(needs.share, size)


def reserved_bytes(needs: RankNeeds, size: int) -> int:
    """What the engine holds on the device at its peak besides the whole weights, which a trial has itself.

    With zero3 these stand for the weights that it gathers; what it offloads is not on the device.
    """
    state = needs.state(size)
    return max(0, state.peak() - state.offloaded - BYTES_PER_ELEMENT * needs.num_parameters)


class PassTrial:
    """Tries whether a forward and backward pass run through; without an engine, so that no rank waits for another.

    Args:
        run: The run.
        device: Where.
        share: Most samples of a step on one rank; with those of the next step they lie on the device together.
        reserved_bytes: By size: to be left alone meanwhile, what the engine will hold besides weights, and a margin.
    """

    def __init__(
        self, run: ResolvedRun, device: torch.device, share: int, reserved_bytes: Callable[[int], int]
    ) -> None:
        self._run = run
        self._device = device
        self._share = share
        self._reserved_bytes = reserved_bytes
        self._forward_pass: ForwardPass | None = None

    def __call__(self, size: int) -> bool:
        """Whether a micro-batch of this size fits."""
        try:
            self._take_pass(size)
            fits = True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        # Not inside of `except`, where the error still holds the tensors of the pass.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return fits

    def _take_pass(self, size: int) -> None:
        forward_pass = self._forward_pass = self._forward_pass or self._build()
        reserved = torch.empty(self._reserved_bytes(size), dtype=torch.uint8, device=self._device)
        shapes = self._run.model_config.input_dims
        assert shapes is not None
        places = make_places(shapes, self._share, self._device)
        inputs = {name: values[:size].zero_() for name, values in places[0].inputs.items()}
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


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory was lacking: also cuBLAS and cuDNN, which allocate by themselves, say so, by plain errors."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY)


def _nothing_fits(needed_bytes: int | None, engine_bytes: int, budget_bytes: int, origin: str) -> ConfigError:
    state = f"{format_bytes(engine_bytes)} for weights, gradients, moments and buffers"
    if needed_bytes is not None:
        state = f"{format_bytes(needed_bytes)} are needed, of which {state}"
    return ConfigError(
        f"training.micro_batch_size: auto: not even one sample fits on a rank: {state}, and there are "
        f"{format_bytes(budget_bytes)} ({origin}); set training.activation_checkpointing, take training.engine zero2 "
        "or zero3 on more ranks, make model.networks smaller, or raise training.memory_budget_bytes"
    )

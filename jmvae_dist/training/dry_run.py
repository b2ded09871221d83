"""What a run would need, before it has a machine: parameters, memory per rank for each engine, steps, checkpoints.

The model is built on torch's meta device, which knows shapes and holds no values, so that a model of any size is
planned on any machine. Manifests need not exist: the shapes are then those of `model.input_dims`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from jmvae_dist.config import RunConfig
from jmvae_dist.data.plan import default_lanes
from jmvae_dist.data.urls import is_remote, shown
from jmvae_dist.errors import ConfigError
from jmvae_dist.model import JMVAE
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.progress import format_bytes
from jmvae_dist.schedules import epochs_to_steps
from jmvae_dist.training.memory import BYTES_PER_ELEMENT, MOMENTS, EngineMemory, PassTheory, engine_memory
from jmvae_dist.training.micro_batches import RankNeeds, even_size, largest_by_theory, memory_budget, rank_needs
from jmvae_dist.training.setup import make_deepspeed_config, resolve_networks, resolve_run

ENGINES = ("ddp", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class RunEstimate:
    """What a run needs.

    Args:
        networks: Parameters by network, in the model's order.
        num_ranks: Number of processes.
        rank_batch_size: Most samples of a step on one rank.
        micro_batch_size: Most samples of one forward pass on one rank.
        choice: What `training.micro_batch_size: auto` would do; empty without it.
        memory: By engine.
        largest_layer_bytes: Weights that zero3 must at least gather at a time.
        activation_bytes: Estimate of what a forward and backward pass hold besides; None: not known.
        activation_problem: Why not.
        checkpoint_bytes: Weights, buffers and moments.
        num_samples: Of the training data; None: not known.
        global_batch_size: Samples of a step.
        total_steps: Of the run; None: not known.
        origin: Where the shapes come from.
        keep_last: Checkpoints that are kept.
    """

    networks: dict[str, int]
    num_ranks: int
    rank_batch_size: int
    micro_batch_size: int
    choice: str
    memory: dict[str, EngineMemory]
    largest_layer_bytes: int
    activation_bytes: int | None
    activation_problem: str
    checkpoint_bytes: int
    num_samples: int | None
    global_batch_size: int
    total_steps: int | None
    origin: str
    keep_last: int

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(self.networks.values())


def estimate_run(config: RunConfig, num_ranks: int, num_samples: int | None = None) -> RunEstimate:
    """Plan a run.

    Args:
        config: The run.
        num_ranks: Number of processes to plan for.
        num_samples: Size of the training data, where its manifest does not exist.

    Raises:
        ConfigError: The configuration is not sound, or there is neither a manifest nor `model.input_dims`.
        DataError: A manifest is damaged.
    """
    manifest = config.data.train_manifest
    if is_remote(manifest) or Path(manifest).expanduser().exists():
        run = resolve_run(config, num_ranks)
        model_config, num_samples = run.model_config, run.train_manifest.num_samples
        origin = shown(manifest)
    else:
        model_config, origin = _without_manifest(config, num_ranks)
    batch = config.training.global_batch_size
    lanes = config.data.lanes or default_lanes(batch)
    rank_batch_size = math.ceil(lanes / num_ranks) * (batch // lanes)
    with torch.device("meta"):
        model = JMVAE(model_config, networks=resolve_networks(config, model_config), kernels="reference")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    size, choice = config.training.micro_batch_size, ""
    if size == "auto":
        deepspeed_config = make_deepspeed_config(config.training.engine, config)
        needs = rank_needs(config, model_config, parameters, num_ranks, rank_batch_size, deepspeed_config)
        size, choice = _choose(needs, model_config)
    micro_batch_size = even_size(rank_batch_size, size or rank_batch_size)
    activations, problem = _estimate_activations(config, model_config, micro_batch_size)

    # The table is that of CPUs, unless GPUs are asked for.
    on_gpu = config.training.device == "cuda"
    gradient_reduction = "process_group" if on_gpu else config.training.gradient_reduction

    def memory_of(engine: str) -> EngineMemory:
        return engine_memory(
            engine,
            parameters,
            num_ranks,
            num_micro_batches=math.ceil(rank_batch_size / micro_batch_size),
            deepspeed_config=make_deepspeed_config(engine, config),
            gradient_reduction=gradient_reduction,
        )

    return RunEstimate(
        networks={name: _count(network) for name, network in _networks(model)},
        num_ranks=num_ranks,
        rank_batch_size=rank_batch_size,
        micro_batch_size=micro_batch_size,
        choice=choice,
        memory={engine: memory_of(engine) for engine in ENGINES},
        largest_layer_bytes=BYTES_PER_ELEMENT * max(_count(module, recurse=False) for module in model.modules()),
        activation_bytes=activations,
        activation_problem=problem,
        checkpoint_bytes=(1 + MOMENTS) * BYTES_PER_ELEMENT * parameters + buffers,
        num_samples=num_samples,
        global_batch_size=batch,
        total_steps=_total_steps(config, num_samples),
        origin=origin,
        keep_last=config.checkpoint.keep_last,
    )


def render(estimate: RunEstimate, config: RunConfig) -> str:
    """The estimate as text for people."""
    width = max(map(len, estimate.networks))
    lines = [f"parameters (shapes of {estimate.origin})"]
    lines += [f"  {name:<{width}}  {count:>15,}" for name, count in estimate.networks.items()]
    lines += [f"  {'together':<{width}}  {estimate.num_parameters:>15,}", "", *_schedule_lines(estimate), ""]
    lines.append(
        f"memory per rank, {estimate.num_ranks} rank(s) (--dry_run.ranks) with {estimate.rank_batch_size} samples "
        f"each, in forward passes of {estimate.micro_batch_size}"
    )
    header = ("engine", "weights", "moments", "gradients", "buffers", "in passes*", "reducing*", "peak*")
    lines.append("  " + "".join(f"{name:>11}" for name in header))
    for engine, memory in estimate.memory.items():
        sizes = [format_bytes(size) for size in (memory.weights, memory.moments, memory.gradients, memory.buffers)]
        sums = ["?", "?", "?"]
        if estimate.activation_bytes is not None:
            with_activations = (memory.in_passes, memory.at_reduction, memory.peak)
            sums = [format_bytes(total(estimate.activation_bytes)) for total in with_activations]
        chosen = " <- training.engine" if engine == config.training.engine.replace("zero0", "ddp") else ""
        lines.append("  " + "".join(f"{text:>11}" for text in (engine, *sizes, *sums)) + chosen)
    return "\n".join([*lines, "", *_notes(estimate, config)])


def _schedule_lines(estimate: RunEstimate) -> Iterator[str]:
    batch = estimate.global_batch_size
    if estimate.num_samples is None:
        yield (
            f"steps of {batch:,} samples; per epoch: not known without a manifest (give the number of samples with "
            "--dry_run.samples N)"
        )
    else:
        epoch = estimate.num_samples / batch
        yield f"steps of {batch:,} samples; {epoch:,.1f} per epoch of {estimate.num_samples:,} samples"
    if estimate.total_steps is not None:
        yield f"steps of the run: {estimate.total_steps:,}"
    size, kept = estimate.checkpoint_bytes, estimate.keep_last
    yield f"checkpoint: {format_bytes(size)}; the last {kept} are kept: {format_bytes(kept * size)}"


def _notes(estimate: RunEstimate, config: RunConfig) -> Iterator[str]:
    if estimate.activation_bytes is None:
        yield f"* not estimated: the model does not run without values ({estimate.activation_problem})"
    else:
        how = " and training.activation_checkpointing" if config.training.activation_checkpointing else ""
        yield (
            f"* an estimate, with {format_bytes(estimate.activation_bytes)} that a forward and backward pass hold at "
            f"most in {config.training.precision}{how}; workspaces, fragmentation, batches fetched ahead and the "
            "device's context come on top"
        )
    if estimate.memory["ddp"].buffers:
        yield (
            "buffers of ddp: memory that the ranks of one machine share (training.gradient_reduction); none on GPUs "
            "or on several machines"
        )
    if estimate.choice:
        yield f"training.micro_batch_size: {estimate.choice}"
    yield (
        "buffers: DeepSpeed's reduce_bucket_size, as far as parameters fill it (a GPU holds whole ones), and what "
        f"zero3 gathers: up to stage3_max_live_parameters, at least {format_bytes(estimate.largest_layer_bytes)}"
    )
    if "cpu" in (config.training.deepspeed.offload_optimizer, config.training.deepspeed.offload_parameters):
        yield "training.deepspeed moves what it offloads to host memory; the table counts it on the device"


def _without_manifest(config: RunConfig, num_ranks: int) -> tuple[JMVAEConfig, str]:
    shapes = config.model.input_dims
    if shapes is None:
        raise ConfigError(
            f"data.train_manifest: no manifest at {config.data.train_manifest}, and without it a dry run needs "
            "model.input_dims"
        )
    lanes = config.data.lanes or default_lanes(config.training.global_batch_size)
    if num_ranks > lanes:
        raise ConfigError(f"data.lanes: {lanes} lanes cannot be shared by {num_ranks} processes, which need one each")
    return config.model.resolve(shapes), "model.input_dims"


def _choose(needs: RankNeeds, model_config: JMVAEConfig) -> tuple[int, str]:
    """What `micro_batch_size: auto` would find by theory with this machine's memory for a rank, and what to say."""
    budget_bytes, origin = memory_budget(needs.config, num_local_ranks=1)
    try:
        size = largest_by_theory(needs, model_config, (budget_bytes, origin))
    except ConfigError as error:
        return 1, str(error).removeprefix("training.micro_batch_size: ")
    budget = f"{format_bytes(budget_bytes)} per rank ({origin})"
    return size, f"auto would take {size} samples for {budget}; on a GPU it tries what fits"


def _total_steps(config: RunConfig, num_samples: int | None) -> int | None:
    if config.training.steps is not None:
        return config.training.steps
    assert config.training.epochs is not None
    if num_samples is None:
        return None
    batch = config.training.global_batch_size
    return max(1, epochs_to_steps(config.training.epochs, num_samples=num_samples, global_batch_size=batch))


def _networks(model: JMVAE) -> Iterator[tuple[str, nn.Module]]:
    for part in ("encoders", "decoders"):
        for name in model.modalities:
            yield f"{part}.{name}", getattr(model, part)[name]
    yield "joint_encoder", model.joint_encoder


def _count(module: nn.Module, recurse: bool = True) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse))


def _estimate_activations(config: RunConfig, model_config: JMVAEConfig, batch_size: int) -> tuple[int | None, str]:
    """Bytes that a forward and backward pass hold besides weights and gradients; or None, and why not."""
    try:
        return PassTheory(config, model_config)(batch_size), ""
    except Exception as error:  # a network of the user's may look at values
        return None, f"{type(error).__name__}: {' '.join(str(error).split())}"

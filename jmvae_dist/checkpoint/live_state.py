"""The training state of a running engine, as fragments that alias its live buffers.

Reading into the fragments restores the engine in place; nothing is gathered or converted. Where an engine keeps
its float32 weights and moments is its own affair: this file knows it for each of them.

    ddp, zero0       every rank holds everything
    zero1, zero2     a rank owns a range of the flat float32 partition of each parameter group
    zero3            a rank owns the `rank`-th of `world_size` equal pieces of each parameter, padded at the end
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jmvae_dist.checkpoint.fragments import EntrySpec, Fragment, whole
from jmvae_dist.distributed.engine import Engine
from jmvae_dist.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class LiveState:
    """What a checkpoint of an engine holds, and this rank's part of it.

    Args:
        specs: Every entry, in an order that is the same on all ranks.
        fragments: What this rank holds of them.
        owners: The tensor under which the optimizer keeps the state of each trainable parameter, by name.
        after_read: Brings everything derived from the fragments up to date; a collective.
    """

    specs: dict[str, EntrySpec] = field(default_factory=dict)
    fragments: list[Fragment] = field(default_factory=list)
    owners: dict[str, Tensor] = field(default_factory=dict)
    after_read: Callable[[], None] = lambda: None

    def add_whole(self, name: str, tensor: Tensor) -> None:
        """Add an entry that every rank holds."""
        self.specs[name] = EntrySpec(tuple(tensor.shape), tensor.dtype)
        self.fragments.append(whole(name, tensor))

    def add_part(self, name: str, shape: tuple[int, ...], start: int, values: Tensor) -> None:
        """Add an entry of which this rank holds the elements from `start` on, perhaps none."""
        self.specs[name] = EntrySpec(shape, values.dtype)
        if values.numel() > 0:
            self.fragments.append(Fragment(name, start, values.detach()))


def live_state(engine: Engine, rank: int) -> LiveState:
    """The state of an engine between two steps; creates optimizer states that do not exist yet."""
    if engine.stage == 0:
        return _replicated_state(engine)
    state = _zero12_state(engine) if engine.stage < 3 else _zero3_state(engine, rank)
    for name, buffer in engine.model.named_buffers():
        state.add_whole(f"buffer/{name}", buffer)
    return state


def weights_and_buffers(model: nn.Module) -> LiveState:
    """The part of the state that makes a model, for one that is not being trained."""
    state = LiveState()
    for name, parameter in model.named_parameters():
        state.add_whole(f"weight/{name}", parameter)
    for name, buffer in model.named_buffers():
        state.add_whole(f"buffer/{name}", buffer)
    return state


def optimizer_record(engine: Engine, state: LiveState) -> dict[str, Any]:
    """Parameter groups by parameter name, and each parameter's step count, as JSON values."""
    groups = [
        {"parameters": names, "options": {key: value for key, value in group.items() if key != "params"}}
        for names, group in zip(engine.group_parameters, engine.optimizer.param_groups, strict=True)
    ]
    steps = {name: float(engine.optimizer.state[owner]["step"]) for name, owner in state.owners.items()}
    return {"groups": groups, "steps": steps}


def restore_steps(engine: Engine, state: LiveState, record: dict[str, Any]) -> None:
    """Set every parameter's step count. Options of the groups come from the configuration, not from here.

    Raises:
        CheckpointError: Parameters that share one count in this engine have different ones in the checkpoint.
    """
    counts: dict[int, tuple[Tensor, set[float]]] = {}
    for name, owner in state.owners.items():
        counts.setdefault(id(owner), (owner, set()))[1].add(record["steps"][name])
    for owner, steps in counts.values():
        if len(steps) > 1:
            raise CheckpointError(
                f"training.engine: {engine.name} keeps one step count for parameters that have taken {sorted(steps)} "
                "steps in the checkpoint (some never had a gradient); resume with the engine ddp"
            )
        optimizer_state = engine.optimizer.state[owner]
        # A tensor of its own each: states that share one would be counted several times per step.
        optimizer_state["step"] = torch.full_like(optimizer_state["step"], steps.pop())


def _replicated_state(engine: Engine) -> LiveState:
    state = weights_and_buffers(engine.model)
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad:
            moments = _adam_state(engine.optimizer, parameter)
            state.owners[name] = parameter
            for moment in MOMENTS:
                state.add_whole(f"{moment}/{name}", moments[moment])
    return state


def _zero12_state(engine: Any) -> LiveState:
    zero = engine.zero_optimizer
    partitions = zero.single_partition_of_fp32_groups
    for partition in partitions:
        _adam_state(engine.optimizer, partition)
    # DeepSpeed links its per-parameter views to the moments once, perhaps before they existed.
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
    owners = {
        id(parameter): partition
        for group, partition in zip(zero.bit16_groups, partitions, strict=True)
        for parameter in group
    }
    state = LiveState(after_read=zero.update_lp_params)
    for name, parameter in engine.model.named_parameters():
        if not parameter.requires_grad:
            state.add_whole(f"weight/{name}", parameter)
            continue
        state.owners[name] = owners[id(parameter)]
        mapping = parameter._hp_mapping  # None: this rank owns nothing of the parameter
        start = 0 if mapping is None else mapping.lp_fragment_address.start
        nothing = torch.empty(0, dtype=torch.float32)
        shape = tuple(parameter.shape)
        weight = nothing if mapping is None else mapping.hp_fragment
        state.add_part(f"weight/{name}", shape, start, weight)
        for moment in MOMENTS:
            values = nothing if mapping is None else mapping.get_hp_fragment(moment)
            state.add_part(f"{moment}/{name}", shape, start, values)
    return state


def _zero3_state(engine: Any, rank: int) -> LiveState:
    zero = engine.zero_optimizer
    for partition in zero.fp32_partitioned_groups_flat:
        _adam_state(engine.optimizer, partition)

    def after_read() -> None:
        zero.checkpoint_event_prologue()  # takes apart the small weights that stay whole on every rank
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        zero.checkpoint_event_epilogue()  # and puts them together again, from the new values

    state = LiveState(after_read=after_read)
    for name, parameter in engine.model.named_parameters():
        shape, piece_numel = tuple(parameter.ds_shape), parameter.ds_tensor.numel()
        start = rank * piece_numel
        numel = max(0, min(piece_numel, parameter.ds_numel - start))  # without the padding
        if not parameter.requires_grad:
            state.add_part(f"weight/{name}", shape, start, parameter.ds_tensor.data.view(-1)[:numel])
            continue
        sub_group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        partition = zero.fp32_partitioned_groups_flat[sub_group]
        state.owners[name] = partition
        state.add_part(f"weight/{name}", shape, start, partition.data[offset : offset + numel])
        for moment in MOMENTS:
            values = engine.optimizer.state[partition][moment]
            state.add_part(f"{moment}/{name}", shape, start, values[offset : offset + numel])
    return state


def _adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a tensor; created as torch would create it at the first step, so that it can be read into."""
    state = optimizer.state[parameter]
    if not state:
        # A fused optimizer keeps its step count beside the parameter; the others keep it on the host.
        device = parameter.device if optimizer.defaults["fused"] else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter.detach(), memory_format=torch.preserve_format)
    return state

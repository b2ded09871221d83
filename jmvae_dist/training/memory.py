"""What training holds in memory, in theory: by engine, and by what a forward and backward pass need on top."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jmvae_dist.config import RunConfig
from jmvae_dist.distributed.deepspeed_config import BUCKET_ELEMENTS
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.training.fake_pass import fake_model

# Weights, gradients and moments are float32 with every engine and precision.
BYTES_PER_ELEMENT = 4
MOMENTS = 2
# DeepSpeed's defaults: what its engine reduces at once without ZeRO, and stage3_max_live_parameters.
_ZERO0_BUCKET_ELEMENTS = 500_000_000
_LIVE_ELEMENTS = 1_000_000_000


@dataclass(frozen=True)
class EngineMemory:
    """Bytes that one rank holds in a step with an engine, besides activations.

    Args:
        weights: Throughout; with the second copy that ZeRO updates.
        moments: Throughout; Adam's two.
        gradients: During the passes.
        buffers: During the passes: DeepSpeed's buckets, and weights that zero3 has gathered; this rank's part of the
            memory that the ranks of ddp share.
        reduction: Gradients, buffers and copies while gradients are reduced, in place of the two before.
        activations_left: Part of the activations that is still there when the first bucket is reduced.
        offloaded: Of all of it, what lies in host memory.
    """

    weights: int
    moments: int
    gradients: int
    buffers: int
    reduction: int
    activations_left: float = 0.0
    offloaded: int = 0

    def in_passes(self, activations: int) -> int:
        """While a forward and backward pass hold so many bytes at most."""
        return self.weights + self.moments + self.gradients + self.buffers + activations

    def at_reduction(self, activations: int) -> int:
        """While gradients are reduced, after or within that pass."""
        return self.weights + self.moments + self.reduction + int(self.activations_left * activations)

    def peak(self, activations: int = 0) -> int:
        """The most of both."""
        return max(self.in_passes(activations), self.at_reduction(activations))


def engine_memory(
    engine: str,
    num_parameters: int,
    num_ranks: int,
    *,
    num_micro_batches: int = 1,
    deepspeed_config: dict[str, Any] | None = None,
    device_type: str = "cpu",
    gradient_reduction: str = "process_group",
) -> EngineMemory:
    """What a rank holds with an engine (Rajbhandari et al. 2020, all in float32; and what DeepSpeed 0.19 does).

    With one rank DeepSpeed cuts nothing, and its copies come on top.

    Args:
        engine: ddp or zero0 .. zero3.
        num_parameters: Of the model.
        num_ranks: Among which state is cut.
        num_micro_batches: Per step.
        deepspeed_config: From `build_config`; None: the defaults.
        device_type: cpu or cuda. Of a bucket, a CPU only has what was written into.
        gradient_reduction: The setting. auto is taken for shared memory, which it is on CPUs of one machine.
    """
    whole = BYTES_PER_ELEMENT * num_parameters
    accumulates = num_micro_batches > 1
    if engine == "ddp":
        # Gradients of micro-batches that are not reduced lie outside of the buckets, which stay.
        gradients = 2 * whole if accumulates and num_ranks > 1 else whole
        is_shared = gradient_reduction != "process_group" and device_type == "cpu" and num_ranks > 1
        shared = whole if is_shared else 0
        return EngineMemory(whole, MOMENTS * whole, gradients, shared, gradients + shared)
    if engine == "zero0":
        flat = min(whole, BYTES_PER_ELEMENT * _ZERO0_BUCKET_ELEMENTS)
        return EngineMemory(whole, MOMENTS * whole, whole, 0, whole + flat)
    part = BYTES_PER_ELEMENT * math.ceil(num_parameters / num_ranks)
    settings = (deepspeed_config or {}).get("zero_optimization", {})
    if engine == "zero3":
        return _zero3_memory(whole, part, settings, device_type)
    return _zero_memory(engine, whole, part, settings, device_type, accumulates)


def _zero_memory(
    engine: str, whole: int, part: int, settings: dict[str, Any], device_type: str, accumulates: bool
) -> EngineMemory:
    """zero1 and zero2: a bucket is flattened into a second one to be reduced, and then copied into partitions."""
    room, filled = _bucket(whole, settings, device_type)
    overlaps = bool(settings.get("overlap_comm"))
    rooms = room * (1 + overlaps)
    if engine == "zero1":
        gradients, reduction = whole, whole + part + rooms
    else:
        gradients = part * (1 + accumulates)
        reduction = gradients + rooms + filled
    is_early = engine == "zero2" or overlaps
    return EngineMemory(
        weights=whole + part,
        moments=MOMENTS * part,
        gradients=gradients,
        buffers=rooms,
        reduction=reduction,
        activations_left=1 - filled / whole if is_early else 0.0,
        # Without the weights that it makes passes with: a second copy, its gradient, and the moments.
        offloaded=(2 + MOMENTS) * part if "offload_optimizer" in settings else 0,
    )


def _zero3_memory(whole: int, part: int, settings: dict[str, Any], device_type: str) -> EngineMemory:
    """zero3 puts the gradients of a bucket in another order for a reduce-scatter, which takes a copy."""
    room, filled = _bucket(whole, settings, device_type)
    gathered = min(whole, BYTES_PER_ELEMENT * int(settings.get("stage3_max_live_parameters", _LIVE_ELEMENTS)))
    copies = 2 if device_type == "cpu" else 1  # one of them is gloo's
    offloaded = (2 + MOMENTS) * part if "offload_optimizer" in settings else 0
    return EngineMemory(
        weights=2 * part,
        moments=MOMENTS * part,
        gradients=part,
        buffers=room + gathered,
        reduction=part + room + gathered + copies * filled,
        activations_left=1 - filled / whole,
        offloaded=offloaded + (part if "offload_param" in settings else 0),
    )


def _bucket(whole: int, settings: dict[str, Any], device_type: str) -> tuple[int, int]:
    """Bytes that a bucket takes, and that are ever filled of it: on a CPU, what is not written takes no memory."""
    bucket = BYTES_PER_ELEMENT * int(settings.get("reduce_bucket_size", BUCKET_ELEMENTS))
    filled = min(whole, bucket)
    return (filled if device_type == "cpu" else bucket), filled


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that come into being and go.

    Args:
        known: Tensors that are not counted, neither themselves nor views of them.

    Attributes:
        peak: The most at any time.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._total = 0
        self._watches: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._watches or key in self._known:
            return
        num_bytes = storage.nbytes()

        def gone(_: Any) -> None:
            del self._watches[key]
            self._total -= num_bytes

        self._watches[key] = weakref.ref(storage, gone)
        self._total += num_bytes
        self.peak = max(self.peak, self._total)


def forget_gradient(parameter: Tensor) -> None:
    """For gradients whose room is counted elsewhere: all of them are there already in a second micro-batch."""
    parameter.grad = None


class PassTheory:
    """The most that a forward and backward pass hold besides weights and gradients, in theory.

    That is what autograd keeps, blocks that are computed again, gradients of activations and temporary tensors, found
    by following tensors without values. Workspaces of kernels and fragmentation come on top.

    Args:
        config: The run.
        model_config: Its model, with shapes.

    Raises:
        Exception: Whatever a network raises that cannot be built or run without values; also when called.
    """

    def __init__(self, config: RunConfig, model_config: JMVAEConfig) -> None:
        self._model_config = model_config
        # Tensors of the meta device that claim to be on another one: autocast does not know meta itself.
        self._mode = FakeTensorMode()
        with self._mode:
            self._forward_pass = fake_model(config, model_config)
        for parameter in self._forward_pass.parameters():
            parameter.register_post_accumulate_grad_hook(forget_gradient)

    def __call__(self, batch_size: int) -> int:
        """Bytes for a pass with so many samples."""
        shapes = self._model_config.input_dims
        assert shapes is not None
        live = _LiveBytes([*self._forward_pass.parameters(), *self._forward_pass.buffers()])
        with self._mode, live:
            inputs = {name: torch.zeros(batch_size, *shape) for name, shape in shapes.items()}
            noise = torch.zeros(batch_size, self._model_config.latent_dim)
            loss_sum, _ = self._forward_pass(inputs, noise=noise, check_inputs=False)
            loss_sum.backward()
        return live.peak


def available_bytes() -> int:
    """Memory that this process could still take on its machine, within the limits of its control groups."""
    return min([psutil.virtual_memory().available, *_free_in_control_groups()])


def _free_in_control_groups(
    membership: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """What each limit above this process leaves; files in memory that can be dropped count as free."""
    free = []
    for line in membership.read_text().splitlines() if membership.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = mounted, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = (
                mounted / "memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        # In a container the path may be that of the host, and only the root be there.
        own = root / path.lstrip("/")
        for group in (own, *own.parents):
            if group.is_relative_to(root):
                free += _free_in_control_group(group, *names)
    return free


def _free_in_control_group(group: Path, limit: str, usage: str, droppable: str) -> list[int]:
    try:
        limit_text, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return []
    stat = dict(line.split() for line in lines)
    return [int(limit_text) - used + int(stat.get(droppable, 0))] if limit_text.isdigit() else []

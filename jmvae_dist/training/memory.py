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

from jmvae_dist.config import JMVAEConfig, RunConfig
from jmvae_dist.distributed.deepspeed_config import BUCKET_ELEMENTS
from jmvae_dist.training.fake_pass import fake_model

# Weights, gradients and moments are float32 with every engine and precision.
BYTES_PER_ELEMENT = 4
MOMENTS = 2


@dataclass(frozen=True)
class EngineMemory:
    """Bytes that one rank holds throughout a step.

    Args:
        weights: With the float32 partition that zero1 and zero2 keep beside the weights.
        gradients: After the backward pass; zero1 holds all of them during it.
        moments: Adam's two.
        buffers: A bucket, in which DeepSpeed reduces gradients.
    """

    weights: int
    gradients: int
    moments: int
    buffers: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.moments + self.buffers


def engine_memory(engine: str, num_parameters: int, num_ranks: int) -> EngineMemory:
    """What a rank holds throughout a step with an engine, in bytes (Rajbhandari et al. 2020, all in float32).

    With one rank DeepSpeed cuts nothing, and its copies come on top.
    """
    whole = BYTES_PER_ELEMENT * num_parameters
    part = BYTES_PER_ELEMENT * math.ceil(num_parameters / num_ranks)
    bucket = BYTES_PER_ELEMENT * min(num_parameters, BUCKET_ELEMENTS)
    return {
        "ddp": EngineMemory(whole, whole, MOMENTS * whole, 0),
        "zero0": EngineMemory(whole, whole, MOMENTS * whole, bucket),
        "zero1": EngineMemory(whole + part, whole + part, MOMENTS * part, bucket),
        "zero2": EngineMemory(whole + part, part, MOMENTS * part, bucket),
        "zero3": EngineMemory(part, part, MOMENTS * part, bucket),
    }[engine]


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

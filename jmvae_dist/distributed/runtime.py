"""The Accelerate runtime: device, precision, process group, and the engine around model and optimizer."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.distributed.environment import ProcessInfo
from jmvae_dist.errors import ConfigError, LaunchError, is_on_all_ranks

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Runtime:
    """What the processes of a run share: Accelerate's view of the devices, and our collectives."""

    accelerator: Accelerator
    process: ProcessInfo
    collectives: Collectives

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which decides, prints and writes."""
        return self.process.rank == 0

    def prepare(self, model: nn.Module) -> nn.Module:
        """Wrap the model for the engine: autocast in its forward pass, DDP around it with several processes.

        `model` itself stays as it is: evaluations that use it run in the precision of its weights.
        """
        return self.accelerator.prepare_model(_Forward(model))

    @property
    def device(self) -> torch.device:
        """Where the model and its batches live."""
        return self.accelerator.device


class _Forward(nn.Module):
    """Takes the wrappers that Accelerate puts on a module's `forward` in place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.model(*arguments, **options)


def check_device(device: str) -> None:
    """Refuse a GPU that is not there; called before any process group starts.

    Raises:
        ConfigError: `device` is cuda and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training.device: cuda is not available to torch on this machine; use auto or cpu")


@contextlib.contextmanager
def start_runtime(
    process: ProcessInfo, *, device: str = "auto", precision: str = "fp32", timeout_s: float = 600.0
) -> Iterator[Runtime]:
    """Start the process group and Accelerate, and take them down again.

    Args:
        process: Rank and world size from the launcher.
        device: auto, cpu or cuda.
        precision: fp32 or bf16; applies to models that pass through `Runtime.prepare`.
        timeout_s: After this long without an answer from a peer a collective fails.

    Raises:
        LaunchError: Fewer processes take part than the launcher announced, or on another backend.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    timeout = timedelta(seconds=timeout_s)
    # The backend is explicit: left to itself Accelerate can take each rank for a run of one process on a CPU.
    process_group = InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=timeout)
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if precision == "bf16" else "no",
        kwargs_handlers=[process_group, ddp] if process.world_size > 1 else [],
    )
    _check_world(accelerator, process)
    group = dist.new_group(backend="gloo", timeout=timeout) if process.world_size > 1 else None
    try:
        yield Runtime(accelerator, process, Collectives(process.rank, process.world_size, group))
    except Exception as error:
        if is_on_all_ranks(error):
            # Free the engine, which the traceback holds, before its process group: the other way round the
            # interpreter is aborted at its end now and then.
            traceback.clear_frames(error.__traceback__)
            gc.collect()
            _leave_process_group()
        raise
    _leave_process_group()


def _leave_process_group() -> None:
    """Only when all ranks leave: with a peer still in a collective this could wait for it forever.

    A process that ends without it may be aborted by gloo's threads, which find their peers gone.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_world(accelerator: Accelerator, process: ProcessInfo) -> None:
    actual = (accelerator.process_index, accelerator.num_processes)
    if actual != (process.rank, process.world_size):
        raise LaunchError(
            f"the launcher announced rank {process.rank} of {process.world_size}, but Accelerate runs as rank "
            f"{actual[0]} of {actual[1]}: the run would silently be smaller than asked; start it with torchrun "
            "(launch/local.sh) or with launch/accelerate/*.yaml"
        )
    if process.world_size > 1 and not dist.is_initialized():
        raise LaunchError("several processes were announced, but no process group was started")

"""The Accelerate runtime: device, precision, process group, and the engine around model and optimizer."""

from __future__ import annotations

import contextlib
import gc
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from jmvae_dist.distributed.allocator import keep_freed_memory
from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.distributed.engine import Engine, ReplicatedEngine
from jmvae_dist.distributed.environment import ProcessInfo, join_launch
from jmvae_dist.distributed.shared_memory import share_gradients
from jmvae_dist.distributed.single_thread import settle_number_of_threads
from jmvae_dist.errors import ConfigError, LaunchError, is_on_all_ranks

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Runtime:
    """What the processes of a run share: Accelerate's view of the devices, and our collectives."""

    accelerator: Accelerator
    process: ProcessInfo
    collectives: Collectives
    engine_name: str
    precision: str

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which decides, prints and writes."""
        return self.process.rank == 0

    def prepare(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        num_micro_batches: int = 1,
        is_compiled: bool = False,
        gradient_reduction: str = "auto",
        reader_bytes: int = 0,
    ) -> Engine:
        """The engine that trains `model`, which itself stays as it is for evaluation in float32.

        Args:
            model: The model.
            optimizer: Its optimizer.
            num_micro_batches: Forward passes per optimizer step.
            is_compiled: Whether its training passes are compiled.
            gradient_reduction: auto, shared_memory or process_group; of the engine ddp.
            reader_bytes: What the reader processes of all ranks may put into shared memory.

        Raises:
            LaunchError: Another engine than the requested one came into being.
            ConfigError: Shared memory was asked for and cannot be had; on all ranks.
        """
        if self.engine_name == "ddp":
            sizes = [parameter.nbytes for parameter in model.parameters() if parameter.requires_grad]
            mean = share_gradients(gradient_reduction, self.collectives, self.device, sizes, reader_bytes)
            return ReplicatedEngine(model, optimizer, self.accelerator, self.precision, is_compiled, mean)
        from jmvae_dist.distributed.deepspeed import ZeroEngine

        name, accelerator = self.engine_name, self.accelerator
        return ZeroEngine(name, model, optimizer, accelerator, self.precision, num_micro_batches, is_compiled)

    def describe(self, engine: Engine | None = None) -> str:
        """What actually runs, in one line; `start_runtime` made sure that it is what was asked for.

        Args:
            engine: What `prepare` has made.
        """
        backend = dist.get_backend() if dist.is_initialized() else "no process group"
        if engine is not None and engine.uses_shared_memory:
            backend += " (gradients in shared memory)"
        return (
            f"{self.accelerator.num_processes} process(es) started by {self.process.launcher}, engine "
            f"{self.engine_name} ({self.accelerator.distributed_type.value} in Accelerate), {backend}, {self.device}"
        )

    def wait_for_device(self) -> None:
        """Return when the steps queued on a GPU are done; what is measured next would have to wait for them."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @property
    def device(self) -> torch.device:
        """Where the model and its batches live."""
        return self.accelerator.device


def takes_gpu(device: str) -> bool:
    """Whether a process computes on a GPU if `training.device` is `device`: auto, cpu or cuda."""
    return device != "cpu" and torch.cuda.is_available()


def check_device(device: str, engine: str = "ddp") -> None:
    """Refuse a device that cannot be had; called before any process group starts.

    Raises:
        ConfigError: `device` is cuda and torch sees none, or it is cpu and DeepSpeed would take a GPU all the same.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError("training.device: cuda is not available to torch on this machine; use auto or cpu")
    if device == "cpu" and has_gpu and engine != "ddp":
        raise ConfigError(
            f"training.device: cpu with the engine {engine} needs the GPUs of this machine hidden; "
            "set CUDA_VISIBLE_DEVICES to an empty string"
        )


@contextlib.contextmanager
def start_runtime(
    process: ProcessInfo,
    *,
    device: str = "auto",
    precision: str = "fp32",
    engine: str = "ddp",
    deepspeed_config: dict[str, Any] | None = None,
    timeout_s: float = 600.0,
    patience_s: float | None = None,
    has_joined: bool = False,
) -> Iterator[Runtime]:
    """Start the process group and Accelerate, and take them down again.

    Args:
        process: Rank and world size from the launcher.
        device: auto, cpu or cuda.
        precision: fp32, bf16 or fp16; applies to models that pass through `Runtime.prepare`.
        engine: ddp or zero0 .. zero3.
        deepspeed_config: From `deepspeed.build_config`, for the zero engines.
        timeout_s: After this long without an answer from a peer a collective fails.
        patience_s: The same for `Runtime.collectives`, once all ranks have met; None: also `timeout_s`.
        has_joined: `join_launch` was called before; this process may hold the port where the ranks meet by now.

    Raises:
        LaunchError: Fewer processes take part than the launcher announced, or on another engine or backend.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    if not has_joined:
        join_launch(process)
    # Moments of weights that get no gradient any more shrink until a CPU needs a hundred times as long for them, and
    # steps half as long again. Before threads are started, which inherit it: those of OpenMP and of gloo.
    torch.set_flush_denormal(True)
    on_cpu = not takes_gpu(device)
    if on_cpu:
        keep_freed_memory()
        settle_number_of_threads()
    backend = "gloo" if on_cpu else "nccl"
    timeout = timedelta(seconds=timeout_s)
    handlers: list[Any] = []
    if process.world_size > 1 or engine != "ddp":
        # The backend is explicit: left to itself Accelerate can take each rank for a run of one process on a CPU.
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timeout))
    plugin = None
    if engine != "ddp":
        from jmvae_dist.distributed.deepspeed import make_plugin, prepare_process

        assert deepspeed_config is not None
        prepare_process(on_cpu)
        plugin = make_plugin(deepspeed_config)
        if process.launcher == "single":
            # DeepSpeed needs both also for one process, to which no launcher has given them.
            os.environ["LOCAL_RANK"] = "0"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    elif process.world_size > 1:
        # Not `static_graph`: it fails on micro-batches without a reduction (`no_sync`), and sums over three ranks in
        # another order after a resume.
        handlers.append(DistributedDataParallelKwargs(gradient_as_bucket_view=True))
    # Precision is not Accelerate's here but that of `engine.ForwardPass`, the same for every engine. And with
    # cpu=True Accelerate would quietly take DDP in place of DeepSpeed.
    accelerator = Accelerator(
        cpu=on_cpu and plugin is None, mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=handlers
    )
    _check_world(accelerator, process, engine, backend)
    assert accelerator.device.type == ("cpu" if on_cpu else "cuda"), accelerator.device
    patience = timeout if patience_s is None else timedelta(seconds=patience_s)
    group = dist.new_group(backend="gloo", timeout=patience) if process.world_size > 1 else None
    try:
        collectives = Collectives(process.rank, process.world_size, group)
        yield Runtime(accelerator, process, collectives, engine, precision)
    except Exception as error:
        if is_on_all_ranks(error):
            traceback.clear_frames(error.__traceback__)
            _leave_process_group()
        raise
    finally:
        torch.set_flush_denormal(False)
    _leave_process_group()


def _leave_process_group() -> None:
    """Only when all ranks leave: with a peer still in a collective this could wait for it forever.

    A process that ends without it may be aborted by gloo's threads, which find their peers gone.
    """
    # The engine goes first, also out of reference cycles: the other way round the interpreter is aborted at its end
    # now and then ("terminate called without an active exception").
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_world(accelerator: Accelerator, process: ProcessInfo, engine: str, backend: str) -> None:
    """Refuse a run that would silently be smaller, or another, than the one asked for."""
    actual = (accelerator.process_index, accelerator.num_processes)
    if actual != (process.rank, process.world_size):
        raise LaunchError(
            f"the launcher announced rank {process.rank} of {process.world_size}, but Accelerate runs as rank "
            f"{actual[0]} of {actual[1]}: the run would silently be smaller than asked; start it with torchrun "
            "(launch/local.sh) or with launch/accelerate/*.yaml"
        )
    if process.world_size > 1 and not dist.is_initialized():
        raise LaunchError("several processes were announced, but no process group was started")
    if dist.is_initialized() and (dist.get_world_size(), dist.get_backend()) != (process.world_size, backend):
        raise LaunchError(
            f"the process group has {dist.get_world_size()} process(es) on {dist.get_backend()}; asked for were "
            f"{process.world_size} on {backend}"
        )
    uses_deepspeed = accelerator.distributed_type.value == "DEEPSPEED"
    if uses_deepspeed != (engine != "ddp"):
        raise LaunchError(
            f"training.engine: {engine} was asked for, but Accelerate runs {accelerator.distributed_type.value}; "
            "unset ACCELERATE_USE_DEEPSPEED and the like: the engine is chosen by the configuration only"
        )

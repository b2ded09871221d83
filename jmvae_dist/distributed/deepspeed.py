"""DeepSpeed's ZeRO engines (Rajbhandari et al. 2020), through Accelerate. The one place that knows their insides.

What is relied on beyond the public interface: where a ZeRO optimizer keeps reduced gradients between the backward
pass and the step (`averaged_gradients`, or the `.grad` of the float32 partitions with optimizer offload). The range
of versions in `setup.cfg` is narrow for that reason, and a test compares every engine with DDP bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jmvae_dist.distributed.engine import Engine, ForwardPass
from jmvae_dist.errors import ConfigError, LaunchError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

Around = Callable[[], AbstractContextManager[None]]
# DeepSpeed's collectives, by name of the method of its one backend: gradients are summed, weights are gathered.
_SUMS = ("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor")
_GATHERS = ("all_gather", "all_gather_coalesced", "all_gather_into_tensor", "broadcast")


def prepare_process(on_cpu: bool) -> None:
    """Settings that DeepSpeed reads when it is imported or first communicates; before the Accelerator is made.

    Raises:
        LaunchError: DeepSpeed is not installed.
    """
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
        from deepspeed import ops
    except ImportError as error:
        raise LaunchError(f"training.engine: DeepSpeed cannot be imported ({error}); pip install deepspeed") from None
    # It reports every default at the INFO level, and calls torch by names that will change.
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if on_cpu:
        # Else the first collective compiles this operator for minutes, and a run killed meanwhile leaves a lock
        # that every later one waits for without a word. Gloo takes its place.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_plugin(config: dict[str, Any]) -> DeepSpeedPlugin:
    """Accelerate's plugin for a DeepSpeed configuration, which is checked before processes meet.

    Raises:
        ConfigError: DeepSpeed does not accept an option of the user's.
    """
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(copy.deepcopy(config))
    except (DeepSpeedConfigError, ValueError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"training.deepspeed.config_file: DeepSpeed does not accept it ({reason})") from error

    class Plugin(DeepSpeedPlugin):
        def set_deepspeed_weakref(self) -> None:
            """Would tell the transformers library about ZeRO-3, and thus demand that it is installed."""

    return Plugin(hf_ds_config=config, zero3_init_flag=False)


class ZeroEngine(Engine):
    """DeepSpeed with ZeRO stage 0 to 3.

    Args:
        name: zero0 .. zero3.
        model: The unwrapped model.
        optimizer: Its optimizer, which DeepSpeed keeps and gives flat float32 partitions instead.
        accelerator: Accelerate's view of the run, made with `make_plugin`.
        precision: fp32, bf16 or fp16.
        num_micro_batches: Forward passes per optimizer step.
        is_compiled: See `ForwardPass`; not with ZeRO 3, whose hooks gather the weights of every layer.

    Raises:
        LaunchError: DeepSpeed made another optimizer than this stage's.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        precision: str,
        num_micro_batches: int,
        is_compiled: bool = False,
    ) -> None:
        super().__init__(model, optimizer)
        self.name = name
        self.is_settled = not is_compiled
        self.stage = int(name.removeprefix("zero"))
        forward_pass = ForwardPass(model, precision, accelerator.device.type, is_compiled)
        # The structure alone, before DeepSpeed changes it, for `evaluation_model`.
        self._skeleton = copy.deepcopy(model).to("meta") if self.stage == 3 else None
        plugin: DeepSpeedPlugin = accelerator.state.deepspeed_plugin
        plugin.hf_ds_config.config["gradient_accumulation_steps"] = num_micro_batches
        self._engine, _ = accelerator.prepare(forward_pass, optimizer)
        self.zero_optimizer: Any = self._engine.optimizer
        self._check_optimizer()
        self._offloads = bool(getattr(self.zero_optimizer, "cpu_offload", False)) or bool(
            getattr(self.zero_optimizer, "offload_optimizer", False)
        )

    def _check_optimizer(self) -> None:
        expected = {
            0: type(self.optimizer).__name__,
            1: "DeepSpeedZeroOptimizer",
            2: "DeepSpeedZeroOptimizer",
            3: "DeepSpeedZeroOptimizer_Stage3",
        }[self.stage]
        found = type(self.zero_optimizer).__name__
        actual_stage = self._engine.zero_optimization_stage()
        if found != expected or actual_stage != self.stage:
            raise LaunchError(
                f"training.engine: {self.name} was asked for, but DeepSpeed runs stage {actual_stage} with {found}; "
                "install a version of DeepSpeed from the range in setup.cfg"
            )

    @contextlib.contextmanager
    def _micro_batch(self, is_last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(is_boundary=is_last)
        yield
        if not is_last:
            self._engine.step()  # counts the micro-batch; takes no step before the boundary

    def forward(self, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        # The loss is already scaled for the whole step.
        self._engine.backward(loss, scale_wrt_gas=False)

    @contextlib.contextmanager
    def collectives_watched(self, around_sum: Around, around_gather: Around) -> Iterator[None]:
        """Meanwhile each of DeepSpeed's collectives runs alone: it is waited for, inside of a context manager.

        What DeepSpeed would overlap with computation takes its turn, so steps may take longer than otherwise.

        Args:
            around_sum: Makes the context manager for sums over ranks, which are those of gradients.
            around_gather: The same for gathers and broadcasts, which are those of weights.
        """
        from deepspeed.comm import comm

        backend = comm.cdb
        for names, around in ((_SUMS, around_sum), (_GATHERS, around_gather)):
            for name in names:
                setattr(backend, name, self._alone(getattr(backend, name), around))
        try:
            yield
        finally:
            for name in (*_SUMS, *_GATHERS):
                delattr(backend, name)  # of this object, which hides the method of its class

    def _alone(self, collective: Callable[..., Any], around: Around) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._wait_for_device()
            with around():
                work = collective(*arguments, **options)
                if work is not None:
                    work.wait()
                self._wait_for_device()
            return work

        return call

    def _wait_for_device(self) -> None:
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize()

    def gradients(self) -> list[Tensor]:
        if self.stage == 0:
            return super().gradients()
        zero = self.zero_optimizer
        if self._offloads:
            partitions = (
                zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
            )
            if self.stage != 3:
                zero._wait_for_offload_copies()
            return [partition.grad for partition in partitions if partition.grad is not None]
        return [tensor for tensors in zero.averaged_gradients.values() for tensor in tensors or []]

    def step(self) -> None:
        self._engine.step()

    @contextlib.contextmanager
    def evaluation_model(self) -> Iterator[nn.Module]:
        if self._skeleton is None:
            yield self.model
            return
        import deepspeed

        # A copy without DeepSpeed's hooks, which would give the weights of each layer back after its use and wait
        # for all ranks at the next one: figures are drawn by rank 0 alone.
        copied = copy.deepcopy(self._skeleton).to_empty(device=self._engine.device)
        with deepspeed.zero.GatheredParameters(list(self.model.parameters())), torch.no_grad():
            targets, sources = ([*m.parameters(), *m.buffers()] for m in (copied, self.model))
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
        yield copied

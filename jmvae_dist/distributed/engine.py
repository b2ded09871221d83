"""The training engine: what wraps the model and reduces gradients, behind one interface for all engines.

Numbers do not depend on the engine: weights, gradients and moments are float32 everywhere, 16-bit precision is
autocast inside the model's forward pass, and clipping, loss scaling and the decision to skip an update happen on
the gradients that `Engine.gradients` exposes. Engines differ only in which rank holds which part.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jmvae_dist.distributed.shared_memory import SharedMemoryMean

if TYPE_CHECKING:
    from accelerate import Accelerator

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ForwardPass(nn.Module):
    """The training forward pass under autocast; the model itself stays as it is for evaluation in float32.

    Args:
        model: The unwrapped model.
        precision: fp32, bf16 or fp16.
        device_type: Where the pass runs.
        is_compiled: Let torch.compile make one program of it. Sizes are fixed in it: with symbolic ones, the programs
            would depend on the order in which sizes came up, and a resumed run could differ in its last bits.
    """

    def __init__(self, model: nn.Module, precision: str, device_type: str, is_compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self._dtype = AUTOCAST_DTYPES.get(precision)
        self._device_type = device_type
        # The method, not the module: wrapped as a module, the model would be registered twice.
        self._compute: Callable[..., tuple[Tensor, dict[str, Tensor]]] = (
            torch.compile(self._compute_eagerly, dynamic=False) if is_compiled else self._compute_eagerly
        )

    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss_sum` and `metrics` of the model's output: a plain tuple, which every wrapper can take apart."""
        return self._compute(*arguments, **options)

    def _compute_eagerly(self, *arguments: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        # Here and not around the engine: DeepSpeed switches off an autocast that surrounds it.
        with torch.autocast(self._device_type, dtype=self._dtype, enabled=self._dtype is not None):
            output = self.model(*arguments, **options)
        return output.loss_sum, output.metrics


class Engine(ABC):
    """A model and its optimizer, ready to train on this process.

    Attributes:
        name: ddp or zero0 .. zero3.
        model: The unwrapped model.
        optimizer: The optimizer that finally updates float32 weights; learning rates are set on its groups.
        group_parameters: Names of the parameters of each of its groups.
        stage: Stage of ZeRO; at 0 every rank holds everything.
        is_settled: False while the first forward and backward passes differ from the later ones: they may sum over
            ranks in another order, or have to be compiled.
        uses_shared_memory: Whether gradients are averaged in shared memory.
    """

    name: str
    stage = 0
    is_settled = True
    uses_shared_memory = False

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self._parameters = list(model.parameters())  # to walk through the modules takes longer than through a list
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        # Noted before an engine replaces the parameters of the groups by partitions of its own.
        self.group_parameters = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]

    def forward_backward(self, scale: Tensor | float, is_last: bool, **inputs: Any) -> dict[str, Tensor]:
        """One micro-batch: forward pass, and backward pass of `scale * loss_sum`.

        Args:
            scale: Factor of the loss; gradients are averaged over ranks with equal weight.
            is_last: Whether this is the step's last micro-batch, after which gradients are complete.
            inputs: Arguments of the model's forward pass.

        Returns:
            The model's metrics, sums over the micro-batch.
        """
        with self._micro_batch(is_last):
            loss_sum, metrics = self.forward(**inputs)
            self.backward(loss_sum * scale)
        return metrics

    def _micro_batch(self, is_last: bool) -> AbstractContextManager[None]:
        """Around the passes of one micro-batch."""
        return contextlib.nullcontext()

    @abstractmethod
    def forward(self, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The forward pass: summed loss and metrics of the micro-batch."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """The backward pass; in a step's last micro-batch with the reduction of the gradients."""

    @property
    def is_partitioned(self) -> bool:
        """Whether `gradients` holds only this rank's part of each gradient."""
        return self.stage > 0

    def gradients(self) -> list[Tensor]:
        """The gradients of the step as live float32 tensors, to be scaled in place before `step`."""
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    @abstractmethod
    def step(self) -> None:
        """Let the optimizer update the weights, and clear the gradients."""

    @contextlib.contextmanager
    def evaluation_model(self) -> Iterator[nn.Module]:
        """A model with all current weights on this rank, in float32; entered by all ranks together."""
        yield self.model


class ReplicatedEngine(Engine):
    """Every rank holds everything: one process, or PyTorch's DistributedDataParallel.

    Args:
        model: The unwrapped model.
        optimizer: Its optimizer.
        accelerator: Accelerate's view of the run.
        precision: fp32, bf16 or fp16.
        is_compiled: See `ForwardPass`.
        mean: What averages gradients over ranks in place of the process group.
    """

    name = "ddp"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        precision: str,
        is_compiled: bool = False,
        mean: SharedMemoryMean | None = None,
    ) -> None:
        super().__init__(model, optimizer)
        self.uses_shared_memory = mean is not None
        self._accelerator = accelerator
        forward_pass = ForwardPass(model, precision, accelerator.device.type, is_compiled)
        self._module = accelerator.prepare_model(forward_pass)
        if mean is not None:
            self._module.register_comm_hook(None, mean.hook)
        # DDP lays its gradient buckets out anew after its first backward pass, and with three or more ranks gloo's
        # and NCCL's order of summation follows the buckets; two numbers have only one sum.
        has_one_order = mean is not None or accelerator.num_processes <= 2
        self.is_settled = has_one_order and not is_compiled

    def without_reduction(self) -> AbstractContextManager[None]:
        """Backward passes inside leave each rank its own gradients."""
        return self._accelerator.no_sync(self._module)

    def _micro_batch(self, is_last: bool) -> AbstractContextManager[None]:
        # Gradients travel between ranks once per optimizer step, during the last backward pass.
        return contextlib.nullcontext() if is_last else self.without_reduction()

    def forward(self, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self._module(**inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

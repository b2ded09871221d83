"""One optimizer step: micro-batches, gradient reduction, clipping, update, and the sums to be logged.

Shape legend: B rows of this rank's share of the global batch, D latent dimensions.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from jmvae_dist.config import OptimizerSection
from jmvae_dist.data.loader import Batch
from jmvae_dist.distributed.runtime import Runtime
from jmvae_dist.kernels.noise import Stream, normal_noise
from jmvae_dist.training.setup import ResolvedRun, num_micro_batches


def make_optimizer(model: nn.Module, section: OptimizerSection, device: torch.device) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, fused on devices that have it."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, betas=section.betas, eps=section.eps, fused=fused)


class TrainStep:
    """Takes optimizer steps on the engine's model.

    The gradient of the mean loss over the *global* batch is what the optimizer sees, for any split of the batch:
    DDP averages gradients over ranks with equal weight, so a rank's summed loss is scaled by world_size / G.

    Args:
        run: The resolved run.
        runtime: Process group and engine.
        model: The prepared model (wrapped by the engine).
        optimizer: The unwrapped optimizer.
    """

    def __init__(
        self, run: ResolvedRun, runtime: Runtime, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self._run = run
        self._runtime = runtime
        self._model = model
        self._optimizer = optimizer
        self._num_micro_batches = num_micro_batches(run, runtime.process.world_size)
        self._loss_scale = runtime.process.world_size / run.config.training.global_batch_size
        # With one or two ranks a sum has no order that could change.
        self._is_rehearsed = runtime.process.world_size <= 2

    def __call__(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Take the step after `batch.global_step` finished steps.

        Returns:
            Sums over this rank's rows of every metric, and the gradient's L2 norm before clipping, as scalars on
            the device: nothing is read back to the host here.
        """
        run = self._run
        if not self._is_rehearsed:
            self._rehearse(batch)
            self._is_rehearsed = True
        for group in self._optimizer.param_groups:
            group["lr"] = run.learning_rate(batch.global_step)
        sums = self._accumulate_gradients(batch, run.annealing(batch.global_step))
        grad_norm = self._clip()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return sums, grad_norm

    def _rehearse(self, batch: Batch) -> None:
        """Forward and backward without an update, before the first step of this process.

        DDP lays its gradient buckets out anew after its first backward pass, and the order of summation over three
        or more ranks follows the buckets: without a rehearsal the first step after a resume would differ in the
        last bits from the same step of an uninterrupted run.
        """
        buffers = [buffer.clone() for buffer in self._model.buffers()]
        self._accumulate_gradients(batch, annealing=1.0)
        self._optimizer.zero_grad(set_to_none=True)
        for buffer, value in zip(self._model.buffers(), buffers, strict=True):
            buffer.copy_(value)

    def _accumulate_gradients(self, batch: Batch, annealing: float) -> dict[str, Tensor]:
        device = self._runtime.device
        rows_B = batch.rows.to(device, non_blocking=True)
        noise_BD = normal_noise(
            self._run.config.training.seed,
            batch.global_step,
            rows_B,
            self._run.model_config.latent_dim,
            stream=Stream.LATENT,
        )
        inputs = {name: values.to(device, non_blocking=True) for name, values in batch.inputs.items()}
        sums: dict[str, Tensor] = {}
        bounds = np.linspace(0, len(batch.rows), self._num_micro_batches + 1).astype(int).tolist()
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            is_last = number == self._num_micro_batches - 1
            # Gradients travel between ranks once per optimizer step, during the last backward pass.
            with nullcontext() if is_last else self._runtime.accelerator.no_sync(self._model):
                output = self._model(
                    {name: values[start:stop] for name, values in inputs.items()},
                    annealing=annealing,
                    noise=noise_BD[start:stop],
                    check_inputs=False,  # the loader checked them on the host
                )
                self._runtime.accelerator.backward(output.loss_sum * self._loss_scale)
            for key, value in output.metrics.items():
                sums[key] = sums[key] + value if key in sums else value
        return sums

    def _clip(self) -> Tensor:
        parameters = [parameter for parameter in self._model.parameters() if parameter.grad is not None]
        max_norm = self._run.config.training.gradient_clip_norm
        if max_norm is None:
            return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return nn.utils.clip_grad_norm_(parameters, max_norm)

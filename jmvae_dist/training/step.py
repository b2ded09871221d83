"""One optimizer step: micro-batches, gradient reduction, judgement, update, and the sums to be logged.

Shape legend: B rows of this rank's share of the global batch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.distributed.engine import Engine
from jmvae_dist.distributed.runtime import Runtime
from jmvae_dist.kernels.noise import KeyedNoise
from jmvae_dist.training.guards import StepGuard
from jmvae_dist.training.optimizer import GuardedAdamW
from jmvae_dist.training.ready_batches import ReadyBatch
from jmvae_dist.training.setup import ResolvedRun, num_micro_batches


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind, as scalars on the device: nothing is read back to the host.

    Args:
        sums: Sums over this rank's valid rows of every metric.
        num_valid: Number of these rows.
        grad_norm: L2 norm of the gradient of the mean loss over the global batch, before clipping; None if the step
            is not recorded and nothing is clipped.
    """

    sums: dict[str, Tensor]
    num_valid: int
    grad_norm: Tensor | None

    def means(self, collectives: Collectives) -> dict[str, float]:
        """Means over the valid samples of the global batch, from all ranks' sums; waits for the device."""
        local = torch.stack([value.double() for value in self.sums.values()]).cpu()
        total = collectives.sum(torch.cat([local, torch.tensor([self.num_valid]).double()]))
        return dict(zip(self.sums, (total[:-1] / total[-1]).tolist(), strict=True))


class TrainStep:
    """Takes optimizer steps on an engine.

    The gradient of the mean loss over the *global* batch is what the optimizer sees, for any split of the batch:
    engines average gradients over ranks with equal weight, so a rank's summed loss is scaled by world_size / G. If
    samples are masked, the mean is over the V valid ones; V is known after the reduction that the guard needs anyway,
    and its factor G / V (1 without masked samples, which changes no bit) goes into the gradients with the others.

    Args:
        run: The resolved run.
        runtime: Process group.
        engine: Model and optimizer.
        guard: Judges each step before it changes the weights.
    """

    def __init__(self, run: ResolvedRun, runtime: Runtime, engine: Engine, guard: StepGuard) -> None:
        self._run = run
        self._device = runtime.device
        self._engine = engine
        self._guard = guard
        self._num_micro_batches = num_micro_batches(run, runtime.process.world_size)
        self._known_bounds: dict[int, list[int]] = {}  # by number of rows
        self._is_compiled = run.config.training.compile != "off"
        self._loss_scale = runtime.process.world_size / run.config.training.global_batch_size

    def __call__(self, batch: ReadyBatch, *, is_wanted: bool = True, is_recorded: bool = True) -> StepResult:
        """Take the step after `batch.global_step` finished steps.

        On a GPU the step is launched, and the one before it done.

        Args:
            batch: This rank's share of the global batch, which is released.
            is_wanted: False to pass the batch over: its metrics are computed, the weights stay as they are.
            is_recorded: Whether its result is going to be recorded.
        """
        run, engine = self._run, self._engine
        assert isinstance(engine.optimizer, GuardedAdamW)
        assert engine.is_settled, "call `rehearse` before the first step"
        for group in engine.optimizer.param_groups:
            group["lr"] = run.learning_rate(batch.global_step)
        sums = self._accumulate_gradients(batch, run.annealing(batch.global_step))
        gradients = engine.gradients()
        verdict = self._guard.judge(
            batch.global_step,
            sums["loss/total"],
            len(batch),
            gradients,
            is_wanted=is_wanted,
            is_recorded=is_recorded,
        )
        if not _is_known_to_be_one(verdict.factor):
            for gradient in gradients:
                gradient.mul_(verdict.factor.to(gradient.device))
        engine.optimizer.is_sound = verdict.is_sound
        engine.step()
        batch.release()
        return StepResult(sums, len(batch), verdict.grad_norm)

    def rehearse(self, batch: ReadyBatch) -> None:
        """A step that is dropped, before the first one of an engine that is not settled.

        Without it the first step after a resume could differ in the last bits from the same step of an uninterrupted
        run, whose gradients are summed in the order that settles after the first backward pass; and compiling would
        be taken for a step that hangs.
        """
        engine = self._engine
        assert isinstance(engine.optimizer, GuardedAdamW)
        buffers = [buffer.clone() for buffer in engine.model.buffers()]
        self._accumulate_gradients(batch, annealing=1.0)
        # By the engine's own step, which also clears what ZeRO keeps between its backward pass and its step.
        engine.optimizer.is_sound = torch.zeros((), dtype=torch.bool, device=self._device)
        engine.step()
        for buffer, value in zip(engine.model.buffers(), buffers, strict=True):
            buffer.copy_(value)
        engine.is_settled = True

    def _accumulate_gradients(self, batch: ReadyBatch, annealing: float) -> dict[str, Tensor]:
        scale = self._guard.loss_scale * self._loss_scale
        sums: dict[str, Tensor] = {}
        for number, (start, stop) in enumerate(itertools.pairwise(self._bounds(len(batch)))):
            metrics = self._engine.forward_backward(
                scale,
                is_last=number == self._num_micro_batches - 1,
                inputs={name: values[start:stop] for name, values in batch.inputs.items()},
                annealing=self._as_argument(annealing),
                noise=self._noise(batch, slice(start, stop)),
                check_inputs=False,  # the loader checked them on the host
            )
            for key, value in metrics.items():
                sums[key] = sums[key] + value if key in sums else value
        return sums

    def _bounds(self, num_rows: int) -> list[int]:
        """Where micro-batches begin and end; remembered, as to find them takes longer than some operations."""
        if num_rows not in self._known_bounds:
            bounds = np.linspace(0, num_rows, self._num_micro_batches + 1).astype(int).tolist()
            self._known_bounds[num_rows] = bounds
        return self._known_bounds[num_rows]

    def _noise(self, batch: ReadyBatch, part: slice) -> Tensor | KeyedNoise:
        if batch.noise is not None:
            return batch.noise[part]
        key = KeyedNoise(self._run.config.training.seed, batch.global_step, batch.rows[part])
        return key.draw(self._run.model_config.latent_dim) if self._is_compiled else key

    def _as_argument(self, annealing: float) -> float | Tensor:
        # Numbers that are no tensors are constants of a compiled program, which every step would compile anew.
        return torch.full((), annealing, device=self._device) if self._is_compiled else annealing


def _is_known_to_be_one(factor: Tensor) -> bool:
    """Whether multiplying by it would change no bit, where finding out does not mean to wait for a device."""
    return factor.device.type == "cpu" and factor.item() == 1.0

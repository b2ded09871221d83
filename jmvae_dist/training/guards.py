"""What protects the weights from a bad step: loss scaling, non-finite gradients, loss spikes.

All decisions are taken on the device, from values that are equal on all ranks, and reach the host only when
metrics are read: a step that must not count is dropped by the optimizer (`GuardedAdamW.is_sound`), and nobody
waits for the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jmvae_dist.training_config import GuardsSection

# As torch.amp.GradScaler: halve after an overflow, double after so many sound steps.
_INITIAL_LOSS_SCALE = 2.0**16
_GROWTH_INTERVAL_STEPS = 2000


class RewindRequested(Exception):  # noqa: N818  # a request, not an error
    """The loss has spiked: go back to a checkpoint from before `first_step` and pass over the batches since."""

    def __init__(self, first_step: int) -> None:
        super().__init__(f"rewind to before step {first_step}")
        self.first_step = first_step


@dataclass(frozen=True)
class Verdict:
    """What is to be done with the gradients of a step; scalars on the device, equal on all ranks.

    Args:
        is_sound: Whether the step may change the weights.
        grad_norm: L2 norm of the whole gradient of the mean loss, before clipping; None where nobody wants it.
        factor: To be multiplied into the gradients: undoes the loss scale and clips.
    """

    is_sound: Tensor
    grad_norm: Tensor | None
    factor: Tensor


@dataclass(frozen=True)
class GuardReading:
    """The guards' counters, on the host.

    Args:
        skipped_steps: Steps dropped since the beginning of the run.
        masked_samples: Samples masked since the beginning of the run, over all ranks.
        masked_beyond: Masked samples beyond the fraction that is borne for good; what exceeds the run's patience.
        consecutive_skips: Longest row of dropped steps since the last reading.
        spiked_at: The first step, of those since the last reading, whose loss was a spike; None without one.
        loss_scale: Current loss scale; 1 without fp16.
    """

    skipped_steps: int
    masked_samples: int
    masked_beyond: float
    consecutive_skips: int
    spiked_at: int | None
    loss_scale: float


class StepGuard:
    """Judges steps; its state is part of a checkpoint.

    Args:
        section: Thresholds.
        precision: fp16 scales the loss.
        gradient_clip_norm: Largest norm of the gradient; None does not clip.
        global_batch_size: To turn summed losses into means.
        mask_tolerance: Fraction of the samples that may be masked for good.
        device: Where losses and gradients live.
        is_partitioned: Whether gradients are split over ranks.
        world_size: Number of processes.
    """

    def __init__(
        self,
        section: GuardsSection,
        *,
        precision: str,
        gradient_clip_norm: float | None,
        global_batch_size: int,
        device: torch.device,
        is_partitioned: bool,
        world_size: int,
        mask_tolerance: float = 0.0,
    ) -> None:
        self._section = section
        self._scales_loss = precision == "fp16"
        self._clip_norm = gradient_clip_norm
        self._global_batch_size = global_batch_size
        self._borne_per_step = mask_tolerance * global_batch_size
        self._device = device
        self._is_partitioned = is_partitioned
        self._world_size = world_size
        self.load_state({})

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state()` of a checkpoint; from nothing, begin anew."""

        def scalar(key: str, default: float, dtype: torch.dtype) -> Tensor:
            return torch.tensor(state.get(key, default), dtype=dtype, device=self._device)

        initial = _INITIAL_LOSS_SCALE if self._scales_loss else 1.0
        # A run that changes its precision starts with that precision's scale.
        kept = state.get("scales_loss") == self._scales_loss
        self.loss_scale = scalar("loss_scale", initial, torch.float32) if kept else _full(initial, self._device)
        self._sound_in_a_row = scalar("sound_in_a_row", 0, torch.int64)
        self._skipped = scalar("skipped_steps", 0, torch.int64)
        self._skips_in_a_row = scalar("skips_in_a_row", 0, torch.int64)
        self._masked = scalar("masked_samples", 0, torch.float64)
        self._masked_beyond = scalar("masked_beyond", 0, torch.float64)
        # Not that of the checkpoint: a run that has been mended must get the chance to end its row.
        self._longest_row = torch.zeros_like(self._skips_in_a_row)
        self._spiked_at = scalar("spiked_at", -1, torch.int64)
        history = list(state.get("loss_history", []))[-self._section.spike_window_steps :]
        padding = [float("nan")] * (self._section.spike_window_steps - len(history))
        self._history = torch.tensor(padding + history, dtype=torch.float64, device=self._device)

    def state(self) -> dict[str, Any]:
        """JSON values from which `load_state` goes on exactly; waits for the device."""
        history = self._history[~self._history.isnan()].tolist()
        return {
            "scales_loss": self._scales_loss,
            "loss_scale": float(self.loss_scale),
            "sound_in_a_row": int(self._sound_in_a_row),
            "skipped_steps": int(self._skipped),
            "skips_in_a_row": int(self._skips_in_a_row),
            "masked_samples": int(self._masked),
            "masked_beyond": float(self._masked_beyond),
            # Not yet read: whoever goes on from here must act on it as this run will at its next record.
            "spiked_at": int(self._spiked_at),
            "loss_history": history,
        }

    def judge(
        self,
        global_step: int,
        loss_sum: Tensor,
        num_valid: int,
        gradients: list[Tensor],
        *,
        is_wanted: bool = True,
        is_recorded: bool = True,
    ) -> Verdict:
        """Judge a step whose gradients are complete; called by all ranks.

        Args:
            global_step: Steps finished before this one.
            loss_sum: This rank's summed loss over its valid rows, without loss scale.
            num_valid: Number of these rows.
            gradients: This rank's gradients (all of them, or its part), with loss scale; of the sum over all valid
                rows, divided by the global batch size.
            is_wanted: False for a batch that is passed over: the step leaves no trace, whatever it is like.
            is_recorded: Whether the norm of the gradient is wanted, even if nothing is clipped.
        """
        wants_norm = is_recorded or self._clip_norm is not None
        squares = _sum_of_squares(gradients, self._device, is_exact=wants_norm)
        valid = torch.full((), num_valid, dtype=torch.float64, device=self._device)
        values = torch.stack([loss_sum.double(), valid, squares])
        if self._world_size > 1:
            # Gradients that every rank holds whole are equal everywhere already.
            dist.all_reduce(values if self._is_partitioned else values[:2])
        loss = values[0] / values[1]
        # Infinite if no sample of the global batch is valid: that step is not sound, then.
        mean_over_valid = (self._global_batch_size / values[1]).float()
        grad_norm = values[2].sqrt().float() * mean_over_valid / self.loss_scale if wants_norm else None
        factor = mean_over_valid / self.loss_scale
        if self._clip_norm is not None:
            assert grad_norm is not None
            factor = factor * (self._clip_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        # Beyond this AdamW's second moments become infinite, and what they belong to never moves again.
        is_finite = loss.isfinite() & values[2].float().isfinite()
        if not is_wanted:
            return Verdict(torch.zeros_like(is_finite), grad_norm, factor)
        is_spike = self._watch_for_spikes(global_step, loss, is_finite)
        drops_spikes = self._section.spike_action in ("skip", "rewind")
        is_sound = is_finite & ~is_spike if drops_spikes else is_finite
        self._count(is_sound, self._global_batch_size - values[1])
        self._adapt_loss_scale(is_finite)
        return Verdict(is_sound, grad_norm, factor)

    def forgive_masked(self) -> None:
        """Empty the bucket of masked samples: who goes on after the run stopped for them has seen why."""
        self._masked_beyond = torch.zeros_like(self._masked_beyond)

    def read(self) -> GuardReading:
        """The counters, and begin the next row; waits for the device."""
        spiked_at = int(self._spiked_at)
        reading = GuardReading(
            skipped_steps=int(self._skipped),
            masked_samples=int(self._masked),
            masked_beyond=float(self._masked_beyond),
            consecutive_skips=int(self._longest_row),
            spiked_at=spiked_at if spiked_at >= 0 else None,
            loss_scale=float(self.loss_scale),
        )
        self._longest_row = self._skips_in_a_row.clone()
        self._spiked_at = torch.full_like(self._spiked_at, -1)
        return reading

    def _watch_for_spikes(self, global_step: int, loss: Tensor, is_finite: Tensor) -> Tensor:
        """Whether the loss lies far above those of the window; it enters the window only if it does not."""
        threshold = self._section.spike_threshold
        if threshold is None:
            return torch.zeros_like(is_finite)
        # A window that is not yet full holds NaN, with which no comparison is true.
        is_spike = loss > self._history.mean() + threshold * self._history.std()
        shifted = torch.cat([self._history[1:], loss[None]])
        self._history = torch.where(is_finite & ~is_spike, shifted, self._history)
        self._spiked_at = torch.where(is_spike & (self._spiked_at < 0), global_step, self._spiked_at)
        return is_spike

    def _count(self, is_sound: Tensor, masked: Tensor) -> None:
        self._masked = self._masked + masked
        # A leaking bucket: a steady trickle of bad samples drains away, more than that fills it.
        self._masked_beyond = (self._masked_beyond + masked - self._borne_per_step).clamp(min=0.0)
        self._skipped = self._skipped + (~is_sound)
        self._skips_in_a_row = torch.where(is_sound, 0, self._skips_in_a_row + 1)
        self._longest_row = torch.maximum(self._longest_row, self._skips_in_a_row)

    def _adapt_loss_scale(self, is_finite: Tensor) -> None:
        if not self._scales_loss:
            return
        row = torch.where(is_finite, self._sound_in_a_row + 1, 0)
        grows = row == _GROWTH_INTERVAL_STEPS
        self._sound_in_a_row = torch.where(grows, 0, row)
        change = torch.where(is_finite, torch.where(grows, 2.0, 1.0), 0.5)
        self.loss_scale = self.loss_scale * change


def _full(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)


def _sum_of_squares(gradients: list[Tensor], device: torch.device, is_exact: bool) -> Tensor:
    """Scalar float64; exact: its float32 root does not depend on how the gradient is cut into tensors.

    Otherwise it only tells whether all is finite, in a fraction of the time: no gradient is converted to float64.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    if not is_exact and all(gradient.is_cpu for gradient in gradients):
        # By all threads, which `vector_norm` does not use.
        flat = [gradient.reshape(-1) for gradient in gradients]
        return torch.stack([torch.dot(values, values) for values in flat]).double().sum().to(device)
    dtype = torch.float64 if is_exact else None
    norms = [torch.linalg.vector_norm(gradient, dtype=dtype).to(device) for gradient in gradients]
    return torch.stack(norms).double().square().sum()

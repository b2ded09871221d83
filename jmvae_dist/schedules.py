"""Annealing factor and learning rate: pure functions of the global step.

`global_step` counts finished optimizer steps, so the first step of a run is taken with the values at 0.
Nothing here has a state: a resumed run continues both schedules from the global step alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from jmvae_dist.config import AnnealingSection, LearningRateSection
from jmvae_dist.errors import ConfigError


@dataclass(frozen=True)
class AnnealingSchedule:
    """Weight of the KL terms, between 0 and 1.

    Args:
        shape: linear, cosine, cyclical or constant (see `config.AnnealingSection`).
        warmup_steps: Steps until linear and cosine reach 1; 0 is constant 1.
        cycle_steps: Length of one cycle of the cyclical shape, at least 1.
        cycle_growth: Fraction of a cycle during which the factor grows.
    """

    shape: str
    warmup_steps: int = 0
    cycle_steps: int = 1
    cycle_growth: float = 0.5

    def __call__(self, global_step: int) -> float:
        """The factor with which the step after `global_step` finished steps is taken."""
        if self.shape == "constant":
            return 1.0
        if self.shape == "cyclical":
            position = (global_step % self.cycle_steps) / self.cycle_steps
            return min(1.0, position / self.cycle_growth)
        if global_step >= self.warmup_steps:
            return 1.0
        fraction = global_step / self.warmup_steps
        if self.shape == "linear":
            return fraction
        assert self.shape == "cosine", self.shape
        return 0.5 * (1.0 - math.cos(math.pi * fraction))


@dataclass(frozen=True)
class LearningRateSchedule:
    """Linear warm-up to `peak`, then constant, or decay to `final_fraction * peak` at the run's last step.

    The first step is taken with `peak / warmup_steps`, not 0: a step with rate 0 would be wasted.
    """

    shape: str
    peak: float
    total_steps: int
    warmup_steps: int = 0
    final_fraction: float = 0.0

    def __call__(self, global_step: int) -> float:
        """The learning rate with which the step after `global_step` finished steps is taken."""
        if global_step < self.warmup_steps:
            return self.peak * (global_step + 1) / self.warmup_steps
        if self.shape == "constant":
            return self.peak
        # The last step of the run is taken at global_step == total_steps - 1.
        decay_steps = max(1, self.total_steps - 1 - self.warmup_steps)
        fraction = min(1.0, (global_step - self.warmup_steps) / decay_steps)
        if self.shape == "cosine":
            fraction = 0.5 * (1.0 - math.cos(math.pi * fraction))
        return self.peak * (1.0 - (1.0 - self.final_fraction) * fraction)


def epochs_to_steps(epochs: float, num_samples: int, global_batch_size: int) -> int:
    """The first step at which at least `epochs` passes over the data are finished; exact for any size."""
    return math.ceil(Fraction(str(epochs)) * num_samples / global_batch_size)


def resolve_annealing(
    section: AnnealingSection,
    *,
    warmup_epochs: float,
    num_samples: int,
    global_batch_size: int,
    total_steps: int,
) -> AnnealingSchedule:
    """The schedule of a run: epochs become steps; `section.warmup_steps` overrides `warmup_epochs`.

    Raises:
        ConfigError: The cycles are single steps, each of which would be taken with the factor 0.
    """
    warmup_steps = section.warmup_steps
    if warmup_steps is None:
        warmup_steps = epochs_to_steps(warmup_epochs, num_samples, global_batch_size)
    cycle_steps = max(1, math.ceil(total_steps / section.cycles))
    if section.shape == "cyclical" and cycle_steps < 2:
        raise ConfigError(
            f"schedule.annealing.cycles: {section.cycles} is not allowed; it must be below the number of steps "
            f"of the run ({total_steps}), or the weight would be 0 in all of them"
        )
    return AnnealingSchedule(section.shape, warmup_steps, cycle_steps, section.cycle_growth)


def resolve_learning_rate(
    section: LearningRateSection, *, num_samples: int, global_batch_size: int, total_steps: int
) -> LearningRateSchedule:
    """The schedule of a run: epochs become steps."""
    warmup_steps = section.warmup_steps or 0
    if section.warmup_epochs is not None:
        warmup_steps = epochs_to_steps(section.warmup_epochs, num_samples, global_batch_size)
    return LearningRateSchedule(section.shape, section.peak, total_steps, warmup_steps, section.final_fraction)

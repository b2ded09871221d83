"""Schedules are pure functions of the global step with the documented end points."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmvae_dist.config import AnnealingSection, LearningRateSection
from jmvae_dist.errors import ConfigError
from jmvae_dist.schedules import (
    AnnealingSchedule,
    LearningRateSchedule,
    epochs_to_steps,
    resolve_annealing,
    resolve_learning_rate,
)


def test_linear_annealing_from_0_at_step_0_to_1_at_the_end_of_the_warmup() -> None:
    schedule = AnnealingSchedule("linear", warmup_steps=10)
    assert [schedule(step) for step in (0, 5, 10, 11, 10**9)] == [0.0, 0.5, 1.0, 1.0, 1.0]


def test_cosine_annealing_is_slow_at_both_ends() -> None:
    schedule = AnnealingSchedule("cosine", warmup_steps=100)
    assert schedule(0) == 0.0
    assert schedule(50) == pytest.approx(0.5)
    assert schedule(100) == 1.0
    assert schedule(10) < 0.1 < 0.9 < schedule(90)


def test_cyclical_annealing_grows_and_stays_in_every_cycle() -> None:
    schedule = AnnealingSchedule("cyclical", cycle_steps=10, cycle_growth=0.5)
    cycle = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert [schedule(step) for step in range(20)] == pytest.approx(cycle * 2)


@pytest.mark.parametrize("shape", ["linear", "cosine", "cyclical", "constant"])
@given(step=st.integers(0, 10**12), warmup_steps=st.integers(0, 10**9), cycle_steps=st.integers(1, 10**6))
def test_annealing_stays_between_0_and_1(shape: str, step: int, warmup_steps: int, cycle_steps: int) -> None:
    assert 0.0 <= AnnealingSchedule(shape, warmup_steps, cycle_steps)(step) <= 1.0


@pytest.mark.parametrize(("cycles", "total_steps", "is_allowed"), [(99, 100, True), (100, 100, False), (1, 1, False)])
def test_cycles_that_would_never_weigh_the_kl_terms(cycles: int, total_steps: int, is_allowed: bool) -> None:
    sizes = {"num_samples": 10, "global_batch_size": 5, "total_steps": total_steps}
    section = AnnealingSection(shape="cyclical", cycles=cycles)
    if is_allowed:
        assert max(map(resolve_annealing(section, warmup_epochs=1, **sizes), range(total_steps))) == 1.0
        return
    with pytest.raises(ConfigError, match=rf"schedule\.annealing\.cycles: {cycles} .* below .* \({total_steps}\)"):
        resolve_annealing(section, warmup_epochs=1, **sizes)


def test_no_warmup_is_constant_1() -> None:
    assert AnnealingSchedule("linear", warmup_steps=0)(0) == 1.0


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_learning_rate_end_points(shape: str) -> None:
    schedule = LearningRateSchedule(shape, peak=2.0, total_steps=101, warmup_steps=10, final_fraction=0.1)
    assert schedule(0) == pytest.approx(0.2)  # not 0: the first step must not be wasted
    assert schedule(9) == schedule(10) == 2.0
    assert schedule(100) == pytest.approx(2.0 if shape == "constant" else 0.2)
    assert schedule(10**6) == schedule(100)


def test_decays_in_the_middle() -> None:
    linear = LearningRateSchedule("linear", 1.0, total_steps=101)
    cosine = LearningRateSchedule("cosine", 1.0, total_steps=101)
    assert linear(25) == pytest.approx(0.75)
    assert cosine(50) == pytest.approx(0.5)
    assert cosine(25) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


@given(step=st.integers(0, 2000), total=st.integers(1, 1000), warmup=st.integers(0, 1500))
def test_learning_rate_is_positive_until_the_last_step(step: int, total: int, warmup: int) -> None:
    rate = LearningRateSchedule("cosine", 1.0, total, warmup, final_fraction=0.01)(step)
    assert 0.0 < rate <= 1.0


def test_epochs_are_resolved_into_steps() -> None:
    assert epochs_to_steps(3, num_samples=1438, global_batch_size=64) == 68  # 67.4: the 68th finishes the third epoch
    assert epochs_to_steps(2, num_samples=1000, global_batch_size=20) == 100
    assert epochs_to_steps(0, num_samples=1000, global_batch_size=20) == 0
    assert epochs_to_steps(0.1, num_samples=1000, global_batch_size=10) == 10
    # In floating point this product comes out a little too large.
    assert epochs_to_steps(119, num_samples=10**9, global_batch_size=7) == 17 * 10**9
    sizes = {"num_samples": 125, "global_batch_size": 10, "total_steps": 1000}
    assert resolve_annealing(AnnealingSection(), warmup_epochs=10, **sizes).warmup_steps == 125
    assert resolve_annealing(AnnealingSection(warmup_steps=7), warmup_epochs=10, **sizes).warmup_steps == 7
    assert (
        resolve_annealing(AnnealingSection(shape="cyclical", cycles=3), warmup_epochs=1, **sizes).cycle_steps == 334
    )
    assert resolve_learning_rate(LearningRateSection(warmup_epochs=2), **sizes).warmup_steps == 25

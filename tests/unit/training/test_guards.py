"""Judging steps: what is dropped, what is clipped, and that the judgement survives a resume."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jmvae_dist.training.guards import StepGuard, Verdict
from jmvae_dist.training.optimizer import GuardedAdamW
from jmvae_dist.training_config import GuardsSection

NAN, INF = float("nan"), float("inf")


def make_guard(
    precision: str = "fp32", clip: float | None = None, mask_tolerance: float = 0.0, **section: Any
) -> StepGuard:
    return StepGuard(
        GuardsSection(**section),
        precision=precision,
        gradient_clip_norm=clip,
        global_batch_size=10,
        device=torch.device("cpu"),
        is_partitioned=False,
        world_size=1,
        mask_tolerance=mask_tolerance,
    )


def judge(guard: StepGuard, loss: float, *gradients: list[float], step: int = 0, is_wanted: bool = True) -> Verdict:
    """Judge a mean loss and gradients as the engine would hand them over, with the loss scale in them."""
    tensors = [torch.tensor(values) * guard.loss_scale for values in gradients or ([0.0],)]
    return guard.judge(step, torch.tensor(loss * 10), 10, tensors, is_wanted=is_wanted)


def test_clipping_is_that_of_torch() -> None:
    verdict = judge(make_guard(clip=1.0), 1.0, [3.0, 0.0], [4.0])
    assert float(verdict.grad_norm) == 5.0
    parameters = [torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    assert torch.equal(torch.tensor([3.0, 0.0]) * verdict.factor, parameters[0].grad)
    assert float(judge(make_guard(clip=10.0), 1.0, [3.0]).factor) == 1.0
    assert float(judge(make_guard(), 1.0, [3e20]).factor) == 1.0


@given(cuts=st.lists(st.integers(0, 999), max_size=30), scale=st.floats(1e-15, 1e15))
def test_the_norm_does_not_depend_on_how_the_gradient_is_cut(cuts: list[int], scale: float) -> None:
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * scale
    bounds = [0, *sorted(cuts), 1000]
    pieces = [gradient[start:stop] for start, stop in itertools.pairwise(bounds)]
    norms = [make_guard(clip=1.0).judge(0, torch.tensor(1.0), 10, tensors) for tensors in ([gradient], pieces)]
    assert torch.equal(norms[0].grad_norm, norms[1].grad_norm)
    assert torch.equal(norms[0].factor, norms[1].factor)


@pytest.mark.parametrize(("loss", "gradient"), [(NAN, 1.0), (INF, 1.0), (1.0, NAN), (1.0, -INF), (1.0, 1e39)])
def test_what_is_not_finite_is_dropped_and_counted(loss: float, gradient: float) -> None:
    guard = make_guard()
    assert bool(judge(guard, 1.0, [1.0]).is_sound)
    assert not bool(judge(guard, loss, [gradient]).is_sound)
    assert not bool(judge(guard, loss, [gradient]).is_sound)
    assert bool(judge(guard, 1.0, [1.0]).is_sound)
    assert not bool(judge(guard, loss, [gradient]).is_sound)
    reading = guard.read()
    assert (reading.skipped_steps, reading.consecutive_skips) == (3, 2)
    # The row under way counts on; the one that ended is forgotten.
    assert guard.read().consecutive_skips == 1


@pytest.mark.parametrize("size", [1e18, 1e20, 1e30])
def test_large_gradients_are_sound_unless_adam_would_never_recover(size: float) -> None:
    """Its second moments are float32: once infinite, they stay so, and the weight stays where it is."""
    weights = torch.nn.Parameter(torch.zeros(2))
    optimizer = GuardedAdamW([weights], lr=0.1)
    weights.grad = torch.full((2,), size)
    optimizer.is_sound = judge(make_guard(), 1.0, [size, size]).is_sound
    optimizer.step()
    assert bool(optimizer.is_sound) == (size < 1e19)
    assert all(bool(value.isfinite().all()) for state in optimizer.state.values() for value in state.values())


def test_spikes() -> None:
    guard = make_guard(spike_threshold=4.0, spike_window_steps=10)
    losses = [10.0 + 0.1 * (step % 3) for step in range(10)]
    assert all(bool(judge(guard, loss, step=step).is_sound) for step, loss in enumerate([500.0, *losses]))
    assert guard.read().spiked_at is None, "the window was not full before"
    assert not bool(judge(guard, 11.0, step=11).is_sound)
    assert not bool(judge(guard, 11.0, step=12).is_sound), "a spike does not enter the window"
    assert bool(judge(guard, 9.0, step=13).is_sound), "a loss that falls is welcome"
    assert guard.read().spiked_at == 11
    assert guard.read().spiked_at is None


def test_a_warning_leaves_the_step_alone() -> None:
    guard = make_guard(spike_threshold=4.0, spike_window_steps=2, spike_action="warn")
    verdicts = [judge(guard, loss, step=step) for step, loss in enumerate((1.0, 1.1, 50.0))]
    assert all(bool(verdict.is_sound) for verdict in verdicts)
    assert guard.read().spiked_at == 2


def test_a_batch_that_is_passed_over_leaves_no_trace() -> None:
    guard = make_guard("fp16", spike_threshold=4.0, spike_window_steps=3)
    judge(guard, 1.0)
    before = guard.state()
    for loss in (1.0, NAN, 1e9):
        assert not bool(judge(guard, loss, [loss], is_wanted=False).is_sound)
    assert guard.state() == before


def test_loss_scale() -> None:
    guard = make_guard("fp16")
    assert float(guard.loss_scale) == 2.0**16
    assert float(judge(guard, 1.0, [3.0]).grad_norm) == 3.0
    judge(guard, 1.0, [INF])
    assert float(guard.loss_scale) == 2.0**15
    for _ in range(1999):
        judge(guard, 1.0)
    assert float(guard.loss_scale) == 2.0**15
    verdict = judge(guard, 1.0, [3.0])
    assert float(verdict.factor) == 2.0**-15, "the scale that the gradients were computed with"
    assert guard.read().loss_scale == 2.0**16


def test_only_fp16_scales() -> None:
    guard = make_guard("bf16")
    judge(guard, 1.0, [INF])
    assert float(guard.loss_scale) == 1.0
    scaled = make_guard("fp16")
    scaled.load_state(guard.state())
    assert float(scaled.loss_scale) == 2.0**16, "a run that changes to fp16 starts with its scale"


@settings(max_examples=50)
@given(
    losses=st.lists(st.sampled_from([1.0, 1.1, 0.9, 50.0, NAN]), min_size=1, max_size=30),
    split=st.integers(0, 30),
)
def test_a_resumed_guard_judges_alike(losses: list[float], split: int) -> None:
    options = {"spike_threshold": 3.0, "spike_window_steps": 4}
    straight, first = make_guard("fp16", **options), make_guard("fp16", **options)
    for step, loss in enumerate(losses):
        if step == split:
            state = json.loads(json.dumps(first.state()))
            first = make_guard("fp16", **options)
            first.load_state(state)
        one, other = (judge(guard, loss, [1.0], step=step) for guard in (straight, first))
        assert bool(one.is_sound) == bool(other.is_sound)
    assert straight.state() == first.state()


def test_a_spike_between_a_record_and_a_checkpoint_is_not_forgotten() -> None:
    """Whoever resumes must go back at the next record, as the uninterrupted run does."""
    options = {"spike_threshold": 4.0, "spike_window_steps": 2, "spike_action": "rewind"}
    guard, resumed = make_guard(**options), make_guard(**options)
    for step, loss in enumerate((1.0, 1.1, 50.0, 1.0)):
        judge(guard, loss, step=step)
    resumed.load_state(json.loads(json.dumps(guard.state())))
    assert resumed.read().spiked_at == 2
    guard.read()
    resumed.load_state(guard.state())
    assert resumed.read().spiked_at is None


def test_the_mean_is_over_the_valid_samples() -> None:
    guard = make_guard()
    verdict = guard.judge(0, torch.tensor(8.0), 8, [torch.tensor([3.0, 4.0])])
    assert float(verdict.factor) == 10 / 8
    assert float(verdict.grad_norm) == 5.0 * 10 / 8
    assert not bool(guard.judge(1, torch.tensor(0.0), 0, [torch.zeros(2)]).is_sound)
    assert guard.read().masked_samples == 2 + 10


def test_a_trickle_of_masked_samples_drains_away_and_a_burst_does_not() -> None:
    guard, tolerant = make_guard(), make_guard(mask_tolerance=0.1)
    for step in range(50):
        for each in (guard, tolerant):
            each.judge(step, torch.tensor(1.0), 10 - 2 * (step % 2), [torch.ones(1)])
    assert guard.read().masked_beyond == 50
    assert tolerant.read().masked_beyond <= 1
    resumed = make_guard()
    resumed.load_state(json.loads(json.dumps(guard.state())))
    assert (resumed.read().masked_samples, resumed.read().masked_beyond) == (50, 50)
    resumed.forgive_masked()
    assert (resumed.read().masked_samples, resumed.read().masked_beyond) == (50, 0)


@pytest.mark.parametrize(
    ("gradient", "is_sound"),
    [([1.0], True), ([1e18], True), ([NAN], False), ([float("inf")], False), ([1e20], False)],
)
def test_a_step_that_is_not_recorded_is_judged_likewise(gradient: list[float], is_sound: bool) -> None:
    verdicts = [
        make_guard().judge(0, torch.tensor(1.0), 10, [torch.tensor(gradient)], is_recorded=is_recorded)
        for is_recorded in (True, False)
    ]
    assert [bool(verdict.is_sound) for verdict in verdicts] == [is_sound, is_sound]
    assert verdicts[1].grad_norm is None


@pytest.mark.parametrize("fused", [False, True])
def test_a_dropped_update_changes_nothing(fused: bool) -> None:
    """Neither weights nor moments nor step counts, which set the size of later updates."""
    weights = torch.nn.Parameter(torch.randn(7))
    optimizer = GuardedAdamW([weights], lr=0.1, weight_decay=0.1, fused=fused)

    def step(is_sound: bool, gradient: float) -> None:
        weights.grad = torch.full((7,), gradient)
        optimizer.is_sound = torch.tensor(is_sound)
        optimizer.step()

    step(True, 1.0)
    before = [weights.detach().clone(), *(value.clone() for value in optimizer.state[weights].values())]
    step(False, NAN)
    after = [weights.detach(), *optimizer.state[weights].values()]
    assert all(torch.equal(value, other) for value, other in zip(before, after, strict=True))
    step(True, 1.0)
    assert not torch.equal(before[0], weights.detach())
    assert float(optimizer.state[weights]["step"]) == 2

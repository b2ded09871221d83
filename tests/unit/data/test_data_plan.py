"""The order of samples: the invariants, on random settings."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmvae_dist.data.plan import SamplePlan, check_same_order, default_lanes
from jmvae_dist.errors import ConfigError, DataError

Sample = tuple[int, int]

GOLDEN_BATCHES = [
    [(2, 1), (2, 0), (0, 0), (0, 1), (0, 3), (1, 0)],
    [(2, 3), (2, 2), (2, 5), (2, 6), (1, 1), (0, 4)],
    [(0, 0), (1, 0), (2, 0), (0, 2), (2, 3), (2, 5)],
]


@dataclass(frozen=True)
class Setting:
    shard_sizes: tuple[int, ...]
    lanes: int
    samples_per_lane: int
    shuffle_window: int
    seed: int

    def plan(self) -> SamplePlan:
        return SamplePlan(
            self.shard_sizes, self.lanes * self.samples_per_lane, self.lanes, self.shuffle_window, self.seed
        )

    @property
    def samples(self) -> Counter[Sample]:
        return Counter((shard, index) for shard, size in enumerate(self.shard_sizes) for index in range(size))


# Small on purpose: fewer samples than lanes or than a batch, one shard, and empty intervals all occur.
SETTINGS = st.builds(
    Setting,
    shard_sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6).map(tuple),
    lanes=st.integers(1, 9),
    samples_per_lane=st.integers(1, 7),
    shuffle_window=st.integers(1, 20),
    seed=st.integers(0, 2**64 - 1),
)


def samples_of(plan: SamplePlan, global_step: int, lanes: range | None = None) -> list[Sample]:
    shard_B, index_B = plan.batch(global_step, lanes)
    assert shard_B.dtype == index_B.dtype == np.int64
    return list(zip(shard_B.tolist(), index_B.tolist(), strict=True))


def stream_of_lane(plan: SamplePlan, lane: int, num_steps: int) -> list[Sample]:
    return [s for step in range(num_steps) for s in samples_of(plan, step, range(lane, lane + 1))]


@given(setting=SETTINGS, num_epochs=st.integers(1, 4))
def test_the_lanes_parts_of_an_epoch_partition_the_samples(setting: Setting, num_epochs: int) -> None:
    """Cut every lane's stream at T_c(e): the pieces of one epoch hold each sample exactly once, in every epoch."""
    plan = setting.plan()
    n, c = plan.num_samples, setting.lanes
    num_steps = -(-(num_epochs * n + c) // plan.global_batch_size)
    epochs: dict[int, Counter[Sample]] = defaultdict(Counter)
    for lane in range(c):
        stream = stream_of_lane(plan, lane, num_steps)
        for epoch in range(num_epochs):
            start, stop = (epoch * n + lane) // c, ((epoch + 1) * n + lane) // c
            epochs[epoch].update(stream[start:stop])
    assert all(epochs[epoch] == setting.samples for epoch in range(num_epochs))


@given(setting=SETTINGS, num_steps=st.integers(1, 30))
def test_no_sample_gets_ahead(setting: Setting, num_steps: int) -> None:
    """After k steps every sample was seen floor(k * G / N) times or once more, at every k, not only at epoch ends.

    T_c deals the samples of all epochs to the lanes in turn, one each per round, so k steps consume exactly the
    first k * G of them: complete epochs and part of one.
    """
    plan = setting.plan()
    counts = Counter(dict.fromkeys(setting.samples, 0))
    for step in range(num_steps):
        counts.update(samples_of(plan, step))
        complete_epochs, extra = divmod(plan.samples_seen(step + 1), plan.num_samples)
        assert Counter(counts.values()) == +Counter(
            {complete_epochs: plan.num_samples - extra, complete_epochs + 1: extra}
        )


@given(setting=SETTINGS, global_step=st.integers(0, 40), data=st.data())
def test_global_batches_do_not_depend_on_topology(setting: Setting, global_step: int, data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, setting.lanes))
    plan = setting.plan()
    whole = samples_of(plan, global_step)
    joined: list[Sample] = []
    for rank in range(world_size):
        start, stop = plan.rows_of_rank(rank, world_size)
        assert start == len(joined)
        joined += samples_of(setting.plan(), global_step, plan.lanes_of_rank(rank, world_size))
        assert stop == len(joined)
    assert joined == whole
    assert len(whole) == plan.global_batch_size


@settings(deadline=None, max_examples=40)
@given(setting=SETTINGS, start=st.integers(0, 25))
def test_resuming_equals_going_on(setting: Setting, start: int) -> None:
    running = setting.plan()
    for step in range(start):
        running.batch(step)
    assert [samples_of(running, step) for step in range(start, start + 5)] == [
        samples_of(setting.plan(), step) for step in range(start, start + 5)
    ]
    assert samples_of(running, 0) == samples_of(setting.plan(), 0)


@given(setting=SETTINGS, epoch=st.integers(0, 2**31))
def test_lane_intervals_tile_the_epoch(setting: Setting, epoch: int) -> None:
    plan = setting.plan()
    n, c = plan.num_samples, setting.lanes
    intervals = [plan.lane_interval(epoch, lane) for lane in range(c)]
    assert intervals[0][0] == 0
    assert intervals[-1][1] == n
    assert all(left[1] == right[0] for left, right in pairwise(intervals))
    for lane, (start, stop) in enumerate(intervals):
        assert stop - start == ((epoch + 1) * n + lane) // c - (epoch * n + lane) // c


@given(setting=SETTINGS, data=st.data())
def test_ranks_share_lanes_evenly(setting: Setting, data: st.DataObject) -> None:
    plan = setting.plan()
    world_size = data.draw(st.integers(1, setting.lanes))
    shares = [plan.lanes_of_rank(rank, world_size) for rank in range(world_size)]
    assert [lane for share in shares for lane in share] == list(range(setting.lanes))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_epochs_and_seeds_differ_in_order() -> None:
    plan = SamplePlan([20, 20, 20], 60, 4, 8, seed=1)
    first, second = samples_of(plan, 0), samples_of(plan, 1)
    assert Counter(first) == Counter(second)
    assert first != second
    assert samples_of(SamplePlan([20, 20, 20], 60, 4, 8, seed=2), 0) != first


def test_a_window_of_one_keeps_the_stored_order() -> None:
    plan = SamplePlan([30], 3, 3, 1, seed=9)
    assert [samples_of(plan, step) for step in range(2)] == [
        [(0, 0), (0, 10), (0, 20)],
        [(0, 1), (0, 11), (0, 21)],
    ]


def test_windows_shuffle_only_within_themselves() -> None:
    plan = SamplePlan([40], 5, 1, 10, seed=3)
    indices = [index for step in range(8) for _, index in samples_of(plan, step)]
    for start in range(0, 40, 10):
        window = indices[start : start + 10]
        assert sorted(window) == list(range(start, start + 10))
        assert window != sorted(window)


def test_the_order_never_changes() -> None:
    plan = SamplePlan([5, 3, 7], 6, 3, 4, seed=42)
    assert [samples_of(plan, step) for step in (0, 1, 1000)] == GOLDEN_BATCHES


def test_large_runs_do_not_overflow() -> None:
    """Positions beyond 2**53 and 2**60 / N epochs: exact where floats, or products of 32 bits, would not be."""
    plan = SamplePlan([10**9] * 1000, 2**16, 64, 8192, seed=0)
    step = 2**44
    shard_B, index_B = plan.batch(step)
    b = plan.samples_per_lane
    expected_epoch = {
        ((step * b + j + 1) * 64 - lane - 1) // plan.num_samples for lane in range(64) for j in range(b)
    }
    assert len(expected_epoch) <= 2
    assert shard_B.min() >= 0
    assert shard_B.max() < 1000
    assert index_B.min() >= 0
    assert index_B.max() < 10**9
    assert len(set(zip(shard_B.tolist(), index_B.tolist(), strict=True))) == 2**16
    with pytest.raises(ConfigError, match="beyond"):
        plan.batch(2**60)


def test_progress() -> None:
    plan = SamplePlan([6, 4], 4, 2, 8, seed=0)
    assert plan.steps_per_epoch == 2.5
    assert plan.epoch(5) == 2.0
    assert plan.samples_seen(5) == 20


@pytest.mark.parametrize(("batch", "lanes"), [(1, 1), (64, 64), (96, 48), (128, 64), (97, 1), (100, 50)])
def test_default_lanes(batch: int, lanes: int) -> None:
    assert default_lanes(batch) == lanes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((), 4, 2, 8, 0), DataError, "no shards"),
        (((3, 0), 4, 2, 8, 0), DataError, "shard 1 has 0 samples"),
        (((3,), 4, 3, 8, 0), ConfigError, "data.lanes 3 is not a divisor"),
        (((3,), 4, 8, 8, 0), ConfigError, "data.lanes 8"),
        (((3,), 0, 1, 8, 0), ConfigError, "global_batch_size"),
        (((3,), 4, 2, 0, 0), ConfigError, "shuffle_window"),
        (((3,), 4, 2, 8, -1), ConfigError, "seed"),
    ],
)
def test_impossible_settings_are_refused(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SamplePlan(*arguments)


def test_more_ranks_than_lanes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"5 ranks but only 4 lanes.*data\.lanes"):
        SamplePlan([9], 8, 4, 8, 0).lanes_of_rank(0, 5)


def test_same_order_is_accepted_at_another_step() -> None:
    plan = SamplePlan([9], 8, 4, 8, 0)
    check_same_order(plan.state(3, "f" * 64), plan.state(0, "f" * 64))


def test_another_order_is_refused_with_all_differences() -> None:
    saved = SamplePlan([9], 8, 4, 8, 0).state(3, "a" * 64)
    current = SamplePlan([9], 8, 2, 8, 1).state(0, "b" * 64)
    with pytest.raises(ConfigError) as caught:
        check_same_order(saved, current)
    message = str(caught.value)
    for part in (
        "training.seed was 0, is now 1",
        "data.lanes was 4, is now 2",
        "fingerprint",
        "twice",
        "--data.allow_order_change true",
    ):
        assert part in message
    assert "shuffle_window" not in message


def test_an_incomplete_saved_state_is_refused() -> None:
    current = SamplePlan([9], 8, 2, 8, 1).state(0, "b" * 64)
    with pytest.raises(ConfigError, match=r"data\.lanes was not recorded"):
        check_same_order({key: value for key, value in current.items() if key != "lanes"}, current)

"""The order of training samples as a pure function of (seed, global step).

`SamplePlan` answers one question: which samples form the global batch of step k? It needs nothing but the
sizes of the shards and five integers, so a checkpoint stores one number, and any rank of any world size can
ask for any part of any batch at any time.

How it works. The N samples are dealt to C *lanes*; each lane contributes b = G / C samples to every global
batch of G. Counted over all epochs, lane c reads the stream positions 0, 1, 2, ... and epoch e owns the
positions T_c(e) .. T_c(e+1) - 1 of that stream, with

    T_c(e) = floor((e * N + c) / C).

By Hermite's identity, sum_c floor((x + c) / C) = x for integer x, the C intervals of an epoch hold exactly N
samples together, so an epoch visits every sample exactly once: nothing is padded, dropped or repeated, whatever
N is. T_c deals samples to the lanes in turn, one each per round; so after any k steps, not only at the end of an
epoch, every sample has been seen floor(k * G / N) times or once more. An epoch permutes the shards, lays them
end to end on positions 0..N-1, and gives every lane the next stretch of it; within its stretch a lane shuffles
windows of `shuffle_window` samples.

Shape suffixes: L lanes asked for, B = L * b rows asked for.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from jmvae_dist.data.philox import (
    MAX_EPOCH,
    MAX_LANES,
    MAX_WINDOWS,
    PURPOSE_SHARD_ORDER,
    PURPOSE_WINDOW_ORDER,
    permutation,
)
from jmvae_dist.errors import ConfigError, DataError

DEFAULT_LANES_LIMIT = 64
_CACHED_EPOCHS = 4
# Steps are worked out together, because a step of few samples costs nearly as much as many: about so many rows.
_ROWS_PER_BLOCK = 4096
_MOST_STEPS_PER_BLOCK = 16
_SAMPLES_SEEN_LIMIT = 2**62


def default_lanes(global_batch_size: int) -> int:
    """The largest divisor of the global batch size that is at most 64."""
    if global_batch_size < 1:
        raise ConfigError(f"training.global_batch_size must be at least 1, not {global_batch_size}")
    return next(
        lanes for lanes in range(min(DEFAULT_LANES_LIMIT, global_batch_size), 0, -1) if global_batch_size % lanes == 0
    )


class _Block(NamedTuple):
    """The samples of some lanes in some steps: shard number and sample-in-shard, int64 (lanes, steps, b)."""

    steps: range
    lanes: range
    shard_numbers: np.ndarray
    indices: np.ndarray


class SamplePlan:
    """Which samples form each global batch.

    Args:
        shard_sizes: number of samples of each shard, in manifest order.
        global_batch_size: G, samples per global step over all ranks.
        lanes: C, a divisor of G; also the largest possible world size.
        shuffle_window: samples that a lane shuffles among themselves; 1 keeps the stored order.
        seed: 0 <= seed < 2**64.

    Raises:
        ConfigError: a setting is out of range or `lanes` does not divide the global batch size.
        DataError: there is no shard, or a shard is empty.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        global_batch_size: int,
        lanes: int,
        shuffle_window: int,
        seed: int,
    ) -> None:
        _check_settings(global_batch_size, lanes, shuffle_window, seed)
        self._shard_sizes = _checked_shard_sizes(shard_sizes)
        self.num_samples = int(self._shard_sizes.sum())
        self.global_batch_size = global_batch_size
        self.lanes = lanes
        self.samples_per_lane = global_batch_size // lanes
        self.shuffle_window = shuffle_window
        self.seed = seed
        longest_interval = -(-self.num_samples // lanes)
        if longest_interval > shuffle_window * MAX_WINDOWS:
            raise ConfigError(f"data.shuffle_window {shuffle_window} is too small for {self.num_samples} samples")
        self._epoch_orders: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        # A lane reads one window at a time, so one slot per lane is all that can be reused.
        self._lane_windows: dict[int, tuple[tuple[int, int], np.ndarray]] = {}
        self._block: _Block | None = None

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return tuple(self._shard_sizes.tolist())

    # Topology

    def lanes_of_rank(self, rank: int, world_size: int) -> range:
        """The contiguous lanes of a rank; shares differ by at most one lane.

        Raises:
            ConfigError: there are more ranks than lanes, so that some rank would have nothing to do.
        """
        if world_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of world size {world_size} does not exist")
        if world_size > self.lanes:
            raise ConfigError(
                f"{world_size} ranks but only {self.lanes} lanes: every rank needs at least one lane; "
                f"use at most {self.lanes} ranks, or raise data.lanes to a divisor of "
                f"training.global_batch_size ({self.global_batch_size}) that is at least {world_size}"
            )
        return range(rank * self.lanes // world_size, (rank + 1) * self.lanes // world_size)

    def rows_of_rank(self, rank: int, world_size: int) -> tuple[int, int]:
        """Rows [start, stop) of the global batch that a rank computes; row = lane * b + j."""
        lanes = self.lanes_of_rank(rank, world_size)
        return lanes.start * self.samples_per_lane, lanes.stop * self.samples_per_lane

    # Progress

    def samples_seen(self, global_step: int) -> int:
        """Samples that the steps before `global_step` consumed, over all ranks."""
        return global_step * self.global_batch_size

    def epoch(self, global_step: int) -> float:
        """Epochs completed before `global_step`, with fraction."""
        return self.samples_seen(global_step) / self.num_samples

    @property
    def steps_per_epoch(self) -> float:
        """Global steps per epoch; not a whole number unless the global batch size divides the samples."""
        return self.num_samples / self.global_batch_size

    # Order

    def batch(self, global_step: int, lanes: range | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The samples of a global step, or of some lanes of it, in row order.

        Args:
            global_step: counted from 0.
            lanes: contiguous lanes (default: all).

        Returns:
            shard number and sample-in-shard, both int64 of shape (len(lanes) * b,).
        """
        lanes = range(self.lanes) if lanes is None else lanes
        assert lanes.step == 1
        assert 0 <= lanes.start < lanes.stop <= self.lanes
        self._check_step(global_step)
        if self._block is None or self._block.lanes != lanes or global_step not in self._block.steps:
            self._block = self._make_block(global_step, lanes)
        step = global_step - self._block.steps.start
        return self._block.shard_numbers[:, step].reshape(-1), self._block.indices[:, step].reshape(-1)

    def _make_block(self, first_step: int, lanes: range) -> _Block:
        """The samples of a step and of some after it."""
        rows = len(lanes) * self.samples_per_lane
        steps = range(first_step, first_step + max(1, min(_MOST_STEPS_PER_BLOCK, _ROWS_PER_BLOCK // rows)))
        try:
            self._check_step(steps[-1])
        except ConfigError:
            steps = steps[:1]
        lane_B, epoch_B, offset_B = self._locate(steps, lanes)
        shard_B, index_B = self._resolve(epoch_B, self._shuffled_positions(lane_B, epoch_B, offset_B))
        shape = len(lanes), len(steps), self.samples_per_lane
        return _Block(steps, lanes, shard_B.reshape(shape), index_B.reshape(shape))

    def _check_step(self, global_step: int) -> None:
        """Bounds every product below: each is at most the samples seen after this step, plus N and C."""
        if global_step < 0:
            raise ConfigError(f"global step {global_step} is negative")
        seen = (global_step + 1) * self.global_batch_size
        if seen >= _SAMPLES_SEEN_LIMIT or seen // self.num_samples >= MAX_EPOCH - 1:
            raise ConfigError(f"global step {global_step} lies beyond the {MAX_EPOCH} epochs that an order has")

    def _locate(self, steps: range, lanes: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lane, epoch, and offset in the lane's interval of that epoch, of every row of the lanes, lane by lane."""
        b, n, c = self.samples_per_lane, self.num_samples, self.lanes
        lane_B = np.repeat(np.arange(lanes.start, lanes.stop, dtype=np.int64), len(steps) * b)
        stream_B = np.tile(np.arange(steps.start * b, steps.stop * b, dtype=np.int64), len(lanes))
        # The last epoch that starts at or before stream position p: T_c(e) <= p  <=>  e*N + c < (p+1)*C.
        epoch_B = ((stream_B + 1) * c - lane_B - 1) // n
        offset_B = stream_B - (epoch_B * n + lane_B) // c
        return lane_B, epoch_B, offset_B

    def lane_interval(self, epoch: int, lane: int) -> tuple[int, int]:
        """Positions [start, stop) of the epoch's 0..N-1 that a lane visits; the lanes' intervals tile it."""
        return self._lane_start(epoch, lane), self._lane_start(epoch, lane + 1)

    def _lane_start(self, epoch: int, lane: int) -> int:
        """sum over c' < lane of (T_c'(epoch + 1) - T_c'(epoch)), in closed form (Python integers)."""
        return self._sum_of_floors((epoch + 1) * self.num_samples, lane) - self._sum_of_floors(
            epoch * self.num_samples, lane
        )

    def _sum_of_floors(self, a: int, lane: int) -> int:
        """sum over c' < lane of floor((a + c') / C)."""
        quotient, remainder = divmod(a, self.lanes)
        return quotient * lane + max(0, lane - (self.lanes - remainder))

    def _shuffled_positions(self, lane_B: np.ndarray, epoch_B: np.ndarray, offset_B: np.ndarray) -> np.ndarray:
        """Position in the epoch's 0..N-1 of every row, after the lanes' window shuffles."""
        window_B = offset_B // self.shuffle_window
        position_B = np.empty_like(offset_B)
        # Rows of one lane are consecutive in its stream: equal (lane, epoch, window) form contiguous runs.
        changed = np.zeros(len(lane_B), dtype=bool)
        for column in (lane_B, epoch_B, window_B):
            changed[1:] |= column[1:] != column[:-1]
        starts = np.concatenate(([0], np.flatnonzero(changed)))
        # As Python's own numbers, in one go: numpy's take several times as long one by one.
        columns = [column[starts].tolist() for column in (lane_B, epoch_B, window_B, offset_B)]
        bounds = pairwise([*starts.tolist(), len(lane_B)])
        for (start, stop), lane, epoch, window, offset in zip(bounds, *columns, strict=True):
            positions = self._window_positions(lane, epoch, window)
            first = offset - window * self.shuffle_window
            position_B[start:stop] = positions[first : first + stop - start]
        return position_B

    def _window_positions(self, lane: int, epoch: int, window: int) -> np.ndarray:
        """The positions of one window of a lane, in the order in which the lane visits them."""
        cached = self._lane_windows.get(lane)
        if cached is not None and cached[0] == (epoch, window):
            return cached[1]
        lane_start, lane_stop = self.lane_interval(epoch, lane)
        start = lane_start + window * self.shuffle_window
        size = min(self.shuffle_window, lane_stop - start)
        assert size > 0
        order = permutation(size, seed=self.seed, purpose=PURPOSE_WINDOW_ORDER, epoch=epoch, lane=lane, window=window)
        positions = start + order
        self._lane_windows[lane] = ((epoch, window), positions)
        return positions

    def _resolve(self, epoch_B: np.ndarray, position_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard number and sample-in-shard of positions in the epochs' shard orders."""
        shard_B, index_B = np.empty_like(position_B), np.empty_like(position_B)
        # Not with np.unique, whose first use imports numpy.ma: longer than all the rest of a first batch.
        for epoch in sorted(set(epoch_B.tolist())):
            order, starts = self._epoch_order(epoch)
            rows = np.flatnonzero(epoch_B == epoch)
            place = np.searchsorted(starts, position_B[rows], side="right") - 1
            shard_B[rows] = order[place]
            index_B[rows] = position_B[rows] - starts[place]
        return shard_B, index_B

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and the position at which each begins."""
        if epoch in self._epoch_orders:
            self._epoch_orders.move_to_end(epoch)
            return self._epoch_orders[epoch]
        order = permutation(len(self._shard_sizes), seed=self.seed, purpose=PURPOSE_SHARD_ORDER, epoch=epoch)
        sizes = self._shard_sizes[order]
        self._epoch_orders[epoch] = order, np.cumsum(sizes) - sizes
        if len(self._epoch_orders) > _CACHED_EPOCHS:
            self._epoch_orders.popitem(last=False)
        return self._epoch_orders[epoch]

    def upcoming_shards(self, global_step: int, lanes: range) -> Iterator[tuple[int, int]]:
        """What some lanes will read, from a step on and without end: (first step that may need it, shard number).

        In the order of the steps. A lane may need any sample of a window as soon as the window begins. A shard comes
        again for every lane and every epoch that reads it.
        """
        return heapq.merge(*(self._upcoming_shards_of_lane(global_step, lane) for lane in lanes))

    def _upcoming_shards_of_lane(self, global_step: int, lane: int) -> Iterator[tuple[int, int]]:
        b, n, c = self.samples_per_lane, self.num_samples, self.lanes
        stream = global_step * b
        first_epoch = ((stream + 1) * c - lane - 1) // n
        for epoch in range(first_epoch, MAX_EPOCH - 1):
            epoch_start = (epoch * n + lane) // c  # in the lane's stream
            start, stop = self.lane_interval(epoch, lane)
            # Where the lane is now: what lies before the current window is done with.
            done = max(0, stream - epoch_start) // self.shuffle_window * self.shuffle_window
            order, starts = self._epoch_order(epoch)
            place = int(np.searchsorted(starts, start + done, side="right")) - 1
            while place < len(order) and starts[place] < stop:
                offset = max(0, int(starts[place]) - start) // self.shuffle_window * self.shuffle_window
                yield max(global_step, (epoch_start + offset) // b), int(order[place])
                place += 1

    # Checkpoints

    def state(self, global_step: int, manifest_fingerprint: str) -> dict[str, int | str]:
        """All that a checkpoint needs to continue the order: plain integers and a string."""
        return {
            "global_step": global_step,
            "seed": self.seed,
            "manifest_fingerprint": manifest_fingerprint,
            "global_batch_size": self.global_batch_size,
            "lanes": self.lanes,
            "shuffle_window": self.shuffle_window,
        }


_ORDER_SETTINGS = {
    "seed": "training.seed",
    "manifest_fingerprint": "data.train_manifest (fingerprint)",
    "global_batch_size": "training.global_batch_size",
    "lanes": "data.lanes",
    "shuffle_window": "data.shuffle_window",
}


def check_same_order(saved: dict[str, int | str], current: dict[str, int | str]) -> None:
    """Refuse to continue a checkpoint in a different order of samples.

    Raises:
        ConfigError: lists every setting that differs; `global_step` may differ.
    """
    differences = [
        f"{setting} was {saved.get(key, 'not recorded')}, is now {current.get(key, 'not recorded')}"
        for key, setting in _ORDER_SETTINGS.items()
        if key not in saved or key not in current or saved[key] != current[key]
    ]
    if not differences:
        return
    raise ConfigError(
        "the order of samples differs from the checkpoint's: "
        f"{'; '.join(differences)}. Continuing would show "
        "some samples of the current epoch twice and others never; restore the settings, or accept that with "
        "--data.allow_order_change true"
    )


def _check_settings(global_batch_size: int, lanes: int, shuffle_window: int, seed: int) -> None:
    if global_batch_size < 1:
        raise ConfigError(f"training.global_batch_size must be at least 1, not {global_batch_size}")
    if not 1 <= lanes <= min(global_batch_size, MAX_LANES) or global_batch_size % lanes:
        raise ConfigError(
            f"data.lanes {lanes} is not a divisor of training.global_batch_size {global_batch_size}; "
            f"the default would be {default_lanes(global_batch_size)}"
        )
    if not 1 <= shuffle_window < 2**33:
        raise ConfigError(f"data.shuffle_window must be between 1 and 2**33 - 1, not {shuffle_window}")
    if not 0 <= seed < 2**64:
        raise ConfigError(f"training.seed must be between 0 and 2**64 - 1, not {seed}")


def _checked_shard_sizes(shard_sizes: Sequence[int]) -> np.ndarray:
    if len(shard_sizes) == 0:
        raise DataError("the manifest lists no shards: there is nothing to train on")
    smallest = min(shard_sizes)
    if smallest < 1:
        number = list(shard_sizes).index(smallest)
        raise DataError(f"shard {number} has {smallest} samples; every shard needs at least one")
    # Python's integers cannot wrap around, whatever a manifest says.
    if sum(map(int, shard_sizes)) >= _SAMPLES_SEEN_LIMIT:
        raise DataError("the manifest lists more samples than an order can count (2**62)")
    return np.array(shard_sizes, dtype=np.int64)

"""A model of the time per step on N nodes: arithmetic on given numbers, not a measurement.

A collective over ranks is, with N ranks, b bytes, bandwidth w and latency l:

- ring: each pass sends (N - 1) / N of the bytes in N - 1 messages: `(N - 1) / N * b / w + (N - 1) * l`;
- tree: each pass sends all bytes over log2(N) levels, one after the other: `log2(N) * (l + b / w)`;
- pipelined tree: levels work at the same time on pieces of the bytes: `log2(N) * l + b / w`.

An all-reduce has two passes (reduce and spread), a reduce-scatter or an all-gather has one. With several ranks per
node a pass over nodes is preceded or followed by a ring within each node, and the ranks of a node share its link.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

ALGORITHMS = ("ring", "tree", "pipelined tree")
_PASSES = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
_GRADIENT_BYTES = 4  # per parameter; weights and gradients are float32 whatever the precision


@dataclass(frozen=True)
class Network:
    """A link: bytes per second in each direction, and seconds that a message takes without its bytes."""

    bandwidth_bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Collective:
    """An operation over all ranks.

    Args:
        kind: all_reduce, reduce_scatter or all_gather.
        num_bytes: Of the whole vector: what an all-reduce reduces, what an all-gather returns.
        count: How many of them a step has.
    """

    kind: str
    num_bytes: int
    count: int = 1


def collectives_of(engine: str, num_parameters: int) -> list[Collective]:
    """What a step sends by theory: gradients and weights, and the small sums of the guard and of requests.

    Args:
        engine: ddp or zero0 .. zero3.
        num_parameters: Of the model.
    """
    num_bytes = num_parameters * _GRADIENT_BYTES
    guard = Collective("all_reduce", 16 if engine in ("ddp", "zero0") else 24)
    small = [guard, Collective("all_reduce", 16)]
    if engine in ("ddp", "zero0"):
        return [Collective("all_reduce", num_bytes), *small]
    # Stage 3 gathers weights for the forward and again for the backward pass.
    gathers = 2 if engine == "zero3" else 1
    return [Collective("reduce_scatter", num_bytes), Collective("all_gather", num_bytes, gathers), *small]


def received_bytes(collectives: Iterable[Collective], ranks: int) -> float:
    """Bytes that each rank receives (and sends) in a ring."""
    return sum(_PASSES[one.kind] * one.count * one.num_bytes * (ranks - 1) / ranks for one in collectives)


def collective_s(collective: Collective, ranks: int, network: Network, algorithm: str) -> float:
    """Seconds for all operations of this kind and size."""
    transfer_s = collective.num_bytes / network.bandwidth_bytes_per_s
    levels = math.ceil(math.log2(ranks))
    if ranks == 1:
        pass_s = 0.0
    elif algorithm == "ring":
        pass_s = (ranks - 1) / ranks * transfer_s + (ranks - 1) * network.latency_s
    elif algorithm == "tree":
        pass_s = levels * (network.latency_s + transfer_s)
    else:
        assert algorithm == "pipelined tree", algorithm
        pass_s = levels * network.latency_s + transfer_s
    return _PASSES[collective.kind] * collective.count * pass_s


def communication_s(
    collectives: Iterable[Collective],
    nodes: int,
    ranks_per_node: int,
    between: Network,
    within: Network,
    algorithm: str,
) -> float:
    """Seconds that the collectives of a step take, if nothing else happens meanwhile.

    Args:
        collectives: Of the step.
        nodes: Number of nodes.
        ranks_per_node: Number of ranks on each.
        between: A node's link to the others.
        within: What ranks of a node are connected by.
        algorithm: Between nodes; within a node it is always a ring.
    """
    return sum(
        collective_s(one, nodes, between, algorithm) + collective_s(one, ranks_per_node, within, "ring")
        for one in collectives
    )


def step_bounds_s(compute_s: float, communication_s: float) -> tuple[float, float]:
    """Seconds per step if all communication hides behind the computation as far as it can, and if none does."""
    return max(compute_s, communication_s), compute_s + communication_s


def overlap(compute_s: float, communication_s: float, step_s: float) -> float:
    """The part of the communication that was hidden in a step that took `step_s`, between 0 and 1."""
    if communication_s == 0:
        return 0.0
    return min(1.0, max(0.0, 1 - (step_s - compute_s) / communication_s))


def compute_line(small: tuple[int, float], large: tuple[int, float]) -> tuple[float, float]:
    """Seconds per step, and per sample in it, from two measurements of (samples, seconds).

    Neither is negative: noise must not make a step with fewer samples slower, nor one with none faster than nothing.
    """
    (small_samples, small_s), (large_samples, large_s) = small, large
    per_sample_s = max(0.0, (large_s - small_s) / (large_samples - small_samples))
    per_sample_s = min(per_sample_s, large_s / large_samples)
    return large_s - per_sample_s * large_samples, per_sample_s

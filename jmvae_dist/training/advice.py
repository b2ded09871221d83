"""What to change first, from where a step's time goes: a table of rules, each with the number that it judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jmvae_dist.config import RunConfig


@dataclass(frozen=True)
class StepFacts:
    """What the rules judge.

    Args:
        config: The run's.
        shares: Fraction of a step by part (`benchmark.PARTS`); of the rank that waits longest for its data.
        product_share: Fraction of a step that the plain matrix products of forward and backward pass take when they
            are all there is; None where the model consists of other things, or it could not be counted.
        product_efficiency: Their FLOP/s over those of a large square product; None like the above.
        world_size: Number of processes.
        ranks_of_node: Processes on rank 0's node.
        threads: Of all of them together; 0 on a GPU, where threads do not compute.
        cores: That they may use together; a fraction where a container has a quota.
    """

    config: RunConfig
    shares: Mapping[str, float]
    product_share: float | None
    product_efficiency: float | None
    world_size: int
    ranks_of_node: int
    threads: int
    cores: float

    @property
    def pass_share(self) -> float:
        """Of the forward and the backward pass."""
        return self.shares["forward"] + self.shares["backward"]

    @property
    def overhead_share(self) -> float:
        """Of what the passes do besides matrix products."""
        return 0.0 if self.product_share is None else max(0.0, self.pass_share - self.product_share)

    @property
    def small_product_share(self) -> float:
        """Of what the matrix products would save if they were as fast as large ones."""
        if self.product_share is None or self.product_efficiency is None:
            return 0.0
        return self.product_share * max(0.0, 1.0 - self.product_efficiency)

    @property
    def idle_share(self) -> float:
        """Of the cores that no thread uses."""
        return max(0.0, 1.0 - self.threads / self.cores) if self.threads else 0.0

    @property
    def crowded_share(self) -> float:
        """Of the threads that have no core."""
        return max(0.0, 1.0 - self.cores / self.threads) if self.threads else 0.0

    @property
    def cores_per_rank(self) -> int:
        """Whole ones; 0 where there are more processes than cores."""
        return int(self.cores / self.ranks_of_node)


@dataclass(frozen=True)
class Rule:
    """One piece of advice.

    Args:
        stake: Fraction of a step (or of the cores) that is at stake.
        limit: The rule speaks where the stake is above this.
        finding: What was found, with the number.
        advice: Which knob to turn.
    """

    stake: Callable[[StepFacts], float]
    limit: float
    finding: Callable[[StepFacts], str]
    advice: Callable[[StepFacts], str]


def _part_rule(part: str, limit: float, advice: Callable[[StepFacts], str]) -> Rule:
    return Rule(
        lambda facts: facts.shares[part],
        limit,
        lambda facts: f"{part} takes {facts.shares[part]:.0%} of a step",
        advice,
    )


def _against_waiting(facts: StepFacts) -> str:
    data = facts.config.data
    threads = "default" if data.decode_threads is None else data.decode_threads
    return (
        f"more data.decode_threads (now {threads}) where pictures are decoded, data.workers (now {data.workers}) "
        f"where transforms in Python take the time, data.cache.dir (now {data.cache.dir or 'null'}) and "
        "data.cache.prefetch_shards for shards at URLs, a local disk for those on a slow file system"
    )


def _against_reduction(facts: StepFacts) -> str:
    fewer = (
        ", or fewer processes per node with more threads each" if facts.ranks_of_node > 1 and facts.threads else ""
    )
    return (
        "a larger training.global_batch_size: gradients are exchanged once per step, whatever its size "
        f"(training.micro_batch_size accumulates what does not fit into memory){fewer}"
    )


def _against_gathering(facts: StepFacts) -> str:
    lighter = "zero2 or ddp" if facts.config.training.engine == "zero3" else "ddp"
    return (
        f"training.engine: {lighter}, which exchanges fewer weights, if memory allows, or a larger global_batch_size"
    )


def _against_optimizer(facts: StepFacts) -> str:
    if not facts.config.optimizer.fused:
        return "optimizer.fused: true"
    split = ", or training.engine: zero1, which divides the update among the ranks" if facts.world_size > 1 else ""
    return f"a larger training.global_batch_size: an update costs the same for any batch{split}"


def _against_judging(facts: StepFacts) -> str:
    waits = "; it also has the wait for the slowest rank in it" if facts.world_size > 1 else ""
    if facts.config.training.gradient_clip_norm is not None:
        return f"training.gradient_clip_norm: null, if clipping is not needed: its norm is summed in float64{waits}"
    return f"a larger training.global_batch_size: the check of the gradients costs the same for any batch{waits}"


def _against_recording(facts: StepFacts) -> str:
    return f"a larger training.log_every_steps (now {facts.config.training.log_every_steps})"


def _against_overhead(facts: StepFacts) -> str:
    training = facts.config.training
    if training.compile == "off" and training.engine != "zero3":
        return "training.compile: model, which makes one pass over memory of several"
    return "a larger batch per forward pass, or wider layers"


def _against_idleness(facts: StepFacts) -> str:
    return f"OMP_NUM_THREADS={max(1, facts.cores_per_rank)}, or more processes"


def _against_crowding(facts: StepFacts) -> str:
    each = facts.cores_per_rank
    return f"OMP_NUM_THREADS={each}" if each else "fewer processes per node"


def _against_small_products(facts: StepFacts) -> str:
    return "a larger batch per forward pass (training.global_batch_size, training.micro_batch_size)"


def _explore(facts: StepFacts) -> str:
    return "training.profile_steps with a few steps late in the run, which shows the operators in it"


RULES = (
    Rule(
        lambda facts: facts.crowded_share,
        0.1,
        lambda facts: f"{facts.threads} threads compute on {facts.cores:g} core(s) of the node",
        _against_crowding,
    ),
    Rule(
        lambda facts: facts.idle_share,
        0.3,
        lambda facts: f"{facts.threads} thread(s) compute on {facts.cores:g} cores of the node",
        _against_idleness,
    ),
    _part_rule("data wait", 0.10, _against_waiting),
    _part_rule("gradient reduction", 0.20, _against_reduction),
    _part_rule("weight gathering", 0.20, _against_gathering),
    _part_rule("optimizer", 0.20, _against_optimizer),
    _part_rule("judging", 0.10, _against_judging),
    _part_rule("recording", 0.03, _against_recording),
    _part_rule("rest", 0.15, _explore),
    Rule(
        lambda facts: facts.overhead_share,
        0.25,
        lambda facts: f"the passes do other things than matrix products for {facts.overhead_share:.0%} of a step",
        _against_overhead,
    ),
    Rule(
        lambda facts: facts.small_product_share,
        0.15,
        lambda facts: f"the model's matrix products reach {facts.product_efficiency:.0%} of a large one's speed",
        _against_small_products,
    ),
)


def advise(facts: StepFacts) -> list[str]:
    """Lines of advice, what is worth most first; none where nothing is above its limit."""
    spoken = [(rule.stake(facts), rule) for rule in RULES if rule.stake(facts) > rule.limit]
    spoken.sort(key=lambda item: item[0], reverse=True)
    return [f"{rule.finding(facts)}. Try {rule.advice(facts)}" for _, rule in spoken]

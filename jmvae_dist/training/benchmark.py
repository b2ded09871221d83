"""Where the time of a training step goes, on the user's own data and machine (`jmvae-dist bench step`).

The steps are those of `TrainStep`, on batches that are read as training reads them. A stopwatch is put around
methods of the engine and the guard that take part, of these objects alone: training itself has no timers.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jmvae_dist.distributed.engine import ReplicatedEngine
from jmvae_dist.distributed.runtime import Runtime
from jmvae_dist.tracking.jsonl import MetricsLog
from jmvae_dist.training.advice import StepFacts, advise
from jmvae_dist.training.arithmetic import count_arithmetic, square_flops_per_s, time_products
from jmvae_dist.training.assembly import make_engine, make_guard, open_batches
from jmvae_dist.training.cores import cpu_quota, usable_cores
from jmvae_dist.training.meter import Meter
from jmvae_dist.training.micro_batches import settle_micro_batch
from jmvae_dist.training.ready_batches import ReadyBatch
from jmvae_dist.training.requests import Requests
from jmvae_dist.training.setup import ResolvedRun, num_micro_batches
from jmvae_dist.training.signals import StopSignals
from jmvae_dist.training.step import StepResult, TrainStep

# What a step's time is divided into, in the order in which it passes.
WAIT, FORWARD, BACKWARD, JUDGING, OPTIMIZER = "data wait", "forward", "backward", "judging", "optimizer"
REDUCTION, GATHERING, RECORDING, REST = "gradient reduction", "weight gathering", "recording", "rest"
PARTS = (WAIT, FORWARD, BACKWARD, REDUCTION, GATHERING, JUDGING, OPTIMIZER, RECORDING, REST)
_STEP = "step"
_MEASURED = (WAIT, FORWARD, BACKWARD, JUDGING, OPTIMIZER)
_LEAST_PROBES = 3
# A model of which less than this are plain matrix products is not judged by them.
_MOSTLY = 0.9
_RSS_UNIT_BYTES = 1024  # of ru_maxrss, on Linux

# Seconds by path: "step", "backward", or "backward/gradient reduction" for what is a part of it.
Times = dict[str, float]


@dataclass(frozen=True)
class Part:
    """Seconds of one part of the steps, or of all of it.

    Args:
        typical_s: Mean over the typical steps: the half of them whose duration lies in the middle. Unlike medians
            these add up.
        median_s: Over all steps.
        p90_s: Over all steps: nine of ten are not longer.
    """

    typical_s: float
    median_s: float
    p90_s: float

    def __add__(self, other: Part) -> Part:
        return Part(self.typical_s + other.typical_s, self.median_s + other.median_s, self.p90_s + other.p90_s)

    def times(self, fraction: float) -> Part:
        """A fraction of it."""
        return Part(self.typical_s * fraction, self.median_s * fraction, self.p90_s * fraction)


@dataclass(frozen=True)
class Split:
    """The parts of one rank's steps.

    Args:
        step: The whole, with its share of a record.
        parts: By name, all of PARTS; their typical values add up to that of `step`.
    """

    step: Part
    parts: dict[str, Part]

    def share(self, name: str) -> float:
        """Fraction of the typical step."""
        return self.parts[name].typical_s / self.step.typical_s


@dataclass(frozen=True)
class RankMeasurement:
    """What one rank measured.

    Args:
        split: Of its steps.
        mean_step_s: Wall time of all measured steps over their number.
        num_samples: Of this rank's share of the global batch.
        flops: Of this share: matrix products, convolutions and attention; None where they could not be counted.
        flops_problem: Why they could not.
        product_flops: The plain matrix products among them.
        product_s: Seconds that these take alone, one after the other.
        square_flops_per_s: Of a large square product in the run's precision.
        rss_bytes: Most memory of the process up to the end of the steps.
        device_bytes: Most memory on the GPU during the steps; None without one.
        host: Name of the node.
        cpus: Cores that the process may run on.
        quota: CPUs that its container may use; None: no limit.
        threads: Of torch.
    """

    split: Split
    mean_step_s: float
    num_samples: int
    flops: int | None
    flops_problem: str | None
    product_flops: int
    product_s: float
    square_flops_per_s: float
    rss_bytes: int
    device_bytes: int | None
    host: str
    cpus: list[int]
    quota: float | None
    threads: int

    @property
    def cores(self) -> float:
        """CPUs that the process may use, if others leave them to it."""
        return usable_cores([self.cpus], [self.quota])

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RankMeasurement:
        """The inverse of `dataclasses.asdict`."""
        split = values["split"]
        parts = {name: Part(**part) for name, part in split["parts"].items()}
        return cls(**{**values, "split": Split(Part(**split["step"]), parts)})


def split_steps(steps: Sequence[Times], probes: Mapping[str, float], record_every: int) -> Split:
    """Divide the steps' time.

    Args:
        steps: With the paths of the parts that were timed, and "recording" where there was one.
        probes: By path "part/inner": which fraction of `part` is `inner`, as other steps have shown.
        record_every: Steps between two records, which share its cost.
    """
    # A record is not part of most steps: each gets its share of one.
    walls = [times[_STEP] - times.get(RECORDING, 0.0) for times in steps]
    order = sorted(range(len(steps)), key=walls.__getitem__)
    middle = order[len(order) // 4 : len(order) - len(order) // 4]

    def part(seconds: Sequence[float]) -> Part:
        typical_s = statistics.fmean(seconds[number] for number in middle)
        return Part(typical_s, statistics.median(seconds), _p90(seconds))

    parts = dict.fromkeys(PARTS, Part(0.0, 0.0, 0.0))
    columns = {name: [times.get(name, 0.0) for times in steps] for name in _MEASURED}
    parts |= {name: part(column) for name, column in columns.items()}
    parts[REST] = part([wall_s - sum(row) for wall_s, *row in zip(walls, *columns.values(), strict=True)])
    wholes = dict(parts)
    for path, fraction in probes.items():
        outer, inner = path.split("/")
        parts[inner] += wholes[outer].times(fraction)
        parts[outer] += wholes[outer].times(-fraction)
    recorded = [times[RECORDING] / record_every for times in steps if RECORDING in times] or [0.0]
    record = statistics.median(recorded)
    parts[RECORDING] = Part(record, record, _p90(recorded))
    return Split(part(walls) + Part(record, record, record), parts)


def _p90(seconds: Sequence[float]) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(0.9 * len(seconds)))]


class Stopwatch:
    """Seconds of the parts of steps; on a GPU as the device spends them, without making it wait for the host.

    Args:
        device: Where the steps are computed. On a GPU, events in the current stream mark the time: what the host does
            meanwhile counts only where the device waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._path: list[str] = []
        self._steps: list[dict[str, list[tuple[Any, Any]]]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step; outside of one, nothing is timed."""
        self._steps.append({})
        with self._timed(_STEP):
            self._path = [""]
            try:
                yield
            finally:
                self._path = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a step, or of the part that it lies in."""
        if not self._path:
            yield
            return
        self._path.append(name)
        try:
            with self._timed("/".join(self._path[1:])):
                yield
        finally:
            self._path.pop()

    def watch(self, owner: object, **methods: str) -> None:
        """Time the methods of one object: name of the method = name of the part."""
        for method, name in methods.items():
            setattr(owner, method, self._watched(getattr(owner, method), name))

    def _watched(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return call(*arguments, **options)

        return watched

    def read(self) -> list[Times]:
        """Seconds by path of every step since the last reading; a part that occurs several times is summed."""
        if self._is_cuda:
            torch.cuda.synchronize()
        read = [{path: sum(self._between(*span) for span in spans) for path, spans in s.items()} for s in self._steps]
        self._steps = []
        return read

    @contextmanager
    def _timed(self, path: str) -> Iterator[None]:
        start = self._mark()
        try:
            yield
        finally:
            self._steps[-1].setdefault(path, []).append((start, self._mark()))

    def _mark(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, stop: Any) -> float:
        return start.elapsed_time(stop) / 1e3 if self._is_cuda else stop - start


class StepBenchmark:
    """Takes steps of a run, with a stopwatch.

    Args:
        run: The resolved run; nothing is written to its `output_dir`, and nothing is read there but, with
            `training.micro_batch_size: auto`, the micro-batch in `micro_batch.json` or manifests of checkpoints.
        runtime: Process group and engine.
        folder: Where rank 0 writes records; other ranks do not look there.

    Attributes:
        engine: That of the run.
    """

    def __init__(self, run: ResolvedRun, runtime: Runtime, folder: Path) -> None:
        self._run = run = settle_micro_batch(run, runtime)
        self._runtime = runtime
        self._folder = folder
        self._model, self.engine = make_engine(run, runtime)
        self._guard = make_guard(run, runtime, self.engine)
        self._stopwatch = Stopwatch(runtime.device)
        self._stopwatch.watch(self.engine, forward=FORWARD, backward=BACKWARD, step=OPTIMIZER)
        self._stopwatch.watch(self._guard, judge=JUDGING)
        self._take_step = TrainStep(run, runtime, self.engine, self._guard)
        self._meter = Meter(run.config.training.global_batch_size)

    def measure(self, steps: int, warmup: int) -> RankMeasurement:
        """Take `warmup` steps that do not count, then `steps` that do, then some that tell parts from each other.

        Raises:
            DataError: Some rank cannot read a batch; on all ranks.
        """
        batch = self._take_steps(warmup, steps)
        times = self._stopwatch.read()
        rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT_BYTES
        device = self._runtime.device
        device_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        probes = self._probe(batch, max(_LEAST_PROBES, steps // 2))
        config = self._run.config
        start, stop = self._run.plan.rows_of_rank(self._runtime.process.rank, self._runtime.process.world_size)
        num_passes = num_micro_batches(self._run, self._runtime.process.world_size)
        arithmetic = count_arithmetic(config, self._run.model_config, math.ceil((stop - start) / num_passes))
        scale = (stop - start) / arithmetic.num_samples
        # All ranks at once, as in a step: they share the node's memory, and perhaps its cores.
        self._runtime.collectives.gather(None)
        product_s = square_flops = 0.0
        with self._runtime.collectives.together():
            product_s = scale * time_products(arithmetic.products, device)
            square_flops = square_flops_per_s(config.training.precision, device)
        return RankMeasurement(
            split=split_steps(times, probes, config.training.log_every_steps),
            mean_step_s=statistics.fmean(step[_STEP] for step in times),
            num_samples=stop - start,
            flops=None if arithmetic.flops is None else round(scale * arithmetic.flops),
            flops_problem=arithmetic.problem,
            product_flops=round(scale * arithmetic.product_flops),
            product_s=product_s,
            square_flops_per_s=square_flops,
            rss_bytes=rss_bytes,
            device_bytes=device_bytes,
            host=socket.gethostname(),
            cpus=sorted(os.sched_getaffinity(0)),
            quota=cpu_quota(),
            threads=torch.get_num_threads(),
        )

    def _take_steps(self, warmup: int, steps: int) -> ReadyBatch:
        """What `Trainer` does between two checkpoints; returns the last batch."""
        run, runtime, total = self._run, self._runtime, warmup + steps
        with ExitStack() as stack:
            batches = stack.enter_context(closing(open_batches(run, runtime, self._model, range(total))))
            requests = stack.enter_context(
                Requests(runtime.collectives, StopSignals(), None, self._folder / "CHECKPOINT")
            )
            log: MetricsLog | None = None
            with runtime.collectives.together():
                if runtime.is_main:
                    log = MetricsLog(self._folder / "metrics.jsonl")
                    stack.callback(log.close)
            arriving = iter(batches)
            for number in range(1, total + 1):
                if number == warmup + 1 and runtime.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                with self._stopwatch.step() if number > warmup else contextlib.nullcontext():
                    with self._stopwatch.part(WAIT):
                        batch = next(arriving)
                    if not self.engine.is_settled:
                        self._take_step.rehearse(batch)
                    is_recorded = number == total or number % run.config.training.log_every_steps == 0
                    result = self._take_step(batch, is_recorded=is_recorded)
                    if is_recorded:
                        with self._stopwatch.part(RECORDING):
                            self._record(number, result, log)
                    agreed = requests.poll(failure=batches.failure is not None, is_writing=False)
                if agreed.failure:
                    with runtime.collectives.together():
                        batches.raise_failure()
        return batch

    def _record(self, global_step: int, result: StepResult, log: MetricsLog | None) -> None:
        means, guards = result.means(self._runtime.collectives), self._guard.read()
        with self._runtime.collectives.together():
            if log is not None:
                log.write({"global_step": global_step, **means, **vars(guards), **self._meter.read()})

    def _probe(self, batch: ReadyBatch, count: int) -> dict[str, float]:
        """Which fraction of parts is the exchange of values between ranks; by steps that are dropped.

        Fractions, not seconds: other programs may have slowed these steps down, and not the measured ones.
        """
        if isinstance(self.engine, ReplicatedEngine):
            return self._probe_replicated(self.engine, batch, count)
        from jmvae_dist.distributed.deepspeed import ZeroEngine

        assert isinstance(self.engine, ZeroEngine)
        around = partial(self._stopwatch.part, REDUCTION), partial(self._stopwatch.part, GATHERING)
        with self.engine.collectives_watched(*around):
            steps = [self._drop_step(batch) for _ in range(count)]
        paths = sorted({path for times in steps for path in times if path.count("/") == 1})
        # Sums over the steps, and not medians, of which several could exceed the part that they lie in.
        return {
            path: sum(times.get(path, 0.0) for times in steps) / sum(times[path.split("/")[0]] for times in steps)
            for path in paths
        }

    def _probe_replicated(self, engine: ReplicatedEngine, batch: ReadyBatch, count: int) -> dict[str, float]:
        """The reduction is part of the backward pass: what it adds to it, by steps with and without it in turn."""
        if self._runtime.process.world_size == 1:
            return {}
        with_s, without_s = [], []
        for _ in range(count):
            with_s.append(self._drop_step(batch)[BACKWARD])
            with engine.without_reduction():
                without_s.append(self._drop_step(batch)[BACKWARD])
        fraction = 1.0 - statistics.median(without_s) / statistics.median(with_s)
        return {f"{BACKWARD}/{REDUCTION}": max(0.0, fraction)}

    def _drop_step(self, batch: ReadyBatch) -> Times:
        with self._stopwatch.step():
            self._take_step(batch, is_wanted=False, is_recorded=False)
        return self._stopwatch.read()[0]


@dataclass(frozen=True)
class StepReport:
    """What all ranks measured.

    Args:
        ranks: In rank order.
        slowest_s: The largest typical value of all ranks, by part, and that of the step.
        samples_per_s: Of the whole run, at rank 0's typical steps.
        samples_per_s_overall: The same over the wall time of all steps, with whatever disturbed them.
        recomputes: Whether the FLOPs have those in them that `training.activation_checkpointing` computes again.
        advice: What to change first.
    """

    ranks: list[RankMeasurement]
    slowest_s: dict[str, float]
    samples_per_s: float
    samples_per_s_overall: float
    recomputes: bool
    advice: list[str]


def make_report(run: ResolvedRun, ranks: list[RankMeasurement], is_on_gpu: bool) -> StepReport:
    """Put together what all ranks measured."""
    first = ranks[0]
    node = [rank for rank in ranks if rank.host == first.host]
    slowest_s = {name: max(rank.split.parts[name].typical_s for rank in ranks) for name in PARTS}
    slowest_s[_STEP] = max(rank.split.step.typical_s for rank in ranks)
    step_s = first.split.step.typical_s
    consists_of_products = first.product_s > 0 and first.product_flops >= _MOSTLY * (first.flops or 0)
    facts = StepFacts(
        config=run.config,
        shares={name: first.split.share(name) for name in PARTS} | {WAIT: slowest_s[WAIT] / step_s},
        product_share=first.product_s / step_s if consists_of_products else None,
        product_efficiency=(
            first.product_flops / first.product_s / first.square_flops_per_s if consists_of_products else None
        ),
        world_size=len(ranks),
        ranks_of_node=len(node),
        threads=0 if is_on_gpu else sum(rank.threads for rank in node),
        cores=usable_cores((rank.cpus for rank in node), (rank.quota for rank in node)),
    )
    batch = run.config.training.global_batch_size
    recomputes = run.config.training.activation_checkpointing
    return StepReport(ranks, slowest_s, batch / step_s, batch / first.mean_step_s, recomputes, advise(facts))

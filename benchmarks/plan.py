"""What the order of samples costs at scale, what each rank and node reads, and what the window does to the shuffle.

    python benchmarks/plan.py [--shards 100000] [--samples 1000000000] [--out FILE.json]

Three tables. *Cost*: loading a manifest of so many shards, making the plan, and the first batch of one rank of many
after a seek to the middle of an epoch, in a process of its own, with the memory that it adds. *Reads*: a simulation
of the shards that every rank and node opens in one epoch at 64 lanes; a shard read by n ranks is fetched n times.
*Shuffle*: how well samples are mixed, by window: of pairs of consecutive samples of a lane, the fraction from the
same shard, and how far they lie apart in the epoch's order, where 1 is a full shuffle of the lane's part.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jmvae_dist.data.index import index_num_bytes
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.plan import SamplePlan
from jmvae_dist.data.shard import IndexFile, Shard

REPEATS = 3
READ_WORLD_SIZES = (1, 8, 48, 64)
RANKS_PER_NODE = 8
READ_SHARDS, SAMPLES_PER_SHARD, LANES = 1000, 1000, 64
WINDOWS = (1, 64, 512, 4096, 8192, 32768)


@dataclass
class Cost:
    """Of one step of the way to the first batch; the best of three."""

    what: str
    wall_ms: float
    cpu_ms: float
    added_mb: float  # to the most memory that the process has held


@dataclass
class Reads:
    """Of one epoch at 64 lanes."""

    world_size: int
    shards_per_rank: float
    shards_of_busiest_rank: int
    mb_of_busiest_rank: float
    shards_of_busiest_node: int
    most_ranks_per_shard: int
    fetched: float  # times the size of the data set, if each rank fetches what it opens


@dataclass
class Shuffle:
    """How samples are mixed with one window."""

    window: int
    same_shard: float  # of pairs of consecutive samples of a lane
    distance: float  # mean distance of such pairs in the epoch's order, over that of a full shuffle of the lane
    shards_per_batch: float  # different shards in a global batch


def main() -> int:
    """Measure, print tables, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=1_000_000_000)
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    parser.add_argument("--measure", metavar="MANIFEST", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps([asdict(cost) for cost in measure_once(Path(options.measure), options.ranks)]))
        return 0
    costs = measure_costs(options.shards, options.samples, options.ranks)
    print(f"{options.shards:,} shards, {options.samples:,} samples, {options.ranks:,} ranks")
    show(costs)
    reads = [simulate_reads(world_size) for world_size in READ_WORLD_SIZES]
    print(f"\n{READ_SHARDS:,} shards of {SAMPLES_PER_SHARD:,} samples, {LANES} lanes, one epoch, 100 MB per shard")
    show(reads)
    shuffles = [measure_shuffle(window) for window in WINDOWS]
    print(f"\n{READ_SHARDS:,} shards of {SAMPLES_PER_SHARD:,} samples, {LANES} lanes")
    show(shuffles)
    if options.out is not None:
        tables: dict[str, Sequence[Any]] = {"cost": costs, "reads": reads, "shuffle": shuffles}
        content = {name: [asdict(row) for row in rows] for name, rows in tables.items()}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def show(rows: Sequence[Any]) -> None:
    """A table of dataclasses of one kind."""
    header = list(asdict(rows[0]))
    cells = [
        [f"{value:,.3g}" if isinstance(value, float) else str(value) for value in asdict(row).values()]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]
    for line in [header, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


# Cost


def measure_costs(num_shards: int, num_samples: int, ranks: int) -> list[Cost]:
    """In processes of their own: what one has cached and allocated would help the next."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.json"
        write_manifest(path, num_shards, num_samples)
        command = [sys.executable, __file__, "--measure", str(path), "--ranks", str(ranks)]
        runs = []
        for _ in range(REPEATS):
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.append([Cost(**cost) for cost in json.loads(output)])
    return [min(costs, key=lambda cost: cost.cpu_ms) for costs in zip(*runs, strict=True)]


def write_manifest(path: Path, num_shards: int, num_samples: int) -> None:
    """A manifest of shards that do not exist; no file but this one is read to make an order."""
    modalities = [Modality("image", "uint8", (1, 28, 28)), Modality.classes("label", 10)]
    size, larger = divmod(num_samples, num_shards)
    shards = []
    for number in range(num_shards):
        samples = size + (number < larger)
        digests = [hashlib.sha256(f"{kind} {number}".encode()).hexdigest() for kind in ("shard", "index")]
        name = f"shard-{number:06d}.tar"
        index = IndexFile(f"{name}.index", index_num_bytes(samples, len(modalities)), digests[1])
        shards.append(Shard(name, samples, samples * 2560, digests[0], index))
    Manifest.create(modalities, shards, {}).save(path)


def measure_once(path: Path, ranks: int) -> list[Cost]:
    """From the manifest to the first batches of the last rank."""
    costs = []

    def step(what: str, action: Any) -> Any:
        before_mb, before_s, before_cpu_s = peak_mb(), time.perf_counter(), time.process_time()
        result = action()
        wall_s, cpu_s = time.perf_counter() - before_s, time.process_time() - before_cpu_s
        costs.append(Cost(what, wall_s * 1e3, cpu_s * 1e3, peak_mb() - before_mb))
        return result

    manifest = step("load the manifest", lambda: Manifest.load(path))
    sizes = manifest.shard_sizes
    plan = step("make the plan", lambda: SamplePlan(sizes, 4 * ranks, ranks, 8192, seed=0))
    lanes = plan.lanes_of_rank(ranks - 1, ranks)
    middle = int(plan.steps_per_epoch * 2.5)
    step("seek: first batch in the middle of epoch 3", lambda: plan.batch(middle, lanes))
    step("the batch after it", lambda: plan.batch(middle + 1, lanes))
    return costs


def peak_mb() -> float:
    """Most memory that this process has held."""
    # Not `ru_maxrss`, which begins at what the parent process had.
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 1024


# Reads


def simulate_reads(world_size: int) -> Reads:
    """Which ranks open which shards in the third epoch, from the intervals of their lanes."""
    plan = SamplePlan([SAMPLES_PER_SHARD] * READ_SHARDS, 2 * LANES, LANES, 8192, seed=0)
    epoch = 2
    opened: list[set[int]] = []
    for rank in range(world_size):
        lanes = plan.lanes_of_rank(rank, world_size)
        start, stop = plan.lane_interval(epoch, lanes.start)[0], plan.lane_interval(epoch, lanes.stop - 1)[1]
        opened.append(set(range(start // SAMPLES_PER_SHARD, -(-stop // SAMPLES_PER_SHARD))))
    nodes = [set().union(*opened[first : first + RANKS_PER_NODE]) for first in range(0, world_size, RANKS_PER_NODE)]
    ranks_per_shard = np.bincount([shard for shards in opened for shard in shards], minlength=READ_SHARDS)
    assert (ranks_per_shard >= 1).all()
    counts = [len(shards) for shards in opened]
    return Reads(
        world_size=world_size,
        shards_per_rank=float(np.mean(counts)),
        shards_of_busiest_rank=max(counts),
        mb_of_busiest_rank=100.0 * max(counts),
        shards_of_busiest_node=max(len(shards) for shards in nodes),
        most_ranks_per_shard=int(ranks_per_shard.max()),
        fetched=sum(counts) / READ_SHARDS,
    )


# Shuffle


def measure_shuffle(window: int) -> Shuffle:
    """From the batches of half an epoch."""
    plan = SamplePlan([SAMPLES_PER_SHARD] * READ_SHARDS, 4 * LANES, LANES, window, seed=0)
    steps = int(plan.steps_per_epoch / 2)
    shards_SB, indices_SB = (np.stack(column) for column in zip(*map(plan.batch, range(steps)), strict=True))
    # The epoch's order of shards, from a plan without windows, whose only lane goes through them one by one.
    order = SamplePlan([1] * READ_SHARDS, READ_SHARDS, 1, 1, seed=0).batch(0)[0]
    starts_by_shard = np.empty_like(order)
    starts_by_shard[order] = np.arange(READ_SHARDS) * SAMPLES_PER_SHARD
    positions_SB = starts_by_shard[shards_SB] + indices_SB
    lane_interval = plan.num_samples / LANES
    by_lane = positions_SB.reshape(steps, LANES, -1).transpose(1, 0, 2).reshape(LANES, -1)
    shards_by_lane = shards_SB.reshape(steps, LANES, -1).transpose(1, 0, 2).reshape(LANES, -1)
    return Shuffle(
        window=window,
        same_shard=float((shards_by_lane[:, 1:] == shards_by_lane[:, :-1]).mean()),
        # Two independent uniform places of an interval lie a third of its length apart on average.
        distance=float(np.abs(np.diff(by_lane)).mean() / (lane_interval / 3)),
        shards_per_batch=float(np.mean([len(np.unique(shards)) for shards in shards_SB[:: max(1, steps // 50)]])),
    )


if __name__ == "__main__":
    raise SystemExit(main())

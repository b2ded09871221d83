"""How training scales: 1 and 2 ranks measured for every engine, and a model of more nodes, checked by the 2 ranks.

    python benchmarks/scaling.py [--rounds 3] [--engines ddp zero2 ...] [--out FILE.json] [--plot FILE.png]
        [--ranks-per-node 2] [--bandwidth-gb-per-s 12.5 --latency-us 5]

The model of `step.py`, ranks of one thread, trained by `jmvae-dist train` on shards; runs take turns, medians count.
Gradients go through the process group (gloo), as they do between machines, and not through shared memory.

1. Time per step and samples/s of 1 and 2 ranks: weak (256 samples per rank) and strong (256 samples in all).
2. Computation: two runs of 1 rank at the same time, which take memory and caches from each other as two ranks do.
3. What the ranks of one step send, by torch's profiler in a real step, beside the theory; and what an all-reduce of 4
   bytes and one of the gradients take between ranks of this machine.
4. `scaling_model.py` predicts the step of 2 ranks from 2 and 3, and is compared with 1; then N nodes with several
   ranks each, with no and with full overlap of communication and computation. Between nodes it takes a network that
   is GIVEN, by options or by the examples below, not measured. A model, not a measurement.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from conditions import machine, versions
from scaling_model import (
    ALGORITHMS,
    Collective,
    Network,
    collectives_of,
    communication_s,
    compute_line,
    overlap,
    received_bytes,
    step_bounds_s,
)
from training_steps import training_steps
from workload import make_shards, read_records, run_ranks, settings, train

from jmvae_dist.cluster.doctor.network import time_all_reduce

ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3")
BATCH = 256
RECORD_STEPS = 10
NODES = (1, 2, 4, 8, 16, 32, 64)
ALL_REDUCE_ROUNDS = 30
# What a data sheet says of the link of a node, and a usual latency. Given, not measured.
EXAMPLES = {
    "10 Gbit/s Ethernet": Network(1.25e9, 50e-6),
    "100 Gbit/s InfiniBand": Network(12.5e9, 5e-6),
}
_FLOAT_BYTES = 4


def main() -> int:
    """Measure, predict, print tables, write JSON and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of every kind")
    parser.add_argument("--steps", type=int, default=110, help="of every run")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--ranks-per-node", type=int, default=2, help="of the predicted nodes; they share its link")
    parser.add_argument("--bandwidth-gb-per-s", type=float, help="of a node's link, each way, in place of examples")
    parser.add_argument("--latency-us", type=float, default=10.0, help="of a message between nodes, with the former")
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw the predictions")
    parser.add_argument("--rank", nargs=2, metavar=("MANIFEST", "ENGINE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return _be_rank(Path(options.rank[0]), options.rank[1])
    networks = EXAMPLES
    if options.bandwidth_gb_per_s is not None:
        name = f"{options.bandwidth_gb_per_s:g} GB/s, {options.latency_us:g} us"
        networks = {name: Network(options.bandwidth_gb_per_s * 1e9, options.latency_us * 1e-6)}
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "versions": versions(("torch", "accelerate", "deepspeed")),
    }
    print(json.dumps({key: report[key] for key in ("machine", "versions")}, indent=1), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        manifest = make_shards(Path(folder), options.samples)
        report["measured"] = measure(manifest, options.engines, options.rounds, options.steps)
        report["traffic"] = {
            engine: run_ranks([sys.executable, __file__, "--rank", str(manifest), engine], 2)
            for engine in options.engines
        }
    within = _fit_network(report["traffic"].values())
    report["network_of_this_machine"] = asdict(within)
    report["check"] = check(report["measured"], report["traffic"], within)
    report["given_networks_not_measured"] = {name: asdict(network) for name, network in networks.items()}
    report["predicted_not_measured"] = [
        row
        for engine in options.engines
        for name, network in networks.items()
        for row in predict(engine, report, name, network, within, options.ranks_per_node)
    ]
    _show(report)
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot is not None:
        draw(report, options.plot)
    return 0


# Measurements


def measure(manifest: Path, engines: Sequence[str], rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """By engine and kind of run: median milliseconds per step."""
    kinds: dict[str, Callable[[str], float]] = {
        "1 rank": lambda engine: _step_ms(manifest, engine, 1, BATCH, steps),
        "2 ranks, weak": lambda engine: _step_ms(manifest, engine, 2, 2 * BATCH, steps),
        "2 ranks, strong": lambda engine: _step_ms(manifest, engine, 2, BATCH, steps),
        "side by side": lambda engine: _side_by_side_ms(manifest, engine, BATCH, steps),
        "side by side, half": lambda engine: _side_by_side_ms(manifest, engine, BATCH // 2, steps),
    }
    times: dict[str, dict[str, list[float]]] = {engine: {kind: [] for kind in kinds} for engine in engines}
    for _ in range(rounds):
        for engine in engines:
            for kind, run in kinds.items():
                times[engine][kind].append(run(engine))
    return {engine: {kind: statistics.median(values) for kind, values in of.items()} for engine, of in times.items()}


def _step_ms(manifest: Path, engine: str, ranks: int, batch: int, steps: int) -> float:
    """Median over the records of one run, but for the first ones, in which caches are cold."""
    more = (
        *("--training.log_every_steps", str(RECORD_STEPS), "--training.engine", engine),
        *("--training.gradient_reduction", "process_group"),
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train([*settings(manifest, run, steps, batch), *more], ranks)
        times_s = [record["time_s"] for record in read_records(run)]
    return statistics.median(b - a for a, b in itertools.pairwise(times_s)) * 1e3 / RECORD_STEPS


def _side_by_side_ms(manifest: Path, engine: str, batch: int, steps: int) -> float:
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(_step_ms, manifest, engine, 1, batch, steps) for _ in range(2)]
        return statistics.mean(run.result() for run in runs)


def _be_rank(manifest: Path, engine: str) -> int:
    """On each of two ranks: what a step sends, and how long all-reduces take."""
    # As between machines: what goes through shared memory is not sent.
    options = ("--training.engine", engine, "--training.gradient_reduction", "process_group")
    with training_steps(manifest, 2 * BATCH, [options]) as (runtime, [(step, parts)]):
        # Sizes of partitioned weights cannot be asked for later.
        num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in parts.model.parameters())
        for _ in range(3):
            step()
        with torch.profiler.profile(record_shapes=True) as profile:
            step()
        sent = Counter(
            (event.name.removeprefix("gloo:"), _num_elements(event.input_shapes))
            for event in profile.events()
            if event.name.startswith("gloo:")
        )
        result = {
            "num_parameters": num_parameters,
            "collectives": [asdict(_as_collective(*key, count)) for key, count in sent.items()],
            "small_bytes": _FLOAT_BYTES,
            "small_s": time_all_reduce(runtime, _FLOAT_BYTES, ALL_REDUCE_ROUNDS),
            "large_bytes": num_parameters * _FLOAT_BYTES,
            "large_s": time_all_reduce(runtime, num_parameters * _FLOAT_BYTES, ALL_REDUCE_ROUNDS),
        }
        if runtime.is_main:
            print("\n" + json.dumps(result))
    return 0


def _num_elements(shapes: list[list[int]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def _as_collective(name: str, num_elements: int, count: int) -> Collective:
    """What gloo was asked for: it gets its own part for an all-gather, and carries out a reduce-scatter as a sum.

    Elements are taken for float32; the guard's two or three are twice as long, which does not matter.
    """
    assert re.fullmatch("all_reduce|all_gather", name), f"{name}: what this sends is not known here"
    ranks = 2 if name == "all_gather" else 1
    return Collective(name, num_elements * ranks * _FLOAT_BYTES, count)


def _fit_network(traffic: Any) -> Network:
    """Bandwidth and latency of a ring of two from two all-reduces: `bytes / bandwidth + 2 * latency`."""
    small_s, large_s = (statistics.median(item[key] for item in traffic) for key in ("small_s", "large_s"))
    num_bytes = next(iter(traffic))["large_bytes"]
    return Network(num_bytes / (large_s - small_s), small_s / 2)


# The model


def _collectives(traffic: dict[str, Any]) -> list[Collective]:
    return [Collective(**one) for one in traffic["collectives"]]


def check(
    measured: dict[str, dict[str, float]], traffic: dict[str, dict[str, Any]], within: Network
) -> list[dict[str, Any]]:
    """The model's step of 2 ranks against the measured one; nothing in it was fitted to that one."""
    rows = []
    for engine, of in measured.items():
        communication_ms = communication_s(_collectives(traffic[engine]), 1, 2, within, within, "ring") * 1e3
        for mode, compute in (("weak", "side by side"), ("strong", "side by side, half")):
            compute_ms, step_ms = of[compute], of[f"2 ranks, {mode}"]
            full_ms, none_ms = step_bounds_s(compute_ms, communication_ms)
            row = {
                "engine": engine,
                "mode": mode,
                "measured_ms": step_ms,
                "compute_ms": compute_ms,
                "communication_ms": communication_ms,
                "no_overlap_ms": none_ms,
                "no_overlap_error": none_ms / step_ms - 1,
                "full_overlap_ms": full_ms,
                "full_overlap_error": full_ms / step_ms - 1,
                "overlap_seen": overlap(compute_ms, communication_ms, step_ms),
            }
            rows.append(row)
    return rows


def predict(
    engine: str, report: dict[str, Any], name: str, between: Network, within: Network, ranks_per_node: int
) -> list[dict[str, Any]]:
    """Time per step on N nodes with each algorithm: weak with 256 samples per rank, strong with 256 in all."""
    of = report["measured"][engine]
    line = compute_line((BATCH // 2, of["side by side, half"]), (BATCH, of["side by side"]))
    rows = []
    for nodes in NODES:
        for mode in ("weak", "strong"):
            samples = BATCH if mode == "weak" else BATCH / (nodes * ranks_per_node)
            compute_ms = line[0] + line[1] * samples
            for algorithm in ALGORITHMS:
                sent_s = communication_s(
                    _collectives(report["traffic"][engine]), nodes, ranks_per_node, between, within, algorithm
                )
                full_ms, none_ms = step_bounds_s(compute_ms, sent_s * 1e3)
                row = {"engine": engine, "network": name, "mode": mode, "algorithm": algorithm, "nodes": nodes}
                rates = {
                    f"{key}_samples_per_s": samples * nodes * ranks_per_node / time_ms * 1e3
                    for key, time_ms in (("no_overlap", none_ms), ("full_overlap", full_ms))
                }
                rows.append({**row, "no_overlap_ms": none_ms, "full_overlap_ms": full_ms, **rates})
    return rows


# Tables and the picture


def _show(report: dict[str, Any]) -> None:
    print(
        f"\nmeasured{'1 rank':>14}{'2, weak':>12}{'samples/s':>12}{'efficiency':>12}{'2, strong':>12}{'speed-up':>10}"
    )
    for engine, of in report["measured"].items():
        one, weak, strong = of["1 rank"], of["2 ranks, weak"], of["2 ranks, strong"]
        print(
            f"{engine:<8}{one:>11.1f} ms{weak:>9.1f} ms{2 * BATCH / weak * 1e3:>12,.0f}{one / weak:>12.2f}"
            f"{strong:>9.1f} ms{one / strong:>9.2f}x"
        )
    print(f"\nsent by each of 2 ranks per step{'counted':>14}{'messages':>10}{'theory':>14}{'parameters':>18}")
    for engine, traffic in report["traffic"].items():
        counted = _collectives(traffic)
        theory = collectives_of(engine, traffic["num_parameters"])
        print(
            f"{engine:<32}{received_bytes(counted, 2):>12,.0f} B{sum(one.count for one in counted):>10}"
            f"{received_bytes(theory, 2):>12,.0f} B{traffic['num_parameters']:>18,}"
        )
    within = report["network_of_this_machine"]
    print(
        f"\nbetween ranks of this machine: {within['bandwidth_bytes_per_s'] / 1e9:.2f} GB/s, "
        f"{within['latency_s'] * 1e6:.0f} us (ring of 2, gloo)"
    )
    titles = f"{'compute':>14}{'sent in':>10}{'no overlap':>15}{'full':>14}{'measured':>17}{'hidden':>8}"
    print(f"\ncheck of the model{titles}")
    for row in report["check"]:
        print(
            f"{row['engine']:<8}{row['mode']:<8}{row['compute_ms']:>13.1f} ms{row['communication_ms']:>7.1f} ms"
            f"{row['no_overlap_ms']:>7.1f} ({row['no_overlap_error']:+.0%}){row['full_overlap_ms']:>9.1f} "
            f"({row['full_overlap_error']:+.0%}){row['measured_ms']:>11.1f} ms{row['overlap_seen']:>8.0%}"
        )
    print("\nA MODEL, NOT A MEASUREMENT: ms per step on N nodes, full to no overlap; networks are given")
    print(f"{'engine, network, mode, algorithm':<60}" + "".join(f"{nodes:>13}" for nodes in NODES))
    rows: dict[tuple[str, ...], list[str]] = {}
    for row in report["predicted_not_measured"]:
        key = tuple(row[part] for part in ("engine", "network", "mode", "algorithm"))
        rows.setdefault(key, []).append(f"{row['full_overlap_ms']:.0f}-{row['no_overlap_ms']:.0f}")
    for key, cells in rows.items():
        print(f"{', '.join(key):<60}" + "".join(f"{cell:>13}" for cell in cells))
    sys.stdout.flush()


def draw(report: dict[str, Any], path: Path) -> None:
    """Predicted efficiency over nodes, one panel per engine: bands from no to full overlap."""
    from matplotlib.figure import Figure

    rows = [row for row in report["predicted_not_measured"] if (row["mode"], row["algorithm"]) == ("weak", "ring")]
    engines = list(report["measured"])
    figure = Figure(figsize=(max(6.5, 4.0 * len(engines)), 4.5), layout="constrained")
    figure.suptitle(
        "A model, not a measurement: weak scaling, 256 samples per rank, ring\n(networks given, not measured)"
    )
    for axes, engine in zip(figure.subplots(1, len(engines), squeeze=False, sharey=True)[0], engines, strict=True):
        for network in report["given_networks_not_measured"]:
            of = [row for row in rows if row["engine"] == engine and row["network"] == network]
            bounds = [[of[0]["full_overlap_ms"] / row[f"{kind}_overlap_ms"] for row in of] for kind in ("no", "full")]
            axes.fill_between(NODES, *bounds, alpha=0.4, label=f"{network}: no to full overlap")
        axes.set(xscale="log", ylim=(0, 1.05), title=engine, xlabel="nodes (model)")
        axes.set_xticks(NODES, [str(nodes) for nodes in NODES], minor=False)
        axes.legend(fontsize="small", loc="lower left")
    figure.axes[0].set_ylabel("throughput / (nodes x one node with full overlap)\nmodel, not a measurement")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())

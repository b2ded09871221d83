"""Where the time of two ranks goes against one: waiting for memory, and the reduction of gradients.

    python benchmarks/reduction.py [--rounds 15] [--batches 256 1024] [--out FILE.json]

Two ranks of one thread, gloo over loopback, the model of `step.py`; contenders take turns, medians count.

1. All-reduces of several sizes: wall time, and CPU time of the process in user and in system mode.
2. What an all-reduce of the gradients consists of, each measured alone: as many bytes over a TCP connection between
   the ranks, in both directions at once; the sum of half of them; copies. And the same sum in bfloat16, and through
   shared memory.
3. Bare steps (forward, backward, fused AdamW): of one rank while the other waits; of both without a reduction, which
   shows what they take from each other; and of both with each kind of reduction. `two_to_one` is the throughput of
   two ranks against one; whole trainers are compared by `step.py`.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conditions import machine, versions
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training_steps import training_steps
from workload import SHAPES, make_shards, run_ranks

from jmvae_dist.distributed.engine import ForwardPass
from jmvae_dist.distributed.runtime import Runtime
from jmvae_dist.distributed.shared_memory import SharedMemoryMean

RANKS = 2
SIZES = (4, 2**16, 2**20, 4 * 2**20, 25 * 2**20)
STEPS_PER_TURN = 3
CALLS_PER_TURN = 5
ALONE, NO_REDUCTION = "1 rank, the other waits", "no reduction"

Work = Callable[[], Any]


def main() -> int:
    """Measure, print tables, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of every contender")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024], help="samples per rank and step")
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    parser.add_argument("--rank", metavar="MANIFEST", type=Path, help=argparse.SUPPRESS)  # what each rank does
    options = parser.parse_args()
    if options.rank is not None:
        return _be_rank(options.rank, options)
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "versions": versions(("torch",)),
    }
    with tempfile.TemporaryDirectory() as folder:
        manifest = make_shards(Path(folder), 4096)
        command = [sys.executable, __file__, "--rank", str(manifest), "--rounds", str(options.rounds)]
        report |= run_ranks([*command, "--batches", *map(str, options.batches)], RANKS)
    _show(report)
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _show(report: dict[str, Any]) -> None:
    print(json.dumps({key: report[key] for key in ("machine", "versions")}, indent=1))
    print(f"\n{'all-reduce of':>16}{'wall':>10}{'user':>10}{'system':>10}")
    for row in report["all_reduce"]:
        print(
            f"{row['bytes']:>14,} B" + "".join(f"{row[key]:>7.2f} ms" for key in ("wall_ms", "user_ms", "system_ms"))
        )
    print(f"\nparts, for {report['gradient_bytes']:,} bytes of gradients")
    for name, time_ms in report["parts_ms"].items():
        print(f"{name:<52}{time_ms:>7.2f} ms")
    for row in report["steps"]:
        print(f"\nbare step, {row['samples_per_rank']} samples per rank{'ms':>26}{'2 ranks / 1':>13}")
        for name, time_ms in row["ms"].items():
            ratio = row["two_to_one"].get(name)
            print(f"{name:<52}{time_ms:>8.1f}" + ("" if ratio is None else f"{ratio:>12.2f}x"))
    sys.stdout.flush()


# What each rank does


def _be_rank(manifest: Path, options: argparse.Namespace) -> int:
    with training_steps(manifest, 64, [()]) as (runtime, [(_, engine)]):
        size = sum(parameter.numel() for parameter in engine.model.parameters())
        tensor_bytes = (parameter.nbytes for parameter in engine.model.parameters())
        shared_memory = SharedMemoryMean(runtime.collectives, tensor_bytes)
        result = {
            "gradient_bytes": size * 4,
            "all_reduce": [_time_all_reduce(runtime, num_bytes, options.rounds) for num_bytes in (*SIZES, size * 4)],
            "parts_ms": _time_parts(runtime, size, shared_memory, options.rounds),
            "steps": [
                _time_steps(runtime, engine.model, batch, shared_memory, options.rounds) for batch in options.batches
            ],
        }
        if runtime.is_main:
            print(json.dumps(result))
    return 0


def _take_turns(runtime: Runtime, works: dict[str, Work], rounds: int, calls: int) -> dict[str, float]:
    """Median milliseconds of a call by name."""
    return {name: statistics.median(of) for name, of in _time_in_turns(runtime, works, rounds, calls).items()}


def _time_in_turns(runtime: Runtime, works: dict[str, Work], rounds: int, calls: int) -> dict[str, list[float]]:
    """Milliseconds of a call by name and round, on average over both ranks, that begin every turn together."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            runtime.collectives.gather(None)
            start_s = time.perf_counter()
            if name != ALONE or runtime.is_main:
                for _ in range(calls):
                    work()
            of_ranks = runtime.collectives.gather(time.perf_counter() - start_s)
            if turn > 0:  # the first one warms up
                duration_s = of_ranks[0] if name == ALONE else statistics.mean(of_ranks)
                times[name].append(duration_s * 1e3 / calls)
    return times


def _time_all_reduce(runtime: Runtime, num_bytes: int, rounds: int) -> dict[str, float]:
    values = torch.zeros(num_bytes // 4)
    used: list[list[float]] = []

    def reduce() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF)
        dist.all_reduce(values)
        after = resource.getrusage(resource.RUSAGE_SELF)
        used.append([(after.ru_utime - before.ru_utime) * 1e3, (after.ru_stime - before.ru_stime) * 1e3])

    [wall_ms] = _take_turns(runtime, {"all-reduce": reduce}, rounds, CALLS_PER_TURN).values()
    # Means: the kernel accounts for CPU time in steps that may be longer than a call.
    user_ms, system_ms = (statistics.mean(column) for column in zip(*used, strict=True))
    return {"bytes": num_bytes, "wall_ms": wall_ms, "user_ms": user_ms, "system_ms": system_ms}


def _time_parts(runtime: Runtime, size: int, shared_memory: SharedMemoryMean, rounds: int) -> dict[str, float]:
    values, other = torch.zeros(size), torch.zeros(size)
    half, other_half = values[: size // 2], other[: size // 2]

    with _connect(runtime) as connection:
        works: dict[str, Work] = {
            "gloo all-reduce": lambda: dist.all_reduce(values),
            "the bytes alone over TCP, both ways at once": lambda: _exchange(connection, values, other),
            "the sum of half of them alone": lambda: half.add_(other_half),
            "a copy of them": lambda: other.copy_(values),
            "gloo all-reduce in bfloat16, with both conversions": lambda: _sum_in_bf16(values),
            "shared memory": lambda: shared_memory.average([values]),
        }
        return _take_turns(runtime, works, rounds, CALLS_PER_TURN)


def _sum_in_bf16(values: Tensor) -> None:
    """As torch's `bf16_compress_hook`, which refuses gloo."""
    small = values.bfloat16()
    dist.all_reduce(small)
    values.copy_(small)


def _connect(runtime: Runtime) -> socket.socket:
    """A connection between the two ranks over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = runtime.collectives.broadcast(server.getsockname()[1])
        connection = server.accept()[0] if runtime.is_main else socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _exchange(connection: socket.socket, sent: Tensor, received: Tensor) -> None:
    """Send as many bytes as are received: what a ring of two does with the gradients, but for the sum."""
    sender = threading.Thread(target=connection.sendall, args=(sent.numpy(),))
    sender.start()
    rest = memoryview(received.numpy()).cast("B")
    while rest:
        rest = rest[connection.recv_into(rest) :]
    sender.join()


def _time_steps(
    runtime: Runtime, model: nn.Module, batch: int, shared_memory: SharedMemoryMean, rounds: int
) -> dict[str, Any]:
    label = torch.nn.functional.one_hot(torch.arange(batch) % 10, 10).float()
    inputs = {"image": torch.rand(batch, *SHAPES["image"]), "label": label}

    def step(wrap: Callable[[nn.Module], nn.Module]) -> Work:
        own = copy.deepcopy(model)
        module = wrap(ForwardPass(own, "fp32", "cpu"))
        optimizer = torch.optim.AdamW(own.parameters(), lr=1e-4, fused=True)

        def take() -> None:
            loss_sum, _ = module(inputs=inputs, annealing=1.0, check_inputs=False)
            (loss_sum / batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return take

    works = {ALONE: step(lambda module: module), NO_REDUCTION: step(lambda module: module)}
    works |= {name: step(wrap) for name, wrap in _reductions(shared_memory).items()}
    times_ms = _time_in_turns(runtime, works, rounds, STEPS_PER_TURN)
    # By round: on a busy machine neighbouring turns have more in common than medians.
    ratios = {
        name: statistics.median(RANKS * one / two for one, two in zip(times_ms[ALONE], of, strict=True))
        for name, of in times_ms.items()
        if name != ALONE
    }
    medians_ms = {name: statistics.median(of) for name, of in times_ms.items()}
    return {"samples_per_rank": batch, "ms": medians_ms, "two_to_one": ratios}


def _reductions(shared_memory: SharedMemoryMean) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """By name: what wraps a model so that its gradients are averaged over ranks."""

    def ddp(**options: Any) -> Callable[[nn.Module], nn.Module]:
        return lambda module: DistributedDataParallel(module, **{"gradient_as_bucket_view": True, **options})

    def with_hook(hook: Callable[..., torch.futures.Future[Tensor]]) -> Callable[[nn.Module], nn.Module]:
        def wrap(module: nn.Module) -> nn.Module:
            wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True)
            wrapped.register_comm_hook(None, hook)
            return wrapped

        return wrap

    def compress(_, bucket):  # DDP compares annotations with classes, and would find the names that they are here
        _sum_in_bf16(bucket.buffer().div_(RANKS))
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    return {
        "DDP, torch's defaults (buckets of 25 MB, copied)": ddp(gradient_as_bucket_view=False),
        "DDP over gloo as in training: buckets as views": ddp(),
        "the same, static graph": ddp(static_graph=True),
        "the same, buckets of 1 MB": ddp(bucket_cap_mb=1),
        "the same, buckets of 4 MB": ddp(bucket_cap_mb=4),
        "the same, buckets of 100 MB": ddp(bucket_cap_mb=100),
        "the same, compressed to bfloat16": with_hook(compress),
        "the same, through shared memory as in training": with_hook(shared_memory.hook),
    }


if __name__ == "__main__":
    sys.exit(main())

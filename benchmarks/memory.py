"""Peak memory of training per engine and number of ranks, against the theory of `train --dry_run`.

    python benchmarks/memory.py [--hidden 1792] [--batch 256] [--engines ddp zero0 ...] [--micro_batches 1 2]
        [--out FILE.json]

Every cell is a run of its own, of real processes (gloo, CPU): perceptrons on vectors, float32, a few steps of
`TrainStep` with a batch in memory. Counted is by how much the resident memory of rank 0 grows at most (VmHWM) after
imports, the start of the process group, a step of a tiny optimizer, and the making of the batch; pages that the ranks
share are divided among them. More than one micro-batch is measured without recomputation. MALLOC_MMAP_THRESHOLD_ and
other variables of the C library's allocator reach the ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conditions import machine, versions
from workload import free_port

from jmvae_dist.config_io import parse_run_config
from jmvae_dist.data.loader import Batch
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.sources.base import ArraySource
from jmvae_dist.data.writer import write_shards
from jmvae_dist.distributed.environment import detect_process
from jmvae_dist.distributed.runtime import start_runtime
from jmvae_dist.training.assembly import make_engine, make_guard
from jmvae_dist.training.memory import PassTheory, engine_memory
from jmvae_dist.training.ready_batches import Preparation
from jmvae_dist.training.setup import num_micro_batches, resolve_run
from jmvae_dist.training.step import TrainStep

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3")
SHAPES = {"first": (256,), "second": (256,)}
SAMPLES, STEPS, HIDDEN_LAYERS = 512, 5, 4
_HEADER = (
    f"{'engine':<7}{'ranks':>6}{'micro-batches':>14}{'recomputes':>12}{'measured':>10}{'theory':>10}{'ratio':>7}  MiB"
)
PACKAGES = ("torch", "accelerate", "deepspeed", "numpy")


def main() -> int:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1792, help="width of the hidden layers")
    parser.add_argument("--batch", type=int, default=256, help="samples per rank and step")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1, 2], help="per step")
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # what a process of its own does
    options = parser.parse_args()
    if options.rank is not None:
        _measure(options.rank.split("\n"))
        return 0
    rows = []
    print(_HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        manifest = _write_data(Path(folder) / "data")
        for engine, ranks, (micro_batches, recomputes) in itertools.product(
            options.engines, options.ranks, _passes(options.micro_batches)
        ):
            cell = {"engine": engine, "ranks": ranks, "micro_batches": micro_batches, "recomputes": recomputes}
            arguments = _arguments(manifest, Path(folder) / "run", options, **cell)
            row = {**cell, **_run(arguments, ranks)}
            measured, theory = (row[key] / 2**20 for key in ("measured_bytes", "theory_bytes"))
            numbers = f"{measured:>10,.0f}{theory:>10,.0f}{measured / theory:>7.2f}"
            print(f"{engine:<7}{ranks:>6}{micro_batches:>14}{recomputes!s:>12}{numbers}", flush=True)
            rows.append(row)
    result = {"command": " ".join(sys.argv), "machine": machine(), "versions": versions(PACKAGES), "rows": rows}
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _passes(micro_batches: list[int]) -> Iterator[tuple[int, bool]]:
    """Numbers of micro-batches, and whether blocks are recomputed."""
    for number in micro_batches:
        yield number, False
        if number == 1:
            yield number, True


def _write_data(folder: Path) -> Path:
    random = np.random.default_rng(0)
    arrays = {name: random.random((SAMPLES, *shape), dtype=np.float32) for name, shape in SHAPES.items()}
    modalities = tuple(Modality(name, "float32", shape) for name, shape in SHAPES.items())
    write_shards(
        ArraySource("random", "train", modalities, arrays, np.arange(SAMPLES), SAMPLES, {}), folder, workers=1
    )
    return folder / "manifest.json"


def _arguments(
    manifest: Path,
    output_dir: Path,
    options: argparse.Namespace,
    engine: str,
    ranks: int,
    micro_batches: int,
    recomputes: bool,
) -> list[str]:
    sizes = str([options.hidden] * HIDDEN_LAYERS)
    networks = {"activation": "gelu", **{f"{name}_hidden_dims": sizes for name in ("encoder", "decoder", "joint")}}
    settings = {
        "output_dir": output_dir,
        "data.train_manifest": manifest,
        "training.steps": STEPS,
        "training.engine": engine,
        "training.global_batch_size": options.batch * ranks,
        "training.micro_batch_size": math.ceil(options.batch / micro_batches),
        "training.activation_checkpointing": str(recomputes).lower(),
        **{f"model.networks.{key}": value for key, value in networks.items()},
    }
    return [f"--{key}={value}" for key, value in settings.items()]


def _run(arguments: list[str], ranks: int) -> dict[str, Any]:
    """What rank 0 has measured."""
    common = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, __file__, "--rank", "\n".join(arguments)]
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        processes.append(subprocess.Popen(command, env={**common, **own}, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{' '.join(arguments)} failed")
    return json.loads(outputs[0].splitlines()[-1])


def _measure(arguments: list[str]) -> None:
    """One run, in this process; prints what it measures as JSON."""
    config = parse_run_config(arguments)
    process = detect_process()
    run = resolve_run(config, process.world_size)
    training = config.training
    with start_runtime(
        process, device="cpu", engine=training.engine, deepspeed_config=run.deepspeed_config
    ) as runtime:
        batch = _batch(training.global_batch_size // process.world_size)
        _warm_up()
        before = _resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        model, engine = make_engine(run, runtime)
        # zero3 leaves nothing in the parameters themselves.
        num_parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
        take_step = TrainStep(run, runtime, engine, make_guard(run, runtime, engine))
        prepare = Preparation(run)
        if not engine.is_settled:
            take_step.rehearse(prepare(batch))
        after = {"start": {key: _resident_bytes(key) - before for key in ("VmRSS", "VmHWM")}}
        for step in range(STEPS):
            take_step(prepare(dataclasses.replace(batch, global_step=step)))
            after[f"step {step + 1}"] = {key: _resident_bytes(key) - before for key in ("VmRSS", "VmHWM")}
        # All ranks see the pages that they share, each for its own.
        shared = _resident_bytes("RssShmem")
        measured = _resident_bytes("VmHWM") - before - shared + shared // process.world_size
    if process.rank == 0:
        micro_batches = num_micro_batches(run, process.world_size)
        memory = engine_memory(
            training.engine,
            num_parameters,
            process.world_size,
            num_micro_batches=micro_batches,
            deepspeed_config=run.deepspeed_config,
            gradient_reduction=training.gradient_reduction,
        )
        activations = PassTheory(config, run.model_config)(math.ceil(len(batch.rows) / micro_batches))
        print(
            json.dumps(
                {
                    "num_parameters": num_parameters,
                    "measured_bytes": measured,
                    "theory_bytes": memory.peak(activations),
                    "theory": {**dataclasses.asdict(memory), "activations": activations},
                    "after": after,
                }
            )
        )


def _warm_up() -> None:
    """Import what torch does at the first step of any optimizer, some 100 MiB."""
    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = torch.zeros(1)
    torch.optim.AdamW([parameter]).step()


def _batch(size: int) -> Batch:
    inputs = {name: torch.rand(size, *shape) for name, shape in SHAPES.items()}
    return Batch(global_step=0, rows=torch.arange(size), inputs=inputs)


def _resident_bytes(key: str) -> int:
    """VmRSS: now; VmHWM: at the highest since 5 was written to clear_refs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    sys.exit(main())

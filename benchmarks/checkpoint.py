"""What checkpoints cost, per engine: how long training stands still, how long a resume takes, how much is written.

    python benchmarks/checkpoint.py [--processes 2] [--hidden 1024] [--engines ddp zero1 ...] [--out FILE.json]

Real runs through launch/local.sh on scikit-learn's digits, with networks as wide as asked for. Every engine trains
the same steps with and without `checkpoint.async_write`, and resumes once. Stalls are compared with the time of a
step measured in the same run, because seconds of one machine say little about another.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3")
STEPS, EVERY_STEPS = 60, 15
BATCH = 256


@dataclass
class Result:
    """One engine, one way of writing; times are medians over the checkpoints of the run."""

    engine: str
    processes: int
    is_async: bool
    state_mb: float  # weights and two moments, float32, once
    written_mb: float  # all files of one checkpoint
    largest_part: float  # of the written bytes, by one rank
    step_ms: float  # without checkpoints
    stall_ms: float  # per checkpoint
    stall_steps: float  # the same, in steps
    resume_s: float  # verify and read


def main() -> int:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024, help="width of all hidden layers (default: 1024)")
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "digits"
        command = [sys.executable, "-m", "jmvae_dist", "shards", "write", "digits", "--split", "train"]
        subprocess.run([*command, "--out", str(data)], check=True, cwd=ROOT)
        print(
            f"{'engine':<7}{'write':<7}{'state':>10}{'written':>10}{'largest part':>14}{'step':>9}{'stall':>10}"
            f"{'in steps':>10}{'resume':>9}"
        )
        for engine in options.engines:
            for is_async in (False, True):
                run = Path(folder) / f"{engine}-{is_async}"
                result = measure(engine, is_async, run, data, options.processes, options.hidden)
                show(result)
                results.append(result)
    if options.out is not None:
        options.out.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return 0


def measure(engine: str, is_async: bool, run: Path, data: Path, processes: int, hidden: int) -> Result:
    """Train with checkpoints, then resume from the last one for one more step."""
    train(engine, is_async, run, data, processes, hidden, STEPS)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    stalls_s = [record["checkpoint/stall_s"] for record in records if "checkpoint/stall_s" in record]
    # Not the first records: caches are cold, and DeepSpeed lays out its buffers.
    steps_s = [BATCH / record["speed/samples_per_s"] for record in records[1:]]
    checkpoint = run / "checkpoints" / f"step-{STEPS:08d}"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = [file["num_bytes"] for file in manifest["files"].values()]
    written = sum(files) + (checkpoint / "manifest.json").stat().st_size
    numel = sum(sum(part["numel"] for part in tensor["fragments"]) for tensor in manifest["tensors"].values())
    output = train(engine, is_async, run, data, processes, hidden, STEPS + 1)
    resumed = re.search(r"verified and read in ([0-9.]+) s", output)
    assert resumed is not None, output
    stall_s, step_s = statistics.median(stalls_s), statistics.median(steps_s)
    return Result(
        engine=engine,
        processes=processes,
        is_async=is_async,
        state_mb=numel * 4 / 1e6,
        written_mb=written / 1e6,
        largest_part=max(files) / sum(files),
        step_ms=step_s * 1e3,
        stall_ms=stall_s * 1e3,
        stall_steps=stall_s / step_s,
        resume_s=float(resumed[1]),
    )


def train(engine: str, is_async: bool, run: Path, data: Path, processes: int, hidden: int, steps: int) -> str:
    """One start of the run; returns what it printed."""
    widths = f"[{hidden}, {hidden}]"
    settings: dict[str, Any] = {
        "output_dir": run,
        "data.train_manifest": data / "manifest.json",
        "data.eval_manifest": "null",
        "training.epochs": "null",
        "training.steps": steps,
        "training.global_batch_size": BATCH,
        "training.engine": engine,
        # One checkpoint between two records, begun and committed.
        "training.log_every_steps": EVERY_STEPS,
        "checkpoint.every_steps": EVERY_STEPS,
        "checkpoint.async_write": str(is_async).lower(),
        "schedule.learning_rate.shape": "constant",
        "tracking.wandb.mode": "disabled",
        **{f"model.networks.{part}_hidden_dims": widths for part in ("encoder", "decoder", "joint")},
    }
    command = ["bash", str(ROOT / "launch" / "local.sh"), str(processes), "train"]
    command += ["--config", str(ROOT / "configs" / "digits.yaml")]
    for key, value in settings.items():
        command += [f"--{key}", str(value)]
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def show(result: Result) -> None:
    """One line of the table."""
    print(
        f"{result.engine:<7}{'async' if result.is_async else 'sync':<7}{result.state_mb:>7.1f} MB"
        f"{result.written_mb:>7.1f} MB{result.largest_part:>14.2f}{result.step_ms:>6.0f} ms"
        f"{result.stall_ms:>7.0f} ms{result.stall_steps:>10.2f}{result.resume_s:>7.2f} s",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())

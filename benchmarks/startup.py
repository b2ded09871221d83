"""How long it takes from the command to the first step, and where that time goes.

    python benchmarks/startup.py [--repeats 5] [--engines ddp zero2] [--out FILE.json]

Real runs on scikit-learn's digits, started as users start them, with one and with two processes: fresh, and resumed
from a checkpoint. A step counts from the moment when its record is in `metrics.jsonl`; the attempt's own ledger says
how much of that was its start-up (which begins when the process does, after its launcher has started). Medians count;
the first run of each kind only fills the disk's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conditions import machine, versions

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "accelerate", "deepspeed", "jsonargparse")
STEPS = 3


@dataclass
class Result:
    """Medians in seconds."""

    engine: str
    processes: int
    resumed: bool
    first_step_s: float  # from the command
    startup_s: float  # of that, in rank 0, by the ledger
    imports_s: float  # of that, loading torch and our training loop, measured in a process of its own


def main() -> int:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engines", nargs="+", default=["ddp", "zero2"])
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    options = parser.parse_args()
    results = []
    print(f"{'engine':<8}{'processes':>10}{'':<10}{'first step':>12}{'start-up':>10}{'imports':>9}")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "digits"
        command = [sys.executable, "-m", "jmvae_dist", "shards", "write", "digits", "--split", "train"]
        subprocess.run([*command, "--out", str(data)], check=True, cwd=ROOT, capture_output=True)
        imports_s = _median(_import_once, options.repeats)
        for engine in options.engines:
            for processes in (1, 2):
                results += measure(engine, processes, data, imports_s, options.repeats)
    report = {"machine": machine(), "versions": versions(PACKAGES), "results": [asdict(item) for item in results]}
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(engine: str, processes: int, data: Path, imports_s: float, repeats: int) -> list[Result]:
    """Fresh and resumed starts of one kind, in turns."""
    fresh, resumed = [], []
    for _ in range(repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            fresh.append(_start(engine, processes, data, run, STEPS))
            resumed.append(_start(engine, processes, data, run, 2 * STEPS))
    results = []
    for is_resumed, times in ((False, fresh), (True, resumed)):
        first_step_s, startup_s = (statistics.median(column) for column in zip(*times[1:], strict=True))
        results.append(Result(engine, processes, is_resumed, first_step_s, startup_s, imports_s))
        label = "resumed" if is_resumed else "fresh"
        print(
            f"{engine:<8}{processes:>10}  {label:<8}{first_step_s:>10.1f} s{startup_s:>8.1f} s{imports_s:>7.1f} s",
            flush=True,
        )
    return results


def _start(engine: str, processes: int, data: Path, run: Path, steps: int) -> tuple[float, float]:
    """Seconds from the command to its first record, and those that the ledger calls start-up."""
    launcher = [sys.executable, "-m", "jmvae_dist"]
    if processes > 1:
        launcher = ["bash", str(ROOT / "launch" / "local.sh"), str(processes)]
    settings = {
        "config": ROOT / "configs" / "digits.yaml",
        "output_dir": run,
        "data.train_manifest": data / "manifest.json",
        "data.eval_manifest": "null",
        "training.epochs": "null",
        "training.steps": steps,
        "training.log_every_steps": 1,
        "training.engine": engine,
        "tracking.wandb.mode": "disabled",
    }
    command = [*launcher, "train", *(text for key, value in settings.items() for text in (f"--{key}", str(value)))]
    record = run / "metrics.jsonl"
    before = record.read_bytes().count(b"\n") if record.exists() else 0
    start_s = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while not record.exists() or record.read_bytes().count(b"\n") <= before:
        if process.poll() not in (None, 0):
            raise SystemExit(process.communicate()[0].decode())
        time.sleep(0.01)
    first_step_s = time.perf_counter() - start_s
    process.communicate()
    attempts = [json.loads(path.read_text()) for path in (run / "attempts").glob("*.json")]
    newest: dict[str, Any] = max(attempts, key=lambda attempt: attempt["started_s"])
    return first_step_s, newest["seconds"]["startup"]


def _import_once() -> float:
    start_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import jmvae_dist.training.loop"], check=True, cwd=ROOT)
    return time.perf_counter() - start_s


def _median(measure_once: Any, repeats: int) -> float:
    return statistics.median([measure_once() for _ in range(repeats + 1)][1:])


if __name__ == "__main__":
    raise SystemExit(main())

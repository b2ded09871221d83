"""`jmvae-dist bench step` and `training.profile_steps`, as users start them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Run, run_verb

MakeRun = Callable[..., Run]


@pytest.mark.parametrize(
    ("num_processes", "engine"),
    [
        (1, "ddp"),
        (2, "ddp"),
        *(pytest.param(2, f"zero{stage}", marks=pytest.mark.slow) for stage in range(4)),
        pytest.param(1, "zero2", marks=pytest.mark.slow),
    ],
)
def test_bench_step(make_run: MakeRun, tmp_path: Path, num_processes: int, engine: str) -> None:
    run = make_run("never", "--training.steps", "100", "--training.engine", engine)
    out = tmp_path / "bench.json"
    options = ("--steps", "6", "--warmup", "2", "--out", str(out))
    output = run_verb("bench", "step", *run.arguments(*options), num_processes=num_processes)
    assert "what to change first" in output
    assert not run.output_dir.exists()
    report = json.loads(out.read_text())
    assert len(report["ranks"]) == num_processes
    for rank in report["ranks"]:
        parts = {name: part["typical_s"] for name, part in rank["split"]["parts"].items()}
        assert sum(parts.values()) == pytest.approx(rank["split"]["step"]["typical_s"])
        assert min(parts.values()) >= 0
        assert min(parts[name] for name in ("forward", "backward", "judging", "data wait")) > 0
        assert rank["flops"] == rank["product_flops"] > 0
        assert rank["num_samples"] == 64 // num_processes
        assert rank["rss_bytes"] > 50e6
    assert report["samples_per_s"] > 0
    assert ("p90   slowest rank" in output) == (num_processes > 1)
    if engine in ("zero1", "zero2", "zero3") and num_processes > 1:
        assert parts["gradient reduction"] > 0
        assert parts["weight gathering"] > 0


def test_profiling_changes_no_number(make_run: MakeRun) -> None:
    settings = ("--training.steps", "5", "--training.log_every_steps", "1", "--checkpoint.every_steps", "5")
    plain, profiled = make_run("plain", *settings), make_run("profiled", *settings)
    processes = [plain.start(), profiled.start(1, "--training.profile_steps", "[2, 3]")]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    path = profiled.output_dir / "profiles" / "steps-00000002-00000003-rank0.json.gz"
    assert str(path) in outputs[1]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::addmm" for event in events) > 0
    assert plain.records() == profiled.records()
    assert not (plain.output_dir / "profiles").exists()

"""Sudden death and requests to stop: whatever happens, the same command ends with the same weights."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

import jmvae_dist
from jmvae_dist.checkpoint.layout import find_damage, list_checkpoints, read_manifest
from jmvae_dist.commands.checkpoint import main as checkpoint_command
from jmvae_dist.commands.shards import main as shards_command
from jmvae_dist.tracking.jsonl import EVALUATED_BY, EVERY_RECORD, MetricsLog
from jmvae_dist.tracking.ledger import read_attempts, summarize
from tests.conftest import Run, assert_same_tensors
from tests.faults.patched import train

MakeRun = Callable[..., Run]
STEPS = 300
# Frequent checkpoints, so that kills fall into the middle of some.
SETTINGS = (
    *("--training.steps", str(STEPS), "--training.log_every_steps", "7"),
    *("--checkpoint.every_steps", "9", "--checkpoint.keep_every_steps", "100"),
)
KILLED_AT = """
record = Recorder.record
Recorder.record = lambda recorder, values: (
    record(recorder, values), values["global_step"] == {step} and os.kill(os.getpid(), signal.SIGKILL)
)
"""


def last_step(run: Run) -> int:
    """The last global step on record; 0 before the first."""
    path = run.output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((int(line.split('"global_step":')[1].split(",")[0]) for line in lines if "}" in line), default=0)


def kill_all_at(run: Run, num_processes: int, step: int, delay_s: float) -> None:
    """Start the run and SIGKILL every process of it `delay_s` after it has recorded `step`."""
    process = run.start(num_processes)
    try:
        deadline = time.monotonic() + 120
        while last_step(run) < step:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the run makes no progress"
            time.sleep(0.002)
        time.sleep(delay_s)
    finally:
        kill_everything(run)
        process.communicate()


def processes_of(run: Run) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if str(run.output_dir) in " ".join(process.info["cmdline"] or [])
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


def kill_everything(run: Run) -> None:
    """SIGKILL every process of a run: launcher, ranks (which torchrun puts into sessions of their own), workers."""
    while found := processes_of(run):
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.02)


@pytest.mark.parametrize("num_processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_kill_at_random_moments(make_run: MakeRun, num_processes: int) -> None:
    """Two kills at moments drawn anew in every test run; the seed is printed on failure."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    straight, killed = make_run("straight", *SETTINGS), make_run("killed", *SETTINGS)
    straight.train(num_processes)
    for step in sorted(generator.sample(range(1, STEPS - 30), 2)):
        kill_all_at(killed, num_processes, step, delay_s=generator.uniform(0, 0.05))
    reached = max(last_step(killed), *(attempt.highest_step for attempt in read_attempts(killed.output_dir)), 0)
    output = killed.train(num_processes)
    assert_same_tensors(straight.tensors(STEPS), killed.tensors(STEPS))
    assert killed.records() == straight.records()
    assert_lost_steps_are_in_the_ledger(killed, reached, output)


def assert_lost_steps_are_in_the_ledger(run: Run, reached: int, output: str) -> None:
    """The last attempt took the steps again that were not in its checkpoint; those before it died."""
    *former, last = summarize(read_attempts(run.output_dir, pytest.fail)).attempts
    resumed = re.search(r"resumed from the checkpoint at step (\d+) of", output)
    resumed_from = int(resumed[1]) if resumed else None
    assert (last.outcome, last.attempt.resumed_from) == ("complete", resumed_from)
    assert last.attempt.recomputed_steps == reached - (resumed_from or 0)
    assert last.attempt.steps == STEPS - (resumed_from or 0)
    assert former
    # With two processes, the one that is killed first makes the other fail.
    ends = ("died",) if last.attempt.world_size == 1 else ("died", "failed")
    assert all(item.outcome.startswith(ends) for item in former)


def test_a_resume_within_steps_that_are_read_together_is_exact(tmp_path: Path) -> None:
    """22 steps of 45 samples are read together, from wherever reading begins: their rows lie elsewhere in memory.

    Samples of 7 and 15 numbers put them at any multiple of 4 bytes, where a vector instruction could begin elsewhere.
    """
    values = np.random.Generator(np.random.Philox(3)).random((300, 22), np.float32)
    np.savez(tmp_path / "odd.npz", x=values[:, :7], y=values[:, 7:])
    source = ("npz", "--file", str(tmp_path / "odd.npz"), "--split", "train", "--file-is-split", "--workers", "1")
    source += ("--samples-per-shard", "300")  # their place in memory is that in one tar
    assert shards_command(["write", *source, "--out", str(tmp_path / "odd" / "train")]) == 0
    settings = [
        *("--training.steps", "60", "--training.global_batch_size", "45", "--training.log_every_steps", "1"),
        *("--model.decoders_dist", "{x: normal, y: laplace}", "--model.decoder_dist_params", "{}"),
        *("--checkpoint.every_steps", "10"),
    ]
    straight, killed = (Run(tmp_path / name, tmp_path / "odd", settings) for name in ("straight", "killed"))
    straight.train(1)
    train(killed, KILLED_AT.format(step=33), expect=-signal.SIGKILL)
    assert re.search(r"resumed from the checkpoint at step [123]0 of 60", killed.train(1))
    assert_same_tensors(straight.tensors(60), killed.tensors(60))
    assert killed.records() == straight.records()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_thirty_kills(make_run: MakeRun, engine: str) -> None:
    """One process of the run, or all, at any moment: also while it starts, and in the middle of checkpoints."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    settings = (*SETTINGS, "--training.engine", engine)
    straight, killed = make_run("straight", *settings), make_run("killed", *settings)
    straight.train(2)
    for step in sorted(generator.choices(range(STEPS - 10), k=30)):
        kill_one_at(killed, step, generator)
        for checkpoint in list_checkpoints(killed.output_dir / "checkpoints"):
            if find_damage(checkpoint, read_manifest(checkpoint)) is None:
                jmvae_dist.load_model(checkpoint)
    killed.train(2)
    assert_same_tensors(straight.tensors(STEPS), killed.tensors(STEPS))
    assert killed.records() == straight.records()


def kill_one_at(run: Run, step: int, generator: random.Random) -> None:
    """SIGKILL one process of the run, or all of them, at about a step; wait until the rest has ended too."""
    process = run.start(2)
    deadline_s = time.monotonic() + 120
    while last_step(run) < step and process.poll() is None:
        assert time.monotonic() < deadline_s, "the run makes no progress"
        time.sleep(0.002)
    time.sleep(generator.choice((0, 0.05, 3)) * generator.random())
    processes = list(processes_of(run))
    if processes and generator.random() < 0.7:
        with contextlib.suppress(psutil.NoSuchProcess):
            generator.choice(processes).kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=300)
    kill_everything(run)
    process.communicate()


# Not SIGINT with 2 processes: the launcher's background job ignores it unless it comes from a terminal.
@pytest.mark.parametrize(
    ("num_processes", "number"),
    [
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGUSR1, marks=pytest.mark.slow),
        (1, signal.SIGINT),
        (2, signal.SIGTERM),
        pytest.param(2, signal.SIGUSR1, marks=pytest.mark.slow),  # tests/slurm has it with four
    ],
)
def test_stop_signal_writes_a_checkpoint(make_run: MakeRun, num_processes: int, number: signal.Signals) -> None:
    settings = ("--training.steps", "2000", "--training.log_every_steps", "10")
    run = make_run("run", *settings)
    process = run.start(num_processes)
    while last_step(run) < 10:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    assert "stopped on request after step" in output
    steps = [path.name for path in (run.output_dir / "checkpoints").glob("step-*")]
    assert len(steps) == 1
    assert f"resumed from the checkpoint at step {int(steps[0][5:])} of" in resume_briefly(run, num_processes)


def resume_briefly(run: Run, num_processes: int) -> str:
    """Resume, and stop again once it has said from where."""
    process = run.start(num_processes)
    assert process.stdout is not None
    output = ""
    while "resumed from" not in output and process.poll() is None:
        output += process.stdout.readline()
    kill_everything(run)
    process.communicate()
    return output


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped bit in the weights": lambda path: flip_bit(path / "rank-00000.safetensors", -100),
    "flipped bit in a header": lambda path: flip_bit(path / "rank-00001.safetensors", 20),
    "flipped bit in the manifest": lambda path: flip_bit(path / "manifest.json", -300),
    "truncated file": lambda path: truncate(path / "rank-00001.safetensors"),
    "truncated manifest": lambda path: truncate(path / "manifest.json"),
    "missing file": lambda path: (path / "rank-00000.safetensors").unlink(),
    "empty manifest": lambda path: (path / "manifest.json").write_text(""),
    "missing manifest": lambda path: (path / "manifest.json").unlink(),
}
# Each way in which a checkpoint is judged; tests/unit/checkpoint has all the kinds without a run.
IN_CI = ("flipped bit in the weights", "truncated manifest", "missing manifest")


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Run:
    """A complete run with two checkpoints."""
    settings = ["--training.steps", "20", "--checkpoint.every_steps", "10", "--training.log_every_steps", "1"]
    run = Run(tmp_path_factory.mktemp("undamaged") / "run", digits, settings)
    run.train(2)
    return run


@pytest.mark.parametrize(
    "name",
    [name if name in IN_CI else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES],
)
def test_damaged_checkpoints_are_passed_over(
    undamaged: Run, make_run: MakeRun, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Whatever is wrong with the newest checkpoint: it is said loudly, and the one before is used."""
    run = make_run("damaged", *undamaged.overrides)
    shutil.copytree(undamaged.output_dir, run.output_dir)
    DAMAGES[name](run.checkpoint(20))
    assert checkpoint_command(["verify", str(run.output_dir)]) == 1
    assert "1 of 2 checkpoints are intact" in capsys.readouterr().out
    output = run.train(1)
    said = "without its manifest" if name == "missing manifest" else "DAMAGED CHECKPOINT"
    assert said in output
    assert "resumed from the checkpoint at step 10" in output
    assert_same_checkpoint_metrics(undamaged, run)


def assert_same_checkpoint_metrics(original: Run, run: Run) -> None:
    """The record continues after step 10 without a gap or a duplicate."""
    steps = [record["global_step"] for record in run.records()]
    assert steps == [record["global_step"] for record in original.records()] == list(range(1, 21))


def test_no_intact_checkpoint_is_an_error(make_run: MakeRun) -> None:
    run = make_run("run", "--training.steps", "10")
    run.train(1)
    truncate(run.checkpoint(10) / "rank-00000.safetensors")
    output = run.train(2, expect=1)
    assert "none of the 1 checkpoints is intact" in output


@pytest.mark.parametrize("num_processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_stop_signal_during_the_final_evaluation(make_run: MakeRun, digits: Path, num_processes: int) -> None:
    run = make_run("run", "--training.steps", "5", "--training.log_every_steps", "1")
    manifest = ("--data.eval_manifest", str(digits / "test" / "manifest.json"), "--evaluation.batch_size", "8")
    process = run.start(num_processes, *manifest, "--evaluation.joint_nll_samples", "30000")
    while not run.checkpoint(5).exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    assert not (run.output_dir / "evaluation.json").exists()
    with MetricsLog(run.output_dir / "metrics.jsonl", EVERY_RECORD) as log:  # as `jmvae-dist evaluate` does
        log.write({"global_step": 5, EVALUATED_BY: "evaluate", "eval/joint_nll": 1.0, "eval/joint_nll_samples": 10})
    run.train(num_processes, *manifest, "--evaluation.joint_nll_samples", "2")
    evaluation = json.loads((run.output_dir / "evaluation.json").read_text())
    assert evaluation["metrics"]["eval/joint_nll_samples"] == 2
    assert [record["global_step"] for record in run.records()] == [1, 2, 3, 4, 5, 5, 5]
    ledger = summarize(read_attempts(run.output_dir, pytest.fail))
    assert [item.outcome for item in ledger.attempts] == ["stopped", "complete"]
    assert [item.attempt.steps for item in ledger.attempts] == [5, 0]
    first, second = (item.attempt for item in ledger.attempts)
    assert ledger.wall_s == pytest.approx(second.updated_s - first.started_s, abs=0.05)

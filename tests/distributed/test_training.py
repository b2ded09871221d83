"""Real training runs: topologies see the same batches and noise, and resuming changes nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Run, assert_losses_agree, assert_same_tensors, run_verb

MakeRun = Callable[..., Run]
# ReLU's kink can turn a difference in the last bit into a visible one; GELU has no kink.
SMOOTH = ("--model.networks.activation", "gelu")
FIFTY_STEPS = (*SMOOTH, "--training.steps", "50", "--training.log_every_steps", "1")


def test_topologies_and_micro_batches_agree(make_run: MakeRun) -> None:
    """1 process; 3, with unequal shares of lanes; and 2 with uneven micro-batches."""
    settings = (*FIFTY_STEPS, "--data.lanes", "32")
    single = make_run("single", *settings)
    single.train(1)
    for name, num_processes, more in (
        ("three", 3, ()),
        ("accumulating", 2, ("--training.micro_batch_size", "7")),
    ):
        other = make_run(name, *settings, *more)
        other.train(num_processes)
        assert_losses_agree(single, other, tolerance=1e-5, num_records=50)


@pytest.mark.parametrize("num_processes", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_resume_is_exact(make_run: MakeRun, num_processes: int) -> None:
    """N steps straight equal k + (N - k) steps, bit for bit: weights, moments, metrics."""
    settings = ("--training.steps", "40", "--training.log_every_steps", "3", "--checkpoint.every_steps", "17")
    straight, resumed = make_run("straight", *settings), make_run("resumed", *settings)
    straight.train(num_processes)
    # A copy, taken back to its first checkpoint, with the records of the later steps still in place.
    shutil.copytree(straight.output_dir, resumed.output_dir)
    for global_step in (34, 40):
        subprocess.run(["rm", "-r", resumed.checkpoint(global_step)], check=True)
    output = resumed.train(num_processes)
    assert "resumed from the checkpoint at step 17 of 40" in output
    assert_same_tensors(straight.tensors(40), resumed.tensors(40))
    assert resumed.records() == straight.records()


def test_one_process_resumes_what_two_wrote(make_run: MakeRun) -> None:
    """Order and noise stay the same; only the order of summation over ranks differs."""
    settings = (*SMOOTH, "--training.steps", "50", "--training.log_every_steps", "1")
    checkpoints = ("--checkpoint.every_steps", "20")
    straight, moved = make_run("straight", *settings, *checkpoints), make_run("moved", *settings, *checkpoints)
    straight.train(2)
    shutil.copytree(straight.output_dir, moved.output_dir)
    for global_step in (40, 50):
        subprocess.run(["rm", "-r", moved.checkpoint(global_step)], check=True)
    assert "resumed from the checkpoint at step 20" in moved.train(1)
    assert_losses_agree(straight, moved, tolerance=1e-5, num_records=50)


PRINTS_A_TINY_PRODUCT = """
import torch
from jmvae_dist.training.step import TrainStep

take_step = TrainStep.__call__

def step(*arguments, **options):
    print("a tiny product:", float(torch.tensor(1e-40) * 1.0), flush=True)
    return take_step(*arguments, **options)

TrainStep.__call__ = step
"""


def test_what_is_too_small_for_a_normal_number_is_zero_in_steps(make_run: MakeRun) -> None:
    """Moments of weights without a gradient would make steps of a CPU slower and slower."""
    run = make_run("run", "--training.steps", "2")
    assert run_verb("train", *run.arguments(), patch=PRINTS_A_TINY_PRODUCT).count("a tiny product: 0.0") == 2


def test_workers_change_nothing(make_run: MakeRun) -> None:
    settings = ("--training.steps", "30", "--training.log_every_steps", "1")
    without, with_workers = make_run("without", *settings), make_run("with", *settings, "--data.workers", "2")
    without.train(1)
    with_workers.train(1)
    assert without.records() == with_workers.records()
    assert_same_tensors(without.tensors(30), with_workers.tensors(30))


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 1e-3), pytest.param("fp16", 1e-4, marks=pytest.mark.slow)])
def test_16_bit_stays_close_to_float32(make_run: MakeRun, precision: str, bound: float) -> None:
    settings = ("--training.steps", "100", "--training.log_every_steps", "1", "--model.networks.activation", "gelu")
    full = make_run("fp32", *settings)
    full.train(1)
    half = make_run(precision, *settings, "--training.precision", precision)
    half.train(2)
    pairs = zip(full.records(), half.records(), strict=True)
    drifts = [abs(other["loss/total"] / one["loss/total"] - 1) for one, other in pairs]
    assert 1e-7 < max(drifts) < bound  # equal losses would mean that autocast is not active
    assert {str(tensor.dtype) for tensor in half.tensors(100).values()} == {"torch.float32"}


@pytest.mark.slow
def test_bf16_evaluates_in_float32(make_run: MakeRun, digits: Path, tmp_path: Path) -> None:
    """The evaluation of a bf16 run and the `evaluate` command are the same computation."""
    manifest = str(digits / "test" / "manifest.json")
    run = make_run("run", "--training.steps", "20", "--training.precision", "bf16")
    run.train(1, "--data.eval_manifest", manifest, "--evaluation.joint_nll_samples", "0")
    out = tmp_path / "result.json"
    options = ("--manifest", manifest, "--metrics", "elbo,accuracy", "--out", str(out))
    run_verb("evaluate", str(run.output_dir), *options)
    during = json.loads((run.output_dir / "evaluation.json").read_text())["metrics"]
    assert during == pytest.approx(json.loads(out.read_text())["metrics"], rel=1e-6)


def modification_times(run: Run) -> dict[Path, int]:
    """Of every file that says something about the run; not the lock and heartbeats of whoever looks into it.

    Nor of the directory in which it said that it may be an attempt, until it found that there is nothing to do.
    """
    files = [path for path in run.output_dir.rglob("*") if path.name not in (".lock", "attempts")]
    return {path: path.stat().st_mtime_ns for path in files if "heartbeats" not in path.parts}


def test_complete_run_says_so(make_run: MakeRun) -> None:
    run = make_run("run", "--training.steps", "5")
    run.train(2)
    before = modification_times(run)
    assert "is complete" in run.train(2)
    after = modification_times(run)
    assert before == after


def test_changed_order_is_refused_then_accepted(make_run: MakeRun) -> None:
    run = make_run("run", "--checkpoint.every_steps", "10")
    run.train(1, "--training.steps", "10")
    output = run.train(1, "--training.steps", "20", "--training.seed", "1", expect=2)
    assert "training.seed was 0, is now 1" in output
    accepted = run.train(*(1, "--training.steps", "20", "--training.seed", "1", "--data.allow_order_change", "true"))
    assert "accepted by data.allow_order_change" in accepted


def test_second_run_in_the_same_directory_is_refused(make_run: MakeRun) -> None:
    run = make_run("run", "--training.steps", "100000")
    first = run.start(1)
    try:
        assert first.stdout is not None
        while "step " not in first.stdout.readline():
            assert first.poll() is None
        assert "is training in it" in run.train(1, expect=1)
    finally:
        first.kill()
        first.communicate()


@pytest.mark.parametrize(
    ("engine", "num_processes"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in (("ddp", 1), ("ddp", 2), ("zero2", 2))],
)
def test_a_compiled_model_trains_alike_and_resumes_exactly(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, num_processes: int
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    settings = (*SMOOTH, "--training.steps", "12", "--training.log_every_steps", "1", "--checkpoint.every_steps", "5")
    small = ("--model.networks.encoder_hidden_dims", "[16]", "--model.networks.decoder_hidden_dims", "[16]")
    settings = (*settings, *small, "--model.networks.joint_hidden_dims", "[16]", "--training.engine", engine)
    # A shorter time than compiling takes: it is not mistaken for a step that hangs.
    compiled = ("--training.compile", "model", "--training.watchdog.step_timeout_s", "10")
    eager, straight = make_run("eager", *settings), make_run("straight", *settings, *compiled)
    eager.train(num_processes)
    straight.train(num_processes)
    assert_losses_agree(eager, straight, tolerance=1e-5, num_records=12)
    assert eager.records() != straight.records()  # equal bits would mean that nothing was compiled
    resumed = make_run("resumed", *settings, *compiled)
    shutil.copytree(straight.output_dir, resumed.output_dir)
    for global_step in (10, 12):
        shutil.rmtree(resumed.checkpoint(global_step))
    assert "resumed from the checkpoint at step 5 of 12" in resumed.train(num_processes)
    assert_same_tensors(straight.tensors(12), resumed.tensors(12))
    assert straight.records() == resumed.records()

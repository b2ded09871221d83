"""Failures that are not kills: on one rank, in the data, on the disk. All ranks end, with what can be saved."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jmvae_dist.checkpoint.layout import list_checkpoints, read_manifest
from tests.conftest import Run
from tests.faults.test_kill import flip_bit

MakeRun = Callable[..., Run]


def test_checkpoints_by_time_are_written_once_each(make_run: MakeRun) -> None:
    every_s = 0.2
    cadence = ("--checkpoint.every_s", str(every_s), "--checkpoint.every_steps", "null")
    run = make_run("run", "--training.steps", "400", "--checkpoint.keep_last", "500", *cadence)
    run.train(2)
    elapsed_s = [read_manifest(path).elapsed_s for path in list_checkpoints(run.output_dir / "checkpoints")]
    assert len(elapsed_s) >= 3
    # All but the one of the last step are due to the clock; the same request must not be answered twice.
    assert all(later - earlier >= every_s for earlier, later in itertools.pairwise(elapsed_s[:-1])), elapsed_s


def test_retention_after_a_fallback_keeps_what_is_intact(make_run: MakeRun) -> None:
    settings = ("--training.steps", "40", "--checkpoint.every_steps", "10", "--checkpoint.keep_last", "2")
    run = make_run("run", *settings, "--checkpoint.keep_every_steps", "10")
    run.train(1)
    for global_step in (20, 30, 40):
        flip_bit(run.checkpoint(global_step) / "rank-00000.safetensors", -100)
    output = run.train(1, "--training.steps", "11", "--checkpoint.keep_every_steps", "null")
    assert "resumed from the checkpoint at step 10" in output
    names = sorted(path.name for path in (run.output_dir / "checkpoints").iterdir())
    damaged = [f"damaged-step-000000{global_step}" for global_step in (20, 30, 40)]
    assert names == ["LATEST", *damaged, "step-00000010", "step-00000011"]


@pytest.fixture
def damaged_digits(digits: Path, tmp_path: Path) -> Path:
    """Digits whose last training shard has a flipped bit in an image; small windows and few lanes reach it late."""
    folder = tmp_path / "digits"
    shutil.copytree(digits, folder)
    flip_bit(sorted((folder / "train").glob("*.tar"))[-1], 4700)
    return folder


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_bad_shard_ends_all_ranks_with_a_checkpoint(
    tmp_path: Path, damaged_digits: Path, num_processes: int
) -> None:
    # 2 lanes read the shards one after another, so that most steps come before the bad one.
    order = ("--data.lanes", "2", "--data.shuffle_window", "64")
    run = Run(
        tmp_path / "run", damaged_digits, ["--training.steps", "100", "--training.log_every_steps", "1", *order]
    )
    output = run.train(num_processes, expect=1)
    assert "sample 2 (key 'digits-train-" in output
    assert "its bytes are not those that the shard's sums were made of" in output
    assert "Traceback" not in output
    last = run.records()[-1]["global_step"]
    assert last >= 1
    assert run.checkpoint(last).is_dir()


def test_targets_outside_the_likelihoods_support_are_refused(make_run: MakeRun) -> None:
    """Grey values under a Bernoulli likelihood would train without a word and mean nothing."""
    run = make_run("run", "--training.steps", "10", "--model.decoder_dist_params", "null")
    output = run.train(2, expect=1)
    assert "values must be 0 or 1 (for values between them set decoder_dist_params.image.soft_targets" in output
    assert "shard-0000" in output
    assert "Traceback" not in output


def test_a_loss_that_stays_not_finite_is_recorded_and_ends_the_run(make_run: MakeRun) -> None:
    settings = ("--training.steps", "60", "--training.log_every_steps", "1", "--checkpoint.every_steps", "1")
    run = make_run("run", *settings, "--training.gradient_clip_norm", "null")
    guards = ("--training.guards.max_consecutive_skips", "5")
    output = run.train(2, "--schedule.learning_rate.peak", "1e25", *guards, expect=1)
    assert "6 steps in a row were dropped" in output
    assert "not finite" in output
    assert "Traceback" not in output
    record = json.loads((run.output_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert "NaN" in (record["loss/total"], record["grad_norm"]) or "Infinity" in record.values()
    # What reached the checkpoints is finite all the same, and nothing was learned from the dropped steps.
    last = run.tensors(record["global_step"] - 1)
    assert all(bool(tensor.isfinite().all()) for name, tensor in last.items() if name.startswith("weight/"))


def test_a_changed_model_is_refused_and_other_changes_are_named(make_run: MakeRun) -> None:
    run = make_run("run", "--checkpoint.every_steps", "5")
    run.train(1, "--training.steps", "5")
    refused = run.train(1, "--training.steps", "9", "--model.networks.activation", "tanh", expect=2)
    assert "model.networks.activation was relu, is now tanh" in refused
    accepted = run.train(1, "--training.steps", "9", "--model.alpha", "2.5")
    assert "settings changed since the checkpoint" in accepted
    assert "model.alpha 0.5 -> 2.5" in accepted


def test_configuration_errors_pass_through_the_launcher(make_run: MakeRun) -> None:
    """One line and exit code 2, also for what only the running processes can find."""
    run = make_run("run")
    run.train(1, "--training.steps", "5")
    output = run.train(2, "--training.steps", "9", "--training.seed", "1", expect=2)
    assert "training.seed was 0, is now 1" in output
    assert "launch/local.sh: " not in output


def test_a_dead_runs_data_workers_do_not_hold_its_directory(make_run: MakeRun) -> None:
    run = make_run("run", "--training.steps", "100000", "--data.workers", "1")
    first = run.start(1)
    try:
        assert first.stdout is not None
        while "step " not in first.stdout.readline():
            assert first.poll() is None
        first.kill()  # the rank alone: its worker notices a little later
        first.wait()
        assert "is complete" in run.train(1, "--training.steps", "1", "--data.workers", "0")
    finally:
        first.kill()
        first.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that has room for two checkpoints of the digits model, but not for three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs privileges")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk(small_disk: Path, digits: Path) -> None:
    settings = ["--training.steps", "40", "--checkpoint.every_steps", "10", "--checkpoint.keep_last", "9"]
    run = Run(small_disk / "run", digits, settings)
    output = run.train(2, expect=1)
    assert "MB are free; make room, or lower checkpoint.keep_last" in output
    assert "Traceback" not in output
    names = [path.name for path in (run.output_dir / "checkpoints").iterdir()]
    assert not any(name.startswith(".tmp") for name in names)
    assert "step-00000010" in names
    # With room again, the same command goes on from what was committed.
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    assert "resumed from the checkpoint at step" in run.train(2)

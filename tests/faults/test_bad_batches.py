"""Bad batches in real runs: they never reach the weights, on any engine, and are counted."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from jmvae_dist.checkpoint.layout import read_manifest
from jmvae_dist.commands.shards import main as shards
from jmvae_dist.tracking.ledger import read_attempts
from tests.conftest import Run, assert_same_tensors, run_verb

NUM_SAMPLES, BATCH = 640, 64
# Where the sample with the outlier comes in the second epoch: the first time there is nothing to go back to.
SPIKE_STEP = 14
SETTINGS = (
    *("--model.decoders_dist", "{image: normal, label: categorical}", "--model.decoder_dist_params", "null"),
    *("--training.global_batch_size", str(BATCH), "--training.log_every_steps", "1"),
    *("--checkpoint.every_steps", "5", "--checkpoint.keep_last", "9"),
    *("--schedule.learning_rate.shape", "constant"),
)


def write_outlier(folder: Path, value: float) -> Path:
    """Real digits of which one pixel of one sample has gone wrong."""
    digits = load_digits()
    image = (digits.images[:NUM_SAMPLES, None] / 16).astype(np.float32)
    image[123, 0, 3, 4] = value
    np.savez(folder / "digits.npz", image=image, label=digits.target[:NUM_SAMPLES])
    options = ["--class-modalities", "label", "--split", "train", "--file-is-split", "--out", str(folder / "train")]
    options += ["--samples-per-shard", str(NUM_SAMPLES)]  # which decides in which step the outlier comes
    assert shards(["write", "npz", "--file", str(folder / "digits.npz"), *options]) == 0
    return folder


def bad_steps(run: Run) -> list[int]:
    """Steps whose record counts one more skipped step than the record before."""
    skipped = [0, *(record["guards/skipped_steps"] for record in run.records())]
    return [step for step, (before, after) in enumerate(itertools.pairwise(skipped), 1) if after > before]


@pytest.mark.parametrize(
    ("precision", "engines"),
    [
        ("fp32", ("ddp", "zero3")),
        pytest.param("fp32", ("ddp", "zero1", "zero2"), marks=pytest.mark.slow),
        pytest.param("fp16", ("ddp", "zero1", "zero3"), marks=pytest.mark.slow),
    ],
)
def test_a_batch_with_an_overflowing_loss_is_dropped_alike_on_every_engine(
    tmp_path: Path, precision: str, engines: tuple[str, ...]
) -> None:
    data = write_outlier(tmp_path, 1e30)  # finite, but its square is not
    settings = [*SETTINGS, "--training.steps", "25", "--training.precision", precision]
    runs = [Run(tmp_path / engine, data, [*settings, "--training.engine", engine]) for engine in engines]
    for run in runs:
        run.train(2)
    # One step of every epoch of 10 steps has the sample.
    assert len(bad_steps(runs[0])) in (2, 3)
    assert runs[0].records()[bad_steps(runs[0])[0] - 1]["loss/total"] in ("Infinity", "NaN")
    for run in runs[1:]:
        assert bad_steps(run) == bad_steps(runs[0])
        assert_same_tensors(runs[0].tensors(25), run.tensors(25))


@pytest.mark.parametrize(
    ("engine", "num_processes"),
    [("ddp", 1), *(pytest.param(engine, 2, marks=pytest.mark.slow) for engine in ("ddp", "zero3"))],
)
def test_a_spike_rewinds_and_its_batches_are_passed_over(tmp_path: Path, engine: str, num_processes: int) -> None:
    data = write_outlier(tmp_path, 1000.0)
    guards = (
        *("--training.guards.spike_threshold", "20", "--training.guards.spike_window_steps", "4"),
        *("--training.guards.spike_action", "rewind", "--training.guards.rewind_skip_steps", "2"),
    )
    run = Run(tmp_path / "run", data, [*SETTINGS, "--training.steps", "40", *guards, "--training.engine", engine])
    output = run.train(num_processes)
    assert "the loss spiked: back from step" in output
    passed_over = read_manifest(run.checkpoint(40)).passed_over
    assert len(passed_over) >= 1
    for first, stop in passed_over:
        assert stop - first == 3
        assert f"the batches of steps {first + 1} to {stop} are passed over" in output
    (attempt,) = read_attempts(run.output_dir, pytest.fail)
    rewinds = re.findall(r"back from step (\d+) to the checkpoint at step (\d+)", output)
    assert attempt.recomputed_steps == sum(int(since) - int(until) for since, until in rewinds)
    assert attempt.steps == 40 + attempt.recomputed_steps
    # The record has every step once, and a second start of the same run, killed or not, sees the same.
    assert [record["global_step"] for record in run.records()] == list(range(1, 41))
    again = Run(tmp_path / "again", data, run.overrides)
    again.train(num_processes, "--training.steps", "30")
    again.train(num_processes)
    assert read_manifest(again.checkpoint(40)).passed_over == passed_over
    assert_same_tensors(run.tensors(40), again.tensors(40))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_request_for_a_checkpoint_outlives_a_rewind(tmp_path: Path, num_processes: int) -> None:
    """It is found after the last step before the spike, of which no record could begin the checkpoint any more."""
    data = write_outlier(tmp_path, 1000.0)
    guards = (
        *("--training.guards.spike_threshold", "20", "--training.guards.spike_window_steps", "4"),
        *("--training.guards.spike_action", "rewind", "--training.guards.rewind_skip_steps", "2"),
    )
    run = Run(tmp_path / "run", data, [*SETTINGS, "--training.steps", "20", *guards])
    put_request = f"""
from pathlib import Path
from jmvae_dist.training.requests import Requests
poll, number, request = Requests.poll, 0, Path({str(run.output_dir / "CHECKPOINT")!r})
def poll_with_request(requests, **said):
    global number
    number += 1
    if number == {SPIKE_STEP - 1} and requests._collectives.rank == 0:
        request.touch()
        requests._looked_s = float("-inf")
    return poll(requests, **said)
Requests.poll = poll_with_request
"""
    output = run_verb("train", *run.arguments(), num_processes=num_processes, patch=put_request)
    assert f"back from step {SPIKE_STEP} to the checkpoint at step 10" in output
    assert not (run.output_dir / "CHECKPOINT").exists()
    assert [step for step in range(21) if run.checkpoint(step).is_dir()] == [5, 10, 11, 15, 20]


def test_the_checkpoint_to_go_back_to_outlives_the_one_being_written(tmp_path: Path) -> None:
    """When the spike is noticed, two checkpoints are there and a third is being written, which will replace one."""
    data = write_outlier(tmp_path, 1000.0)
    guards = (
        *("--training.guards.spike_threshold", "20", "--training.guards.spike_window_steps", "4"),
        *("--training.guards.spike_action", "rewind", "--training.guards.rewind_skip_steps", "2"),
    )
    every_step = ("--checkpoint.every_steps", "1", "--checkpoint.keep_last", "2")
    run = Run(tmp_path / "run", data, [*SETTINGS, "--training.steps", "12", *guards, *every_step])
    assert "no checkpoint is old enough to go back to" in run.train(1)
    assert run.checkpoint(12).is_dir()


def test_without_an_old_checkpoint_a_spike_is_only_dropped(tmp_path: Path) -> None:
    data = write_outlier(tmp_path, 1000.0)
    guards = (
        *("--training.guards.spike_threshold", "20", "--training.guards.spike_window_steps", "4"),
        *("--training.guards.spike_action", "rewind", "--checkpoint.every_steps", "null"),
    )
    run = Run(tmp_path / "run", data, [*SETTINGS, "--training.steps", "30", *guards])
    output = run.train(1)
    assert "no checkpoint is old enough to go back to" in output
    assert bad_steps(run)

"""The account of an attempt's time, on a clock that the tests turn; what runs leave behind is in tests/faults."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmvae_dist.config import EvaluationSection
from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.distributed.environment import ProcessInfo
from jmvae_dist.distributed.runtime import Runtime
from jmvae_dist.errors import TrainingError
from jmvae_dist.tracking.jsonl import MetricsLog
from jmvae_dist.tracking.ledger import (
    ATTEMPT_CATEGORIES,
    CATEGORIES,
    Attempt,
    attempt_path,
    attempts_directory,
    read_attempts,
    summarize,
    write_attempt,
)
from jmvae_dist.training.goodput import AttemptLedger, PhaseClock, advise_on_evaluation, describe_launch

LAUNCH: dict[str, Any] = {
    "launcher": "single",
    "engine": "ddp",
    "world_size": 1,
    "hosts": ("here",),
    "submitted_s": None,
    "slurm": {},
}


def make_ledger(run_dir: Path, **options: Any) -> AttemptLedger:
    return AttemptLedger(run_dir, LAUNCH, is_main=True, **options)


def take_steps(ledger: AttemptLedger, first: int, last: int) -> None:
    for number in range(first, last + 1):
        ledger.enter("waiting for data", number - 1)
        ledger.enter("step", number - 1)
        time.sleep(0.001)
        ledger.step_taken(number)


@given(
    already_s=st.floats(0, 1e3),
    phases=st.lists(st.tuples(st.sampled_from(ATTEMPT_CATEGORIES), st.floats(0, 1e3))),
)
def test_every_second_is_in_the_category_that_was_entered_last(
    already_s: float, phases: list[tuple[str, float]]
) -> None:
    now_s = 5.0
    clock = PhaseClock("startup", already_s, lambda: now_s)
    expected = {**dict.fromkeys(ATTEMPT_CATEGORIES, 0.0), "startup": already_s}
    for category, lasts_s in phases:
        clock.enter(category)
        now_s += lasts_s / 2
        clock.read()
        now_s += lasts_s / 2
        expected[category] += lasts_s
    assert clock.read() == pytest.approx(expected)
    assert math.fsum(clock.read().values()) == pytest.approx(already_s + now_s - 5.0)


def test_long_evaluations_are_said_with_what_to_set() -> None:
    seconds = {**dict.fromkeys(CATEGORIES, 0.0), "productive": 12.0, "startup": 6.0, "evaluation": 68.0}
    # Nobody's evaluations made it wait in a queue.
    seconds["restart"] = 1e4
    advice = advise_on_evaluation(seconds, EvaluationSection(every_steps=500, figure_samples=7, joint_nll_samples=0))
    assert advice is not None
    assert advice.startswith("evaluations and their figures took 1 min 08 s of 1 min 26 s (79 %)")
    assert "evaluation.every_steps (500; null: only at the end), evaluation.figure_samples (7)" in advice
    assert "joint_nll" not in advice
    at_end = advise_on_evaluation(seconds, EvaluationSection(joint_nll_samples=100))
    assert at_end is not None
    assert "every_steps" not in at_end
    assert "evaluation.joint_nll_samples (100; at the end)" in at_end


def test_short_evaluations_are_not_worth_a_word() -> None:
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    assert advise_on_evaluation(seconds, EvaluationSection()) is None
    assert advise_on_evaluation({**seconds, "productive": 1.0, "evaluation": 20.0}, EvaluationSection()) is None
    assert advise_on_evaluation({**seconds, "productive": 300.0, "evaluation": 100.0}, EvaluationSection()) is None


def test_steps_that_a_former_attempt_had_reached_are_taken_again(tmp_path: Path) -> None:
    """It had reached what its file says, or the record if that is newer."""
    with make_ledger(tmp_path) as first:
        take_steps(first, 1, 6)
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write({"global_step": 8})
    with make_ledger(tmp_path) as second:
        second.resumed(5)
        take_steps(second, 6, 7)
        at_seven = second.metrics()
    (tmp_path / "metrics.jsonl").unlink()
    with make_ledger(tmp_path) as third:
        third.resumed(5)
        take_steps(third, 6, 10)
    attempts = read_attempts(tmp_path, pytest.fail)
    assert [attempt.recomputed_steps for attempt in attempts] == [0, 2, 3]
    assert [attempt.highest_step for attempt in attempts] == [6, 8, 10]
    assert [(attempt.resumed_from, attempt.first_step, attempt.last_step) for attempt in attempts] == [
        (None, 1, 6),
        (5, 6, 7),
        (5, 6, 10),
    ]
    assert at_seven["goodput/recomputed_s"] > 0
    assert at_seven["goodput/productive_s"] == pytest.approx(attempts[0].seconds["productive"], abs=0.001)


def test_steps_after_a_rewind_are_taken_again(tmp_path: Path) -> None:
    with make_ledger(tmp_path) as ledger:
        take_steps(ledger, 1, 8)
        ledger.enter("going back", 8)
        ledger.resumed(4)
        take_steps(ledger, 5, 9)
    (attempt,) = read_attempts(tmp_path, pytest.fail)
    assert (attempt.steps, attempt.recomputed_steps, attempt.last_step, attempt.highest_step) == (13, 4, 9, 9)
    assert attempt.resumed_from is None
    assert attempt.seconds["recomputed"] >= 0.004


def test_metrics_are_sums_over_the_whole_run(tmp_path: Path) -> None:
    seconds = dict.fromkeys(ATTEMPT_CATEGORIES, 10.0)
    now_s = time.time()
    write_attempt(tmp_path, Attempt(1, now_s - 1000, now_s - 930, "stopped", seconds=seconds))
    with make_ledger(tmp_path) as ledger:
        take_steps(ledger, 1, 3)
        metrics = ledger.metrics()
    assert metrics.keys() == {"goodput/fraction", *(f"goodput/{name}_s" for name in CATEGORIES)}
    summary = summarize(read_attempts(tmp_path, pytest.fail))
    assert metrics["goodput/restart_s"] == pytest.approx(summary.seconds["restart"], abs=0.01)
    assert metrics["goodput/evaluation_s"] == 10
    assert metrics["goodput/productive_s"] > 10
    wall_s = sum(value for name, value in metrics.items() if name.endswith("_s"))
    assert metrics["goodput/fraction"] == pytest.approx(metrics["goodput/productive_s"] / wall_s)


def finish_and_fail(ledger: AttemptLedger, error: Exception) -> None:
    ledger.finish("complete")
    raise error


def test_outcomes(tmp_path: Path) -> None:
    with make_ledger(tmp_path) as ledger:
        assert read_attempts(tmp_path)[0].outcome is None
        ledger.finish("complete")
    error = TrainingError("s3://user:secret@host/shard?token=secret is gone\nand more")
    with pytest.raises(TrainingError), make_ledger(tmp_path) as ledger:
        finish_and_fail(ledger, error)
    with make_ledger(tmp_path) as ledger:
        ledger.withdraw()
    outcomes = [attempt.outcome for attempt in read_attempts(tmp_path)]
    assert outcomes == ["complete", "failed: TrainingError: s3://***@host/shard?*** is gone"]


def test_the_file_is_kept_up_to_date_without_steps(tmp_path: Path) -> None:
    """A long evaluation, or a hang, is on record when the process is killed in it."""
    with make_ledger(tmp_path, interval_s=0.01) as ledger:
        ledger.checkpoint_committed(7, 1.25)
        ledger.enter("evaluation", 7)
        deadline_s = time.monotonic() + 30
        while read_attempts(tmp_path)[0].seconds["evaluation"] == 0:
            assert time.monotonic() < deadline_s
        (attempt,) = read_attempts(tmp_path)
    assert attempt.outcome is None
    assert (attempt.checkpoint_step, attempt.checkpoint_save_s) == (7, 1.25)


def test_the_start_up_begins_with_the_process(tmp_path: Path) -> None:
    age_s = time.time() - psutil.Process().create_time()
    with make_ledger(tmp_path) as ledger:
        # psutil's time of boot may be a second off.
        assert ledger.metrics()["goodput/startup_s"] == pytest.approx(age_s, abs=2)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with AttemptLedger(tmp_path, LAUNCH, is_main=False) as ledger:
        take_steps(ledger, 1, 2)
        assert ledger.metrics() == {}
        ledger.finish("stopped")
    assert list(tmp_path.iterdir()) == []


def test_trouble_with_files_is_said_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attempts_directory(tmp_path).write_text("not a directory")
    with make_ledger(tmp_path) as ledger:
        take_steps(ledger, 1, 2)
        ledger.finish("complete")
        assert ledger.metrics()["goodput/fraction"] > 0
    assert [message.split(": ")[0] for message in caplog.messages] == [str(attempt_path(tmp_path, 1))]


def test_a_damaged_file_and_a_torn_write_do_not_stop_the_next_attempt(tmp_path: Path) -> None:
    attempts_directory(tmp_path).mkdir()
    attempt_path(tmp_path, 4).write_text('{"format": 1')
    torn = attempts_directory(tmp_path) / ".attempt-0003.json.77.tmp"
    torn.write_text("{")
    with make_ledger(tmp_path):
        pass
    assert attempt_path(tmp_path, 4).read_text() == '{"format": 1'
    assert [attempt.number for attempt in read_attempts(tmp_path)] == [5]
    assert not torn.exists()


def test_a_clock_that_was_set_back_does_not_unbalance_the_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_ledger(tmp_path) as ledger:
        take_steps(ledger, 1, 2)
        behind_s = time.time() - 3600
        monkeypatch.setattr(time, "time", lambda: behind_s)
        metrics = ledger.metrics()
        assert min(metrics.values()) >= 0
    (attempt,) = read_attempts(tmp_path, pytest.fail)
    assert attempt.wall_s == pytest.approx(attempt.updated_s - attempt.started_s, abs=0.01)


def make_runtime() -> Runtime:
    process = ProcessInfo(rank=0, world_size=1, local_rank=0, launcher="single")
    accelerator: Any = None
    return Runtime(accelerator, process, Collectives(), "ddp", "fp32")


def test_the_launch_is_described_without_secrets() -> None:
    variables = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-4]",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "JMVAE_DIST_SUBMITTED_S": "1700000000",
        "WANDB_API_KEY": "secret",
    }
    described = describe_launch(make_runtime(), variables)
    assert described == {
        "launcher": "single",
        "engine": "ddp",
        "world_size": 1,
        "hosts": (os.uname().nodename,),
        "submitted_s": 1_700_000_000.0,
        "slurm": {"job_id": "7", "restart_count": "0", "node_list": "node[1-2]"},
    }
    assert describe_launch(make_runtime(), {})["slurm"] == {}
    for nonsense in ("yesterday", "nan", "-1", "1e300"):
        assert describe_launch(make_runtime(), {"JMVAE_DIST_SUBMITTED_S": nonsense})["submitted_s"] is None

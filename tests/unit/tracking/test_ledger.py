"""The goodput ledger: every second in one category, whatever the attempts were, and damaged files left out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmvae_dist.tracking.ledger import (
    ATTEMPT_CATEGORIES,
    CATEGORIES,
    Attempt,
    attempt_path,
    next_number,
    read_attempts,
    summarize,
    write_attempt,
)

START_S = 1_700_000_000.0


def make_attempt(number: int, after_s: float, lasts_s: float = 70.0, **values: Any) -> Attempt:
    """An attempt that began `after_s` seconds after the run and spent `lasts_s` in equal parts on everything."""
    seconds = dict.fromkeys(ATTEMPT_CATEGORIES, lasts_s / len(ATTEMPT_CATEGORIES))
    started_s = START_S + after_s
    return Attempt(number, started_s, started_s + lasts_s, seconds=seconds, **values)


def test_gaps_between_attempts_are_restart_time() -> None:
    attempts = [
        make_attempt(1, 0, outcome="stopped", submitted_s=START_S - 30),
        make_attempt(2, 100, recomputed_steps=4, checkpoint_save_s=1.5),
        make_attempt(3, 200, submitted_s=START_S + 180, recomputed_steps=5),
    ]
    summary = summarize(attempts, now_s=START_S + 280)
    assert [item.outcome for item in summary.attempts] == ["stopped", "died", "running"]
    assert [item.restart_s for item in summary.attempts] == [30, 30, 30]
    assert [item.queue_s for item in summary.attempts] == [30, None, 20]
    assert summary.wall_s == pytest.approx(300)
    assert summary.seconds == pytest.approx({**dict.fromkeys(CATEGORIES, 30.0), "restart": 90.0})
    assert summary.goodput == pytest.approx(0.1)
    assert summary.recomputed_steps == 9
    assert summary.checkpoint_save_s == 1.5


def test_the_last_attempt_is_dead_when_it_has_been_silent_for_a_minute() -> None:
    attempts = [make_attempt(1, 0)]
    assert summarize(attempts, now_s=START_S + 70 + 59).attempts[0].outcome == "running"
    assert summarize(attempts, now_s=START_S + 70 + 61).attempts[0].outcome == "died"


def test_nobody_waited_for_a_complete_run_that_is_extended_later() -> None:
    attempts = [make_attempt(1, 0, outcome="complete"), make_attempt(2, 9000, submitted_s=START_S + 8990)]
    assert summarize(attempts).seconds["restart"] == 10


def test_a_run_without_attempts() -> None:
    summary = summarize([])
    assert (summary.wall_s, summary.goodput, summary.attempts) == (0, 0, ())
    assert summary.checkpoint_save_s is None


durations = st.floats(0, 1e6)
outcomes = st.sampled_from([None, "complete", "stopped", "failed: x"])


@given(st.lists(st.tuples(durations, durations, outcomes.filter(lambda outcome: outcome != "complete"))))
def test_categories_add_up_to_the_wall_time(attempts: list[tuple[float, float, str | None]]) -> None:
    made, end_s = [], 0.0
    for number, (gap_s, lasts_s, outcome) in enumerate(attempts, start=1):
        made.append(make_attempt(number, end_s + gap_s, lasts_s, outcome=outcome))
        end_s += gap_s + lasts_s
    wall_s = made[-1].updated_s - made[0].started_s if made else 0.0
    assert summarize(made).wall_s == pytest.approx(wall_s, abs=1e-3)


@given(st.lists(st.tuples(durations, durations, st.none() | durations, outcomes)))
def test_no_category_is_negative_whatever_the_clocks_say(
    attempts: list[tuple[float, float, float | None, str | None]],
) -> None:
    """Clocks of hosts differ: attempts may seem to overlap, or to be submitted after they have started."""
    made = []
    for number, (after_s, lasts_s, submitted, outcome) in enumerate(attempts, start=1):
        submitted_s = None if submitted is None else START_S + submitted
        made.append(make_attempt(number, after_s, lasts_s, outcome=outcome, submitted_s=submitted_s))
    summary = summarize(made)
    assert all(value >= 0 for value in summary.seconds.values())
    assert all(0 <= (item.queue_s or 0) <= item.restart_s for item in summary.attempts)
    parts_s = sum(item.attempt.wall_s + item.restart_s for item in summary.attempts)
    assert summary.wall_s == pytest.approx(parts_s, abs=1e-3)


def test_files_say_what_was_written(tmp_path: Path) -> None:
    full = make_attempt(
        2,
        100.25,
        outcome="failed: TrainingError: no",
        launcher="srun",
        engine="zero2",
        world_size=4,
        hosts=("node01", "node02"),
        submitted_s=START_S,
        slurm={"job_id": "7", "restart_count": "1"},
        resumed_from=10,
        first_step=11,
        last_step=20,
        highest_step=30,
        steps=10,
        recomputed_steps=10,
        checkpoint_step=20,
        checkpoint_save_s=0.5,
    )
    attempts = [make_attempt(1, 0), full]
    for attempt in attempts:
        write_attempt(tmp_path, attempt)
    assert read_attempts(tmp_path, pytest.fail) == attempts
    content = json.loads(attempt_path(tmp_path, 2).read_text())
    assert (content["started"], content["submitted"]) == ("2023-11-14T22:15:00+00:00", "2023-11-14T22:13:20+00:00")
    assert "submitted_s" not in json.loads(attempt_path(tmp_path, 1).read_text())
    assert next_number(tmp_path) == 3


def test_files_that_are_damaged_or_not_ours_are_left_out(tmp_path: Path) -> None:
    good = make_attempt(1, 0)
    write_attempt(tmp_path, good)
    values = json.loads(attempt_path(tmp_path, 1).read_text())
    damages: list[Any] = [
        *(b"", b"{", b"[" * 100_000, b"\xff", b"[]", b"{}", json.dumps(values).encode()[:-20]),
        {"format": 2},
        {"number": 1},  # under the name of another
        {"number": -1},
        {"started_s": float("nan")},
        {"started_s": "yesterday"},
        {"updated_s": values["updated_s"] + 3600},
        {"seconds": {**values["seconds"], "productive": -1.0}},
        {"seconds": {**values["seconds"], "productive": 1e400}},
        {"seconds": {"productive": 70.0}},
        {"last_step": 1.5},
        {"last_step": int("1" + 400 * "0")},
        {"outcome": ["complete"]},
        {"hosts": "node01"},
        {"slurm": None},
        {"engine": None},
    ]
    for number, damage in enumerate(damages, start=2):
        path = attempt_path(tmp_path, number)
        changed = {**values, "number": number, **damage} if isinstance(damage, dict) else damage
        path.write_bytes(changed if isinstance(changed, bytes) else json.dumps(changed).encode())
    os.mkfifo(attempt_path(tmp_path, 90))
    (attempt_path(tmp_path, 1).parent / "attempt-latest.json").write_text("{}")
    warnings: list[str] = []
    assert read_attempts(tmp_path, warnings.append) == [good]
    assert [line.split(": ")[0] for line in warnings] == [
        str(attempt_path(tmp_path, number)) for number in (*range(2, 2 + len(damages)), 90)
    ]
    assert next_number(tmp_path) == 91

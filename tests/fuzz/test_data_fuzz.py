"""A fixed part of the fuzzing, which runs with every test run; `python -m tests.fuzz` goes on from there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.__main__ import TARGET_NAMES
from tests.fuzz.planted import BAD_CASE
from tests.fuzz.runner import fuzz

# By target; what takes longer per case gets fewer.
CASES = {
    "decode": 1800,
    "manifest": 1500,
    "index": 400,
    "shard": 400,
    "foreign": 1200,
    "remote": 120,
    "workspace": 40,
    "checkpoint": 600,
}


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_data_are_correct_or_refused(target: str, tmp_path: Path) -> None:
    outcome = fuzz(target, seed=0, cases=CASES[target], keep=tmp_path)
    assert not outcome.failures, "\n\n".join(f"{item.command}\n{item.problem}" for item in outcome.failures)
    assert outcome.cases == CASES[target]
    # Inputs that are all refused at the door would show nothing.
    assert outcome.correct >= 0.03 * outcome.cases
    assert outcome.refused > 0.03 * outcome.cases or target == "workspace"


# What the report of each planted fault says.
PLANTED = {
    "exception": "KeyError: 'surprise'",
    "endless": "CaseTimeout",
    "stuck": "was stuck and had to be killed",
    "memory": "MemoryError",
    "outside": "elsewhere, outside of the case's folder",
    "renamed": "elsewhere, outside of the case's folder",
    "thread": "elsewhere, outside of the case's folder",
    "program": "ViolationError: os.system",
    "code": "ViolationError: code was run",
    "pickle": "ViolationError: pickle.find_class",
    "canary": "the canary was made",
    "escape": "a message that is not printable",
    "flood": "a message of 1000000 characters",
    "crash": "the process ended with -11",
}


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_faults_are_noticed(kind: str, tmp_path: Path) -> None:
    limits = {"case_limit_s": 0.5, "stuck_s": 0.5} if kind in ("endless", "stuck") else {}
    outcome = fuzz(kind, seed=0, cases=5, targets="tests.fuzz.planted", keep=tmp_path, **limits)
    (failure,) = outcome.failures
    assert failure.number == BAD_CASE
    assert PLANTED[kind] in failure.problem
    if kind not in ("stuck", "crash"):  # those end the process
        assert outcome.correct >= 3
        assert outcome.refused >= 1
        assert (tmp_path / f"{kind}-0-{BAD_CASE}" / "PROBLEM.txt").is_file()

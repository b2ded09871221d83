"""`training.profile_steps`: which steps are recorded, where the trace goes, and what happens if it cannot."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.errors import ConfigError, StopRequested
from jmvae_dist.training.profiler import StepProfiler
from tests.unit.training.test_setup import resolve


def make_profiler(folder: Path, steps: tuple[int, int] | None, entered: list[str] | None = None) -> StepProfiler:
    runtime: Any = SimpleNamespace(
        device=torch.device("cpu"),
        process=SimpleNamespace(rank=0),
        collectives=Collectives(),
        wait_for_device=lambda: None,
    )
    return StepProfiler(
        steps, folder, runtime, lambda: cast(list[str], [] if entered is None else entered).append("")
    )


def take_steps(profiler: StepProfiler, first: int, stop: int, then: Exception | None = None) -> None:
    with profiler:
        profiler.advance(first)
        for global_step in range(first, stop):
            torch.ones(3).mul_(global_step)
            profiler.advance(global_step + 1)
        if then is not None:
            raise then


def traces(folder: Path) -> list[str]:
    """Names of all files, also of those that should not be left behind."""
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("first", "stop", "expected"),
    [
        (0, 6, ["steps-00000002-00000004-rank0.json.gz"]),
        (2, 6, ["steps-00000003-00000004-rank0.json.gz"]),  # resumed within the window
        (0, 3, ["steps-00000002-00000003-rank0.json.gz"]),  # stopped within it
        (4, 6, []),  # resumed after it
        (0, 1, []),  # stopped before its first step
    ],
)
def test_the_steps_of_the_window_are_recorded(tmp_path: Path, first: int, stop: int, expected: list[str]) -> None:
    take_steps(make_profiler(tmp_path, (2, 4)), first, stop)
    assert traces(tmp_path) == expected
    for name in expected:
        events = json.loads(gzip.decompress((tmp_path / name).read_bytes()))["traceEvents"]
        multiplications = [event for event in events if event.get("name") == "aten::mul_"]
        assert len(multiplications) == int(name[15:23]) - int(name[6:14]) + 1


def test_nothing_is_done_without_a_window(tmp_path: Path) -> None:
    entered: list[str] = []
    take_steps(make_profiler(tmp_path, None, entered), 0, 6)
    assert traces(tmp_path) == entered == []


def test_a_stop_keeps_the_trace_and_a_failure_drops_it(tmp_path: Path) -> None:
    with pytest.raises(StopRequested):
        take_steps(make_profiler(tmp_path / "stopped", (2, 4)), 0, 3, StopRequested())
    assert traces(tmp_path / "stopped") == ["steps-00000002-00000003-rank0.json.gz"]
    with pytest.raises(ZeroDivisionError):
        take_steps(make_profiler(tmp_path / "failed", (2, 4)), 0, 3, ZeroDivisionError())
    assert traces(tmp_path / "failed") == []


def test_a_trace_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("jmvae_dist"), "propagate", True)
    (tmp_path / "profiles").write_text("in the way")
    entered: list[str] = []
    with caplog.at_level(logging.WARNING):
        take_steps(make_profiler(tmp_path / "profiles", (2, 4), entered), 0, 6)
    assert "training.profile_steps: the trace" in caplog.text
    assert len(entered) == 2  # before it begins and before it ends, neither of which may count as a hang


def test_a_window_beyond_the_run_is_refused(digits: Path) -> None:
    assert resolve(digits, "--training.profile_steps", "[7, 9]").config.training.profile_steps == (7, 9)
    with pytest.raises(ConfigError, match=r"training\.profile_steps: \[7, 69\].*within the 68 steps"):
        resolve(digits, "--training.epochs", "3", "--training.profile_steps", "[7, 69]")

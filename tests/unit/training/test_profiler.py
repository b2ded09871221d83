"""`training.profile_steps`: which steps are recorded, where the trace goes, and what happens if it cannot."""

from __future__ import annotations

import atexit
import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.errors import ConfigError, StopRequested, mark_on_all_ranks
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


@pytest.fixture
def at_exit(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is to be done when the process ends."""
    calls: list[Any] = []
    monkeypatch.setattr(atexit, "register", lambda *call: calls.append(call))
    return calls


def take_steps(profiler: StepProfiler, first: int, stop: int, then: Exception | None = None) -> None:
    with profiler:
        for global_step in range(first, stop):
            profiler.before_step(global_step)
            torch.ones(3).mul_(global_step)
            profiler.after_step(global_step + 1)
            torch.ones(3).mul_(global_step).add_(1)  # an evaluation, after the last step not of the window any more
        profiler.before_step(stop)
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
        first_recorded, last_recorded = int(name[6:14]), int(name[15:23])
        ends_with_step = last_recorded == 4
        assert len(multiplications) == 2 * (last_recorded - first_recorded + 1) - ends_with_step


def test_nothing_is_done_without_a_window(tmp_path: Path) -> None:
    entered: list[str] = []
    take_steps(make_profiler(tmp_path, None, entered), 0, 6)
    assert traces(tmp_path) == entered == []


def test_a_stop_keeps_the_trace_and_a_failure_drops_it(tmp_path: Path) -> None:
    with pytest.raises(StopRequested):
        take_steps(make_profiler(tmp_path / "stopped", (2, 4)), 0, 3, mark_on_all_ranks(StopRequested()))
    assert traces(tmp_path / "stopped") == ["steps-00000002-00000003-rank0.json.gz"]
    with pytest.raises(ZeroDivisionError):
        take_steps(make_profiler(tmp_path / "failed", (2, 4)), 0, 3, mark_on_all_ranks(ZeroDivisionError()))
    assert traces(tmp_path / "failed") == []


def test_a_rank_that_fails_alone_waits_for_nothing(tmp_path: Path, at_exit: list[Any]) -> None:
    """Its device may hang, and it was last seen where it failed; the profiler is stopped when the process ends."""
    entered: list[str] = []
    profiler = make_profiler(tmp_path, (2, 4), entered)
    with pytest.raises(ZeroDivisionError):
        take_steps(profiler, 0, 3, ZeroDivisionError())
    assert len(entered) == 1  # before it began
    ((stop, running),) = at_exit
    assert torch.autograd.profiler._is_profiler_enabled
    stop(running)
    assert not torch.autograd.profiler._is_profiler_enabled
    assert traces(tmp_path) == []


def test_an_error_of_the_device_is_none_of_the_disk(tmp_path: Path, at_exit: list[Any]) -> None:
    profiler = make_profiler(tmp_path, (2, 4))

    def fail() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    profiler._runtime.wait_for_device = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="device-side assert"):
        take_steps(profiler, 0, 6)
    ((stop, running),) = at_exit
    stop(running)
    assert traces(tmp_path) == []


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


def test_an_evaluation_may_follow_the_window_but_not_lie_in_it(digits: Path) -> None:
    def window(first: int, last: int, *more: str) -> tuple[int, int] | None:
        options = ("--training.profile_steps", f"[{first}, {last}]", "--evaluation.every_steps", "10", *more)
        return resolve(digits, *options).config.training.profile_steps

    assert window(11, 20) == (11, 20)
    assert window(20, 20) == (20, 20)
    assert window(9, 12, "--data.eval_manifest", "null") == (9, 12)
    for first, last in ((9, 12), (10, 11)):
        with pytest.raises(ConfigError, match=r"training\.profile_steps.*step 10 \(evaluation\.every_steps: 10\)"):
            window(first, last)


def test_a_window_beyond_the_run_is_refused(digits: Path) -> None:
    assert resolve(digits, "--training.profile_steps", "[7, 9]").config.training.profile_steps == (7, 9)
    with pytest.raises(ConfigError, match=r"training\.profile_steps: \[7, 69\].*within the 68 steps"):
        resolve(digits, "--training.epochs", "3", "--training.profile_steps", "[7, 69]")

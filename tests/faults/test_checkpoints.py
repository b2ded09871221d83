"""Checkpoints while training goes on: asked for, written in the background, failing on one rank."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Run, assert_same_tensors

MakeRun = Callable[..., Run]
DEADLINE_S = 60


@contextmanager
def started(run: Run, num_processes: int) -> Iterator[subprocess.Popen[str]]:
    """A run that is given up at the end of the block; entered when every rank takes steps."""
    process = run.start(num_processes)
    try:
        wait_for(process, lambda: all(global_step(run, rank) > 0 for rank in range(num_processes)))
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE_S)


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def heartbeat(run: Run, rank: int) -> dict:
    path = run.output_dir / "heartbeats" / f"rank-{rank:05d}.json"
    return json.loads(path.read_text()) if path.exists() else {"global_step": 0}


def global_step(run: Run, rank: int) -> int:
    return heartbeat(run, rank)["global_step"]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_checkpoint_on_demand(make_run: MakeRun, num_processes: int) -> None:
    run = make_run("run", "--training.steps", "1000000", "--checkpoint.every_s", "null")
    checkpoints = run.output_dir / "checkpoints"
    with started(run, num_processes) as process:
        for count in (1, 2):
            request = run.output_dir / "CHECKPOINT"
            request.touch()
            wait_for(process, lambda count=count: len(list(checkpoints.glob("step-*"))) == count)
            assert not request.exists()
        step = global_step(run, 0)
        wait_for(process, lambda: global_step(run, 0) > step)


@pytest.mark.parametrize("is_async", ["true", "false"])
def test_a_rank_that_cannot_write_its_part_ends_all(make_run: MakeRun, is_async: str) -> None:
    if shutil.which("prlimit") is None:
        pytest.skip("needs prlimit of util-linux")
    settings = (
        "--training.steps",
        "1000000",
        "--checkpoint.every_steps",
        "200",
        "--checkpoint.async_write",
        is_async,
    )
    run = make_run("run", *settings, "--training.log_every_steps", "100")
    process = run.start(2)
    try:
        wait_for(process, lambda: global_step(run, 1) > 0)
        # From now on rank 1 alone cannot make a file larger than this.
        pid = heartbeat(run, 1)["process"]
        subprocess.run(["prlimit", "--pid", str(pid), f"--fsize={100_000}"], check=True)
        output, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    assert process.returncode == 1, output
    assert "rank 1: " in output
    assert "rank-00001.safetensors: cannot be written" in output
    assert "Traceback" not in output
    assert not list((run.output_dir / "checkpoints").glob(".tmp-*"))


def test_writing_in_the_background_changes_nothing_but_the_stall(make_run: MakeRun) -> None:
    settings = ("--training.steps", "60", "--checkpoint.every_steps", "7", "--checkpoint.keep_last", "20")
    runs = [make_run(mode, *settings, "--checkpoint.async_write", mode) for mode in ("true", "false")]
    for run in runs:
        run.train(2)
        records = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
        assert all(record["checkpoint/stall_s"] > 0 for record in records if record["global_step"] >= 20)
    names = [{path.name for path in (run.output_dir / "checkpoints").glob("step-*")} for run in runs]
    assert names[0] == names[1] == {f"step-{step:08d}" for step in (*range(7, 60, 7), 60)}
    for step in (7, 35, 60):
        assert_same_tensors(runs[0].tensors(step), runs[1].tensors(step))


def test_no_room_is_noticed_before_anything_is_written(make_run: MakeRun, tmp_path: Path) -> None:
    if shutil.which("mount") is None:
        pytest.skip("needs mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs privileges")
    try:
        run = Run(disk / "run", make_run("unused").digits, ["--training.steps", "20"])
        output = run.train(1, expect=1)
        assert "does not fit, only" in output
        assert not list((run.output_dir / "checkpoints").iterdir())
    finally:
        subprocess.run(["umount", "-l", disk], check=True)

"""Worker processes: errors instead of hangs, no processes left over, large arrays not sent around."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_examples import example_source

from jmvae_dist.data.processes import Report, default_workers, run_in_processes
from jmvae_dist.data.writer import write_shards
from jmvae_dist.errors import DataError

TESTS = Path(__file__).parent


class DeadlyContext:
    """Ends the process that unpickles it, and is larger than a pipe's buffer."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,), {"ballast": bytes(2**20)}


def describe(context: dict[str, Any], item: int, report: Report) -> tuple[int, str, int, bool]:
    report(item)
    values = context["values"]
    return item, context["name"], int(values[item]), values.flags.writeable


def never_called(context: Any, item: int, report: Report) -> None:
    raise AssertionError("the process should have died before")


def sleep_and_tell(folder: Path, item: int, report: Report) -> None:
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(300)


def run_and_be_killed(folder: str) -> None:
    """What the process that gets killed does."""
    list(run_in_processes(sleep_and_tell, Path(folder), range(4), 2, folder=Path(folder), advance=lambda count: None))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("workers", [1, 2])
def test_results_progress_and_large_arrays(tmp_path: Path, workers: int) -> None:
    values = np.arange(10**6)
    context = {"values": values, "again": values, "name": "context"}
    counts: list[int] = []
    results = dict(run_in_processes(describe, context, range(5), workers, folder=tmp_path, advance=counts.append))
    in_worker = workers > 1
    assert results == {item: (item, "context", item, not in_worker) for item in range(5)}
    assert sum(counts) == 0 + 1 + 2 + 3 + 4
    assert [path.name for path in tmp_path.iterdir()] == (["array-0.npy"] if in_worker else [])


def test_a_worker_that_dies_at_its_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a worker process died"):
        list(
            run_in_processes(never_called, DeadlyContext(), range(4), 2, folder=tmp_path, advance=lambda count: None)
        )


def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    """Its workers die when they import it, before they read what they are to work with."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "from data_examples import example_source\n"
        "from jmvae_dist.data.writer import write_shards\n"
        "source = example_source(20_000)\n"
        "source.details['larger than the buffer of a pipe'] = 'x' * 2**20\n"
        f"write_shards(source, {str(tmp_path / 'out')!r}, workers=2)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("jmvae_dist.errors.DataError: a worker process died")
    assert "if __name__" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
    code += f"import test_data_processes; test_data_processes.run_and_be_killed({str(tmp_path)!r})"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as parent:
        deadline_s = time.monotonic() + 60
        while len(list(tmp_path.glob("*.pid"))) < 2:
            assert parent.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        parent.send_signal(signal.SIGKILL)
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    try:
        deadline_s = time.monotonic() + 20
        while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert not [pid for pid in pids if is_alive(pid)]
    finally:
        for pid in filter(is_alive, pids):
            os.kill(pid, signal.SIGKILL)


def test_workers_by_samples_and_by_bytes() -> None:
    cpus = len(os.sched_getaffinity(0))
    assert default_workers(100, 2**20) == 1
    assert default_workers(100_000, 2**20) == cpus
    assert default_workers(100, 2**32) == cpus


def test_progress_moves_within_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jmvae_dist.progress._SILENT_S", 0.0)
    monkeypatch.setattr("jmvae_dist.progress._LINE_INTERVAL_S", 0.0)
    write_shards(example_source(30), tmp_path / "shards", samples_per_shard=30)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("writing samples: 1 of 30 in ")
    assert lines[-1].startswith("writing samples: 30 in ")

"""What reaches W&B equals `metrics.jsonl`, whatever is killed, resumed, refused or unreachable."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from offline_reader import read_offline_run
from stub_server import StubServer

from jmvae_dist.config import WandbSection
from jmvae_dist.tracking.jsonl import MetricsLog, read_records
from jmvae_dist.tracking.wandb import WandbTracker

FAULTS = ["500", "hang", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("401", "429", "drop"))]
REPOSITORY = Path(__file__).parents[2]
# A training that logs three steps, says which processes belong to its client, and waits to be killed.
TRAINING_TO_KILL = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_copy import Attempt
attempt = Attempt(Path({run_dir!r}), None, None, init_timeout_s=30.0, finish_timeout_s=40.0)
if {wait_for_client}:
    while not Path({run_dir!r}, "wandb", "state.json").exists():
        time.sleep(0.05)
for step in (10, 20, 30):
    attempt.log(step, loss=float(step))
print(*attempt.client_pids(), flush=True)
time.sleep(600)
"""


class Attempt:
    """One process start of a training run: the record and its copy."""

    def __init__(self, run_dir: Path, run_id: str | None, resume_step: int | None, **settings: Any) -> None:
        self.messages: list[str] = []
        self.metrics = MetricsLog(run_dir / "metrics.jsonl", resume_step)
        self.tracker = WandbTracker(
            WandbSection(**{"init_timeout_s": 8.0, "finish_timeout_s": 20.0, **settings}),
            run_dir=run_dir,
            run_id=run_id,
            config={"data": {"train_manifest": "https://user:pa55word@host/m.json?token=pa55word"}},
            resume_step=resume_step,
            run_name="name-of-run",
            message=self.messages.append,
        )

    def log(self, global_step: int, **values: float) -> None:
        record = {"global_step": global_step} | {f"loss/{name}": value for name, value in values.items()}
        self.metrics.write(record)
        self.tracker.log(record)

    def finish(self) -> str:
        self.tracker.finish({"final": 0.5})
        self.metrics.close()
        return self.tracker.run_id

    def wait_until_online(self) -> None:
        deadline_s = time.monotonic() + 30
        while not any("online at" in message for message in self.messages):
            assert time.monotonic() < deadline_s, self.messages
            time.sleep(0.05)
            self.tracker._watch()

    def client_pids(self) -> list[int]:
        """The client and, once it runs, its service."""
        assert self.tracker._process is not None
        pid = self.tracker._process.pid
        return [pid, *children(pid)]


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in listed.stdout.split()]


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def expected_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The record with the values of one step in one row, as W&B shows them."""
    rows: dict[int, dict[str, Any]] = {}
    for record in read_records(run_dir / "metrics.jsonl"):
        rows.setdefault(record["global_step"], {"_step": record["global_step"]}).update(record)
    return list(rows.values())


def logged(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    ours = ("_step", "global_step")
    return [{key: row[key] for key in row if key in ours or key.startswith(("loss/", "eval/"))} for row in rows]


def run_steps(attempt: Attempt, first: int, last: int, offset: float = 0.0) -> None:
    for step in range(first, last + 1, 10):
        attempt.log(step, total=offset + step)


def test_rows_summary_and_settings(server: StubServer, home: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    attempt = Attempt(run_dir, None, None, group="group", tags=["tag"])
    run_steps(attempt, 10, 100)
    record = {"global_step": 100, "eval/elbo": -3.5}
    attempt.metrics.write(record)
    attempt.tracker.log(record)
    run_id = attempt.finish()

    assert attempt.tracker.mode == "online"
    assert logged(server.rows(run_id)) == expected_rows(run_dir)
    assert len(server.rows(run_id)) == 10
    run = server.run(run_id)
    assert run["summary"]["final"] == 0.5
    assert (run["displayName"], run["groupName"], run["tags"]) == ("name-of-run", "group", ["tag"])
    assert "pa55word" not in str(run["config"])
    assert run["exitcode"] == 0
    assert list(home.iterdir()) == []


def test_no_credential_is_uploaded_or_printed(server: StubServer, tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, None, None)
    run_steps(attempt, 10, 20)
    run = server.run(attempt.finish())
    written = [path.read_bytes() for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    for text in [str(run).encode(), "\n".join(attempt.messages).encode(), *written]:
        assert b"0123456789" * 4 not in text
        assert b"pa55word" not in text


def test_figures(server: StubServer, tmp_path: Path) -> None:
    from matplotlib import image

    picture = tmp_path / "picture.png"
    image.imsave(picture, [[0.0, 1.0], [1.0, 0.0]])
    attempt = Attempt(tmp_path / "run", None, None)
    run_steps(attempt, 10, 20)
    attempt.tracker.log_figures(20, {"samples": picture, "missing": tmp_path / "missing.png"})
    run_steps(attempt, 30, 40)
    run_id = attempt.finish()
    assert logged(server.rows(run_id)) == expected_rows(tmp_path / "run")
    figures = [row["figures/samples"]["_type"] for row in server.rows(run_id) if "figures/samples" in row]
    assert figures == ["image-file"]
    assert any("media/images/figures/samples" in name for name in server.uploads)
    assert any("missing" in message for message in attempt.messages)


def test_resume_replaces_the_rows_after_the_checkpoint(server: StubServer, tmp_path: Path) -> None:
    first = Attempt(tmp_path, None, None)
    run_steps(first, 10, 70)
    run_id = first.finish()
    second = Attempt(tmp_path, run_id, 50)
    run_steps(second, 60, 100, offset=1000)
    assert second.finish() == run_id
    assert len(expected_rows(tmp_path)) == 10
    assert logged(server.rows(run_id)) == expected_rows(tmp_path)
    assert server.run(run_id)["rewinds"] == [40]


def test_resume_at_the_last_row_needs_no_rewinding(server: StubServer, tmp_path: Path) -> None:
    server.can_rewind = False
    first = Attempt(tmp_path, None, None)
    run_steps(first, 10, 50)
    run_id = first.finish()
    second = Attempt(tmp_path, run_id, 55)
    run_steps(second, 60, 100)
    assert second.finish() == run_id
    assert logged(server.rows(run_id)) == expected_rows(tmp_path)


def test_evaluation_of_the_resumed_step_is_not_dropped(server: StubServer, tmp_path: Path) -> None:
    first = Attempt(tmp_path, None, None)
    run_steps(first, 10, 50)
    run_id = first.finish()
    second = Attempt(tmp_path, run_id, 50)
    second.metrics.write({"global_step": 50, "eval/elbo": -2.0})
    run_steps(second, 60, 70)
    second.finish()
    late = [row for row in server.rows(run_id) if "eval/elbo" in row]
    assert [(row["global_step"], row["eval/elbo"]) for row in late] == [(50, -2.0)]
    assert [row["_step"] for row in server.rows(run_id)] == [10, 20, 30, 40, 50, 51, 60, 70]
    # A second resume at that step brings both together.
    third = Attempt(tmp_path, run_id, 50)
    run_steps(third, 60, 80)
    third.finish()
    assert logged(server.rows(run_id)) == expected_rows(tmp_path)


def test_server_that_cannot_rewind_gets_a_complete_new_run(server: StubServer, tmp_path: Path) -> None:
    first = Attempt(tmp_path, None, None)
    run_steps(first, 10, 70)
    run_id = first.finish()
    server.can_rewind = False
    second = Attempt(tmp_path, run_id, 50)
    run_steps(second, 60, 100, offset=1000)
    new_id = second.finish()
    assert new_id != run_id
    assert any(run_id in message and new_id in message for message in second.messages)
    assert logged(server.rows(new_id)) == expected_rows(tmp_path)
    # The checkpoint may hold the old id still: it leads to the new run.
    third = Attempt(tmp_path, run_id, 100)
    run_steps(third, 110, 120)
    assert third.finish() == new_id
    assert logged(server.rows(new_id)) == expected_rows(tmp_path)


def start_and_kill(run_dir: Path, victims: Callable[[int, list[int]], list[int]], wait_for_client: bool) -> None:
    code = TRAINING_TO_KILL.format(
        tests=str(Path(__file__).parent), run_dir=str(run_dir), wait_for_client=wait_for_client
    )
    training = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert training.stdout is not None
    client_pids = [int(pid) for pid in training.stdout.readline().split()]
    for pid in victims(training.pid, client_pids):
        os.kill(pid, signal.SIGKILL)
    training.wait()
    training.stdout.close()
    deadline_s = time.monotonic() + 60
    while any(is_running(pid) for pid in client_pids):
        assert time.monotonic() < deadline_s, "the client outlives its training"
        time.sleep(0.05)


@pytest.mark.parametrize("wait_for_client", [False, True])
def test_killed_training_loses_no_row(server: StubServer, tmp_path: Path, wait_for_client: bool) -> None:
    start_and_kill(tmp_path, lambda training, client: [training], wait_for_client)
    assert len(read_records(tmp_path / "metrics.jsonl")) == 3
    (name,) = server.runs
    assert logged(server.rows(name.split("/")[-1])) == expected_rows(tmp_path)
    assert server.runs[name]["exitcode"] == 1


@pytest.mark.parametrize("wait_for_client", [False, True])
def test_resume_sends_what_a_killed_node_lost(server: StubServer, tmp_path: Path, wait_for_client: bool) -> None:
    start_and_kill(tmp_path, lambda training, client: [*client, training], wait_for_client)
    run_id = next((name.split("/")[-1] for name in server.runs), "abcdefgh")
    second = Attempt(tmp_path, run_id, 20)
    run_steps(second, 30, 60, offset=1000)
    second.finish()
    assert len(expected_rows(tmp_path)) == 6
    assert logged(server.rows(second.tracker.run_id)) == expected_rows(tmp_path)


@pytest.mark.parametrize("fault", FAULTS)
def test_unreachable_server_at_the_start(server: StubServer, tmp_path: Path, fault: str) -> None:
    server.mode = fault
    first = Attempt(tmp_path, None, None, init_timeout_s=1.5)
    run_steps(first, 10, 50)
    run_id = first.finish()
    assert first.tracker.mode == "offline"
    assert any("recording offline" in message for message in first.messages)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert logged(read_offline_run(folder).rows) == expected_rows(tmp_path)
    assert any(f"wandb sync {folder}" in message for message in first.messages)

    server.mode = "ok"
    second = Attempt(tmp_path, run_id, 30)
    run_steps(second, 40, 60, offset=1000)
    assert second.finish() == run_id
    assert logged(server.rows(run_id)) == expected_rows(tmp_path)
    assert any(f"do not upload {folder.name}" in message for message in second.messages)


@pytest.mark.parametrize("fault", FAULTS)
def test_server_that_fails_while_running(server: StubServer, tmp_path: Path, fault: str) -> None:
    first = Attempt(tmp_path, None, None, finish_timeout_s=3.0)
    run_steps(first, 10, 20)
    run_id = first.tracker.run_id
    first.wait_until_online()
    server.mode = fault
    run_steps(first, 30, 50)
    first.finish()
    assert first.tracker._process is None
    server.mode = "ok"
    server.released.set()
    second = Attempt(tmp_path, run_id, 50)
    run_steps(second, 60, 70)
    second.finish()
    assert logged(server.rows(second.tracker.run_id)) == expected_rows(tmp_path)


def test_killed_service_is_started_again(server: StubServer, tmp_path: Path, wait_until: Callable[..., None]) -> None:
    attempt = Attempt(tmp_path, None, None)
    run_steps(attempt, 10, 30)
    attempt.wait_until_online()
    (service,) = attempt.client_pids()[1:]
    os.kill(service, signal.SIGKILL)
    steps = itertools.count(40, 10)

    def restarted() -> bool:
        attempt.log(next(steps), total=1.0)
        time.sleep(0.1)
        return any("starting it again" in message for message in attempt.messages)

    wait_until(restarted)
    run_steps(attempt, 5000, 5020)
    attempt.finish()
    assert logged(server.rows(attempt.tracker.run_id)) == expected_rows(tmp_path)
    assert len([message for message in attempt.messages if "died" in message]) == 1


def test_hanging_service_is_ended(server: StubServer, tmp_path: Path, wait_until: Callable[..., None]) -> None:
    attempt = Attempt(tmp_path, None, None, finish_timeout_s=2.0)
    run_steps(attempt, 10, 30)
    attempt.wait_until_online()
    pids = attempt.client_pids()
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGSTOP)
    run_steps(attempt, 40, 5000)
    attempt.finish()
    wait_until(lambda: not any(is_running(pid) for pid in pids))
    assert len(read_records(tmp_path / "metrics.jsonl")) == 500
    assert attempt.tracker.mode == "disabled"
    assert attempt.messages[-1].startswith("W&B:")


def test_hanging_client_does_not_block_the_training(server: StubServer, tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, None, None, finish_timeout_s=1.0)
    pids = attempt.client_pids()
    os.kill(pids[0], signal.SIGSTOP)
    for step in range(20000):
        attempt.tracker.log_figures(step, {"a" * 200: tmp_path})
    run_steps(attempt, 10, 30)
    attempt.finish()
    assert not any(is_running(pid) for pid in pids)
    assert "finish_timeout_s" in attempt.messages[-1]


def test_signals_of_the_launcher_do_not_end_the_client(server: StubServer, tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, None, None)
    run_steps(attempt, 10, 30)
    attempt.wait_until_online()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        os.kill(attempt.client_pids()[0], number)
    run_steps(attempt, 40, 60)
    attempt.finish()
    assert logged(server.rows(attempt.tracker.run_id)) == expected_rows(tmp_path)
    assert not any("died" in message or "failed" in message for message in attempt.messages)


def test_unusable_directory(server: StubServer, tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("a file where the directory should be")
    attempt = Attempt(tmp_path, None, None)
    run_steps(attempt, 10, 30)
    attempt.finish()
    assert attempt.tracker.mode == "disabled"
    assert len(attempt.messages) == 1
    assert "cannot start" in attempt.messages[0]


def sync(folder: Path) -> None:
    command = [str(Path(sys.executable).with_name("wandb")), "sync", str(folder)]
    # It leaves a log in the working directory.
    subprocess.run(command, check=True, capture_output=True, timeout=60, cwd=folder.parent)


def test_offline_attempts_upload_in_order(
    server: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = tmp_path / "user's $(run)"
    first = Attempt(run_dir, None, None)
    run_steps(first, 10, 70)
    run_id = first.finish()
    second = Attempt(run_dir, run_id, 50)
    run_steps(second, 60, 100, offset=1000)
    assert second.finish() == run_id
    assert server.calls == []
    commands = [shlex.split(line) for line in second.messages[-1].splitlines()[1:]]
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert commands == [["wandb", "sync", str(folder)] for folder in folders]
    assert [len(read_offline_run(folder).rows) for folder in folders] == [7, 6]

    monkeypatch.delenv("WANDB_MODE")
    for folder in folders:
        sync(folder)
        assert list(folder.glob("*.wandb.synced"))
    assert logged(server.rows(run_id)) == expected_rows(run_dir)


def test_offline_resume_without_any_certain_row(
    server: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the client was seen to write: a new run with the whole record."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    start_and_kill(tmp_path, lambda training, client: [*client, training], wait_for_client=True)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    run_id = folder.name.split("-")[-1]
    second = Attempt(tmp_path, run_id, 20)
    run_steps(second, 30, 50, offset=1000)
    new_id = second.finish()
    assert new_id != run_id
    (command,) = second.messages[-1].splitlines()[1:]
    assert logged(read_offline_run(Path(command.split()[-1])).rows) == expected_rows(tmp_path)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_run_that_starts_over_leaves_the_abandoned_attempt_alone(
    server: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = Attempt(tmp_path, None, None)
    run_steps(first, 10, 40)
    old_id = first.finish()
    (abandoned,) = (tmp_path / "wandb").glob("offline-run-*")
    # What the recorder does when there is no checkpoint.
    (tmp_path / "metrics.jsonl").rename(tmp_path / "metrics.old.jsonl")

    monkeypatch.setenv("WANDB_MODE", mode)
    second = Attempt(tmp_path, None, None)
    run_steps(second, 10, 20, offset=1000)
    new_id = second.finish()
    assert new_id != old_id
    # Its rows are in no record of the new run: they may be uploaded as the run of their own that they are.
    assert not any(abandoned.name in message for message in second.messages)
    if mode == "online":
        assert logged(server.rows(new_id)) == expected_rows(tmp_path)
    else:
        (command,) = second.messages[-1].splitlines()[1:]
        assert logged(read_offline_run(Path(shlex.split(command)[-1])).rows) == expected_rows(tmp_path)


@pytest.mark.slow
def test_offline_resume_after_a_killed_node_keeps_the_run(
    server: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    """Rows that the client's state calls safe are in its file, although it was killed."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = Attempt(tmp_path, None, None)
    run_id = first.tracker.run_id
    run_steps(first, 10, 40)
    state = tmp_path / "wandb" / "state.json"
    wait_until(lambda: state.exists() and json.loads(state.read_text())["safe_step"] >= 30)
    for pid in first.client_pids():
        os.kill(pid, signal.SIGKILL)
    first.metrics.close()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [row["_step"] for row in read_offline_run(folder).rows][:3] == [10, 20, 30]

    second = Attempt(tmp_path, run_id, 35)
    run_steps(second, 40, 60, offset=1000)
    assert second.finish() == run_id
    monkeypatch.delenv("WANDB_MODE")
    for folder in sorted((tmp_path / "wandb").glob("offline-run-*")):
        sync(folder)
    assert logged(server.rows(run_id)) == expected_rows(tmp_path)


def test_killed_offline_training_loses_no_row(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_and_kill(tmp_path, lambda training, client: [training], wait_for_client=False)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    run = read_offline_run(folder)
    assert logged(run.rows) == expected_rows(tmp_path)
    assert run.step_metrics["*"] == "global_step"
    assert run.exit_code == 1
    assert list(home.iterdir()) == []

"""Signs of life and their judgement; hangs are real ones, in processes of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jmvae_dist.training.heartbeat import Heartbeat, Heartbeats, PeerWatch
from jmvae_dist.training.watchdog import Watchdog
from tests.conftest import ROOT, launch_environment

DEADLINE_S = 60
PRELUDE = """
import ctypes, os, sys, threading, time
from pathlib import Path
from jmvae_dist.training.watchdog import Watchdog

def watch(rank=0, world_size=1, step_timeout_s=None, peer_timeout_s=None):
    return Watchdog(
        Path(sys.argv[1]), rank=rank, world_size=world_size, attempt="now",
        step_timeout_s=step_timeout_s, peer_timeout_s=peer_timeout_s, interval_s=0.05,
    )
"""
Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts processes that run `PRELUDE` and the code given; none of them outlives the test."""
    processes = []

    def start_process(code: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(code), str(tmp_path)],
            cwd=ROOT,
            env=launch_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start_process
    for process in processes:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[str], expect: int) -> str:
    """Wait for the end of a process; returns what it said on standard error."""
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == expect, errors
    return errors


def read(folder: Path, rank: int = 0) -> dict[str, object]:
    """A rank's heartbeat; empty before the first."""
    path = folder / "heartbeats" / f"rank-{rank:05d}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def wait_for_section(folder: Path, section: str, rank: int = 0) -> None:
    """Wait until a rank's heartbeat says that it is in a section."""
    deadline_s = time.monotonic() + DEADLINE_S
    while read(folder, rank).get("section") != section:
        assert time.monotonic() < deadline_s, read(folder, rank)
        time.sleep(0.01)


def two_ranks(folder: Path) -> tuple[Heartbeats, Heartbeats]:
    return Heartbeats(folder, "now", 0, 2), Heartbeats(folder, "now", 1, 2)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    first, second = two_ranks(tmp_path)
    assert second.read(0) is None
    first.write(7, "step", 1.25)
    first.write(8, "checkpoint", 0.0)
    heartbeat = second.read(0)
    assert heartbeat is not None
    assert (heartbeat.beat, heartbeat.process, heartbeat.where) == (2, os.getpid(), '"checkpoint" of global step 8')
    assert [path.name for path in tmp_path.iterdir()] == ["rank-00000.json"]


def test_files_of_other_attempts_are_ignored(tmp_path: Path) -> None:
    for rank in range(4):
        Heartbeats(tmp_path, "before", rank, 4).write(9, "step", 0.0)
    (tmp_path / "rank-00002.json").write_text("")
    peers = PeerWatch(Heartbeats(tmp_path, "now", 0, 3))
    peers.observe(0.0)
    assert peers.latest == {1: None, 2: None}


def test_silence_is_a_beat_that_does_not_change(tmp_path: Path) -> None:
    first, second = two_ranks(tmp_path)
    peers = PeerWatch(first)
    for elapsed_s in (5.0, 2.0, 3.0):  # before the first beat; what passed before the first reading does not count
        peers.observe(elapsed_s)
    assert peers.silent(5.0) == [1]
    assert "never shown a sign of life" in peers.describe_silent(1)
    second.write(1, "step", 0.0)
    peers.observe(100.0)
    assert peers.silent(1.0) == []
    peers.observe(4.0)
    assert peers.silent(4.0) == [1]
    second.write(1, "step", 4.0)
    peers.observe(4.0)
    assert peers.silent(1.0) == []


def test_a_file_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    first, second = two_ranks(tmp_path)
    peers = PeerWatch(first)
    second.write(1, "step", 0.0)
    peers.observe(0.0)
    peers.observe(9.0)
    path = tmp_path / "rank-00001.json"
    path.rename(tmp_path / "kept")
    path.mkdir()
    peers.observe(9.0)
    assert peers.silent(1.0) == []
    path.rmdir()
    (tmp_path / "kept").rename(path)
    peers.observe(9.0)
    assert peers.silent(1.0) == []


def test_a_finished_rank_is_not_missed(tmp_path: Path) -> None:
    first, _ = two_ranks(tmp_path / "heartbeats")
    options = {"world_size": 2, "attempt": "now", "step_timeout_s": None, "peer_timeout_s": None}
    with Watchdog(tmp_path, rank=1, **options) as watchdog:
        watchdog.enter("step", 12)
    peers = PeerWatch(first)
    peers.observe(0.0)
    peers.observe(100.0)
    assert peers.latest[1] is not None
    assert peers.latest[1].section == "done"
    assert peers.silent(1.0) == []
    assert peers.describe_all(1.0) == "rank 1 done"
    with Watchdog(tmp_path, rank=0, **options) as watchdog:
        assert watchdog.describe_lost_peers(timeout_s=0.5) is None


def test_equal_ranks_are_described_together_and_the_last_come_first(tmp_path: Path) -> None:
    for rank in range(1, 7):
        last_words = "failed with OSError: disk" if rank == 5 else None
        Heartbeats(tmp_path, "now", rank, 7).write(3 if rank == 4 else 4, "step", 2.0, last_words)
    peers = PeerWatch(Heartbeats(tmp_path, "now", 0, 7))
    peers.observe(0.0)
    assert peers.describe_all(1.0) == (
        'rank 4 in "step" of global step 3 for 2 s; ranks 1-3, 6 in "step" of global step 4 for 2 s; '
        'rank 5 last in "step" of global step 4, failed with OSError'
    )


def test_the_state_of_a_process(tmp_path: Path) -> None:
    heartbeats, reader = two_ranks(tmp_path)
    heartbeats.write(0, "step", 0.0)
    own = reader.read(0)
    assert own is not None
    assert own.process_state() == "running"
    assert dataclasses.replace(own, process_start="1").process_state() == "gone"  # its id was given away again
    assert dataclasses.replace(own, process_table="another host").process_state() == "unknown"
    assert dataclasses.replace(own, process_table="").process_state() == "unknown"


def test_stopped_and_dead_processes(tmp_path: Path, start: Start) -> None:
    process = start("with watch(): time.sleep(60)")
    wait_for_section(tmp_path, "starting")
    reader = Heartbeats(tmp_path / "heartbeats", "now", 1, 2)
    heartbeat = reader.read(0)
    assert heartbeat is not None
    for number, state in ((signal.SIGSTOP, "stopped"), (signal.SIGCONT, "running"), (signal.SIGKILL, "gone")):
        process.send_signal(number)
        wait_for_state(heartbeat, state)  # "gone" already as a zombie


def wait_for_state(heartbeat: Heartbeat, state: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while heartbeat.process_state() != state:
        assert time.monotonic() < deadline_s, heartbeat.process_state()
        time.sleep(0.01)


def test_stopping_does_not_wait_for_the_interval(tmp_path: Path) -> None:
    options = {"world_size": 1, "attempt": "now", "step_timeout_s": None, "peer_timeout_s": None}
    started_s = time.monotonic()
    with Watchdog(tmp_path, rank=0, interval_s=3600, **options) as watchdog:
        watchdog.enter("step", 3)
    assert time.monotonic() - started_s < 60
    assert (read(tmp_path)["section"], read(tmp_path)["global_step"]) == ("done", 3)


def test_an_error_leaves_last_words(tmp_path: Path) -> None:
    options = {"attempt": "now", "step_timeout_s": None, "peer_timeout_s": None}
    with contextlib.suppress(MemoryError), Watchdog(tmp_path, rank=1, world_size=2, **options) as watchdog:
        watchdog.enter("step", 5)
        raise MemoryError("out of\nmemory")
    with Watchdog(tmp_path, rank=0, world_size=2, **options) as watchdog:
        lost = watchdog.describe_lost_peers()
    assert lost is not None
    assert 'last in "step" of global step 5, failed with MemoryError: out of memory' in lost


@pytest.mark.parametrize("hang", ["threading.Event().wait()", "ctypes.CDLL(None).pause()"])
def test_a_hang_ends_with_stacks(tmp_path: Path, start: Start, hang: str) -> None:
    """In Python, and in a C function that releases the interpreter's lock as collectives do."""
    process = start(f"""
        def hang_here():
            {hang}

        print("printed before the hang")
        with watch(step_timeout_s=0.04) as watchdog:
            watchdog.enter("step", 12)
            hang_here()
    """)
    output, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1, errors
    assert "printed before the hang" in output
    assert '[rank 0] watchdog: "step" of global step 12 has lasted' in errors
    assert "training.watchdog.step_timeout_s" in errors
    stacks = tmp_path / "logs" / "stacks-rank-00000.txt"
    assert str(stacks) in errors
    assert len(errors.splitlines()) == 2
    text = stacks.read_text()
    assert 'rank 0 in "step" of global step 12' in text.splitlines()[0]
    assert "in hang_here" in text
    assert "ended by its watchdog: " in str(read(tmp_path)["last_words"])


def test_stacks_go_to_standard_error_where_no_file_can_be_written(tmp_path: Path, start: Start) -> None:
    (tmp_path / "logs").write_text("a file where a directory is needed")
    process = start("""
        def hang_here():
            time.sleep(3600)

        with watch(step_timeout_s=0.04) as watchdog:
            watchdog.enter("step", 1)
            hang_here()
    """)
    errors = end(process, expect=1)
    assert "in hang_here" in errors
    assert "stacks of all threads: above, as" in errors


def test_progress_and_sections_without_a_limit_do_not_end_a_run(start: Start) -> None:
    process = start("""
        with watch(step_timeout_s=0.4) as watchdog:
            watchdog.enter("step", 0)
            time.sleep(0.7)  # the first time may take longer
            for step in range(10):
                watchdog.enter("step", step)
                time.sleep(0.06)
            watchdog.enter("evaluation", 15, has_limit=False)
            time.sleep(0.7)
    """)
    end(process, expect=0)


def test_a_suspended_process_is_not_blamed_for_the_time_it_was_suspended(tmp_path: Path, start: Start) -> None:
    process = start("""
        with watch(step_timeout_s=1.5) as watchdog:
            for step in range(2):  # the second time, with the limit itself
                watchdog.enter("step", step)
            sys.stdin.read()
    """)
    wait_for_section(tmp_path, "step")
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.8)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.2)
    end(process, expect=0)


def test_a_slow_rank_says_who_is_behind(tmp_path: Path, start: Start) -> None:
    behind = start("""
        with watch(rank=1, world_size=2) as watchdog:
            watchdog.enter("waiting for data", 3)
            time.sleep(3600)
    """)
    wait_for_section(tmp_path, "waiting for data", rank=1)
    waiting = start("""
        with watch(rank=0, world_size=2, step_timeout_s=0.1, peer_timeout_s=5) as watchdog:
            watchdog.enter("step", 4)
            time.sleep(3600)
    """)
    errors = end(waiting, expect=1)
    assert 'meanwhile rank 1 in "waiting for data" of global step 3' in errors
    assert behind.poll() is None


WAIT_FOR_A_PEER = """
    with watch(rank=0, world_size=2, peer_timeout_s=0.3) as watchdog:
        watchdog.enter("step", 4)
        time.sleep({sleep_s})
"""


def test_a_peer_that_never_comes_is_missed(start: Start) -> None:
    errors = end(start(WAIT_FOR_A_PEER.format(sleep_s=3600)), expect=1)
    assert "rank 1 has never shown a sign of life" in errors
    assert "training.watchdog.peer_timeout_s" in errors


def test_a_peer_that_hangs_with_the_interpreters_lock_is_missed(tmp_path: Path, start: Start) -> None:
    hanging = start("""
        with watch(rank=1, world_size=2) as watchdog:
            watchdog.enter("step", 4)
            time.sleep(0.2)
            ctypes.PyDLL(None).sleep(3600)
    """)
    wait_for_section(tmp_path, "step", rank=1)
    errors = end(start(WAIT_FOR_A_PEER.format(sleep_s=3600)), expect=1)
    assert f"rank 1 (process {hanging.pid} on host " in errors
    assert "it hangs where its watchdog cannot run" in errors


def test_a_silent_peer_does_not_end_a_rank_that_makes_progress(start: Start) -> None:
    process = start("""
        with watch(rank=0, world_size=2, peer_timeout_s=0.5) as watchdog:
            for step in range(6):
                watchdog.enter("step", step)
                time.sleep(0.2)
    """)
    end(process, expect=0)


def test_who_cannot_write_blames_nobody(tmp_path: Path, start: Start) -> None:
    """A file system in trouble silences all ranks, and none of them is at fault."""
    (tmp_path / "heartbeats" / ".rank-00000.json.tmp").mkdir(parents=True)
    errors = end(start(WAIT_FOR_A_PEER.format(sleep_s=1.0)), expect=0)
    assert errors.count("heartbeats cannot be written") == 1

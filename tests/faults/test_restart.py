"""`launch/local.sh --restarts`: what is started again, what is not, and that no rank outlives its launcher."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, Run, assert_same_tensors, launch_environment
from tests.faults.test_kill import kill_everything, last_step
from tests.unit.checkpoint.test_fragments import make_manifest

MakeRun = Callable[..., Run]
FakeTorchrun = Callable[..., subprocess.Popen[str]]
ENDLESS = ("--training.steps", "1000000", "--training.log_every_steps", "5")


@contextlib.contextmanager
def started(run: Run, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The run on 2 processes with options of local.sh itself; nothing of it is left afterwards."""
    command = ["bash", str(ROOT / "launch" / "local.sh"), "2", *options, "train", *run.arguments()]
    process = subprocess.Popen(
        command, cwd=ROOT, env=launch_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        kill_everything(run)
        process.communicate()


def wait_for(condition: Callable[[], object], timeout_s: float = 180) -> None:
    """Look every few milliseconds until `condition` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def ranks(run: Run) -> list[psutil.Process]:
    """The run's ranks, by number."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if str(run.output_dir) in command and "distributed.torchrun" not in command and "local.sh" not in command:
            with contextlib.suppress(psutil.Error, KeyError):
                found[int(process.environ()["RANK"])] = process
    return [found[rank] for rank in sorted(found)]


def test_a_killed_rank_is_recovered_from(make_run: MakeRun) -> None:
    """All ranks end, a new attempt goes on from the last checkpoint, and the result does not show it."""
    settings = ("--training.steps", "150", "--training.log_every_steps", "5", "--checkpoint.every_steps", "20")
    straight, killed = make_run("straight", *settings), make_run("killed", *settings)
    straight.train(2)
    with started(killed, "--restarts", "2") as process:
        wait_for(lambda: last_step(killed) >= 5)
        survivor, victim = ranks(killed)
        wait_for(lambda: last_step(killed) >= 45)
        victim.kill()
        wait_for(lambda: not survivor.is_running(), timeout_s=120)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    restarted = re.findall(r"launch/local.sh: exit code 1; restart 1 of 2 from step (\d+) in 1 s", output)
    assert len(restarted) == 1
    assert int(restarted[0]) >= 40
    assert f"resumed from the checkpoint at step {restarted[0]} of 150" in output
    assert_same_tensors(straight.tensors(150), killed.tensors(150))
    assert killed.records() == straight.records()


def test_a_killed_rank_fails_the_run_without_restarts(make_run: MakeRun) -> None:
    run = make_run("run", *ENDLESS)
    with started(run) as process:
        wait_for(lambda: len(ranks(run)) == 2)
        ranks(run)[0].kill()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 1, output
        assert ranks(run) == []
    assert "Traceback" not in output
    failed, how_to_go_on = output.splitlines()[-2:]
    assert re.match(r"launch/local.sh: rank 0 \(process \d+\) was ended by SIGKILL, by hand or, ", failed), output
    assert how_to_go_on == "launch/local.sh: exit code 1; the same command begins anew: there is no checkpoint yet"


@pytest.fixture
def start_with_fake_torchrun(make_run: MakeRun, tmp_path: Path) -> FakeTorchrun:
    """Starts local.sh, with `--restarts 2`, and a shell script in the place of torchrun; $RUN is the run directory.

    Other scripts may run where local.sh looks for new checkpoints, and instead of `sleep`. All are in a process group
    of their own.
    """
    run = make_run("run", "--training.steps", "9")
    folder = run.output_dir
    (folder / "checkpoints").mkdir(parents=True)
    programs = tmp_path / "programs"
    programs.mkdir()

    def start(
        torchrun: str, measurement: str = ":", sleep: str = 'exec /bin/sleep "$1"', restarts: int = 2
    ) -> subprocess.Popen[str]:
        choose = f"*distributed.torchrun*) {torchrun};; *--check\\ *) exit 0;; *measure_progress*) {measurement};;"
        python = f'case "$*" in {choose} esac\nexec {sys.executable} "$@"'
        for name, script in (("python", python), ("sleep", sleep)):
            (programs / name).write_text(f"#!/bin/sh\nRUN={folder}; {script}\n")
            (programs / name).chmod(0o755)
        options = ["2", "--restarts", str(restarts), "train", *run.arguments()]
        command = ["bash", str(ROOT / "launch" / "local.sh"), *options]
        environment = {**launch_environment(), "PYTHON": str(programs / "python")}
        environment["PATH"] = f"{programs}:{environment['PATH']}"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)

    return start


def write_checkpoint(folder: Path, step: int, rewinds: int = 0) -> None:
    """What is looked at of a checkpoint to tell how far the run is."""
    checkpoint = folder / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    manifest = make_manifest(global_step=step, passed_over=[[8, 10]] * rewinds)
    (checkpoint / "manifest.json").write_text(manifest.to_json())


@pytest.mark.parametrize(
    ("torchrun", "code", "said"),
    [
        ("exit 3", 3, "launch/local.sh: exit code 3; the same command continues from the checkpoint at step 8\n"),
        ("echo 1 >$JMVAE_DIST_EXIT_CODE_FILE; exit 0", 1, ""),
    ],
    ids=["crash", "refused by all ranks"],
)
def test_a_crash_ends_with_what_the_same_command_does(
    start_with_fake_torchrun: FakeTorchrun, tmp_path: Path, torchrun: str, code: int, said: str
) -> None:
    write_checkpoint(tmp_path / "run" / "checkpoints", 8)
    process = start_with_fake_torchrun(torchrun, restarts=0)
    assert process.communicate(timeout=300)[0] == said
    assert process.returncode == code


def test_a_run_that_always_fails_is_given_up(start_with_fake_torchrun: FakeTorchrun, tmp_path: Path) -> None:
    """One attempt gets to step 8, one to step 10, and the others, after a rewind, to step 9: three times progress."""
    for step, rewinds in ((8, 0), (10, 0), (9, 1)):
        write_checkpoint(tmp_path / "checkpoints", step, rewinds)
    attempt = "echo >>$RUN.attempts; case $(wc -l <$RUN.attempts) in 1) step=08;; 2) step=10;; *) step=09;; esac"
    replaced = f"rm -rf $RUN/checkpoints/*; cp -r {tmp_path}/checkpoints/step-000000$step $RUN/checkpoints"
    process = start_with_fake_torchrun(f"{attempt}; {replaced}; exit 3")
    assert process.communicate(timeout=300)[0].splitlines() == [
        "launch/local.sh: exit code 3; restart 1 of 2 from step 8 in 1 s",
        "launch/local.sh: exit code 3; restart 1 of 2 from step 10 in 1 s",
        "launch/local.sh: exit code 3; restart 1 of 2 from step 9 in 1 s",
        "launch/local.sh: exit code 3; restart 2 of 2 from step 9 in 2 s",
        "launch/local.sh: exit code 3 again, no new checkpoint in 2 restarts: giving up",
    ]
    assert process.returncode == 3


@pytest.mark.parametrize("code", [0, 2, 75])
def test_these_exit_codes_are_no_crash(start_with_fake_torchrun: FakeTorchrun, code: int) -> None:
    process = start_with_fake_torchrun(f"exit {code}")
    assert process.communicate(timeout=300)[0] == ""
    assert process.returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_pause_at_once(
    start_with_fake_torchrun: FakeTorchrun, tmp_path: Path, number: signal.Signals
) -> None:
    """The pauses of 1 and 2 s are 5 and 10 times `sleep 0.2`, and the signal comes within the seventh."""
    seventh_waits = "until [ $(wc -l <$RUN.sleeps) -ne 7 ] || [ -e $RUN.signalled ]; do /bin/sleep 0.01; done"
    process = start_with_fake_torchrun("exit 3", sleep=f"echo >>$RUN.sleeps; {seventh_waits}")
    sleeps = tmp_path / "run.sleeps"
    wait_for(lambda: sleeps.exists() and len(sleeps.read_text()) == 7)
    process.send_signal(number)
    (tmp_path / "run.signalled").touch()
    output, _ = process.communicate(timeout=300)
    assert output.splitlines()[-2:] == [
        "launch/local.sh: exit code 3; restart 2 of 2 from step 0 in 2 s",
        "launch/local.sh: stopped on request; exit code 3 is that of the last attempt",
    ]
    assert len(sleeps.read_text()) == 7
    assert process.returncode == 3


def test_ctrl_c_may_come_while_checkpoints_are_looked_for(start_with_fake_torchrun: FakeTorchrun) -> None:
    process = start_with_fake_torchrun("touch $RUN.failed; exit 3", "[ ! -e $RUN.failed ] || kill -INT 0")
    output = process.communicate(timeout=300)[0]
    assert output == "launch/local.sh: stopped on request; exit code 3 is that of the last attempt\n"
    assert process.returncode == 3


@pytest.mark.parametrize("victim", ["local.sh", "torchrun"])
def test_no_rank_outlives_its_launcher(make_run: MakeRun, victim: str) -> None:
    """SIGKILL to what could stop the ranks: they stop by themselves, with a checkpoint."""
    run = make_run("run", *ENDLESS)
    with started(run) as process:
        wait_for(lambda: last_step(run) >= 5)
        left = ranks(run)
        assert len(left) == 2
        os.kill(process.pid if victim == "local.sh" else left[0].ppid(), signal.SIGKILL)
        wait_for(lambda: ranks(run) == [], timeout_s=120)
        assert (run.output_dir / "checkpoints" / "LATEST").is_file()

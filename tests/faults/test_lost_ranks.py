"""Frozen and dead ranks, as the others see them: real processes in real collectives."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from jmvae_dist.errors import PeerError
from jmvae_dist.training.watchdog import Watchdog
from tests.conftest import ROOT, Run, launch_environment

DEADLINE_S = 60
WORLD_SIZE = 3
INTERVAL_S = 0.2


def reduce_forever(rank: int, folder: Path, peer_timeout_s: float) -> None:
    """A rank that takes part in one all_reduce after another, and says who is missing when one fails."""
    errors = os.open(folder / f"errors-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=120))
    watchdog = Watchdog(
        folder,
        rank=rank,
        world_size=WORLD_SIZE,
        attempt="now",
        step_timeout_s=None,
        peer_timeout_s=peer_timeout_s,
        interval_s=INTERVAL_S,
    )
    try:
        with watchdog:
            for global_step in range(1_000_000):
                watchdog.enter("step", global_step)
                try:
                    dist.all_reduce(torch.ones(8))
                except RuntimeError as error:
                    raise PeerError(watchdog.describe_lost_peers()) from error
                time.sleep(0.01)
    except PeerError as error:
        print(f"after the collective: {error}", file=sys.stderr, flush=True)
    # Without gloo's threads, which find their peers gone and may abort the process.
    os._exit(1)


@contextlib.contextmanager
def running_ranks(folder: Path, peer_timeout_s: float) -> Iterator[list[multiprocessing.process.BaseProcess]]:
    """All ranks, once each of them has taken a few steps; they are killed at the end, also when stopped."""
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=reduce_forever, args=(rank, folder, peer_timeout_s)) for rank in range(WORLD_SIZE)
    ]
    try:
        for process in ranks:
            process.start()
        deadline_s = time.monotonic() + DEADLINE_S
        while min(step_of(folder, rank) for rank in range(WORLD_SIZE)) < 3:
            assert time.monotonic() < deadline_s, "some rank does not start"
            time.sleep(0.02)
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.join()


def step_of(folder: Path, rank: int) -> int:
    path = folder / "heartbeats" / f"rank-{rank:05d}.json"
    return json.loads(path.read_text())["global_step"] if path.exists() else -1


def said_by_survivors(folder: Path, ranks: list[multiprocessing.process.BaseProcess]) -> list[str]:
    """What ranks 0 and 2 said on their end, which must be one with exit code 1."""
    texts = []
    for rank in (0, 2):
        ranks[rank].join(DEADLINE_S)
        texts.append((folder / f"errors-{rank}").read_text())
        assert ranks[rank].exitcode == 1, texts[-1]
    return texts


def test_a_frozen_rank_is_named_by_the_others(tmp_path: Path) -> None:
    with running_ranks(tmp_path, peer_timeout_s=2.0) as ranks:
        frozen = ranks[1].pid
        assert frozen is not None
        os.kill(frozen, signal.SIGSTOP)
        texts = said_by_survivors(tmp_path, ranks)
        assert ranks[1].exitcode is None
    # The first to tell ends its process, which may end the collective of the other before its own watchdog does.
    for text in texts:
        assert f"rank 1 (process {frozen} on host " in text
        assert "it is stopped (SIGSTOP)" in text
    assert any("[rank " in text and "training.watchdog.peer_timeout_s" in text for text in texts)
    assert any("in reduce_forever" in path.read_text() for path in (tmp_path / "logs").glob("stacks-rank-*.txt"))


def test_a_killed_rank_is_named_after_the_collective_failed(tmp_path: Path) -> None:
    with running_ranks(tmp_path, peer_timeout_s=30.0) as ranks:
        killed = ranks[1].pid
        ranks[1].kill()
        texts = said_by_survivors(tmp_path, ranks)
    for text in texts:
        assert f"after the collective: rank 1 (process {killed} on host " in text
        assert 'last in "step" of global step' in text
        assert "is gone: its process no longer exists" in text


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_training_run_ends_and_names_the_lost_rank(make_run: Callable[..., Run], number: signal.Signals) -> None:
    settings = ("--training.steps", "1000000", "--training.watchdog.peer_timeout_s", "5")
    run = make_run("run", *settings, "--training.log_every_steps", "10")
    process = run.start(2)
    victim = 0
    try:
        deadline_s = time.monotonic() + DEADLINE_S
        while step_of(run.output_dir, 1) < 5:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline_s, "the run does not start"
            time.sleep(0.05)
        victim = json.loads((run.output_dir / "heartbeats" / "rank-00001.json").read_text())["process"]
        os.kill(victim, number)
        survivor = json.loads((run.output_dir / "heartbeats" / "rank-00000.json").read_text())["process"]
        while psutil.pid_exists(survivor) and psutil.Process(survivor).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline_s, "the other rank does not end"
            time.sleep(0.05)
    finally:
        # Torchrun would wait half a minute for a stopped process.
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim or process.pid, signal.SIGKILL)
        output = process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == 1, output
    fate = "is gone" if number == signal.SIGKILL else "it is stopped (SIGSTOP)"
    assert any(f"rank 1 (process {victim} on host " in line and fate in line for line in output.splitlines()), output


FAIL = """
import os, sys
from jmvae_dist.__main__ import main
from jmvae_dist.training.step import TrainStep

take_step = TrainStep.__call__

def fail_on_rank_1(self, batch, **options):
    if os.environ["RANK"] == "1" and batch.global_step == 20:
        raise ValueError("nobody expected this")
    return take_step(self, batch, **options)

TrainStep.__call__ = fail_on_rank_1
sys.exit(main(sys.argv[1:]))
"""


def test_an_unexpected_error_on_one_rank_ends_all_and_is_passed_on(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    """A defect, of ours or of a user's network: its own traceback there, and its reason on the other ranks."""
    script = tmp_path / "fail.py"
    script.write_text(FAIL)
    run = make_run("run", "--training.steps", "1000000")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*torchrun, str(script), "train", *run.arguments()],
        env=launch_environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert result.returncode == 1
    assert "ValueError: nobody expected this" in result.stderr
    told = [line for line in result.stderr.splitlines() if line.startswith("jmvae-dist[rank 0] train: rank 1 ")]
    assert len(told) == 1, result.stderr
    assert "failed with ValueError: nobody expected this" in told[0]


STAY = """
import sys, time
from pathlib import Path
from jmvae_dist.training.watchdog import Watchdog

with Watchdog(
    Path(sys.argv[1]), rank=1, world_size=2, attempt="now",
    step_timeout_s=None, peer_timeout_s=None, interval_s=0.1,
) as watchdog:
    watchdog.enter("step", 4)
    time.sleep(3600)
"""


def test_a_rank_whose_process_cannot_be_seen_is_judged_by_its_heartbeat(tmp_path: Path) -> None:
    """In a process table of its own, like that of another node."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], check=False).returncode != 0:
        pytest.skip("a process table of its own needs unshare and privileges")
    command = [*unshare, sys.executable, "-c", STAY, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=launch_environment())
    try:
        with Watchdog(
            tmp_path,
            rank=0,
            world_size=2,
            attempt="now",
            step_timeout_s=None,
            peer_timeout_s=None,
            interval_s=0.1,
        ) as watchdog:
            deadline_s = time.monotonic() + DEADLINE_S
            while step_of(tmp_path, 1) < 4:
                assert time.monotonic() < deadline_s, "the other rank does not start"
                time.sleep(0.02)
            assert watchdog.describe_lost_peers(timeout_s=0.8) is None
            process.kill()
            process.wait()
            lost = watchdog.describe_lost_peers(timeout_s=0.6)
    finally:
        process.kill()
        process.wait()
    assert lost is not None
    assert lost.startswith("rank 1 (process ")
    assert "it is stopped or its node is lost" in lost

"""What several kinds of tests share: small real shards, and training runs as a user starts them."""

from __future__ import annotations

import contextlib
import json
import multiprocessing.connection
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import warm

ROOT = Path(__file__).resolve().parent.parent
# How long an example takes on a busy machine says nothing about the code.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run only when asked for with `-m slow` (or any other -m expression)."""
    if config.getoption("-m"):
        return
    skip = pytest.mark.skip(reason="slow: run with `bash tests/run.sh -m slow`")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `train/` and `test/` shards of scikit-learn's digits."""
    from jmvae_dist.commands.shards import main

    folder = tmp_path_factory.mktemp("digits")
    for split in ("train", "test"):
        assert main(["write", "digits", "--split", split, "--out", str(folder / split), "--workers", "1"]) == 0
    return folder


@dataclass
class Run:
    """A training run in a directory of its own, started through the launchers that users have.

    Args:
        output_dir: The run directory.
        digits: Where the shards are.
        overrides: Settings of every start of this run.
    """

    output_dir: Path
    digits: Path
    overrides: list[str]

    def command(self, num_processes: int = 1, *more: str) -> list[str]:
        """The command line that starts or resumes the run."""
        launcher = [sys.executable, "-m", "jmvae_dist"]
        if num_processes > 1:
            launcher = ["bash", str(ROOT / "launch" / "local.sh"), str(num_processes)]
        return [*launcher, "train", *self.arguments(*more)]

    def arguments(self, *more: str) -> list[str]:
        """What follows the verb."""
        return [
            *("--config", str(ROOT / "configs" / "digits.yaml")),
            *("--output_dir", str(self.output_dir)),
            *("--data.train_manifest", str(self.digits / "train" / "manifest.json")),
            *("--data.eval_manifest", "null"),
            *("--training.epochs", "null"),
            *("--tracking.wandb.mode", "disabled"),
            *self.overrides,
            *more,
        ]

    def start(self, num_processes: int = 1, *more: str) -> subprocess.Popen[str]:
        """Start the command in a process group of its own, so that a test can kill all of it."""
        return subprocess.Popen(
            self.command(num_processes, *more),
            cwd=ROOT,
            env=launch_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def train(self, num_processes: int = 1, *more: str, expect: int = 0) -> str:
        """Run to the end and return what was printed; how runs are launched is a matter of `start` and its tests."""
        if expect == 0 or num_processes == 1:
            return run_verb("train", *self.arguments(*more), num_processes=num_processes, expect=expect)
        process = self.start(num_processes, *more)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == expect, output
        return output

    def records(self) -> list[dict[str, Any]]:
        """Content of `metrics.jsonl`, without what legitimately differs between two runs."""
        lines = (self.output_dir / "metrics.jsonl").read_text().splitlines()
        measured = ("time_s", "speed/", "memory/", "checkpoint/", "goodput/")
        return [
            {key: value for key, value in json.loads(line).items() if not key.startswith(measured)} for line in lines
        ]

    def checkpoint(self, global_step: int) -> Path:
        """Directory of a checkpoint."""
        return self.output_dir / "checkpoints" / f"step-{global_step:08d}"

    def tensors(self, global_step: int) -> dict[str, Any]:
        """Weights and optimizer moments of a checkpoint, whole, by entry name."""
        import torch
        from safetensors.torch import load_file

        from jmvae_dist.checkpoint.layout import read_manifest

        path = self.checkpoint(global_step)
        manifest = read_manifest(path)
        files = {name: load_file(path / name) for name in manifest.files}
        return {
            name: torch.cat([files[fragment.file][name] for fragment in record.fragments])
            for name, record in manifest.tensors.items()
        }


def run_verb(*arguments: str, num_processes: int = 1, expect: int = 0, patch: str = "", **variables: str) -> str:
    """Run a verb on one or several processes without a launcher, and return what they printed.

    Args:
        arguments: The verb and what follows it.
        num_processes: Number of ranks.
        expect: Exit code of all.
        patch: Python statements to run before.
        variables: Of the environment.
    """
    environments = rank_environments(num_processes) if num_processes > 1 else [launch_environment()]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        ranks = [warm.start(arguments, {**common, **variables}, ROOT, output, patch) for common in environments]
        deadline_s = time.monotonic() + 300
        try:
            # Once one has failed, the others may wait for it for minutes.
            while {rank.exitcode for rank in ranks} <= {None, expect} and any(rank.is_alive() for rank in ranks):
                assert time.monotonic() < deadline_s, f"no end: {output.read_text()}"
                multiprocessing.connection.wait([rank.sentinel for rank in ranks if rank.is_alive()], timeout=1)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        printed = output.read_text()
    assert [rank.exitcode for rank in ranks] == [expect] * num_processes, printed
    return printed


def free_port() -> int:
    """A port that nobody uses at the moment, below those that Linux hands out by itself.

    Of those, a connection of another program may take it before rank 0 listens there, or a rank that tries to reach
    rank 0 is given the very same one and meets itself: the others would wait for the ranks for ever.
    """
    while True:
        port = 12_000 + secrets.randbelow(8_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def rank_environments(num_processes: int) -> list[dict[str, str]]:
    """What torchrun sets for every rank."""
    numbers = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes, "MASTER_PORT": free_port()}
    common = {
        **launch_environment(),
        "MASTER_ADDR": "127.0.0.1",
        **{key: str(value) for key, value in numbers.items()},
    }
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]


def launch_environment() -> dict[str, str]:
    """This process's environment, with one thread per rank and without a launcher's variables."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in launcher and not key.startswith("SLURM_")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def make_run(tmp_path: Path, digits: Path) -> Callable[..., Run]:
    """Makes runs: `make_run("name", "--training.steps", "20", ...)`."""

    def make(name: str, *overrides: str) -> Run:
        return Run(tmp_path / name, digits, list(overrides))

    return make


def assert_same_tensors(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Bit-for-bit equality of two sets of tensors."""
    import torch

    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ, the first is {different[0]}"


def assert_losses_agree(first: Run, second: Run, tolerance: float, num_records: int) -> None:
    """Every loss term of every record agrees, relative to its size."""
    firsts, seconds = first.records(), second.records()
    assert [record["global_step"] for record in firsts] == [record["global_step"] for record in seconds]
    assert len(firsts) == num_records
    for one, other in zip(firsts, seconds, strict=True):
        for key in (key for key in one if key.startswith("loss/") or key in ("elbo", "grad_norm")):
            assert other[key] == pytest.approx(one[key], rel=tolerance), (one["global_step"], key)

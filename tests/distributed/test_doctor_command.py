"""`jmvae-dist doctor` as a user starts it: alone, by launchers, and with ranks or data that are missing."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, launch_environment
from tests.distributed.test_launch import finish, free_port, srun_variables, start

DOCTOR = [sys.executable, "-m", "jmvae_dist", "doctor"]


@pytest.fixture
def run_arguments(tmp_path: Path, digits: Path) -> list[str]:
    """A configuration whose run directory does not exist yet."""
    return [
        *("--config", str(ROOT / "configs" / "digits.yaml"), "--output_dir", str(tmp_path / "runs" / "x")),
        *("--data.train_manifest", str(digits / "train" / "manifest.json")),
        *("--data.eval_manifest", str(digits / "test" / "manifest.json"), "--tracking.wandb.mode", "disabled"),
    ]


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**launch_environment(), **variables}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_two_processes_of_one_machine(run_arguments: list[str], tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "launch" / "local.sh"), "2", "doctor", *run_arguments]
    result = run([*command, "--json", str(tmp_path / "table.json")])
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["counts"]["fail"] == 0
    assert [place["launcher"] for place in table["ranks"]] == ["torchrun", "torchrun"]
    assert {row["check"] for row in table["rows"]} == {
        *("ranks", "versions", "code", "device", "threads", "open files", "/dev/shm", "network", "collectives"),
        *("configuration", "world size", "engine", "shards", "read speed", "output_dir", "disk space"),
        *("checkpoints", "W&B"),
    }
    measured = table["facts"]["1"]["collectives"]["facts"]
    assert measured["latency_s"] > 0
    assert measured["duration_s"] > 0
    assert not (tmp_path / "runs").exists()


def test_tasks_of_srun_without_a_configuration(tmp_path: Path) -> None:
    """Rank 0 holds the port where the ranks meet when the process group starts there too."""
    job_id = str(random.SystemRandom().randrange(2**20))
    site = tmp_path / "site.env"
    site.write_text("INTERFACE=ib0\n")
    variables = [{**srun_variables(rank, "localhost", job_id), "JMVAE_DIST_SITE": str(site)} for rank in range(2)]
    outputs = finish(*(start(DOCTOR, of_rank) for of_rank in variables))
    assert "2 process(es) started by srun" in outputs[0]
    # The table may break a line within the path.
    assert "site.env was not read: srun alone".replace(" ", "") in "".join(outputs[0].split())
    assert outputs[0].splitlines()[-1].endswith(" 0 fail")
    assert outputs[1] == ""


def test_a_broken_manifest_fails_and_the_other_checks_are_made(run_arguments: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "manifest.json"
    broken.write_text("{")
    result = run([*DOCTOR, *run_arguments, "--data.train_manifest", str(broken)])
    assert result.returncode == 1
    assert result.stderr == "jmvae-dist doctor: 1 check(s) failed: configuration\n"
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[:3] for line in lines if line[:1] == ["configuration"]] == [["configuration", "all", "fail"]]
    assert ["world", "size", "all", "pass"] in [line[:4] for line in lines]


def test_a_rank_that_never_comes() -> None:
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    result = run([*DOCTOR, "--timeout-s", "2"], RANK="0", LOCAL_RANK="0", **variables)
    assert result.returncode == 1
    assert "rank(s) 1 of 2 did not come; those that did: 0 on" in " ".join(result.stdout.split())
    assert result.stderr == "jmvae-dist[rank 0] doctor: 1 check(s) failed: ranks\n"

"""What an attempt ran is recorded, and secrets are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmvae_dist.cluster import provenance
from jmvae_dist.cluster.provenance import public_environment, write_provenance

SECRETS = ("WANDB_API_KEY", "SLURM_JWT", "NCCL_AUTH", "JMVAE_DIST_TOKEN", "TORCH_PASSWORD", "CONDA_SECRET")


def test_what_changes_a_run_is_recorded(tmp_path: Path) -> None:
    environment = {"SLURM_JOB_ID": "7", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "2", "PATH": "/bin"}
    write_provenance(tmp_path / "job", {**environment, "MY_DATABASE": "private", "HOME": "/home/me"})
    lines = (tmp_path / "job" / "environment.txt").read_text().splitlines()
    assert lines == [f"{name}={value}" for name, value in sorted(environment.items())]
    code = json.loads((tmp_path / "job" / "code.json").read_text())
    assert code["version"]
    assert Path(code["root"], "jmvae_dist").is_dir()


@pytest.mark.parametrize("name", [*SECRETS, *(name.lower() for name in SECRETS), "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"])
def test_secrets_are_never_written(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_git", lambda root, *arguments: "")  # this file may have changes of its own
    write_provenance(tmp_path, {name: "hunter2", "SLURM_JOB_ID": "7"})
    assert not [path for path in tmp_path.iterdir() if "hunter2" in path.read_text()]


@pytest.mark.parametrize(
    "value", ["https://me:hunter2@host/path", "git+ssh://hunter2@host", "a https://hunter2@x https://u:hunter2@y"]
)
def test_passwords_in_addresses_are_masked(value: str) -> None:
    recorded = public_environment({"WANDB_BASE_URL": value})["WANDB_BASE_URL"]
    assert "hunter2" not in recorded
    assert "://***@" in recorded


def test_addresses_on_the_command_line_and_in_changes_are_masked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = "--data.train_manifest=https://host/m.json?signature=hunter2"
    monkeypatch.setattr("sys.argv", ["jmvae-dist", "https://me:hunter2@host/m.json", signed])
    output = {"rev-parse": "0123abc", "diff": "+url: s3://me:hunter2@host/x\n"}
    monkeypatch.setattr(provenance, "_git", lambda root, *arguments: output.get(arguments[0], ""))
    write_provenance(tmp_path, {})
    assert "s3://***@host/x" in (tmp_path / "code.patch").read_text()
    assert not [path for path in tmp_path.iterdir() if "hunter2" in path.read_text()]


@given(st.dictionaries(st.sampled_from(["SLURM_X", "NCCL_Y", "PATH"]), st.text()))
def test_a_value_stays_on_its_line(environment: dict[str, str]) -> None:
    assert public_environment(environment).keys() == environment.keys()
    for value in public_environment(environment).values():
        assert "\n" not in value

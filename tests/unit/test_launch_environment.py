"""`launch/environment.sh`: what a user who interrupts or misplaces the environment gets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def run(command: str, venv: Path) -> subprocess.CompletedProcess[str]:
    script = f"set -euo pipefail; source {ROOT}/launch/environment.sh; {command}"
    environment = {**os.environ, "JMVAE_DIST_VENV": str(venv), "PYTHON": sys.executable}
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, check=False)


def test_an_environment_whose_creation_was_interrupted_gets_its_pip(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    result = run('add_missing_pip; "$venv/bin/python" -m pip --version', tmp_path / "venv")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("pip ")


def test_an_environment_that_can_have_no_pip(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    result = run("add_missing_pip", tmp_path)
    assert result.returncode == 1
    assert result.stderr == (
        f"error: {tmp_path} has no pip; remove it and run this again, or set JMVAE_DIST_VENV to another place\n"
    )


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    result = run('prepare_environment ""', tmp_path)
    assert result.returncode == 1
    assert "is not a virtual environment" in result.stderr
    assert (tmp_path / "thesis.tex").read_text() == "precious"

"""Stand-ins for Slurm's commands, which `tests/slurm/` runs for real."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def fake_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes commands that come first on PATH: `fake_command("squeue", prints="...", exit_code=0)`.

    The file that is returned has the arguments of all calls, one call a line.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    # Nothing but the stand-ins and what a shell script needs: the machine may have a Slurm of its own.
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:/bin-of-tests")
    for name in ("bash", "sh", "env", "cat", "sed", "head", "tail", "tr", "grep", "hostname", "dirname", "git"):
        for place in ("/usr/bin", "/bin"):
            if (Path(place) / name).exists() and not (folder / name).exists():
                (folder / name).symlink_to(Path(place) / name)

    def make(name: str, prints: str = "", exit_code: int = 0) -> Path:
        calls = tmp_path / f"{name}.calls"
        lines = [f'echo "$@" >>{shlex.quote(str(calls))}', f"printf %s {shlex.quote(prints)}", f"exit {exit_code}"]
        (folder / name).write_text("\n".join(["#!/bin/sh", *lines, ""]))
        (folder / name).chmod(0o755)
        return calls

    return make

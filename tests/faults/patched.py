"""Runs into which a test has put something that happens at a certain moment."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT, Run, launch_environment


def train(run: Run, patch: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Train in a process in which `patch`, Python statements, has been run before.

    Args:
        run: The run.
        patch: May use `os`, `signal`, `time`, the module `loop` and the class `Recorder`.
        variables: Of the environment.
    """
    program = f"""
import os, signal, sys, time
from jmvae_dist.__main__ import main
from jmvae_dist.training import loop
from jmvae_dist.training.recorder import Recorder
{patch}
sys.exit(main(sys.argv[1:]))
"""
    return subprocess.run(
        [sys.executable, "-c", program, "train", *run.arguments()],
        cwd=ROOT,
        env={**launch_environment(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )

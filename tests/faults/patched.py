"""Runs into which a test has put something that happens at a certain moment."""

from __future__ import annotations

from tests.conftest import Run, run_verb

_NAMES = """
import os, signal, sys, time
from jmvae_dist.training import loop
from jmvae_dist.training.recorder import Recorder
"""


def train(run: Run, patch: str = "", expect: int = 0, **variables: str) -> str:
    """Train in a process in which `patch`, Python statements, has been run before; returns what was printed.

    Args:
        run: The run.
        patch: May use `os`, `signal`, `time`, the module `loop` and the class `Recorder`.
        expect: Exit code.
        variables: Of the environment.
    """
    return run_verb("train", *run.arguments(), expect=expect, patch=_NAMES + patch, **variables)

"""Processes of the command line that begin with torch imported, which takes most of a short run's time.

They are forked from a server that has imported what a training run imports and done nothing else. Everything after
that is theirs: environment, directory, session, output, exit code.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

_ROOT = Path(__file__).resolve().parent.parent
_PRELOADED = [
    *("jmvae_dist.__main__", "jmvae_dist.commands.train", "jmvae_dist.training.loop"),
    *("accelerate", "jsonargparse", "torch.distributed", "torch.nn.parallel"),
]


def start(
    arguments: Sequence[str], variables: dict[str, str], folder: Path, output: Path, patch: str = ""
) -> ForkServerProcess:
    """Start `jmvae-dist ARGUMENTS`.

    Args:
        arguments: The verb and what follows it.
        variables: The whole environment.
        folder: Where it runs.
        output: File to which standard output and error are appended.
        patch: Python statements to run before.
    """
    return start_function(_run, list(arguments), variables, str(folder), str(output), patch)


def start_function(function: Callable[..., Any], *arguments: Any) -> ForkServerProcess:
    """Start a process that calls a function of a module, with one thread of OpenMP."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # OpenMP reads the first when torch is imported, and sums would depend on the number of threads. Without the
    # second the server of Python 3.11, which heeds no `sys.path`, may import another installation of the package.
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}):
        forkserver.ensure_running()
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def _run(arguments: list[str], variables: dict[str, str], folder: str, output: str, patch: str) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.argv = ["jmvae-dist", *arguments]
    import jmvae_dist
    from jmvae_dist.__main__ import main

    assert Path(jmvae_dist.__file__).is_relative_to(_ROOT), f"tests of {_ROOT} would run {jmvae_dist.__file__}"
    exec(patch, {})
    sys.exit(main(arguments))

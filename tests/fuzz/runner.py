"""Runs cases in a process of their own, with limits on time and memory, and tells what came of them."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.confinement import Confinement

ROOT = Path(__file__).resolve().parent.parent.parent
MEMORY_BYTES = 2**30
_CASE_LIMIT_S = 30.0
_STUCK_S = 60.0
_LONGEST_MESSAGE = 10_000


@dataclass
class Failure:
    """A case that ended as none may: the input is chosen by target, seed and number."""

    target: str
    seed: int
    number: int
    problem: str

    @property
    def command(self) -> str:
        """Runs this case alone."""
        return f"python -m tests.fuzz --target {self.target} --seed {self.seed} --case {self.number}"


@dataclass
class Outcome:
    """What came of the cases of one target."""

    target: str
    correct: int = 0
    refused: int = 0
    failures: list[Failure] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.correct + self.refused + len(self.failures)


def fuzz(
    target: str,
    seed: int,
    first: int = 0,
    cases: int | None = None,
    seconds: float | None = None,
    keep: Path | None = None,
    targets: str = "tests.fuzz.targets",
    case_limit_s: float = _CASE_LIMIT_S,
    stuck_s: float = _STUCK_S,
) -> Outcome:
    """Run cases of a target in a new process.

    Args:
        target: one of `TARGETS` of the module `targets`.
        seed: with the number of a case, chooses the case.
        first: number of the first case.
        cases, seconds: how many, or how long.
        keep: where the inputs of failing cases are saved.
        targets: name of the module with the targets.
        case_limit_s: a case that takes longer is a failure.
        stuck_s: as long again without an end, the process is killed.
    """
    with TemporaryDirectory(prefix="fuzz-") as folder:
        progress, result = Path(folder, "progress"), Path(folder, "result.json")
        options = {
            "target": target,
            "seed": seed,
            "first": first,
            "cases": cases,
            "seconds": seconds,
            "targets": targets,
            "folder": folder,
            "keep": None if keep is None else str(keep.resolve()),
            "case_limit_s": case_limit_s,
        }
        # Every arena of the allocator reserves address space, which is what the memory limit counts.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.runner", json.dumps(options)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        ended = _wait(process, progress, case_limit_s + stuck_s)
        output = process.communicate()[0]
        if process.returncode == 0:
            outcome = json.loads(result.read_text())
            failures = [Failure(**failure) for failure in outcome.pop("failures")]
            return Outcome(**outcome, failures=failures)
        number = int(progress.read_text() or first) if progress.exists() else first
        what = f"ended with {process.returncode}" if ended else "was stuck and had to be killed"
        return Outcome(target, failures=[Failure(target, seed, number, f"the process {what}\n{output[-4000:]}")])


def _wait(process: subprocess.Popen[str], progress: Path, stuck_s: float) -> bool:
    """Wait for the end; False if no case ended for so long that the process was killed."""
    last, since_s = "", time.monotonic()
    while process.poll() is None:
        text = progress.read_text() if progress.exists() else ""
        if text != last:
            last, since_s = text, time.monotonic()
        elif time.monotonic() - since_s > stuck_s:
            process.kill()
            return False
        time.sleep(0.02)
    return True


def _run(options: argparse.Namespace) -> Outcome:
    """In the new process: the cases, one after another."""
    module = import_module(options.targets)
    folder, progress = Path(options.folder, "cases"), Path(options.folder, "progress")
    outcome = Outcome(options.target)
    with contextlib.closing(module.TARGETS[options.target]()) as target, open(progress, "wb", buffering=0) as file:
        confinement = Confinement(folder, MEMORY_BYTES)
        stop_s = time.monotonic() + (options.seconds or 1e9)
        for number in itertools.count(options.first):
            if time.monotonic() > stop_s or number - options.first == options.cases:
                break
            os.pwrite(file.fileno(), b"%d" % number, 0)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            rng = random.Random(f"{options.target} {options.seed} {number}")
            problem = None
            try:
                with confinement.case(options.case_limit_s):
                    target.run(rng, folder, number)
                outcome.correct += 1
            except module.REFUSALS as error:
                outcome.refused += 1
                problem = _problem_of_message(str(error))
            except BaseException:
                problem = traceback.format_exc()
            if list(folder.rglob("canary*")):
                problem = "the canary was made: data were executed, or chose a place"
            if problem is not None:
                outcome.failures.append(Failure(options.target, options.seed, number, problem))
                if options.keep is not None:
                    _save(outcome.failures[-1], folder, Path(options.keep))
    return outcome


def _problem_of_message(message: str) -> str | None:
    """Messages end in terminals and logs: what a file contains must neither flood them nor control them."""
    if len(message) > _LONGEST_MESSAGE:
        return f"a message of {len(message)} characters: {message[:200]!r}"
    if not message.replace("\n", "").isprintable() or not message:
        return f"a message that is not printable: {message!r}"
    return None


def _save(failure: Failure, folder: Path, keep: Path) -> None:
    kept = keep / f"{failure.target}-{failure.seed}-{failure.number}"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept, symlinks=True, ignore=_pipes)
    (kept / "PROBLEM.txt").write_text(f"{failure.command}\n\n{failure.problem}\n")


def _pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if stat.S_ISFIFO(os.lstat(os.path.join(folder, name)).st_mode)]


if __name__ == "__main__":
    given = argparse.Namespace(**json.loads(sys.argv[1]))
    Path(given.folder, "result.json").write_text(json.dumps(asdict(_run(given))))

"""Fuzzes everything that reads data, for as long as is wanted.

    python -m tests.fuzz --seconds 600              # fresh inputs, all targets in turn
    python -m tests.fuzz --target shard --seed 7 --case 123      # one case again

Every case is chosen by target, seed and number. Inputs of cases that fail are saved in --keep, each in a folder of
its own with the command that runs it again. Exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import secrets
import time
from pathlib import Path

from tests.fuzz.runner import Outcome, fuzz

# Not imported from the targets: the readers belong into the processes that are limited.
TARGET_NAMES = ("decode", "manifest", "index", "shard", "foreign", "remote", "workspace", "checkpoint")
_TURN_S = 30.0


def main() -> int:
    """Fuzz, and print one line per turn of a target."""
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long, over all targets")
    parser.add_argument("--seed", type=int, help="a fresh one by default")
    parser.add_argument("--target", choices=TARGET_NAMES, action="append", help="by default all")
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="where failing inputs are saved")
    options = parser.parse_args()
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    targets = options.target or TARGET_NAMES
    if options.case is not None:
        outcome = fuzz(targets[0], seed, options.case, cases=1, keep=options.keep)
        _print(outcome, seed)
        return int(bool(outcome.failures))
    failures = 0
    stop_s = time.monotonic() + options.seconds
    first = dict.fromkeys(targets, 0)
    while (left_s := stop_s - time.monotonic()) > 0:
        for target in targets:
            turn_s = min(_TURN_S, left_s / len(targets))
            outcome = fuzz(target, seed, first[target], seconds=turn_s, keep=options.keep)
            _print(outcome, seed)
            # A case that killed the process is passed over.
            first[target] = max(
                first[target] + outcome.cases, *(failure.number + 1 for failure in outcome.failures), 0
            )
            failures += len(outcome.failures)
    return int(failures > 0)


def _print(outcome: Outcome, seed: int) -> None:
    print(
        f"{outcome.target:<12}seed {seed}: {outcome.cases:>8,} cases, {outcome.correct:,} correct, "
        f"{outcome.refused:,} refused, {len(outcome.failures):,} FAILED",
        flush=True,
    )
    for failure in outcome.failures:
        print(f"  {failure.command}\n{failure.problem}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())

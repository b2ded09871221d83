"""Whether two versions of the program compute the same losses.

    git worktree add /tmp/before c8b5358
    python benchmarks/regression.py --before /tmp/before [--after .] [--steps 100] [--ranks 1 2] [--out FILE.json]

Both versions train the model of `step.py` with the same settings and seed on the same shards, which the one before
writes, and record every step. Shows the largest relative difference of every loss and of the gradient's norm.
Ends with 1 if one of a loss is beyond the tolerance.

The activation is GELU unless asked otherwise. ReLU's kink turns a difference in the last bit into a visible one: in
terms that training takes to nearly nothing, as it does with divergences on random data.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from conditions import machine, versions
from workload import ROOT, make_arrays, read_records, run_command, settings, train

BATCH = 256
TOLERANCE = 1e-5


def main() -> int:
    """Train, compare, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the version to compare with")
    parser.add_argument("--after", type=Path, default=ROOT, help="a checkout of the version in question")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--activation", choices=("gelu", "relu"), default="gelu")
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    options = parser.parse_args()
    checkouts = {"before": options.before.resolve(), "after": options.after.resolve()}
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "versions": versions(("torch",)),
        "commits": {name: _commit(checkout) for name, checkout in checkouts.items()},
        "relative_differences": {},
    }
    print(json.dumps({key: report[key] for key in ("machine", "versions", "commits")}, indent=1), flush=True)
    more = ("--training.log_every_steps", "1", "--model.networks.activation", options.activation)
    with tempfile.TemporaryDirectory() as folder:
        manifest = make_shards(Path(folder), options.samples, checkouts["before"])
        for ranks in options.ranks:
            records = []
            for name, checkout in checkouts.items():
                run = Path(folder) / f"{name}-{ranks}"
                train([*settings(manifest, run, options.steps, BATCH), *more], ranks, root=checkout)
                records.append(read_records(run))
                assert len(records[-1]) == options.steps
            differences = compare(*records)
            report["relative_differences"][ranks] = differences
            print(json.dumps({"ranks": ranks, **differences}, indent=1), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    found = report["relative_differences"].values()
    # Not by the largest: NaN is neither larger than the tolerance nor smaller.
    agree = all(of[key] <= TOLERANCE for of in found for key in of if key.startswith("loss/"))
    return 0 if agree else 1


def make_shards(folder: Path, num_samples: int, checkout: Path) -> Path:
    """Shards that the checkout's own program writes: an older one refuses keys of manifests that it does not know."""
    np.savez(folder / "arrays.npz", **make_arrays(num_samples))
    write = [sys.executable, "-m", "jmvae_dist", "shards", "write", "npz", "--file", str(folder / "arrays.npz")]
    options = ("--class-modalities", "label", "--split", "train", "--file-is-split", "--out", str(folder / "shards"))
    # The same ones of both checkouts, whatever their defaults are: the order of samples depends on it.
    options += ("--samples-per-shard", "4096")
    run_command([*write, *options], threads=1, root=checkout)
    return folder / "shards" / "manifest.json"


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, float]:
    """By key of the records: the largest difference over all steps, relative to the value before."""
    keys = [key for key in before[0] if key.startswith("loss/") or key == "grad_norm"]
    differences = {}
    for key in keys:
        one, two = (np.array([float(record[key]) for record in records]) for records in (before, after))
        differences[key] = float(np.max(np.abs(two - one) / np.maximum(np.abs(one), np.finfo(np.float64).tiny)))
    return differences


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())

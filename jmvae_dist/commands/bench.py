"""`jmvae-dist bench`: what parts of the program cost on the user's own machine."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from jmvae_dist.commands.cli import add_device_option, find_device, make_parser
from jmvae_dist.errors import ConfigError


def main(argv: list[str]) -> int:
    """Measure, print a table, and write it.

    Raises:
        ConfigError: The device or something that is to be measured is missing here.
    """
    if argv[:1] == ["step"]:
        # Its options are also those of `train`, which its own parser knows.
        from jmvae_dist.commands import bench_step

        return bench_step.main(argv[1:])
    parser = make_parser("jmvae-dist bench", "Measure parts of the program on this machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    commands.add_parser("step", help="a run's training steps: where their time goes, and what to change first")
    _add_kernels(commands)
    options = parser.parse_args(argv)
    if options.errors:
        return _errors(options)
    return _resources(options) if options.resources else _kernels(options)


def _add_kernels(commands: Any) -> None:
    summary = "Gaussian KL terms and products of experts: eager, compiled, Triton"
    parser = commands.add_parser("kernels", help=summary, description=summary)
    add_device_option(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--sizes", nargs="+", metavar="B,D,M", type=_size, help="batch, latent dimension, experts (default: several)"
    )
    parser.add_argument("--out", metavar="FILE.csv", type=Path, help="also write the results there")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--errors", action="store_true", help="errors against float64 instead of times")
    what.add_argument(
        "--resources", action="store_true", help="compile every Triton kernel, without a GPU, and show its registers"
    )
    parser.add_argument(
        "--architectures",
        nargs="+",
        metavar="N",
        type=int,
        help="compute capabilities to compile for (default: 80 90)",
    )


def _size(text: str) -> tuple[int, int, int]:
    try:
        batch, dim, experts = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,D,M, such as 256,64,2") from None
    if min(batch, dim, experts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: B, D and M must be at least 1")
    return batch, dim, experts


def _kernels(options: argparse.Namespace) -> int:
    from jmvae_dist.kernels.benchmark import SIZES, measure

    device = find_device(options.device)
    rows = []
    print(
        f"{'operation':<20}{'B,D,M':>14}  {'direction':<18}{'':<10}{'ms':>10}{'x eager':>9}{'GB/s':>8}{'of copy':>9}"
    )
    for row in measure(device, options.sizes or list(SIZES), options.dtype):
        size = f"{row.batch},{row.dim},{row.experts}"
        print(
            f"{row.operation:<20}{size:>14}  {row.direction:<18}{row.implementation:<10}{row.time_ms:>10.3f}"
            f"{row.times_eager:>9.2f}{row.gb_per_s:>8.1f}{row.gb_per_s / row.copy_gb_per_s:>8.0%}",
            flush=True,
        )
        rows.append(dataclasses.asdict(row))
    print(f"on {rows[0]['device']}, torch {rows[0]['torch']}, {options.dtype}; copy {rows[0]['copy_gb_per_s']} GB/s")
    if "triton" not in {row["implementation"] for row in rows}:
        print("Triton kernels: not measured, they need a CUDA device and triton")
    _write(options.out, rows)
    return 0


def _errors(options: argparse.Namespace) -> int:
    device = find_device(options.device)
    if device == "cpu":
        # Before anything imports triton: it looks at this once.
        os.environ["TRITON_INTERPRET"] = "1"
    from jmvae_dist.kernels.benchmark import keyed_noise_differences, measure_errors
    from jmvae_dist.kernels.gaussian import choose

    names = ["reference"] + (["triton"] if choose("auto", device) == "triton" else [])
    rows = []
    print("| case | quantity | textbook | " + " | ".join(names) + " |\n|---|---|" + "---|" * (len(names) + 1))
    for row in measure_errors(device, names):
        values = " | ".join(f"{error:.1e}" for error in row.errors.values())
        print(f"| {row.case} | {row.quantity} | {values} |", flush=True)
        rows.append({"case": row.case, "quantity": row.quantity, **row.errors})
    if "triton" in names:
        differing, total = keyed_noise_differences(device)
        print(f"\nnoise generated in the kernel: {differing} of {total:,} values differ from the reference's")
        print(f"Triton kernels: {'interpreted on the CPU' if device == 'cpu' else 'run on the GPU'}")
    _write(options.out, rows)
    return 0


def _resources(options: argparse.Namespace) -> int:
    try:
        from jmvae_dist.kernels import offline
    except ModuleNotFoundError as error:
        raise ConfigError(f"--resources: {error.name} is not installed; pip install 'jmvae_dist[triton]'") from None

    rows = []
    for architecture in options.architectures or offline.ARCHITECTURES:
        for binary in offline.compile_all(architecture):
            rows.append({"architecture": architecture, **dataclasses.asdict(binary)})
    writer = csv.DictWriter(sys.stdout, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    _write(options.out, rows)
    return 0


def _write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    if path is None:
        return
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise ConfigError(f"--out: {path} cannot be written ({error.strerror})") from None

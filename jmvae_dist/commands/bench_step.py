"""`jmvae-dist bench step`: where the time of a run's training steps goes, and what to change first."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import textwrap
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jmvae_dist.commands.cli import check_writable, make_parser
from jmvae_dist.commands.options import positive
from jmvae_dist.config_io import parse_run_config, to_plain
from jmvae_dist.errors import ConfigError

if TYPE_CHECKING:
    from jmvae_dist.config import RunConfig
    from jmvae_dist.distributed.environment import ProcessInfo
    from jmvae_dist.distributed.runtime import Runtime
    from jmvae_dist.training.benchmark import RankMeasurement, StepReport
    from jmvae_dist.training.setup import ResolvedRun

_WIDTH = 110
_PROG = "jmvae-dist bench step"
_DESCRIPTION = (
    "Take training steps of a run, on its own data, and say where their time goes: parts of a step, samples/s, "
    "FLOP/s against measured matrix products, memory, and what to change first. Start it as the run would be "
    "started; nothing is written to output_dir, and nothing is read from it but, with "
    "training.micro_batch_size: auto, the micro-batch that the run has found."
)


def main(arguments: list[str]) -> int:
    """Measure, and print on rank 0.

    Raises:
        ConfigError: The options or the configuration are not sound, or a manifest is missing.
        DataError: The data cannot be read; on all ranks.
    """
    options, config = _parse(arguments)
    from jmvae_dist.distributed.environment import detect_process
    from jmvae_dist.training.setup import check_machine, resolve_run, summarize

    process = detect_process()
    run = resolve_run(config, process.world_size)
    check_machine(config)
    if process.rank == 0:
        print(summarize(run, process.world_size).rpartition(";")[0], flush=True)
    report = _measure(run, process, options)
    if process.rank == 0:
        print(render(report))
        if options.out is not None:
            _write(options.out, report, run)
    return 0


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, RunConfig]:
    parser = make_parser(_PROG, _DESCRIPTION)
    parser.add_argument("--config", action="append", metavar="FILE", help="as for train; so is --section.key VALUE")
    parser.add_argument("--steps", type=positive, default=50, metavar="N", help="steps to measure (default: 50)")
    parser.add_argument("--warmup", type=positive, default=10, metavar="N", help="steps before them (default: 10)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the results there")
    options, rest = parser.parse_known_args(arguments)
    if options.out is not None:
        check_writable("--out", options.out)
    files = [argument for file in options.config or [] for argument in ("--config", file)]
    return options, parse_run_config([*files, *rest], _PROG)


def _measure(run: ResolvedRun, process: ProcessInfo, options: argparse.Namespace) -> StepReport:
    from jmvae_dist.training.assembly import start_run
    from jmvae_dist.training.benchmark import RankMeasurement, make_report
    from jmvae_dist.training.recorder import configure_logging

    configure_logging(process.rank)
    with (
        ExitStack() as stack,
        start_run(run, process) as runtime,
    ):
        # By rank 0 alone, and removed when no rank waits for it any more.
        folder = runtime.collectives.on_main(
            lambda: stack.enter_context(tempfile.TemporaryDirectory(prefix="jmvae-bench-"))
        )
        own = _measure_rank(run, runtime, Path(folder), options)
        ranks = [RankMeasurement.from_json(rank) for rank in runtime.collectives.gather(dataclasses.asdict(own))]
        return make_report(run, ranks, is_on_gpu=runtime.device.type == "cuda")


def _measure_rank(run: ResolvedRun, runtime: Runtime, folder: Path, options: argparse.Namespace) -> RankMeasurement:
    """In a function of its own, which is left also with an error: the engine has to go before the process group."""
    from jmvae_dist.training.benchmark import StepBenchmark

    benchmark = StepBenchmark(run, runtime, folder)
    if runtime.is_main:
        print(runtime.describe(benchmark.engine), flush=True)
    return benchmark.measure(options.steps, options.warmup)


def render(report: StepReport) -> str:
    """The report as text for people."""
    first = report.ranks[0]
    facts = {
        "samples/s": [
            f"{report.samples_per_s:,.0f} at typical steps, {report.samples_per_s / len(report.ranks):,.0f} per "
            f"process; {report.samples_per_s_overall:,.0f} over all measured steps"
        ],
        "FLOP/s": _describe_arithmetic(first, report.recomputes),
        "memory": [_describe_memory(report)],
        "threads": [f"{first.threads} in this process, which may use {first.cores:g} core(s)"],
    }
    lines = ["", *_table(report), ""]
    for name, texts in facts.items():
        lines += [f"{label:<11}{text}" for label, text in zip((name, *[""] * len(texts)), texts, strict=False)]
    lines += ["", "what to change first"]
    for number, line in enumerate(report.advice, start=1):
        lines += textwrap.wrap(line, _WIDTH, initial_indent=f"{number:>3}. ", subsequent_indent=" " * 5)
    if not report.advice:
        lines.append("     nothing stands out; training.profile_steps shows the operators of a step")
    return "\n".join(lines)


def _table(report: StepReport) -> list[str]:
    """One line per part that takes time, and the step that they add up to."""
    split = report.ranks[0].split
    has_peers = len(report.ranks) > 1
    lines = [
        f"{'ms':<20}{'typical':>10}{'share':>8}{'median':>10}{'p90':>10}" + ("   slowest rank" if has_peers else "")
    ]
    for name, part in (*split.parts.items(), ("step", split.step)):
        if part.typical_s == part.p90_s == 0.0:
            continue
        line = f"{name:<20}{part.typical_s * 1e3:>10.2f}{part.typical_s / split.step.typical_s:>8.1%}"
        line += f"{part.median_s * 1e3:>10.2f}{part.p90_s * 1e3:>10.2f}"
        lines.append(line + (f"{report.slowest_s[name] * 1e3:>15.2f}" if has_peers else ""))
    return lines


def _describe_arithmetic(rank: RankMeasurement, recomputes: bool) -> list[str]:
    square = rank.square_flops_per_s
    if rank.flops is None:
        return [
            f"not counted: a network cannot be run without values ({rank.flops_problem})",
            f"{_giga(square)} in a large square product",
        ]
    rate = rank.flops / rank.split.step.typical_s
    included = ", recomputation included (training.activation_checkpointing)" if recomputes else ""
    lines = [
        f"{_giga(rate)} per process: {rank.flops / 1e9:,.2f} GFLOP in a step{included}",
        f"{_giga(square)} in a large square product, of which that is {rate / square:.0%}",
    ]
    if rank.product_flops:
        own, part = rank.product_flops / rank.product_s, rank.product_flops / rank.flops
        lines.append(f"{_giga(own)} in the model's own matrix products alone, which are {part:.0%} of the arithmetic")
    return lines


def _giga(flops_per_s: float) -> str:
    return f"{flops_per_s / 1e9:,.1f} G"


def _describe_memory(report: StepReport) -> str:
    from jmvae_dist.progress import format_bytes

    rss = [rank.rss_bytes for rank in report.ranks]
    text = f"{format_bytes(max(rss))} of the process at its peak"
    device = [rank.device_bytes for rank in report.ranks if rank.device_bytes is not None]
    if device:
        text += f", {format_bytes(max(device))} on the device"
    return text + (" (the largest of all processes)" if len(rss) > 1 else "")


def _write(path: Path, report: StepReport, run: ResolvedRun) -> None:
    import torch

    from jmvae_dist.training.state import write_json

    values: dict[str, Any] = {
        "torch": torch.__version__,
        **dataclasses.asdict(report),
        "config": to_plain(run.config),
    }
    try:
        write_json(path, values)
    except OSError as error:
        raise ConfigError(f"--out: {path} cannot be written ({error.strerror})") from None

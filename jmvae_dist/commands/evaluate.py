"""`jmvae-dist evaluate`: metrics of a run or checkpoint on held-out shards, by any number of processes."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jmvae_dist.commands.cli import add_cache_option, add_device_option, add_trust_option, find_device, make_parser
from jmvae_dist.commands.evaluate_results import keep_in_run, show_results
from jmvae_dist.commands.evaluate_task import Task, prepare
from jmvae_dist.errors import ConfigError

if TYPE_CHECKING:
    from jmvae_dist.distributed.runtime import Runtime

DEFAULT_METRICS = ("elbo", "accuracy", "joint_nll", "reconstruction", "latents")
METRICS = (*DEFAULT_METRICS, "marginal_nll", "conditional_nll", "coherence", "probe", "frechet")
# While one rank trains a classifier, the others wait for it.
_PATIENCE_S = 6 * 3600.0


def main(arguments: list[str]) -> int:
    """Evaluate and print a table; rank 0 also writes `--out`, logs to the run and draws."""
    options = _parse(arguments)
    from jmvae_dist.data.urls import shown
    from jmvae_dist.distributed.environment import detect_process
    from jmvae_dist.distributed.runtime import start_runtime

    process = detect_process()
    find_device(options.device)  # refuses what is not there, before processes meet
    with start_runtime(process, device=options.device, patience_s=_PATIENCE_S) as runtime:
        task = prepare(options, runtime)
        metrics, details = _evaluate(task, runtime)
        result = {
            "global_step": task.described.global_step,
            "checkpoint": str(task.checkpoint),
            "manifest": shown(task.data.manifest.path),
            "num_samples": task.data.manifest.num_samples,
            "seed": options.seed,
            "joint_nll_samples": options.joint_nll_samples if _has_nll(task.options.metrics) else 0,
            "skipped": task.skipped,
            "class_names": task.class_names,
            "metrics": metrics,
            "details": details,
        }
        runtime.collectives.on_main(lambda: show_results(result, task.model.modalities, options.out))
        keep_in_run(options, task, runtime, result)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = make_parser("jmvae-dist evaluate", "Metrics of a run or checkpoint on held-out shards.")
    parser.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--manifest", required=True, help="held-out shards: path or URL of a manifest.json")
    add_cache_option(parser)
    parser.add_argument(
        "--metrics",
        default="default",
        help=f"default ({','.join(DEFAULT_METRICS)}), all that the data supports, or names from {','.join(METRICS)}",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the result there")
    parser.add_argument(
        "--figures",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="DIR",
        help="also draw figures (default: RUN/figures, which the report shows, for what is logged to the run)",
    )
    parser.add_argument(
        "--no-log", action="store_true", help="do not log the results to the run's metrics.jsonl and W&B"
    )
    parser.add_argument("--batch-size", type=int, default=256, help="samples per forward pass (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    add_device_option(parser)
    _add_likelihood_options(parser)
    _add_classifier_options(parser)
    add_trust_option(parser)
    options = parser.parse_args(arguments)
    _check_options(options)
    return options


def _add_likelihood_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("likelihoods")
    group.add_argument("--joint-nll-samples", type=int, default=1000, metavar="K", help="draws; default: 1000")
    group.add_argument(
        "--marginal-proposal",
        choices=("joint", "unimodal", "both"),
        default="both",
        help="whose posterior the draws of marginal_nll come from (default: both)",
    )
    group.add_argument("--memory-budget-bytes", type=int, metavar="N", help="for decoding the draws")


def _add_classifier_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("coherence, probe and frechet")
    group.add_argument("--label", metavar="MODALITY", help="with the classes (default: the only one of encoding cls)")
    group.add_argument("--train-manifest", metavar="M", help="training shards (default: the run's)")
    group.add_argument("--max-subset-size", type=int, metavar="N", help="leave larger subsets of modalities out")
    group.add_argument("--classifier-steps", type=int, default=2000, metavar="N", help="default: 2000")
    group.add_argument("--prior-samples", type=int, default=10_000, metavar="N", help="default: 10000")
    group.add_argument("--probe-samples", type=int, default=10_000, metavar="N", help="at most; default: 10000")
    for name, meaning in (("classifier", "logits"), ("feature-extractor", "features")):
        group.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="MODALITY=MODULE.CLASS[:JSON]",
            help=f"a torch module of yours, values -> {meaning}, with its arguments; name it in --trust-class too",
        )


def _check_options(options: argparse.Namespace) -> None:
    names = [name.strip() for name in options.metrics.split(",") if name.strip()]
    options.is_explicit = names not in (["default"], ["all"])
    chosen = {"default": DEFAULT_METRICS, "all": METRICS}.get(options.metrics.strip(), tuple(names))
    unknown = [name for name in chosen if name not in METRICS]
    if unknown or not chosen:
        allowed = ",".join(("default", "all", *METRICS))
        raise ConfigError(f"--metrics: {unknown or 'nothing'} is not allowed; choose from {allowed}")
    options.metrics = tuple(name for name in METRICS if name in chosen)
    for name in (
        *("joint_nll_samples", "batch_size", "classifier_steps", "probe_samples", "max_subset_size"),
        "memory_budget_bytes",
    ):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: {value} must be at least 1")
    if options.prior_samples < 2:
        raise ConfigError(f"--prior-samples: {options.prior_samples} must be at least 2")
    if not options.path.is_dir():
        raise ConfigError(f"{options.path}: no such directory; give a run directory or a checkpoint")
    if not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed: {options.seed} must be between 0 and 2^63 - 1")


def _has_nll(metrics: tuple[str, ...]) -> bool:
    return any(name.endswith("_nll") for name in metrics)


def _evaluate(task: Task, runtime: Runtime) -> tuple[dict[str, float], dict[str, Any]]:
    from jmvae_dist.evaluation.suite import run_suite
    from jmvae_dist.progress import progress

    world_size = runtime.process.world_size
    with ExitStack() as stack:
        advance = None
        if runtime.is_main:
            # Shares are equal to one sample, and rank 0 has a smallest one: its progress is that of all.
            advance = stack.enter_context(progress(task.data.manifest.num_samples // world_size, "evaluating"))
        results, details = run_suite(
            task.model,
            task.data,
            task.options,
            runtime.collectives,
            task.networks,
            say=lambda text: print(text, file=sys.stderr, flush=True),
            progress=advance,
        )
    return {f"eval/{key}": value for key, value in results.items()}, details

"""`jmvae-dist evaluate`: metrics of a run or checkpoint on held-out shards, by any number of processes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jmvae_dist.commands.cli import add_cache_option, add_trust_option, check_writable, make_parser, remote_access
from jmvae_dist.errors import ConfigError

if TYPE_CHECKING:
    from jmvae_dist.data.manifest import Manifest
    from jmvae_dist.data.views import View
    from jmvae_dist.distributed.runtime import Runtime
    from jmvae_dist.model import JMVAE

METRICS = ("elbo", "accuracy", "joint_nll")


def main(arguments: list[str]) -> int:
    """Evaluate and print a table; rank 0 also writes `--out`."""
    options = _parse(arguments)
    from jmvae_dist.checkpoint.export import model_from_checkpoint
    from jmvae_dist.checkpoint.layout import find_intact, read_manifest
    from jmvae_dist.data.manifest import Manifest
    from jmvae_dist.data.urls import shown
    from jmvae_dist.distributed.environment import detect_process
    from jmvae_dist.distributed.runtime import check_device, start_runtime
    from jmvae_dist.training.setup import evaluation_views
    from jmvae_dist.training.state import write_json

    process = detect_process()
    if options.device == "cuda":
        check_device(options.device)
    with start_runtime(process, device=options.device) as runtime:
        collectives = runtime.collectives
        # Rank 0 chooses and checks: a checkpoint that is being written could look different to another rank.
        checkpoint = Path(collectives.on_main(lambda: str(find_intact(options.path)[0])))
        with collectives.together():
            manifest = Manifest.load(options.manifest)
            described = read_manifest(checkpoint)
            views = evaluation_views(described.modalities, manifest, "--manifest", trusted=options.trust_class)
            model = model_from_checkpoint(checkpoint, described, trusted=options.trust_class).to(runtime.device)
            _check_metrics(options.metrics, model)
        metrics = _evaluate(options, runtime, model, manifest, views)
        if runtime.is_main:
            result = {
                "global_step": described.global_step,
                "checkpoint": str(checkpoint),
                "manifest": shown(manifest.path),
                "num_samples": manifest.num_samples,
                "seed": options.seed,
                "joint_nll_samples": options.joint_nll_samples if "joint_nll" in options.metrics else 0,
                "metrics": metrics,
            }
            _show(result)
            if options.out is not None:
                write_json(options.out, result)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = make_parser("jmvae-dist evaluate", "Metrics of a run or checkpoint on held-out shards.")
    parser.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--manifest", required=True, help="held-out shards: path or URL of a manifest.json")
    add_cache_option(parser)
    parser.add_argument("--metrics", default=",".join(METRICS), help=f"from {','.join(METRICS)} (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the result there")
    parser.add_argument("--joint-nll-samples", type=int, default=1000, metavar="K", help="default: 1000")
    parser.add_argument("--batch-size", type=int, default=256, help="samples per forward pass (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add_trust_option(parser)
    options = parser.parse_args(arguments)
    options.metrics = [name for name in options.metrics.split(",") if name]
    unknown = [name for name in options.metrics if name not in METRICS]
    if unknown or not options.metrics:
        raise ConfigError(f"--metrics: {unknown or 'nothing'} is not allowed; choose from {','.join(METRICS)}")
    for name in ("joint_nll_samples", "batch_size"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: {getattr(options, name)} must be at least 1")
    if not options.path.is_dir():
        raise ConfigError(f"{options.path}: no such directory; give a run directory or a checkpoint")
    if not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed: {options.seed} must be between 0 and 2^63 - 1")
    if options.out is not None:
        check_writable("--out", options.out)
    return options


def _check_metrics(metrics: list[str], model: JMVAE) -> None:
    if metrics == ["accuracy"] and not any(item.name == "categorical" for item in model.likelihoods.values()):
        raise ConfigError("--metrics: accuracy needs a categorical modality, and the model has none")


def _evaluate(
    options: argparse.Namespace, runtime: Runtime, model: JMVAE, manifest: Manifest, views: Sequence[View]
) -> dict[str, float]:
    from jmvae_dist.data.loader import decode_threads
    from jmvae_dist.evaluation.runner import evaluate_together
    from jmvae_dist.progress import progress

    world_size = runtime.process.world_size
    with ExitStack() as stack:
        advance = None
        if runtime.is_main:
            # Shares are equal to one sample, and rank 0 has a smallest one: its progress is that of all.
            advance = stack.enter_context(progress(manifest.num_samples // world_size, "evaluating"))
        metrics = evaluate_together(
            model,
            manifest,
            views,
            runtime.collectives,
            batch_size=options.batch_size,
            seed=options.seed,
            access=remote_access(options),
            joint_nll_samples=options.joint_nll_samples if "joint_nll" in options.metrics else 0,
            threads=decode_threads(None, workers=0),
            progress=advance,
        )
    groups = {key: _group_of(key) for key in metrics}
    return {key: value for key, value in metrics.items() if groups[key] in options.metrics or groups[key] is None}


def _group_of(key: str) -> str | None:
    """The member of METRICS that a result belongs to; None for the number of samples."""
    if key == "eval/samples":
        return None
    if key.startswith("eval/accuracy/"):
        return "accuracy"
    return "joint_nll" if key.startswith(("eval/joint_nll", "eval/marginal_nll")) else "elbo"


def _show(result: dict[str, Any]) -> None:
    print(f"step {result['global_step']}, {result['num_samples']:,} samples of {result['manifest']}")
    width = max(len(key) for key in result["metrics"])
    for key, value in result["metrics"].items():
        print(f"  {key:<{width}}  {value:.6g}")
    sys.stdout.flush()

"""`jmvae-dist evaluate`: metrics of a run or checkpoint on held-out shards, by any number of processes."""

from __future__ import annotations

import argparse
import hashlib
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jmvae_dist.commands.cli import add_cache_option, add_trust_option, check_writable, make_parser, remote_access
from jmvae_dist.errors import ConfigError, DataError, LaunchError

if TYPE_CHECKING:
    from torch import nn

    from jmvae_dist.checkpoint.layout import CheckpointManifest
    from jmvae_dist.data.manifest import Manifest
    from jmvae_dist.distributed.collectives import Collectives
    from jmvae_dist.distributed.runtime import Runtime
    from jmvae_dist.evaluation.suite import SuiteData, SuiteNetworks, SuiteOptions
    from jmvae_dist.model import JMVAE

DEFAULT_METRICS = ("elbo", "accuracy", "joint_nll", "reconstruction", "latents")
METRICS = (*DEFAULT_METRICS, "marginal_nll", "conditional_nll", "coherence", "probe", "frechet")
# These compare with, or learn from, training data.
_TRAINED = {"coherence", "probe", "frechet"}
# While one rank trains a classifier, the others wait for it.
_PATIENCE_S = 6 * 3600.0


def main(arguments: list[str]) -> int:
    """Evaluate and print a table; rank 0 also writes `--out`, logs to the run and draws."""
    options = _parse(arguments)
    from jmvae_dist.data.urls import shown
    from jmvae_dist.distributed.environment import detect_process
    from jmvae_dist.distributed.runtime import check_device, start_runtime

    process = detect_process()
    if options.device == "cuda":
        check_device(options.device)
    with start_runtime(process, device=options.device, patience_s=_PATIENCE_S) as runtime:
        task = _prepare(options, runtime)
        metrics, details = _evaluate(task, runtime)
        result = {
            "global_step": task.described.global_step,
            "checkpoint": str(task.checkpoint),
            "manifest": shown(task.data.manifest.path),
            "num_samples": task.data.manifest.num_samples,
            "seed": options.seed,
            "joint_nll_samples": options.joint_nll_samples if _has_nll(task.options.metrics) else 0,
            "skipped": task.skipped,
            "metrics": metrics,
            "details": details,
        }
        runtime.collectives.on_main(lambda: _show(result, options.out))
        _keep_in_run(options, task, runtime, result)
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
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
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


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()


def _has_nll(metrics: tuple[str, ...]) -> bool:
    return any(name.endswith("_nll") for name in metrics)


@dataclass(frozen=True)
class _Task:
    """What is evaluated, on what, and how."""

    checkpoint: Path
    described: CheckpointManifest
    model: JMVAE
    data: SuiteData
    networks: SuiteNetworks
    options: SuiteOptions
    skipped: dict[str, str]
    place: _Place


@dataclass(frozen=True)
class _Place:
    """Where the results go, as rank 0 decides.

    Attributes:
        run_dir: The run that the checkpoint belongs to; None: it belongs to none.
        figures: Where to draw; None: nowhere.
        why_not_logged: Why the results do not become part of the run's record; empty: they do.
    """

    run_dir: Path | None
    figures: Path | None
    why_not_logged: str

    @property
    def draws_into_run(self) -> bool:
        """Whether the figures are those that the run's report shows."""
        return self.run_dir is not None and self.figures == self.run_dir / "figures"


def _prepare(options: argparse.Namespace, runtime: Runtime) -> _Task:
    from jmvae_dist.checkpoint.export import model_from_checkpoint
    from jmvae_dist.checkpoint.layout import MANIFEST_NAME, read_manifest
    from jmvae_dist.evaluation.suite import SuiteOptions, check_networks

    collectives = runtime.collectives
    # Rank 0 chooses and checks: a checkpoint that is being written could look different to another rank.
    checkpoint = Path(collectives.on_main(lambda: _find_checkpoint(options)))
    with collectives.together():
        described = read_manifest(checkpoint)
        seal = hashlib.sha256((checkpoint / MANIFEST_NAME).read_bytes()).hexdigest()
    collectives.require_equal(str(checkpoint), f"sha256 {seal}")
    manifest, train_manifest = _load_manifests(options, described, collectives)
    run_dir, figures, why_not_logged = collectives.on_main(lambda: _find_place(options, described, manifest))
    place = _Place(_path(run_dir), _path(figures), why_not_logged)
    with collectives.together():
        data, reasons = _find_data(options, described, manifest, train_manifest)
        model = model_from_checkpoint(checkpoint, described, trusted=options.trust_class).to(runtime.device)
        networks = _user_networks(options, model, place.run_dir)
        metrics, skipped = _supported(options, model, data, networks, reasons)
        check_networks(model, data, networks, metrics)
        suite_options = SuiteOptions(
            metrics=metrics,
            seed=options.seed,
            batch_size=options.batch_size,
            num_draws=options.joint_nll_samples,
            memory_budget_bytes=options.memory_budget_bytes,
            marginal_proposal=options.marginal_proposal,
            max_subset_size=options.max_subset_size,
            num_prior_samples=options.prior_samples,
            num_probe_samples=options.probe_samples,
            classifier_steps=options.classifier_steps,
        )
    return _Task(checkpoint, described, model, data, networks, suite_options, skipped, place)


def _find_checkpoint(options: argparse.Namespace) -> str:
    from jmvae_dist.checkpoint.layout import find_intact

    if options.out is not None:
        check_writable("--out", options.out)
    return str(find_intact(options.path)[0])


def _load_manifests(
    options: argparse.Namespace, described: CheckpointManifest, collectives: Collectives
) -> tuple[Manifest, Manifest | None]:
    """The held-out shards and, if they are wanted and rank 0 finds them, the training shards; equal on all ranks.

    What can be measured follows from these: ranks that saw others would not compute the same together.

    Raises:
        ConfigError, DataError: Some rank cannot read a manifest, or reads another than rank 0; on every rank.
    """
    with collectives.together():
        manifest = _load_manifest(options.manifest)
    collectives.require_equal("--manifest", f"fingerprint {manifest.fingerprint}")
    train_path = collectives.on_main(lambda: _find_train_manifest(options, described))
    if train_path is None:
        return manifest, None
    with collectives.together():
        train_manifest = _load_manifest(train_path)
    collectives.require_equal("--train-manifest", f"fingerprint {train_manifest.fingerprint}")
    return manifest, train_manifest


def _find_train_manifest(options: argparse.Namespace, described: CheckpointManifest) -> str | None:
    from jmvae_dist.data.urls import is_remote

    path = described.config["data"]["train_manifest"]
    if options.train_manifest is not None or not _TRAINED & set(options.metrics):
        return options.train_manifest
    return path if is_remote(path) or Path(path).expanduser().is_file() else None


def _load_manifest(path: str) -> Manifest:
    from jmvae_dist.data.manifest import Manifest
    from jmvae_dist.data.urls import is_remote

    return Manifest.load(path if is_remote(path) else Path(path).expanduser())


def _find_place(
    options: argparse.Namespace, described: CheckpointManifest, manifest: Manifest
) -> tuple[str | None, str | None, str]:
    """The fields of `_Place`, as JSON values.

    Raises:
        ConfigError: The figures would go to the run, whose newest state they do not show.
    """
    from jmvae_dist.checkpoint.layout import list_checkpoints, step_of

    candidates = (options.path, options.path.resolve().parent.parent)
    run_dir = next((folder for folder in candidates if _is_run(folder)), None)
    if run_dir is None:
        reason = f"{options.path} belongs to no run directory"
    else:
        reason = "--no-log" if options.no_log else _why_foreign(described, manifest)
    if options.figures is None or options.figures != Path():
        return _text(run_dir), _text(options.figures), reason
    hindrance = reason
    if run_dir is not None and run_dir != options.path:
        checkpoints = list_checkpoints(run_dir / "checkpoints")
        newest = max((step_of(item.name) for item in checkpoints), default=0)
        if newest > described.global_step:
            hindrance = hindrance or f"the run has a checkpoint of step {newest}"
    if run_dir is None or hindrance:
        raise ConfigError(
            f"--figures: RUN/figures shows the run's newest state on its own held-out data, not this ({hindrance}); "
            "give a directory for the figures"
        )
    return _text(run_dir), _text(run_dir / "figures"), reason


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _why_foreign(described: CheckpointManifest, manifest: Manifest) -> str:
    """Why these are not the run's own held-out data; empty if they are."""
    path = described.config["data"]["eval_manifest"]
    if path is None:
        return "the run has no held-out shards of its own (data.eval_manifest)"
    try:
        own = _load_manifest(path)
    except (ConfigError, DataError) as error:
        return f"its own held-out shards cannot be read ({error})"
    return "" if own.fingerprint == manifest.fingerprint else f"its own held-out shards are {path}"


def _find_data(
    options: argparse.Namespace, described: CheckpointManifest, manifest: Manifest, train_manifest: Manifest | None
) -> tuple[SuiteData, dict[str, str]]:
    """The data, and by option why what it names is not there."""
    from jmvae_dist.data.loader import decode_threads
    from jmvae_dist.evaluation.suite import SuiteData, find_label
    from jmvae_dist.training.setup import evaluation_views

    trusted = options.trust_class
    views = evaluation_views(described.modalities, manifest, "--manifest", trusted=trusted)
    label, no_label = find_label(manifest, views, options.label)
    reasons = {"--label": no_label, "--train-manifest": ""}
    train_views, train_label = None, None
    if train_manifest is not None:
        reasons["--train-manifest"] = _why_not_for_training(options, described, train_manifest, manifest)
    if label is None or reasons["--train-manifest"]:
        train_manifest = None
    if train_manifest is not None and label is not None:
        train_views = evaluation_views(described.modalities, train_manifest, "--train-manifest", trusted=trusted)
        train_label, _ = find_label(train_manifest, train_views, label.name)
    data = SuiteData(
        manifest,
        views,
        label,
        train_manifest,
        train_views or (),
        train_label,
        threads=decode_threads(None, workers=0),
        access=remote_access(options),
    )
    return data, reasons


def _why_not_for_training(
    options: argparse.Namespace, described: CheckpointManifest, train_manifest: Manifest, manifest: Manifest
) -> str:
    """Why classifiers and probes must not be trained on these shards; empty if they may."""
    from jmvae_dist.data.urls import shown
    from jmvae_dist.training.setup import find_shared_shard

    trained_on = described.data_state["manifest_fingerprint"]
    if options.train_manifest is None and train_manifest.fingerprint != trained_on:
        return f"{shown(train_manifest.path)} is not what the model was trained on"
    shared = find_shared_shard(train_manifest, manifest)
    return "" if shared is None else f"shard {shared} of --manifest is one of them, and so not held-out"


def _user_networks(options: argparse.Namespace, model: JMVAE, run_dir: Path | None) -> SuiteNetworks:
    from jmvae_dist.evaluation.suite import SuiteNetworks
    from jmvae_dist.evaluation.user_networks import build_user_network, parse_user_networks

    def build(option: str, entries: list[str]) -> dict[str, nn.Module]:
        parsed = parse_user_networks(option, entries, model.modalities, options.trust_class)
        return {network.modality: build_user_network(option, network) for network in parsed}

    return SuiteNetworks(
        classifiers=build("--classifier", options.classifier),
        extractors=build("--feature-extractor", options.feature_extractor),
        folder=None if run_dir is None else run_dir / "evaluation",
    )


def _supported(
    options: argparse.Namespace, model: JMVAE, data: SuiteData, networks: SuiteNetworks, missing: dict[str, str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The metrics to compute, and those of `all` or `default` that cannot be, with the reason.

    Raises:
        ConfigError: A metric that was asked for by name cannot be computed.
    """
    from jmvae_dist.evaluation.suite import unsupported

    reasons = {name: unsupported(name, model, data, networks, options.max_subset_size) for name in options.metrics}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    for option, why in missing.items():
        if why:
            skipped = {name: reason.replace(f"({option})", f"({option}): {why}") for name, reason in skipped.items()}
    if skipped and options.is_explicit:
        name, reason = next(iter(skipped.items()))
        raise ConfigError(f"--metrics: {name} {reason}")
    return tuple(name for name in options.metrics if name not in skipped), skipped


def _evaluate(task: _Task, runtime: Runtime) -> tuple[dict[str, float], dict[str, Any]]:
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


def _show(result: dict[str, Any], out: Path | None) -> None:
    from jmvae_dist.evaluation.table import format_results
    from jmvae_dist.training.state import write_json

    print(f"step {result['global_step']}, {result['num_samples']:,} samples of {result['manifest']}")
    print(format_results(result["metrics"]))
    for name, reason in result["skipped"].items():
        print(f"left out: {name} {reason}")
    unreliable = max(
        (value for key, value in result["metrics"].items() if "_unreliable_fraction" in key), default=0.0
    )
    if unreliable > 0:
        print(
            f"up to {100 * unreliable:.1f} % of the samples have likelihoods that few draws carry "
            "(see *_unreliable_fraction): raise --joint-nll-samples, or do not rely on them"
        )
    sys.stdout.flush()
    if out is not None:
        write_json(out, result)


def _keep_in_run(options: argparse.Namespace, task: _Task, runtime: Runtime, result: dict[str, Any]) -> None:
    """Draw, and add the results to the run's record, to W&B and to its report, if they are about its own data.

    Raises:
        Exception: Whatever went wrong with the figures; the results are logged all the same.
    """
    from jmvae_dist.training.state import locked_run_directory

    collectives, place, reason = runtime.collectives, task.place, task.place.why_not_logged
    figures: dict[str, Path] = {}
    failure: Exception | None = None
    with ExitStack() as stack:
        if not reason:
            assert place.run_dir is not None
            try:
                stack.enter_context(locked_run_directory(place.run_dir, runtime, "adding an evaluation to"))
            except LaunchError as error:
                reason = str(error)
        if reason and runtime.is_main and place.run_dir is not None and not options.no_log:
            print(f"not logged to {place.run_dir}: {reason}", file=sys.stderr)
        if place.figures is not None and not (reason and place.draws_into_run):
            try:
                with collectives.together():
                    figures = _draw(options, task, place.figures) if runtime.is_main else {}
            except Exception as error:  # whatever a plotting library objects to must not cost the results
                failure = error
        if not reason:
            collectives.on_main(lambda: _append(task, result, figures))
    if failure is not None:
        raise failure


def _draw(options: argparse.Namespace, task: _Task, folder: Path) -> dict[str, Path]:
    from jmvae_dist.evaluation.runner import save_figures
    from jmvae_dist.tracking.jsonl import readable_records

    run_dir = task.place.run_dir
    return save_figures(
        task.model,
        task.data.manifest,
        task.data.views,
        folder,
        num_samples=10,
        seed=options.seed,
        label=task.data.label,
        access=task.data.access,
        records=() if run_dir is None else readable_records(run_dir / "metrics.jsonl"),
    )


def _append(task: _Task, result: dict[str, Any], figures: dict[str, Path]) -> None:
    from jmvae_dist.config import WandbSection
    from jmvae_dist.tracking.jsonl import (
        EVALUATED_BY,
        EVERY_RECORD,
        MetricsLog,
        last_recorded_step,
        newest_values,
        readable_records,
    )
    from jmvae_dist.tracking.wandb import WandbTracker
    from jmvae_dist.training.state import write_json

    run_dir = task.place.run_dir
    assert run_dir is not None
    (run_dir / "evaluation").mkdir(exist_ok=True)
    write_json(run_dir / "evaluation" / "latest.json", result)
    path, run_id = run_dir / "metrics.jsonl", task.described.tracking.get("wandb_run_id")
    record = {"global_step": task.described.global_step, EVALUATED_BY: "evaluate", **result["metrics"]}
    last_step = max(last_recorded_step(path), task.described.global_step)
    with MetricsLog(path, EVERY_RECORD) as log:
        tracker = None
        if run_id is not None:
            tracker = WandbTracker(
                WandbSection(**task.described.config["tracking"]["wandb"]),
                run_dir=run_dir,
                run_id=run_id,
                config=task.described.config,
                resume_step=last_step,
                run_name=run_dir.resolve().name,
                message=lambda text: print(text, file=sys.stderr),
            )
        log.write(record)
        if tracker is not None:
            tracker.log(record)
            tracker.log_figures(last_step, figures)
            # W&B has just taken the values for the newest ones, which those of an older checkpoint are not.
            tracker.finish(newest_values(readable_records(path)))

"""What `jmvae-dist evaluate` is to do: checkpoint, shards, networks that judge, metrics, and the place of results.

All of it is found and checked before anything that takes time. Rank 0 decides what depends on the file system, and
what every rank reads itself is compared: ranks that saw different things would not compute the same together.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jmvae_dist.commands.cli import check_writable, remote_access
from jmvae_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import nn

    from jmvae_dist.checkpoint.layout import CheckpointManifest
    from jmvae_dist.data.manifest import Manifest
    from jmvae_dist.distributed.collectives import Collectives
    from jmvae_dist.distributed.runtime import Runtime
    from jmvae_dist.evaluation.suite_setup import SuiteData, SuiteNetworks, SuiteOptions
    from jmvae_dist.model import JMVAE

# These compare with, or learn from, training data.
_TRAINED = {"coherence", "probe", "frechet"}


@dataclass(frozen=True)
class Task:
    """What is evaluated, on what, and how.

    Attributes:
        checkpoint: Directory of the checkpoint.
        described: Its manifest.
        model: With the checkpoint's weights, on the device of this rank.
        data: Held-out shards, and training shards where a metric learns from them.
        networks: The user's networks that judge.
        options: How to measure, and which metrics.
        skipped: Metrics that were wanted but cannot be computed, with the reason.
        place: Where the results go.
        class_names: By modality, where classes have names.
    """

    checkpoint: Path
    described: CheckpointManifest
    model: JMVAE
    data: SuiteData
    networks: SuiteNetworks
    options: SuiteOptions
    skipped: dict[str, str]
    place: Place
    class_names: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Place:
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


def prepare(options: argparse.Namespace, runtime: Runtime) -> Task:
    """Find and check all that an evaluation needs; the same on every rank.

    Args:
        options: Of the command line, checked as far as they can be alone.
        runtime: All ranks call this together.

    Raises:
        CheckpointError, ConfigError, DataError: Something is missing, damaged, or does not fit; on every rank.
    """
    from jmvae_dist.checkpoint.export import model_from_checkpoint
    from jmvae_dist.checkpoint.layout import MANIFEST_NAME, read_manifest
    from jmvae_dist.data.class_names import class_names
    from jmvae_dist.evaluation.suite_setup import SuiteOptions, check_networks

    collectives = runtime.collectives
    # Rank 0 chooses and checks: a checkpoint that is being written could look different to another rank.
    checkpoint = Path(collectives.on_main(lambda: _find_checkpoint(options)))
    with collectives.together():
        described = read_manifest(checkpoint)
        seal = hashlib.sha256((checkpoint / MANIFEST_NAME).read_bytes()).hexdigest()
    collectives.require_equal(str(checkpoint), f"sha256 {seal}")
    manifest, train_manifest = _load_manifests(options, described, collectives)
    run_dir, figures, why_not_logged = collectives.on_main(lambda: _find_place(options, described, manifest))
    place = Place(_path(run_dir), _path(figures), why_not_logged)
    with collectives.together():
        names = class_names(described.modalities, manifest)
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
    return Task(checkpoint, described, model, data, networks, suite_options, skipped, place, names)


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
    """The fields of `Place`, as JSON values.

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


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()


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
    from jmvae_dist.evaluation.suite_setup import SuiteData, find_label
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
    from jmvae_dist.evaluation.suite_setup import SuiteNetworks
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
    from jmvae_dist.evaluation.suite_setup import unsupported

    reasons = {name: unsupported(name, model, data, networks, options.max_subset_size) for name in options.metrics}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    for option, why in missing.items():
        if why:
            skipped = {name: reason.replace(f"({option})", f"({option}): {why}") for name, reason in skipped.items()}
    if skipped and options.is_explicit:
        name, reason = next(iter(skipped.items()))
        raise ConfigError(f"--metrics: {name} {reason}")
    return tuple(name for name in options.metrics if name not in skipped), skipped

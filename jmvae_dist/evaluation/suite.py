"""The evaluation suite: metrics by name, what each of them needs, and their computation by all ranks together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jmvae_dist.data.loader import Batch, EvaluationLoader
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.store import RemoteAccess
from jmvae_dist.data.views import View
from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.errors import ConfigError
from jmvae_dist.evaluation.classifier import (
    FEATURES,
    Classifier,
    describe,
    file_of,
    load_classifier,
    load_weights_vector,
    make_classifier,
    save_classifier,
    train_classifier,
    weights_vector,
)
from jmvae_dist.evaluation.coherence import Accuracy, Coherence
from jmvae_dist.evaluation.evaluate import details_of, evaluate_batches, evaluate_prior, results_of
from jmvae_dist.evaluation.frechet import FrechetDistance
from jmvae_dist.evaluation.latents import Latents
from jmvae_dist.evaluation.likelihood import (
    ElboTerms,
    Estimand,
    ImportanceSampling,
    Proposal,
    conditional_estimands,
    joint_estimand,
    marginal_estimands,
)
from jmvae_dist.evaluation.metrics import Metric, device_of, load_vector, vector_of
from jmvae_dist.evaluation.posteriors import Subset, subsets_of
from jmvae_dist.evaluation.probe import CollectedPosteriors, Probe, ProbeAccuracy, fit_probe
from jmvae_dist.evaluation.reconstruction import Reconstruction, shows_picture
from jmvae_dist.evaluation.sound_samples import sound_batches
from jmvae_dist.model import JMVAE

# With more modalities, somebody has to say which subsets are worth their time.
_MOST_MODALITIES_FOR_ALL_SUBSETS = 8
# Samples for which a user's network is tried: more than one, which many shapes fit.
_TRIED = 2


@dataclass(frozen=True)
class SuiteOptions:
    """How to measure.

    Attributes:
        metrics: Names; see docs/evaluation.md.
        seed: Of all noise, and of the order in which classifiers see their data.
        batch_size: Samples per forward pass on one rank.
        num_draws: K of the likelihoods.
        memory_budget_bytes: For decoding the draws; None: a default by device.
        marginal_proposal: Whose posterior the draws of `marginal_nll` come from.
        max_subset_size: Larger subsets of modalities are left out; None: none is.
        num_prior_samples: For coherence and Frechet distance.
        num_probe_samples: At most this many training samples are used for the probes.
        classifier_steps: Optimizer steps of a classifier.
    """

    metrics: tuple[str, ...]
    seed: int = 0
    batch_size: int = 256
    num_draws: int = 1000
    memory_budget_bytes: int | None = None
    marginal_proposal: Proposal = "both"
    max_subset_size: int | None = None
    num_prior_samples: int = 10_000
    num_probe_samples: int = 10_000
    classifier_steps: int = 2000


@dataclass(frozen=True)
class SuiteData:
    """What to measure on.

    Attributes:
        manifest: Held-out shards.
        views: The model's modalities in them.
        label: The one-hot modality with the classes, one of `views` or another one; None: there is none.
        train_manifest: Training shards, for classifiers and probes; None: there are none.
        train_views, train_label: As above, in the training shards.
        threads: Threads that decode images.
        access: How remote shards are read.
    """

    manifest: Manifest
    views: tuple[View, ...]
    label: View | None = None
    train_manifest: Manifest | None = None
    train_views: tuple[View, ...] = ()
    train_label: View | None = None
    threads: int = 1
    access: RemoteAccess | None = None

    def all_views(self) -> list[View]:
        """Of the held-out shards, with the label."""
        return with_label(self.views, self.label)


@dataclass
class SuiteNetworks:
    """Networks that judge, by modality.

    Attributes:
        classifiers: (B, *shape) -> logits (B, num_classes); the user's, to which the suite adds its own.
        extractors: (B, *shape) -> features (B, F), the user's.
        folder: Where the suite's own classifiers are kept; None: nowhere.
    """

    classifiers: dict[str, nn.Module] = field(default_factory=dict)
    extractors: dict[str, nn.Module] = field(default_factory=dict)
    folder: Path | None = None


def find_label(manifest: Manifest, views: Sequence[View], name: str | None) -> tuple[View | None, str]:
    """The modality with the classes, and if there is none, why.

    Args:
        manifest: Shards.
        views: The model's modalities in them.
        name: The user's choice; None: the only modality of encoding `cls`.

    Raises:
        ConfigError: The user's choice does not exist or does not hold one class per sample.
    """
    candidates = [modality for modality in manifest.modalities if modality.encoding == "cls"]
    if name is None and len(candidates) != 1:
        found = ", ".join(modality.name for modality in candidates)
        return None, f"the data has no class labels (encoding cls){'' if not found else ' but several: ' + found}"
    seen = {view.name: view for view in views}
    for modality in manifest.modalities:
        if modality.name == (name or candidates[0].name):
            view = seen.get(modality.name) or View(modality)
            if len(view.shape) != 1:
                raise ConfigError(f"--label: {modality.name} has shape {list(view.shape)}, not one class per sample")
            return view, ""
    available = ", ".join(modality.name for modality in manifest.modalities)
    raise ConfigError(f"--label: no modality {name!r}; the shards have {available}")


def with_label(views: Sequence[View], label: View | None) -> list[View]:
    """The views, and the label's where it is not one of them."""
    return [*views, *([label] if label is not None and label.name not in {view.name for view in views} else [])]


def unsupported(
    name: str, model: JMVAE, data: SuiteData, networks: SuiteNetworks, max_subset_size: int | None
) -> str:
    """Why a metric cannot be computed; empty if it can."""
    has_label = data.label is not None
    can_train = has_label and data.train_manifest is not None
    needs_training = "needs the training shards (--train-manifest)" if has_label else "needs class labels (--label)"
    many = len(model.modalities) > _MOST_MODALITIES_FOR_ALL_SUBSETS and max_subset_size is None
    if name in ("coherence", "probe") and many:
        return f"has {2 ** len(model.modalities)} subsets of modalities to look at; set --max-subset-size"
    if name == "accuracy" and not any(item.name == "categorical" for item in model.likelihoods.values()):
        return "needs a categorical modality, and the model has none"
    if name == "coherence" and not (can_train or (has_label and networks.classifiers)):
        return needs_training
    if name == "probe" and not can_train:
        return needs_training
    if name == "frechet" and not (can_train or networks.classifiers or networks.extractors):
        return f"{needs_training}, or a feature extractor (--feature-extractor)"
    return ""


def check_networks(model: JMVAE, data: SuiteData, networks: SuiteNetworks, metrics: Sequence[str]) -> None:
    """Try the user's networks on two samples, before anything that takes time.

    Raises:
        ConfigError: One of them fails, or does not return what these metrics need of it.
    """
    for network in (*networks.classifiers.values(), *networks.extractors.values()):
        network.to(device_of(model))
    if "coherence" in metrics and data.label is not None:
        wanted = (_TRIED, data.label.shape[0])
        for name, network in networks.classifiers.items():
            logits = _try(model, f"--classifier {name}", network, name)
            if tuple(logits.shape) != wanted:
                raise ConfigError(
                    f"--classifier {name}: for {_TRIED} samples it returns {tuple(logits.shape)}, and logits of the "
                    f"label {data.label.name} are {wanted}"
                )
    if "frechet" in metrics:
        for option, given in (("--classifier", networks.classifiers), ("--feature-extractor", networks.extractors)):
            for name, network in given.items():
                features = _try(model, f"{option} {name}", _features_of(network), name)
                if features.ndim != 2 or len(features) != _TRIED:
                    raise ConfigError(
                        f"{option} {name}: for {_TRIED} samples it returns {tuple(features.shape)}, and features are "
                        f"({_TRIED}, number of features)"
                    )


def _try(model: JMVAE, option: str, function: Callable[[Tensor], Tensor], name: str) -> Tensor:
    """What a user's network makes of two samples of zeros.

    Raises:
        ConfigError: It fails, or does not return numbers.
    """
    assert model.config.input_dims is not None
    values = torch.zeros(_TRIED, *model.config.input_dims[name], device=device_of(model))
    try:
        with torch.no_grad():
            output = function(values)
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            f"{option}: it cannot take values {tuple(values.shape)} ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(f"{option}: it returns {kind}, not a tensor of floating point")
    return output


def _features_of(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """A network's method `features`, else the network itself: another attribute of that name may be a part of it."""
    features = getattr(network, "features", None)
    return features if inspect.ismethod(features) else network


def run_suite(
    model: JMVAE,
    data: SuiteData,
    options: SuiteOptions,
    collectives: Collectives,
    networks: SuiteNetworks,
    *,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Compute the metrics over every held-out sample exactly once; equal on every rank.

    Args:
        model: The unwrapped model.
        data: Checked with `unsupported`.
        options: How to measure.
        collectives: All ranks call this together.
        networks: The user's; those trained here are added.
        say: Told what takes time, on the rank that does it, or on rank 0 for what all do.
        progress: Called after each batch of this rank with its number of samples.

    Returns:
        Results, and details that are not one number, by key.

    Raises:
        DataError: Some rank cannot read its samples; on every rank.
    """
    device = device_of(model)
    for network in (*networks.classifiers.values(), *networks.extractors.values()):
        network.to(device)
    wanted = set(options.metrics)
    if wanted & {"coherence", "frechet"} and data.train_label is not None:
        _add_classifiers(model, data, options, collectives, networks, say)
    probes: dict[Subset, Probe] = {}
    if "probe" in wanted:
        if collectives.rank == 0:
            say("fitting linear probes")
        probes = _fit_probes(model, data, options, collectives)
    ranges = _data_ranges(model, data, options, collectives) if "reconstruction" in wanted else {}
    with collectives.together():
        metrics = _make_metrics(model, data, options, networks, probes, ranges)
        loader = _loader(data.manifest, data.all_views(), data, options, collectives)
        label = None if data.label is None else data.label.name
        batches = sound_batches(loader, model, data.manifest, "stop")
        evaluate_batches(model, batches, metrics, label=label, progress=progress)
        numbers = _share(options.num_prior_samples, collectives)
        evaluate_prior(model, numbers, metrics, seed=options.seed, batch_size=options.batch_size)
    load_vector(metrics, collectives.sum(vector_of(metrics)))
    return results_of(metrics), details_of(metrics)


def _make_metrics(
    model: JMVAE,
    data: SuiteData,
    options: SuiteOptions,
    networks: SuiteNetworks,
    probes: dict[Subset, Probe],
    ranges: dict[str, float],
) -> list[Metric]:
    seed = options.seed
    label = data.label.name if data.label is not None and data.label.name in model.modalities else None
    made: dict[str, Callable[[], Iterable[Metric]]] = {
        "elbo": lambda: [ElboTerms(model, seed)],
        "accuracy": lambda: [Accuracy(model)],
        "reconstruction": lambda: [Reconstruction(model, ranges)],
        "latents": lambda: [Latents(model)],
        "coherence": lambda: [
            Coherence(model, networks.classifiers, label=label, seed=seed, max_subset_size=options.max_subset_size)
        ],
        "probe": lambda: [ProbeAccuracy(model, probes)],
        "frechet": lambda: _frechet_metrics(model, networks, seed),
    }
    metrics = [metric for name, make in made.items() if name in options.metrics for metric in make()]
    estimands = _estimands(model, options)
    if estimands:
        budget = options.memory_budget_bytes
        metrics.append(
            ImportanceSampling(model, estimands, seed=seed, num_draws=options.num_draws, memory_budget_bytes=budget)
        )
    return metrics


def _estimands(model: JMVAE, options: SuiteOptions) -> list[Estimand]:
    estimands: list[Estimand] = []
    if "joint_nll" in options.metrics:
        estimands.append(joint_estimand(model))
    if "marginal_nll" in options.metrics:
        # The joint likelihood brings the marginal ones from the same draws along.
        known = {key for estimand in estimands for key in estimand.groups}
        marginal = marginal_estimands(model, options.marginal_proposal)
        estimands += [estimand for estimand in marginal if not known & estimand.groups.keys()]
    if "conditional_nll" in options.metrics:
        names = model.modalities
        sources: list[Subset] = [(name,) for name in names]
        if len(names) > 2:
            sources += [tuple(name for name in names if name != target) for target in names]
        estimands += conditional_estimands(model, sources)
    return estimands


def _frechet_metrics(model: JMVAE, networks: SuiteNetworks, seed: int) -> list[Metric]:
    metrics: list[Metric] = []
    judges: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
        "frechet": {name: _features_of(network) for name, network in networks.classifiers.items()},
        "frechet_extractor": dict(networks.extractors),
    }
    for key, features in judges.items():
        if features:
            sizes = {name: _feature_size(model, name, function) for name, function in features.items()}
            metrics.append(FrechetDistance(model, features, sizes, key=key, seed=seed))
    return metrics


def _feature_size(model: JMVAE, name: str, features: Callable[[Tensor], Tensor]) -> int:
    if isinstance(getattr(features, "__self__", None), Classifier):
        return FEATURES
    return _try(model, f"features of {name}", features, name).shape[1]


# Training data


def _add_classifiers(
    model: JMVAE,
    data: SuiteData,
    options: SuiteOptions,
    collectives: Collectives,
    networks: SuiteNetworks,
    say: Callable[[str], None],
) -> None:
    """Load or train the classifiers that the user has not given; the same weights on every rank.

    Each is trained by one rank, whose number does not change it, while others train others.
    """
    manifest, label, device = data.train_manifest, data.train_label, device_of(model)
    assert manifest is not None
    assert label is not None
    views = {view.name: view for view in data.train_views if view.name not in {label.name, *networks.classifiers}}
    is_picture = {name: shows_picture(model, name) for name in views}
    made = {name: make_classifier(view, label, is_picture[name]) for name, view in views.items()}
    described = {
        name: describe(view, label, manifest, options.classifier_steps, options.seed) for name, view in views.items()
    }
    known = collectives.on_main(lambda: _load_known(made, described, networks.folder))
    missing = [name for name in made if name not in known]
    owners = {name: missing.index(name) % collectives.world_size if name in missing else 0 for name in made}
    with collectives.together():
        for name in missing:
            if owners[name] == collectives.rank:
                say(f"training a classifier of {name} ({options.classifier_steps:,} steps)")
                made[name] = train_classifier(
                    views[name],
                    label,
                    manifest,
                    is_picture=is_picture[name],
                    num_steps=options.classifier_steps,
                    seed=options.seed,
                    device=device,
                    access=data.access,
                )
    for name, network in made.items():
        _take_weights(network, owners[name], collectives)
        networks.classifiers[name] = network.to(device).eval()
    collectives.on_main(lambda: _save_classifiers(networks, missing, described, say))


def _load_known(
    made: Mapping[str, Classifier], described: Mapping[str, dict[str, Any]], folder: Path | None
) -> list[str]:
    """Fill the classifiers that are kept in the folder; returns their modalities."""
    if folder is None:
        return []
    paths = {name: file_of(folder, described[name]) for name in made}
    return [name for name, network in made.items() if load_classifier(network, paths[name], described[name])]


def _take_weights(network: Classifier, owner: int, collectives: Collectives) -> None:
    """Fill a classifier with the weights that it has on the rank `owner`."""
    weights = weights_vector(network)
    mine = weights if owner == collectives.rank else torch.zeros_like(weights)
    load_weights_vector(network, collectives.sum(mine))


def _save_classifiers(
    networks: SuiteNetworks,
    names: Sequence[str],
    described: Mapping[str, dict[str, Any]],
    say: Callable[[str], None],
) -> None:
    if networks.folder is None:
        return
    for name in names:
        network = networks.classifiers[name]
        assert isinstance(network, Classifier)
        try:
            save_classifier(network, file_of(networks.folder, described[name]), described[name])
        except OSError as error:
            say(f"the classifier of {name} is not kept: {networks.folder} cannot be written ({error.strerror})")


def _fit_probes(
    model: JMVAE, data: SuiteData, options: SuiteOptions, collectives: Collectives
) -> dict[Subset, Probe]:
    """A probe per subset of the modalities but the label; subsets are shared among the ranks."""
    manifest, label = data.train_manifest, data.train_label
    assert manifest is not None
    assert label is not None
    stride = -(-manifest.num_samples // options.num_probe_samples)
    collected = CollectedPosteriors(
        model, -(-manifest.num_samples // stride), with_joint=label.name not in model.modalities, stride=stride
    )
    with collectives.together():
        views = with_label(data.train_views, label)
        loader = _loader(manifest, views, data, options, collectives)
        batches = _thinned(sound_batches(loader, model, manifest, "stop"), stride)
        evaluate_batches(model, batches, [collected], label=label.name)
    load_vector([collected], collectives.sum(vector_of([collected])))
    subsets = subsets_of([name for name in model.modalities if name != label.name], options.max_subset_size)
    num_classes, shared = label.shape[0], torch.zeros(len(subsets), label.shape[0], model.latent_dim + 1).double()
    with collectives.together():
        for number in range(collectives.rank, len(subsets), collectives.world_size):
            probe = fit_probe(collected.means(subsets[number]), collected.labels, num_classes)
            shared[number] = torch.cat([probe.weight, probe.bias[:, None]], dim=1)
    shared = collectives.sum(shared)
    return {subset: Probe(part[:, :-1], part[:, -1]) for subset, part in zip(subsets, shared, strict=True)}


def _thinned(loader: Iterable[Batch], stride: int) -> Iterator[Batch]:
    """Every `stride`-th sample."""
    for batch in loader:
        kept = batch.rows % stride == 0
        if kept.any():
            inputs = {name: values[kept] for name, values in batch.inputs.items()}
            yield Batch(inputs, batch.rows[kept], batch.global_step)


# Held-out data


def _data_ranges(model: JMVAE, data: SuiteData, options: SuiteOptions, collectives: Collectives) -> dict[str, float]:
    """Largest minus smallest value of every picture modality, over all held-out samples."""
    views = [view for view in data.views if shows_picture(model, view.name)]
    ranges = {view.name: 1.0 for view in views if model.likelihoods[view.name].name == "bernoulli"}
    open_views = [view for view in views if view.name not in ranges]
    if not open_views:
        return ranges
    extremes = torch.full((len(open_views), 2), -torch.inf, dtype=torch.float64)
    with collectives.together():
        for batch in _loader(data.manifest, open_views, data, options, collectives):
            for number, view in enumerate(open_views):
                values = batch.inputs[view.name].double()
                found = torch.stack([values.max(), (-values).max()])
                extremes[number] = torch.maximum(extremes[number], found)
    work = collectives.start_maximum(extremes)
    if work is not None:
        work.wait()
    widths = extremes.sum(1).tolist()
    # A modality of one single value has no structure to compare.
    return ranges | {view.name: width for view, width in zip(open_views, widths, strict=True) if width > 0}


def _loader(
    manifest: Manifest, views: Sequence[View], data: SuiteData, options: SuiteOptions, collectives: Collectives
) -> EvaluationLoader:
    return EvaluationLoader(
        manifest,
        rank=collectives.rank,
        world_size=collectives.world_size,
        batch_size=options.batch_size,
        views=views,
        threads=data.threads,
        access=data.access,
    )


def _share(count: int, collectives: Collectives) -> range:
    rank, world_size = collectives.rank, collectives.world_size
    return range(rank * count // world_size, (rank + 1) * count // world_size)

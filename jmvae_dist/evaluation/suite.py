"""The evaluation suite: metrics by name, made of what each of them needs, and computed by all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from jmvae_dist.data.views import padding_ids
from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.evaluation.coherence import Accuracy, Coherence
from jmvae_dist.evaluation.evaluate import details_of, evaluate_batches, evaluate_prior, results_of
from jmvae_dist.evaluation.frechet import FrechetDistance
from jmvae_dist.evaluation.latents import Latents
from jmvae_dist.evaluation.likelihood import (
    ElboTerms,
    Estimand,
    ImportanceSampling,
    conditional_estimands,
    joint_estimand,
    marginal_estimands,
)
from jmvae_dist.evaluation.metrics import Metric, device_of, load_vector, vector_of
from jmvae_dist.evaluation.posteriors import Subset
from jmvae_dist.evaluation.probe import Probe, ProbeAccuracy
from jmvae_dist.evaluation.reconstruction import Reconstruction, shows_picture
from jmvae_dist.evaluation.sound_samples import sound_batches
from jmvae_dist.evaluation.suite_setup import (
    SuiteData,
    SuiteNetworks,
    SuiteOptions,
    feature_size,
    features_of,
    make_loader,
)
from jmvae_dist.evaluation.suite_training import add_classifiers, fit_probes
from jmvae_dist.model import JMVAE


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
        add_classifiers(model, data, options, collectives, networks, say)
    probes: dict[Subset, Probe] = {}
    if "probe" in wanted:
        if collectives.rank == 0:
            say("fitting linear probes")
        probes = fit_probes(model, data, options, collectives)
    ranges = _data_ranges(model, data, options, collectives) if "reconstruction" in wanted else {}
    with collectives.together():
        metrics = _make_metrics(model, data, options, networks, probes, ranges)
        loader = make_loader(data.manifest, data.all_views(), data, options, collectives)
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
        "accuracy": lambda: [Accuracy(model, padding_ids(data.views))],
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
        "frechet": {name: features_of(network) for name, network in networks.classifiers.items()},
        "frechet_extractor": dict(networks.extractors),
    }
    for key, features in judges.items():
        if features:
            sizes = {name: feature_size(model, name, function) for name, function in features.items()}
            metrics.append(FrechetDistance(model, features, sizes, key=key, seed=seed))
    return metrics


def _data_ranges(model: JMVAE, data: SuiteData, options: SuiteOptions, collectives: Collectives) -> dict[str, float]:
    """Largest minus smallest value of every picture modality, over all held-out samples."""
    views = [view for view in data.views if shows_picture(model, view.name)]
    ranges = {view.name: 1.0 for view in views if model.likelihoods[view.name].name == "bernoulli"}
    open_views = [view for view in views if view.name not in ranges]
    if not open_views:
        return ranges
    extremes = torch.full((len(open_views), 2), -torch.inf, dtype=torch.float64)
    with collectives.together():
        for batch in make_loader(data.manifest, open_views, data, options, collectives):
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


def _share(count: int, collectives: Collectives) -> range:
    rank, world_size = collectives.rank, collectives.world_size
    return range(rank * count // world_size, (rank + 1) * count // world_size)

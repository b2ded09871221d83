"""What the evaluation suite learns from training data, by all ranks together: classifiers and probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from jmvae_dist.data.loader import Batch
from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.evaluation.classifier import (
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
from jmvae_dist.evaluation.evaluate import evaluate_batches
from jmvae_dist.evaluation.metrics import device_of, load_vector, vector_of
from jmvae_dist.evaluation.posteriors import Subset, subsets_of
from jmvae_dist.evaluation.probe import CollectedPosteriors, Probe, fit_probe
from jmvae_dist.evaluation.reconstruction import shows_picture
from jmvae_dist.evaluation.sound_samples import sound_batches
from jmvae_dist.evaluation.suite_setup import SuiteData, SuiteNetworks, SuiteOptions, make_loader, with_label
from jmvae_dist.model import JMVAE


def add_classifiers(
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


def fit_probes(model: JMVAE, data: SuiteData, options: SuiteOptions, collectives: Collectives) -> dict[Subset, Probe]:
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
        loader = make_loader(manifest, views, data, options, collectives)
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

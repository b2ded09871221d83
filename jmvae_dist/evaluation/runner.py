"""Evaluation on a set of shards by all ranks together, and the figures of a run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jmvae_dist.data.loader import Batch, EvaluationLoader, OnBadSample
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.store import RemoteAccess, Verify
from jmvae_dist.data.urls import shown
from jmvae_dist.data.views import View, padding_ids
from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.errors import DataError
from jmvae_dist.evaluation.evaluate import evaluate_batches, evaluation_mode, results_of, standard_metrics
from jmvae_dist.evaluation.figures import (
    ClassNames,
    cross_modal_figure,
    cross_modal_matrix_figure,
    interpolation_figure,
    learning_curves_figure,
    prior_samples_figure,
    projection_figure,
    reconstruction_figure,
    save_png,
)
from jmvae_dist.evaluation.metrics import device_of, load_vector, vector_of
from jmvae_dist.evaluation.sound_samples import sound_batches
from jmvae_dist.evaluation.suite_setup import find_label, with_label
from jmvae_dist.model import JMVAE

# Points of the projection.
_PROJECTED_SAMPLES = 500


def evaluate_together(
    model: JMVAE,
    manifest: Manifest,
    views: Sequence[View],
    collectives: Collectives,
    *,
    batch_size: int,
    seed: int,
    joint_nll_samples: int,
    verify: Verify = "first_use",
    threads: int = 1,
    on_bad_sample: OnBadSample = "stop",
    access: RemoteAccess | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Metrics over every sample of `manifest` exactly once, split over all ranks; equal on every rank.

    Args:
        model: The unwrapped model.
        manifest: Held-out shards.
        views: What the model sees of the modalities to read.
        collectives: All ranks call this together.
        batch_size: Samples per forward pass on one rank.
        seed: Of the noise, which is keyed by it and by the sample's position: not by rank or batch size.
        joint_nll_samples: Importance samples per sample for the joint likelihood; 0 leaves it out.
        verify: When the bytes of shards are checked; see `data_config.DataSection`.
        threads: Threads that decode images.
        on_bad_sample: `mask` leaves samples out that cannot be read or that their likelihood cannot explain, and
            counts them in `eval/masked_samples`.
        access: How remote shards are read.
        progress: Called after each batch of this rank with its number of samples.

    Returns:
        `eval/...` -> value.

    Raises:
        ConfigError: Some rank cannot use the cache of remote shards; on every rank.
        DataError: Some rank cannot read its samples, or has another manifest than rank 0; on every rank.
    """
    collectives.require_equal(shown(manifest.path), f"fingerprint {manifest.fingerprint}")
    metrics = standard_metrics(model, seed=seed, joint_nll_samples=joint_nll_samples, padding_ids=padding_ids(views))
    with collectives.together():
        loader = EvaluationLoader(
            manifest,
            rank=collectives.rank,
            world_size=collectives.world_size,
            batch_size=batch_size,
            views=views,
            verify=verify,
            threads=threads,
            on_bad_sample=on_bad_sample,
            access=access,
        )
        batches = sound_batches(loader, model, manifest, on_bad_sample)
        evaluate_batches(model, batches, metrics, progress=progress)
    load_vector(metrics, collectives.sum(vector_of(metrics)))
    results = {f"eval/{key}": value for key, value in results_of(metrics).items()}
    if on_bad_sample == "mask":
        results["eval/masked_samples"] = manifest.num_samples - results["eval/samples"]
    return results


def save_figures(
    model: JMVAE,
    manifest: Manifest,
    views: Sequence[View],
    folder: Path,
    *,
    num_samples: int,
    seed: int,
    label: View | None = None,
    class_names: ClassNames | None = None,
    records: Iterable[dict[str, Any]] = (),
    verify: Verify = "first_use",
    on_bad_sample: OnBadSample = "stop",
    access: RemoteAccess | None = None,
) -> dict[str, Path]:
    """Draw reconstructions, generation from every modality and from the prior, and the latent space; on one rank.

    Args:
        model: The unwrapped model.
        manifest: Held-out shards; samples from all over them are shown.
        views: What the model sees of the modalities to read.
        folder: Where the PNG files go; those of an earlier step are replaced.
        num_samples: Samples per figure.
        seed: Of the posterior's and the prior's samples.
        label: Classes that colour the projection; None: those of the only modality of encoding `cls`, if there is
            one.
        class_names: By modality, where classes have names.
        records: Of the run's `metrics.jsonl`, for learning curves; none: no such figure.
        verify: When the bytes of shards are checked; see `data_config.DataSection`.
        on_bad_sample: `mask` leaves out what `evaluate_together` would.
        access: How remote shards are read.

    Returns:
        Name -> path.

    Raises:
        DataError: The samples cannot be read.
    """
    label = find_label(manifest, views, None)[0] if label is None else label
    inputs, is_first = _spread_samples(
        model,
        manifest,
        with_label(views, label),
        num_samples,
        verify=verify,
        on_bad_sample=on_bad_sample,
        access=access,
    )
    labels = None if label is None else inputs[label.name].argmax(-1)
    inputs = {name: inputs[name].to(device_of(model)) for name in model.modalities}
    first = {name: values[is_first] for name, values in inputs.items()}
    with evaluation_mode(model):
        figures = {
            "reconstruction": reconstruction_figure(model, first, max_samples=num_samples, class_names=class_names)
        }
        for name in model.modalities:
            figures[f"given_{name}"] = cross_modal_figure(
                model, first, name, max_samples=num_samples, seed=seed, class_names=class_names
            )
        figures["prior_samples"] = prior_samples_figure(
            model, num_samples=num_samples, seed=seed, class_names=class_names
        )
        figures["cross_modal_matrix"] = cross_modal_matrix_figure(model, first, seed=seed, class_names=class_names)
        figures["interpolation"] = interpolation_figure(model, first, class_names=class_names)
        latents = model.encode(inputs, return_mean=True, flatten=True).z
        names = () if label is None else (class_names or {}).get(label.name, ())
        figures["projection"] = projection_figure(latents, labels, "Posterior means of held-out samples", names)
    curves = learning_curves_figure(records)
    if curves is not None:
        figures["learning_curves"] = curves
    paths = {name: folder / f"{name}.png" for name in figures}
    for name, path in paths.items():
        save_png(figures[name], path)
    return paths


def _spread_samples(
    model: JMVAE,
    manifest: Manifest,
    views: Sequence[View],
    num_blocks: int,
    *,
    verify: Verify,
    on_bad_sample: OnBadSample,
    access: RemoteAccess | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Samples from all over the data set, which may be sorted by class: the first ones of equal blocks.

    Returns:
        Values by modality, (n, *shape), and which of them are the first of their block, bool (n,).

    Raises:
        DataError: The samples cannot be read, or none of them is sound.
    """
    per_block = -(-_PROJECTED_SAMPLES // num_blocks)
    batches: list[Batch] = []
    for block in range(num_blocks):
        loader = EvaluationLoader(
            manifest,
            rank=block,
            world_size=num_blocks,
            batch_size=per_block,
            views=views,
            verify=verify,
            on_bad_sample=on_bad_sample,
            access=access,
        )
        # With fewer samples than blocks, and with bad ones, some blocks have none.
        with closing(sound_batches(loader, model, manifest, on_bad_sample)) as sound:
            batches += itertools.islice(sound, 1)
    if not batches:
        raise DataError(f"{shown(manifest.path)}: there is no sound sample to draw")
    inputs = {view.name: torch.cat([batch.inputs[view.name] for batch in batches]) for view in views}
    is_first = torch.cat([torch.arange(len(batch)) == 0 for batch in batches])
    return inputs, is_first

"""Evaluation on a set of shards by all ranks together, and the figures of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path

from jmvae_dist.data.loader import Batch, EvaluationLoader, OnBadSample, check_batch
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.store import RemoteAccess, Verify
from jmvae_dist.data.urls import shown
from jmvae_dist.data.views import View
from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.errors import DataError
from jmvae_dist.evaluation.evaluate import evaluate_batches, evaluation_mode, finalize
from jmvae_dist.evaluation.figures import (
    cross_modal_figure,
    prior_samples_figure,
    reconstruction_figure,
    save_png,
)
from jmvae_dist.model import JMVAE
from jmvae_dist.model.inputs import check_values

logger = logging.getLogger(__name__)


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
        verify: When shards' sha256 are checked; see `config.DataSection`.
        threads: Threads that decode images, texts and JSON.
        on_bad_sample: `mask` leaves samples out that cannot be read or that their likelihood cannot explain, and
            counts them in `eval/masked_samples`.
        access: How remote shards are read.
        progress: Called after each batch of this rank with its number of samples.

    Returns:
        `eval/...` -> value.

    Raises:
        DataError: Some rank cannot read its samples; on every rank.
    """
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
    with collectives.together():
        batches = _checked(loader, model, manifest, on_bad_sample)
        sums = evaluate_batches(model, batches, seed=seed, joint_nll_samples=joint_nll_samples, progress=progress)
    total = sums.with_vector(collectives.sum(sums.vector().cpu()))
    metrics = {f"eval/{key}": value for key, value in finalize(total).items()}
    if on_bad_sample == "mask":
        metrics["eval/masked_samples"] = manifest.num_samples - metrics["eval/samples"]
    return metrics


def _checked(
    loader: EvaluationLoader, model: JMVAE, manifest: Manifest, on_bad_sample: OnBadSample
) -> Generator[Batch, None, None]:
    """The batches, in which every value can be explained by its likelihood; says how many samples are left out."""
    num_masked, example = 0, ""
    for batch in loader:
        sound = check_batch(
            batch,
            lambda inputs: check_values(inputs, model.likelihoods),
            manifest,
            loader.locate,
            on_bad_sample,
        )
        num_masked += len(sound.problems)
        example = example or next(iter(sound.problems), "")
        if len(sound):
            yield sound
    if num_masked:
        logger.warning("evaluation: %d samples of this rank are masked, such as %s", num_masked, example)


def save_figures(
    model: JMVAE,
    manifest: Manifest,
    views: Sequence[View],
    folder: Path,
    *,
    num_samples: int,
    seed: int,
    verify: Verify = "first_use",
    on_bad_sample: OnBadSample = "stop",
    access: RemoteAccess | None = None,
) -> dict[str, Path]:
    """Draw reconstructions, cross-modal generation from every modality, and samples of the prior; on one rank.

    Args:
        model: The unwrapped model.
        manifest: Held-out shards; the first samples are shown.
        views: What the model sees of the modalities to read.
        folder: Where the PNG files go; those of an earlier step are replaced.
        num_samples: Samples per figure.
        seed: Of the posterior's and the prior's samples.
        verify: When shards' sha256 are checked; see `config.DataSection`.
        on_bad_sample: `mask` leaves out what `evaluate_together` would.
        access: How remote shards are read.

    Returns:
        Name -> path.

    Raises:
        DataError: The samples cannot be read.
    """
    loader = EvaluationLoader(
        manifest,
        rank=0,
        world_size=1,
        batch_size=num_samples,
        views=views,
        verify=verify,
        on_bad_sample=on_bad_sample,
        access=access,
    )
    with closing(_checked(loader, model, manifest, on_bad_sample)) as batches:
        first = next(batches, None)
    if first is None:
        raise DataError(f"{shown(manifest.path)}: there is no sound sample to draw")
    inputs = first.inputs
    with evaluation_mode(model):
        figures = {"reconstruction": reconstruction_figure(model, inputs, max_samples=num_samples)}
        for name in model.modalities:
            figures[f"given_{name}"] = cross_modal_figure(model, inputs, name, max_samples=num_samples, seed=seed)
        figures["prior_samples"] = prior_samples_figure(model, num_samples=num_samples, seed=seed)
    paths = {name: folder / f"{name}.png" for name in figures}
    for name, path in paths.items():
        save_png(figures[name], path)
    return paths

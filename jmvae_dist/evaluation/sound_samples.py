"""Held-out samples that the model can be asked about: others stop the evaluation or are left out."""

from __future__ import annotations

import logging
from collections.abc import Generator

from torch import Tensor

from jmvae_dist.data.loader import Batch, EvaluationLoader, OnBadSample, check_batch
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.model import JMVAE
from jmvae_dist.model.inputs import check_values

logger = logging.getLogger(__name__)


def sound_batches(
    loader: EvaluationLoader, model: JMVAE, manifest: Manifest, on_bad_sample: OnBadSample
) -> Generator[Batch, None, None]:
    """The batches, in which every value can be explained by its likelihood; says how many samples are left out.

    Args:
        loader: Of `manifest`, with the same `on_bad_sample`; it may read modalities that the model does not have.
        model: Its likelihoods decide.
        manifest: The data set.
        on_bad_sample: `mask` leaves samples out, and batches of which none is left.

    Raises:
        DataError: With `stop`, at the first bad sample, with its place in the shards.
    """

    def check(inputs: dict[str, Tensor]) -> None:
        check_values({name: inputs[name] for name in inputs if name in model.likelihoods}, model.likelihoods)

    num_masked, example = 0, ""
    for batch in loader:
        sound = check_batch(batch, check, manifest, loader.locate, on_bad_sample)
        num_masked += len(sound.problems)
        example = example or next(iter(sound.problems), "")
        if len(sound):
            yield sound
    if num_masked:
        logger.warning("evaluation: %d samples of this rank are masked, such as %s", num_masked, example)

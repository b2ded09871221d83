"""Coherence across modalities: is a categorical modality predicted correctly from the other modalities?"""

from __future__ import annotations

import torch
from torch import Tensor

from jmvae_dist.model import JMVAE


def _predictions(model: JMVAE) -> dict[str, tuple[str, list[str]]]:
    """What is predicted from what: {metric key: (categorical target, modalities to predict from)}."""
    predictions = {}
    for target in model.modalities:
        if model.likelihoods[target].name != "categorical":
            continue
        others = [name for name in model.modalities if name != target]
        for source in others:
            predictions[f"accuracy/{target}/from_{source}"] = (target, [source])
        if len(others) > 1:
            predictions[f"accuracy/{target}/from_others"] = (target, others)
    return predictions


def coherence_keys(model: JMVAE) -> list[str]:
    """Keys of `coherence_sums`, in their order; empty for a model without categorical modalities."""
    return list(_predictions(model))


@torch.no_grad()
def coherence_sums(model: JMVAE, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Number of correct predictions of every categorical modality from the others, over the samples of one
    batch.

    The prediction decodes the posterior mean and takes the most probable class; it is compared with the most
    probable class of the target. A target with leading dimensions (several variables per sample) counts as
    the fraction of its variables that are right.

    Args:
        model: In the mode it is to be evaluated in.
        inputs: Every modality, (B, *shape), on the model's device.

    Returns:
        float64 scalars by key: `accuracy/<target>/from_<modality>`, and `accuracy/<target>/from_others` where
        there are several others.
    """
    sums = {}
    for key, (target, sources) in _predictions(model).items():
        latent = model.encode(inputs, sources, return_mean=True, flatten=True, check_inputs=False)
        predicted = model.decode(latent, target)[target].argmax(-1)
        correct = (predicted == inputs[target].argmax(-1)).double()
        sums[key] = correct.flatten(1).mean(1).sum() if correct.ndim > 1 else correct.sum()
    return sums

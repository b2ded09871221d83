"""Posteriors of a batch given many subsets of the modalities, with each encoder run once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from jmvae_dist.kernels.gaussian import product_of_experts
from jmvae_dist.kernels.noise import Stream, normal_noise
from jmvae_dist.model import JMVAE
from jmvae_dist.model.networks import GaussianParams

Subset = tuple[str, ...]


def subsets_of(names: Sequence[str], max_size: int | None = None) -> list[Subset]:
    """All subsets with at least one and at most `max_size` members, the smaller ones first."""
    sizes = range(1, min(len(names), len(names) if max_size is None else max_size) + 1)
    return [subset for size in sizes for subset in itertools.combinations(names, size)]


def subset_name(subset: Iterable[str]) -> str:
    """How result keys call a subset: `a+b`."""
    return "+".join(subset)


class Posteriors:
    """Posteriors q(z | x_S) of the samples of a batch; the same as `JMVAE.encode`'s.

    `encode` runs the encoders of a subset each time it is called: for all subsets of six modalities 192 of them, and
    here six and the joint one.

    Args:
        model: In the mode it is to be evaluated in.
        inputs: Every modality, (B, *shape), on the model's device.
    """

    def __init__(self, model: JMVAE, inputs: dict[str, Tensor]) -> None:
        self._model = model
        self._inputs = inputs
        self._encoded: dict[str, GaussianParams] = {}

    def given(self, names: Iterable[str]) -> GaussianParams:
        """Mean and log-variance (B, D) of the posterior given some modalities, in any order."""
        wanted = set(names)
        subset = [name for name in self._model.modalities if name in wanted]
        assert len(subset) == len(wanted) > 0, f"not modalities of the model: {wanted}"
        if len(subset) == len(self._model.modalities):
            return self._encode("all")
        experts = [self._encode(name) for name in subset]
        if len(experts) == 1:
            return experts[0]
        mus_MBD, logvars_MBD = (torch.stack(tensors) for tensors in zip(*experts, strict=True))
        return GaussianParams(*product_of_experts(mus_MBD, logvars_MBD, kernels=self._model.kernels))

    def sample(self, names: Iterable[str], rows: Tensor, seed: int) -> Tensor:
        """One draw z (B, D) per sample, with noise keyed by the seed and the samples' positions `rows`."""
        mu, logvar = self.given(names)
        noise = normal_noise(seed, 0, rows, mu.shape[-1], Stream.CONDITIONAL)
        return mu + torch.exp(0.5 * logvar) * noise.to(mu)

    def _encode(self, name: str) -> GaussianParams:
        if name not in self._encoded:
            latent = self._model.encode(self._inputs, name, return_mean=True, check_inputs=False)
            self._encoded[name] = GaussianParams(latent.mu, latent.logvar)
        return self._encoded[name]


def expected_value(model: JMVAE, z: Tensor, name: str) -> Tensor:
    """Expected value of modality `name` at latents (n, D): (n, *shape), probabilities for discrete likelihoods."""
    return model.likelihoods[name].mean(model.decode(z, name)[name])

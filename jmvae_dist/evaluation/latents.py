"""How the model uses its latent space: active units, KL per dimension, collapsed dimensions.

Shape suffixes: B samples, D latent dimensions.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from jmvae_dist.evaluation.metrics import EvaluationBatch, Metric, device_of
from jmvae_dist.model import JMVAE
from jmvae_dist.model.networks import GaussianParams

# Burda et al. (2016), appendix C.
ACTIVE_VARIANCE = 0.01
# Lucas et al. (2019), definition 1: epsilon in nats, and delta.
COLLAPSE_EPSILON = 0.01
COLLAPSE_DELTA = 0.01


class Latents(Metric):
    """Use of the latent dimensions by the joint posterior, and by those of single modalities.

    Results (without `/<m>`: of the joint posterior):

    - `latent/active_units`, `latent/active_units/<m>`: number of dimensions whose posterior mean varies over the data
      by more than ACTIVE_VARIANCE (Burda et al. 2016).
    - `latent/kl_prior`, `latent/kl_prior/<m>`: mean KL(q || N(0, I)), in nats: an upper bound of what the posterior
      says about the sample.
    - `posterior_collapse`, `posterior_collapse/<m>`: fraction of dimensions for which KL(q_d || N(0, 1)) is below
      COLLAPSE_EPSILON for at least a fraction 1 - COLLAPSE_DELTA of the samples (Lucas et al. 2019).

    Details: `latent/kl_per_dimension` and `latent/variance_of_mean`, lists over the dimensions, and the same per
    modality.
    """

    def __init__(self, model: JMVAE) -> None:
        self._sources = {"": list(model.modalities), **{f"/{name}": [name] for name in model.modalities}}
        shapes = {
            f"{part}{source}": (model.latent_dim,)
            for source in self._sources
            for part in ("mean", "square", "kl", "collapsed")
        }
        super().__init__(shapes, device_of(model))

    def update(self, batch: EvaluationBatch) -> None:
        for source, names in self._sources.items():
            posterior = batch.posteriors.given(names)
            mu_BD, kl_BD = posterior.mu.double(), _kl_per_dimension(posterior)
            self._add(
                {
                    f"mean{source}": mu_BD.sum(0),
                    f"square{source}": mu_BD.square().sum(0),
                    f"kl{source}": kl_BD.sum(0),
                    f"collapsed{source}": (kl_BD < COLLAPSE_EPSILON).sum(0),
                }
            )
        self.sums["samples"] += len(batch)

    def results(self) -> dict[str, float]:
        results = {}
        for source in self._sources:
            variance_D, kl_D = self._variance(source), self.sums[f"kl{source}"]
            collapsed_D = self.sums[f"collapsed{source}"] / self.sums["samples"] >= 1 - COLLAPSE_DELTA
            num_active, collapsed = (variance_D > ACTIVE_VARIANCE).sum().item(), collapsed_D.double().mean().item()
            # NaN and infinity are neither above nor below a threshold.
            results[f"latent/active_units{source}"] = float(num_active) if variance_D.isfinite().all() else math.nan
            results[f"latent/kl_prior{source}"] = (kl_D.sum() / self.sums["samples"]).item()
            results[f"posterior_collapse{source}"] = collapsed if kl_D.isfinite().all() else math.nan
        return results

    def details(self) -> dict[str, Any]:
        details = {}
        for source in self._sources:
            details[f"latent/kl_per_dimension{source}"] = (self.sums[f"kl{source}"] / self.sums["samples"]).tolist()
            details[f"latent/variance_of_mean{source}"] = self._variance(source).tolist()
        return details

    def _variance(self, source: str) -> Tensor:
        count = self.sums["samples"]
        mean_D = self.sums[f"mean{source}"] / count
        return (self.sums[f"square{source}"] / count - mean_D.square()).clamp(min=0)


def _kl_per_dimension(posterior: GaussianParams) -> Tensor:
    """KL(q_d || N(0, 1)) in nats, float64 (B, D)."""
    mu_BD, logvar_BD = (tensor.double() for tensor in posterior)
    return 0.5 * (mu_BD.square() + logvar_BD.exp() - 1 - logvar_BD)

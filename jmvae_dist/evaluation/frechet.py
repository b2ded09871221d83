"""Frechet distance between features of data and of what the model generates (Heusel et al. 2017).

Shape suffixes: B samples, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from jmvae_dist.errors import ConfigError
from jmvae_dist.evaluation.metrics import EvaluationBatch, Metric, PriorSamples, device_of
from jmvae_dist.evaluation.posteriors import expected_value
from jmvae_dist.model import JMVAE

# Values of a modality (B, *shape) -> features (B, F).
Features = Callable[[Tensor], Tensor]


def frechet_distance(mean1_F: Tensor, cov1_FF: Tensor, mean2_F: Tensor, cov2_FF: Tensor) -> float:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)``: squared 2-Wasserstein distance of two Gaussians.

    The roots are those of symmetric positive semi-definite matrices, by eigenvalues, in float64: unlike the usual
    root of the product C1 C2, they need no correction for few samples, whose covariances are singular. NaN where a
    moment is not finite: eigenvalues cannot be found then.
    """
    if not all(moment.isfinite().all() for moment in (mean1_F, cov1_FF, mean2_F, cov2_FF)):
        return math.nan
    root1_FF = _symmetric_root(cov1_FF.double())
    cross = torch.linalg.eigvalsh(root1_FF @ cov2_FF.double() @ root1_FF).clamp(min=0).sqrt().sum()
    distance = (mean1_F - mean2_F).double().square().sum() + cov1_FF.trace() + cov2_FF.trace() - 2 * cross
    return distance.clamp(min=0).item()


def _symmetric_root(matrix_FF: Tensor) -> Tensor:
    values_F, vectors_FF = torch.linalg.eigh(matrix_FF)
    return (vectors_FF * values_F.clamp(min=0).sqrt()) @ vectors_FF.T


class FrechetDistance(Metric):
    """Distance of generated modalities to the held-out data, in features.

    Results: `<key>/<m>/prior`, of samples of the prior, and `<key>/<m>/from_others`, of modality m generated from one
    draw of the posterior given all other modalities. Decoded expected values are compared with the data. Only values
    with the same features and the same number of samples compare: the distance falls with the number.

    Args:
        model: The model.
        features: By modality, called with (B, *shape).
        feature_sizes: F of each.
        key: First part of the result keys.
        seed: Of the draws.
    """

    def __init__(
        self,
        model: JMVAE,
        features: Mapping[str, Features],
        feature_sizes: Mapping[str, int],
        *,
        key: str,
        seed: int,
    ) -> None:
        self._model, self._features, self._key, self._seed = model, dict(features), key, seed
        shapes: dict[str, tuple[int, ...]] = {}
        for name in features:
            for source in ("data", "prior", "others"):
                size = feature_sizes[name]
                shapes |= {
                    f"count/{source}/{name}": (),
                    f"sum/{source}/{name}": (size,),
                    f"product/{source}/{name}": (size, size),
                }
        super().__init__(shapes, device_of(model))

    @property
    def uses_prior(self) -> bool:
        return True

    def update(self, batch: EvaluationBatch) -> None:
        for name in self._features:
            others = [other for other in self._model.modalities if other != name]
            z = batch.posteriors.sample(others, batch.rows, self._seed)
            self._add_features("data", name, batch.inputs[name])
            self._add_features("others", name, expected_value(self._model, z, name))
        self.sums["samples"] += len(batch)

    def update_prior(self, samples: PriorSamples) -> None:
        for name in self._features:
            self._add_features("prior", name, samples.expected[name])

    def results(self) -> dict[str, float]:
        results = {}
        for name in self._features:
            data = self._moments("data", name)
            for source, label in (("prior", "prior"), ("others", "from_others")):
                results[f"{self._key}/{name}/{label}"] = frechet_distance(*data, *self._moments(source, name))
        return results

    def _add_features(self, source: str, name: str, values: Tensor) -> None:
        features_BF = self._features[name](values).double()
        size = len(self.sums[f"sum/{source}/{name}"])
        if features_BF.shape != (len(values), size):
            raise ConfigError(f"features of {name}: shape {tuple(features_BF.shape)}, expected {(len(values), size)}")
        self._add(
            {
                f"count/{source}/{name}": values.new_tensor(len(values)),
                f"sum/{source}/{name}": features_BF.sum(0),
                f"product/{source}/{name}": features_BF.T @ features_BF,
            }
        )

    def _moments(self, source: str, name: str) -> tuple[Tensor, Tensor]:
        count, total_F, product_FF = (self.sums[f"{part}/{source}/{name}"] for part in ("count", "sum", "product"))
        mean_F = total_F / count
        return mean_F, (product_FF - count * torch.outer(mean_F, mean_F)) / (count - 1).clamp(min=1)

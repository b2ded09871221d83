"""How well modalities are reconstructed from the joint posterior's mean: squared error, SSIM, explained variance.

Shape suffixes: N samples, C channels, H and W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from jmvae_dist.evaluation.metrics import EvaluationBatch, Metric, device_of
from jmvae_dist.evaluation.posteriors import expected_value
from jmvae_dist.model import JMVAE

# Below this share of explained variance, a reconstruction is little more than the mean of the data.
COLLAPSE_THRESHOLD = 0.05
_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def is_picture(shape: tuple[int, ...]) -> bool:
    """Grey (H, W) or (1, H, W), or colour (3, H, W); tiny arrays are rather feature tables."""
    return (len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))) and min(shape[-2:]) >= 4


def shows_picture(model: JMVAE, name: str) -> bool:
    """Whether a modality is a picture: a categorical one of that shape is a text, one-hot (length, vocabulary)."""
    assert model.config.input_dims is not None
    return model.likelihoods[name].name != "categorical" and is_picture(tuple(model.config.input_dims[name]))


def structural_similarity(first: Tensor, second: Tensor, data_range: float) -> Tensor:
    """Mean SSIM of pictures (Wang et al. 2004, equation 13), channels averaged: (N,), 1 for equal ones.

    ``SSIM = (2 m1 m2 + c1)(2 s12 + c2) / ((m1^2 + m2^2 + c1)(s1^2 + s2^2 + c2))``, with ``c1 = (0.01 L)^2``,
    ``c2 = (0.03 L)^2``; means m, variances s^2 and covariance s12 are weighted by a Gaussian window of 11 x 11 pixels
    with sigma 1.5, at all places where it lies inside the picture. For smaller pictures the window is the largest odd
    one that fits.

    Args:
        first: (N, H, W) or (N, C, H, W).
        second: The same shape.
        data_range: L, the difference between the largest and the smallest possible value.
    """
    first, second = (x.unsqueeze(1).double() if x.ndim == 3 else x.double() for x in (first, second))
    height, width = first.shape[-2:]
    size = min(_WINDOW, height, width)
    size -= 1 - size % 2
    places = torch.arange(size, dtype=torch.float64, device=first.device) - size // 2
    weights = torch.exp(-places.square() / (2 * _SIGMA**2))
    weights = weights / weights.sum()

    def smooth(x_NCHW: Tensor) -> Tensor:
        flat = x_NCHW.flatten(0, 1).unsqueeze(1)
        return F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mean1, mean2 = smooth(first), smooth(second)
    variance1, variance2 = smooth(first * first) - mean1.square(), smooth(second * second) - mean2.square()
    covariance = smooth(first * second) - mean1 * mean2
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    luminance = (2 * mean1 * mean2 + c1) / (mean1.square() + mean2.square() + c1)
    structure = (2 * covariance + c2) / (variance1 + variance2 + c2)
    return (luminance * structure).flatten(1).mean(1).view(first.shape[:2]).mean(1)


class Reconstruction(Metric):
    """Expected values decoded from the joint posterior's mean, compared with the data.

    Results, per modality m:

    - `reconstruction/mse/<m>`: squared error, mean over elements and samples,
    - `reconstruction/ssim/<m>`: `structural_similarity`, for pictures,
    - `reconstruction/explained_variance/<m>`: 1 - squared error / variance of the data around its mean, both summed
      over all elements. 0 is what the mean of the data achieves. Left out for data that does not vary.
    - `modality_collapse/<m>`: 1 if the explained variance is below COLLAPSE_THRESHOLD: the decoder ignores the
      latent, which is what Javaloy et al. (2022) call a collapsed modality; else 0.

    Args:
        model: The model.
        data_ranges: L of `structural_similarity` per picture modality.
    """

    def __init__(self, model: JMVAE, data_ranges: Mapping[str, float]) -> None:
        self._model, self._ranges = model, dict(data_ranges)
        assert model.config.input_dims is not None
        self._shapes = {name: tuple(model.config.input_dims[name]) for name in model.modalities}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in self._shapes.items():
            shapes |= {f"error/{name}": (), f"ssim/{name}": ()}
            shapes |= {f"value/{name}": shape, f"square/{name}": shape}
        super().__init__(shapes, device_of(model))

    def update(self, batch: EvaluationBatch) -> None:
        mean = batch.posteriors.given(self._model.modalities).mu
        for name in self._model.modalities:
            data, expected = batch.inputs[name].double(), expected_value(self._model, mean, name)
            sums = {
                f"error/{name}": (data - expected).square().sum(),
                f"value/{name}": data.sum(0),
                f"square/{name}": data.square().sum(0),
            }
            if name in self._ranges:
                sums[f"ssim/{name}"] = structural_similarity(expected, data, self._ranges[name]).sum()
            self._add(sums)
        self.sums["samples"] += len(batch)

    def results(self) -> dict[str, float]:
        results, count = {}, self.sums["samples"]
        for name in self._model.modalities:
            error, value, square = (self.sums[f"{part}/{name}"] for part in ("error", "value", "square"))
            results[f"reconstruction/mse/{name}"] = (error / count / value.numel()).item()
            if name in self._ranges:
                results[f"reconstruction/ssim/{name}"] = self._mean(f"ssim/{name}")
            variation = (square - value.square() / count).clamp(min=0).sum()
            # Rounding leaves something of a constant's variation.
            if variation > 1e-12 * square.sum():
                explained = (1 - error / variation).item()
                results[f"reconstruction/explained_variance/{name}"] = explained
                collapsed = math.nan if math.isnan(explained) else float(explained < COLLAPSE_THRESHOLD)
                results[f"modality_collapse/{name}"] = collapsed
        return results

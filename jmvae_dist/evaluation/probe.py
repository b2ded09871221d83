"""Linear probes: how well a linear classifier reads the class off the latent, per subset of the modalities.

The probe of a subset is a multinomial logistic regression (scikit-learn, L-BFGS, L2 penalty C = 1) on the
standardised posterior means of training samples. It is convex and solved to a tight tolerance, so that the number of
ranks, which changes the last digits of the latents, does not change what it predicts.

Shape suffixes: M modalities, N training samples, B samples of a batch, D latent dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jmvae_dist.errors import DataError
from jmvae_dist.evaluation.coherence import agreement, most_probable
from jmvae_dist.evaluation.metrics import EvaluationBatch, Metric, device_of
from jmvae_dist.evaluation.posteriors import Subset, subset_name
from jmvae_dist.kernels.reference import product_of_experts
from jmvae_dist.model import JMVAE

_TOLERANCE = 1e-7
_MOST_ITERATIONS = 2000


@dataclass(frozen=True)
class Probe:
    """Logits are `z @ weight.T + bias`.

    Attributes:
        weight: float64 (num_classes, D).
        bias: float64 (num_classes,).
    """

    weight: Tensor
    bias: Tensor


def fit_probe(latents_ND: Tensor, labels_N: Tensor, num_classes: int) -> Probe:
    """Fit on latents and their classes; classes without a sample are never predicted.

    Raises:
        DataError: There are fewer than two classes, or latents that are not finite.
    """
    from sklearn.linear_model import LogisticRegression

    latents, labels = latents_ND.double().cpu().numpy(), labels_N.cpu().numpy()
    present = np.unique(labels)
    if len(present) < 2:
        raise DataError(f"probe: the training samples are of {len(present)} class(es); a probe needs two")
    if not np.isfinite(latents).all():
        raise DataError("probe: the model's posteriors are not finite")
    mean, scale = latents.mean(0), latents.std(0)
    # A dimension that does not vary says nothing, whatever it is divided by.
    scale = np.where(scale > 1e-6 * max(scale.max(), 1e-300), scale, np.inf)
    regression = LogisticRegression(tol=_TOLERANCE, max_iter=_MOST_ITERATIONS).fit((latents - mean) / scale, labels)
    coefficients, intercepts = regression.coef_, regression.intercept_
    if len(present) == 2:  # scikit-learn then returns the logit of the second class only
        coefficients, intercepts = np.vstack([-coefficients, coefficients]) / 2, np.r_[-intercepts, intercepts] / 2
    weight = np.zeros((num_classes, latents.shape[1]))
    bias = np.full(num_classes, -np.inf)
    weight[present] = coefficients / scale
    bias[present] = intercepts - (coefficients / scale) @ mean
    return Probe(torch.from_numpy(weight), torch.from_numpy(bias))


class CollectedPosteriors(Metric):
    """Posterior means and log-variances of single modalities for a fixed list of samples, and their classes.

    Products of experts of any subset follow from these, so that M + 1 posteriors serve 2^M - 1 probes. Every rank
    fills in its own samples; the sum over ranks holds all.

    Args:
        model: The model.
        num_samples: N; sample i of the list is the one at position `i * stride` of the data set, and batches hold
            no others.
        stride: Distance of the samples in the data set.
        with_joint: Keep the joint posterior too.
    """

    def __init__(self, model: JMVAE, num_samples: int, stride: int, *, with_joint: bool) -> None:
        self._model, self._stride = model, stride
        self._sources = {name: [name] for name in model.modalities} | ({"": model.modalities} if with_joint else {})
        shapes: dict[str, tuple[int, ...]] = {"labels": (num_samples,)}
        for source in self._sources:
            shapes |= {f"{part}/{source}": (num_samples, model.latent_dim) for part in ("mu", "logvar")}
        super().__init__(shapes, torch.device("cpu"))

    def update(self, batch: EvaluationBatch) -> None:
        assert batch.labels is not None
        places = (batch.rows // self._stride).cpu()
        self.sums["labels"][places] = batch.labels.cpu().double()
        for source, names in self._sources.items():
            for part, tensor in zip(("mu", "logvar"), batch.posteriors.given(names), strict=True):
                self.sums[f"{part}/{source}"][places] = tensor.cpu().double()
        self.sums["samples"] += len(batch)

    @property
    def labels(self) -> Tensor:
        """int64 (N,)."""
        return self.sums["labels"].long()

    def means(self, subset: Subset) -> Tensor:
        """Posterior means (N, D), float64, given a subset of the modalities."""
        if len(subset) == len(self._model.modalities):
            return self.sums["mu/"]
        if len(subset) == 1:
            return self.sums[f"mu/{subset[0]}"]
        mus_MND, logvars_MND = (
            torch.stack([self.sums[f"{part}/{name}"] for name in subset]) for part in ("mu", "logvar")
        )
        return product_of_experts(mus_MND, logvars_MND)[0]

    def results(self) -> dict[str, float]:
        return {}


class ProbeAccuracy(Metric):
    """Accuracy of linear probes on held-out samples.

    Results: `probe/from_<S>`, the fraction of samples whose class the probe of subset S predicts from the posterior
    mean given S, and `probe_by_size/<n>`, its mean over the subsets with n members.

    Args:
        model: The model.
        probes: By subset.
    """

    def __init__(self, model: JMVAE, probes: dict[Subset, Probe]) -> None:
        device = device_of(model)
        self._probes = {
            subset: Probe(probe.weight.to(device), probe.bias.to(device)) for subset, probe in probes.items()
        }
        super().__init__(dict.fromkeys(map(_key, probes), ()), device)

    def update(self, batch: EvaluationBatch) -> None:
        assert batch.labels is not None
        for subset, probe in self._probes.items():
            logits = batch.posteriors.given(subset).mu.double() @ probe.weight.T + probe.bias
            self._add({_key(subset): agreement(most_probable(logits), batch.labels).sum()})
        self.sums["samples"] += len(batch)

    def results(self) -> dict[str, float]:
        results = {_key(subset): self._mean(_key(subset)) for subset in self._probes}
        return results | means_by_size("probe_by_size", {subset: results[_key(subset)] for subset in self._probes})


def _key(subset: Sequence[str]) -> str:
    return f"probe/from_{subset_name(subset)}"


def means_by_size(key: str, values: dict[Subset, float]) -> dict[str, float]:
    """Means over the subsets of equal size, by `<key>/<size>`."""
    sizes: Iterable[int] = sorted({len(subset) for subset in values})
    grouped = {size: [value for subset, value in values.items() if len(subset) == size] for size in sizes}
    return {f"{key}/{size}": sum(group) / len(group) for size, group in grouped.items()}

"""What a metric is: sums over samples that ranks can add up, and the results that follow from the totals."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jmvae_dist.evaluation.posteriors import Posteriors
from jmvae_dist.model import JMVAE


@dataclass(frozen=True)
class EvaluationBatch:
    """Held-out samples in the model's hands.

    Attributes:
        inputs: Every modality of the model, (B, *shape), on its device.
        rows: int64 (B,): positions in the data set, which key all noise.
        posteriors: Posteriors of these samples given any modalities.
        labels: int64 (B,): classes of the samples; None where the data has none.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    posteriors: Posteriors
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class PriorSamples:
    """Samples of the prior.

    Attributes:
        z: (n, D).
        expected: Decoded expected value of every modality, (n, *shape).
    """

    z: Tensor
    expected: dict[str, Tensor]


class Metric(ABC):
    """Adds up float64 tensors over batches; totals over all ranks then give the results.

    Keys, shapes and order of `sums` depend on the model and the options alone, so that ranks, also ones without any
    sample, can add up theirs.

    Args:
        shapes: Shape of every sum.
        device: Where they are added up.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self.sums = {
            key: torch.zeros(shape, dtype=torch.float64, device=device)
            for key, shape in {"samples": (), **shapes}.items()
        }

    @abstractmethod
    def update(self, batch: EvaluationBatch) -> None:
        """Add the samples of a batch."""

    def update_prior(self, samples: PriorSamples) -> None:
        """Add samples of the prior; called only where `uses_prior` says so."""
        raise NotImplementedError

    @property
    def uses_prior(self) -> bool:
        """Whether `update_prior` wants samples."""
        return False

    @abstractmethod
    def results(self) -> dict[str, float]:
        """Results by key, from the totals over all samples."""

    def details(self) -> dict[str, Any]:
        """What is not one number: lists by key, as JSON values."""
        return {}

    def _add(self, values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            self.sums[key] += value.detach().double()

    def _mean(self, key: str) -> float:
        return (self.sums[key] / self.sums["samples"]).item()


def device_of(model: JMVAE) -> torch.device:
    """The device of the model's weights."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def standard_error(total: float, total_of_squares: float, count: float) -> float:
    """Standard error of a mean over `count` > 1 samples, from the sum of the values and of their squares."""
    # In this order NaN stays NaN: max(0.0, NaN) is 0, which would claim that there is no error at all.
    variance = max(total_of_squares / count - (total / count) ** 2, 0.0)
    return math.sqrt(variance / (count - 1))


def vector_of(metrics: Iterable[Metric]) -> Tensor:
    """All sums as one float64 vector on the CPU, for one all-reduce."""
    parts = [value.flatten().cpu() for metric in metrics for value in metric.sums.values()]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def load_vector(metrics: Sequence[Metric], vector: Tensor) -> None:
    """Replace all sums by the values of `vector`, which `vector_of` made of equal metrics."""
    start = 0
    for metric in metrics:
        for value in metric.sums.values():
            value.copy_(vector[start : start + value.numel()].view_as(value))
            start += value.numel()
    assert start == len(vector)

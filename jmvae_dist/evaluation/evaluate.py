"""All numbers of an evaluation, as sums that ranks can add up, and their means."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from jmvae_dist.errors import DataError
from jmvae_dist.evaluation.coherence import coherence_keys, coherence_sums
from jmvae_dist.evaluation.likelihood import companion_key, likelihood_keys, likelihood_sums
from jmvae_dist.model import JMVAE


class Batch(Protocol):
    """Samples of every modality, and their positions in the data set."""

    inputs: dict[str, Tensor]
    rows: Tensor


@dataclass(frozen=True)
class EvaluationSums:
    """Sums over held-out samples.

    Attributes:
        sums: float64 scalars on the model's device. Keys and order depend on the model and the options alone,
            so that ranks, also ones without any sample, can add up their vectors.
    """

    sums: dict[str, Tensor]

    def vector(self) -> Tensor:
        """All sums as one float64 vector, for one all-reduce."""
        return torch.stack(list(self.sums.values()))

    def with_vector(self, vector: Tensor) -> EvaluationSums:
        """The same keys with the values of `vector`."""
        assert vector.shape == (len(self.sums),)
        return EvaluationSums(dict(zip(self.sums, vector.unbind(), strict=True)))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, fixed batch statistics), and afterwards every module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def evaluate_batches(
    model: JMVAE,
    batches: Iterable[Batch],
    *,
    seed: int,
    joint_nll_samples: int,
    progress: Callable[[int], None] | None = None,
) -> EvaluationSums:
    """Evaluate the model in evaluation mode, in the precision of its weights.

    Args:
        model: Not wrapped in an engine.
        batches: `inputs` and `rows` (int64, position in the data set); moved to the model's device. May be
            empty.
        seed: Seed of the noise.
        joint_nll_samples: Importance samples K per data sample; 0: no importance sampling.
        progress: Called after every batch with its number of samples.

    Returns:
        `samples` (their number) and the sums of `likelihood_sums` and `coherence_sums`.

    Raises:
        DataError: The inputs are not what the model takes.
    """
    device = next(model.parameters()).device
    keys = ["samples", *likelihood_keys(model.modalities, joint_nll_samples), *coherence_keys(model)]
    totals = {key: torch.zeros((), dtype=torch.float64, device=device) for key in keys}
    with evaluation_mode(model), torch.autocast(device.type, enabled=False):
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
            rows = batch.rows.to(device)
            likelihoods = likelihood_sums(model, inputs, rows, seed=seed, joint_nll_samples=joint_nll_samples)
            coherence = coherence_sums(model, inputs)
            for key, value in (likelihoods | coherence).items():
                totals[key] += value
            totals["samples"] += len(rows)
            if progress is not None:
                progress(len(rows))
    return EvaluationSums(totals)


def finalize(evaluation: EvaluationSums) -> dict[str, float]:
    """Means over the samples, ready for JSON.

    Keys are those of the sums; `samples` is their number; in place of squares there are standard errors of
    the mean over the data, `joint_nll_stderr` and `marginal_nll_stderr/<m>` (left out for a single sample).

    Raises:
        DataError: There were no samples.
    """
    sums = {key: value.item() for key, value in evaluation.sums.items()}
    count = sums.pop("samples")
    if count == 0:
        raise DataError("evaluation: there are no samples to evaluate (data.eval_manifest names an empty data set)")
    squares = {key: companion_key(key, "squared") for key in sums if companion_key(key, "squared") in sums}
    results = {"samples": count}
    for key, total in sums.items():
        if key not in squares.values():
            results[key] = total / count
        if key in squares and count > 1:
            # In this order NaN stays NaN: max(0.0, NaN) is 0, which would claim that there is no error at all.
            variance = max(sums[squares[key]] / count - results[key] ** 2, 0.0)
            results[companion_key(key, "stderr")] = math.sqrt(variance / (count - 1))
    return results

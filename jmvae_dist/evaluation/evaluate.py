"""The loop over held-out samples, and over samples of the prior, that fills metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jmvae_dist.errors import DataError
from jmvae_dist.evaluation.coherence import Accuracy
from jmvae_dist.evaluation.likelihood import ElboTerms, ImportanceSampling, joint_estimand
from jmvae_dist.evaluation.metrics import EvaluationBatch, Metric, PriorSamples, device_of
from jmvae_dist.evaluation.posteriors import Posteriors, expected_value
from jmvae_dist.kernels.noise import Stream, normal_noise
from jmvae_dist.model import JMVAE
from jmvae_dist.model.inputs import check_structure, check_values


class Batch(Protocol):
    """Samples of every modality, and their positions in the data set."""

    inputs: dict[str, Tensor]
    rows: Tensor


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


def standard_metrics(
    model: JMVAE, *, seed: int, joint_nll_samples: int = 0, padding_ids: Mapping[str, int] | None = None
) -> list[Metric]:
    """What a training run measures on held-out data.

    Args:
        model: The model.
        seed: Seed of the noise.
        joint_nll_samples: Importance samples K per data sample; 0: no importance sampling.
        padding_ids: Of texts; see `Accuracy`.
    """
    metrics: list[Metric] = [ElboTerms(model, seed)]
    if joint_nll_samples > 0:
        metrics.append(ImportanceSampling(model, [joint_estimand(model)], seed=seed, num_draws=joint_nll_samples))
    return [*metrics, Accuracy(model, padding_ids)]


@torch.no_grad()
def evaluate_batches(
    model: JMVAE,
    batches: Iterable[Batch],
    metrics: Sequence[Metric],
    *,
    label: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Fill the metrics from batches, in evaluation mode and in the precision of the model's weights.

    Args:
        model: Not wrapped in an engine.
        batches: `inputs` and `rows` (int64, position in the data set); moved to the model's device. May be
            empty.
        metrics: What to measure.
        label: The one-hot modality that holds the classes; it may be one that the model does not have.
        progress: Called after every batch with its number of samples.

    Raises:
        DataError: The inputs are not what the model takes.
    """
    device = device_of(model)
    with evaluation_mode(model), torch.autocast(device.type, enabled=False):
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
            labels = None if label is None else inputs[label].argmax(-1)
            inputs = {name: tensor for name, tensor in inputs.items() if name in model.modalities}
            check_structure(inputs, model.modalities, model.modalities, model.config.input_dims)
            check_values(inputs, model.likelihoods)
            rows = batch.rows.to(device)
            prepared = EvaluationBatch(inputs, rows, Posteriors(model, inputs), labels)
            for metric in metrics:
                metric.update(prepared)
            if progress is not None:
                progress(len(rows))


@torch.no_grad()
def evaluate_prior(model: JMVAE, numbers: range, metrics: Sequence[Metric], *, seed: int, batch_size: int) -> None:
    """Fill the metrics that want samples of the prior; sample i depends on the seed and on i alone.

    Args:
        model: Not wrapped in an engine.
        numbers: Numbers of the samples.
        metrics: What to measure.
        seed: Of the samples.
        batch_size: Samples decoded at once.
    """
    device, metrics = device_of(model), [metric for metric in metrics if metric.uses_prior]
    if not metrics:
        return
    with evaluation_mode(model), torch.autocast(device.type, enabled=False):
        for start in range(numbers.start, numbers.stop, batch_size):
            rows = torch.arange(start, min(start + batch_size, numbers.stop), device=device)
            noise = normal_noise(seed, 0, rows, model.latent_dim, Stream.PRIOR)
            z = model.generate_from_prior(len(rows), noise=noise).z
            expected = {name: expected_value(model, z, name) for name in model.modalities}
            for metric in metrics:
                metric.update_prior(PriorSamples(z, expected))


def results_of(metrics: Sequence[Metric]) -> dict[str, float]:
    """Results of all metrics, ready for JSON, and `samples`, their number.

    Raises:
        DataError: There were no samples.
    """
    count = max((metric.sums["samples"].item() for metric in metrics), default=0.0)
    if count == 0:
        raise DataError("evaluation: there are no samples to evaluate (data.eval_manifest names an empty data set)")
    results = {"samples": count}
    for metric in metrics:
        results |= metric.results()
    return results


def details_of(metrics: Sequence[Metric]) -> dict[str, Any]:
    """What is not one number, of all metrics."""
    details: dict[str, Any] = {}
    for metric in metrics:
        details |= metric.details()
    return details

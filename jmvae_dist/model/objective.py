"""The training objective (Suzuki et al. 2016, for M modalities; KL annealing as in Sonderby et al. 2016).

For one sample x = (x_1, ..., x_M), with one draw z from the joint posterior q = q(z | x_1, ..., x_M)::

    loss = sum_m r_m (-log p(x_m | z)) + annealing * (beta KL(q || N(0, I)) + alpha sum_m KL(q || q(z | x_m)))

where r_m is the rescaling factor of modality m. Shape suffixes: B batch, M modalities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from jmvae_dist.model_config import JMVAEConfig


@dataclass(frozen=True)
class ObjectiveTerms:
    """The parts of the objective per sample, in nats, before any weight."""

    log_likelihoods: dict[str, Tensor]  # log p(x_m | z), each (B,)
    kl_prior: Tensor  # KL(q || N(0, I)), (B,)
    kl_unimodal: dict[str, Tensor]  # KL(q || q(z | x_m)), each (B,)


def resolve_rescale_factors(config: JMVAEConfig, modalities: list[str]) -> dict[str, float]:
    """The weight r_m of every modality's reconstruction term (Javaloy et al. 2022).

    1 without `uses_likelihood_rescaling`; else the configured factors, or by default
    ``max_k prod(input_dims[k]) / prod(input_dims[m])``.
    """
    if not config.uses_likelihood_rescaling:
        return dict.fromkeys(modalities, 1.0)
    if config.rescale_factors is not None:
        return {name: float(config.rescale_factors[name]) for name in modalities}
    assert config.input_dims is not None, "JMVAE requires input_dims for the default rescaling"
    sizes = {name: math.prod(config.input_dims[name]) for name in modalities}
    return {name: max(sizes.values()) / sizes[name] for name in modalities}


def metric_keys(modalities: list[str]) -> list[str]:
    """Keys of the metrics of `combine`, in their order."""
    return [
        "loss/total",
        "loss/reconstruction",
        *(f"loss/reconstruction/{name}" for name in modalities),
        "loss/kl_prior",
        "loss/kl_unimodal",
        *(f"loss/kl_unimodal/{name}" for name in modalities),
        "elbo",
    ]


def combine(
    terms: ObjectiveTerms,
    rescale_factors: dict[str, float],
    *,
    alpha: float,
    beta: float,
    annealing: float | Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the metrics, as sums over the batch.

    Returns:
        loss_sum: Scalar with gradient.
        metrics: Detached float32 scalars, sums over the batch, with the keys of `metric_keys`. The
            reconstruction terms are rescaled, as they enter the loss; KL terms carry no weight; `elbo` is
            sum_m log p(x_m | z) - KL(q || N(0, I)) without any weight, an estimate of a lower bound of log
            p(x).
    """
    log_likelihoods = {name: values_B.sum() for name, values_B in terms.log_likelihoods.items()}
    kl_prior = terms.kl_prior.sum()
    kl_unimodal = {name: values_B.sum() for name, values_B in terms.kl_unimodal.items()}
    kl_unimodal_total = sum(kl_unimodal.values(), start=kl_prior.new_zeros(()))
    reconstruction = {name: -rescale_factors[name] * value for name, value in log_likelihoods.items()}
    reconstruction_total = sum(reconstruction.values(), start=kl_prior.new_zeros(()))

    loss_sum = reconstruction_total + annealing * (beta * kl_prior + alpha * kl_unimodal_total)
    elbo = sum(log_likelihoods.values(), start=-kl_prior)
    values = [
        loss_sum,
        reconstruction_total,
        *reconstruction.values(),
        kl_prior,
        kl_unimodal_total,
        *kl_unimodal.values(),
        elbo,
    ]
    keys = metric_keys(list(log_likelihoods))
    return loss_sum, {key: value.detach().float() for key, value in zip(keys, values, strict=True)}

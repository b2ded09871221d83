"""How probable held-out samples are: the objective's terms and importance-sampled likelihoods, as sums.

All noise is keyed by (seed, position of the sample in the data set), so that the results depend neither on
the batch size nor on the number of ranks nor on the order of the samples, except for the order of
floating-point sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jmvae_dist.kernels.noise import KeyedNoise, Stream, normal_noise
from jmvae_dist.model import JMVAE
from jmvae_dist.model.objective import metric_keys


def companion_key(key: str, suffix: str) -> str:
    """Key of a quantity derived from another one: joint_nll -> joint_nll_<suffix>, a/m -> a_<suffix>/m."""
    quantity, slash, modality = key.partition("/")
    return f"{quantity}_{suffix}{slash}{modality}"


def likelihood_keys(modalities: list[str], joint_nll_samples: int) -> list[str]:
    """Keys of `likelihood_sums`, in their order."""
    keys = [*metric_keys(modalities), *(f"log_likelihood/{name}" for name in modalities)]
    if joint_nll_samples > 0:
        for key in ("joint_nll", *(f"marginal_nll/{name}" for name in modalities)):
            keys += [key, companion_key(key, "squared")]
    return keys


@torch.no_grad()
def likelihood_sums(
    model: JMVAE, inputs: dict[str, Tensor], rows: Tensor, *, seed: int, joint_nll_samples: int
) -> dict[str, Tensor]:
    """Sums over the samples of one batch.

    Args:
        model: In the mode it is to be evaluated in.
        inputs: Every modality, (B, *shape), on the model's device.
        rows: int64 (B,), position of every sample in the data set, on the model's device.
        seed: Seed of the noise.
        joint_nll_samples: Importance samples K per data sample; 0: no importance sampling.

    Returns:
        float64 scalars:

        - the metrics of the model's forward pass at full annealing, with one latent per sample,
        - `log_likelihood/<m>`: log p(x_m | z) at that latent, not rescaled,
        - `joint_nll`: -log p(x), and `marginal_nll/<m>`: -log p(x_m), by importance sampling with K draws from
          the joint posterior, and `joint_nll_squared`, `marginal_nll_squared/<m>`: sums of their squares.

    Raises:
        DataError: The inputs are not what the model takes.
    """
    latent_noise = normal_noise(seed, 0, rows, model.latent_dim, Stream.EVALUATION_LATENT)
    metrics = model(inputs, annealing=1.0, noise=latent_noise).metrics
    sums = {key: value.double() for key, value in metrics.items()}
    for name in model.modalities:
        sums[f"log_likelihood/{name}"] = -sums[f"loss/reconstruction/{name}"] / model.rescale_factors[name]
    if joint_nll_samples > 0:
        for key, nll_B in _importance_sampled_nlls(model, inputs, rows, seed, joint_nll_samples).items():
            sums[key] = nll_B.double().sum()
            sums[companion_key(key, "squared")] = nll_B.double().square().sum()
    return sums


def _importance_sampled_nlls(
    model: JMVAE, inputs: dict[str, Tensor], rows: Tensor, seed: int, num_draws: int
) -> dict[str, Tensor]:
    """`joint_nll` and `marginal_nll/<m>` of every sample, (B,) each."""
    groups = {"joint_nll": model.modalities, **{f"marginal_nll/{name}": [name] for name in model.modalities}}
    noise = KeyedNoise(seed, 0, rows, Stream.IMPORTANCE)
    estimates = model.estimate_nlls(inputs, groups, K=num_draws, noise=noise, check_inputs=False)
    return {key: estimate.nll for key, estimate in estimates.items()}

"""Monte Carlo estimates of likelihoods: draws of a posterior, their weights, and sums that fit any cut of the draws.

`JMVAE.estimate_nlls` says what is estimated and whose posterior the draws come from; `decoding_chunks`, how many of
them are decoded at once.

Shape suffixes: B batch, D latent dimension, K draws of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from jmvae_dist.kernels.noise import KeyedNoise
from jmvae_dist.model.decoding_chunks import DecodingChunks
from jmvae_dist.model.modules import GaussianParams
from jmvae_dist.model.sampling import draw_noise, sample

# Draws k (a range of length n) -> standard normal noise of these draws (n, B, D).
DrawNoise = Callable[[range], Tensor]
# Latents (k, b, D) of some draws of a block of the samples, and that block -> log p(x_m | z) by modality, (k, b).
LogLikelihoods = Callable[[Tensor, slice], dict[str, Tensor]]


class NLLEstimate(NamedTuple):
    """A Monte Carlo estimate ``-log 1/K sum_k w_k`` per sample, and how far to trust it.

    Attributes:
        nll: The estimate in nats, float64 (B,).
        stderr: Its Monte Carlo standard error in nats, float64 (B,), by the delta method: the relative standard
            error of the mean weight, ``std(w) / (mean(w) sqrt(K))``. NaN for K = 1. It is itself estimated from
            the weights: with few effective samples it is too small.
        effective_samples: ``(sum_k w_k)^2 / sum_k w_k^2`` (Kong 1992), float64 (B,), between 1 and K. Near 1, a
            single draw carries the estimate, which is then too high by an unknown amount.
    """

    nll: Tensor
    stderr: Tensor
    effective_samples: Tensor


class LogWeightSums:
    """Sums of weights and of their squares per sample, in float64 and in logarithms, one chunk after the other.

    Args:
        like: (B, ...), for number and device of the samples.
    """

    def __init__(self, like: Tensor) -> None:
        shape, device = like.shape[:1], like.device
        self._log_sum_B = torch.full(shape, -math.inf, dtype=torch.float64, device=device)
        self._log_squares_B = self._log_sum_B.clone()
        self._num_draws_B = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, log_weights_KB: Tensor) -> None:
        """Add the weights of some draws of all samples, float64 (K, B)."""
        for total_B, power in ((self._log_sum_B, 1.0), (self._log_squares_B, 2.0)):
            torch.logaddexp(total_B, torch.logsumexp(power * log_weights_KB, dim=0), out=total_B)
        self._num_draws_B += len(log_weights_KB)

    def estimate(self) -> NLLEstimate:
        """The estimate from all draws so far."""
        num_B = self._num_draws_B
        log_effective_B = 2 * self._log_sum_B - self._log_squares_B
        # Rounding may put K equal weights a little above K effective samples.
        excess_B = (num_B * torch.exp(-log_effective_B) - 1).clamp(min=0)
        return NLLEstimate(
            num_B.log() - self._log_sum_B, torch.sqrt(excess_B / (num_B - 1)), torch.exp(log_effective_B)
        )


def estimate_from_draws(
    posterior: GaussianParams,
    groups: dict[str, list[str]],
    log_likelihoods: LogLikelihoods,
    chunks: DecodingChunks,
    *,
    K: int,
    conditional: bool,
    noise: DrawNoise | KeyedNoise | None,
    generator: torch.Generator | None,
) -> dict[str, NLLEstimate]:
    """Negative log-likelihoods of several groups of modalities from the same draws.

    Args:
        posterior: Whose draws z_1 ... z_K are weighted.
        groups: Names of the modalities whose joint likelihood is wanted, by any key.
        log_likelihoods: Of the modalities of all groups.
        chunks: How many draws of how many samples `log_likelihoods` gets at once.
        K: Draws per sample.
        conditional: A weight is p(x_group | z_k), without the density ratio p(z_k) / q(z_k).
        noise: Where standard normal noise comes from; see `JMVAE.estimate_nlls`.
        generator: To draw it from, if `noise` is None; None: torch's own.

    Raises:
        DataError: The function `noise` returns something else than noise of these draws.
    """
    sums = {key: LogWeightSums(posterior.mu) for key in groups}
    (num_samples, latent_dim), start = posterior.mu.shape, 0
    while start < K:
        stop = min(K, start + chunks.noise_draws(num_samples, latent_dim))
        noise_KBD = _noise_of(range(start, stop), posterior, noise, generator)
        z_KBD = sample(posterior, noise_KBD)
        ratios_KB = _log_density_ratios(posterior, noise_KBD, z_KBD, conditional)
        log_weights_KB = {key: ratios_KB.clone() for key in groups}
        for draws, block in chunks.cut(stop - start, num_samples):
            with chunks.measured():
                terms = log_likelihoods(z_KBD[draws, block], block)
            for key, group in groups.items():
                for name in group:
                    log_weights_KB[key][draws, block] += terms[name]
        for key, table_KB in log_weights_KB.items():
            sums[key].add(table_KB)
        start = stop
    return {key: total.estimate() for key, total in sums.items()}


def _noise_of(
    draws: range,
    posterior: GaussianParams,
    noise: DrawNoise | KeyedNoise | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Noise of some draws, (n, B, D)."""
    if isinstance(noise, KeyedNoise):
        given: Tensor | None = noise.draw_steps(draws, posterior.mu.shape[1])
    else:
        given = None if noise is None else noise(draws)
    return draw_noise(given, (len(draws), *posterior.mu.shape), posterior.mu, generator)


def _log_density_ratios(posterior: GaussianParams, noise_KBD: Tensor, z_KBD: Tensor, conditional: bool) -> Tensor:
    """log p(z_k) - log q(z_k), the part of a log-weight that belongs to no modality; or 0: float64 (K, B)."""
    if conditional:
        return z_KBD.new_zeros(z_KBD.shape[:2], dtype=torch.float64)
    # (z - mu) / sigma is the noise.
    return 0.5 * (noise_KBD.square() + posterior.logvar - z_KBD.square()).sum(-1).double()

"""Reference implementation, in differentiable torch, of the operations on diagonal Gaussians.

Shape suffixes: B batch, D latent dimension, M modalities (experts). Every Gaussian is diagonal and given by
its mean `mu` and the logarithm of its variance `logvar`. 16-bit inputs are computed in float32, float64 stays
float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from jmvae_dist.kernels.noise import KeyedNoise

# Where |x| is below this, exp(x) - 1 - x would cancel and its power series is used instead.
_SERIES_RADIUS = 0.35
# Powers of x after which the series' next term is below the rounding error at the radius.
_SERIES_DEGREE = {torch.float32: 9, torch.float64: 16}


def computation_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


class _Phi(torch.autograd.Function):
    """phi(x) = exp(x) - 1 - x of two tensors, with its derivative computed as expm1(x) instead of by the series.

    Of two, because torch.compile with symbolic sizes (torch 2.13) fails on a second call, and without gradients on
    a variable number of arguments.
    """

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(first, second)
        return _phi(first), _phi(second)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        first, second = ctx.saved_tensors
        return grad_outputs[0] * torch.expm1(first), grad_outputs[1] * torch.expm1(second)


def _phi(x: Tensor) -> Tensor:
    near_zero = x.clamp(-_SERIES_RADIUS, _SERIES_RADIUS)
    degree = _SERIES_DEGREE[x.dtype]
    # Horner's scheme for 1/2! + x/3! + ... + x^(degree-2)/degree!
    series = torch.full_like(near_zero, 1.0 / math.factorial(degree))
    for power in range(degree - 1, 1, -1):
        series.mul_(near_zero).add_(1.0 / math.factorial(power))
    series.mul_(near_zero).mul_(near_zero)
    return torch.where(x.abs() < _SERIES_RADIUS, series, torch.expm1(x) - x)


def phi(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """exp(x) - 1 - x of two float32 or float64 tensors, accurate to rounding error and never negative.

    The plain expression loses all digits for small x: with a unimodal posterior close to the joint one, the
    KL divergence would come out with a relative error of 1, or negative.
    """
    return _Phi.apply(first, second)


def gaussian_kl_terms(
    mu_BD: Tensor, logvar_BD: Tensor, mus_MBD: Tensor, logvars_MBD: Tensor, noise: Tensor | KeyedNoise
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample the joint posterior q and compute its KL divergences to the prior and to every expert q_m.

    With d = logvar - logvar_m (Kingma and Welling 2014, appendix B, rearranged by phi(x) = exp(x) - 1 - x):
    ``KL(q || N(0, I)) = 1/2 sum_D (mu^2 + phi(logvar))`` and
    ``KL(q || q_m) = 1/2 sum_D ((mu - mu_m)^2 exp(-logvar_m) + phi(d))``.

    Args:
        mu_BD: Mean of q, shape (B, D).
        logvar_BD: Log-variance of q, shape (B, D).
        mus_MBD: Means of the experts, shape (M, B, D).
        logvars_MBD: Log-variances of the experts, shape (M, B, D).
        noise: Standard normal noise, shape (B, D), or the key that it is computed from.

    Returns:
        Three tensors, float32 (float64 if an input is float64): the sample ``z = mu + exp(logvar / 2) *
        noise`` (B, D), the KL to the prior (B,), and the KL to the experts (M, B), both in nats, summed over
        D. They are finite in float32 as long as all differences of log-variances stay below about 80 (the
        model clamps its log-variances for this reason).
    """
    noise_BD = noise.draw(mu_BD.shape[1]) if isinstance(noise, KeyedNoise) else noise
    dtype = computation_dtype((mu_BD, logvar_BD, mus_MBD, logvars_MBD, noise_BD))
    mu_BD, logvar_BD, noise_BD = mu_BD.to(dtype), logvar_BD.to(dtype), noise_BD.to(dtype)
    mus_MBD, logvars_MBD = mus_MBD.to(dtype), logvars_MBD.to(dtype)

    z_BD = mu_BD + torch.exp(0.5 * logvar_BD) * noise_BD
    phi_prior_BD, phi_experts_MBD = phi(logvar_BD, logvar_BD - logvars_MBD)
    kl_prior_B = 0.5 * (mu_BD.square() + phi_prior_BD).sum(-1)
    distances_MBD = (mu_BD - mus_MBD).square() * torch.exp(-logvars_MBD)
    kl_experts_MB = 0.5 * (distances_MBD + phi_experts_MBD).sum(-1)
    return z_BD, kl_prior_B, kl_experts_MB


def product_of_experts(
    mus_MBD: Tensor, logvars_MBD: Tensor, mask: Tensor | None = None, prior_expert: bool = False
) -> tuple[Tensor, Tensor]:
    """Product of diagonal Gaussians (Hinton 2002): precisions add, means are weighted by precision.

    Computed from log-precisions by log-sum-exp and softmax, so that neither tiny nor huge variances overflow.

    Args:
        mus_MBD: Means of the experts, shape (M, B, D).
        logvars_MBD: Log-variances of the experts, shape (M, B, D).
        mask: bool, shape (M,) or (B, M): which experts take part. All by default.
            Values of the others, including NaN, reach neither the result nor any gradient.
        prior_expert: Let the prior N(0, I) take part as one more expert.

    Returns:
        Mean and log-variance of the product, each (B, D), float32 (float64 if an input is float64).
        The product of no expert at all is the prior N(0, I).
    """
    dtype = computation_dtype((mus_MBD, logvars_MBD))
    mus_MBD, log_precisions_MBD = mus_MBD.to(dtype), -logvars_MBD.to(dtype)
    if mask is None:
        mask_MB1 = mus_MBD.new_ones((len(mus_MBD), 1, 1), dtype=torch.bool)
    else:
        mask_MB1 = mask[:, None, None] if mask.ndim == 1 else mask.T[:, :, None]

    # The prior's row keeps the log-sum-exp finite where no expert takes part; elsewhere it weighs exactly 0.
    use_prior_1B1 = ~mask_MB1.any(0, keepdim=True) | prior_expert
    prior_1BD = torch.where(use_prior_1B1, 0.0, -math.inf).to(dtype).expand(1, *mus_MBD.shape[1:])
    log_precisions_MBD = torch.where(mask_MB1, log_precisions_MBD, -math.inf)
    all_log_precisions = torch.cat([prior_1BD, log_precisions_MBD])

    logvar_BD = -torch.logsumexp(all_log_precisions, dim=0)
    weights_MBD = torch.softmax(all_log_precisions, dim=0)[1:]
    mu_BD = (weights_MBD * torch.where(mask_MB1, mus_MBD, 0.0)).sum(0)
    return mu_BD, logvar_BD

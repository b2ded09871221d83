"""Log-likelihoods summed over a sample in one operation, where there is one for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jmvae_dist.kernels import ops
from jmvae_dist.kernels.gaussian import choose
from jmvae_dist.kernels.likelihood_sums import summed_log_prob
from jmvae_dist.kernels.reference import computation_dtype

_BY_TRITON = ("normal", "laplace", "bernoulli")
_BY_TORCH = ("normal", "laplace")


def is_fused(kind: str, decoded: Tensor, target: Tensor, kernels: str) -> bool:
    """Whether :func:`fused_log_prob` computes this; if not, it is the sum of the log-probability per element.

    That is so for data that needs a gradient, for the categorical distribution, and without Triton for Bernoulli's,
    of which torch has a kernel for the elements.
    """
    if target.requires_grad:
        return False
    return kind in _BY_TORCH or (kind in _BY_TRITON and _runs_triton(decoded, target, kernels))


def fused_log_prob(kind: str, scale: float, decoded: Tensor, target: Tensor, kernels: str) -> Tensor:
    """log p(target | decoded) in nats, summed over the sample's shape.

    Args:
        kind: normal, laplace or bernoulli (with logits).
        scale: Standard deviation of the normal, b of the Laplace distribution; 1 for bernoulli.
        decoded: Decoder output, (*leading, *shape), where `leading` ends in B; float32, bfloat16, float16 or float64.
        target: Data, (B, *shape), likewise.
        kernels: Who computes; see `model_config.ModelSection`.

    Returns:
        float32, or float64 if an argument is float64; shape `leading`.

    Raises:
        ValueError: Shapes or devices do not fit together.
    """
    shape, num_leading = target.shape[1:], decoded.ndim - target.ndim + 1
    if num_leading < 1 or decoded.shape[num_leading - 1 :] != target.shape:
        raise ValueError(f"decoded: shape {tuple(decoded.shape)}, expected (..., *{tuple(target.shape)})")
    if decoded.device != target.device:
        raise ValueError(f"target: on {target.device}, but decoded is on {decoded.device}")
    leading, size = decoded.shape[:num_leading], math.prod(shape)
    decoded_LF, target_BF = decoded.reshape(*leading, size), target.reshape(-1, size)
    if _runs_triton(decoded, target, kernels):
        sum_N = ops.log_prob(decoded_LF.flatten(0, -2).contiguous(), target_BF.contiguous(), kind, scale)
        return sum_N.reshape(leading)
    dtype = computation_dtype((decoded, target))
    with torch.autocast(decoded.device.type, enabled=False):
        return summed_log_prob(kind, scale, decoded_LF.to(dtype), target_BF.to(dtype))


def _runs_triton(decoded: Tensor, target: Tensor, kernels: str) -> bool:
    is_float32 = computation_dtype((decoded, target)) == torch.float32
    return is_float32 and choose(kernels, decoded.device.type) == "triton"

"""Log-likelihoods summed over a sample by a fused kernel, where there is one for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jmvae_dist.kernels import ops
from jmvae_dist.kernels.gaussian import choose
from jmvae_dist.kernels.reference import computation_dtype

_FUSED = ("normal", "laplace", "bernoulli")


def is_fused(kind: str, decoded: Tensor, target: Tensor, kernels: str) -> bool:
    """Whether :func:`fused_log_prob` computes this; if not, it is for torch to do.

    The categorical distribution is left to torch, as are float64 tensors and data that needs a gradient.
    """
    if kind not in _FUSED or choose(kernels, decoded.device.type) != "triton":
        return False
    return computation_dtype((decoded, target)) == torch.float32 and not target.requires_grad


def fused_log_prob(kind: str, scale: float, decoded: Tensor, target: Tensor) -> Tensor:
    """log p(target | decoded) in nats, summed over the sample's shape.

    Args:
        kind: normal, laplace or bernoulli (with logits).
        scale: Standard deviation of the normal, b of the Laplace distribution; 1 for bernoulli.
        decoded: Decoder output, (*leading, *shape), where `leading` ends in B; float32, bfloat16 or float16.
        target: Data, (B, *shape), likewise.

    Returns:
        float32, shape `leading`.

    Raises:
        ValueError: Shapes or devices do not fit together.
    """
    shape, num_leading = target.shape[1:], decoded.ndim - target.ndim + 1
    if num_leading < 1 or decoded.shape[num_leading - 1 :] != target.shape:
        raise ValueError(f"decoded: shape {tuple(decoded.shape)}, expected (..., *{tuple(target.shape)})")
    if decoded.device != target.device:
        raise ValueError(f"target: on {target.device}, but decoded is on {decoded.device}")
    size = math.prod(shape)
    decoded_NF, target_BF = decoded.reshape(-1, size).contiguous(), target.reshape(-1, size).contiguous()
    return ops.log_prob(decoded_NF, target_BF, kind, scale).reshape(decoded.shape[:num_leading])

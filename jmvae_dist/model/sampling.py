"""Samples of diagonal Gaussians: standard normal noise, given by the caller or drawn, and what it makes.

Shape suffixes: B batch, D latent dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jmvae_dist.errors import DataError
from jmvae_dist.model.inputs import require_tensor
from jmvae_dist.model.modules import GaussianParams


def check_noise(noise: Tensor, shape: tuple[int, ...]) -> None:
    """Check noise that the caller gives.

    Raises:
        DataError: It is not a tensor, or not of this shape.
    """
    require_tensor("noise", noise)
    if tuple(noise.shape) != tuple(shape):
        raise DataError(f"noise: shape {tuple(noise.shape)}, expected {tuple(shape)}")


def draw_noise(
    noise: Tensor | None, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """The given noise, checked, or noise drawn from the generator; in dtype and on the device of `like`.

    Args:
        noise: Standard normal noise; None: it is drawn.
        shape: What it has, or gets.
        like: For dtype and device.
        generator: None: torch's own.

    Raises:
        DataError: The given noise is not a tensor, or not of this shape.
    """
    if noise is None:
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
    check_noise(noise, shape)
    return noise.to(like.device, like.dtype)


def sample(posterior: GaussianParams, noise: Tensor) -> Tensor:
    """z = mu + sigma * noise, for noise (..., B, D)."""
    return posterior.mu + torch.exp(0.5 * posterior.logvar) * noise

"""The operations on diagonal Gaussians that the model uses. Other modules import them from here only."""

from __future__ import annotations

import torch
from torch import Tensor

from jmvae_dist.kernels import reference

__all__ = ["gaussian_kl_terms", "product_of_experts"]


def gaussian_kl_terms(
    mu_BD: Tensor, logvar_BD: Tensor, mus_MBD: Tensor, logvars_MBD: Tensor, noise_BD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample of q (B, D), KL(q || prior) (B,) and KL(q || q_m) (M, B); float32 or float64 under any autocast.

    See :func:`jmvae_dist.kernels.reference.gaussian_kl_terms`.
    """
    with torch.autocast(mu_BD.device.type, enabled=False):
        return reference.gaussian_kl_terms(mu_BD, logvar_BD, mus_MBD, logvars_MBD, noise_BD)


def product_of_experts(
    mus_MBD: Tensor, logvars_MBD: Tensor, mask: Tensor | None = None, prior_expert: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and log-variance (B, D) of the product of experts; float32 or float64 under any autocast.

    See :func:`jmvae_dist.kernels.reference.product_of_experts`.
    """
    with torch.autocast(mus_MBD.device.type, enabled=False):
        return reference.product_of_experts(mus_MBD, logvars_MBD, mask, prior_expert)

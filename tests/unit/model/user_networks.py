"""Networks and likelihoods as a user might write them, named by configurations of tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Encoder(nn.Module):
    """Fills in what the configuration leaves out: `shape` and `latent_dim`."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(torch.Size(shape).numel(), width), nn.Tanh(), nn.Linear(width, 2 * latent_dim)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.layers(x).chunk(2, dim=-1)
        return mu, logvar


class Decoder(nn.Module):
    def __init__(self, shape: tuple[int, ...], latent_dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(latent_dim, torch.Size(shape).numel())
        self.shape = shape

    def forward(self, z: Tensor) -> Tensor:
        return self.layer(z).unflatten(-1, self.shape)


class JointEncoder(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]], latent_dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(sum(torch.Size(shape).numel() for shape in shapes.values()), 2 * latent_dim)

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        mu, logvar = self.layer(torch.cat([x.flatten(1) for x in inputs.values()], dim=-1)).chunk(2, dim=-1)
        return mu, logvar


def poisson(recon: Tensor, target: Tensor, offset: float = 0.0) -> Tensor:
    """log p of counts whose log-rate is the decoder's output."""
    return target * (recon + offset) - (recon + offset).exp() - torch.lgamma(target + 1)


def summed_categorical(recon: Tensor, target: Tensor) -> Tensor:
    """Has summed over the last dimension."""
    return (target * F.log_softmax(recon, dim=-1)).sum(-1)


def scalar(recon: Tensor, target: Tensor) -> Tensor:
    return (recon - target).square().sum()


NOT_A_CLASS = 3

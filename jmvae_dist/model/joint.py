"""Joint encoders: all modalities {m: (B, *shape)} -> GaussianParams, each (B, D). Every parameter gets a gradient."""

from __future__ import annotations

import copy
import math

import torch
from einops import rearrange
from torch import Tensor, nn

from jmvae_dist.model.modules import GaussianHeads, GaussianParams, MLPTrunk, module_dict


class ConcatJointEncoder(nn.Module):
    """All modalities, flattened and concatenated in their order, through one multilayer perceptron."""

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        hidden_dims: list[int],
        latent_dim: int,
        activation: str,
        sigma: str,
    ) -> None:
        super().__init__()
        self.modalities = list(shapes)
        self.hidden = MLPTrunk(sum(map(math.prod, shapes.values())), hidden_dims, activation)
        self.heads = GaussianHeads(hidden_dims[-1], latent_dim, sigma)

    def forward(self, inputs: dict[str, Tensor]) -> GaussianParams:
        flattened = [rearrange(inputs[name], "b ... -> b (...)") for name in self.modalities]
        return self.heads.gaussian(self.hidden(torch.cat(flattened, dim=-1)))


class FusionJointEncoder(nn.Module):
    """Features of each modality, found by a branch of its own and concatenated, through a multilayer perceptron.

    Args:
        branches: Trunk of each modality, in the order of the modalities.
        hidden_dims: Hidden layers on top of them.
        latent_dim: D.
        activation: Non-linearity.
        sigma: See `GaussianHeads`.
    """

    def __init__(
        self, branches: dict[str, nn.Module], hidden_dims: list[int], latent_dim: int, activation: str, sigma: str
    ) -> None:
        super().__init__()
        self.branches = module_dict("joint_encoder", branches, list(branches))
        num_features = 0
        for branch in branches.values():
            assert isinstance(branch.num_features, int)
            num_features += branch.num_features
        self.hidden = MLPTrunk(num_features, hidden_dims, activation)
        self.heads = GaussianHeads(hidden_dims[-1], latent_dim, sigma)

    def forward(self, inputs: dict[str, Tensor]) -> GaussianParams:
        features = [branch(inputs[name]).to(self.heads.weight.dtype) for name, branch in self.branches.items()]
        return self.heads.gaussian(self.hidden(torch.cat(features, dim=-1)))


class LinearBranch(nn.Module):
    """A trunk that ends in a linear layer, so that branches of any size meet at one."""

    def __init__(self, trunk: nn.Module, num_features: int) -> None:
        super().__init__()
        self.trunk = trunk
        assert isinstance(trunk.num_features, int)
        self.output = nn.Linear(trunk.num_features, num_features)
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.trunk(x))


class EncoderBranch(nn.Module):
    """A copy of an encoder of the user's as a branch: mean and log-variance, (B, 2 D), are its features.

    Both, because a parameter that only one of them depends on would otherwise never get a gradient.
    """

    def __init__(self, encoder: nn.Module, latent_dim: int) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.num_features = 2 * latent_dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(tuple(self.encoder(x)), dim=-1)

"""The default networks: multilayer perceptrons for encoders, decoders and the joint encoder.

Shape suffixes: B batch, D latent dimension, F features of a flattened modality.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from jmvae_dist.config import JMVAEConfig, NetworksConfig
from jmvae_dist.errors import ConfigError

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class GaussianParams(NamedTuple):
    """Mean and log-variance of a diagonal Gaussian, each (B, D)."""

    mu: Tensor
    logvar: Tensor


class Networks(NamedTuple):
    """The networks of a JMVAE; the dictionaries are keyed by modality, in the order of the modalities."""

    encoders: dict[str, nn.Module]
    decoders: dict[str, nn.Module]
    joint_encoder: nn.Module


def _hidden_layers(input_size: int, hidden_dims: list[int], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size_in, size_out in itertools.pairwise([input_size, *hidden_dims]):
        layers += [nn.Linear(size_in, size_out), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


class _GaussianMLP(nn.Module):
    """Features (B, F) -> GaussianParams; both heads are one linear layer: one large product, not two."""

    def __init__(self, input_size: int, hidden_dims: list[int], latent_dim: int, activation: str) -> None:
        super().__init__()
        self.hidden = _hidden_layers(input_size, hidden_dims, activation)
        self.heads = nn.Linear(hidden_dims[-1], 2 * latent_dim)

    def gaussian(self, features_BF: Tensor) -> GaussianParams:
        mu_BD, logvar_BD = self.heads(self.hidden(features_BF)).chunk(2, dim=-1)
        return GaussianParams(mu_BD, logvar_BD)


class MLPEncoder(_GaussianMLP):
    """Unimodal encoder: one modality (B, *shape) -> GaussianParams, each (B, D)."""

    def __init__(self, shape: tuple[int, ...], hidden_dims: list[int], latent_dim: int, activation: str) -> None:
        super().__init__(math.prod(shape), hidden_dims, latent_dim, activation)

    def forward(self, x: Tensor) -> GaussianParams:
        return self.gaussian(rearrange(x, "b ... -> b (...)"))


class MLPJointEncoder(_GaussianMLP):
    """Joint encoder: all modalities, flattened and concatenated in their order -> GaussianParams."""

    def __init__(
        self, input_dims: dict[str, tuple[int, ...]], hidden_dims: list[int], latent_dim: int, activation: str
    ) -> None:
        super().__init__(sum(map(math.prod, input_dims.values())), hidden_dims, latent_dim, activation)
        self.modalities = list(input_dims)

    def forward(self, inputs: dict[str, Tensor]) -> GaussianParams:
        flattened = [rearrange(inputs[name], "b ... -> b (...)") for name in self.modalities]
        return self.gaussian(torch.cat(flattened, dim=-1))


class MLPDecoder(nn.Module):
    """Decoder: z (*, D) -> (*, *shape): means for normal and laplace, logits for bernoulli and categorical.

    It ends in a linear layer for every likelihood; what the likelihood needs beyond that is part of its
    formula.
    """

    def __init__(self, latent_dim: int, hidden_dims: list[int], shape: tuple[int, ...], activation: str) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.hidden = _hidden_layers(latent_dim, hidden_dims, activation)
        self.output = nn.Linear(hidden_dims[-1], math.prod(shape))

    def forward(self, z: Tensor) -> Tensor:
        return self.output(self.hidden(z)).unflatten(-1, self.shape)


def build_networks(config: JMVAEConfig, networks: NetworksConfig | None = None) -> Networks:
    """Default networks for `config`, with the sizes of `networks` (its defaults if None).

    Raises:
        ConfigError: `config.input_dims` is missing.
    """
    networks = networks or NetworksConfig()
    if config.input_dims is None:
        raise ConfigError("input_dims: missing; the default networks need the shape of every modality")
    latent_dim, activation = config.latent_dim, networks.activation
    shapes = config.input_dims
    return Networks(
        encoders={
            name: MLPEncoder(shape, networks.encoder_hidden_dims, latent_dim, activation)
            for name, shape in shapes.items()
        },
        decoders={
            name: MLPDecoder(latent_dim, networks.decoder_hidden_dims, shape, activation)
            for name, shape in shapes.items()
        },
        joint_encoder=MLPJointEncoder(shapes, networks.joint_hidden_dims, latent_dim, activation),
    )

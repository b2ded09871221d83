"""What all networks share: Gaussian parameters, the encoder's last layer, and multilayer perceptrons.

An encoder is a *trunk*, which turns a modality into features, and one linear layer for both parameters of the
posterior. A trunk is a module ``(B, *shape) -> (B, F)`` with the attribute `num_features` = F.

Shape suffixes: B batch, D latent dimension, F features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from jmvae_dist.errors import ConfigError
from jmvae_dist.kernels.reference import computation_dtype
from jmvae_dist.model.recomputation import Blocks

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
# Below this softplus(h) is exp(h) up to a relative error of 1e-9, and its logarithm is h.
_SOFTPLUS_IS_EXP = -20.0


class GaussianParams(NamedTuple):
    """Mean and log-variance of a diagonal Gaussian, each (B, D)."""

    mu: Tensor
    logvar: Tensor


def module_dict(key: str, modules: Mapping[str, nn.Module], modalities: list[str]) -> nn.ModuleDict:
    """Register modules, which may be the user's, in the order of the modalities.

    Raises:
        ConfigError: A modality is missing or unknown, something is not a module, or a name cannot be
            registered.
    """
    if set(modules) != set(modalities):
        raise ConfigError(f"{key}: given for {list(modules)}, but the modalities are {modalities}")
    for name, module in modules.items():
        if not isinstance(module, nn.Module):
            raise ConfigError(f"{key}.{name}: a {type(module).__name__} is not a torch.nn.Module")
    try:
        return nn.ModuleDict({name: modules[name] for name in modalities})
    except KeyError as error:
        raise ConfigError(f"{key}: torch cannot register a module under this name: {error.args[0]}") from None


def log_softplus(h: Tensor) -> Tensor:
    """log(log(1 + e^h)), finite for every finite h, with gradients that are."""
    is_exp = h < _SOFTPLUS_IS_EXP
    # The branch not taken must not hold log(0): its gradient would be 0 * inf.
    return torch.where(is_exp, h, F.softplus(h.clamp(min=_SOFTPLUS_IS_EXP)).log())


class GaussianHeads(nn.Linear):
    """Features (B, F) -> GaussianParams; one linear layer for both: one large product, not two.

    Args:
        num_features: F.
        latent_dim: D.
        sigma: exp: the second half h of the output is the log-variance; softplus: softplus(h) is the standard
            deviation (Suzuki et al. 2016).
    """

    def __init__(self, num_features: int, latent_dim: int, sigma: str) -> None:
        super().__init__(num_features, 2 * latent_dim)
        self.sigma = sigma

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sigma={self.sigma}"

    def gaussian(self, features_BF: Tensor) -> GaussianParams:
        """Mean and log-variance, each (B, D)."""
        mu_BD, h_BD = self(features_BF).chunk(2, dim=-1)
        if self.sigma == "exp":
            return GaussianParams(mu_BD, h_BD)
        return GaussianParams(mu_BD, 2.0 * log_softplus(h_BD.to(computation_dtype((h_BD,)))))


def _activation_in_place(name: str) -> nn.Module:
    """An activation whose argument nobody else needs; only ReLU can be differentiated from its result."""
    return nn.ReLU(inplace=True) if name == "relu" else ACTIVATIONS[name]()


class MLP(Blocks):
    """Linear layers on the last dimension, each followed by the activation, with layer norm between if asked.

    All of them are one block.
    """

    def __init__(self, input_size: int, hidden_dims: list[int], activation: str, layer_norm: bool = False) -> None:
        layers: list[nn.Module] = []
        for size_in, size_out in itertools.pairwise([input_size, *hidden_dims]):
            norm = [nn.LayerNorm(size_out)] if layer_norm else []
            layers += [nn.Linear(size_in, size_out), *norm, _activation_in_place(activation)]
        super().__init__([layers])
        self.num_features = hidden_dims[-1]


class MLPTrunk(MLP):
    """An `MLP` on flattened samples (B, *shape)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(rearrange(x, "b ... -> b (...)"))


class Encoder(nn.Module):
    """Unimodal encoder: one modality (B, *shape) -> GaussianParams, each (B, D)."""

    def __init__(self, trunk: nn.Module, latent_dim: int, sigma: str) -> None:
        super().__init__()
        self.hidden = trunk
        assert isinstance(trunk.num_features, int)
        self.heads = GaussianHeads(trunk.num_features, latent_dim, sigma)

    def forward(self, x: Tensor) -> GaussianParams:
        return self.heads.gaussian(self.hidden(x))


class MLPDecoder(nn.Module):
    """Decoder: z (*, D) -> (*, *shape): means for normal and laplace, logits for bernoulli and categorical.

    It ends in a linear layer for every likelihood; what the likelihood needs beyond that is part of its
    formula. `output` "sigmoid" is for models that come from elsewhere and end so.
    """

    def __init__(
        self,
        latent_dim: int,
        hidden_dims: list[int],
        shape: tuple[int, ...],
        activation: str,
        *,
        layer_norm: bool = False,
        output: str = "linear",
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.ends_in_sigmoid = output == "sigmoid"
        self.hidden = MLP(latent_dim, hidden_dims, activation, layer_norm)
        self.output = nn.Linear(hidden_dims[-1], math.prod(shape))

    def extra_repr(self) -> str:
        return "ends in a sigmoid" if self.ends_in_sigmoid else ""

    def forward(self, z: Tensor) -> Tensor:
        decoded = self.output(self.hidden(z)).unflatten(-1, self.shape)
        return torch.sigmoid(decoded) if self.ends_in_sigmoid else decoded

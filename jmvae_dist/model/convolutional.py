"""Convolutional networks for pictures (C, H, W) and, along one side, for signals and texts (C, L).

A stage halves every side, rounding up, and a decoder's stage undoes exactly that, so that any size works. Norms are
over the channels and places of one sample: no number depends on the rest of the batch, hence none on the number of
ranks or on micro-batches, as batch normalisation would make it.

Shape suffixes: B batch, C channels, D latent dimension, F features.
"""

from __future__ import annotations

import itertools
import math

import torch
from einops import rearrange
from torch import Tensor, nn

from jmvae_dist.model.modules import ACTIVATIONS, MLP, MLPTrunk
from jmvae_dist.model.recomputation import Blocks

_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}
# From r (and s) times as many channels to sides r (and s) times as long.
_SPREAD = {1: "b (c r) l -> b c (l r)", 2: "b (c r s) h w -> b c (h r) (w s)"}
_FACTORS = {1: {"r": 2}, 2: {"r": 2, "s": 2}}
_MOST_GROUPS = 8
_LEAST_CHANNELS_PER_GROUP = 4


def _convolution(num_sides: int, channels_in: int, channels_out: int, stride: int = 1) -> nn.Module:
    return _CONVOLUTIONS[num_sides](channels_in, channels_out, kernel_size=3, stride=stride, padding=1)


class _GroupNorm(nn.GroupNorm):
    """Group norm that also takes a single sample of a single place, which torch refuses."""

    def __init__(self, channels: int) -> None:
        divisors = [count for count in range(1, _MOST_GROUPS + 1) if channels % count == 0]
        # A group of one value would be normalised away where sides have shrunk to 1.
        fitting = [count for count in divisors if channels // count >= _LEAST_CHANNELS_PER_GROUP]
        super().__init__(max(fitting, default=1), channels)

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _norm_and_activation(channels: int, normalization: str, activation: str) -> list[nn.Module]:
    norm = [_GroupNorm(channels)] if normalization == "group" else []
    return [*norm, ACTIVATIONS[activation]()]


class _ResidualBlock(nn.Module):
    """x + convolution(activation(norm(convolution(activation(norm(x)))))) (He et al. 2016, pre-activation)."""

    def __init__(self, num_sides: int, channels: int, normalization: str, activation: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += _norm_and_activation(channels, normalization, activation)
            layers.append(_convolution(num_sides, channels, channels))
        self.residual = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)


class _Halve(nn.Module):
    """(B, C, *sides) -> (B, C', *ceil(sides / 2))."""

    def __init__(self, num_sides: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.convolution = _convolution(num_sides, channels_in, channels_out, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x)


class _Double(nn.Module):
    """(B, C, *ceil(sides / 2)) -> (B, C', *sides): sub-pixel convolution (Shi et al. 2016), cut to odd sides."""

    def __init__(self, channels_in: int, channels_out: int, sides: tuple[int, ...]) -> None:
        super().__init__()
        self.sides = sides
        self.convolution = _convolution(len(sides), channels_in, channels_out * 2 ** len(sides))

    def forward(self, x: Tensor) -> Tensor:
        spread = rearrange(self.convolution(x), _SPREAD[len(self.sides)], **_FACTORS[len(self.sides)])
        return spread[(..., *(slice(side) for side in self.sides))]


def _sides_of_stages(sides: tuple[int, ...], num_stages: int) -> list[tuple[int, ...]]:
    """The sides before each of the stages and after the last one."""
    stages = [sides]
    for _ in range(num_stages):
        stages.append(tuple(-(-side // 2) for side in stages[-1]))
    return stages


class ConvTrunk(nn.Module):
    """(B, C, *sides) -> (B, F): per stage a halving and residual blocks; then linear layers on what is left.

    Args:
        shape: (C, H, W) or (C, L).
        channels: Of every stage.
        residual_blocks: Per stage.
        normalization: group or none.
        hidden_dims: Sizes of the linear layers.
        activation: Non-linearity.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        channels: list[int],
        residual_blocks: int,
        normalization: str,
        hidden_dims: list[int],
        activation: str,
    ) -> None:
        super().__init__()
        sides = shape[1:]
        blocks: list[list[nn.Module]] = []
        before: list[nn.Module] = []
        for channels_in, channels_out in itertools.pairwise([shape[0], *channels]):
            blocks.append([*before, _Halve(len(sides), channels_in, channels_out)])
            blocks += [
                [_ResidualBlock(len(sides), channels_out, normalization, activation)] for _ in range(residual_blocks)
            ]
            before = _norm_and_activation(channels_out, normalization, activation)
        self.stages = Blocks([*blocks, before])
        remaining = channels[-1] * math.prod(_sides_of_stages(sides, len(channels))[-1])
        self.features = MLPTrunk(remaining, hidden_dims, activation)
        self.num_features = hidden_dims[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.features(self.stages(x))


class ConvDecoder(nn.Module):
    """z (B, D) -> (B, C, *sides): the stages of `ConvTrunk` in reverse, and a convolution to the output's channels.

    Args:
        latent_dim: D.
        shape: (C, H, W) or (C, L) of the output.
        channels: Of every stage, in the trunk's order.
        residual_blocks: Per stage.
        normalization: group or none.
        hidden_dims: Sizes of the linear layers, in the trunk's order.
        activation: Non-linearity.
    """

    def __init__(
        self,
        latent_dim: int,
        shape: tuple[int, ...],
        channels: list[int],
        residual_blocks: int,
        normalization: str,
        hidden_dims: list[int],
        activation: str,
    ) -> None:
        super().__init__()
        sides = _sides_of_stages(shape[1:], len(channels))
        self.smallest = (channels[-1], *sides[-1])
        self.features = MLP(latent_dim, [*reversed(hidden_dims), math.prod(self.smallest)], activation)
        blocks: list[list[nn.Module]] = []
        for number in reversed(range(len(channels))):
            width = channels[number]
            blocks += [
                [_ResidualBlock(len(sides[0]), width, normalization, activation)] for _ in range(residual_blocks)
            ]
            double = _Double(width, channels[max(number - 1, 0)], sides[number])
            blocks.append([*_norm_and_activation(width, normalization, activation), double])
        last = _convolution(len(sides[0]), channels[0], shape[0])
        blocks.append([*_norm_and_activation(channels[0], normalization, activation), last])
        self.stages = Blocks(blocks)

    def forward(self, z: Tensor) -> Tensor:
        return self.stages(self.features(z).unflatten(-1, self.smallest))

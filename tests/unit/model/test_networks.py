"""Default networks: shapes, sizes, and what comes last."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jmvae_dist.errors import ConfigError
from jmvae_dist.model import GaussianParams, build_networks
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig

SHAPES = {"image": (3, 4, 4), "label": (7,)}


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("batch_size", [0, 1, 5])
def test_shapes(activation: str, batch_size: int) -> None:
    sizes = NetworksConfig([8, 9], [10, 11], [12, 13], activation=activation)
    encoders, decoders, joint_encoder = build_networks(JMVAEConfig(2, 6, dict(SHAPES)), sizes)
    inputs = {name: torch.randn(batch_size, *shape) for name, shape in SHAPES.items()}
    assert list(encoders) == list(decoders) == list(SHAPES)
    for name, shape in SHAPES.items():
        output = encoders[name](inputs[name])
        assert isinstance(output, GaussianParams)
        assert output.mu.shape == output.logvar.shape == (batch_size, 6)
        assert decoders[name](torch.randn(2, batch_size, 6)).shape == (2, batch_size, *shape)
    assert joint_encoder(inputs).mu.shape == (batch_size, 6)


def test_sizes_follow_the_configuration() -> None:
    sizes = NetworksConfig([8, 9], [10, 11, 12], [13])
    encoders, decoders, joint_encoder = build_networks(JMVAEConfig(2, 6, dict(SHAPES)), sizes)

    def widths(module: nn.Module) -> list[tuple[int, int]]:
        linear_layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        return [(layer.in_features, layer.out_features) for layer in linear_layers]

    assert widths(encoders["image"]) == [(48, 8), (8, 9), (9, 12)]
    assert widths(decoders["label"]) == [(6, 10), (10, 11), (11, 12), (12, 7)]
    assert widths(joint_encoder) == [(55, 13), (13, 12)]


def test_decoders_reach_any_value() -> None:
    """A squashing last layer would keep a Bernoulli's probabilities away from 0 and 1."""
    decoder = build_networks(JMVAEConfig(2, 6, dict(SHAPES))).decoders["image"]
    decoded = decoder(1e4 * torch.randn(50, 6, generator=torch.Generator().manual_seed(0)))
    assert decoded.min() < -10
    assert decoded.max() > 10


def test_joint_encoder_ignores_the_order_of_its_inputs() -> None:
    joint_encoder = build_networks(JMVAEConfig(2, 6, dict(SHAPES))).joint_encoder
    inputs = {name: torch.randn(2, *shape) for name, shape in SHAPES.items()}
    turned = dict(reversed(inputs.items()))
    assert torch.equal(joint_encoder(inputs).mu, joint_encoder(turned).mu)


def test_input_dims_are_needed() -> None:
    with pytest.raises(ConfigError, match="input_dims"):
        build_networks(JMVAEConfig(2, 6))

"""The configuration of a model, built in Python: its defaults, and what it refuses."""

from __future__ import annotations

import pytest

from jmvae_dist.errors import ConfigError
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_modalities": 1}, "n_modalities"),
        ({"n_modalities": 2, "input_dims": {"a": (3,)}}, "input_dims"),
        ({"n_modalities": 2, "input_dims": {"a": (3,), "b": ()}}, r"input_dims\.b"),
        ({"n_modalities": 2, "input_dims": {"a": (3,), "b.c": (2,)}}, "without dots"),
        ({"n_modalities": 2, "warmup": -1}, "warmup"),
        ({"n_modalities": 2, "custom_architectures": None}, "custom_architectures"),
        ({"n_modalities": 2, "custom_architectures": "encoders"}, "custom_architectures"),
        ({"n_modalities": 2, "decoder_dist_params": {"a": {"scale": 0}}}, r"a\.scale"),
        ({"n_modalities": 2, "decoder_dist_params": {"a": {"sclae": 1}}}, "unknown parameter 'sclae'"),
        (
            {
                "n_modalities": 2,
                "input_dims": {"a": (3,), "b": (2,)},
                "uses_likelihood_rescaling": True,
                "rescale_factors": {"a": 1.0},
            },
            "rescale_factors: modality 'b' is missing",
        ),
    ],
)
def test_model_configuration_in_python(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        JMVAEConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"encoder_hidden_dims": value}, "encoder_hidden_dims") for value in (None, 8, "88", ["8"], [8.0], [True])),
        ({"activation": "swish"}, r"activation: 'swish' .*'relu', 'gelu'"),
        ({"activation": None}, "activation"),
    ],
)
def test_network_sizes_in_python(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NetworksConfig(**options)


def test_model_configuration_has_the_documented_defaults() -> None:
    config = JMVAEConfig(n_modalities=2)
    assert (config.latent_dim, config.alpha, config.warmup, config.beta) == (10, 0.1, 10, 1.0)
    assert config.uses_likelihood_rescaling is False
    assert config.input_dims is config.rescale_factors is config.decoders_dist is config.decoder_dist_params is None

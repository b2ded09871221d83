"""A configuration built in Python, where nothing has parsed it, refuses values of the wrong type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jmvae_dist.errors import ConfigError
from jmvae_dist.model_config import JMVAEConfig

SHAPES = {"a": (3,), "b": (2, 2)}


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"latent_dim": 2.5}, "latent_dim: 2.5"),
        ({"latent_dim": True}, "latent_dim: True"),
        ({"latent_dim": "10"}, "latent_dim: '10'"),
        ({"latent_dim": None}, "latent_dim: None"),
        ({"n_modalities": 2.0}, "n_modalities: 2.0"),
        ({"n_modalities": "2"}, "n_modalities: '2'"),
        ({"alpha": True}, "alpha: True"),
        ({"uses_likelihood_rescaling": "no"}, "uses_likelihood_rescaling: 'no'"),
        ({"input_dims": {"a": 3, "b": (2,)}}, "input_dims.a: 3"),
        ({"input_dims": {"a": "33", "b": (2,)}}, "input_dims.a: '33'"),
        ({"input_dims": {"a": (True,), "b": (2,)}}, "input_dims.a: (True,)"),
        ({"input_dims": {"a": (2.0,), "b": (2,)}}, "input_dims.a: (2.0,)"),
        ({"input_dims": {0: (2,), "b": (2,)}}, "input_dims: 0"),
        ({"input_dims": {"all": (2,), "b": (2,)}}, "'all'"),
        ({"input_dims": [(3,), (2,)]}, "input_dims: [(3,), (2,)]"),
        ({"decoders_dist": "normal"}, "decoders_dist: 'normal'"),
        ({"rescale_factors": [1.0, 2.0]}, "rescale_factors: [1.0, 2.0]"),
        ({"rescale_factors": {"a": True, "b": 1.0}}, "rescale_factors.a: True"),
        ({"decoder_dist_params": ["scale"]}, "decoder_dist_params: ['scale']"),
        ({"decoder_dist_params": {"a": 0.5}}, "decoder_dist_params.a: 0.5"),
        ({"decoder_dist_params": {"a": {"scale": True}}}, "decoder_dist_params.a.scale: True"),
        ({"decoder_dist_params": {"a": {"scale": "1"}}}, "decoder_dist_params.a.scale: '1'"),
    ],
)
def test_wrong_types_are_named(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        JMVAEConfig(**{"n_modalities": 2, "input_dims": SHAPES, **options})
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_right_is_accepted() -> None:
    config = JMVAEConfig(2, 1, {"z": [3], "b": (2, 2)}, alpha=0, rescale_factors={"z": np.float64(2), "b": 1})
    assert config.input_dims == {"z": (3,), "b": (2, 2)}

"""Checks of a batch: every mistake is named, and value checks can be switched off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jmvae_dist.errors import DataError
from jmvae_dist.model import JMVAE
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig


def make_model(**parameters: Any) -> JMVAE:
    config = JMVAEConfig(
        3,
        2,
        {"image": (1, 2, 2), "label": (3,), "sound": (4,)},
        decoders_dist={"image": "bernoulli", "label": "categorical", "sound": "normal"},
        decoder_dist_params=parameters,
    )
    return JMVAE(config, networks=NetworksConfig([8], [8], [8]))


def make_inputs() -> dict[str, Tensor]:
    return {
        "image": torch.ones(3, 1, 2, 2),
        "label": torch.eye(3),
        "sound": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    }


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x.pop("sound"), "'sound' is missing"),
        (lambda x: x.update(smell=torch.ones(3, 1)), "unknown modality 'smell'"),
        (
            lambda x: x.update(image=torch.ones(3, 2, 2)),
            r"inputs\.image: shape \(3, 2, 2\), expected \(batch, 1, 2, 2\)",
        ),
        (lambda x: x.update(image=torch.ones(3, 1, 2, 2).byte()), r"inputs\.image: dtype torch\.uint8"),
        (lambda x: x.update(label=torch.eye(3)[:2]), "different batch sizes"),
        (lambda x: x.update(sound=x["sound"].numpy()), r"inputs\.sound: a ndarray is not a torch\.Tensor"),
        (lambda x: x.update(sound=x["sound"].tolist()), r"inputs\.sound: a list is not a torch\.Tensor"),
    ],
)
@pytest.mark.parametrize("check_inputs", [True, False])
def test_structure_is_always_checked(change: Any, match: str, check_inputs: bool) -> None:
    model, inputs = make_model(), make_inputs()
    change(inputs)
    with pytest.raises(DataError, match=match):
        model(inputs, check_inputs=check_inputs)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("sound", torch.nan, r"inputs\.sound: sample 1 .* nan; values must be finite"),
        ("image", torch.inf, r"inputs\.image: sample 1 .* inf; values must be finite"),
        ("image", 0.25, r"inputs\.image: sample 1 .* 0\.25.*decoder_dist_params\.image\.soft_targets"),
        ("label", 1.0, r"inputs\.label: sample 1 .* one-hot .*decoder_dist_params\.label\.soft_targets"),
        ("label", 0.5, r"inputs\.label: sample 1 "),
    ],
)
def test_values(name: str, value: float, match: str) -> None:
    model, inputs = make_model(), make_inputs()
    inputs[name][1].view(-1)[0] = value
    for call in (model, model.encode, lambda x: model.compute_joint_nll(x, 2)):
        with pytest.raises(DataError, match=match):
            call(inputs)
    model(inputs, check_inputs=False)


@pytest.mark.parametrize("inputs", [torch.ones(3, 1, 2, 2), [torch.ones(3, 4)]])
def test_inputs_must_be_a_dictionary(inputs: Any) -> None:
    with pytest.raises(DataError, match="is not a dictionary of tensors"):
        make_model()(inputs)


@pytest.mark.parametrize(("name", "value"), [("sound", torch.nan), ("image", 0.25), ("label", 0.5)])
def test_incomplete_samples_are_named_by_their_index_in_the_batch(name: str, value: float) -> None:
    model, inputs = make_model(), make_inputs()
    inputs[name][0] = torch.nan  # absent
    inputs[name][2].view(-1)[0] = value
    mask = {name: torch.tensor([False, True, True])}
    with pytest.raises(DataError, match=rf"inputs\.{name}: sample 2 of the batch"):
        model.encode(inputs, mask=mask)
    mask[name][2] = False
    model.encode(inputs, mask=mask)


def test_values_of_modalities_that_are_not_used_do_not_matter() -> None:
    model, inputs = make_model(), make_inputs()
    inputs["sound"][0] = torch.nan
    model.encode(inputs, ["image", "label"])


def test_soft_targets() -> None:
    model = make_model(image={"soft_targets": True}, label={"soft_targets": True})
    inputs = make_inputs()
    inputs["image"][1] = 0.25
    inputs["label"][1] = torch.tensor([0.2, 0.3, 0.5])
    assert torch.isfinite(model(inputs).loss)
    inputs["image"][2, 0, 1, 1] = 1.5
    with pytest.raises(DataError, match=r"inputs\.image: sample 2 .* 1\.5; values must be between 0 and 1"):
        model(inputs)

"""Inference over all combinations of subset, mask, number of samples and batch size; and gradients when asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jmvae_dist.model import JMVAE
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig

SHAPES = {"image": (2, 5, 6), "word": (3, 4), "sound": (7,)}
LATENT_DIM = 3
NAMES = list(SHAPES)


def make_model() -> JMVAE:
    torch.manual_seed(0)
    networks = NetworksConfig(
        joint_hidden_dims=[6],
        modalities={
            "image": {"kind": "conv", "channels": [4, 4], "hidden_dims": [6]},
            "word": {"kind": "transformer", "embedding_dim": 4, "layers": 1, "heads": 2},
            "sound": {"kind": "vector", "encoder_hidden_dims": [6], "decoder_hidden_dims": [6]},
        },
    )
    return JMVAE(JMVAEConfig(3, LATENT_DIM, dict(SHAPES)), networks=networks)


MODEL = make_model()


def make_inputs(batch_size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch_size)
    return {name: torch.randn(batch_size, *shape, generator=generator) for name, shape in SHAPES.items()}


@st.composite
def masks(draw: st.DrawFn, batch_size: int) -> dict[str, Tensor] | None:
    names = draw(st.none() | st.lists(st.sampled_from(NAMES), unique=True))
    if names is None:
        return None
    bits = st.lists(st.booleans(), min_size=batch_size, max_size=batch_size)
    return {name: torch.tensor(draw(bits), dtype=torch.bool) for name in names}


@settings(max_examples=40, deadline=None)
@given(data=st.data(), batch_size=st.integers(0, 4), num_samples=st.integers(1, 3))
def test_shapes_do_not_depend_on_sizes(data: st.DataObject, batch_size: int, num_samples: int) -> None:
    given_names = data.draw(st.just("all") | st.sampled_from(NAMES) | st.lists(st.sampled_from(NAMES), min_size=1))
    generated = data.draw(st.just("all") | st.sampled_from(NAMES) | st.lists(st.sampled_from(NAMES), min_size=1))
    flatten, return_mean = data.draw(st.booleans()), data.draw(st.booleans())
    options: dict[str, Any] = {
        "return_mean": return_mean,
        "prior_expert": data.draw(st.booleans()),
        "mask": data.draw(masks(batch_size)),
    }
    inputs = make_inputs(batch_size)
    latent = MODEL.encode(inputs, given_names, num_samples, flatten=flatten, **options)
    leading = (num_samples * batch_size,) if flatten else (num_samples, batch_size)
    assert latent.z.shape == (*leading, LATENT_DIM)
    assert latent.mu.shape == latent.logvar.shape == (batch_size, LATENT_DIM)
    assert all(values.isfinite().all() and not values.requires_grad for values in latent[:3])
    if return_mean:
        assert torch.equal(latent.z.view(num_samples, batch_size, LATENT_DIM), latent.mu.expand(num_samples, -1, -1))
    predicted = MODEL.predict(inputs, given_names, generated, num_samples, flatten, **options)
    wanted = {"all": NAMES}.get(generated, [generated]) if isinstance(generated, str) else generated
    assert set(predicted) == set(wanted)
    assert {name: values.shape for name, values in predicted.items()} == {
        name: (*leading, *SHAPES[name]) for name in predicted
    }


@settings(max_examples=20, deadline=None)
@given(data=st.data(), prior_expert=st.booleans())
def test_a_mixed_batch_is_every_sample_by_itself(data: st.DataObject, prior_expert: bool) -> None:
    inputs, rows = make_inputs(4), 4
    has = {name: data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)) for name in NAMES}
    mixed = {
        name: torch.where(torch.tensor(has[name]).view(-1, *[1] * len(SHAPES[name])), inputs[name], torch.nan)
        for name in NAMES
    }
    mask = {name: torch.tensor(bits) for name, bits in has.items()}
    latent = MODEL.encode(mixed, mask=mask, return_mean=True, prior_expert=prior_expert)
    for row in range(rows):
        names = [name for name in NAMES if has[name][row]]
        mu = logvar = torch.zeros(LATENT_DIM)
        if names:
            alone = MODEL.encode(
                {name: inputs[name][row : row + 1] for name in names}, names, prior_expert=prior_expert
            )
            mu, logvar = alone.mu[0], alone.logvar[0]
        torch.testing.assert_close(latent.mu[row], mu, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(latent.logvar[row], logvar, rtol=1e-4, atol=1e-5)


class TestGradients:
    def test_only_when_asked_for(self) -> None:
        inputs = {name: x.requires_grad_() for name, x in make_inputs(2).items()}
        for given_names in ("all", "image", ["image", "word"]):
            assert not MODEL.predict(inputs, given_names)["sound"].requires_grad
            asked = MODEL.predict(inputs, given_names, with_gradient=True)["sound"]
            names = NAMES if given_names == "all" else [given_names] if isinstance(given_names, str) else given_names
            gradients = torch.autograd.grad(asked.sum(), [inputs[name] for name in names])
            assert all(gradient.any() for gradient in gradients)
            with torch.no_grad():
                assert not MODEL.predict(inputs, given_names, with_gradient=True)["sound"].requires_grad
        assert torch.is_grad_enabled()

    def test_through_masks(self) -> None:
        inputs = {name: x.requires_grad_() for name, x in make_inputs(3).items()}
        mask = {"word": torch.tensor([True, False, True])}
        latent = MODEL.encode(inputs, mask=mask, with_gradient=True)
        (gradient,) = torch.autograd.grad(latent.z.sum(), [inputs["word"]])
        assert [bool(row.any()) for row in gradient] == [True, False, True]

    def test_of_decoders(self) -> None:
        z = torch.randn(2, LATENT_DIM, requires_grad=True)
        assert not MODEL.decode(z)["word"].requires_grad
        decoded = MODEL.decode(z, "word", with_gradient=True)["word"]
        assert torch.autograd.grad(decoded.square().sum(), [z])[0].any()


@pytest.mark.parametrize("is_training", [True, False])
def test_modes_stay_as_they_are(is_training: bool) -> None:
    model = make_model().train(is_training)
    model.encoders["word"].train(not is_training)
    modes = [module.training for module in model.modules()]
    inputs = make_inputs(2)
    model.predict(inputs, "word", N=2, with_gradient=True)
    model.encode(inputs, mask={"word": torch.tensor([True, False])})
    assert [module.training for module in model.modules()] == modes

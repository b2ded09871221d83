"""Networks by name: shapes of all sizes, gradients, independence of the batch, extremes, and errors that help."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from jmvae_dist.errors import ConfigError
from jmvae_dist.model import JMVAE, build_networks
from jmvae_dist.model.convolutional import ConvDecoder, ConvTrunk
from jmvae_dist.model.joint import ConcatJointEncoder, FusionJointEncoder
from jmvae_dist.model.modules import log_softplus
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig

SMALL_CONVOLUTIONS = {"channels": [4, 8], "hidden_dims": [8]}
# One modality of each kind: settings, shape, likelihood.
KINDS: dict[str, tuple[dict[str, Any], tuple[int, ...], str]] = {
    "conv": ({"kind": "conv", **SMALL_CONVOLUTIONS}, (3, 9, 12), "laplace"),
    "plain_conv": (
        {"kind": "conv", "residual_blocks": 0, "normalization": "none", **SMALL_CONVOLUTIONS},
        (1, 8, 8),
        "bernoulli",
    ),
    "signal": ({"kind": "conv", **SMALL_CONVOLUTIONS}, (2, 11), "normal"),
    "text": ({"kind": "text", "embedding_dim": 6, **SMALL_CONVOLUTIONS}, (7, 5), "categorical"),
    "transformer": ({"kind": "transformer", "embedding_dim": 8, "layers": 2, "heads": 2}, (6, 5), "categorical"),
    "vector": ({"kind": "vector", "encoder_hidden_dims": [8], "decoder_hidden_dims": [8]}, (13,), "normal"),
    "label": ({"kind": "mlp", "encoder_hidden_dims": [8], "decoder_hidden_dims": [8]}, (4,), "categorical"),
}
LATENT_DIM = 3


def make_model(**options: Any) -> JMVAE:
    torch.manual_seed(0)
    config = JMVAEConfig(
        len(KINDS),
        LATENT_DIM,
        {name: shape for name, (_, shape, _) in KINDS.items()},
        decoders_dist={name: distribution for name, (*_, distribution) in KINDS.items()},
    )
    entries = {name: entry for name, (entry, *_) in KINDS.items()}
    return JMVAE(config, networks=NetworksConfig(joint_hidden_dims=[8], modalities=entries, **options))


def make_inputs(batch_size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch_size)
    inputs = {}
    for name, (_, shape, distribution) in KINDS.items():
        x = torch.randn(batch_size, *shape, generator=generator)
        if distribution == "categorical":
            x = nn.functional.one_hot(x.argmax(-1), shape[-1]).float()
        inputs[name] = (x > 0).float() if distribution == "bernoulli" else x
    return inputs


@pytest.mark.parametrize("options", [{}, {"joint_encoder": {"kind": "concat"}}, {"sigma": "softplus"}])
@pytest.mark.parametrize("batch_size", [0, 1, 5])
def test_every_parameter_gets_a_gradient(batch_size: int, options: dict[str, Any]) -> None:
    """Also in an empty batch: a rank without samples takes part in the reduction."""
    model = make_model(**options)
    out = model(make_inputs(batch_size))
    out.loss_sum.backward()
    assert out.mu.shape == (batch_size, LATENT_DIM)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    if batch_size > 1:
        assert [name for name, gradient in gradients.items() if not gradient.any()] == []
    else:
        assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_no_sample_depends_on_the_others() -> None:
    """What micro-batches and ranks rely on; batch normalisation would break it."""
    model, inputs = make_model().double(), {name: x.double() for name, x in make_inputs(5).items()}
    together = model.encode(inputs, return_mean=True)
    decoded = model.decode(together.z[0])
    for row in range(5):
        alone = model.encode({name: x[row : row + 1] for name, x in inputs.items()}, return_mean=True)
        torch.testing.assert_close(alone.mu[0], together.mu[row])
        for name, values in model.decode(alone.z[0]).items():
            torch.testing.assert_close(values[0], decoded[name][row])


def test_no_network_differs_between_training_and_evaluation() -> None:
    model, inputs = make_model(), make_inputs(3)
    noise = torch.randn(3, LATENT_DIM)
    assert torch.equal(model.train()(inputs, noise=noise).loss, model.eval()(inputs, noise=noise).loss)


@settings(max_examples=25, deadline=None)
@given(
    sides=st.lists(st.integers(2, 40), min_size=1, max_size=2),
    num_channels=st.integers(1, 3),
    num_stages=st.integers(1, 5),
)
def test_decoders_undo_the_halvings_of_any_size(sides: list[int], num_channels: int, num_stages: int) -> None:
    num_stages = min(num_stages, (min(sides) - 1).bit_length())
    sizes = ([4] * num_stages, 0, "none", [4], "relu")
    shape = (num_channels, *sides)
    assert ConvTrunk(shape, *sizes)(torch.zeros(2, *shape)).shape == (2, 4)
    assert ConvDecoder(3, shape, *sizes)(torch.zeros(2, 3)).shape == (2, *shape)


@pytest.mark.parametrize("side", [28, 32, 64, 96])
def test_default_stages_end_at_a_few_places(side: int) -> None:
    resolved = NetworksConfig(default="auto").resolve({"x": (3, side, side)}, {})
    channels = resolved.modalities["x"]["channels"]
    assert math.ceil(side / 2 ** len(channels)) in (3, 4)
    assert channels == [32, 64, 128, 256, 512][: len(channels)]


@pytest.mark.parametrize(
    ("shape", "distribution", "kind"),
    [
        ((1, 28, 28), "bernoulli", "conv"),
        ((3, 64, 48), "normal", "conv"),
        ((1, 8, 8), "bernoulli", None),
        ((64, 64, 64), "normal", None),
        ((32, 257), "categorical", "text"),
        ((32, 257), "normal", None),
        ((2000,), "normal", "vector"),
        ((10,), "categorical", None),
    ],
)
def test_auto_chooses_by_shape_and_likelihood(shape: tuple[int, ...], distribution: str, kind: str | None) -> None:
    resolved = NetworksConfig(default="auto").resolve({"x": shape}, {"x": distribution})
    assert resolved.modalities.get("x", {}).get("kind") == kind
    assert resolved.joint_encoder.get("kind") == (None if kind is None else "fusion")
    # What a checkpoint records is complete, and stays as it is when the model is rebuilt from it.
    assert NetworksConfig(**asdict(resolved)).resolve({"x": shape}, {"x": distribution}) == resolved


def test_the_default_is_the_perceptron_it_always_was() -> None:
    """Old checkpoints resume: the same names, and the same weights drawn in the same order."""
    torch.manual_seed(5)
    state = JMVAE(
        JMVAEConfig(2, 3, {"a": (2, 2), "b": (5,)}), networks=NetworksConfig([6], [7], [8], "gelu")
    ).state_dict()
    torch.manual_seed(5)
    expected: dict[str, Tensor] = {}
    for prefix, size_in, hidden, size_out, last in (
        ("encoders.a", 4, 6, 6, "heads"),
        ("encoders.b", 5, 6, 6, "heads"),
        ("decoders.a", 3, 7, 4, "output"),
        ("decoders.b", 3, 7, 5, "output"),
        ("joint_encoder", 9, 8, 6, "heads"),
    ):
        for name, layer in (("hidden.0", nn.Linear(size_in, hidden)), (last, nn.Linear(hidden, size_out))):
            expected |= {f"{prefix}.{name}.{key}": value for key, value in layer.state_dict().items()}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


class TestJointEncoder:
    SHAPES = {"a": (2, 2), "b": (5,)}  # noqa: RUF012

    def build(self, **options: Any) -> nn.Module:
        return build_networks(JMVAEConfig(2, 3, dict(self.SHAPES)), NetworksConfig([6], [7], [8], **options))[2]

    def test_concat_is_for_perceptrons(self) -> None:
        assert isinstance(self.build(), ConcatJointEncoder)
        assert isinstance(self.build(modalities={"a": {"kind": "vector"}}), FusionJointEncoder)
        concat = self.build(modalities={"a": {"kind": "vector"}}, joint_encoder={"kind": "concat"})
        assert isinstance(concat, ConcatJointEncoder)

    def test_branches_have_their_sizes(self) -> None:
        settings = {"kind": "fusion", "branch_hidden_dims": [9], "branch_output_dim": 2}
        shapes = {name: tuple(value.shape) for name, value in self.build(joint_encoder=settings).named_parameters()}
        assert shapes["branches.a.trunk.0.weight"] == (9, 4)
        assert shapes["branches.b.output.weight"] == (2, 9)
        assert shapes["hidden.0.weight"] == (8, 4)
        plain = self.build(joint_encoder={"kind": "fusion", "branch_hidden_dims": None, "branch_output_dim": None})
        shapes = {name: tuple(value.shape) for name, value in plain.named_parameters()}
        assert shapes["branches.a.0.weight"] == (6, 4)
        assert shapes["hidden.0.weight"] == (8, 12)

    def test_given_encoders_are_copied(self) -> None:
        class Own(nn.Module):
            def __init__(self, size: int) -> None:
                super().__init__()
                self.layer = nn.Linear(size, 6)

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                mu, logvar = self.layer(x.flatten(1)).chunk(2, dim=-1)
                return mu, logvar

        encoders = {"a": Own(4), "b": Own(5)}
        model = JMVAE(JMVAEConfig(2, 3, dict(self.SHAPES)), encoders=encoders, networks=NetworksConfig([6], [7], [8]))
        assert model.config.custom_architectures == ["encoders"]
        copied = model.joint_encoder.branches["a"].encoder.layer.weight
        assert torch.equal(copied, encoders["a"].layer.weight)
        assert copied is not encoders["a"].layer.weight
        model({"a": torch.randn(4, 2, 2), "b": torch.randn(4, 5)}).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


class TestSigma:
    def test_softplus_is_the_standard_deviation(self) -> None:
        h = torch.linspace(-30, 30, 61, dtype=torch.float64)
        sigma = (0.5 * (2 * log_softplus(h))).exp()
        torch.testing.assert_close(sigma, torch.nn.functional.softplus(h), rtol=1e-8, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_gradients_are_those_of_the_formula_and_finite_everywhere(self, dtype: torch.dtype) -> None:
        h = torch.tensor([-3e38, -1e4, -104, -88, -20, 0, 20, 88, 1e4, 3e38], dtype=dtype, requires_grad=True)
        log_softplus(h).sum().backward()
        assert h.grad is not None
        exact = torch.sigmoid(h.double()) / torch.nn.functional.softplus(h.double())
        exact[h < -700] = 1.0
        torch.testing.assert_close(h.grad.double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-38)

    @pytest.mark.parametrize("sigma", ["exp", "softplus"])
    @pytest.mark.parametrize("bias", [-1e30, -1e4, 1e4, 1e30])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_head_that_ran_away_gives_finite_numbers(self, sigma: str, bias: float, dtype: torch.dtype) -> None:
        model = make_model(sigma=sigma).to(dtype)
        with torch.no_grad():
            for encoder in (*model.encoders.values(), model.joint_encoder):
                encoder.heads.bias[LATENT_DIM:] = bias
        out = model({name: x.to(dtype) for name, x in make_inputs(4).items()})
        out.loss.backward()
        assert out.loss.isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("entry", "shape", "message"),
    [
        ({"kind": "conv"}, (5,), r"modalities\.x: conv is for shapes \[channels, height, width\]"),
        ({"kind": "conv"}, (3, 1, 8), "sides of at least 2"),
        ({"kind": "conv", "channels": [8] * 6}, (1, 28, 28), r"x\.channels: .* side of 28 .* 5 times at most"),
        ({"kind": "text"}, (1, 28, 28), r"text is for shapes \[length, vocabulary\]"),
        ({"kind": "transformer", "heads": 3}, (6, 5), r"x\.heads: 3 does not divide embedding_dim \(256\)"),
        ({"kind": "transformer"}, (5,), "transformer is for shapes"),
    ],
)
def test_sizes_that_do_not_fit_a_shape(entry: dict[str, Any], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NetworksConfig(modalities={"x": entry}).resolve({"x": shape}, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"default": "conv"}, r"networks\.default: 'conv'"),
        ({"sigma": "square"}, r"networks\.sigma: 'square'"),
        ({"modalities": ["x"]}, r"networks\.modalities: \['x'\]"),
        ({"modalities": {"x": "conv"}}, r"modalities\.x: 'conv'"),
        ({"modalities": {"x": {"kind": "rnn"}}}, r"x\.kind: 'rnn' .*'mlp', 'vector', 'conv'"),
        ({"modalities": {"x": {"kind": "conv", "chanels": [3]}}}, r"x: conv has no parameter 'chanels'; it takes"),
        ({"modalities": {"x": {"kind": "conv", "channels": []}}}, r"x\.channels: \[\]"),
        ({"modalities": {"x": {"kind": "conv", "residual_blocks": -1}}}, r"x\.residual_blocks: -1"),
        ({"modalities": {"x": {"kind": "conv", "normalization": "batch"}}}, r"x\.normalization: 'batch'.*group"),
        ({"modalities": {"x": {"kind": "mlp", "output": "tanh"}}}, r"x\.output: 'tanh'"),
        ({"modalities": {"x": {"kind": "transformer", "layers": True}}}, r"x\.layers: True"),
        ({"modalities": {"x": {"kind": "auto", "channels": [3]}}}, "kind auto chooses all sizes"),
        ({"modalities": {"x": {"encoder": "my.Encoder"}}}, r"x\.encoder: 'my\.Encoder'.*class_path"),
        ({"modalities": {"x": {"encoder": {"class_path": "Encoder"}}}}, r"encoder\.class_path: 'Encoder'"),
        ({"modalities": {"x": {"encoder": {"class_path": "a.B", "size": 3}}}}, "unknown key 'size'"),
        (
            {
                "modalities": {
                    "x": {**{part: {"class_path": "a.B"} for part in ("encoder", "decoder")}, "kind": "mlp"}
                }
            },
            "'kind' has no use",
        ),
        ({"joint_encoder": {"kind": "sum"}}, r"joint_encoder\.kind: 'sum'"),
        ({"joint_encoder": {"kind": "concat", "branch_hidden_dims": [3]}}, "concat has no parameter"),
    ],
)
def test_mistakes_in_the_section(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NetworksConfig(**options)


def test_unknown_modality() -> None:
    with pytest.raises(ConfigError, match="unknown modality 'y'"):
        NetworksConfig(modalities={"y": {"kind": "mlp"}}).resolve({"x": (3,)}, {})

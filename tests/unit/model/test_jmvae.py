"""Inference: shapes, reproducibility, subsets, incomplete samples, likelihood estimates, and errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jmvae_dist.errors import ConfigError, DataError
from jmvae_dist.kernels.gaussian import product_of_experts
from jmvae_dist.model import JMVAE, GaussianParams
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig

SHAPES = {"image": (1, 4, 4), "word": (5,), "sound": (3, 2)}
DISTRIBUTIONS = {"image": "bernoulli", "word": "categorical", "sound": "normal"}
SMALL = NetworksConfig([16], [16], [16])
LATENT_DIM = 4


def make_model(**options: Any) -> JMVAE:
    torch.manual_seed(0)
    options = {"decoders_dist": DISTRIBUTIONS, **options}
    return JMVAE(JMVAEConfig(3, LATENT_DIM, dict(SHAPES), **options), networks=SMALL)


def make_inputs(batch_size: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": (torch.rand(batch_size, 1, 4, 4, generator=generator) > 0.5).float(),
        "word": torch.eye(5)[torch.arange(batch_size) % 5],
        "sound": torch.randn(batch_size, 3, 2, generator=generator),
    }


@pytest.fixture
def model() -> JMVAE:
    return make_model()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return make_inputs()


class TestShapes:
    @pytest.mark.parametrize("batch_size", [1, 6])
    @pytest.mark.parametrize("num_samples", [1, 3])
    @pytest.mark.parametrize("return_mean", [False, True])
    @pytest.mark.parametrize("cond_mod", ["all", "word", ["sound", "image"]])
    def test_encode_and_predict(
        self, model: JMVAE, batch_size: int, num_samples: int, return_mean: bool, cond_mod: Any
    ) -> None:
        inputs = make_inputs(batch_size)
        out = model.encode(inputs, cond_mod, num_samples, return_mean)
        assert out.one_latent_space is True
        assert out.z.shape == (num_samples, batch_size, LATENT_DIM)
        assert out.mu.shape == out.logvar.shape == (batch_size, LATENT_DIM)
        flat = model.encode(inputs, cond_mod, num_samples, return_mean, flatten=True)
        assert flat.z.shape == (num_samples * batch_size, LATENT_DIM)
        for flatten in (False, True):
            leading = (num_samples * batch_size,) if flatten else (num_samples, batch_size)
            generated = model.predict(inputs, cond_mod, "all", num_samples, flatten)
            assert {name: x.shape for name, x in generated.items()} == {
                name: (*leading, *shape) for name, shape in SHAPES.items()
            }

    def test_flattening_is_sample_major(self, model: JMVAE, inputs: dict[str, Tensor]) -> None:
        noise = torch.randn(3, 6, LATENT_DIM)
        nested, flat = (model.encode(inputs, N=3, flatten=flatten, noise=noise).z for flatten in (False, True))
        assert torch.equal(flat, torch.stack([nested[n, b] for n in range(3) for b in range(6)]))

    @pytest.mark.parametrize("leading", [(), (2,), (1,), (0,), (2, 3), (2, 3, 4)])
    def test_decode_takes_any_leading_shape(self, model: JMVAE, leading: tuple[int, ...]) -> None:
        z = torch.randn(*leading, LATENT_DIM)
        decoded = model.decode(z)
        assert list(decoded) == list(SHAPES)
        for name, shape in SHAPES.items():
            assert decoded[name].shape == (*leading, *shape)
            torch.testing.assert_close(decoded[name], model.decoders[name](z))

    def test_decode_takes_outputs(self, model: JMVAE, inputs: dict[str, Tensor]) -> None:
        assert model.decode(model.encode(inputs, N=2), "word")["word"].shape == (2, 6, 5)
        assert model.decode(model(inputs), ["word"])["word"].shape == (6, 5)
        assert set(model.decode(model.generate_from_prior(2), ["word", "image"])) == {"word", "image"}

    @pytest.mark.parametrize("n", [1, 5])
    def test_prior(self, model: JMVAE, n: int) -> None:
        out = model.generate_from_prior(n)
        assert out.z.shape == out.mu.shape == out.logvar.shape == (n, LATENT_DIM)
        assert not out.mu.any()
        assert not out.logvar.any()

    def test_nll(self, model: JMVAE) -> None:
        for batch_size in (1, 6):
            inputs = make_inputs(batch_size)
            assert model.compute_joint_nll(inputs, K=5, batch_size_K=2).shape == (batch_size,)
            conditional = model.compute_cond_nll(inputs, "image", ["sound", "word"], K=5, batch_size_K=2)
            assert {name: x.shape for name, x in conditional.items()} == {
                "word": (batch_size,),
                "sound": (batch_size,),
            }


class TestBehaviour:
    def test_inference_has_no_gradients_and_keeps_the_mode(self, inputs: dict[str, Tensor]) -> None:
        model = make_model()
        model.encoders.train()
        model.decoders.eval()
        modes = {name: module.training for name, module in model.named_modules()}
        before = copy.deepcopy(model.state_dict())
        results = [
            model.encode(inputs).z,
            model.decode(torch.zeros(1, LATENT_DIM))["word"],
            model.predict(inputs, "word", "image")["image"],
            model.generate_from_prior(2).z,
            model.compute_joint_nll(inputs, 4),
            model.compute_cond_nll(inputs, "word", "image", 4)["image"],
        ]
        assert not any(result.requires_grad for result in results)
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    def test_generator_makes_results_reproducible(self, model: JMVAE, inputs: dict[str, Tensor]) -> None:
        calls = [
            lambda g: model.encode(inputs, "word", generator=g).z,
            lambda g: model.predict(inputs, "word", "image", N=2, generator=g)["image"],
            lambda g: model.generate_from_prior(3, generator=g).z,
            lambda g: model.compute_joint_nll(inputs, 10, 3, generator=g),
            lambda g: model.compute_cond_nll(inputs, "word", "image", 10, 3, generator=g)["image"],
        ]
        for call in calls:
            first, second = (call(torch.Generator().manual_seed(4)) for _ in range(2))
            assert torch.equal(first, second)
            assert not torch.equal(first, call(torch.Generator().manual_seed(5)))

    def test_explicit_noise(self, model: JMVAE, inputs: dict[str, Tensor]) -> None:
        noise = torch.randn(2, 6, LATENT_DIM)
        out = model.encode(inputs, "image", N=2, noise=noise)
        torch.testing.assert_close(out.z, out.mu + (out.logvar / 2).exp() * noise)
        assert torch.equal(model.generate_from_prior(6, noise=noise[0]).z, noise[0])

    def test_unused_modalities_need_not_be_there(self, model: JMVAE, inputs: dict[str, Tensor]) -> None:
        alone = model.encode({"word": inputs["word"]}, "word", return_mean=True)
        assert torch.equal(alone.z, model.encode(inputs, "word", return_mean=True).z)

    def test_order_of_inputs_is_irrelevant(self, model: JMVAE, inputs: dict[str, Tensor]) -> None:
        noise = torch.randn(6, LATENT_DIM)
        turned = {name: inputs[name] for name in reversed(inputs)}
        assert torch.equal(model(inputs, noise=noise).loss, model(turned, noise=noise).loss)

    def test_prior_expert(self, model: JMVAE, inputs: dict[str, Tensor]) -> None:
        single = model.encode(inputs, "word")
        with_prior = model.encode(inputs, "word", prior_expert=True)
        expected = product_of_experts(single.mu[None], single.logvar[None], prior_expert=True)
        torch.testing.assert_close((with_prior.mu, with_prior.logvar), expected)
        joint = model.encode(inputs)
        assert torch.equal(model.encode(inputs, prior_expert=True).mu, joint.mu)

    def test_nll_does_not_depend_on_the_chunk_size(self, model: JMVAE, inputs: dict[str, Tensor]) -> None:
        noise = torch.randn(50, 6, LATENT_DIM)
        source = {"noise": lambda draws: noise[draws.start : draws.stop]}
        for estimate in (
            lambda size: model.compute_joint_nll(inputs, 50, size, **source),
            lambda size: model.compute_cond_nll(inputs, "word", "image", 50, size, **source)["image"],
        ):
            for size in (1, 7, 50, 1000):
                torch.testing.assert_close(estimate(size), estimate(50), rtol=1e-6, atol=0)

    def test_joint_nll_of_a_linear_gaussian_model_is_exact(self) -> None:
        """With linear decoders log p(x) is known: x ~ N(b, W W' + s^2 I). The estimate must converge to it."""
        torch.manual_seed(0)
        config = JMVAEConfig(2, 2, {"a": (3,), "b": (2,)}, decoder_dist_params={"a": {"scale": 0.8}})
        decoders = {"a": nn.Linear(2, 3), "b": nn.Linear(2, 2)}
        model = JMVAE(config, decoders=decoders, networks=SMALL)
        inputs = {"a": torch.randn(4, 3), "b": torch.randn(4, 2)}
        generator = torch.Generator().manual_seed(2)
        options = {"K": 60_000, "batch_size_K": 20_000, "generator": generator}
        for names in (["a", "b"], ["a"]):
            weight = torch.cat([decoders[name].weight for name in names]).double()
            bias = torch.cat([decoders[name].bias for name in names]).double()
            variances = torch.cat(
                [torch.full((len(decoders[name].bias),), 0.64 if name == "a" else 1.0) for name in names]
            )
            covariance = weight @ weight.T + torch.diag(variances.double())
            density = torch.distributions.MultivariateNormal(bias, covariance)
            exact = -density.log_prob(torch.cat([inputs[name] for name in names], 1).double())
            estimate = model.compute_joint_nll(inputs, modalities=names, **options)
            torch.testing.assert_close(estimate.double(), exact.detach(), rtol=0, atol=0.03)

    def test_compiled_model_gives_the_same_loss(self, inputs: dict[str, Tensor]) -> None:
        model = make_model()
        noise = torch.randn(6, LATENT_DIM)
        compiled = torch.compile(model, backend="aot_eager")
        expected = model(inputs, 0.3, noise, check_inputs=False)
        out = compiled(inputs, 0.3, noise, check_inputs=False)
        torch.testing.assert_close(out.loss, expected.loss)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_inputs_are_brought_to_the_weights_dtype(self, inputs: dict[str, Tensor], dtype: torch.dtype) -> None:
        model = make_model().to(dtype)
        out = model(inputs)
        assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        out.loss.backward()


class TestIncompleteSamples:
    def test_each_sample_is_encoded_from_what_it_has(self, model: JMVAE, inputs: dict[str, Tensor]) -> None:
        mask = {
            "image": torch.tensor([True, True, False, False, True, False]),
            "word": torch.tensor([True, False, True, False, True, False]),
            "sound": torch.tensor([True, False, False, True, False, False]),
        }
        poisoned = {name: inputs[name].clone() for name in inputs}
        for name, present in mask.items():
            poisoned[name][~present] = torch.nan
        out = model.encode(poisoned, mask=mask)
        expected = ["all", "image", "word", "sound", ["image", "word"]]
        for row, names in enumerate(expected):
            complete = model.encode(inputs, names)
            torch.testing.assert_close(out.mu[row], complete.mu[row])
            torch.testing.assert_close(out.logvar[row], complete.logvar[row])
        assert not out.mu[5].any()
        assert not out.logvar[5].any()

    def test_subset_and_partial_mask(self, model: JMVAE, inputs: dict[str, Tensor]) -> None:
        mask = {"word": torch.tensor([True, False] * 3)}
        out = model.encode(inputs, ["word", "sound"], mask=mask)
        both, sound = model.encode(inputs, ["word", "sound"]), model.encode(inputs, "sound")
        torch.testing.assert_close(out.mu[0::2], both.mu[0::2])
        torch.testing.assert_close(out.mu[1::2], sound.mu[1::2])

    def test_present_values_are_still_checked(self, model: JMVAE, inputs: dict[str, Tensor]) -> None:
        inputs["sound"][1] = torch.nan
        with pytest.raises(DataError, match="sound"):
            model.encode(inputs, mask={"word": torch.ones(6, dtype=torch.bool)})

    @pytest.mark.parametrize("wrong", [torch.ones(6), torch.ones(5, dtype=torch.bool)])
    def test_wrong_masks(self, model: JMVAE, inputs: dict[str, Tensor], wrong: Tensor) -> None:
        with pytest.raises(DataError, match=r"mask\.word"):
            model.encode(inputs, mask={"word": wrong})
        with pytest.raises(ConfigError, match="wrod"):
            model.encode(inputs, mask={"wrod": torch.ones(6, dtype=torch.bool)})


class TestArgumentErrors:
    @pytest.mark.parametrize("names", ["imgae", ["image", "imgae"], []])
    def test_modalities(self, model: JMVAE, inputs: dict[str, Tensor], names: Any) -> None:
        match = "imgae" if names else "no modality"
        with pytest.raises(ConfigError, match=match):
            model.encode(inputs, names)
        with pytest.raises(ConfigError, match=match):
            model.decode(torch.zeros(1, LATENT_DIM), names)
        with pytest.raises(ConfigError, match=match):
            model.compute_cond_nll(inputs, "image", names)

    def test_counts(self, model: JMVAE, inputs: dict[str, Tensor]) -> None:
        with pytest.raises(ConfigError, match="N: 0"):
            model.encode(inputs, N=0)
        with pytest.raises(ConfigError, match="n: 0"):
            model.generate_from_prior(0)
        with pytest.raises(ConfigError, match="K: 0"):
            model.compute_joint_nll(inputs, 0)
        with pytest.raises(ConfigError, match="batch_size_K: 0"):
            model.compute_joint_nll(inputs, 10, 0)

    @pytest.mark.parametrize("count", [True, 2.0, "2"])
    def test_counts_are_integers(self, model: JMVAE, inputs: dict[str, Tensor], count: Any) -> None:
        with pytest.raises(ConfigError, match=r"N: .* an integer"):
            model.encode(inputs, N=count)
        with pytest.raises(ConfigError, match=r"n: .* an integer"):
            model.generate_from_prior(count)
        with pytest.raises(ConfigError, match=r"K: .* an integer"):
            model.compute_joint_nll(inputs, count)

    def test_groups(self, model: JMVAE, inputs: dict[str, Tensor]) -> None:
        with pytest.raises(ConfigError, match=r"groups\.both: unknown modality 'imgae'"):
            model.estimate_nlls(inputs, {"both": ["word", "imgae"]}, K=4)
        with pytest.raises(ConfigError, match=r"groups\.nothing: names no modality"):
            model.estimate_nlls(inputs, {"nothing": []}, K=4)

    @pytest.mark.parametrize("names", [None, 3])
    def test_names_that_are_no_names(self, model: JMVAE, inputs: dict[str, Tensor], names: Any) -> None:
        with pytest.raises(ConfigError, match=r"cond_mod: .* neither a name nor several"):
            model.encode(inputs, names)

    def test_arrays_instead_of_tensors(self, model: JMVAE, inputs: dict[str, Tensor]) -> None:
        noise = torch.zeros(6, LATENT_DIM).numpy()
        with pytest.raises(DataError, match="noise: a ndarray"):
            model(inputs, noise=noise)
        with pytest.raises(DataError, match="z: a ndarray"):
            model.decode(noise)
        with pytest.raises(DataError, match=r"mask\.word: a list"):
            model.encode(inputs, mask={"word": [True] * 6})

    def test_shapes_of_noise_and_latents(self, model: JMVAE, inputs: dict[str, Tensor]) -> None:
        with pytest.raises(DataError, match="noise"):
            model(inputs, noise=torch.zeros(6, LATENT_DIM + 1))
        with pytest.raises(DataError, match="noise"):
            model.encode(inputs, N=2, noise=torch.zeros(1, 6, LATENT_DIM))
        with pytest.raises(ConfigError, match="latent_dim=4"):
            model.decode(torch.zeros(2, 5))


class PairEncoder(nn.Module):
    """A user's encoder that returns a plain pair."""

    def __init__(self, width: int, latent_dim: int = LATENT_DIM) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.linear(x.flatten(1)).chunk(2, 1)
        return mu, logvar


class ConvolutionalDecoder(nn.Module):
    """A user's decoder that takes exactly one leading dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.deconvolution = nn.ConvTranspose2d(LATENT_DIM, 1, 4)

    def forward(self, z: Tensor) -> Tensor:
        assert z.ndim == 2
        return self.deconvolution(z[:, :, None, None])


class JointPair(PairEncoder):
    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(torch.cat([x.flatten(1) for x in inputs.values()], 1))


def user_networks() -> dict[str, Any]:
    return {
        "encoders": {"image": PairEncoder(16), "word": PairEncoder(5), "sound": PairEncoder(6)},
        "decoders": {
            "image": ConvolutionalDecoder(),
            "word": nn.Linear(LATENT_DIM, 5),
            "sound": nn.Sequential(nn.Linear(LATENT_DIM, 6), nn.Unflatten(-1, (3, 2))),
        },
        "joint_encoder": JointPair(27),
    }


class TestUserNetworks:
    @pytest.mark.parametrize("given", [["encoders"], ["decoders"], ["joint_encoder"], list(user_networks())])
    def test_any_of_them_can_be_given(self, inputs: dict[str, Tensor], given: list[str]) -> None:
        networks = {key: value for key, value in user_networks().items() if key in given}
        config = JMVAEConfig(3, LATENT_DIM, dict(SHAPES), decoders_dist=DISTRIBUTIONS)
        model = JMVAE(config, **networks, networks=SMALL)
        assert model.config.custom_architectures == given
        assert config.custom_architectures == []
        model(inputs).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert model.predict(inputs, "word", N=3)["image"].shape == (3, 6, 1, 4, 4)
        assert isinstance(model._encode_joint(inputs), GaussianParams)

    def test_input_dims_are_not_needed_then(self, inputs: dict[str, Tensor]) -> None:
        model = JMVAE(JMVAEConfig(3, LATENT_DIM, decoders_dist=DISTRIBUTIONS), **user_networks())
        assert model.modalities == ["image", "word", "sound"]
        model(inputs).loss.backward()
        assert model.decode(torch.zeros(2, 3, LATENT_DIM))["sound"].shape == (2, 3, 3, 2)

    def test_parameter_names(self) -> None:
        keys = set(make_model().state_dict())
        assert {"encoders.image.heads.weight", "joint_encoder.heads.bias", "decoders.word.output.weight"} <= keys

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda n: n["encoders"].pop("word"), "encoders"),
            (lambda n: n["decoders"].update(extra=nn.Linear(4, 1)), "decoders"),
            (lambda n: n["encoders"].update(word="mlp"), r"encoders\.word.*str"),
            (lambda n: n.update(joint_encoder=len), "joint_encoder"),
        ],
    )
    def test_wrong_keys_or_types(self, change: Any, match: str) -> None:
        networks = user_networks()
        change(networks)
        with pytest.raises(ConfigError, match=match):
            JMVAE(JMVAEConfig(3, LATENT_DIM, dict(SHAPES)), **networks)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda n: n["encoders"].update(word=PairEncoder(5, 7)), r"encoders\.word.*\(6, 7\).*\(6, 4\)"),
            (lambda n: n["encoders"].update(word=nn.Linear(5, 4)), r"encoders\.word: returned a Tensor"),
            (lambda n: n.update(joint_encoder=JointPair(27, 3)), r"joint_encoder.*\(6, 3\)"),
            (lambda n: n["decoders"].update(word=nn.Linear(4, 6)), r"decoders\.word.*\(6, 6\).*\(6, 5\)"),
        ],
    )
    @pytest.mark.parametrize("with_input_dims", [True, False])
    def test_wrong_output_shapes(
        self, inputs: dict[str, Tensor], change: Any, match: str, with_input_dims: bool
    ) -> None:
        networks = user_networks()
        change(networks)
        config = JMVAEConfig(3, LATENT_DIM, dict(SHAPES) if with_input_dims else None)
        model = JMVAE(config, **networks)
        if not with_input_dims and match.startswith("decoders"):
            match = r"decoders\.word.*\(6,\).*\(5,\)"
        with pytest.raises(ConfigError, match=match):
            model(inputs)

    def test_prior_of_networks_without_parameters(self) -> None:
        class Constant(nn.Module):
            def forward(self, inputs: Any) -> tuple[Tensor, Tensor]:
                return torch.zeros(1, 2), torch.zeros(1, 2)

        networks = {name: Constant() for name in ("a", "b")}
        decoders = {name: nn.Identity() for name in networks}
        model = JMVAE(JMVAEConfig(2, 2), networks, decoders, Constant())
        with pytest.raises(ConfigError, match="no parameters"):
            model.generate_from_prior(3)

    @pytest.mark.parametrize("with_input_dims", [True, False])
    def test_reserved_name(self, with_input_dims: bool) -> None:
        networks = user_networks()
        for key in ("encoders", "decoders"):
            networks[key]["all"] = networks[key].pop("sound")
        shapes = {"image": (1, 4, 4), "word": (5,), "all": (3, 2)} if with_input_dims else None
        with pytest.raises(ConfigError, match="'all'"):
            JMVAE(JMVAEConfig(3, LATENT_DIM, shapes), **networks)

    def test_configuration_that_does_not_fit(self) -> None:
        with pytest.raises(ConfigError, match="input_dims"):
            JMVAE(JMVAEConfig(3, LATENT_DIM))
        with pytest.raises(ConfigError, match="n_modalities"):
            JMVAE(JMVAEConfig(2, LATENT_DIM), **user_networks())
        with pytest.raises(ConfigError, match="uses_likelihood_rescaling"):
            JMVAE(JMVAEConfig(3, LATENT_DIM, uses_likelihood_rescaling=True), **user_networks())
        with pytest.raises(ConfigError, match="decoders_dist"):
            JMVAE(JMVAEConfig(3, LATENT_DIM, decoders_dist={"photo": "normal"}), **user_networks())
        with pytest.raises(ConfigError, match="custom_architectures"):
            JMVAE(JMVAEConfig(3, LATENT_DIM, dict(SHAPES), custom_architectures=["encoders"]))
        with pytest.raises(ConfigError, match="keys"):
            JMVAE(JMVAEConfig(2, LATENT_DIM, {"keys": (2,), "image": (3,)}))

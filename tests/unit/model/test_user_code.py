"""Networks and likelihoods of the user's: from Python, named in a configuration, and from a file only if trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, distributions

from jmvae_dist import load_model
from jmvae_dist.checkpoint.export import CONFIG_NAME, EXPORT_FORMAT_VERSION, WEIGHTS_NAME
from jmvae_dist.config_io import dump_run_config, parse_run_config
from jmvae_dist.errors import ConfigError
from jmvae_dist.files import sha256_of
from jmvae_dist.model import JMVAE
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig
from jmvae_dist.training.setup import resolve_networks
from tests.conftest import ROOT
from tests.unit.model import user_networks

HERE = "tests.unit.model.user_networks"
SHAPES = {"image": (1, 3, 3), "counts": (6,), "word": (4, 5)}
OWN = {
    "image": {"encoder": {"class_path": f"{HERE}.Encoder", "init_args": {"width": 3}}},
    "counts": {"encoder": {"class_path": f"{HERE}.Encoder"}, "decoder": {"class_path": f"{HERE}.Decoder"}},
}
LIKELIHOODS = {
    "image": "bernoulli",
    "counts": f"{HERE}.poisson",
    "word": f"{HERE}.summed_categorical",
}


def make_config(**options: Any) -> JMVAEConfig:
    return JMVAEConfig(3, 2, dict(SHAPES), decoders_dist=dict(LIKELIHOODS), **options)


def make_inputs(batch_size: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "image": (torch.rand(batch_size, 1, 3, 3, generator=generator) > 0.5).float(),
        "counts": torch.randint(0, 5, (batch_size, 6), generator=generator).float(),
        "word": torch.eye(5)[torch.randint(0, 5, (batch_size, 4), generator=generator)],
    }


class TestLikelihoods:
    def test_functions_are_what_they_say(self) -> None:
        torch.manual_seed(0)
        by_path = JMVAE(
            make_config(decoder_dist_params={"counts": {"offset": 0.5}}), networks=NetworksConfig([4], [4], [4])
        )
        inputs, noise = make_inputs(), torch.randn(4, 2)
        out = by_path(inputs, noise=noise)
        decoded = by_path.decode(out.z)
        rates = (decoded["counts"] + 0.5).exp()
        expected = distributions.Poisson(rates).log_prob(inputs["counts"]).sum()
        torch.testing.assert_close(out.metrics["loss/reconstruction/counts"], -expected.detach())
        expected = distributions.OneHotCategorical(logits=decoded["word"]).log_prob(inputs["word"]).sum()
        torch.testing.assert_close(out.metrics["loss/reconstruction/word"], -expected.detach())
        # K samples at a time, and in Python as the functions themselves.
        given = {"image": "bernoulli", "counts": user_networks.poisson, "word": user_networks.summed_categorical}
        in_python = JMVAE(
            JMVAEConfig(3, 2, dict(SHAPES), decoders_dist=given, decoder_dist_params={"counts": {"offset": 0.5}}),
            networks=NetworksConfig([4], [4], [4]),
        )
        in_python.load_state_dict(by_path.state_dict())
        draws = torch.randn(6, 4, 2)
        first, second = (
            model.compute_joint_nll(inputs, 6, 4, noise=lambda which: draws[which.start : which.stop])
            for model in (by_path, in_python)
        )
        assert torch.equal(first, second)
        assert in_python.config.to_json() == by_path.config.to_json()

    def test_mean(self) -> None:
        def gaussian(recon: Tensor, target: Tensor) -> Tensor:
            return -(recon - target).square()

        z = torch.randn(3, 2)
        for has_mean in (False, True):
            if has_mean:
                gaussian.mean = torch.sigmoid  # type: ignore[attr-defined]
            model = JMVAE(JMVAEConfig(2, 2, {"a": (2,), "b": (2,)}, decoders_dist={"a": gaussian, "b": "normal"}))
            decoded = model.decode(z)["a"]
            expected = decoded.sigmoid() if has_mean else decoded
            assert torch.equal(model.likelihoods["a"].mean(decoded), expected)

    def test_wrong_results_are_named(self) -> None:
        for function, message in (
            (user_networks.scalar, r"returned shape \(\)"),
            (lambda recon, target: 3.0, "returned a float"),
            (lambda recon, target: recon[:, :1], r"returned shape \(4, 1\)"),
        ):
            config = JMVAEConfig(2, 2, {"a": (3,), "b": (2,)}, decoders_dist={"a": function, "b": "normal"})
            with pytest.raises(ConfigError, match=message):
                JMVAE(config)({"a": torch.randn(4, 3), "b": torch.randn(4, 2)})

    @pytest.mark.parametrize(
        ("distribution", "message"),
        [
            (3, r"decoders_dist\.a: 3"),
            ("possion", "'possion' .*module.function"),
            ({"class_path": "x.Y"}, "class_path"),
            ("no.such.module", "cannot be imported"),
            (f"{HERE}.NOT_A_CLASS", "is not a function"),
            (f"{HERE}.Encoder", "is not a function"),
        ],
    )
    def test_what_is_no_likelihood(self, distribution: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            JMVAE(JMVAEConfig(2, 2, {"a": (3,), "b": (2,)}, decoders_dist={"a": distribution, "b": "normal"}))

    def test_a_function_without_a_place_cannot_be_recorded(self) -> None:
        config = JMVAEConfig(2, decoders_dist={"a": lambda recon, target: recon, "b": "normal"})
        with pytest.raises(ConfigError, match=r"decoders_dist\.a: .*top level of a module"):
            config.to_json()


class TestNetworks:
    def test_classes_by_name(self) -> None:
        networks = NetworksConfig([4], [4], [4], modalities=OWN)
        model = JMVAE(make_config(), networks=networks)
        assert model.encoders["image"].layers[1].out_features == 3
        assert isinstance(model.decoders["counts"], user_networks.Decoder)
        assert model.config.custom_architectures == []
        # Copies of the user's encoders see the modalities on their way to the joint one; the others get a branch.
        assert isinstance(model.joint_encoder.branches["image"].encoder, user_networks.Encoder)
        model(make_inputs()).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

    def test_joint_encoder_by_name(self) -> None:
        networks = NetworksConfig([4], [4], [4], joint_encoder={"class_path": f"{HERE}.JointEncoder"})
        model = JMVAE(make_config(), networks=networks)
        assert model.joint_encoder.layer.in_features == 35
        assert model(make_inputs()).mu.shape == (4, 2)

    @pytest.mark.parametrize(
        ("section", "message"),
        [
            ({"class_path": "no.such.Module"}, r"counts\.encoder\.class_path: .* cannot be imported .*PYTHONPATH"),
            ({"class_path": f"{HERE}.Missing"}, "cannot be imported"),
            ({"class_path": f"{HERE}.NOT_A_CLASS"}, "is not a class"),
            ({"class_path": f"{HERE}.Encoder", "init_args": {"widht": 3}}, r"init_args: .* 'widht'"),
            ({"class_path": f"{HERE}.Encoder", "init_args": {"width": -3}}, "cannot be built"),
            ({"class_path": "collections.Counter"}, "is not a torch.nn.Module"),
        ],
    )
    def test_mistakes(self, section: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            JMVAE(make_config(), networks=NetworksConfig(modalities={"counts": {"encoder": section}}))

    def test_a_configuration_file_is_read_without_importing_what_it_names(self, tmp_path: Path) -> None:
        section = {"class_path": "no.such.Encoder", "init_args": {"a": 1, "part": {"class_path": "no.such.Part"}}}
        model = {
            "decoders_dist": {"image": "no.such.function", "label": "categorical"},
            "networks": {"modalities": {"image": {"encoder": section}}, "joint_encoder": section},
        }
        file = tmp_path / "own.yaml"
        file.write_text(yaml.safe_dump({"model": {**model, "decoder_dist_params": None}}))
        config = parse_run_config(["--config", str(ROOT / "configs" / "digits.yaml"), "--config", str(file)])
        assert config.model.networks.modalities == {"image": {"encoder": section}}
        assert config.model.networks.joint_encoder == section
        file.write_text(dump_run_config(config))
        assert parse_run_config(["--config", str(file)]) == config

    def test_a_run_tries_them_before_it_starts(self) -> None:
        config = parse_run_config(["--config", str(ROOT / "configs" / "digits.yaml")])
        shapes = {"image": (1, 8, 8), "label": (10,)}
        for modalities, message in (
            ({"image": {"encoder": {"class_path": f"{HERE}.Missing"}}}, "cannot be imported"),
            ({"image": {"decoder": {"class_path": f"{HERE}.Decoder", "init_args": {"a": 1}}}}, "does not take them"),
            ({"image": {"kind": "conv", "channels": [4] * 4}}, "can be halved 3 times"),
        ):
            config.model.networks = NetworksConfig(modalities=modalities)
            with pytest.raises(ConfigError, match=message):
                resolve_networks(config, config.model.resolve(shapes))
        config.model.networks = NetworksConfig()
        config.model.decoders_dist = {"image": f"{HERE}.missing", "label": "categorical"}
        with pytest.raises(ConfigError, match=r"model\.decoders_dist\.image: .* cannot be imported"):
            resolve_networks(config, config.model.resolve(shapes))


class TestTrust:
    @pytest.fixture
    def export(self, tmp_path: Path) -> Path:
        networks = NetworksConfig([4], [4], [4], modalities=OWN)
        model = JMVAE(make_config(), networks=networks)
        save_file(model.state_dict(), tmp_path / WEIGHTS_NAME)
        description = {
            "format_version": EXPORT_FORMAT_VERSION,
            "model": {"config": model.config.to_json(), "networks": networks.resolve(SHAPES, LIKELIHOODS).__dict__},
            "modalities": {},
            "weights_sha256": sha256_of(tmp_path / WEIGHTS_NAME),
        }
        (tmp_path / CONFIG_NAME).write_text(json.dumps(description))
        return tmp_path

    def test_nothing_is_imported_unless_trusted(self, export: Path) -> None:
        names = [f"{HERE}.{name}" for name in ("Encoder", "Decoder", "poisson", "summed_categorical")]
        with pytest.raises(ConfigError, match=rf"--trust-class {names[0]} --trust-class {names[1]} .*{names[3]}"):
            load_model(export)
        for missing in names:
            with pytest.raises(ConfigError, match=f"add --trust-class {missing} "):
                load_model(export, trusted=[name for name in names if name != missing])
        model = load_model(export, trusted=names)
        assert isinstance(model.encoders["image"], user_networks.Encoder)

    def test_modules_that_are_given_need_no_trust(self, export: Path) -> None:
        functions = [f"{HERE}.poisson", f"{HERE}.summed_categorical"]
        own = {name: user_networks.Decoder(shape, 2) for name, shape in SHAPES.items()}
        with pytest.raises(ConfigError, match=r"--trust-class \S+Encoder \(in"):
            load_model(export, trusted=functions, decoders=own)

"""Folders of MultiVae: there and back, the documented layout, the package itself where installed, and safety."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jmvae_dist import load_model
from jmvae_dist.checkpoint.export import write_export
from jmvae_dist.checkpoint.multivae import (
    export_multivae,
    import_multivae,
    load_multivae,
    multivae_networks,
    to_multivae,
)
from jmvae_dist.commands.checkpoint import main
from jmvae_dist.errors import CheckpointError, ConfigError
from jmvae_dist.model import JMVAE
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig

SHAPES = {"image": (1, 3, 3), "label": (4,)}
needs_multivae = pytest.mark.skipif(importlib.util.find_spec("multivae") is None, reason="MultiVae is not installed")


def make_model(networks: NetworksConfig | None = None, **options: Any) -> tuple[JMVAE, dict[str, Any]]:
    """A model, and its description as a checkpoint holds it."""
    torch.manual_seed(0)
    likelihoods = {"decoders_dist": {"image": "bernoulli", "label": "categorical"}}
    config = JMVAEConfig(2, 3, dict(SHAPES), **{**likelihoods, "alpha": 0.3, "warmup": 7, **options})
    networks = networks or multivae_networks(config)
    model = JMVAE(config, networks=networks).eval()
    return model, {"config": model.config.to_json(), "networks": dataclasses.asdict(networks)}


def write(folder: Path, networks: NetworksConfig | None = None, **options: Any) -> JMVAE:
    model, description = make_model(networks, **options)
    write_export(folder, model, {"model": description, "modalities": {}})
    return model


def make_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": (torch.rand(5, 1, 3, 3, generator=generator) > 0.5).float(),
        "label": torch.eye(4)[[0, 1, 2, 3, 0]],
    }


def assert_same(first: JMVAE, second: JMVAE) -> None:
    assert first.config == second.config
    state, other = first.state_dict(), second.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    inputs, noise = make_inputs(), torch.randn(5, 3)
    assert torch.equal(first(inputs, noise=noise).loss, second(inputs, noise=noise).loss)


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "ours", decoder_dist_params={"image": {}}, beta=2.0)
    assert main(["export", str(tmp_path / "ours"), "--format", "multivae", "--out", str(tmp_path / "theirs")]) == 0
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "back")]) == 0
    assert "load_from_folder" in capsys.readouterr().out
    back = load_model(tmp_path / "back")
    assert back.config.beta == 2.0
    assert_same(load_multivae(tmp_path / "theirs"), back)
    assert all(torch.equal(back.state_dict()[name], value) for name, value in model.state_dict().items())


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    """Recomputed with plain layers under MultiVae's names: in-512-512 and two heads, D-512-out and a sigmoid."""
    model = write(tmp_path / "ours")
    folder = export_multivae(tmp_path / "ours", tmp_path / "theirs")
    assert {path.name for path in folder.iterdir()} == {"model.pt", "model_config.json", "environment.json"}
    config = json.loads((folder / "model_config.json").read_text())
    assert config["name"] == "JMVAEConfig"
    assert config["input_dims"] == {"image": [1, 3, 3], "label": [4]}
    assert (config["alpha"], config["warmup"], config["custom_architectures"]) == (0.3, 7, [])
    state = torch.load(folder / "model.pt", weights_only=True)["model_state_dict"]

    def linear(x: Tensor, name: str) -> Tensor:
        return nn.functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def embedding(x: Tensor, name: str, head: str) -> Tensor:
        for layer in ("layers.0.0", "layers.1.0"):
            x = linear(x, f"{name}.{layer}").relu()
        return linear(x, f"{name}.{head}")

    inputs = make_inputs()
    latent = model.encode(inputs, "image", return_mean=True)
    flat = inputs["image"].flatten(1)
    torch.testing.assert_close(latent.mu, embedding(flat, "encoders.image", "embedding"))
    torch.testing.assert_close(latent.logvar, embedding(flat, "encoders.image", "log_var"))
    means = [embedding(inputs[m].flatten(1), f"joint_encoder.encoders.{m}", "embedding") for m in SHAPES]
    hidden = torch.cat(means, dim=1)
    for layer in ("enc.0.0", "enc.1.0"):
        hidden = linear(hidden, f"joint_encoder.{layer}").relu()
    joint = model.encode(inputs, return_mean=True)
    torch.testing.assert_close(joint.mu, linear(hidden, "joint_encoder.fc1"))
    torch.testing.assert_close(joint.logvar, linear(hidden, "joint_encoder.fc2"))
    decoded = linear(linear(joint.mu, "decoders.label.layers.0.0").relu(), "decoders.label.layers.1.0").sigmoid()
    torch.testing.assert_close(model.decode(joint.z[0])["label"], decoded)
    unused = [
        value for name, value in state.items() if name.startswith("joint_encoder.encoders") and "log_var" in name
    ]
    assert len(unused) == 4
    assert not any(value.any() for value in unused)


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "gelu"},
        {"sigma": "softplus"},
        {"joint_encoder": {"kind": "concat"}},
        {"modalities": {}},
        {"joint_hidden_dims": [512]},
    ],
)
def test_other_networks_need_the_package(tmp_path: Path, change: dict[str, Any]) -> None:
    model, _ = make_model()
    write(tmp_path / "ours", dataclasses.replace(multivae_networks(model.config), **change))
    with pytest.raises(ConfigError, match="to_multivae"):
        export_multivae(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_what_multivae_does_not_know(tmp_path: Path) -> None:
    write(tmp_path / "a", warmup=2.5)
    with pytest.raises(ConfigError, match=r"model\.warmup is 2\.5"):
        export_multivae(tmp_path / "a", tmp_path / "out")
    write(tmp_path / "b", decoders_dist={"image": "torch.nn.functional.mse_loss", "label": "normal"})
    with pytest.raises(ConfigError, match=r"likelihood 'torch\.nn\.functional\.mse_loss'"):
        export_multivae(tmp_path / "b", tmp_path / "out", trusted=["torch.nn.functional.mse_loss"])
    # Targets are the affair of whoever computes with the model.
    write(tmp_path / "c", decoder_dist_params={"image": {"soft_targets": True}})
    folder = export_multivae(tmp_path / "c", tmp_path / "theirs")
    assert load_multivae(folder).config.decoder_dist_params == {"image": {}}


class TestUnsafeFolders:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write(tmp_path / "ours")
        return export_multivae(tmp_path / "ours", tmp_path / "theirs")

    def change_config(self, folder: Path, **values: Any) -> None:
        path = folder / "model_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    def test_no_pickle_is_run(self, folder: Path, tmp_path: Path) -> None:
        class Payload:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "was_run",)

        (folder / "encoders.pkl").write_bytes(pickle.dumps(Payload(), protocol=2))
        load_multivae(folder)
        torch.save({"model_state_dict": Payload()}, folder / "model.pt")
        with pytest.raises(CheckpointError, match="cannot be read as tensors alone"):
            load_multivae(folder)
        (folder / "model.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
        with pytest.raises(CheckpointError, match="cannot be read as tensors alone"):
            load_multivae(folder)
        assert not (tmp_path / "was_run").exists()

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"name": "MVTCAEConfig"}, "'MVTCAEConfig' is not JMVAEConfig"),
            ({"custom_architectures": ["encoders"]}, "which are pickled"),
            ({"latent_dim": 0}, "latent_dim: 0"),
            ({"latent_dim": 4}, r"has the shape \(512, 6\), expected \(512, 8\)"),
            ({"input_dims": None}, "needs input_dims"),
            ({"decoders_dist": {"image": "os.system", "label": "normal"}}, "needs input_dims, and likelihoods from"),
        ],
    )
    def test_other_models(self, folder: Path, values: dict[str, Any], message: str) -> None:
        self.change_config(folder, **values)
        with pytest.raises(CheckpointError, match=message):
            load_multivae(folder)

    def test_damage(self, folder: Path, tmp_path: Path) -> None:
        state = torch.load(folder / "model.pt", weights_only=True)["model_state_dict"]
        for content, message in (
            ({}, "cannot be read"),
            ({"model_state_dict": {"a": 3}}, "something else than tensors"),
            ({"model_state_dict": {**state, "extra": torch.zeros(2)}}, r"extra has the shape \(2,\), expected None"),
            ({"model_state_dict": dict(list(state.items())[1:])}, "has the shape None"),
        ):
            torch.save(content, folder / "model.pt")
            with pytest.raises(CheckpointError, match=message):
                load_multivae(folder)
        (folder / "model_config.json").write_text("[]")
        with pytest.raises(CheckpointError, match="not a model configuration"):
            load_multivae(folder)
        with pytest.raises(CheckpointError, match="not an empty directory"):
            import_multivae(folder, tmp_path / "ours")


@needs_multivae
class TestWithThePackage:
    def compare(self, ours: JMVAE, theirs: Any) -> None:
        from multivae.data import MultimodalBaseDataset

        inputs = make_inputs()
        dataset = MultimodalBaseDataset(inputs)
        for given in ("all", "image", "label"):
            expected = theirs.encode(dataset, given, return_mean=True).z
            torch.testing.assert_close(ours.encode(inputs, given, return_mean=True).z[0], expected.detach())
        theirs.eval()
        torch.manual_seed(3)
        total = theirs(dataset, epoch=2).loss
        torch.manual_seed(3)
        noise = torch.randn(5, 3)
        out = ours(inputs, annealing=2 / 7, noise=noise)
        torch.testing.assert_close(out.loss, total)

    def test_folders_agree(self, tmp_path: Path) -> None:
        from multivae import models

        model = write(tmp_path / "ours")
        folder = export_multivae(tmp_path / "ours", tmp_path / "theirs")
        self.compare(model, models.AutoModel.load_from_folder(str(folder)))
        options = {"input_dims": dict(SHAPES), "decoders_dist": {"image": "laplace", "label": "categorical"}}
        parameters = {"decoder_dist_params": {"image": {"scale": 0.5}}}
        theirs = models.JMVAE(models.JMVAEConfig(2, 3, **options, **parameters, alpha=0.3, warmup=7))
        theirs.save(str(tmp_path / "saved"))
        self.compare(load_multivae(tmp_path / "saved"), theirs)

    def test_any_model_in_memory(self) -> None:
        networks = NetworksConfig(
            joint_hidden_dims=[8],
            modalities={"image": {"kind": "conv", "channels": [4], "hidden_dims": [8]}},
            activation="gelu",
            sigma="softplus",
        )
        model, _ = make_model(networks)
        theirs = to_multivae(model)
        self.compare(model, theirs)
        assert {id(parameter) for parameter in model.parameters()} == {id(p) for p in theirs.parameters()}

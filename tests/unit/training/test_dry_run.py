"""The dry run: what a model needs, without data, weights or the cluster it is meant for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from jmvae_dist.commands.train import main
from jmvae_dist.config import RunConfig
from jmvae_dist.config_io import parse_run_config
from jmvae_dist.data_config import DataSection
from jmvae_dist.errors import ConfigError
from jmvae_dist.model import JMVAE
from jmvae_dist.model_config import ModelSection
from jmvae_dist.networks_config import NetworksConfig
from jmvae_dist.training.dry_run import estimate_run, render
from jmvae_dist.training.memory import PassTheory, engine_memory
from jmvae_dist.training.setup import resolve_run
from jmvae_dist.training_config import TrainingSection
from tests.conftest import ROOT
from tests.unit.model import user_networks

SHAPES = {"picture": (3, 16, 16), "caption": (8, 11), "label": (4,)}
DISTRIBUTIONS = {"picture": "normal", "caption": "categorical", "label": "categorical"}
KINDS: dict[str, dict[str, Any]] = {
    "picture": {"kind": "conv", "channels": [8, 16]},
    "caption": {"kind": "transformer", "embedding_dim": 16, "layers": 2, "heads": 2},
}


def make_config(modalities: dict[str, dict[str, Any]] | None = None, **training: Any) -> RunConfig:
    model = ModelSection(
        latent_dim=3,
        input_dims=dict(SHAPES),
        decoders_dist=dict(DISTRIBUTIONS),
        networks=NetworksConfig([8], [8], [8], modalities=KINDS if modalities is None else modalities),
    )
    training = {"global_batch_size": 24, "epochs": 2, **training}
    return RunConfig("runs/none", DataSection("nowhere/manifest.json"), TrainingSection(**training), model)


def test_it_counts_what_a_real_model_has_and_keeps() -> None:
    estimate = estimate_run(make_config(micro_batch_size=3), num_ranks=4, num_samples=100)
    config = make_config().model
    model = JMVAE(config.resolve(dict(SHAPES)), networks=config.networks)
    assert estimate.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert list(estimate.networks) == [
        *(f"encoders.{name}" for name in SHAPES),
        *(f"decoders.{name}" for name in SHAPES),
        "joint_encoder",
    ]
    assert (estimate.rank_batch_size, estimate.micro_batch_size) == (6, 3)
    assert estimate.total_steps == math.ceil(2 * 100 / 24)
    assert estimate.checkpoint_bytes == 12 * estimate.num_parameters


def test_what_a_pass_holds() -> None:
    """Per sample, mostly the one tensor that autograd keeps of the hidden layer of each of three decoders."""
    config = make_config({}, precision="fp32")
    shapes = config.model.resolve(dict(SHAPES))
    config.model.networks.decoder_hidden_dims = [4096]
    theory = PassTheory(config, shapes)
    small, large = theory(100), theory(200)
    assert (large - small) / 100 == pytest.approx(4 * 3 * 4096, rel=0.25)


def test_activations_follow_batch_and_precision() -> None:
    def per_sample(precision: str) -> float:
        config = make_config({}, precision=precision)
        config.model.networks.encoder_hidden_dims = [1024, 1024, 1024]
        theory = PassTheory(config, config.model.resolve(dict(SHAPES)))
        return (theory(256) - theory(128)) / 128

    assert 0.45 < per_sample("bf16") / per_sample("fp32") < 0.95


def test_zero_cuts_one_thing_after_the_other() -> None:
    ddp, *zero = (engine_memory(engine, 10**9, 64) for engine in ("ddp", "zero1", "zero2", "zero3"))
    assert ddp.peak() == 16 * 10**9
    assert [memory.moments for memory in zero] == [ddp.moments // 64] * 3
    assert zero[0].gradients == ddp.gradients > zero[1].gradients == zero[2].gradients == ddp.gradients // 64
    assert zero[1].weights > ddp.weights > zero[2].weights == ddp.weights // 32
    assert ddp.peak() > zero[0].peak() > zero[1].peak()


def test_ddp_on_a_cpu_may_share_memory() -> None:
    def peak(num_ranks: int = 2, device_type: str = "cpu", gradient_reduction: str = "auto") -> int:
        options = {"device_type": device_type, "gradient_reduction": gradient_reduction}
        return engine_memory("ddp", 10**9, num_ranks, **options).peak()

    assert peak() == peak(gradient_reduction="shared_memory") == 20 * 10**9
    assert peak(num_ranks=1) == peak(device_type="cuda") == peak(gradient_reduction="process_group") == 16 * 10**9
    config = make_config()
    assert "buffers of ddp: memory that the ranks of one machine share" in render(estimate_run(config, 2), config)
    config.training.gradient_reduction = "process_group"
    assert "buffers of ddp" not in render(estimate_run(config, 2), config)


def test_networks_that_need_values_are_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def looks_at_values(self: user_networks.Decoder, z: torch.Tensor) -> torch.Tensor:
        return self.layer(z).unflatten(-1, self.shape) * float(z.detach().sum())

    monkeypatch.setattr(user_networks.Decoder, "forward", looks_at_values)
    own = {**KINDS, "label": {"decoder": {"class_path": "tests.unit.model.user_networks.Decoder"}}}
    estimate = estimate_run(make_config(own), 2)
    assert estimate.activation_bytes is None
    assert "not estimated" in render(estimate, make_config(own))


def test_without_manifest_and_shapes() -> None:
    config = make_config()
    config.model.input_dims = None
    with pytest.raises(ConfigError, match=r"no manifest at nowhere/manifest\.json, .* model\.input_dims"):
        estimate_run(config, 1)
    with pytest.raises(ConfigError, match=r"data\.lanes: 24 lanes cannot be shared by 25"):
        estimate_run(make_config(), 25)


def test_with_a_manifest(digits: Path) -> None:
    manifest = str(digits / "train" / "manifest.json")
    arguments = ["--config", str(ROOT / "configs" / "digits.yaml"), "--data.train_manifest", manifest]
    config = parse_run_config([*arguments, "--data.eval_manifest", "null"])
    estimate, run = estimate_run(config, 2), resolve_run(config, 2)
    assert estimate.num_samples == run.train_manifest.num_samples
    assert estimate.total_steps == run.total_steps
    assert estimate.origin == manifest


@pytest.mark.parametrize(("name", "parameters"), [("polymnist", 27e6), ("image_text", 1.1e9), ("mnist", 3.1e6)])
def test_shipped_configurations_without_their_data(
    name: str, parameters: float, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(ROOT / "configs" / f"{name}.yaml")]
    assert main([*arguments, "--dry_run.ranks", "32", "--dry_run.samples=12000000", "--dry_run"]) == 0
    text = capsys.readouterr().out
    together = next(line for line in text.splitlines() if line.split()[0:1] == ["together"])
    assert float(together.split()[1].replace(",", "")) == pytest.approx(parameters, rel=0.1)
    assert "per epoch of 12,000,000 samples" in text
    assert "32 rank(s)" in text
    assert "not estimated" not in text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--dry_run.ranks", "0"], r"--dry_run\.ranks: '0'"),
        (["--dry_run.samples"], r"--dry_run\.samples: ''"),
        (["--dry_run.ranks=-2"], "'-2'"),
        (["--dry_run=3"], "dry_run: unknown key"),
    ],
)
def test_mistakes(option: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["--config", str(ROOT / "configs" / "digits.yaml"), *option])

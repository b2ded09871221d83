"""Activation checkpointing: the same numbers, fewer tensors kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jmvae_dist.distributed.engine import ForwardPass
from jmvae_dist.model import JMVAE, GaussianParams
from jmvae_dist.model.modules import MLP
from jmvae_dist.model.recomputation import recompute
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig

SHAPES = {"picture": (2, 9, 8), "caption": (8, 5), "words": (8, 5), "label": (4,)}
KINDS: dict[str, dict[str, Any]] = {
    "picture": {"kind": "conv", "channels": [8, 8], "residual_blocks": 2, "hidden_dims": [8]},
    "caption": {"kind": "transformer", "embedding_dim": 8, "layers": 3, "heads": 2},
    "words": {"kind": "text", "embedding_dim": 8, "channels": [8], "hidden_dims": [8]},
    "label": {"kind": "vector"},
}


class _Noisy(nn.Module):
    """An encoder of the user's: dropout, and perhaps batch norm."""

    def __init__(self, has_buffers: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(16) if has_buffers else nn.LayerNorm(16)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(4, 16), norm, nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 6)
        )

    def forward(self, x: Tensor) -> GaussianParams:
        return GaussianParams(*self.layers(x).chunk(2, dim=-1))


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 4))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


def _built_in() -> JMVAE:
    config = JMVAEConfig(4, latent_dim=3, input_dims=dict(SHAPES))
    return JMVAE(config, networks=NetworksConfig([8, 8, 8], [8, 8, 8], [8, 8, 8], "gelu", modalities=KINDS))


def _of_the_user(has_buffers: bool = False) -> JMVAE:
    names = ("left", "right")
    return JMVAE(
        JMVAEConfig(2, latent_dim=3, input_dims=dict.fromkeys(names, (4,))),
        encoders={name: _Noisy(has_buffers) for name in names},
        decoders={name: _Decoder() for name in names},
    )


def _take_pass(model: JMVAE, precision: str = "fp32") -> tuple[Tensor, list[Tensor], int]:
    """Loss, gradients, and bytes that autograd keeps besides the weights; of two forward passes."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    generator = torch.Generator().manual_seed(1)
    assert model.config.input_dims is not None
    inputs = {name: torch.rand(6, *shape, generator=generator) for name, shape in model.config.input_dims.items()}
    noise = torch.randn(6, 3, generator=generator)
    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        first, _ = ForwardPass(model, precision, "cpu")(inputs, noise=noise)
        second, _ = ForwardPass(model, precision, "cpu")(inputs, noise=noise)
    (first + second).backward()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    num_bytes = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)
    gradients = [parameter.grad for parameter in model.parameters()]
    assert None not in gradients
    return (first + second).detach(), [gradient for gradient in gradients if gradient is not None], num_bytes


@pytest.fixture(params=[_built_in, _of_the_user], ids=["built-in", "of the user"])
def models(request: pytest.FixtureRequest) -> tuple[JMVAE, JMVAE]:
    """Two equal models, the second with activation checkpointing."""
    torch.manual_seed(0)
    plain = request.param()
    recomputing = request.param()
    recomputing.load_state_dict(plain.state_dict())
    assert recomputing.recompute_activations() == []
    return plain, recomputing


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_numbers_with_fewer_tensors_kept(models: tuple[JMVAE, JMVAE], precision: str) -> None:
    """Dropout, in networks of the user's, draws the same numbers again."""
    (loss, gradients, kept), (other_loss, other_gradients, other_kept) = (_take_pass(m, precision) for m in models)
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(*pair) for pair in zip(gradients, other_gradients, strict=True))
    assert other_kept < 0.5 * kept


def test_networks_whose_buffers_would_change_twice_keep_everything() -> None:
    plain, recomputing = _of_the_user(has_buffers=True), _of_the_user(has_buffers=True)
    recomputing.load_state_dict(plain.state_dict())
    branches = [f"joint_encoder.branches.{name}.encoder" for name in ("left", "right")]
    assert recomputing.recompute_activations() == ["encoders.left", "encoders.right", *branches]
    for model in (plain, recomputing):
        _take_pass(model)
    for buffer, other in zip(plain.buffers(), recomputing.buffers(), strict=True):
        assert torch.equal(buffer, other)


def test_without_gradients_nothing_is_different(models: tuple[JMVAE, JMVAE]) -> None:
    plain, recomputing = (model.eval() for model in models)
    assert plain.config.input_dims is not None
    inputs = {name: torch.rand(2, *shape) for name, shape in plain.config.input_dims.items()}
    for name, values in plain.predict(inputs, return_mean=True).items():
        assert torch.equal(values, recomputing.predict(inputs, return_mean=True)[name])


class _Mixed(nn.Module):
    """An encoder of the user's with a perceptron of this package in it, and most of its activations around that."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(4, 64), *(nn.GELU() for _ in range(8)))
        self.inside = MLP(64, [8, 8], "gelu")
        self.after = nn.Linear(8, 6)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> GaussianParams:
        return GaussianParams(*self.after(self.inside(self.before(scale * x))).chunk(2, dim=-1))


def test_a_network_of_the_user_with_a_block_of_ours_recomputes_as_a_whole() -> None:
    names = ("left", "right")
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        encoders: dict[str, nn.Module] = {name: _Mixed() for name in names}
        config = JMVAEConfig(2, latent_dim=3, input_dims=dict.fromkeys(names, (4,)))
        models.append(JMVAE(config, encoders=encoders, networks=NetworksConfig([8], [8], [8], "gelu")))
    assert models[1].recompute_activations() == []
    (loss, gradients, kept), (other_loss, other_gradients, other_kept) = map(_take_pass, models)
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(*pair) for pair in zip(gradients, other_gradients, strict=True))
    assert other_kept < 0.3 * kept


def test_keyword_arguments_arrive() -> None:
    plain, recomputing = _Mixed(), _Mixed()
    recomputing.load_state_dict(plain.state_dict())
    assert recompute(recomputing)
    x = torch.rand(2, 4)
    assert torch.equal(recomputing(x, scale=2.0).mu, plain(x, scale=2.0).mu)
    with torch.no_grad():
        assert torch.equal(recomputing(x, scale=2.0).mu, plain(x, scale=2.0).mu)

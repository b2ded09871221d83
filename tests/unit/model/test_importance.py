"""Importance sampling: against exact likelihoods and brute force, for any cut of draws and samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jmvae_dist.errors import ConfigError
from jmvae_dist.kernels.noise import KeyedNoise, Stream, normal_noise, normal_noise_of_steps
from jmvae_dist.model import JMVAE
from jmvae_dist.model.importance import LogWeightSums
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig

SHAPES = {"image": (2, 3), "word": (4,)}
BATCH, K = 11, 60


@pytest.fixture
def model() -> JMVAE:
    torch.manual_seed(0)
    config = JMVAEConfig(2, 3, dict(SHAPES), decoders_dist={"image": "normal", "word": "categorical"})
    return JMVAE(config, networks=NetworksConfig([16], [16], [16])).eval()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(BATCH, 2, 3, generator=generator),
        "word": torch.eye(4)[torch.randint(4, (BATCH,), generator=generator)],
    }


ROWS = torch.arange(100, 100 + BATCH)
KEYED = KeyedNoise(3, 0, ROWS, Stream.IMPORTANCE)
GROUPS = {"joint": ["image", "word"], "image": ["image"]}


def brute_force(model: JMVAE, inputs: dict[str, Tensor], names: list[str], given: str, conditional: bool) -> Tensor:
    """Log-weights (K, B) from densities of torch.distributions, in float64."""
    model = model.double()
    inputs = {name: x.double() for name, x in inputs.items()}
    latent = model.encode(inputs, given)
    noise = torch.stack([normal_noise(3, k, ROWS, 3, Stream.IMPORTANCE) for k in range(K)]).double()
    q = torch.distributions.Normal(latent.mu, (0.5 * latent.logvar).exp())
    z = latent.mu + q.scale * noise
    decoded = model.decode(z)
    log_likelihoods = {
        "image": torch.distributions.Normal(decoded["image"], 1.0).log_prob(inputs["image"]).sum((-2, -1)),
        "word": torch.distributions.OneHotCategorical(logits=decoded["word"]).log_prob(inputs["word"]),
    }
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1) - q.log_prob(z).sum(-1)
    total = sum((log_likelihoods[name] for name in names), start=torch.zeros_like(prior))
    return total if conditional else total + prior


@pytest.mark.parametrize(("given", "conditional"), [("all", False), ("image", False), ("word", True)])
@pytest.mark.parametrize(
    "options", [{}, {"batch_size_K": 7}, {"memory_budget_bytes": 1}, {"memory_budget_bytes": 900}]
)
def test_estimates_are_those_of_all_weights_at_once(
    model: JMVAE, inputs: dict[str, Tensor], given: str, conditional: bool, options: dict[str, int]
) -> None:
    found = model.estimate_nlls(inputs, GROUPS, given, conditional=conditional, K=K, noise=KEYED, **options)
    for key, names in GROUPS.items():
        weights = brute_force(model, inputs, names, given, conditional).exp()
        mean = weights.mean(0)
        torch.testing.assert_close(found[key].nll, -mean.log(), rtol=1e-5, atol=1e-5)
        stderr = weights.std(0, correction=1) / math.sqrt(K) / mean
        torch.testing.assert_close(found[key].stderr, stderr, rtol=1e-4, atol=1e-5)
        effective = weights.sum(0).square() / weights.square().sum(0)
        torch.testing.assert_close(found[key].effective_samples, effective, rtol=1e-4, atol=1e-4)


def test_keyed_noise_makes_the_estimate_of_a_sample_its_own(model: JMVAE, inputs: dict[str, Tensor]) -> None:
    whole = model.compute_joint_nll(inputs, K, noise=KEYED)
    for rows in torch.arange(BATCH).split(4):
        part = model.compute_joint_nll(
            {name: x[rows] for name, x in inputs.items()}, K, noise=KeyedNoise(3, 0, ROWS[rows], Stream.IMPORTANCE)
        )
        torch.testing.assert_close(part, whole[rows], rtol=1e-6, atol=1e-6)


def test_noise_of_steps_is_that_of_each_step() -> None:
    for first in (0, 2**32 - 2):
        steps = range(first, first + 4)
        together = normal_noise_of_steps(9, steps, ROWS, 6, Stream.IMPORTANCE)
        assert torch.equal(together, torch.stack([normal_noise(9, k, ROWS, 6, Stream.IMPORTANCE) for k in steps]))
    with pytest.raises(ValueError, match="consecutive"):
        normal_noise_of_steps(9, range(0, 4, 2), ROWS, 6)


class _Linear(nn.Module):
    """Encoder with the exact posterior of x = z + noise, but for `widen`, which adds to its log-variance."""

    def __init__(self, share: float, widen: float) -> None:
        super().__init__()
        self.share, self.widen = share, widen

    def forward(self, x: Tensor | dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        total = sum(x.values()) if isinstance(x, dict) else x
        mean = self.share * total
        return mean, torch.full_like(mean, math.log(self.share) + self.widen)


def exact_model(widen: float) -> JMVAE:
    """x_m = z + N(0, I) for two modalities, with z ~ N(0, I): all likelihoods and posteriors are known."""
    config = JMVAEConfig(2, 3, {"a": (3,), "b": (3,)})
    decoders: dict[str, nn.Module] = {"a": nn.Identity(), "b": nn.Identity()}
    encoders: dict[str, nn.Module] = {"a": _Linear(1 / 2, widen), "b": _Linear(1 / 2, widen)}
    return JMVAE(config, encoders, decoders, _Linear(1 / 3, widen))


def exact_nll(x: Tensor, covariance: Tensor) -> Tensor:
    normal = torch.distributions.MultivariateNormal(torch.zeros(len(covariance)).double(), covariance.double())
    return -normal.log_prob(x.double()).sum(-1)


def test_likelihoods_of_a_linear_model_are_exact_up_to_the_stated_error() -> None:
    generator = torch.Generator().manual_seed(2)
    x = {name: torch.randn(40, 3, generator=generator) for name in ("a", "b")}
    pairs = torch.stack([x["a"], x["b"]], dim=-1)  # dimensions are independent
    joint = exact_nll(pairs, torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    marginal = exact_nll(x["a"][..., None], torch.tensor([[2.0]]))
    rows = torch.arange(40)
    # A proposal that is wider than the posterior has bounded weights, whose error is itself well estimated.
    for widen in (0.0, 1.0):
        model, options = exact_model(widen), {"K": 400, "noise": KeyedNoise(0, 0, rows, Stream.IMPORTANCE)}
        estimates = {
            "joint": (model.estimate_nlls(x, {"x": ["a", "b"]}, **options)["x"], joint),
            "own": (model.estimate_nlls({"a": x["a"]}, {"x": ["a"]}, "a", **options)["x"], marginal),
            "marginal": (model.estimate_nlls(x, {"x": ["a"]}, **options)["x"], marginal),
        }
        for key, (estimate, exact) in estimates.items():
            if widen == 0:
                if key != "marginal":  # the proposal is the posterior: every weight is the likelihood
                    torch.testing.assert_close(estimate.nll, exact, rtol=1e-5, atol=1e-5)
                    assert (estimate.effective_samples > 399.9).all()
                continue
            deviations = (estimate.nll - exact) / estimate.stderr
            assert 0.6 < deviations.std().item() < 1.5, key
            assert deviations.abs().max() < 5, key
    torch.testing.assert_close(
        model.compute_marginal_nll(x, "a", proposal="unimodal", **options), estimates["own"][0].nll.float()
    )
    torch.testing.assert_close(model.compute_marginal_nll(x, "a", **options), estimates["marginal"][0].nll.float())


def test_the_budget_bounds_what_is_decoded_at_once(model: JMVAE, inputs: dict[str, Tensor]) -> None:
    sizes: list[int] = []
    model.decoders["image"].register_forward_hook(lambda module, arguments, output: sizes.append(len(output)))
    per_latent = 4 * (16 + 16)  # the activation between the layers, in and out
    for latents in (1, 5, 200):
        sizes.clear()
        model.compute_joint_nll(inputs, K, K, memory_budget_bytes=latents * per_latent + 20, noise=KEYED)
        assert sum(sizes) == BATCH * K
        assert latents / 2 < max(sizes[1:]) <= latents
    sizes.clear()
    model.compute_joint_nll(inputs, K, 2, noise=KEYED)
    assert max(sizes) == 2 * BATCH


def test_weights_beyond_the_range_of_floats() -> None:
    sums = LogWeightSums(torch.zeros(3))
    log_weights = torch.tensor([[-5000.0, -math.inf, 800.0], [-5001.0, -math.inf, 700.0]], dtype=torch.float64)
    for draw in log_weights:
        sums.add(draw[None])
    estimate = sums.estimate()
    expected = 5000 - math.log((1 + math.exp(-1)) / 2)
    assert estimate.nll.tolist() == pytest.approx([expected, math.inf, -800 + math.log(2)])
    assert estimate.effective_samples[2].item() == pytest.approx(1)


def test_mistakes(model: JMVAE, inputs: dict[str, Tensor]) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("memory_budget_bytes", {"memory_budget_bytes": 0}),
        ("batch_size_K", {"batch_size_K": 0}),
        ("K", {"K": 0}),
        ("proposal", {"proposal": "sound"}),
    ]
    for message, options in wrong:
        with pytest.raises(ConfigError, match=message):
            model.estimate_nlls(inputs, GROUPS, **options)
    with pytest.raises(ConfigError, match="'joint' or 'unimodal'"):
        model.compute_marginal_nll(inputs, "image", proposal="prior")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown modality 'sound'"):
        model.compute_marginal_nll(inputs, "sound")

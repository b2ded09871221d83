"""Likelihoods against torch.distributions, and which targets they accept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, distributions

from jmvae_dist.model.likelihoods import build_likelihood, log_prob

REFERENCES: dict[str, Any] = {
    "normal": lambda decoded, scale: distributions.Normal(decoded, scale),
    "laplace": lambda decoded, scale: distributions.Laplace(decoded, scale),
    "bernoulli": lambda decoded, scale: distributions.Bernoulli(logits=decoded),
    "categorical": lambda decoded, scale: distributions.OneHotCategorical(logits=decoded),
}


def make_target(distribution: str, *shape: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if distribution == "bernoulli":
        return (x > 0).double()
    if distribution == "categorical":
        return torch.nn.functional.one_hot(x.argmax(-1), shape[-1]).double()
    return x


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("leading", [(4,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("distribution", list(REFERENCES))
def test_log_prob_equals_torch_distributions(
    distribution: str, leading: tuple[int, ...], scale: float, dtype: torch.dtype, tolerance: float
) -> None:
    shape = (2, 5)
    decoded = 3 * torch.randn(*leading, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = make_target(distribution, 4, *shape)
    parameters = {"scale": scale} if distribution in ("normal", "laplace") else {}
    values = log_prob(build_likelihood(distribution, parameters), decoded.to(dtype), target.to(dtype))
    expected = REFERENCES[distribution](decoded, scale).log_prob(target.expand_as(decoded))
    assert values.shape == leading
    assert values.dtype == dtype
    torch.testing.assert_close(values.double(), expected.flatten(len(leading)).sum(-1), rtol=tolerance, atol=0)


@pytest.mark.parametrize("distribution", ["bernoulli", "categorical"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_confident_logits(distribution: str, sign: float) -> None:
    """Neither overflow where the model is sure and wrong, nor lost digits where it is sure and right."""
    decoded = sign * torch.tensor([[15.0, 0.0], [300.0, 0.0]])
    target = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    likelihood = build_likelihood(distribution, {})
    values = likelihood.log_prob_per_element(decoded, target)[:, 0]
    exact = likelihood.log_prob_per_element(decoded.double(), target.double())[:, 0]
    # log_softmax rounds 1 + exp(-15) to a float32; the Bernoulli has no such sum, and underflows at exp(-300)
    # only.
    atol = 1.2e-7 if distribution == "categorical" else 1e-45
    torch.testing.assert_close(values.double(), exact, rtol=2e-6, atol=atol)


def test_sums_in_float32_for_16_bit_outputs() -> None:
    decoded = torch.randn(3, 4, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = torch.randn(4, 500, generator=torch.Generator().manual_seed(1))
    likelihood = build_likelihood("normal", {})
    with torch.autocast("cpu", torch.bfloat16):
        values = log_prob(likelihood, decoded, target)
    assert values.dtype == torch.float32
    exact = log_prob(likelihood, decoded.double(), target.double())
    torch.testing.assert_close(values.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("distribution", list(REFERENCES))
def test_mean_is_that_of_the_distribution(distribution: str) -> None:
    decoded = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0))
    expected = REFERENCES[distribution](decoded, 1.0).mean
    torch.testing.assert_close(build_likelihood(distribution, {}).mean(decoded), expected)


@pytest.mark.parametrize(
    ("distribution", "soft", "target", "valid"),
    [
        ("normal", None, [-1e30, 7.0], True),
        ("laplace", None, [-1e30, 7.0], True),
        ("bernoulli", False, [0.0, 1.0], True),
        ("bernoulli", False, [0.0, 0.5], False),
        ("bernoulli", True, [0.0, 0.5], True),
        ("bernoulli", True, [0.0, 1.001], False),
        ("bernoulli", True, [-0.001, 1.0], False),
        ("categorical", False, [0.0, 1.0], True),
        ("categorical", False, [1.0, 1.0], False),
        ("categorical", False, [0.0, 0.0], False),
        ("categorical", False, [0.5, 0.5], False),
        ("categorical", True, [0.3, 0.7], True),
        ("categorical", True, [0.3, 0.6], False),
        ("categorical", True, [-0.3, 1.3], False),
    ],
)
def test_accepted_targets(distribution: str, soft: bool | None, target: list[float], valid: bool) -> None:
    likelihood = build_likelihood(distribution, {} if soft is None else {"soft_targets": soft})
    for row in (0, 1):
        batch = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        batch[row] = torch.tensor(target)
        wrong, _ = likelihood.invalid(batch)
        assert (wrong is not None and bool(wrong.any())) != valid


@pytest.mark.parametrize("distribution", ["normal", "laplace"])
def test_gradients_of_gradients_are_refused(distribution: str) -> None:
    """They would be those of a part of the formula."""
    decoded = torch.randn(3, 2, requires_grad=True)
    values = log_prob(build_likelihood(distribution, {}), decoded, torch.zeros(3, 2))
    (gradient,) = torch.autograd.grad(values.square().sum(), decoded, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()

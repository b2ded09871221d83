"""Gaussian KL terms and products of experts against float64 formulas, at the extremes, and under autocast."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from jmvae_dist.kernels.gaussian import gaussian_kl_terms, product_of_experts
from jmvae_dist.kernels.reference import phi


def random_gaussians(
    num_experts: int, batch_size: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(mu, logvar, mus, logvars, noise) as `gaussian_kl_terms` takes them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    one, all_experts = (batch_size, dim), (num_experts, batch_size, dim)
    return draw(*one), draw(*one), draw(*all_experts), draw(*all_experts), draw(*one)


def torch_kl(mu: Tensor, logvar: Tensor, mu_other: Tensor, logvar_other: Tensor) -> Tensor:
    """KL by torch.distributions in float64, summed over the last dimension."""
    q, p = Normal(mu, (0.5 * logvar).exp()), Normal(mu_other, (0.5 * logvar_other).exp())
    return kl_divergence(q, p).sum(-1)


class TestPhi:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-7), (torch.float64, 2e-15)])
    def test_is_accurate_everywhere(self, dtype: torch.dtype, tolerance: float) -> None:
        magnitudes = np.concatenate([np.logspace(-12, 1.5, 400), [0.34999, 0.35, 0.35001]])
        x = torch.tensor(np.concatenate([magnitudes, -magnitudes]), dtype=dtype)
        # Exact values from Python's big integers: the series with rational arithmetic.
        from fractions import Fraction

        for value, result in zip(x.tolist(), phi(x, x)[0].tolist(), strict=True):
            if abs(value) > 1:
                exact = math.expm1(value) - value
            else:
                terms = (Fraction(value) ** n / math.factorial(n) for n in range(2, 24))
                exact = float(sum(terms))
            assert result == pytest.approx(exact, rel=tolerance, abs=0)

    def test_zero_and_never_negative(self) -> None:
        x = torch.linspace(-3, 3, 100_001)
        assert phi(torch.zeros(1), torch.zeros(1))[0].item() == 0
        assert (phi(x, x)[1] >= 0).all()

    def test_gradients(self) -> None:
        x = torch.tensor([-30.0, -0.4, -0.3, -1e-5, 1e-5, 0.3, 0.4, 5.0], dtype=torch.float64, requires_grad=True)
        half = (0.5 * x.detach()).requires_grad_()
        assert torch.autograd.gradcheck(phi, (x, half))
        assert torch.autograd.gradgradcheck(phi, (x, half))


class TestKlTerms:
    @pytest.mark.parametrize("num_experts", [1, 2, 5])
    def test_equals_torch_distributions(self, num_experts: int) -> None:
        mu, logvar, mus, logvars, noise = random_gaussians(num_experts, 7, 5)
        z, kl_prior, kl_experts = gaussian_kl_terms(mu, logvar, mus, logvars, noise)
        torch.testing.assert_close(z, mu + noise * logvar.exp().sqrt())
        torch.testing.assert_close(kl_prior, torch_kl(mu, logvar, torch.zeros(()), torch.zeros(())))
        torch.testing.assert_close(kl_experts, torch_kl(mu, logvar, mus, logvars))

    def test_gradcheck(self) -> None:
        arguments = [tensor.requires_grad_() for tensor in random_gaussians(3, 4, 3)]
        assert torch.autograd.gradcheck(gaussian_kl_terms, arguments)

    @pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6])
    def test_accurate_near_collapse(self, distance: float) -> None:
        """A unimodal posterior close to the joint one: the plain formula is wrong by 100 % there in float32."""
        mu, logvar, offsets, logvar_offsets, noise = random_gaussians(2, 64, 32, dtype=torch.float32)
        mus, logvars = mu + distance * offsets, logvar + distance * logvar_offsets
        arguments = [tensor.requires_grad_() for tensor in (mu, logvar, mus, logvars)]
        _, _, kl = gaussian_kl_terms(*arguments, noise)
        gradients = torch.autograd.grad(kl.sum(), arguments)

        exact_arguments = [tensor.detach().double().requires_grad_() for tensor in arguments]
        _, _, exact_kl = gaussian_kl_terms(*exact_arguments, noise.double())
        exact_gradients = torch.autograd.grad(exact_kl.sum(), exact_arguments)
        torch.testing.assert_close(kl.double(), exact_kl, rtol=2e-6, atol=0)
        for gradient, exact in zip(gradients, exact_gradients, strict=True):
            error = (gradient.double() - exact).norm() / exact.norm()
            assert error < 2e-6

    @settings(deadline=None, max_examples=60)
    @given(seed=st.integers(0, 2**31), scale=st.floats(0, 8), dtype=st.sampled_from([torch.float32, torch.float64]))
    def test_never_negative(self, seed: int, scale: float, dtype: torch.dtype) -> None:
        mu, logvar, mus, logvars, noise = random_gaussians(2, 5, 4, seed=seed, dtype=dtype)
        logvar, logvars = (scale * logvar).clamp(-20, 20), (scale * logvars).clamp(-20, 20)
        _, kl_prior, kl_experts = gaussian_kl_terms(mu, logvar, mus, logvars, noise)
        assert (kl_prior >= 0).all()
        assert (kl_experts >= 0).all()
        assert torch.isfinite(kl_experts).all()

    def test_zero_between_equal_gaussians(self) -> None:
        mu, logvar, _, _, noise = random_gaussians(1, 6, 4, dtype=torch.float32)
        _, _, kl_experts = gaussian_kl_terms(mu, logvar, mu[None], logvar[None], noise)
        assert (kl_experts == 0).all()
        zeros = torch.zeros(6, 4)
        _, kl_prior, _ = gaussian_kl_terms(zeros, zeros, mu[None], logvar[None], noise)
        assert (kl_prior == 0).all()

    @pytest.mark.parametrize(("logvar", "logvar_other"), [(20.0, -20.0), (-20.0, 20.0), (20.0, 20.0)])
    def test_ends_of_the_log_variance_range(self, logvar: float, logvar_other: float) -> None:
        """Everything that Adam sees (gradients and their squares) stays finite in float32."""
        mu, other = torch.full((1, 64), 3.0), torch.full((1, 1, 64), -3.0)
        arguments = [mu, torch.full_like(mu, logvar), other, torch.full_like(other, logvar_other)]
        arguments = [tensor.requires_grad_() for tensor in arguments]
        _, kl_prior, kl_experts = gaussian_kl_terms(*arguments, torch.zeros(1, 64))
        gradients = torch.autograd.grad(kl_prior.sum() + kl_experts.sum(), arguments)
        exact = torch_kl(*[tensor.detach().double() for tensor in arguments])
        torch.testing.assert_close(kl_experts.double(), exact, rtol=1e-5, atol=0)
        assert all(torch.isfinite(gradient.square()).all() for gradient in gradients)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bit_inputs_are_computed_in_float32(self, dtype: torch.dtype) -> None:
        arguments = random_gaussians(2, 16, 64, dtype=dtype)
        exact = gaussian_kl_terms(*[tensor.double() for tensor in arguments])
        with torch.autocast("cpu", torch.bfloat16):
            results = gaussian_kl_terms(*arguments)
        for result, reference in zip(results, exact, strict=True):
            assert result.dtype == torch.float32
            torch.testing.assert_close(result.double(), reference, rtol=1e-5, atol=1e-6)

    def test_empty_batch(self) -> None:
        arguments = [tensor.requires_grad_() for tensor in random_gaussians(2, 0, 4, dtype=torch.float32)]
        z, kl_prior, kl_experts = gaussian_kl_terms(*arguments)
        assert (z.shape, kl_prior.shape, kl_experts.shape) == ((0, 4), (0,), (2, 0))
        (kl_prior.sum() + kl_experts.sum()).backward()


class TestProductOfExperts:
    @staticmethod
    def by_precisions(mus: Tensor, logvars: Tensor, prior_expert: bool = False) -> tuple[Tensor, Tensor]:
        """The textbook formula, in float64."""
        precisions = (-logvars.double()).exp()
        total = precisions.sum(0) + float(prior_expert)
        return (precisions * mus.double()).sum(0) / total, -total.log()

    @pytest.mark.parametrize("prior_expert", [False, True])
    def test_equals_the_textbook_formula(self, prior_expert: bool) -> None:
        _, _, mus, logvars, _ = random_gaussians(3, 6, 4)
        expected = self.by_precisions(mus, logvars, prior_expert)
        torch.testing.assert_close(product_of_experts(mus, logvars, prior_expert=prior_expert), expected)

    @pytest.mark.parametrize("prior_expert", [False, True])
    @pytest.mark.parametrize("mask", [None, [True, False, True], [[True, False, True], [False] * 3, [True] * 3]])
    def test_gradcheck(self, mask: list | None, prior_expert: bool) -> None:
        _, _, mus, logvars, _ = random_gaussians(3, 3, 2)
        selected = None if mask is None else torch.tensor(mask)
        assert torch.autograd.gradcheck(
            lambda mus, logvars: product_of_experts(mus, logvars, selected, prior_expert),
            (mus.requires_grad_(), logvars.requires_grad_()),
        )

    def test_mask_per_sample_selects_experts(self) -> None:
        _, _, mus, logvars, _ = random_gaussians(3, 4, 5)
        mask = torch.tensor([[True, True, False], [False, False, True], [True, True, True], [False] * 3])
        mu, logvar = product_of_experts(mus, logvars, mask)
        for row in range(3):
            chosen = mask[row]
            expected = self.by_precisions(mus[chosen, row], logvars[chosen, row])
            torch.testing.assert_close((mu[row], logvar[row]), expected)
        assert (mu[3] == 0).all()
        assert (logvar[3] == 0).all()

    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    def test_masked_values_never_leak(self, poison: float) -> None:
        _, _, mus, logvars, _ = random_gaussians(3, 2, 4, dtype=torch.float32)
        mus, logvars = mus.clone(), logvars.clone()
        expected = product_of_experts(mus[:2], logvars[:2])
        mus[2], logvars[2] = poison, poison
        arguments = (mus.requires_grad_(), logvars.requires_grad_())
        mu, logvar = product_of_experts(*arguments, torch.tensor([True, True, False]))
        torch.testing.assert_close((mu, logvar), expected)
        for gradient in torch.autograd.grad(mu.sum() + logvar.sum(), arguments):
            assert torch.isfinite(gradient).all()
            assert (gradient[2] == 0).all()

    @settings(deadline=None, max_examples=40)
    @given(seed=st.integers(0, 2**31), order=st.permutations(range(4)))
    def test_order_of_experts_is_irrelevant(self, seed: int, order: list[int]) -> None:
        _, _, mus, logvars, _ = random_gaussians(4, 3, 5, seed=seed, dtype=torch.float32)
        shuffled = product_of_experts(mus[list(order)], logvars[list(order)])
        torch.testing.assert_close(product_of_experts(mus, logvars), shuffled, rtol=1e-5, atol=1e-6)

    def test_one_expert_is_itself(self) -> None:
        _, _, mus, logvars, _ = random_gaussians(1, 6, 4, dtype=torch.float32)
        mu, logvar = product_of_experts(mus, logvars)
        assert torch.equal(mu, mus[0])
        assert torch.equal(logvar, logvars[0])

    def test_no_expert_is_the_prior(self) -> None:
        mu, logvar = product_of_experts(torch.zeros(0, 3, 2), torch.zeros(0, 3, 2))
        assert torch.equal(mu, torch.zeros(3, 2))
        assert torch.equal(logvar, torch.zeros(3, 2))

    def test_an_uninformative_expert_changes_nothing(self) -> None:
        _, _, mus, logvars, _ = random_gaussians(2, 6, 4, dtype=torch.float32)
        vague = product_of_experts(torch.cat([mus, 9 - mus]), torch.cat([logvars, torch.full_like(logvars, 200)]))
        for value, expected in zip(vague, product_of_experts(mus, logvars), strict=True):
            assert torch.equal(value, expected)

    @pytest.mark.parametrize("level", [-89.0, -40.0, 0.0, 60.0, 100.0])
    def test_extreme_log_variances(self, level: float) -> None:
        """The naive 1 / exp(logvar) overflows or divides by zero there."""
        _, _, mus, logvars, _ = random_gaussians(3, 8, 5, dtype=torch.float32)
        logvars = logvars + level
        expected = self.by_precisions(mus, logvars)
        mu, logvar = product_of_experts(mus, logvars)
        torch.testing.assert_close(mu.double(), expected[0], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(logvar.double(), expected[1], rtol=1e-6, atol=1e-6)

    def test_16_bit_inputs_are_computed_in_float32(self) -> None:
        _, _, mus, logvars, _ = random_gaussians(3, 8, 5, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            mu, logvar = product_of_experts(mus, logvars)
        assert mu.dtype == logvar.dtype == torch.float32
        expected = self.by_precisions(mus, logvars)
        torch.testing.assert_close((mu.double(), logvar.double()), expected, rtol=1e-5, atol=1e-6)

"""The model against the reference implementation's numbers (MultiVae's JMVAE).

The reference computed in float32, so its own numbers carry rounding errors of about 1e-7 relative to the
largest intermediate value. Values are compared within 1e-5 relative; the absolute tolerances below are for
elements that are small only because larger numbers cancelled. The comparison runs in float32 and in float64:
an error of our formulas would show in both.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from oracle_cases import FOLDER, NAMES, Case, load_case
from torch import Tensor

from jmvae_dist.kernels.gaussian import gaussian_kl_terms, product_of_experts
from jmvae_dist.model.likelihoods import build_likelihood

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
CASES = pytest.mark.parametrize("name", NAMES)


def assert_matches(actual: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-5, atol=atol)


def annealing(case: Case, epoch: int) -> float:
    warmup = case.model.config.warmup
    return 1.0 if epoch >= warmup else epoch / warmup


@CASES
@DTYPES
def test_loss_of_every_epoch(name: str, dtype: torch.dtype) -> None:
    case = load_case(name, dtype)
    for row in case.scalars["forward"]:
        assert annealing(case, row["epoch"]) == pytest.approx(row["beta"])
        out = case.model(case.inputs, annealing=row["beta"], noise=case.arrays["fwd/eps"])
        assert out.loss.item() == pytest.approx(row["loss"], rel=1e-5)
        assert out.loss_sum.item() == pytest.approx(row["loss_sum"], rel=1e-5)
        assert out.metrics["loss/total"].item() == pytest.approx(row["loss_sum"], rel=1e-5)
        without_annealing = (
            out.metrics["loss/reconstruction"]
            + case.model.config.beta * out.metrics["loss/kl_prior"]
            + case.model.config.alpha * out.metrics["loss/kl_unimodal"]
        )
        assert without_annealing.item() == pytest.approx(row["loss_no_ponderation"], rel=1e-5)


@CASES
@DTYPES
def test_every_term(name: str, dtype: torch.dtype) -> None:
    case = load_case(name, dtype)
    arrays, modalities = case.arrays, case.model.modalities
    assert case.model.rescale_factors == pytest.approx(case.scalars["rescale_factors_used"])
    out = case.model(case.inputs, noise=arrays["fwd/eps"])
    assert_matches(out.z, arrays["fwd/z"])
    assert_matches(out.mu, arrays["q/joint/mu"])
    assert_matches(out.logvar, arrays["q/joint/logvar"])
    for m in modalities:
        factor = case.scalars["rescale_factors_used"][m]
        assert_matches(out.metrics[f"loss/reconstruction/{m}"], (-factor * arrays[f"fwd/logpx/{m}"].sum()).float())
        assert_matches(out.metrics[f"loss/kl_unimodal/{m}"], arrays[f"kl_joint_to/{m}"].sum().float())
    assert_matches(out.metrics["loss/kl_prior"], arrays["kl_joint_to/prior"].sum().float())
    log_likelihood = sum(arrays[f"fwd/logpx/{m}"].sum() for m in modalities)
    assert_matches(out.metrics["elbo"], (log_likelihood - arrays["kl_joint_to/prior"].sum()).float())
    for m in modalities:
        single = case.model.compute_cond_nll(case.inputs, "all", m, K=1, noise=lambda draws: arrays["fwd/eps"][None])
        assert_matches(single[m], -arrays[f"fwd/logpx/{m}"])


@CASES
@DTYPES
def test_gradient_of_every_parameter(name: str, dtype: torch.dtype) -> None:
    case = load_case(name, dtype)
    last = case.scalars["forward"][-1]
    case.model(case.inputs, annealing=last["beta"], noise=case.arrays["fwd/eps"]).loss.backward()
    parameters = dict(case.model.named_parameters())
    gradients = {key[2:]: value for key, value in case.arrays.items() if key.startswith("g/")}
    without_gradient = set(parameters) - set(gradients)
    assert without_gradient == set(last["params_without_grad"])
    for key, expected in gradients.items():
        gradient = parameters[key].grad
        assert gradient is not None
        # Elements are sums over the batch; those that nearly cancel carry the error of the larger ones.
        assert_matches(gradient, expected, atol=1e-6 * max(1.0, expected.abs().max().item()))
    squares = sum(parameter.grad.double().square().sum() for parameter in parameters.values())
    assert squares.sqrt().item() == pytest.approx(last["grad_norm"], rel=1e-5)


@CASES
@DTYPES
def test_posteriors_of_all_subsets(name: str, dtype: torch.dtype) -> None:
    case = load_case(name, dtype)
    model, arrays = case.model, case.arrays
    for size in range(1, len(model.modalities)):
        for subset in combinations(model.modalities, size):
            key = "+".join(subset)
            # In reverse: the order of the names must not matter.
            latent = model.encode(case.inputs, list(reversed(subset)), return_mean=True)
            assert_matches(latent.mu, arrays[f"q/{key}/mu"])
            assert_matches(latent.logvar, arrays[f"q/{key}/logvar"])
            assert_matches(latent.z[0], arrays[f"encode_mean/{key}"])
    for everything in ("all", list(reversed(model.modalities))):
        latent = model.encode(case.inputs, everything, return_mean=True)
        assert_matches(latent.z[0], arrays["encode_mean/all"])
    mus, logvars = (torch.stack([arrays[f"q/{m}/{part}"] for m in model.modalities]) for part in ("mu", "logvar"))
    mu, logvar = product_of_experts(mus, logvars)
    assert_matches(mu, arrays["q/poe_all_experts/mu"])
    assert_matches(logvar, arrays["q/poe_all_experts/logvar"])


@CASES
@DTYPES
def test_decoded_means(name: str, dtype: torch.dtype) -> None:
    case = load_case(name, dtype)
    predicted = case.model.predict(case.inputs, return_mean=True)
    for m in case.model.modalities:
        assert_matches(predicted[m][0], case.arrays[f"decode_of_joint_mean/{m}"])


@CASES
@DTYPES
def test_joint_nll_at_the_stored_latents(name: str, dtype: torch.dtype) -> None:
    case = load_case(name, dtype)
    latent = case.model.encode(case.inputs)
    z = case.arrays["nll/z_K256"]
    noise = (z - latent.mu) / (0.5 * latent.logvar).exp()
    for batch_size_K in (256, 100, 1):
        nll = case.model.compute_joint_nll(
            case.inputs, 256, batch_size_K, noise=lambda draws: noise[draws.start : draws.stop]
        )
        expected = case.scalars["joint_nll_sum_over_batch_K256_seed9"]
        assert nll.shape == (6,)
        assert nll.sum().item() == pytest.approx(expected, rel=1e-5)


@CASES
def test_monte_carlo_estimates_agree(name: str) -> None:
    """The reference drew other latents here, so the tolerance is a Monte Carlo error."""
    case = load_case(name)
    generator = torch.Generator().manual_seed(0)
    nll = case.model.compute_joint_nll(case.inputs, K=4000, batch_size_K=1000, generator=generator)
    expected = torch.tensor(case.scalars["joint_nll_per_sample_K4000_seed100plus_i"])
    torch.testing.assert_close(nll, expected, rtol=0.01, atol=0)
    for key, row in case.scalars.items():
        if key.startswith("cond_nll_mean_over_batch_K200_seed11_from_"):
            given = key.removeprefix("cond_nll_mean_over_batch_K200_seed11_from_").split("+")
            for target, value in row.items():
                estimate = case.model.compute_cond_nll(case.inputs, given, target, generator=generator)[target]
                assert estimate.mean().item() == pytest.approx(value, rel=0.03)


def test_single_functions() -> None:
    with np.load(FOLDER / "functions.npz", allow_pickle=False) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    mus, logvars = arrays["poe/mus"], arrays["poe/logvars"]
    mu, logvar = product_of_experts(mus, logvars)
    assert_matches(mu, arrays["poe/stable_mu"])
    assert_matches(logvar, arrays["poe/stable_logvar"])
    _, _, kl = gaussian_kl_terms(mus[0], logvars[0], mus[1:2], logvars[1:2], torch.zeros_like(mus[0]))
    assert_matches(kl[0], arrays["kl/values"])

    decoded = arrays["lp/recon"]
    targets = {"bernoulli": arrays["lp/target_bin"], "categorical": arrays["lp/target_onehot"]}
    for key in (key for key in arrays if key.startswith("lp/") and f"{key[3:]}" not in ("recon",)):
        if key.startswith("lp/target"):
            continue
        distribution, _, scale = key.removeprefix("lp/").partition("_")
        likelihood = build_likelihood(distribution, {"scale": float(scale)} if scale else {})
        values = likelihood.log_prob_per_element(decoded, targets.get(distribution, arrays["lp/target_real"]))
        assert_matches(values, arrays[key])

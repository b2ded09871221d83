"""The whole objective against a float64 formula by torch.distributions, for many combinations of options."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Laplace, Normal, OneHotCategorical, kl_divergence

from jmvae_dist.model import JMVAE
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig

SHAPES = {"image": (1, 4, 5), "word": (7,), "sound": (3, 2)}
SMALL = NetworksConfig([16], [16], [16], activation="tanh")


def make_inputs(distributions: dict[str, str], batch_size: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for name, shape in SHAPES.items():
        x = torch.randn(batch_size, *shape, generator=generator)
        if distributions.get(name) == "bernoulli":
            x = (x > 0).float()
        if distributions.get(name) == "categorical":
            x = torch.nn.functional.one_hot(x.argmax(-1), shape[-1]).float()
        inputs[name] = x
    return inputs


def make_model(**options: Any) -> JMVAE:
    torch.manual_seed(0)
    return JMVAE(JMVAEConfig(3, 5, dict(SHAPES), **options), networks=SMALL)


def formula(model: JMVAE, inputs: dict[str, Tensor], annealing: float, noise: Tensor) -> dict[str, Tensor]:
    """All metrics from torch.distributions in float64."""
    config, modalities = model.config, list(SHAPES)
    joint = model.joint_encoder({m: inputs[m] for m in modalities})
    q = Normal(joint.mu, (joint.logvar / 2).exp())
    z = q.mean + q.stddev * noise
    total: dict[str, Tensor] = {}
    log_likelihood = torch.zeros((), dtype=torch.float64)
    sizes = {m: prod(SHAPES[m]) for m in modalities}
    for m in modalities:
        decoded = model.decoders[m](z)
        scale = (config.decoder_dist_params or {}).get(m, {}).get("scale", 1.0)
        p = {
            "normal": lambda d, s: Normal(d, s),
            "laplace": lambda d, s: Laplace(d, s),
            "bernoulli": lambda d, s: Bernoulli(logits=d),
            "categorical": lambda d, s: OneHotCategorical(logits=d),
        }[(config.decoders_dist or {}).get(m, "normal")](decoded, scale)
        value = p.log_prob(inputs[m]).sum()
        factor = 1.0
        if config.uses_likelihood_rescaling:
            factor = (config.rescale_factors or {k: max(sizes.values()) / sizes[k] for k in sizes})[m]
        total[f"loss/reconstruction/{m}"] = -factor * value
        log_likelihood = log_likelihood + value
        unimodal = model.encoders[m](inputs[m])
        total[f"loss/kl_unimodal/{m}"] = kl_divergence(q, Normal(unimodal.mu, (unimodal.logvar / 2).exp())).sum()
    total["loss/kl_prior"] = kl_divergence(q, Normal(torch.zeros_like(z), torch.ones_like(z))).sum()
    for part in ("loss/reconstruction", "loss/kl_unimodal"):
        total[part] = torch.stack([total[f"{part}/{m}"] for m in modalities]).sum()
    total["elbo"] = log_likelihood - total["loss/kl_prior"]
    total["loss/total"] = total["loss/reconstruction"] + annealing * (
        config.beta * total["loss/kl_prior"] + config.alpha * total["loss/kl_unimodal"]
    )
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("options", "annealing"),
    [
        ({}, 1.0),
        ({"alpha": 0.0, "beta": 0.0}, 1.0),
        ({"alpha": 2.5, "beta": 0.3}, 0.37),
        ({"decoders_dist": {"image": "bernoulli", "word": "categorical", "sound": "laplace"}}, 0.5),
        (
            {
                "decoders_dist": {"image": "laplace", "word": "normal", "sound": "categorical"},
                "decoder_dist_params": {"image": {"scale": 0.1}, "word": {"scale": 0.75}},
            },
            0.0,
        ),
        ({"uses_likelihood_rescaling": True}, 1.0),
        (
            {
                "uses_likelihood_rescaling": True,
                "rescale_factors": {"image": 0.5, "sound": 3.0, "word": 20.0},
                "decoders_dist": {"word": "categorical", "image": "bernoulli", "sound": "normal"},
            },
            0.9,
        ),
    ],
)
def test_metrics_and_gradients_follow_the_formula(options: dict, annealing: float, dtype: torch.dtype) -> None:
    model = make_model(**options).to(dtype)
    inputs = make_inputs(options.get("decoders_dist", {}), 9)
    noise = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = model({m: x.to(dtype) for m, x in inputs.items()}, annealing, noise.to(dtype))
    out.loss.backward()
    gradients = [parameter.grad.double() for parameter in model.parameters()]

    exact_model = model.double()
    exact_model.zero_grad()
    expected = formula(exact_model, {m: x.double() for m, x in inputs.items()}, annealing, noise)
    (expected["loss/total"] / 9).backward()
    assert set(out.metrics) == set(expected)
    for key, value in out.metrics.items():
        assert value.dtype == torch.float32
        assert value.shape == ()
        assert not value.requires_grad
        assert value.item() == pytest.approx(expected[key].item(), rel=2e-6, abs=1e-6)
    assert out.loss.item() == pytest.approx(expected["loss/total"].item() / 9, rel=2e-6)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for gradient, parameter in zip(gradients, exact_model.parameters(), strict=True):
        error = (gradient - parameter.grad).norm()
        assert error <= tolerance * max(1.0, parameter.grad.norm().item())


def test_parts_add_up() -> None:
    model = make_model(uses_likelihood_rescaling=True)
    metrics = model(make_inputs({}, 4)).metrics
    for part in ("loss/reconstruction", "loss/kl_unimodal"):
        total = sum(metrics[f"{part}/{m}"] for m in SHAPES)
        torch.testing.assert_close(metrics[part], total)


def test_sums_over_micro_batches_equal_the_batch() -> None:
    """What the training loop relies on: metrics, losses and gradients of parts add up to those of the whole."""
    model, inputs = make_model(), make_inputs({}, 10)
    noise = torch.randn(10, 5, generator=torch.Generator().manual_seed(1))
    whole = model(inputs, 0.5, noise)
    whole.loss_sum.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    metrics = dict.fromkeys(whole.metrics, 0.0)
    for rows in (slice(0, 3), slice(3, 3), slice(3, 10)):
        part = model({m: x[rows] for m, x in inputs.items()}, 0.5, noise[rows])
        part.loss_sum.backward()
        metrics = {key: metrics[key] + value for key, value in part.metrics.items()}
    for key, value in whole.metrics.items():
        torch.testing.assert_close(metrics[key], value, rtol=1e-5, atol=1e-5)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def test_empty_batch_gives_zero_loss_and_zero_gradients() -> None:
    """A rank whose share of a global batch is empty still takes part in the gradient exchange."""
    model = make_model()
    out = model(make_inputs({}, 0))
    out.loss_sum.backward()
    assert out.loss.item() == out.loss_sum.item() == 0
    assert all(value.item() == 0 for value in out.metrics.values())
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("options", [{}, {"alpha": 0.0}, {"beta": 0.0}])
@pytest.mark.parametrize("annealing", [0.0, 1.0])
def test_every_parameter_has_a_gradient(options: dict, annealing: float) -> None:
    """Otherwise DDP waits for gradients that never come; also with terms of weight 0."""
    model = make_model(**options)
    model(make_inputs({}, 4), annealing).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("distribution", ["bernoulli", "categorical", "laplace", "normal"])
def test_sums_are_float32_under_bfloat16_autocast(distribution: str) -> None:
    """Only the networks compute in bfloat16: with their outputs given, the loss must be float32-exact."""
    distributions = {"image": "bernoulli", "word": distribution, "sound": "normal"}
    model, inputs = make_model(decoders_dist=distributions), make_inputs(distributions, 64)
    noise = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        is_network = name.count(".") == 1 and name.startswith(("encoders", "decoders"))
        if is_network or name == "joint_encoder":
            module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(inputs, 1.0, noise)
    assert seen["decoders.word"].dtype == torch.bfloat16
    assert {out.loss.dtype, out.mu.dtype, out.logvar.dtype, out.z.dtype} == {torch.float32}
    out.loss.backward()

    class Recorded(torch.nn.Module):
        def __init__(self, output: Any) -> None:
            super().__init__()
            self.output = output

        def forward(self, _: Any) -> Any:
            if isinstance(self.output, tuple):
                return type(self.output)(*[tensor.detach().double() for tensor in self.output])
            return self.output.detach().double()

    replay = JMVAE(
        model.config.__class__(3, 5, dict(SHAPES), decoders_dist=distributions),
        {m: Recorded(seen[f"encoders.{m}"]) for m in SHAPES},
        {m: Recorded(seen[f"decoders.{m}"]) for m in SHAPES},
        Recorded(seen["joint_encoder"]),
    )
    exact = replay({m: x.double() for m, x in inputs.items()}, 1.0, noise.double())
    for key, value in out.metrics.items():
        assert value.item() == pytest.approx(exact.metrics[key].item(), rel=1e-6), key


def test_log_variances_are_limited_and_recover() -> None:
    """Encoders that run away give finite losses, and gradients that lead back."""
    model = make_model()
    with torch.no_grad():
        for name in SHAPES:
            model.encoders[name].heads.bias[5:] = -500.0
        model.joint_encoder.heads.bias[5:] = 500.0
    out = model(make_inputs({}, 8))
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert (out.logvar == 20).all()
    assert all(torch.isfinite(parameter.grad.square()).all() for parameter in model.parameters())
    # Descent lowers the joint log-variance and raises the unimodal ones.
    assert (model.joint_encoder.heads.bias.grad[5:] > 0).all()
    assert all((model.encoders[name].heads.bias.grad[5:] < 0).all() for name in SHAPES)


def test_log_variance_gradient_never_leads_further_out() -> None:
    model = make_model(alpha=0.0)
    with torch.no_grad():
        model.joint_encoder.heads.bias[5:] = -500.0
    # With annealing 0 only the reconstruction acts; a zero noise leaves log-variances without gradient at
    # all.
    out = model(make_inputs({}, 8), annealing=0.0, noise=torch.zeros(8, 5))
    out.loss.backward()
    assert (model.joint_encoder.heads.bias.grad[5:] == 0).all()
    logvar = torch.tensor([-30.0, -30.0, 0.0, 30.0, 30.0], requires_grad=True)
    from jmvae_dist.model.network_calls import _RecoverableClamp

    _RecoverableClamp.apply(logvar).backward(torch.tensor([1.0, -1.0, 3.0, 1.0, -1.0]))
    assert logvar.grad is not None
    assert logvar.grad.tolist() == [0.0, -1.0, 3.0, 1.0, 0.0]


def test_forward_draws_fresh_noise_from_torchs_generator() -> None:
    model, inputs = make_model(), make_inputs({}, 4)
    torch.manual_seed(3)
    first, second = model(inputs), model(inputs)
    torch.manual_seed(3)
    again = model(inputs)
    assert torch.equal(first.z, again.z)
    assert not torch.equal(first.z, second.z)

"""Evaluation: sums against the model's own methods, independence of batches, ranks and order, reports."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jmvae_dist.errors import DataError
from jmvae_dist.evaluation import evaluate_batches, evaluation_mode, results_of, standard_metrics
from jmvae_dist.evaluation.metrics import Metric, load_vector, vector_of
from jmvae_dist.kernels.noise import Stream, normal_noise
from jmvae_dist.model import JMVAE
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig

SHAPES = {"image": (1, 4, 4), "word": (5,), "tags": (2, 3), "sound": (6,)}
DISTRIBUTIONS = {"image": "bernoulli", "word": "categorical", "tags": "categorical", "sound": "normal"}
NUM_SAMPLES = 23


@dataclass
class Batch:
    inputs: dict[str, Tensor]
    rows: Tensor


def make_model(**options: object) -> JMVAE:
    torch.manual_seed(0)
    config = JMVAEConfig(4, 3, dict(SHAPES), decoders_dist=DISTRIBUTIONS, **options)
    return JMVAE(config, networks=NetworksConfig([16], [16], [16]))


def one_hot(scores: Tensor) -> Tensor:
    return nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).float()


def make_data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    data = {name: torch.randn(NUM_SAMPLES, *shape, generator=generator) for name, shape in SHAPES.items()}
    return {
        "image": (data["image"] > 0).float(),
        "word": one_hot(data["word"]),
        "tags": one_hot(data["tags"]),
        "sound": data["sound"],
    }


def make_batches(order: Tensor, batch_size: int) -> list[Batch]:
    data = make_data()
    return [Batch({name: x[rows] for name, x in data.items()}, rows) for rows in order.split(batch_size)]


EVERYTHING = torch.arange(NUM_SAMPLES)


def evaluate(model: JMVAE, batches: list[Batch], num_samples: int = 7, seed: int = 5) -> list[Metric]:
    metrics = standard_metrics(model, seed=seed, joint_nll_samples=num_samples)
    evaluate_batches(model, batches, metrics)
    return metrics


def vector(*arguments: Any, **options: Any) -> Tensor:
    return vector_of(evaluate(*arguments, **options))


def test_results_do_not_depend_on_batches_ranks_or_order() -> None:
    model = make_model()
    expected = vector(model, make_batches(EVERYTHING, NUM_SAMPLES))
    shuffled = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(0))
    for order, batch_size in ((EVERYTHING, 1), (EVERYTHING, 8), (shuffled, 5)):
        torch.testing.assert_close(vector(model, make_batches(order, batch_size)), expected, rtol=1e-5, atol=1e-5)
    ranks = [EVERYTHING[:9], EVERYTHING[9:9], EVERYTHING[9:]]
    parts = [evaluate(model, make_batches(rows, 4) if len(rows) else []) for rows in ranks]
    total = torch.stack([vector_of(part) for part in parts]).sum(0)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    load_vector(parts[0], total)
    load_vector(parts[1], expected)
    assert results_of(parts[0]) == pytest.approx(results_of(parts[1]), rel=1e-5, abs=1e-6)
    other_seed = results_of(evaluate(model, make_batches(EVERYTHING, 8), seed=6))
    assert other_seed["elbo"] != pytest.approx(results_of(parts[0])["elbo"])


@pytest.mark.parametrize("num_samples", [0, 3])
def test_ranks_without_samples_have_the_same_keys(num_samples: int) -> None:
    model = make_model()
    sums = [
        {key: value for metric in evaluate(model, batches, num_samples) for key, value in metric.sums.items()}
        for batches in (make_batches(EVERYTHING, 8), [], make_batches(EVERYTHING[:0], 8))
    ]
    assert list(sums[0]) == list(sums[1]) == list(sums[2])
    assert not any(value.any() for empty in sums[1:] for value in empty.values())
    assert all(value.dtype == torch.float64 for value in sums[0].values())
    assert ("joint_nll" in sums[0]) == (num_samples > 0)


def test_numbers_are_those_of_the_model() -> None:
    model, data = make_model(uses_likelihood_rescaling=True).eval(), make_data()
    results = results_of(evaluate(model, make_batches(EVERYTHING, 10)))
    noise = normal_noise(5, 0, EVERYTHING, 3, Stream.EVALUATION_LATENT)
    out = model(data, noise=noise)
    for key, value in out.metrics.items():
        assert results[key] == pytest.approx(value.item() / NUM_SAMPLES, rel=1e-5)
    log_likelihoods = model.compute_cond_nll(data, "all", "all", K=1, noise=lambda draws: noise[None])
    for name, nll in log_likelihoods.items():
        assert results[f"log_likelihood/{name}"] == pytest.approx(-nll.mean().item(), rel=1e-5)
    elbo = sum(results[f"log_likelihood/{name}"] for name in SHAPES) - results["loss/kl_prior"]
    assert results["elbo"] == pytest.approx(elbo, rel=1e-5)

    draws = torch.stack([normal_noise(5, draw, EVERYTHING, 3, Stream.IMPORTANCE) for draw in range(7)])
    for key, names in (("joint_nll", "all"), *((f"marginal_nll/{name}", name) for name in SHAPES)):
        nll = model.compute_joint_nll(data, 7, 7, modalities=names, noise=lambda k: draws[k.start : k.stop])
        assert results[key] == pytest.approx(nll.mean().item(), rel=1e-5)
        quantity, slash, name = key.partition("/")
        stderr = nll.double().std(correction=1).item() / NUM_SAMPLES**0.5
        assert results[f"{quantity}_stderr{slash}{name}"] == pytest.approx(stderr, rel=1e-4)
    assert results["samples"] == NUM_SAMPLES


def test_coherence_counts_right_predictions() -> None:
    model, data = make_model().eval(), make_data()
    results = results_of(evaluate(model, make_batches(EVERYTHING, 10), 0))
    sources = {name: [name] for name in SHAPES} | {"others": None}
    for target in ("word", "tags"):
        for label, names in sources.items():
            if label == target:
                continue
            given = names or [name for name in SHAPES if name != target]
            predicted = model.predict(data, given, target, return_mean=True)[target][0].argmax(-1)
            accuracy = (predicted == data[target].argmax(-1)).float().mean().item()
            assert results[f"accuracy/{target}/from_{label}"] == pytest.approx(accuracy)
    assert {key for key in results if key.startswith("accuracy")} == {
        *(f"accuracy/word/from_{name}" for name in ("image", "tags", "sound", "others")),
        *(f"accuracy/tags/from_{name}" for name in ("image", "word", "sound", "others")),
    }


def test_two_modalities_have_no_others_and_uncategorical_ones_no_accuracy() -> None:
    shapes = {"a": (4,), "b": (3,)}
    batch = Batch({"a": torch.zeros(2, 4), "b": torch.eye(3)[:2]}, torch.arange(2))
    for distribution, expected in (("categorical", {"accuracy/b/from_a"}), ("normal", set())):
        config = JMVAEConfig(2, 3, shapes, decoders_dist={"a": "normal", "b": distribution})
        results = results_of(evaluate(JMVAE(config, networks=NetworksConfig([8], [8], [8])), [batch], 0))
        assert {key for key in results if key.startswith("accuracy")} == expected


def test_joint_nll_is_at_most_the_negative_elbo() -> None:
    """Importance sampling tightens the bound (Burda et al. 2016); checked on average over many draws."""
    results = results_of(evaluate(make_model(), make_batches(EVERYTHING, 8), 500))
    assert results["joint_nll"] < -results["elbo"]


def test_model_is_evaluated_in_evaluation_mode_and_gets_its_modes_back() -> None:
    model = make_model()
    model.decoders["image"] = nn.Sequential(nn.Dropout(0.5), model.decoders["image"])
    model.train()
    model.encoders.eval()
    modes = [module.training for module in model.modules()]
    first, second = (vector(model, make_batches(EVERYTHING, 8)) for _ in range(2))
    assert torch.equal(first, second)
    assert [module.training for module in model.modules()] == modes
    with contextlib.suppress(RuntimeError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("an evaluation that fails")
    assert [module.training for module in model.modules()] == modes


def test_precision_is_that_of_the_weights_under_autocast() -> None:
    model, batches = make_model(), make_batches(EVERYTHING, 8)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = vector(model, batches)
    assert torch.equal(under_autocast, vector(model, batches))


def test_progress_and_json() -> None:
    seen: list[int] = []
    model = make_model()
    metrics = standard_metrics(model, seed=0, joint_nll_samples=2)
    evaluate_batches(model, make_batches(EVERYTHING, 10), metrics, progress=seen.append)
    assert seen == [10, 10, 3]
    assert json.loads(json.dumps(results_of(metrics), allow_nan=False))["samples"] == NUM_SAMPLES
    single = results_of(evaluate(make_model(), make_batches(EVERYTHING[:1], 1)))
    assert "joint_nll" in single
    assert "joint_nll_stderr" not in single


def test_a_model_that_is_not_finite_has_no_finite_error() -> None:
    model = make_model()
    with torch.no_grad():
        for parameter in model.decoders["image"].parameters():
            parameter.fill_(torch.nan)
    results = results_of(evaluate(model, make_batches(EVERYTHING, 8)))
    for key in ("elbo", "joint_nll", "joint_nll_stderr", "marginal_nll/image", "marginal_nll_stderr/image"):
        assert math.isnan(results[key]), key
    assert results["marginal_nll_stderr/sound"] > 0


def test_errors() -> None:
    model = make_model()
    with pytest.raises(DataError, match="no samples"):
        results_of(evaluate(model, []))
    batch = make_batches(EVERYTHING, 8)[0]
    batch.inputs["sound"][3] = torch.nan
    with pytest.raises(DataError, match=r"inputs\.sound: sample 3"):
        evaluate(model, [batch])

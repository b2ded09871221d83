"""The suite's metrics against brute force and independent formulas, and its classifiers, probes and table."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jmvae_dist.commands import evaluate as command
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.views import View, make_views
from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.errors import ConfigError, is_on_all_ranks
from jmvae_dist.evaluation import evaluate_batches, evaluate_prior, results_of
from jmvae_dist.evaluation.classifier import (
    Classifier,
    describe,
    file_of,
    load_classifier,
    make_classifier,
    save_classifier,
    train_classifier,
)
from jmvae_dist.evaluation.coherence import Accuracy, Coherence, most_probable
from jmvae_dist.evaluation.evaluate import details_of
from jmvae_dist.evaluation.frechet import FrechetDistance, frechet_distance
from jmvae_dist.evaluation.latents import Latents
from jmvae_dist.evaluation.likelihood import (
    ImportanceSampling,
    companion_key,
    conditional_estimands,
    joint_estimand,
)
from jmvae_dist.evaluation.metrics import EvaluationBatch, Metric
from jmvae_dist.evaluation.posteriors import Posteriors, expected_value, subsets_of
from jmvae_dist.evaluation.probe import Probe, ProbeAccuracy, fit_probe
from jmvae_dist.evaluation.reconstruction import Reconstruction, is_picture, shows_picture, structural_similarity
from jmvae_dist.evaluation.runner import evaluate_together
from jmvae_dist.evaluation.suite import run_suite
from jmvae_dist.evaluation.suite_setup import (
    SuiteData,
    SuiteNetworks,
    SuiteOptions,
    check_networks,
    find_label,
    unsupported,
)
from jmvae_dist.evaluation.table import format_results
from jmvae_dist.evaluation.user_networks import build_user_network, parse_user_networks
from jmvae_dist.kernels.noise import Stream, normal_noise
from jmvae_dist.model import JMVAE
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig

SHAPES = {"image": (1, 6, 7), "label": (4,), "sound": (5,)}
DISTRIBUTIONS = {"image": "bernoulli", "label": "categorical", "sound": "normal"}
NUM_SAMPLES = 30
DIAGNOSED = {"joint_nll_monte_carlo_stderr", "marginal_nll_effective_samples", "conditional_nll_unreliable_fraction"}


@pytest.fixture(scope="module")
def model() -> JMVAE:
    torch.manual_seed(0)
    config = JMVAEConfig(3, 3, dict(SHAPES), decoders_dist=DISTRIBUTIONS)
    return JMVAE(config, networks=NetworksConfig([16], [16], [16])).eval()


@pytest.fixture(scope="module")
def batch(model: JMVAE) -> EvaluationBatch:
    generator = torch.Generator().manual_seed(1)
    classes = torch.randint(4, (NUM_SAMPLES,), generator=generator)
    inputs = {
        "image": torch.rand(NUM_SAMPLES, 1, 6, 7, generator=generator).round(),
        "label": torch.eye(4)[classes],
        "sound": torch.randn(NUM_SAMPLES, 5, generator=generator) + classes[:, None],
    }
    return EvaluationBatch(inputs, torch.arange(NUM_SAMPLES), Posteriors(model, inputs), classes)


def run(model: JMVAE, batch: EvaluationBatch, *metrics: Metric) -> dict[str, float]:
    evaluate_batches(model, [batch], metrics, label="label")
    evaluate_prior(model, range(20), metrics, seed=4, batch_size=8)
    return results_of(metrics)


def test_posteriors_are_those_of_encode(model: JMVAE, batch: EvaluationBatch) -> None:
    subsets = subsets_of(model.modalities)
    assert len(subsets) == 7
    assert subsets_of(model.modalities, 1) == [("image",), ("label",), ("sound",)]
    for subset in subsets:
        expected = model.encode(batch.inputs, subset)
        torch.testing.assert_close(batch.posteriors.given(reversed(subset)), (expected.mu, expected.logvar))


def test_accuracy_of_texts_leaves_padding_out() -> None:
    """Of a model that always writes two tokens and padding: of three tokens it has one right, of all places most."""
    torch.manual_seed(0)
    shapes = {"x": (2,), "text": (6, 4), "state": (6, 4)}
    config = JMVAEConfig(3, 2, shapes, decoders_dist={"x": "normal", "text": "categorical", "state": "categorical"})
    model = JMVAE(config, networks=NetworksConfig([4], [4], [4])).eval()
    written = torch.eye(4)[[0, 1, 3, 3, 3, 3]]
    truth = torch.eye(4)[torch.tensor([[0, 2, 3, 3, 3, 3], [2, 3, 3, 3, 3, 3], [3, 3, 3, 3, 3, 3]])]
    model.decode = lambda z, names: {names: written.expand(len(z), 6, 4)}  # type: ignore[assignment, method-assign]
    inputs = {"x": torch.zeros(3, 2), "text": truth, "state": truth}
    batches = [
        EvaluationBatch({name: values[rows] for name, values in inputs.items()}, rows, Posteriors(model, inputs))
        for rows in (torch.tensor([0]), torch.tensor([1, 2]))
    ]
    metric = Accuracy(model, {"text": 3})
    evaluate_batches(model, batches, [metric])
    results = metric.results()
    assert results["accuracy/text/from_x"] == pytest.approx(1 / 3)
    # What is no text has no padding, whatever its categories mean.
    assert results["accuracy/state/from_x"] == pytest.approx((5 + 4 + 4) / 18)
    empty = {name: values[2:] for name, values in inputs.items()}
    metric = Accuracy(model, {"text": 3})
    evaluate_batches(model, [EvaluationBatch(empty, torch.arange(1), Posteriors(model, empty))], [metric])
    assert math.isnan(metric.results()["accuracy/text/from_x"])


def test_coherence_counts_recognised_classes(model: JMVAE, batch: EvaluationBatch) -> None:
    classifiers = {"image": nn.Sequential(nn.Flatten(), nn.Linear(42, 4)), "sound": nn.Linear(5, 4)}
    results = run(model, batch, Coherence(model, classifiers, label="label", seed=9))
    noise = normal_noise(9, 0, batch.rows, 3, Stream.CONDITIONAL)
    judges = {**classifiers, "label": nn.Identity()}
    by_size: dict[int, list[float]] = {1: [], 2: []}
    for target in SHAPES:
        others = [name for name in SHAPES if name != target]
        for subset in [(others[0],), (others[1],), tuple(others)]:
            z = model.encode(batch.inputs, subset, noise=noise[None], flatten=True).z
            found = judges[target](expected_value(model, z, target)).argmax(-1)
            accuracy = (found == batch.labels).double().mean().item()
            assert results[f"coherence/{target}/from_{'+'.join(subset)}"] == pytest.approx(accuracy)
            by_size[len(subset)].append(accuracy)
    for size, values in by_size.items():
        assert results[f"coherence_by_size/{size}"] == pytest.approx(np.mean(values))
    z = normal_noise(4, 0, torch.arange(20), 3, Stream.PRIOR)
    classes = [judges[name](expected_value(model, z, name)).argmax(-1).tolist() for name in SHAPES]
    assert results["coherence/joint"] == np.mean([len(set(row)) == 1 for row in zip(*classes, strict=True)])
    own = (classifiers["sound"](batch.inputs["sound"]).argmax(-1) == batch.labels).double().mean().item()
    assert results["classifier_accuracy/sound"] == pytest.approx(own)


def test_latents_against_loops(model: JMVAE, batch: EvaluationBatch) -> None:
    metric = Latents(model)
    results, details = run(model, batch, metric), details_of([metric])
    for suffix, given in (("", "all"), ("/sound", "sound")):
        posterior = model.encode(batch.inputs, given)
        q = torch.distributions.Normal(posterior.mu.double(), (0.5 * posterior.logvar.double()).exp())
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(torch.zeros(3).double(), 1.0))
        assert details[f"latent/kl_per_dimension{suffix}"] == pytest.approx(kl.mean(0).tolist(), rel=1e-4)
        assert results[f"latent/kl_prior{suffix}"] == pytest.approx(kl.sum(1).mean().item(), rel=1e-4)
        variance = posterior.mu.double().var(0, correction=0)
        assert details[f"latent/variance_of_mean{suffix}"] == pytest.approx(variance.tolist(), rel=1e-5)
        assert results[f"latent/active_units{suffix}"] == (variance > 0.01).sum()
        assert results[f"posterior_collapse{suffix}"] == ((kl < 0.01).double().mean(0) >= 0.99).double().mean()


def test_a_collapsed_latent_is_called_so(model: JMVAE, batch: EvaluationBatch) -> None:
    class Prior(nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            zeros = torch.zeros(len(inputs["label"]), 3)
            return zeros + 0.001, zeros

    config = JMVAEConfig(3, 3, dict(SHAPES), decoders_dist=DISTRIBUTIONS)
    collapsed = JMVAE(config, joint_encoder=Prior(), networks=NetworksConfig([8], [8], [8]))
    results = run(collapsed, batch, Latents(collapsed), Reconstruction(collapsed, {"image": 1.0}))
    assert results["posterior_collapse"] == 1
    assert results["latent/active_units"] == 0
    assert all(results[f"modality_collapse/{name}"] == 1 for name in SHAPES)


def test_reconstruction_against_direct_formulas(model: JMVAE, batch: EvaluationBatch) -> None:
    results = run(model, batch, Reconstruction(model, {"image": 1.0}))
    mean = model.encode(batch.inputs).mu
    for name in SHAPES:
        data, expected = batch.inputs[name].double(), expected_value(model, mean, name).double()
        error = (data - expected).square()
        assert results[f"reconstruction/mse/{name}"] == pytest.approx(error.mean().item(), rel=1e-5)
        explained = 1 - error.sum() / (data - data.mean(0)).square().sum()
        assert results[f"reconstruction/explained_variance/{name}"] == pytest.approx(explained.item(), abs=1e-5)
    similarity = structural_similarity(expected_value(model, mean, "image"), batch.inputs["image"], 1.0)
    assert results["reconstruction/ssim/image"] == pytest.approx(similarity.mean().item(), rel=1e-5)
    assert "reconstruction/ssim/sound" not in results


@pytest.mark.parametrize("shape", [(13, 12), (3, 11, 14), (1, 6, 5)])
def test_structural_similarity_against_loops(shape: tuple[int, ...]) -> None:
    first, second = torch.rand(2, 2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    size = {12: 11, 14: 11, 5: 5}[shape[-1]]
    window = np.array([math.exp(-((i - size // 2) ** 2) / 4.5) for i in range(size)])
    weights = np.outer(window, window) / window.sum() ** 2
    a, b = (x.reshape(2, -1, *shape[-2:]).numpy() for x in (first, second))
    c1, c2 = (0.01 * 3) ** 2, (0.03 * 3) ** 2
    expected = []
    for sample in range(2):
        values = []
        for channel in range(a.shape[1]):
            for i, j in itertools.product(range(a.shape[2] - size + 1), range(a.shape[3] - size + 1)):
                x, y = (z[sample, channel, i : i + size, j : j + size] for z in (a, b))
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                cov = (weights * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
        expected.append(np.mean(values))
    assert structural_similarity(first, second, 3.0).tolist() == pytest.approx(expected, rel=1e-9)
    assert structural_similarity(first, first, 3.0).tolist() == pytest.approx([1.0, 1.0])


def test_frechet_distance(model: JMVAE, batch: EvaluationBatch) -> None:
    from scipy.linalg import sqrtm

    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(40, 6)), generator.normal(size=(50, 6)) @ generator.normal(size=(6, 6)) + 1
    moments = [(x.mean(0), np.cov(x, rowvar=False)) for x in (a, b)]
    (m1, c1), (m2, c2) = moments
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    tensors = [torch.from_numpy(x) for pair in moments for x in pair]
    assert frechet_distance(*tensors) == pytest.approx(expected, rel=1e-9)
    singular = torch.from_numpy(np.cov(a[:3], rowvar=False))
    assert frechet_distance(tensors[0], singular, tensors[0], singular) == pytest.approx(0, abs=1e-6)

    features = {"sound": lambda x: torch.cat([x, x.square()], 1)}
    results = run(model, batch, FrechetDistance(model, features, {"sound": 10}, key="frechet", seed=2))
    z = normal_noise(4, 0, torch.arange(20), 3, Stream.PRIOR)
    sets = [features["sound"](x).double() for x in (batch.inputs["sound"], expected_value(model, z, "sound"))]
    direct = frechet_distance(*(part for x in sets for part in (x.mean(0), torch.cov(x.T))))
    assert results["frechet/sound/prior"] == pytest.approx(direct, rel=1e-6)
    assert results["frechet/sound/from_others"] > 0


def test_probe_predicts_as_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    generator = np.random.default_rng(0)
    for classes in ([0, 1, 3], [1, 3]):
        labels = generator.choice(classes, 80)
        latents = generator.normal(size=(80, 3)) * [1, 100, 0.01] + labels[:, None]
        latents = np.c_[latents, np.full(80, 7.0)]  # a dimension that does not vary
        probe = fit_probe(torch.from_numpy(latents), torch.from_numpy(labels), 5)
        logits = torch.from_numpy(latents) @ probe.weight.T + probe.bias
        scaled = StandardScaler().fit_transform(latents)
        reference = LogisticRegression(tol=1e-7, max_iter=2000).fit(scaled, labels)
        np.testing.assert_allclose(
            torch.softmax(logits, 1).numpy()[:, classes], reference.predict_proba(scaled), atol=1e-4
        )
        assert torch.isneginf(logits[:, [2, 4]]).all()


@pytest.fixture(scope="module")
def digit_views(digits: Path) -> tuple[Manifest, tuple[View, ...]]:
    manifest = Manifest.load(digits / "train" / "manifest.json")
    return manifest, make_views(manifest.modalities)


def test_classifiers_are_trained_alike_and_kept(
    digit_views: tuple[Manifest, tuple[View, ...]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest, (image, label) = digit_views
    options: dict[str, Any] = {"is_picture": True, "num_steps": 60, "seed": 0, "device": torch.device("cpu")}
    first, again = (train_classifier(image, label, manifest, **options) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    )
    description = describe(image, label, manifest, 60, 0)
    path = file_of(tmp_path, description)
    assert path != file_of(tmp_path, describe(image, label, manifest, 61, 0))
    assert not load_classifier(make_classifier(image, label, True), path, description)
    save_classifier(first, path, description)
    loaded = make_classifier(image, label, True)
    assert load_classifier(loaded, path, description)
    x = torch.rand(5, *image.shape)
    assert torch.equal(loaded(x), first(x))
    assert not load_classifier(loaded, path, describe(image, label, manifest, 61, 0))
    path.write_bytes(path.read_bytes()[:-8])
    assert not load_classifier(loaded, path, description)
    assert "is trained anew" in caplog.text


@pytest.mark.parametrize("shape", [(28, 28), (1, 8, 8), (3, 64, 40), (7,), (5, 12)])
def test_classifiers_fit_any_shape(shape: tuple[int, ...]) -> None:
    network = Classifier(shape, 4, is_picture(shape))
    assert network(torch.zeros(2, *shape)).shape == (2, 4)
    assert network.features(torch.zeros(2, *shape)).shape == (2, 128)
    assert sum(parameter.numel() for parameter in network.parameters()) < 1_500_000


def test_the_suite_learns_from_training_data(digits: Path, digit_views: tuple[Manifest, tuple[View, ...]]) -> None:
    """With an untrained model: probes and classifiers still work, since they look at data."""
    manifest, views = digit_views
    label = views[1]
    held_out = Manifest.load(digits / "test" / "manifest.json")
    torch.manual_seed(0)
    config = JMVAEConfig(
        2,
        4,
        {view.name: tuple(view.shape) for view in views},
        decoders_dist={"image": "bernoulli", "label": "categorical"},
        decoder_dist_params={"image": {"soft_targets": True}},
    )
    model = JMVAE(config, networks=NetworksConfig([16], [16], [16]))
    data = SuiteData(held_out, views, label, manifest, views, label)
    options = SuiteOptions(
        ("coherence", "probe", "frechet"), num_prior_samples=50, num_probe_samples=300, classifier_steps=150
    )
    results, _ = run_suite(model, data, options, Collectives(), SuiteNetworks())
    assert results["classifier_accuracy/image"] > 0.85
    assert 0.2 < results["probe/from_image"] < 1
    assert set(results) >= {"coherence/image/from_label", "coherence/label/from_image", "coherence/joint"}
    assert "probe/from_label" not in results  # it would read the label off the label
    assert results["frechet/image/prior"] > results["frechet/image/from_others"] * 0.1 > 0


def test_a_loader_that_one_rank_cannot_make_ends_all(digit_views: tuple[Manifest, tuple[View, ...]]) -> None:
    manifest, views = digit_views
    shapes = {view.name: tuple(view.shape) for view in views}
    model = JMVAE(JMVAEConfig(2, 2, shapes), networks=NetworksConfig([4], [4], [4]))
    with pytest.raises(ConfigError, match="batch size") as caught:
        evaluate_together(model, manifest, views, Collectives(), batch_size=0, seed=0, joint_nll_samples=0)
    assert is_on_all_ranks(caught.value)


def test_what_data_cannot_support_is_said(digit_views: tuple[Manifest, tuple[View, ...]]) -> None:
    manifest, views = digit_views
    image, label = views
    config = JMVAEConfig(2, 2, {"image": (1, 8, 8), "sound": (3,)})
    model = JMVAE(config, networks=NetworksConfig([4], [4], [4]))
    assert find_label(manifest, [image], None)[0] is not None
    with pytest.raises(ConfigError, match="no modality 'lable'"):
        find_label(manifest, views, "lable")
    with pytest.raises(ConfigError, match="not one class"):
        find_label(manifest, views, "image")
    without = SuiteData(manifest, (image,))
    with_label = SuiteData(manifest, (image,), label)
    networks = SuiteNetworks()
    for data, name, expected in (
        (without, "accuracy", "categorical"),
        (without, "coherence", "class labels"),
        (without, "frechet", "--feature-extractor"),
        (with_label, "probe", "--train-manifest"),
        (with_label, "elbo", ""),
    ):
        reason = unsupported(name, model, data, networks, None)
        assert expected in reason
        assert bool(reason) == bool(expected)
    assert not unsupported("frechet", model, without, SuiteNetworks(extractors={"image": nn.Identity()}), None)


def test_what_is_not_finite_is_no_plausible_number(batch: EvaluationBatch) -> None:
    """NaN everywhere: `argmax` would see class 0, no dimension active, and eigenvalues not converge."""
    torch.manual_seed(0)
    broken = JMVAE(
        JMVAEConfig(3, 3, dict(SHAPES), decoders_dist=DISTRIBUTIONS), networks=NetworksConfig([8], [8], [8])
    )
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(torch.nan)
    classifiers = {"image": nn.Flatten(), "sound": nn.Identity()}
    probes = {("sound",): Probe(torch.zeros(4, 3).double(), torch.zeros(4).double())}
    results = run(
        broken,
        batch,
        *(Accuracy(broken), Coherence(broken, classifiers, label="label", seed=0), Latents(broken)),
        *(ProbeAccuracy(broken, probes), Reconstruction(broken, {"image": 1.0})),
        FrechetDistance(broken, classifiers, {"image": 42, "sound": 5}, key="frechet", seed=0),
    )
    own = {key: results.pop(key) for key in ("samples", "classifier_accuracy/image", "classifier_accuracy/sound")}
    assert not any(map(math.isnan, own.values()))
    assert [key for key, value in results.items() if not math.isnan(value)] == []
    # A class that never occurs has the logit -inf.
    logits = torch.tensor([[-torch.inf, 1.0], [torch.nan, 1.0], [0.0, torch.inf]])
    assert most_probable(logits).nan_to_num(-1).tolist() == [1, -1, -1]


def test_a_text_is_no_picture() -> None:
    shapes = {"text": (8, 12), "image": (8, 12)}
    config = JMVAEConfig(2, 3, shapes, decoders_dist={"text": "categorical", "image": "normal"})
    model = JMVAE(config, networks=NetworksConfig([8], [8], [8]))
    assert not shows_picture(model, "text")
    assert shows_picture(model, "image")
    layers = {flag: list(Classifier((8, 12), 4, flag).modules()) for flag in (True, False)}
    assert [any(isinstance(layer, nn.Conv2d) for layer in layers[flag]) for flag in layers] == [True, False]


class _Judge(nn.Module):
    """Of sounds: logits (B, `size`), with a part that is called `features`."""

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.features = nn.Linear(5, 7)
        self.head = nn.Linear(5, size)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).to(self.dtype)


def test_networks_of_the_user_are_tried(model: JMVAE, digit_views: tuple[Manifest, tuple[View, ...]]) -> None:
    manifest, views = digit_views
    data = SuiteData(manifest, views, views[1])  # 10 classes
    check_networks(model, data, SuiteNetworks({"sound": _Judge(10)}), ["coherence", "frechet"])
    check_networks(model, data, SuiteNetworks({"sound": _Judge(3)}), ["elbo", "frechet"])
    for judges, message in (
        ({"classifiers": {"sound": _Judge(3)}}, r"--classifier sound: .* \(2, 3\), and logits of .* are \(2, 10\)"),
        ({"classifiers": {"sound": _Judge(10, torch.int64)}}, "returns torch.int64, not a tensor of floating point"),
        ({"classifiers": {"image": _Judge(10)}}, r"--classifier image: it cannot take values \(2, 1, 6, 7\)"),
        ({"extractors": {"image": nn.Identity()}}, r"--feature-extractor image: .* \(2, number of features\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_networks(model, data, SuiteNetworks(**judges), ["coherence", "frechet"])


def test_networks_of_the_user() -> None:
    entry = 'image=torch.nn.Flatten:{"start_dim": 2}'
    (network,) = parse_user_networks("--classifier", [entry], ["image"], ["torch.nn.Flatten"])
    built = build_user_network("--classifier", network)
    assert isinstance(built, nn.Flatten)
    assert built.start_dim == 2
    for wrong, message in (
        ("image", "is not MODALITY=MODULE.CLASS"),
        ("image=torch.nn.Linear", "--trust-class torch.nn.Linear"),
        ("sound=torch.nn.Flatten", "unknown modality 'sound'"),
        ("image=torch.nn.Flatten:{", "not JSON"),
        ("image=torch.nn.Flatten:[1]", "must be a JSON object"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_user_networks("--classifier", [wrong], ["image"], ["torch.nn.Flatten"])
    for entry, message in (("image=torch.nn.Flat", "cannot be imported"), ("image=torch.Size", "not a torch.nn")):
        class_path = entry.partition("=")[2]
        (network,) = parse_user_networks("--classifier", [entry], ["image"], [class_path])
        with pytest.raises(ConfigError, match=message):
            build_user_network("--classifier", network)


def test_table() -> None:
    results = {"eval/samples": 9.0, "eval/elbo": -1.5, "eval/coherence/joint": 0.25}
    results |= {f"eval/coherence/{t}/from_{s}": 0.5 for t, s in (("b", "a"), ("a", "b"), ("a", "b+c"))}
    results |= {"eval/accuracy/label/from_image": 0.75, "eval/loss/total": 2.0, "eval/loss/kl_prior": 1.0}
    lines = format_results(results).splitlines()
    assert [line.split() for line in lines] == [
        ["samples", "9"],
        ["elbo", "-1.5"],
        ["coherence/joint", "0.25"],
        ["accuracy/label/from_image", "0.75"],
        [],
        ["loss/total", "2"],
        ["loss/kl_prior", "1"],
        [],
        ["coherence", "from", "a", "b"],
        ["a", "0.5"],
        ["b", "0.5"],
        ["b+c", "0.5"],
    ]


def test_table_shows_errors_beside_their_numbers_and_no_diagnostics(model: JMVAE, batch: EvaluationBatch) -> None:
    estimands = [joint_estimand(model), *conditional_estimands(model, [(name,) for name in model.modalities])]
    results = run(model, batch, ImportanceSampling(model, estimands, seed=0, num_draws=3))
    assert {key.partition("/")[0] for key in results} >= DIAGNOSED
    text = format_results({f"eval/{key}": value for key, value in results.items()}, model.modalities)
    lines = [line.split() for line in text.splitlines()]

    def with_error(key: str) -> list[str]:
        return f"{results[key]:.6g} ± {results[companion_key(key, 'stderr')]:.2g}".split()

    assert ["joint_nll", *with_error("joint_nll")] in lines
    marginals = [word for name in model.modalities for word in with_error(f"marginal_nll/{name}")]
    assert lines[-7:-4] == [["by", "modality", *model.modalities], ["marginal_nll", *marginals], []]
    assert lines[-4] == ["conditional_nll", "from", *model.modalities]
    assert text.count("±") == 1 + 3 + 6
    assert not any(word in text for word in ("stderr", "effective", "unreliable"))


def test_every_metric_of_the_command_line_is_known_to_the_suite(model: JMVAE) -> None:
    assert set(command.DEFAULT_METRICS) < set(command.METRICS)
    with pytest.raises(ConfigError, match=r"choose from default,all,elbo"):
        command.main(["nowhere", "--manifest", "m.json", "--metrics", "fid"])

"""Figures: what they show, that they touch nothing global, and that files appear whole."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from jmvae_dist.errors import ConfigError
from jmvae_dist.evaluation.figures import (
    cross_modal_figure,
    cross_modal_matrix_figure,
    interpolation_figure,
    learning_curves_figure,
    principal_components,
    prior_samples_figure,
    projection_figure,
    reconstruction_figure,
    save_png,
)
from jmvae_dist.kernels.noise import Stream, normal_noise
from jmvae_dist.model import JMVAE
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig

SHAPES = {"grey": (1, 5, 6), "plain": (5, 6), "color": (3, 4, 4), "label": (10,), "words": (4, 7), "sound": (30,)}
DISTRIBUTIONS = {
    "grey": "bernoulli",
    "plain": "normal",
    "color": "laplace",
    "label": "categorical",
    "words": "categorical",
    "sound": "normal",
}


@pytest.fixture
def model() -> JMVAE:
    torch.manual_seed(0)
    config = JMVAEConfig(6, 3, dict(SHAPES), decoders_dist=DISTRIBUTIONS)
    return JMVAE(config, networks=NetworksConfig([8], [8], [8])).eval()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    data = {name: torch.randn(5, *shape, generator=generator) for name, shape in SHAPES.items()}
    data["grey"] = (data["grey"] > 0).float()
    for name in ("label", "words"):
        data[name] = torch.nn.functional.one_hot(data[name].argmax(-1), SHAPES[name][-1]).float()
    return data


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def images(figure: Figure) -> list[np.ndarray]:
    return [image.get_array() for axes in figure.axes for image in axes.get_images()]


def test_reconstruction(model: JMVAE, inputs: dict[str, Tensor]) -> None:
    figure = reconstruction_figure(model, inputs, max_samples=4)
    assert len(figure.axes) == 6 * 2 * 4
    labels = texts(figure)
    assert labels[0] == "Reconstruction from all modalities"
    assert all(labels.count(name) == 2 for name in SHAPES)
    shown = images(figure)
    np.testing.assert_array_equal(shown[2], inputs["grey"][2, 0].numpy())
    latent = model.encode(inputs, return_mean=True, flatten=True)
    expected = torch.sigmoid(model.decode(latent, "grey")["grey"])[2, 0].numpy()
    np.testing.assert_allclose(shown[4 + 2], expected, rtol=1e-5)


def test_pictures_of_a_modality_share_one_scale(model: JMVAE, inputs: dict[str, Tensor]) -> None:
    inputs["grey"][:] = 1.0  # on the scale of this data alone, everything would be white
    figure = reconstruction_figure(model, inputs, max_samples=4)
    pictures = [image for axes in figure.axes for image in axes.get_images()]
    shown = inputs["plain"][:4]
    # Two rows of probabilities, then two rows on the scale of the data.
    assert [image.get_clim() for image in pictures[:8]] == [(0.0, 1.0)] * 8
    assert [image.get_clim() for image in pictures[8:16]] == [(shown.min().item(), shown.max().item())] * 8


def test_categorical_cells_name_the_class(model: JMVAE, inputs: dict[str, Tensor]) -> None:
    figure = cross_modal_figure(model, {"label": inputs["label"]}, "label")
    first_row = [axes.texts[0].get_text() for axes in figure.axes[:5]]
    assert first_row == [str(int(index)) for index in inputs["label"].argmax(-1)]


def test_categorical_cells_and_legends_show_names_of_classes(model: JMVAE, inputs: dict[str, Tensor]) -> None:
    names = ["benign", "$x_1$", "_other", "adenocarcinoma left", "adenocarcinoma right", "日本", *"ghij"]
    inputs["label"] = torch.eye(10)[[0, 1, 3, 4, 5]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = cross_modal_figure(model, {"label": inputs["label"]}, "label", class_names={"label": names})
        figure.canvas.draw()
        projected = projection_figure(torch.randn(6, 2), torch.arange(6) * 2, "title", names)
        projected.canvas.draw()
    shown = [axes.texts[0].get_text() for axes in figure.axes[:5]]
    # What the font lacks stays a number; long names keep the end, in which they differ.
    assert shown == ["benign", "$x_1$", "adenocarci..eft", "adenocarci..ght", "5"]
    legend = projected.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["benign", "_other", names[4], "g", "i", "10"]


def test_a_probability_stands_behind_the_name(model: JMVAE, inputs: dict[str, Tensor]) -> None:
    figure = reconstruction_figure(model, inputs, max_samples=1, class_names={"label": ["malignant tumour"] * 10})
    name = figure.axes[list(SHAPES).index("label") * 2 + 1].texts[0].get_text()
    assert re.fullmatch(r"malig\.\.our  \d\d%", name)


@pytest.mark.parametrize("given", ["label", ["sound", "grey"]])
def test_cross_modal(model: JMVAE, inputs: dict[str, Tensor], given: str | list[str]) -> None:
    names = [given] if isinstance(given, str) else given
    figure = cross_modal_figure(model, inputs, given, num_draws=2)
    generated = [name for name in SHAPES if name not in names]
    counts = {name: 2 if DISTRIBUTIONS[name] == "categorical" else 4 for name in generated}
    assert len(figure.axes) == 5 * (len(names) + sum(counts.values()))
    labels = texts(figure)
    assert all(labels.count(name) == counts.get(name, 1) for name in SHAPES)
    only_given = cross_modal_figure(model, {name: inputs[name] for name in names}, given, num_draws=2)
    assert len(only_given.axes) == len(figure.axes) - 5 * len(generated)


def test_draws_differ_and_are_reproducible(model: JMVAE, inputs: dict[str, Tensor]) -> None:
    first, again = (
        images(cross_modal_figure(model, inputs, "label", max_samples=2, num_draws=1, seed=3)) for _ in range(2)
    )
    other = images(cross_modal_figure(model, inputs, "label", max_samples=2, num_draws=1, seed=4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_prior_samples(model: JMVAE) -> None:
    figure = prior_samples_figure(model, num_samples=3, num_lines=2)
    assert len(figure.axes) == 3 * 2 * 6
    pictures = images(figure)
    assert not np.array_equal(pictures[0], pictures[1])


def test_cross_modal_matrix(model: JMVAE, inputs: dict[str, Tensor]) -> None:
    figure = cross_modal_matrix_figure(model, inputs, max_samples=2, seed=3)
    assert len(figure.axes) == 6 * 8 * 2  # modalities, data and given each and all, samples
    labels = texts(figure)
    assert labels.count("data") == 1
    assert all(f"given {name}" in labels for name in (*SHAPES, "all"))
    grey = images(figure)[: 8 * 2]
    np.testing.assert_array_equal(grey[1], inputs["grey"][1, 0].numpy())
    noise = normal_noise(3, 0, torch.arange(2), model.latent_dim, Stream.CONDITIONAL)[None]
    first = {name: x[:2] for name, x in inputs.items()}
    latent = model.encode(first, "label", flatten=True, noise=noise)
    expected = torch.sigmoid(model.decode(latent, "grey")["grey"])[1, 0].numpy()
    np.testing.assert_allclose(grey[2 * (1 + list(SHAPES).index("label")) + 1], expected, rtol=1e-5)


def test_interpolation_ends_in_reconstructions(model: JMVAE, inputs: dict[str, Tensor]) -> None:
    figure = interpolation_figure(model, inputs, num_pairs=3, num_steps=4)
    assert len(figure.axes) == 2 * 6 * 4  # of five samples, two pairs
    decoded = torch.sigmoid(model.decode(model.encode(inputs, return_mean=True, flatten=True), "grey")["grey"])
    shown = images(figure)
    np.testing.assert_allclose(shown[0], decoded[0, 0].numpy(), rtol=1e-5)
    np.testing.assert_allclose(shown[3], decoded[1, 0].numpy(), rtol=1e-4)
    assert len(interpolation_figure(model, {name: x[:1] for name, x in inputs.items()}).axes) == 6 * 9


def test_projection() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(40, 5, generator=generator) * torch.tensor([5.0, 1.0, 3.0, 0.1, 0.1])
    points, shares, kept = principal_components(torch.cat([latents, torch.full((1, 5), torch.nan)]))
    values, vectors = np.linalg.eigh(np.cov(latents.numpy(), rowvar=False))
    expected = (latents.numpy() - latents.numpy().mean(0)) @ vectors[:, [-1, -2]]
    np.testing.assert_allclose(np.abs(points), np.abs(expected), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(shares, values[[-1, -2]] / values.sum(), rtol=1e-5)
    assert kept.tolist() == [True] * 40 + [False]
    figure = projection_figure(latents, torch.arange(40) % 3, "title")
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["0", "1", "2"]
    assert len(figure.axes[0].collections) == 3
    for odd in (torch.zeros(4, 5), torch.zeros(1, 1), torch.full((3, 2), torch.nan)):
        assert len(projection_figure(odd, None, "title").axes) == 1


def test_learning_curves() -> None:
    records = [{"global_step": step, "elbo": -1.0 / step, "eval/accuracy/label/from_grey": 0.5} for step in (1, 2, 3)]
    records += [{"global_step": 4, "elbo": float("nan")}]
    figure = learning_curves_figure(records)
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "ELBO (nats per sample)",
        "Accuracy of generated modalities",
    ]
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, -1], [2, -0.5], [3, -1 / 3]]
    assert learning_curves_figure([]) is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_a_diverging_model_can_be_drawn(
    model: JMVAE, inputs: dict[str, Tensor], tmp_path: Path, value: float
) -> None:
    with torch.no_grad():
        for decoder in model.decoders.values():
            for parameter in decoder.parameters():
                parameter.fill_(value)
    figures = (
        reconstruction_figure(model, inputs, max_samples=2),
        cross_modal_figure(model, inputs, "label", max_samples=2, num_draws=1),
        prior_samples_figure(model, num_samples=2, num_lines=1),
        cross_modal_matrix_figure(model, inputs, max_samples=1),
        interpolation_figure(model, inputs, num_pairs=1, num_steps=2),
    )
    for number, figure in enumerate(figures):
        save_png(figure, tmp_path / f"{number}.png")


def test_mode_of_the_model_and_random_state_are_left_alone(model: JMVAE, inputs: dict[str, Tensor]) -> None:
    model.train()
    state = torch.get_rng_state()
    reconstruction_figure(model, inputs, max_samples=1)
    cross_modal_figure(model, inputs, "label", max_samples=1)
    prior_samples_figure(model, num_samples=1, num_lines=1)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_errors(model: JMVAE, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(ConfigError, match="all modalities"):
        cross_modal_figure(model, inputs, list(SHAPES))
    with pytest.raises(ConfigError, match="lable"):
        cross_modal_figure(model, inputs, "lable")
    with pytest.raises(ConfigError, match="no sample"):
        reconstruction_figure(model, {name: x[:0] for name, x in inputs.items()})


def test_png_is_complete_and_deterministic(model: JMVAE, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    paths = [tmp_path / "figures" / name for name in ("a.png", "b.png")]
    for path in paths:
        save_png(reconstruction_figure(model, inputs, max_samples=2), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    from matplotlib.image import imread

    assert imread(paths[0]).ndim == 3
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["a.png", "b.png"]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    class Broken(Figure):
        def savefig(self, *args: object, **kwargs: object) -> None:
            args[0].write(b"half a picture")  # type: ignore[attr-defined]
            raise OSError("disk full")

    path = tmp_path / "figure.png"
    save_png(Figure(), path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="disk full"):
        save_png(Broken(), path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["figure.png"]


def test_imports_are_light_and_nothing_global_is_used() -> None:
    code = (
        "import sys, jmvae_dist.evaluation, jmvae_dist.evaluation.figures as figures\n"
        "assert not {'matplotlib', 'sklearn', 'wandb', 'deepspeed'} & set(sys.modules), 'heavy import'\n"
        "import torch; from jmvae_dist.model_config import JMVAEConfig; from jmvae_dist.model import JMVAE\n"
        "figures.prior_samples_figure(JMVAE(JMVAEConfig(2, 2, {'a': (4, 4), 'b': (3,)})))\n"
        "assert 'matplotlib.pyplot' not in sys.modules, 'pyplot'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_texts_are_written_out() -> None:
    """As text, not as dots in a matrix of 257 columns; a $ stays one, and nothing in it is a warning."""
    stored = [b"round lesion", "50 $ or $5, für 日".encode(), b"\xff\n" + b"x" * 298]
    torch.manual_seed(0)
    config = JMVAEConfig(2, 3, {"note": (300, 257), "b": (3,)}, decoders_dist={"note": "categorical", "b": "normal"})
    model = JMVAE(config, networks=NetworksConfig([4], [4], [4])).eval()
    ids = torch.tensor([[*text, *[256] * (300 - len(text))] for text in stored])
    inputs = {"note": torch.nn.functional.one_hot(ids, 257).float(), "b": torch.zeros(3, 3)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = reconstruction_figure(model, inputs)
        figure.canvas.draw()
    first, second, third = (axes.texts[0].get_text() for axes in figure.axes[:3])
    assert (first, second) == ("round lesion", "50 $ or $5, für □")
    assert third.startswith("□·xxx")
    assert third.endswith("...")

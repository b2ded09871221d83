"""Pictures of what the model does: reconstructions, generation, its latent space, and how it learned.

Modalities are drawn by what they are: images as pictures, categorical ones as bars with the most probable
class, texts of bytes as text, everything else as lines. Drawing uses matplotlib's object interface, so that
nothing global (backend, current figure) is touched and figures are freed when they go out of scope.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from jmvae_dist.errors import ConfigError
from jmvae_dist.evaluation.reconstruction import is_picture
from jmvae_dist.evaluation.texts import is_byte_text, most_probable_text
from jmvae_dist.files import writing_atomic
from jmvae_dist.kernels.noise import Stream, normal_noise
from jmvae_dist.model import JMVAE
from jmvae_dist.model.likelihoods import Likelihood

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By modality, in the order of the classes' numbers.
ClassNames = Mapping[str, Sequence[str]]

_INK = "#1f2933"
_MUTED = "#7b8794"
_DATA_COLOR = "#7b8794"
_MODEL_COLOR = "#2563a8"
_FAINT = "#d3dae1"
_CELL_INCHES = 0.78
_LABEL_INCHES = 1.55
_MAX_BARS = 24
# Of a text, so much fits into a cell in a small fixed-width font.
_TEXT_POINTS = 5.0
_TEXT_COLUMNS = 18
_TEXT_LINES = 7
# Scripts from U+0590 on are in none of matplotlib's own fonts; dashes, quotation marks and these signs are in all.
_OTHER_GLYPHS = "\u2013\u2014\u2018\u2019\u201c\u201d\u2022\u2026\u2190\u2192\u2212\u2248\u2260\u2264\u2265"
# Of the name of a class: with its probability in a cell, and beside a plot.
_CLASS_COLUMNS = 15
_LEGEND_COLUMNS = 30
# Colours of classes, told apart by most people with any colour vision; classes beyond these share them.
_CLASS_COLORS = (
    *("#2563a8", "#d1495b", "#2a9d5c", "#e08e1b", "#7b4fa3", "#17a2b8", "#8c6d46", "#c2589f"),
    *("#5c6773", "#9aa62f"),
)


@dataclass(frozen=True)
class _Row:
    """One row of pictures: a modality of several samples, from the data or from the model."""

    modality: str
    label: str
    values: np.ndarray  # (n, *shape), expected values
    from_data: bool


def _draw_picture(axes: Axes, value: np.ndarray, limits: tuple[float, float], ink_on_paper: bool) -> None:
    low, high = limits
    if value.ndim == 3 and value.shape[0] == 3:
        axes.imshow(np.clip((value.transpose(1, 2, 0) - low) / max(high - low, 1e-12), 0, 1))
    else:
        # Probabilities of ink are drawn dark on light; measured grey values keep their meaning: bright is
        # large.
        color_map = "gray_r" if ink_on_paper else "gray"
        axes.imshow(value.reshape(value.shape[-2:]), cmap=color_map, vmin=low, vmax=high, interpolation="nearest")


def _draw_classes(axes: Axes, value: np.ndarray, color: str, names: Sequence[str]) -> None:
    """Probabilities of one variable as bars, the most probable class in colour and named above, or its number."""
    best = int(value.argmax())
    if len(value) <= _MAX_BARS:
        colors = [color if index == best else _FAINT for index in range(len(value))]
        axes.bar(range(len(value)), value, width=0.8, color=colors)
        axes.axhline(0, color=_FAINT, linewidth=0.6)
    axes.set_ylim(0, 1.75)
    axes.set_xlim(-0.8, min(len(value), _MAX_BARS) - 0.2)
    percent = "" if value[best] > 0.995 else f"  {100 * value[best]:.0f}%"
    name = _class_text(names, best, _CLASS_COLUMNS - len(percent))
    axes.text(
        0.5,
        0.98,
        name + percent,
        transform=axes.transAxes,
        ha="center",
        va="top",
        fontsize=6 if names else 8,
        color=_INK,
        parse_math=False,  # a $ of the user's is no formula
    )


def _has_glyph(char: str) -> bool:
    """Whether matplotlib's own fonts have the character; they would warn of each one that they lack."""
    return char < "\u0590" or char in _OTHER_GLYPHS


def _class_text(names: Sequence[str], number: int, most: int) -> str:
    """The name of a class, or its number if it has none that can be drawn.

    Too long a name loses its middle: names of classes often differ at their ends.
    """
    name = names[number] if number < len(names) else ""
    if not name or not all(map(_has_glyph, name)):
        return str(number)
    return name if len(name) <= most else f"{name[: most - 5]}..{name[-3:]}"


def _draw_text(axes: Axes, value: np.ndarray, color: str) -> None:
    """The beginning of a text, cut into lines of equal length: generated ones need not have words."""
    text = "".join(
        (char if char.isprintable() else "\u00b7") if _has_glyph(char) else "\u25a1"
        for char in most_probable_text(value)
    )
    most = _TEXT_COLUMNS * _TEXT_LINES
    text = text if len(text) <= most else text[: most - 3] + "..."
    lines = [text[start : start + _TEXT_COLUMNS] for start in range(0, len(text), _TEXT_COLUMNS)]
    axes.text(
        0.0,
        0.9,
        "\n".join(lines),
        transform=axes.transAxes,
        va="top",
        ha="left",
        fontsize=_TEXT_POINTS,
        family="monospace",
        color=color,
        parse_math=False,  # a $ of the user's is no formula
    )


def _draw_line(axes: Axes, value: np.ndarray, limits: tuple[float, float], color: str) -> None:
    flat = value.reshape(-1)
    margin = 0.08 * max(limits[1] - limits[0], 1e-12)
    marker = "o" if len(flat) <= 16 else None
    axes.axhline(0, color=_FAINT, linewidth=0.6)
    axes.plot(flat, color=color, linewidth=1.1, marker=marker, markersize=2)
    axes.set_ylim(limits[0] - margin, limits[1] + margin)


def _limits(rows: list[_Row], modality: str, likelihood: Likelihood) -> tuple[float, float]:
    """Common value range of a modality in all rows: that of the data where there is any, so that models compare.

    Only finite values count: what a diverging model generates must not end a run that draws it.
    """
    if likelihood.name in ("bernoulli", "categorical"):
        return 0.0, 1.0
    own = [row for row in rows if row.modality == modality]
    values = [row.values for row in own if row.from_data] or [row.values for row in own]
    finite = np.concatenate([array[np.isfinite(array)] for array in values])
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)


def _draw_cell(
    axes: Axes,
    row: _Row,
    column: int,
    likelihood: Likelihood,
    limits: tuple[float, float],
    class_names: ClassNames | None,
) -> None:
    value, color = row.values[column], _DATA_COLOR if row.from_data else _MODEL_COLOR
    if likelihood.name == "categorical" and value.ndim == 1:
        _draw_classes(axes, value, color, (class_names or {}).get(row.modality, ()))
    elif is_byte_text(likelihood, value.shape):
        _draw_text(axes, value, color)
    elif is_picture(value.shape):
        _draw_picture(axes, value, limits, ink_on_paper=likelihood.name in ("bernoulli", "categorical"))
    else:
        _draw_line(axes, value, limits, color)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(is_picture(value.shape) and likelihood.name != "categorical")
        spine.set_color(_FAINT)
        spine.set_linewidth(0.6)


def _draw_grid(model: JMVAE, rows: list[_Row], title: str, class_names: ClassNames | None) -> Figure:
    """A figure with one labelled line of cells per row; a rule separates rows of different modalities."""
    from matplotlib.figure import Figure

    num_columns = len(rows[0].values)
    # Bars need less room than pictures and lines.
    heights = [0.7 if model.likelihoods[row.modality].name == "categorical" else 1.0 for row in rows]
    width, height = _LABEL_INCHES + _CELL_INCHES * num_columns + 0.15, _CELL_INCHES * sum(heights) + 0.55
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    grid = figure.add_gridspec(
        len(rows),
        num_columns,
        height_ratios=heights,
        left=_LABEL_INCHES / width,
        right=1 - 0.15 / width,
        top=1 - 0.45 / height,
        bottom=0.1 / height,
        wspace=0.08,
        hspace=0.1,
    )
    figure.text(0.15 / width, 1 - 0.13 / height, title, fontsize=11, color=_INK, va="top", fontweight="bold")
    limits = {row.modality: _limits(rows, row.modality, model.likelihoods[row.modality]) for row in rows}
    for index, row in enumerate(rows):
        for column in range(num_columns):
            axes = figure.add_subplot(grid[index, column])
            _draw_cell(axes, row, column, model.likelihoods[row.modality], limits[row.modality], class_names)
        box = grid[index, 0].get_position(figure)
        middle, line = (box.y0 + box.y1) / 2, 0.085 / height
        figure.text(0.15 / width, middle + line, row.modality, fontsize=9, color=_INK, va="center")
        figure.text(0.15 / width, middle - line, row.label, fontsize=8, color=_MUTED, va="center")
    return figure


def _as_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _first(inputs: dict[str, Tensor], model: JMVAE, max_samples: int) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    selected = {name: tensor[:max_samples].to(device) for name, tensor in inputs.items()}
    if any(len(tensor) == 0 for tensor in selected.values()):
        raise ConfigError("figure: there is no sample to show (data set or evaluation.figure_samples is empty)")
    return selected


def _expected(model: JMVAE, decoded: dict[str, Tensor], name: str) -> np.ndarray:
    return _as_array(model.likelihoods[name].mean(decoded[name]))


@torch.no_grad()
def reconstruction_figure(
    model: JMVAE, inputs: dict[str, Tensor], *, max_samples: int = 10, class_names: ClassNames | None = None
) -> Figure:
    """Every modality of some samples, and its reconstruction from the joint posterior's mean.

    Args:
        model: In evaluation mode.
        inputs: Every modality, (B, *shape); the first `max_samples` are shown.
        max_samples: Number of columns.
        class_names: By modality, where classes have names.
    """
    shown = _first(inputs, model, max_samples)
    decoded = model.decode(model.encode(shown, return_mean=True, flatten=True))
    rows = []
    for name in model.modalities:
        rows.append(_Row(name, "data", _as_array(shown[name]), True))
        rows.append(_Row(name, "reconstruction", _expected(model, decoded, name), False))
    return _draw_grid(model, rows, "Reconstruction from all modalities", class_names)


@torch.no_grad()
def cross_modal_figure(
    model: JMVAE,
    inputs: dict[str, Tensor],
    given: str | Iterable[str],
    *,
    max_samples: int = 10,
    num_draws: int = 3,
    seed: int = 0,
    class_names: ClassNames | None = None,
) -> Figure:
    """Some modalities of some samples, and the others as the model generates them from these.

    Every generated modality is shown at the posterior's mean and, unless categorical, for `num_draws` samples
    of the posterior; above them is the truth where `inputs` has it.

    Args:
        model: In evaluation mode.
        inputs: At least the given modalities, (B, *shape); the first `max_samples` are shown.
        given: A modality or several.
        max_samples: Number of columns.
        num_draws: Samples of the posterior per generated modality.
        seed: Seed of the samples.
        class_names: By modality, where classes have names.

    Raises:
        ConfigError: `given` names no or unknown modalities, or all of them.
    """
    names = [given] if isinstance(given, str) else list(given)
    shown = _first(inputs, model, max_samples)
    generated = [name for name in model.modalities if name not in names]
    if not generated:
        raise ConfigError(f"given: {names} are all modalities, so that none is left to generate")
    at_mean = model.decode(model.encode(shown, names, return_mean=True, flatten=True), generated)
    rows_B = torch.arange(len(shown[names[0]]), device=shown[names[0]].device)
    noise = [normal_noise(seed, draw, rows_B, model.latent_dim, Stream.CONDITIONAL) for draw in range(num_draws)]
    draws: list[dict[str, Tensor]] = []
    for noise_BD in noise:
        latent = model.encode(shown, names, flatten=True, noise=noise_BD[None], check_inputs=False)
        draws.append(model.decode(latent, generated))

    rows = [_Row(name, "given", _as_array(shown[name]), True) for name in model.modalities if name in names]
    for name in generated:
        if name in shown:
            rows.append(_Row(name, "data (not given)", _as_array(shown[name]), True))
        rows.append(_Row(name, "generated, mean", _expected(model, at_mean, name), False))
        if model.likelihoods[name].name != "categorical":
            labels = [f"generated, draw {number + 1}" for number in range(num_draws)]
            pairs = zip(labels, draws, strict=True)
            rows += [_Row(name, label, _expected(model, decoded, name), False) for label, decoded in pairs]
    return _draw_grid(model, rows, f"{' and '.join(generated)} generated from {' and '.join(names)}", class_names)


@torch.no_grad()
def prior_samples_figure(
    model: JMVAE,
    *,
    num_samples: int = 10,
    num_lines: int = 4,
    seed: int = 0,
    class_names: ClassNames | None = None,
) -> Figure:
    """Samples of the prior, decoded into every modality; the modalities of a column belong together.

    Args:
        model: In evaluation mode.
        num_samples: Number of columns.
        num_lines: Lines of samples.
        seed: Seed of the samples.
        class_names: By modality, where classes have names.
    """
    device = next(model.parameters()).device
    rows = []
    for line in range(num_lines):
        numbers = torch.arange(line * num_samples, (line + 1) * num_samples, device=device)
        noise = normal_noise(seed, 0, numbers, model.latent_dim, Stream.PRIOR)
        decoded = model.decode(model.generate_from_prior(num_samples, noise=noise))
        rows += [_Row(name, f"samples {line + 1}", _expected(model, decoded, name), False) for name in decoded]
    return _draw_grid(model, rows, "Samples of the prior", class_names)


@torch.no_grad()
def cross_modal_matrix_figure(
    model: JMVAE,
    inputs: dict[str, Tensor],
    *,
    max_samples: int = 3,
    seed: int = 0,
    class_names: ClassNames | None = None,
) -> Figure:
    """Every modality generated from every modality: a row per source, a block of columns per target.

    The first row is the data. In the others, all modalities of a row are decoded from one draw of the posterior given
    the modality named at its left; the last row is given all.

    Args:
        model: In evaluation mode.
        inputs: Every modality, (B, *shape); the first `max_samples` are shown.
        max_samples: Columns per block.
        seed: Seed of the draws.
        class_names: By modality, where classes have names.
    """
    shown = _first(inputs, model, max_samples)
    num_columns = len(shown[model.modalities[0]])
    rows_B = torch.arange(num_columns, device=shown[model.modalities[0]].device)
    noise = normal_noise(seed, 0, rows_B, model.latent_dim, Stream.CONDITIONAL)[None]
    lines = [("data", {name: _Row(name, "", _as_array(shown[name]), True) for name in model.modalities})]
    for source in (*model.modalities, "all"):
        decoded = model.decode(model.encode(shown, source, flatten=True, noise=noise, check_inputs=False))
        cells = {name: _Row(name, "", _expected(model, decoded, name), False) for name in model.modalities}
        lines.append((f"given {source}", cells))
    return _draw_matrix(model, lines, num_columns, "Every modality from every modality", class_names)


def _draw_matrix(
    model: JMVAE,
    lines: list[tuple[str, dict[str, _Row]]],
    num_columns: int,
    title: str,
    class_names: ClassNames | None,
) -> Figure:
    """A row per line, with its label at the left, and a block of `num_columns` columns per modality."""
    from matplotlib.figure import Figure

    width = _LABEL_INCHES + (_CELL_INCHES * num_columns + 0.12) * len(model.modalities) + 0.1
    height = _CELL_INCHES * len(lines) + 0.75
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    blocks = figure.add_gridspec(
        len(lines),
        len(model.modalities),
        left=_LABEL_INCHES / width,
        right=1 - 0.1 / width,
        top=1 - 0.65 / height,
        bottom=0.1 / height,
        wspace=0.12 / (_CELL_INCHES * num_columns),
        hspace=0.1,
    )
    figure.text(0.15 / width, 1 - 0.13 / height, title, fontsize=11, color=_INK, va="top", fontweight="bold")
    for column, name in enumerate(model.modalities):
        likelihood = model.likelihoods[name]
        limits = _limits([cells[name] for _, cells in lines], name, likelihood)
        box = blocks[0, column].get_position(figure)
        figure.text(box.x0, box.y1 + 0.06 / height, name, fontsize=9, color=_INK, va="bottom")
        for line, (_, cells) in enumerate(lines):
            grid = blocks[line, column].subgridspec(1, num_columns, wspace=0.08)
            for sample in range(num_columns):
                _draw_cell(figure.add_subplot(grid[0, sample]), cells[name], sample, likelihood, limits, class_names)
    for line, (label, _) in enumerate(lines):
        box = blocks[line, 0].get_position(figure)
        figure.text(0.15 / width, (box.y0 + box.y1) / 2, label, fontsize=9, color=_INK, va="center")
    return figure


@torch.no_grad()
def interpolation_figure(
    model: JMVAE,
    inputs: dict[str, Tensor],
    *,
    num_pairs: int = 3,
    num_steps: int = 9,
    class_names: ClassNames | None = None,
) -> Figure:
    """Straight lines in the latent space between the joint posteriors' means of pairs of samples, decoded.

    Args:
        model: In evaluation mode.
        inputs: Every modality, (B, *shape); samples 0 and 1 are the ends of the first line, 2 and 3 of the second.
        num_pairs: Lines, as far as there are samples.
        num_steps: Latents per line, both ends included.
        class_names: By modality, where classes have names.
    """
    shown = _first(inputs, model, 2 * num_pairs)
    means = model.encode(shown, return_mean=True, flatten=True).z
    # A single sample is interpolated with itself.
    means = means if len(means) > 1 else means.expand(2, -1)
    weights = torch.linspace(0, 1, num_steps, device=means.device, dtype=means.dtype)[:, None]
    rows = []
    for pair in range(min(num_pairs, len(means) // 2)):
        first, last = means[2 * pair], means[2 * pair + 1]
        decoded = model.decode(first + weights * (last - first))
        rows += [_Row(name, f"line {pair + 1}", _expected(model, decoded, name), False) for name in decoded]
    return _draw_grid(model, rows, "Between two samples, along a straight line in the latent space", class_names)


def projection_figure(latents: Tensor, labels: Tensor | None, title: str, class_names: Sequence[str] = ()) -> Figure:
    """Latents in the plane of their two principal components, coloured by class.

    Args:
        latents: (n, D), n >= 1; rows that are not finite are left out.
        labels: int64 (n,); None: one colour.
        title: Above the figure.
        class_names: Of the labels; a label beyond them is shown as its number.
    """
    from matplotlib.figure import Figure

    points, shares, kept = principal_components(latents)
    figure = Figure(figsize=(6.2, 5.0), dpi=150, facecolor="white")
    axes = figure.add_subplot()
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], s=7, color=_MODEL_COLOR, linewidths=0)
    else:
        classes = labels.cpu()[kept].numpy()
        for number in np.unique(classes):
            color = _CLASS_COLORS[number % len(_CLASS_COLORS)]
            chosen = points[classes == number]
            axes.scatter(chosen[:, 0], chosen[:, 1], s=7, color=color, linewidths=0, label=str(number))
        if 1 < len(np.unique(classes)) <= _MAX_BARS:
            legend = axes.legend(
                loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, markerscale=2
            )
            # Afterwards: as the label of an artist, a name that begins with _ would be left out.
            for entry, number in zip(legend.get_texts(), np.unique(classes), strict=True):
                entry.set_parse_math(False)
                entry.set_text(_class_text(class_names, number, _LEGEND_COLUMNS))
    for axis, share, number in zip((axes.xaxis, axes.yaxis), shares, (1, 2), strict=True):
        text = f"principal component {number} ({100 * share:.0f} % of the variance)"
        axis.set_label_text(text, fontsize=8, color=_MUTED)
    axes.set_title(title, fontsize=11, color=_INK, fontweight="bold", loc="left")
    _tidy(axes)
    figure.tight_layout()
    return figure


def principal_components(latents: Tensor) -> tuple[np.ndarray, tuple[float, float], Tensor]:
    """Two principal components by singular values, in float64, with signs fixed by the largest loading.

    Args:
        latents: (n, D).

    Returns:
        Coordinates (kept, 2) (zero where there is no such component), the shares of the variance, and which rows are
        finite and kept, bool (n,).
    """
    values = latents.detach().double().cpu()
    kept = torch.isfinite(values).all(1)
    centred = values[kept] - values[kept].mean(0)
    coordinates, shares = np.zeros((len(centred), 2)), [0.0, 0.0]
    if len(centred) > 0 and centred.abs().max() > 0:
        _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
        for number in range(min(2, len(singular))):
            direction = directions[number]
            direction = direction * torch.sign(direction[direction.abs().argmax()])
            coordinates[:, number] = (centred @ direction).numpy()
            shares[number] = (singular[number].square() / singular.square().sum()).item()
    return coordinates, (shares[0], shares[1]), kept


# Title, keys of `metrics.jsonl` (`<modality>` stands for all); drawn if one of them was recorded.
_CURVES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Loss (nats per sample)", ("loss/total", "eval/loss/total")),
    ("ELBO (nats per sample)", ("elbo", "eval/elbo")),
    ("Reconstruction", ("loss/reconstruction/",)),
    ("KL to the prior", ("loss/kl_prior", "eval/loss/kl_prior")),
    ("KL to the unimodal posteriors", ("loss/kl_unimodal/",)),
    ("Accuracy of generated modalities", ("eval/accuracy/",)),
)


def learning_curves_figure(records: Iterable[dict[str, Any]]) -> Figure | None:
    """Losses and held-out metrics over the global step; None if nothing was recorded.

    Args:
        records: Of `metrics.jsonl`. Values that are not finite are left out.
    """
    from matplotlib.figure import Figure

    series: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for key, value in record.items():
            if isinstance(value, float) and np.isfinite(value):
                series.setdefault(key, []).append((record["global_step"], value))
    panels = [
        (title, [key for pattern in patterns for key in sorted(series) if _is_curve(key, pattern)])
        for title, patterns in _CURVES
    ]
    panels = [(title, keys) for title, keys in panels if keys]
    if not panels:
        return None
    num_rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(10, 2.7 * num_rows), dpi=150, facecolor="white")
    for number, (title, keys) in enumerate(panels):
        axes = figure.add_subplot(num_rows, 2, number + 1)
        for index, key in enumerate(keys):
            steps, values = zip(*sorted(series[key]), strict=True)
            style: dict[str, Any] = (
                {"marker": "o", "markersize": 3, "linestyle": "--"} if key.startswith("eval/") else {}
            )
            axes.plot(
                steps, values, color=_CLASS_COLORS[index % len(_CLASS_COLORS)], linewidth=1.2, label=key, **style
            )
        axes.set_title(title, fontsize=9, color=_INK, loc="left")
        axes.legend(fontsize=6, frameon=False)
        _tidy(axes)
    figure.supxlabel("global step", fontsize=8, color=_MUTED)
    figure.tight_layout()
    return figure


def _is_curve(key: str, pattern: str) -> bool:
    return key.startswith(pattern) if pattern.endswith("/") else key == pattern


def _tidy(axes: Axes) -> None:
    axes.tick_params(labelsize=7, colors=_MUTED)
    for spine in axes.spines.values():
        spine.set_color(_FAINT)


def save_png(figure: Figure, path: str | Path) -> None:
    """Write the figure as PNG; a reader sees the old file or the complete new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of matplotlib in the metadata, equal figures are equal files.
    metadata: dict[str, Any] = {"Software": None}
    with writing_atomic(path) as file:
        figure.savefig(file, format="png", metadata=metadata)

"""Pictures of what the model does: reconstructions, cross-modal generation, samples of the prior.

Modalities are drawn by what they are: images as pictures, categorical ones as bars with the most probable
class, everything else as lines. Drawing uses matplotlib's object interface, so that nothing global (backend,
current figure) is touched and figures are freed when they go out of scope.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from jmvae_dist.errors import ConfigError
from jmvae_dist.files import writing_atomic
from jmvae_dist.kernels.noise import Stream, normal_noise
from jmvae_dist.model import JMVAE
from jmvae_dist.model.likelihoods import Likelihood

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#1f2933"
_MUTED = "#7b8794"
_DATA_COLOR = "#7b8794"
_MODEL_COLOR = "#2563a8"
_FAINT = "#d3dae1"
_CELL_INCHES = 0.78
_LABEL_INCHES = 1.55
_MAX_BARS = 24


@dataclass(frozen=True)
class _Row:
    """One row of pictures: a modality of several samples, from the data or from the model."""

    modality: str
    label: str
    values: np.ndarray  # (n, *shape), expected values
    from_data: bool


def _is_picture(shape: tuple[int, ...]) -> bool:
    """Grey (H, W) or (1, H, W), or colour (3, H, W); tiny arrays are rather feature tables."""
    return (len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))) and min(shape[-2:]) >= 4


def _draw_picture(axes: Axes, value: np.ndarray, limits: tuple[float, float], ink_on_paper: bool) -> None:
    low, high = limits
    if value.ndim == 3 and value.shape[0] == 3:
        axes.imshow(np.clip((value.transpose(1, 2, 0) - low) / max(high - low, 1e-12), 0, 1))
    else:
        # Probabilities of ink are drawn dark on light; measured grey values keep their meaning: bright is
        # large.
        color_map = "gray_r" if ink_on_paper else "gray"
        axes.imshow(value.reshape(value.shape[-2:]), cmap=color_map, vmin=low, vmax=high, interpolation="nearest")


def _draw_classes(axes: Axes, value: np.ndarray, color: str) -> None:
    """Probabilities of one variable as bars, the most probable class in colour and named above."""
    best = int(value.argmax())
    if len(value) <= _MAX_BARS:
        colors = [color if index == best else _FAINT for index in range(len(value))]
        axes.bar(range(len(value)), value, width=0.8, color=colors)
        axes.axhline(0, color=_FAINT, linewidth=0.6)
    axes.set_ylim(0, 1.75)
    axes.set_xlim(-0.8, min(len(value), _MAX_BARS) - 0.2)
    text = str(best) if value[best] > 0.995 else f"{best}  {100 * value[best]:.0f}%"
    axes.text(0.5, 0.98, text, transform=axes.transAxes, ha="center", va="top", fontsize=8, color=_INK)


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


def _draw_cell(axes: Axes, row: _Row, column: int, likelihood: Likelihood, limits: tuple[float, float]) -> None:
    value, color = row.values[column], _DATA_COLOR if row.from_data else _MODEL_COLOR
    if likelihood.name == "categorical" and value.ndim == 1:
        _draw_classes(axes, value, color)
    elif _is_picture(value.shape):
        _draw_picture(axes, value, limits, ink_on_paper=likelihood.name in ("bernoulli", "categorical"))
    else:
        _draw_line(axes, value, limits, color)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(_is_picture(value.shape) and likelihood.name != "categorical")
        spine.set_color(_FAINT)
        spine.set_linewidth(0.6)


def _draw_grid(model: JMVAE, rows: list[_Row], title: str) -> Figure:
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
            _draw_cell(axes, row, column, model.likelihoods[row.modality], limits[row.modality])
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
def reconstruction_figure(model: JMVAE, inputs: dict[str, Tensor], *, max_samples: int = 10) -> Figure:
    """Every modality of some samples, and its reconstruction from the joint posterior's mean.

    Args:
        model: In evaluation mode.
        inputs: Every modality, (B, *shape); the first `max_samples` are shown.
        max_samples: Number of columns.
    """
    shown = _first(inputs, model, max_samples)
    decoded = model.decode(model.encode(shown, return_mean=True, flatten=True))
    rows = []
    for name in model.modalities:
        rows.append(_Row(name, "data", _as_array(shown[name]), True))
        rows.append(_Row(name, "reconstruction", _expected(model, decoded, name), False))
    return _draw_grid(model, rows, "Reconstruction from all modalities")


@torch.no_grad()
def cross_modal_figure(
    model: JMVAE,
    inputs: dict[str, Tensor],
    given: str | Iterable[str],
    *,
    max_samples: int = 10,
    num_draws: int = 3,
    seed: int = 0,
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
    return _draw_grid(model, rows, f"{' and '.join(generated)} generated from {' and '.join(names)}")


@torch.no_grad()
def prior_samples_figure(model: JMVAE, *, num_samples: int = 10, num_lines: int = 4, seed: int = 0) -> Figure:
    """Samples of the prior, decoded into every modality; the modalities of a column belong together.

    Args:
        model: In evaluation mode.
        num_samples: Number of columns.
        num_lines: Lines of samples.
        seed: Seed of the samples.
    """
    device = next(model.parameters()).device
    rows = []
    for line in range(num_lines):
        numbers = torch.arange(line * num_samples, (line + 1) * num_samples, device=device)
        noise = normal_noise(seed, 0, numbers, model.latent_dim, Stream.PRIOR)
        decoded = model.decode(model.generate_from_prior(num_samples, noise=noise))
        rows += [_Row(name, f"samples {line + 1}", _expected(model, decoded, name), False) for name in decoded]
    return _draw_grid(model, rows, "Samples of the prior")


def save_png(figure: Figure, path: str | Path) -> None:
    """Write the figure as PNG; a reader sees the old file or the complete new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of matplotlib in the metadata, equal figures are equal files.
    metadata: dict[str, Any] = {"Software": None}
    with writing_atomic(path) as file:
        figure.savefig(file, format="png", metadata=metadata)

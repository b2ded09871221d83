"""The curves of a run, for its report: which are drawn together, thinned to what can be seen of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from jmvae_dist.tracking.report_data import RunData, Series

_MAX_POINTS = 2000
COLOURS = 8  # of the page: --c0 to --c7 in report_assets
_GIB = 1 << 30

# Section, title of the chart, keys, all in the order of the page. A key that ends in "/" stands for all below it.
_CHARTS: list[tuple[str, str, tuple[str, ...]]] = [
    ("Objective", "Loss (nats per sample)", ("loss/total", "eval/loss/total")),
    ("Objective", "ELBO (nats per sample)", ("elbo", "eval/elbo")),
    ("Objective", "Reconstruction", ("loss/reconstruction", "eval/loss/reconstruction")),
    (
        "Objective",
        "Reconstruction by modality",
        ("loss/reconstruction/", "eval/loss/reconstruction/"),
    ),
    ("Objective", "KL to the prior", ("loss/kl_prior", "eval/loss/kl_prior")),
    (
        "Objective",
        "KL to the unimodal posteriors",
        ("loss/kl_unimodal", "loss/kl_unimodal/", "eval/loss/kl_unimodal", "eval/loss/kl_unimodal/"),
    ),
    ("Held-out evaluation", "Log-likelihood", ("eval/log_likelihood/",)),
    ("Held-out evaluation", "Joint negative log-likelihood", ("eval/joint_nll",)),
    ("Held-out evaluation", "Marginal negative log-likelihood", ("eval/marginal_nll/",)),
    ("Held-out evaluation", "Accuracy of generated modalities", ("eval/accuracy/",)),
    ("Held-out evaluation", "Coherence by number of given modalities", ("eval/coherence_by_size/",)),
    ("Held-out evaluation", "Linear probe by number of given modalities", ("eval/probe_by_size/",)),
    ("Schedules", "Annealing factor of the KL terms", ("schedule/annealing",)),
    ("Schedules", "Learning rate", ("schedule/learning_rate",)),
    ("Machine", "Throughput (samples/s)", ("speed/samples_per_s",)),
    ("Machine", "Share of the time spent waiting for data", ("speed/data_wait_fraction",)),
    ("Machine", "Goodput (productive share of the wall time so far)", ("goodput/fraction",)),
    ("Machine", "Memory (GiB)", ("memory/",)),
    ("Machine", "Gradient norm", ("grad_norm",)),
]
# Not charted: where the run is, and what belongs to another number. All that begin so.
_UNCHARTED = (
    "global_step",
    "samples_seen",
    "epoch",
    "time_s",
    "goodput/",  # seconds: shown by category in a section of their own
    "eval/samples",
    # What `evaluate` measures in detail, mostly once: in a table of its own.
    *(
        f"eval/{name}"
        for name in (
            *("joint_nll_", "marginal_nll_", "conditional_nll", "coherence/", "probe/"),
            *("classifier_accuracy/", "reconstruction/", "latent/", "posterior_collapse", "modality_collapse/"),
            *("frechet/", "frechet_extractor/"),
        )
    ),
)


def downsample(
    steps: Iterable[float], values: Iterable[float], limit: int = _MAX_POINTS
) -> tuple[list[float], list[float]]:
    """Thin a curve to at most `limit` (at least 4) points that look the same.

    The first and the last point stay, and of every stretch between them the lowest, the highest and a value
    that is not finite, if there is one: no spike and no gap disappears.
    """
    xs, ys = list(steps), list(values)
    if len(xs) <= limit:
        return xs, ys
    # Up to three points of each stretch, and the two ends.
    stretches = max(1, (limit - 2) // 3)
    kept = {0, len(xs) - 1}
    for index in range(stretches):
        start, stop = index * len(xs) // stretches, (index + 1) * len(xs) // stretches
        finite = [position for position in range(start, stop) if math.isfinite(ys[position])]
        if finite:
            kept |= {min(finite, key=ys.__getitem__), max(finite, key=ys.__getitem__)}
        if len(finite) < stop - start:
            kept.add(next(position for position in range(start, stop) if not math.isfinite(ys[position])))
    order = sorted(kept)
    return [xs[position] for position in order], [ys[position] for position in order]


def make_charts(data: RunData) -> list[dict[str, Any]]:
    """All charts as JSON values, in the order of the page; what no chart is named for gets one of its own."""
    charts: list[dict[str, Any]] = []
    used = {name for name in data.series if name.startswith(_UNCHARTED)}
    for section, title, patterns in _CHARTS:
        names = [name for pattern in patterns for name in _matching(data.series, pattern)]
        used |= set(names)
        series = _make_series(data, names) + _planned(data, names)
        if series:
            charts.append({"section": section, "title": title, "series": series, "log": False})
    for name in sorted(set(data.series) - used):
        series = _make_series(data, [name])
        charts.append({"section": "Other metrics", "title": name, "series": series, "log": False})
    return charts


def _matching(series: dict[str, Series], pattern: str) -> list[str]:
    if pattern.endswith("/"):
        return sorted(name for name in series if name.startswith(pattern))
    return [pattern] if pattern in series else []


def _make_series(data: RunData, names: list[str]) -> list[dict[str, Any]]:
    made = []
    for index, name in enumerate(names):
        kind = "eval" if name.startswith("eval/") else "train"
        unit = _GIB if name.startswith("memory/") else 1
        values = [value / unit for value in data.series[name].values]
        xs, ys = downsample(data.series[name].steps, values)
        not_finite = sum(not math.isfinite(value) for value in values)
        made.append(_series_json(name, kind, index % COLOURS, xs, ys, not_finite))
    return made


def _planned(data: RunData, names: list[str]) -> list[dict[str, Any]]:
    """The schedule over the whole run, below what was done of it."""
    made = []
    for name in names:
        steps = data.schedule.get("global_step", [])
        values = data.schedule.get(name.removeprefix("schedule/"), [])
        if name.startswith("schedule/") and values and len(steps) == len(values):
            xs, ys = downsample(steps, values)
            made.append(_series_json("planned", "planned", COLOURS - 1, xs, ys, 0))
    return made


def _series_json(
    name: str, kind: str, colour: int, xs: list[float], ys: list[float], not_finite: int
) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "colour": colour,
        "x": [int(x) for x in xs],
        "y": [float(f"{y:.7g}") if math.isfinite(y) else None for y in ys],
        "not_finite": not_finite,
    }

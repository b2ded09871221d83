"""`report.html`: one self-contained page about a run, finished or not.

The page is made from what is on disk (see docs/tracking.md) and loads nothing: no network, no other file. All
values are untrusted: text is escaped, data are embedded as JSON that cannot end its element, and a content
security policy forbids every connection. A source that is missing or damaged is left out with a note.
"""

from __future__ import annotations

import base64
import contextlib
import html
import itertools
import json
import math
import statistics
import sys
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jmvae_dist.errors import ConfigError, DataError
from jmvae_dist.files import write_text_atomic
from jmvae_dist.progress import format_bytes, format_duration
from jmvae_dist.tracking.jsonl import iterate_records, newest_values
from jmvae_dist.tracking.ledger import CATEGORIES, AttemptSummary, RunSummary, read_attempts, summarize
from jmvae_dist.tracking.report_assets import SCRIPT, STYLE

if TYPE_CHECKING:
    from typing import TypeGuard

_MAX_POINTS = 2000
_MAX_TEXT_BYTES = 4 << 20
_MAX_FIGURE_BYTES = 8 << 20
_MAX_FIGURES_BYTES = 40 << 20
_MAX_ATTEMPTS = 100
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOURS = 8
_GIB = 1 << 30
_CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

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


@dataclass
class Series:
    """One metric over the global step."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def sort(self) -> None:
        """Order the points by step: an old checkpoint may have been evaluated after newer ones."""
        if any(step > following for step, following in itertools.pairwise(self.steps)):
            order = sorted(range(len(self.steps)), key=self.steps.__getitem__)
            self.steps = array("d", (self.steps[place] for place in order))
            self.values = array("d", (self.values[place] for place in order))


@dataclass
class RunData:
    """What the run directory holds; None and empty where it does not."""

    run_dir: Path
    notes: list[str] = field(default_factory=list)
    series: dict[str, Series] = field(default_factory=dict)
    last_values: dict[str, Any] = field(default_factory=dict)
    last_step: int = 0
    last_change_s: float | None = None
    config_text: str | None = None
    total_steps: int | None = None
    schedule: dict[str, list[float]] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    suite: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    checkpoints: list[tuple[str, str, str]] = field(default_factory=list)
    figures: list[tuple[str, bytes]] = field(default_factory=list)
    ledger: RunSummary = field(default_factory=lambda: summarize([]))

    @property
    def metrics(self) -> dict[str, Any]:
        """The final evaluation's metrics, without the prefix `eval/`."""
        metrics = (self.evaluation or {}).get("metrics")
        metrics = metrics if isinstance(metrics, dict) else {}
        return {str(name).removeprefix("eval/"): value for name, value in metrics.items()}

    @property
    def is_evaluated_later(self) -> bool:
        """Whether the run has gone on after its final evaluation, and was evaluated again."""
        step = (self.evaluation or {}).get("global_step")
        newest = max(
            (series.steps[-1] for name, series in self.series.items() if name.startswith("eval/")), default=0
        )
        return isinstance(step, int) and step < newest

    @property
    def is_complete(self) -> bool:
        return self.total_steps is not None and self.last_step >= self.total_steps


def headline(run_dir: Path) -> list[str]:
    """The numbers of the newest evaluation of a run, one line each; nothing if there was none."""
    numbers = _evaluation_numbers(collect(Path(run_dir)))
    return [f"{label}: {value}{' ' + addition if addition else ''}" for value, label, addition in numbers]


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run and return its path.

    Args:
        run_dir: The run directory; at least `config.yaml` or `metrics.jsonl` must be there.
        out: Where to write; by default `run_dir/report.html`, which is replaced in one step.

    Raises:
        ConfigError: `run_dir` is not a run directory, or `out` cannot be written.
    """
    run_dir = Path(run_dir)
    if not any((run_dir / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise ConfigError(f"{run_dir}: not a run directory (it has neither config.yaml nor metrics.jsonl)")
    out = run_dir / "report.html" if out is None else Path(out)
    page = render(collect(run_dir))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(out, page)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from error
    return out


# Reading


def collect(run_dir: Path) -> RunData:
    """Read everything that the report shows."""
    data = RunData(run_dir)
    _read_metrics(data)
    _read_config(data)
    schedule = _read_json(data, "schedule.json") or {}
    data.schedule = {
        str(name): [float(value) for value in values]
        for name, values in schedule.items()
        if isinstance(values, list) and all(_is_number(value) and math.isfinite(value) for value in values)
    }
    planned = data.schedule.get("global_step")
    if data.total_steps is None and planned:
        data.total_steps = int(planned[-1])
    data.evaluation = _read_json(data, "evaluation.json")
    data.suite = _read_json(data, "evaluation/latest.json")
    data.environment = _read_json(data, "environment.json")
    _read_checkpoints(data)
    _read_figures(data)
    data.ledger = summarize(read_attempts(run_dir, data.notes.append))
    return data


def _read_metrics(data: RunData) -> None:
    path = data.run_dir / "metrics.jsonl"
    if not path.is_file():
        data.notes.append("There is no metrics.jsonl: no step was logged yet.")
        return
    data.last_change_s = path.stat().st_mtime
    data.last_values = newest_values(_noted(data, path))
    for series in data.series.values():
        series.sort()


def _noted(data: RunData, path: Path) -> Iterator[dict[str, Any]]:
    """The records, each of which has gone into the series when it is yielded."""
    try:
        for record in iterate_records(path):
            step = record["global_step"]
            data.last_step = max(step, data.last_step)
            for name, value in record.items():
                if _is_number(value):
                    series = data.series.setdefault(name, Series())
                    series.steps.append(step)
                    series.values.append(value)
            yield record
    except DataError as error:
        data.notes.append(f"The record is damaged, and shown up to there: {error}")


def _read_config(data: RunData) -> None:
    data.config_text = _read_text(data, "config.yaml")
    if data.config_text is None:
        return
    import yaml

    try:
        steps = yaml.safe_load(data.config_text)["training"]["steps"]
    # ValueError: what looks like a date or a number but is none, such as 2026-13-01.
    except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError):
        return
    if isinstance(steps, int) and steps > 0:
        data.total_steps = steps


def _read_text(data: RunData, name: str) -> str | None:
    path = data.run_dir / name
    if _is_irregular(path):
        data.notes.append(f"{name} is left out: not a regular file.")
        return None
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_TEXT_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        data.notes.append(f"{name} cannot be read: {error.strerror}")
        return None
    if len(content) > _MAX_TEXT_BYTES:
        data.notes.append(f"{name} is larger than {_MAX_TEXT_BYTES >> 20} MiB and is left out.")
        return None
    return content.decode("utf-8", errors="replace")


def _is_irregular(path: Path) -> bool:
    """Whether a path is there but no regular file: a pipe would be waited for, a device read, for ever."""
    return path.exists() and not path.is_file()


def _read_json(data: RunData, name: str) -> dict[str, Any] | None:
    text = _read_text(data, name)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        data.notes.append(f"{name} is damaged and left out.")
        return None
    return value


def _read_checkpoints(data: RunData) -> None:
    for directory in sorted((data.run_dir / "checkpoints").glob("step-*")):
        # A checkpoint without its manifest, or whose files vanish while they are counted, is being deleted.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            written_s = (directory / "manifest.json").stat().st_mtime
            size_bytes = sum(path.stat().st_size for path in directory.iterdir())
            written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(written_s))
            data.checkpoints.append((directory.name, format_bytes(size_bytes), written))


def _read_figures(data: RunData) -> None:
    left_bytes = _MAX_FIGURES_BYTES
    for path in sorted((data.run_dir / "figures").glob("*.png")):
        if _is_irregular(path):
            data.notes.append(f"Figure {path.name} is left out: not a regular file.")
            continue
        try:
            size_bytes = path.stat().st_size
            if size_bytes > min(_MAX_FIGURE_BYTES, left_bytes):
                data.notes.append(f"Figure {path.name} is left out: too large for the page.")
                continue
            content = path.read_bytes()
        except OSError as error:
            data.notes.append(f"Figure {path.name} cannot be read: {error.strerror}")
            continue
        if not content.startswith(_PNG_SIGNATURE):
            data.notes.append(f"Figure {path.name} is left out: not a PNG file.")
            continue
        left_bytes -= len(content)
        data.figures.append((path.stem, content))


# Curves


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


def _make_charts(data: RunData) -> list[dict[str, Any]]:
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
        made.append(_series_json(name, kind, index % _COLOURS, xs, ys, not_finite))
    return made


def _planned(data: RunData, names: list[str]) -> list[dict[str, Any]]:
    """The schedule over the whole run, below what was done of it."""
    made = []
    for name in names:
        steps = data.schedule.get("global_step", [])
        values = data.schedule.get(name.removeprefix("schedule/"), [])
        if name.startswith("schedule/") and values and len(steps) == len(values):
            xs, ys = downsample(steps, values)
            made.append(_series_json("planned", "planned", _COLOURS - 1, xs, ys, 0))
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


# Writing


def render(data: RunData) -> str:
    """The page as HTML."""
    charts = _make_charts(data)
    name = html.escape(data.run_dir.absolute().name)
    # "<" could end the element that holds the data; as an escape it is the same JSON.
    chart_json = json.dumps(charts, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    body = "\n".join(
        part
        for part in (
            _render_header(data),
            _render_numbers(data),
            _render_notes(data),
            _render_charts(charts),
            _render_figures(data),
            _render_evaluation(data),
            _render_suite(data),
            _render_ledger(data.ledger),
            _render_checkpoints(data),
            _render_table("Environment", data.environment, "environment.json"),
            _render_config(data),
        )
        if part
    )
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_CONTENT_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} - training report</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
<noscript><p class="note">The curves need JavaScript; all of it is in this file.</p></noscript>
<footer>Written {written} from the files of the run.</footer>
</main>
<script type="application/json" id="chart-data">{chart_json}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _render_header(data: RunData) -> str:
    facts = []
    if data.total_steps is None:
        label, state, share = f"step {data.last_step:,}", "partial", None
    else:
        share = min(1.0, data.last_step / data.total_steps)
        steps = f"{data.last_step:,} of {data.total_steps:,} steps"
        label, state = ("complete", "complete") if data.is_complete else (f"{100 * share:.1f} %", "partial")
        facts.append(steps)
    if not data.is_complete and data.last_change_s is not None:
        changed = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(data.last_change_s))
        facts.append(f"running or stopped; last record {changed}")
    spans = "".join(f"<span>{html.escape(fact)}</span>" for fact in facts)
    bar = "" if share is None else f'<div class="bar"><i style="width:{100 * share:.2f}%"></i></div>'
    return (
        f"<h1>{html.escape(data.run_dir.absolute().name)}</h1>\n"
        f'<div class="status"><span class="pill {state}">{html.escape(label)}</span>{spans}</div>\n{bar}'
    )


def _render_numbers(data: RunData) -> str:
    numbers = _evaluation_numbers(data)
    speed = data.series.get("speed/samples_per_s")
    if speed and (finite := [value for value in speed.values if math.isfinite(value)]):
        numbers.append((f"{statistics.median(finite):,.0f}", "samples/s (median)", ""))
    for name, label in (("samples_seen", "samples seen"), ("epoch", "epochs")):
        value = data.last_values.get(name)
        if _is_number(value):
            numbers.append((f"{value:,.0f}" if name == "samples_seen" else _format_number(value), label, ""))
    elapsed_s = data.last_values.get("time_s")
    if _is_number(elapsed_s) and math.isfinite(elapsed_s):
        numbers.append((format_duration(elapsed_s), "training time", ""))
    if data.ledger.wall_s > 0:
        wall = f"of {format_duration(data.ledger.wall_s)}"
        numbers.append((f"{100 * data.ledger.goodput:.1f} %", "goodput: productive share of the wall time", wall))
    tiles = "".join(
        f'<div class="number"><b>{html.escape(value)}{f" <small>{html.escape(extra)}</small>" if extra else ""}'
        f"</b><span>{html.escape(label)}</span></div>"
        for value, label, extra in numbers
    )
    return f'<div class="numbers">{tiles}</div>' if tiles else ""


def _evaluation_numbers(data: RunData) -> list[tuple[str, str, str]]:
    """(value, label, addition) of ELBO, joint NLL and accuracies: final evaluation, else the latest values."""
    metrics, origin = data.metrics, "final evaluation"
    if not metrics or data.is_evaluated_later:
        latest = {name: value for name, value in data.last_values.items() if name.startswith("eval/")}
        metrics = {name.removeprefix("eval/"): value for name, value in latest.items()}
        origin = "latest evaluation"
    numbers = []
    if _is_number(metrics.get("elbo")):
        numbers.append((_format_number(metrics["elbo"]), f"ELBO, {origin}", "nats"))
    elif _is_number(data.last_values.get("elbo")):
        numbers.append((_format_number(data.last_values["elbo"]), "ELBO, last training record", "nats"))
    if _is_number(metrics.get("joint_nll")):
        error = metrics.get("joint_nll_stderr")
        extra = f"± {_format_number(error)}" if _is_number(error) else ""
        draws = metrics.get("joint_nll_samples")
        unit = f"nats, K = {draws:.0f}" if _is_number(draws) and math.isfinite(draws) else "nats"
        numbers.append((_format_number(metrics["joint_nll"]), f"joint NLL ({unit}), {origin}", extra))
    for name, value in sorted(metrics.items()):
        if name.startswith("accuracy/") and _is_number(value):
            label = name.removeprefix("accuracy/").replace("/from_", " from ")
            numbers.append((f"{100 * value:.1f} %", f"accuracy: {label}", ""))
    return numbers


def _render_notes(data: RunData) -> str:
    return "".join(f'<p class="note">{html.escape(note)}</p>' for note in data.notes)


def _render_charts(charts: list[dict[str, Any]]) -> str:
    if not charts:
        return '<h2>Curves</h2><p class="note">Nothing was logged yet.</p>'
    parts: list[str] = []
    section = None
    for index, chart in enumerate(charts):
        if chart["section"] != section:
            parts.append(("</div>" if section else "") + f'<h2>{chart["section"]}</h2><div class="grid">')
            section = chart["section"]
        title = html.escape(chart["title"])
        parts.append(f'<div class="card chart" id="chart-{index}"><header><h3>{title}</h3></header></div>')
    return "\n".join([*parts, "</div>"])


def _render_figures(data: RunData) -> str:
    if not data.figures:
        return '<h2>Figures</h2><p class="note">There are no figures.</p>'
    cards = "".join(
        f'<figure class="card"><figcaption>{html.escape(name)}</figcaption>'
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(content).decode()}"></figure>'
        for name, content in data.figures
    )
    return f'<h2>Figures</h2><div class="grid">{cards}</div>'


def _render_evaluation(data: RunData) -> str:
    if not data.metrics:
        return '<h2>Final evaluation</h2><p class="note">There is no final evaluation (evaluation.json).</p>'
    evaluation = data.evaluation or {}
    facts = [f"step {evaluation['global_step']}"] if "global_step" in evaluation else []
    facts += [f"{evaluation['num_samples']} samples"] if "num_samples" in evaluation else []
    facts += [f"{evaluation['manifest']}"] if "manifest" in evaluation else []
    return f'{_render_table("Final evaluation", data.metrics, "")}<p class="note">{html.escape(", ".join(facts))}</p>'


def _render_suite(data: RunData) -> str:
    """What `jmvae-dist evaluate` measured last, if it was asked to."""
    metrics = (data.suite or {}).get("metrics")
    if data.suite is None or not isinstance(metrics, dict):
        return ""
    plain = {str(name).removeprefix("eval/"): value for name, value in metrics.items()}
    origin = f"step {data.suite.get('global_step')}, {data.suite.get('manifest')}"
    return f'{_render_table("Evaluation suite", plain, "")}<p class="note">{html.escape(origin)}</p>'


def _render_ledger(ledger: RunSummary) -> str:
    """Where the time went: a bar of all categories, their numbers, and the attempts."""
    title = "<h2>Where the time went</h2>"
    wall_s = ledger.wall_s
    if wall_s <= 0:
        return f'{title}<p class="note">There is no ledger (attempts/).</p>'
    parts, rows = [], []
    for index, (name, label) in enumerate(CATEGORIES.items()):
        share, colour = 100 * ledger.seconds[name] / wall_s, f"background:var(--c{index % _COLOURS})"
        parts.append(f'<i style="width:{share:.3f}%;{colour}" title="{label}: {share:.1f} %"></i>')
        rows.append(
            f'<tr><td><i class="mark" style="{colour}"></i>{label}</td>'
            f'<td class="value">{format_duration(ledger.seconds[name])}</td><td class="value">{share:.1f} %</td></tr>'
        )
    total = f'<tr><td>wall time</td><td class="value">{format_duration(wall_s)}</td><td class="value">100 %</td></tr>'
    facts = f"{len(ledger.attempts)} attempt(s), {ledger.recomputed_steps:,} step(s) taken again"
    return (
        f'{title}<div class="card"><div class="stack">{"".join(parts)}</div>'
        f'<table>{"".join(rows)}{total}</table></div><p class="note">{facts}; as rank 0 saw it.</p>'
        f"{_render_attempts(ledger.attempts)}"
    )


def _render_attempts(attempts: Sequence[AttemptSummary]) -> str:
    names = ("Attempt", "Started", "Lasted", "Before it", "Steps", "Taken again", "Ended", "Where")
    rows = []
    for item in attempts[-_MAX_ATTEMPTS:]:
        attempt = item.attempt
        started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(attempt.started_s))
        steps = "none" if attempt.first_step is None else f"{attempt.first_step:,} to {attempt.last_step:,}"
        job = f", job {attempt.slurm['job_id']}" if "job_id" in attempt.slurm else ""
        hosts = attempt.slurm.get("node_list") or ", ".join(attempt.hosts)
        where = f"{attempt.world_size} x {attempt.engine} on {hosts} ({attempt.launcher}{job})"
        durations = (format_duration(seconds) for seconds in (attempt.wall_s, item.restart_s))
        cells = (attempt.number, started, *durations, steps, f"{attempt.recomputed_steps:,}", item.outcome, where)
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<div class="card"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _render_checkpoints(data: RunData) -> str:
    if not data.checkpoints:
        return '<h2>Checkpoints</h2><p class="note">There are no checkpoints.</p>'
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="value">{html.escape(size)}</td><td>{written}</td></tr>'
        for name, size, written in data.checkpoints
    )
    head = "<tr><th>Name</th><th>Size</th><th>Written</th></tr>"
    return f'<h2>Checkpoints</h2><div class="card"><table>{head}{rows}</table></div>'


def _render_table(title: str, values: dict[str, Any] | None, source: str) -> str:
    if not values:
        return f'<h2>{title}</h2><p class="note">There is no {source}.</p>'
    rows = []
    for name, value in sorted(values.items()):
        text = _format_number(value) if _is_number(value) else str(value)
        rows.append(f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(text)}</td></tr>")
    return f'<h2>{title}</h2><div class="card"><table>{"".join(rows)}</table></div>'


def _render_config(data: RunData) -> str:
    if data.config_text is None:
        return '<h2>Configuration</h2><p class="note">There is no config.yaml.</p>'
    return f'<h2>Configuration</h2><div class="card"><pre>{html.escape(data.config_text)}</pre></div>'


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number that fits in a float, or NaN or infinite."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, float)


def _format_number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if 1000 <= abs(value) < 1e9 else f"{value:.5g}"

"""`report.html`: one self-contained page about a run, finished or not.

The page is made from what is on disk (see docs/tracking.md) and loads nothing: no network, no other file. All
values are untrusted: text is escaped, data are embedded as JSON that cannot end its element, and a content
security policy forbids every connection. A source that is missing or damaged is left out with a note.
"""

from __future__ import annotations

import base64
import html
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jmvae_dist.errors import ConfigError
from jmvae_dist.files import write_text_atomic
from jmvae_dist.progress import format_duration
from jmvae_dist.tracking.ledger import CATEGORIES, AttemptSummary, RunSummary
from jmvae_dist.tracking.report_assets import SCRIPT, STYLE
from jmvae_dist.tracking.report_charts import COLOURS, make_charts
from jmvae_dist.tracking.report_data import RunData, collect, is_number

_MAX_ATTEMPTS = 100
_CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


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


def render(data: RunData) -> str:
    """The page as HTML."""
    charts = make_charts(data)
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
        if is_number(value):
            numbers.append((f"{value:,.0f}" if name == "samples_seen" else _format_number(value), label, ""))
    elapsed_s = data.last_values.get("time_s")
    if is_number(elapsed_s) and math.isfinite(elapsed_s):
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
    if is_number(metrics.get("elbo")):
        numbers.append((_format_number(metrics["elbo"]), f"ELBO, {origin}", "nats"))
    elif is_number(data.last_values.get("elbo")):
        numbers.append((_format_number(data.last_values["elbo"]), "ELBO, last training record", "nats"))
    if is_number(metrics.get("joint_nll")):
        error = metrics.get("joint_nll_stderr")
        extra = f"± {_format_number(error)}" if is_number(error) else ""
        draws = metrics.get("joint_nll_samples")
        unit = f"nats, K = {draws:.0f}" if is_number(draws) and math.isfinite(draws) else "nats"
        numbers.append((_format_number(metrics["joint_nll"]), f"joint NLL ({unit}), {origin}", extra))
    for name, value in sorted(metrics.items()):
        if name.startswith("accuracy/") and is_number(value):
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
        share, colour = 100 * ledger.seconds[name] / wall_s, f"background:var(--c{index % COLOURS})"
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
        text = _format_number(value) if is_number(value) else str(value)
        rows.append(f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(text)}</td></tr>")
    return f'<h2>{title}</h2><div class="card"><table>{"".join(rows)}</table></div>'


def _render_config(data: RunData) -> str:
    if data.config_text is None:
        return '<h2>Configuration</h2><p class="note">There is no config.yaml.</p>'
    return f'<h2>Configuration</h2><div class="card"><pre>{html.escape(data.config_text)}</pre></div>'


def _format_number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if 1000 <= abs(value) < 1e9 else f"{value:.5g}"

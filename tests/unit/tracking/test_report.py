"""The report: true, bounded, self-contained, and safe with whatever the files say."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jmvae_dist.commands.report import main
from jmvae_dist.errors import ConfigError
from jmvae_dist.tracking.jsonl import MetricsLog
from jmvae_dist.tracking.ledger import ATTEMPT_CATEGORIES, Attempt, attempt_path, write_attempt
from jmvae_dist.tracking.report import headline, write_report

HOSTILE = "</script></pre><script>alert('x')</script><img src=x onerror=alert(1)>"
PNG = b"\x89PNG\r\n\x1a\n" + b"not decoded here"


def make_run(run_dir: Path, last_step: int = 100, total_steps: int = 100) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    with MetricsLog(run_dir / "metrics.jsonl") as log:
        for step in range(1, last_step + 1):
            values = {"loss/total": 200.0 / step, "elbo": -200.0 / step, "speed/samples_per_s": 1000.0}
            log.write({"global_step": step, "samples_seen": 8 * step, "time_s": 0.5 * step, **values})
            if step % 50 == 0:
                log.write({"global_step": step, "eval/elbo": -300.0 / step, "eval/accuracy/b/from_a": 0.75})
    (run_dir / "config.yaml").write_text(f"training:\n  steps: {total_steps}\n")
    return run_dir


def charts_of(page: str) -> dict[str, dict[str, Any]]:
    match = re.search(r'<script type="application/json" id="chart-data">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    return {chart["title"]: chart for chart in json.loads(match.group(1))}


def test_complete_run(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    metrics = {"elbo": -104.25, "joint_nll": 98.5, "joint_nll_stderr": 0.25, "accuracy/b/from_a": 0.875}
    metrics["joint_nll_samples"] = 50
    evaluation = {"global_step": 100, "num_samples": 40, "manifest": "test/manifest.json", "metrics": metrics}
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    (run_dir / "environment.json").write_text(json.dumps({"torch": "2.9", "world_size": 4}))
    schedule = {"global_step": [0, 50, 100], "annealing": [0.0, 1.0, 1.0], "learning_rate": [0.1, 0.1, 0.1]}
    (run_dir / "schedule.json").write_text(json.dumps(schedule))
    (run_dir / "figures").mkdir()
    (run_dir / "figures" / "samples.png").write_bytes(PNG)
    checkpoint = run_dir / "checkpoints" / "step-00000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (run_dir / "checkpoints" / "step-00000200").mkdir()

    page = write_report(run_dir).read_text()
    assert "100 of 100 steps" in page
    assert ">complete<" in page
    for text in ("-104.25", "98.5", "K = 50", "± 0.25", "87.5 %", "step-00000100", "2.9", "test/manifest.json"):
        assert text in page
    assert "data:image/png;base64," in page
    assert "step-00000200" not in page
    charts = charts_of(page)
    loss, elbo = charts["Loss (nats per sample)"]["series"][0], charts["ELBO (nats per sample)"]["series"]
    assert (loss["x"][-1], loss["y"][-1]) == (100, 2.0)
    assert [(series["name"], series["kind"], len(series["x"])) for series in elbo] == [
        ("elbo", "train", 100),
        ("eval/elbo", "eval", 2),
    ]


def test_likelihoods_of_modalities_share_a_chart_and_their_errors_have_none(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        values = {"samples": 40.0, "joint_nll": 3.0, "joint_nll_stderr": 0.1}
        values |= {f"marginal_nll{suffix}/{name}": 1.0 for suffix in ("", "_stderr") for name in "ab"}
        log.write({"global_step": 1, **{f"eval/{key}": value for key, value in values.items()}})
    charts = charts_of(write_report(tmp_path).read_text())
    assert {title: [series["name"] for series in chart["series"]] for title, chart in charts.items()} == {
        "Joint negative log-likelihood": ["eval/joint_nll"],
        "Marginal negative log-likelihood": ["eval/marginal_nll/a", "eval/marginal_nll/b"],
    }


def test_an_old_checkpoint_evaluated_last_is_not_the_newest(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    with MetricsLog(run_dir / "metrics.jsonl", 100) as log:
        log.write({"global_step": 20, "eval/elbo": -77.0})
    assert headline(run_dir)[0] == "ELBO, latest evaluation: -3 nats"
    series = charts_of(write_report(run_dir).read_text())["ELBO (nats per sample)"]["series"]
    (held_out,) = (item for item in series if item["kind"] == "eval")
    assert (held_out["x"], held_out["y"]) == ([20, 50, 100], [-77, -6, -3])


@pytest.mark.parametrize(("global_step", "origin"), [(60, "latest"), (100, "final")])
def test_a_final_evaluation_counts_until_the_run_has_gone_on(tmp_path: Path, global_step: int, origin: str) -> None:
    run_dir = make_run(tmp_path)
    evaluation = {"global_step": global_step, "metrics": {"eval/elbo": -5.5}}
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    value = {"latest": "-3", "final": "-5.5"}[origin]
    assert headline(run_dir)[0] == f"ELBO, {origin} evaluation: {value} nats"


def test_where_the_time_went(tmp_path: Path) -> None:
    """Two attempts of 70 s, 60 s apart; the first was killed, the second has something to say."""
    run_dir = make_run(tmp_path)
    for number, (after_s, outcome) in enumerate([(0, None), (130, f"failed: {HOSTILE}")], start=1):
        seconds, started_s = dict.fromkeys(ATTEMPT_CATEGORIES, 10.0), 1.7e9 + after_s
        where = {"hosts": (HOSTILE,), "slurm": {"job_id": HOSTILE}}
        attempt = Attempt(number, started_s, started_s + 70, outcome, seconds=seconds, recomputed_steps=1234, **where)
        write_attempt(run_dir, attempt)
    attempt_path(run_dir, 3).write_text("{")
    page = write_report(run_dir).read_text()
    assert "<script>alert" not in page
    assert "attempt-0003.json: not the file of an attempt" in page
    section = page[page.index("Where the time went") : page.index("<h2>Checkpoints")]
    shares = [float(share) for share in re.findall(r'style="width:([0-9.]+)%', section)]
    assert shares == pytest.approx([10.0] * 6 + [30.0, 10.0])
    assert "2 attempt(s), 2,468 step(s) taken again" in section
    rows = [re.sub("<[^>]*>", "|", row) for row in re.findall("<tr>(.*?)</tr>", section)]
    assert "|||queue and restart||1 min 00 s||30.0 %|" in rows
    assert "|wall time||3 min 20 s||100 %|" in rows
    assert "|1||2023-11-14 22:13:20 UTC||1 min 10 s||0.0 s||none||1,234||died|" in rows[-2]
    assert "|2||2023-11-14 22:15:30 UTC||1 min 10 s||1 min 00 s||none||1,234||failed: &lt;/script" in rows[-1]


def test_planned_schedule_spans_the_whole_run(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, last_step=10)
    with MetricsLog(run_dir / "metrics.jsonl", 10) as log:
        log.write({"global_step": 11, "schedule/learning_rate": 0.1})
    schedule = {"global_step": [0, 100], "learning_rate": [0.1, 0.0]}
    (run_dir / "schedule.json").write_text(json.dumps(schedule))
    done, planned = charts_of(write_report(run_dir).read_text())["Learning rate"]["series"]
    assert (done["x"], planned["x"], planned["kind"]) == ([11], [0, 100], "planned")


def test_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, last_step=37)
    with open(run_dir / "metrics.jsonl", "ab") as file:
        file.write(b'{"global_step": 38, "loss/to')
    page = write_report(run_dir).read_text()
    assert "37.0 %" in page
    assert "running or stopped" in page
    for text in ("There is no final evaluation", "There are no figures", "There are no checkpoints"):
        assert text in page


def test_run_that_has_only_started(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("training: {}\n")
    page = write_report(tmp_path).read_text()
    assert "no step was logged" in page
    assert charts_of(page) == {}


HUGE = "1" + 400 * "0"


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("metrics.jsonl", f'{{"global_step": 1, "loss/total": {HUGE}}}\n', None),
        ("metrics.jsonl", f'{{"global_step": {HUGE}, "elbo": 1}}\n{{"global_step": 2}}\n', "is damaged"),
        ("evaluation.json", f'{{"metrics": {{"eval/elbo": {HUGE}}}}}', None),
        ("schedule.json", '{"global_step": [0, Infinity], "annealing": [0, 1]}', None),
        ("schedule.json", '{"global_step": [0, NaN], "annealing": [0, 1]}', None),
        ("schedule.json", f'{{"global_step": [0, {HUGE}], "annealing": [0, 1]}}', None),
        ("config.yaml", "training: {steps: 2026-13-01}", None),
        ("config.yaml", f"training: {{steps: {HUGE}}}", None),
    ],
)
def test_absurd_numbers_do_not_stop_the_report(tmp_path: Path, name: str, content: str, note: str | None) -> None:
    run_dir = make_run(tmp_path)
    (run_dir / "config.yaml").write_text("training: {}\n")
    (run_dir / name).write_text(content)
    page = write_report(run_dir).read_text()
    charts_of(page)
    assert note is None or note in page


@pytest.mark.parametrize("name", ["config.yaml", "schedule.json", "figures/samples.png"])
def test_pipes_and_devices_are_left_out(tmp_path: Path, name: str) -> None:
    run_dir = make_run(tmp_path)
    (run_dir / "figures").mkdir()
    (run_dir / "figures" / "zeros.png").symlink_to("/dev/zero")
    (run_dir / name).unlink(missing_ok=True)
    os.mkfifo(run_dir / name)
    page = write_report(run_dir).read_text()
    assert f"{Path(name).name} is left out: not a regular file." in page
    assert "zeros.png is left out: not a regular file." in page


def test_a_checkpoint_that_is_deleted_meanwhile_does_not_stop_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(tmp_path)
    for step in ("step-00000050", "step-00000100"):
        (run_dir / "checkpoints" / step).mkdir(parents=True)
        for name in ("manifest.json", "rank-00000.safetensors"):
            (run_dir / "checkpoints" / step / name).write_text("{}")
    listed = Path.iterdir

    def list_then_delete(folder: Path) -> Iterator[Path]:
        paths = list(listed(folder))
        if folder.name == "step-00000050":
            for path in paths:
                path.unlink()
        return iter(paths)

    monkeypatch.setattr(Path, "iterdir", list_then_delete)
    page = write_report(run_dir).read_text()
    assert "step-00000050" not in page
    assert "step-00000100" in page


@pytest.mark.parametrize("content", ["{", "[1, 2]", '"text"', "[" * 100_000, '{"metrics": 3}', ""])
def test_damaged_files_do_not_stop_the_report(tmp_path: Path, content: str) -> None:
    run_dir = make_run(tmp_path)
    for name in ("evaluation.json", "environment.json", "schedule.json", "config.yaml"):
        (run_dir / name).write_text(content)
    (run_dir / "figures").mkdir()
    (run_dir / "figures" / "page.png").write_text("<svg onload=alert(1)>")
    page = write_report(run_dir).read_text()
    assert "not a PNG file" in page
    assert "<svg onload" not in page
    assert len(charts_of(page)["Loss (nats per sample)"]["series"][0]["x"]) == 100


def test_evaluation_with_values_that_are_no_numbers(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    metrics = {
        "eval/elbo": None,
        "eval/joint_nll": 98.5,
        "eval/joint_nll_stderr": "NaN",
        "eval/loss/total": "Infinity",
        "eval/accuracy/b/from_a": None,
        "eval/accuracy/c/from_a": 0.25,
        "eval/samples": True,
    }
    evaluation = {"global_step": None, "num_samples": "many", "manifest": None, "metrics": metrics}
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    page = write_report(run_dir).read_text()
    for text in ("98.5", "25.0 %", "Infinity", "NaN", "accuracy/b/from_a"):
        assert text in page
    assert "ELBO, final evaluation" not in page


def test_damaged_record_is_shown_up_to_the_damage(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_bytes(b"".join([*lines[:20], b"damage\n", *lines[20:]]))
    page = write_report(run_dir).read_text()
    assert "line 21 is damaged" in page
    assert charts_of(page)["Loss (nats per sample)"]["series"][0]["x"][-1] == 20


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    with MetricsLog(run_dir / "metrics.jsonl", 100) as log:
        log.write({"global_step": 101, HOSTILE: 1.0, f"eval/accuracy/{HOSTILE}": 0.5})
    (run_dir / "config.yaml").write_text(f"a: {HOSTILE}\n")
    for name in ("evaluation.json", "environment.json"):
        metrics = {HOSTILE: HOSTILE, f"accuracy/{HOSTILE}": 0.5}
        (run_dir / name).write_text(json.dumps({"metrics": metrics, "manifest": HOSTILE, HOSTILE: HOSTILE}))
    (run_dir / "figures").mkdir()
    (run_dir / "figures" / "<b onclick=x>'\".png").write_bytes(PNG)
    page = write_report(run_dir).read_text()
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img src=x" not in page
    assert "<b onclick" not in page
    assert HOSTILE in charts_of(page)


def test_page_loads_nothing(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path)).read_text()
    assert "default-src 'none'" in page
    # The name of SVG elements' namespace is the only address; nothing is fetched from it.
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|iframe|object|embed|base)\b|@import|url\(", page)


def test_long_run_gives_a_small_page(tmp_path: Path) -> None:
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, 60_001):
            values = {"global_step": step, "loss/total": 1 / step, "grad_norm": 1e6 if step == 31_234 else 1.0}
            file.write(json.dumps(values) + "\n")
    page = write_report(tmp_path).read_text()
    assert len(page) < 200_000
    norm = charts_of(page)["Gradient norm"]["series"][0]
    assert len(norm["x"]) <= 2000
    assert norm["y"][norm["x"].index(31_234)] == 1e6


def test_not_finite_values_are_counted(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step, value in enumerate([1.0, math.nan, 2.0, math.inf], start=1):
            log.write({"global_step": step, "grad_norm": value})
    (series,) = charts_of(write_report(tmp_path).read_text())["Gradient norm"]["series"]
    assert (series["y"], series["not_finite"]) == ([1.0, None, 2.0, None], 2)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path / "run")
    assert main([str(run_dir)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"report: {run_dir / 'report.html'}"
    assert any(line.startswith("ELBO, latest evaluation: ") for line in printed)
    assert main([str(run_dir), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert [item.name for item in (tmp_path / "new").iterdir()] == ["page.html"]
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="not a run directory"):
            main([str(path)])
    with pytest.raises(ConfigError, match="cannot be written"):
        main([str(run_dir), "--out", str(run_dir / "config.yaml" / "page.html")])

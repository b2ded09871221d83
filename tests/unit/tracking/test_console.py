"""Lines and bars, as a log file and as a terminal sees them."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from jmvae_dist.tracking.console import Console


def record(step: int) -> dict[str, float]:
    values = {"loss/total": 123.456, "elbo": -120.0, "loss/kl_prior": 4.5, "speed/samples_per_s": 12345.0}
    return {"global_step": step, **values}


def test_log_file_gets_the_first_and_the_last_record(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(total_steps=1000, start_step=0) as console:
        for step in range(1, 501):
            console.advance(step)
            console.update(record(step))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step    1/1000  loss 123.5  elbo -120  kl 4.5  12,345 samples/s")
    assert lines[1].startswith("step  500/1000")
    assert lines[1].endswith("left")


def test_lines_come_at_intervals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("jmvae_dist.tracking.console.time.monotonic", lambda: now[0])
    with Console(total_steps=100, start_step=50) as console:
        for step in range(51, 91):
            now[0] += 1.0
            console.update(record(step))
        assert console.remaining_s() == pytest.approx(10.0)
    steps = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().err.splitlines()]
    assert steps == [51, 61, 71, 81, 90]


def test_evaluation_and_messages(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(total_steps=10, start_step=0) as console:
        values = {"eval/elbo": -10.0, "eval/loss/reconstruction/image": 5.0}
        console.update({"global_step": 5, **values})
        console.message("[bold]text[/bold]")
    assert capsys.readouterr().err.splitlines() == ["step 5 evaluation  elbo -10", "[bold]text[/bold]"]


def evaluation_line(capsys: pytest.CaptureFixture[str], values: dict[str, float]) -> str:
    with Console(total_steps=10, start_step=0) as console:
        console.update({"global_step": 5, **{f"eval/{name}": value for name, value in values.items()}})
    return capsys.readouterr().err.removeprefix("step 5 evaluation  ").removesuffix("\n")


def accuracies(num_modalities: int) -> dict[str, float]:
    names = [f"m{number}" for number in range(num_modalities)]
    sources = {name: [*(other for other in names if other != name), "others"] for name in names}
    return {f"accuracy/{name}/from_{source}": 0.5 for name in names for source in sources[name]}


def test_evaluation_of_two_modalities_says_all(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"elbo": -24.3, "loss/kl_prior": 9.0, "joint_nll": 24.07, "accuracy/label/from_image": 0.9805}
    assert evaluation_line(capsys, values) == "elbo -24.3  joint_nll 24.07  accuracy/label/from_image 0.9805"


def test_evaluation_of_many_modalities_is_one_short_line(capsys: pytest.CaptureFixture[str]) -> None:
    shown = "  ".join(f"accuracy/m{number}/from_others 0.5" for number in range(4))
    assert evaluation_line(capsys, {"elbo": -1.0, **accuracies(4)}) == f"elbo -1  {shown}"
    assert evaluation_line(capsys, accuracies(9)) == f"{shown}  (5 more in metrics.jsonl)"


def test_terminal_gets_a_bar_and_whole_messages() -> None:
    code = """
from jmvae_dist.tracking.console import Console
with Console(total_steps=40, start_step=10) as console:
    console.update({"global_step": 20, "loss/total": 1.5, "speed/samples_per_s": 100.0})
    console.message("checkpoint [x] written")
    console.advance(40)
"""
    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", code], stderr=terminal, env=environment, check=True)
    os.close(terminal)
    output = b""
    try:
        while data := os.read(controller, 65536):
            output += data
    except OSError:
        pass
    os.close(controller)
    text = output.decode()
    assert "40/40" in text
    assert "loss 1.5" in text
    assert "100 samples/s" in text
    assert "checkpoint [x] written" in text

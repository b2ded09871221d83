"""Progress of commands, as a log file and as a terminal sees it."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from jmvae_dist.progress import format_duration, progress


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test moves."""
    time_s = [100.0]
    monkeypatch.setattr("jmvae_dist.progress.time.monotonic", lambda: time_s[0])
    return time_s


def test_short_work_is_silent(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress(30, "evaluating") as advance:
        for _ in range(30):
            now[0] += 0.06
            advance(1)
    assert capsys.readouterr().err == ""


def test_a_log_file_gets_a_line_every_ten_seconds_and_one_at_the_end(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress(3000, "evaluating") as advance:
        for _ in range(30):
            now[0] += 1.0
            advance(100)
    assert capsys.readouterr().err.splitlines() == [
        "evaluating: 200 of 3,000 in 2.0 s",
        "evaluating: 1,200 of 3,000 in 12 s",
        "evaluating: 2,200 of 3,000 in 22 s",
        "evaluating: 3,000 in 30 s",
    ]


def test_work_that_fails_half_way_says_how_far_it_came(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with progress(30, "evaluating") as advance:
            advance(10)
            now[0] += 5.0
            raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        fail()
    assert capsys.readouterr().err == "evaluating: 10 of 30 in 5.0 s\n"


def test_terminal_gets_one_bar() -> None:
    code = (
        "from jmvae_dist import progress\n"
        "progress._SILENT_S = 0.0\n"
        "with progress.progress(40, 'evaluating [a]') as advance:\n"
        "    advance(40)\n"
    )
    controller, terminal = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=terminal, check=True, env={**os.environ, "TERM": "xterm"})
    os.close(terminal)
    output = b""
    try:
        while chunk := os.read(controller, 65536):
            output += chunk
    except OSError:  # how Linux reports that the other end is closed
        pass
    os.close(controller)
    text = output.decode()
    assert "40/40" in text
    assert re.search(r"evaluating \[a\]: 40 in [0-9.]+ s", text)


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0.44, "0.4 s"),
        (42, "42 s"),
        (59.7, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
        (3599.9, "1 h 00 min"),
        (273_600, "3 d 04 h"),
    ],
)
def test_durations(duration_s: float, text: str) -> None:
    assert format_duration(duration_s) == text

"""A run that is asked to stop ends by itself while requests of it wait for a server that says nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run
from tests.faults.patched import train
from tests.faulty_server import serving

# Requests of this step are the first that get no answer: its batch is read while that of three steps before is used,
# and a stop is agreed on one step after it was asked for.
SILENT_FROM = 8
FALLS_SILENT = f"""
import multiprocessing, urllib.request
from jmvae_dist.data.loader import _TrainSteps

load, record = _TrainSteps._load, Recorder.record

def ask(path):
    return urllib.request.urlopen("{{url}}/" + path).read()

def load_silenced(steps, number):
    if number == {SILENT_FROM}:
        ask("silence")
    return load(steps, number)

def record_and_stop(recorder, values):
    record(recorder, values)
    if values["global_step"] == {SILENT_FROM - 3}:
        os.kill(os.getpid(), signal.SIGUSR1)
    while values["global_step"] == {SILENT_FROM - 2} and int(ask("unanswered")) < 2:
        time.sleep(0.01)

_TrainSteps._load, Recorder.record = load_silenced, record_and_stop
multiprocessing.set_start_method("fork", force=True)  # so that workers have this too
"""


@pytest.mark.parametrize("workers", ["0", "1"])
def test_requests_without_an_answer_hold_up_no_exit(tmp_path: Path, digits: Path, workers: str) -> None:
    """The server would be waited for longer than this test is."""
    with serving(digits) as server:
        settings = [
            *("--data.train_manifest", f"{server.url}/train/manifest.json", "--data.workers", workers),
            *("--data.remote.stall_timeout_s", "6000", "--training.log_every_steps", "1", "--training.steps", "50"),
        ]
        run = Run(tmp_path / "run", digits, settings)
        printed = train(run, FALLS_SILENT.format(url=server.url), expect=75)
        assert not server.ended.is_set()
        assert len(server.unanswered) >= 2
    assert f"stopped on request after step {SILENT_FROM - 2}" in printed
    assert run.checkpoint(SILENT_FROM - 2).is_dir()

"""Training from shards at URLs: the same run, bit for bit, as from local files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run
from tests.faulty_server import Fault, serving

SETTINGS = ["--training.steps", "24", "--training.log_every_steps", "4", "--data.shuffle_window", "64"]


@pytest.mark.parametrize("how", ["cached", pytest.param("ranged", marks=pytest.mark.slow)])
def test_two_processes_train_alike_from_urls(tmp_path: Path, digits: Path, how: str) -> None:
    """With a cache that both processes share, and without one, over a connection that fails now and then."""
    local = Run(tmp_path / "local", digits, SETTINGS)
    local.train(2)
    with serving(digits) as server:
        shards = sorted(f"/train/{path.name}" for path in (digits / "train").glob("*.tar"))
        for path in shards:
            server.faults[path].extend([Fault(503), Fault(cut_after=1000)])
        settings = [*SETTINGS, "--data.train_manifest", f"{server.url}/train/manifest.json"]
        if how == "cached":
            settings += ["--data.cache.dir", str(tmp_path / "cache")]
        else:
            settings += ["--data.workers", "1"]
        remote = Run(tmp_path / "remote", digits, settings)
        remote.train(2)
        if how == "cached":  # two failures, and once for both processes
            assert [server.count(path) for path in shards] == [3] * len(shards)
        else:
            assert all(requested for path, requested in server.requests if path in shards)
    assert len(local.records()) == 6
    assert remote.records() == local.records()

"""Files of a run directory."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
from pathlib import Path

import pytest

from jmvae_dist.errors import LaunchError
from jmvae_dist.training.state import _lock, read_json, write_json


def test_json_files_are_strict(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": [1.5, math.nan], "b": {"c": -math.inf}, "d": None})
    assert read_json(path) == {"a": [1.5, "NaN"], "b": {"c": "-Infinity"}, "d": None}
    assert [item.name for item in tmp_path.iterdir()] == ["value.json"]


def test_unreadable_json_is_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "missing.json") is None
    (tmp_path / "torn.json").write_text('{"a": ')
    assert read_json(tmp_path / "torn.json") is None


def _hold(folder: Path, doing: str) -> None:
    with contextlib.ExitStack() as stack:
        _lock(folder, stack, doing)


def test_a_run_directory_is_held_by_one_process_that_says_what_for(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack, multiprocessing.get_context("fork").Pool(1) as other:
        _lock(tmp_path, stack, "adding an evaluation to")
        with pytest.raises(LaunchError, match=r"process \d+ on .* is adding an evaluation to it; wait for its end"):
            other.apply(_hold, (tmp_path, "training in"))
        stack.close()
        other.apply(_hold, (tmp_path, "training in"))

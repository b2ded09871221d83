"""Files of a run directory."""

from __future__ import annotations

import math
from pathlib import Path

from jmvae_dist.training.state import read_json, write_json


def test_json_files_are_strict(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": [1.5, math.nan], "b": {"c": -math.inf}, "d": None})
    assert read_json(path) == {"a": [1.5, "NaN"], "b": {"c": "-Infinity"}, "d": None}
    assert [item.name for item in tmp_path.iterdir()] == ["value.json"]


def test_unreadable_json_is_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "missing.json") is None
    (tmp_path / "torn.json").write_text('{"a": ')
    assert read_json(tmp_path / "torn.json") is None

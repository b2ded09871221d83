"""The record: nothing lost, nothing twice, always strict JSON."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmvae_dist.errors import DataError
from jmvae_dist.tracking.jsonl import EVERY_RECORD, MetricsLog, last_recorded_step, newest_values, read_records


def write_steps(path: Path, steps: list[int], resume_step: int | None = None) -> None:
    with MetricsLog(path, resume_step) as log:
        for step in steps:
            log.write({"global_step": step, "loss/total": step / 3})


def steps_of(path: Path) -> list[int]:
    return [record["global_step"] for record in read_records(path)]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    record = {"global_step": 7, "loss/total": 0.1, "samples_seen": 2**40, "engine": "ddp", "flag": True, "no": None}
    with MetricsLog(path) as log:
        log.write(record)
        log.write({"global_step": 7, "eval/elbo": np.float32(1.5), "count": np.int64(3)})
    assert read_records(path) == [record, {"global_step": 7, "eval/elbo": 1.5, "count": 3}]


def test_non_finite_values_are_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"global_step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32("nan")})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["a"] == "NaN"
    (record,) = read_records(path)
    assert math.isnan(record["a"])
    assert math.isnan(record["d"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


@settings(max_examples=60)
@given(
    steps=st.lists(st.integers(1, 30), max_size=20),
    resume_step=st.integers(1, 35),
    torn=st.integers(0, 40),
)
def test_resume_keeps_exactly_the_records_up_to_the_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], resume_step: int, torn: int
) -> None:
    path = tmp_path_factory.mktemp("record") / "metrics.jsonl"
    write_steps(path, steps)
    lines = path.read_bytes().splitlines(keepends=True)
    with open(path, "ab") as file:
        file.write(b'{"global_step":1,"loss/total":0.123456789}'[:torn])
    with MetricsLog(path, resume_step) as log:
        kept = [line for line, step in zip(lines, steps, strict=True) if step <= resume_step]
        assert path.read_bytes() == b"".join(kept)
        log.write({"global_step": resume_step + 1})
    assert steps_of(path) == [step for step in steps if step <= resume_step] + [resume_step + 1]
    assert [item.name for item in path.parent.iterdir()] == ["metrics.jsonl"]


def test_unchanged_record_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [10, 20])
    inode = path.stat().st_ino
    write_steps(path, [30], resume_step=20)
    assert path.stat().st_ino == inode
    assert steps_of(path) == [10, 20, 30]


def test_evaluations_of_old_checkpoints_cost_no_record(tmp_path: Path) -> None:
    """However long their records are, and wherever the newest step stands in the file."""
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [10, 20, 30])
    with open(path, "ab") as file:
        file.write(b'{"global_step":40,"torn')
    for step in (10, 20):
        with MetricsLog(path, EVERY_RECORD) as log:
            log.write({"global_step": step, "eval/elbo": float(step), "text": "x" * 100_000})
        assert last_recorded_step(path) == 30
    assert steps_of(path) == [10, 20, 30, 10, 20]
    newest = newest_values(read_records(path))
    assert (newest["global_step"], newest["loss/total"], newest["eval/elbo"]) == (30, 10, 20)


def test_a_record_before_the_first_step_is_kept_on_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [0, 10, 20])
    write_steps(path, [11], resume_step=10)
    assert steps_of(path) == [0, 10, 11]


def test_new_run_refuses_the_record_of_another(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"global_')
    write_steps(path, [10])
    assert steps_of(path) == [10]
    with pytest.raises(DataError, match="another run"):
        MetricsLog(path)
    assert steps_of(path) == [10]


@pytest.mark.parametrize("damage", [b"\n", b"[1]\n", b'{"loss": 1}\n', b'{"global_step": true}\n', b"\0\0\0\n"])
def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"global_step": 1}\n' + damage)
    assert steps_of(path) == [1]
    path.write_bytes(b'{"global_step": 1}\n' + damage + b'{"global_step": 2}\n')
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 2"):
        read_records(path)
    with pytest.raises(DataError, match="line 2"):
        MetricsLog(path, 1)
    assert path.read_bytes() == before


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_records(tmp_path / "metrics.jsonl")


def test_killed_process_loses_no_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = f"""
import os, signal
from jmvae_dist.tracking.jsonl import MetricsLog
log = MetricsLog({str(path)!r})
for step in range(1, 101):
    log.write({{"global_step": step, "loss/total": 0.5}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert process.returncode == -signal.SIGKILL
    assert steps_of(path) == list(range(1, 101))


def test_full_disk_leaves_no_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"global_step": 1})
    # A limit on the size of files stands in for a full disk: writes go through in part, then fail.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="large"):
            log.write({"global_step": 2, "text": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b'{"global_step":1}\n'
    log.write({"global_step": 3})
    log.close()
    assert steps_of(path) == [1, 3]

"""`jmvae-dist bench kernels`: its tables, its files, and what it refuses."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jmvae_dist.commands.bench import main
from jmvae_dist.errors import ConfigError
from jmvae_dist.kernels.benchmark import least_bytes
from tests.conftest import ROOT


def test_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.csv"
    assert (
        main(["kernels", "--device", "cpu", "--sizes", "4,3,2", "1,1,1", "--dtype", "bfloat16", "--out", str(out)])
        == 0
    )
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 2 * 2 * 2 * 2  # sizes, operations, directions, implementations
    assert {row["implementation"] for row in rows} == {"eager", "compiled"}
    assert all(row["device"] and float(row["time_ms"]) > 0 and float(row["copy_gb_per_s"]) > 0 for row in rows)
    assert "Triton kernels: not measured" in capsys.readouterr().out


def test_least_bytes() -> None:
    # 2 x 3 elements, one expert: reads 4 tensors and the noise, writes z and two numbers per row; all of 4 bytes.
    assert least_bytes("gaussian_kl_terms", "forward", 2, 3, 1, 4) == 4 * (6 * 6 + 4)
    assert least_bytes("product_of_experts", "forward+backward", 2, 3, 2, 4) == 4 * 6 * (4 + 2 + 8 + 4)


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed; pip install 'jmvae_dist[triton]'"
)
@pytest.mark.slow
def test_errors(tmp_path: Path) -> None:
    """The table of docs/kernels.md."""
    out = tmp_path / "errors.csv"
    command = [sys.executable, "benchmarks/kernels.py", "--errors", "--device", "cpu", "--out", str(out)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore::RuntimeWarning"}
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    assert "0 of 32,768 values differ" in output
    rows = list(csv.DictReader(out.open()))
    for row in rows:
        allowed = 5e-3 if "gradient" in row["quantity"] and "bfloat16" in row["case"] else 5e-6
        assert float(row["reference"]) < allowed, row
        assert float(row["triton"]) < allowed, row
    near = next(row for row in rows if (row["case"], row["quantity"]) == ("posteriors 0.0001 apart", "KL"))
    assert float(near["triton"]) < 1e-6 < 0.1 < float(near["textbook"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "4,3"], "'4,3' is not B,D,M"),
        (["--sizes", "4,0,1"], "must be at least 1"),
        (["--errors", "--resources"], "not allowed with"),
        (
            ["--sizes", "1,1,1", "--device", "cpu", "--out", "/nowhere/k.csv"],
            "--out: /nowhere/k.csv cannot be written",
        ),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["kernels", *arguments])

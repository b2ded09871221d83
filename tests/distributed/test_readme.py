"""The README's ten lines for a user's own data do what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from tests.conftest import ROOT, launch_environment


def readme_lines() -> list[str]:
    """The indented lines of the section on the user's own data."""
    section = (ROOT / "README.md").read_text().split("## Your own data")[1].split("\n## ")[0]
    return [line[4:] for line in section.splitlines() if line.startswith("    ")]


def test_own_data(tmp_path: Path) -> None:
    lines = readme_lines()
    assert lines[1].startswith('np.savez("mine.npz", image=images, rna=counts, label=labels)')
    generator = np.random.default_rng(0)
    arrays = {
        "images": generator.integers(0, 256, (300, 3, 32, 32), dtype=np.uint8),
        "counts": generator.normal(size=(300, 2000)).astype(np.float32),
        "labels": generator.integers(0, 5, 300),
    }
    np.savez(tmp_path / "mine.npz", image=arrays["images"], rna=arrays["counts"], label=arrays["labels"])
    (tmp_path / "configs").mkdir()
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    config = yaml.safe_load((ROOT / "configs" / "digits.yaml").read_text())
    config["output_dir"] = "runs/mine"
    config["data"] = {
        f"{name}_manifest": f"data/mine/{folder}/manifest.json"
        for name, folder in (("train", "train"), ("eval", "test"))
    }
    config["model"]["decoders_dist"] = {"image": "bernoulli", "rna": "normal", "label": "categorical"}
    config["training"] |= {"epochs": 1}
    config["tracking"] = {"wandb": {"mode": "disabled"}}
    (tmp_path / "configs" / "mine.yaml").write_text(yaml.safe_dump(config))
    commands = [line for line in lines[2:] if not line.startswith("cp ")]
    environment = launch_environment()
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    script = "\n".join(commands).replace("evaluate runs/mine", "evaluate runs/mine --joint-nll-samples 5")
    result = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    sizes = [
        json.loads((tmp_path / "data" / "mine" / split / "manifest.json").read_text())["num_samples"]
        for split in ("train", "test")
    ]
    assert sizes == [240, 60]
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert (tmp_path / "runs" / "mine" / "from_rna" / "samples.npz").is_file()
    assert len(np.load(tmp_path / "latents.npz")["mu"]) == 60

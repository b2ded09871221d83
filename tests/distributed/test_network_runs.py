"""Networks of every kind, and of the user's, in real runs: all engines agree, resume, and evaluate if trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.conftest import Run, run_verb

HERE = "tests.unit.model.user_networks"
ENCODER, FUNCTION = f"{HERE}.Encoder", f"{HERE}.poisson"
NETWORKS = {
    "joint_hidden_dims": [16],
    "activation": "gelu",
    "sigma": "softplus",
    "modalities": {
        "picture": {"kind": "conv", "channels": [8, 16], "hidden_dims": [16]},
        "words": {"kind": "text", "channels": [8], "embedding_dim": 8, "hidden_dims": [16]},
        "caption": {"kind": "transformer", "embedding_dim": 8, "layers": 2, "heads": 2},
        "rna": {"kind": "vector", "encoder_hidden_dims": [16], "decoder_hidden_dims": [16]},
        "counts": {"encoder": {"class_path": ENCODER, "init_args": {"width": 5}}},
    },
}
MODEL: dict[str, Any] = {
    "latent_dim": 4,
    "decoders_dist": {
        "picture": "laplace",
        "words": "categorical",
        "caption": "categorical",
        "rna": "normal",
        "counts": FUNCTION,
    },
    "decoder_dist_params": None,
    "networks": NETWORKS,
}
STEPS = 6


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run on random data of five modalities."""
    folder = tmp_path_factory.mktemp("kinds")
    generator = np.random.default_rng(0)
    np.savez(
        folder / "data.npz",
        picture=generator.random((96, 3, 9, 11), dtype=np.float32),
        words=np.eye(6, dtype=np.float32)[generator.integers(0, 6, (96, 7))],
        caption=np.eye(5, dtype=np.float32)[generator.integers(0, 5, (96, 4))],
        rna=generator.standard_normal((96, 12), dtype=np.float32),
        counts=generator.poisson(2.0, (96, 3)).astype(np.float32),
    )
    data = ["npz", "--file", str(folder / "data.npz"), "--split", "train", "--file-is-split"]
    run_verb("shards", "write", *data, "--out", str(folder / "train"), "--workers", "1")
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": MODEL}))
    return [
        *("--config", str(folder / "model.yaml"), "--data.train_manifest", str(folder / "train" / "manifest.json")),
        *("--training.steps", str(STEPS), "--training.global_batch_size", "16", "--training.log_every_steps", "1"),
        *("--checkpoint.every_steps", str(STEPS // 2)),
    ]


def test_a_run_with_every_kind(tmp_path: Path, arguments: list[str]) -> None:
    run = Run(tmp_path / "run", tmp_path, arguments)
    run.train()
    records = run.records()
    assert [record["global_step"] for record in records] == list(range(1, STEPS + 1))
    manifest = next(value for value in arguments if value.endswith("manifest.json"))
    evaluate = ("evaluate", str(run.output_dir), "--manifest", manifest, "--joint-nll-samples", "10")
    for trusted, code in (([ENCODER], 2), ([ENCODER, FUNCTION], 0)):
        flags = [text for name in trusted for text in ("--trust-class", name)]
        printed = run_verb(*evaluate, *flags, expect=code)
        # Every default metric takes every kind of network and of modality.
        assert ("joint_nll" in printed) == (code == 0)
        assert (f"--trust-class {FUNCTION}" in printed) == (code == 2)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_engines_agree(tmp_path: Path, arguments: list[str], engine: str) -> None:
    runs = [Run(tmp_path / name, tmp_path, [*arguments, "--training.engine", name]) for name in ("ddp", engine)]
    for run in runs:
        run.train(2)
    assert runs[0].records() == runs[1].records()

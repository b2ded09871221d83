"""`jmvae-dist sample` on an export: names of the arrays, and mistakes that are told before any work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jmvae_dist.commands.sample import main
from jmvae_dist.commands.shards import main as shards
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.errors import ConfigError
from jmvae_dist.model_config import JMVAEConfig
from tests.exports import export_untrained

NUM_SAMPLES = 6


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.normal(size=(NUM_SAMPLES, size)).astype("float32") for name, size in (("z", 3), ("b", 4))
    }
    np.savez(tmp_path / "data.npz", **arrays)
    source = ["npz", "--file", str(tmp_path / "data.npz"), "--split", "test", "--file-is-split"]
    assert shards(["write", *source, "--out", str(tmp_path / "shards")]) == 0
    return tmp_path / "shards" / "manifest.json"


@pytest.fixture
def export(tmp_path: Path, manifest: Path) -> Path:
    """Of a model with a modality named `z`."""
    modalities = {modality.name: modality.to_json() for modality in Manifest.load(manifest).modalities}
    return export_untrained(tmp_path / "export", JMVAEConfig(2, 2, {"z": (3,), "b": (4,)}), modalities)


def test_modality_with_the_name_of_the_latents(tmp_path: Path, export: Path, manifest: Path) -> None:
    out = tmp_path / "out"
    assert main([str(export), "--out", str(out), "--given", "b", "--manifest", str(manifest), "--n", "4"]) == 0
    with np.load(out / "samples.npz", allow_pickle=False) as arrays:
        assert {name: arrays[name].shape for name in arrays} == {
            "latent.z": (4, 2),
            "generated.z": (4, 3),
            "generated.b": (4, 4),
            "data.z": (4, 3),
            "data.b": (4, 4),
        }


def test_names_of_classes_are_beside_the_samples(tmp_path: Path) -> None:
    distributions = {"b": "normal", "state": "categorical"}
    config = JMVAEConfig(2, 2, {"b": (4,), "state": (2,)}, decoders_dist=distributions)
    state = Modality.classes("state", 2).to_json() | {"class_names": ["benign", "malignant\x1b[2J"]}
    folder = export_untrained(tmp_path / "export", config, {"state": state})
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 0
    with np.load(tmp_path / "out" / "samples.npz", allow_pickle=False) as arrays:
        assert arrays["class_names.state"].tolist() == ["benign", "malignant\\x1b[2J"]
        assert "class_names.b" not in arrays


def test_more_than_there_is(tmp_path: Path, export: Path, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--given", "b", "--manifest", str(manifest)]
    for n, said in ((NUM_SAMPLES, False), (NUM_SAMPLES + 1, True)):
        assert main([str(export), "--out", str(tmp_path / "out"), *given, "--n", str(n)]) == 0
        printed = capsys.readouterr()
        assert (f"{manifest} has {NUM_SAMPLES} samples" in printed.err) == said
        assert printed.out.startswith(f"{NUM_SAMPLES} samples given b")


def test_output_folder_is_tried_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "no_model").mkdir()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"--out: .* cannot be written"):
            main([str(tmp_path / "no_model"), "--out", str(out)])

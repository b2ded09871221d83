"""Texts of bytes, read back from tokens, and as `jmvae-dist sample` stores them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jmvae_dist.commands.sample import main as sample
from jmvae_dist.commands.shards import main as shards
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.tokenizers import ByteTokenizer, token_ids
from jmvae_dist.evaluation.texts import most_probable_text
from jmvae_dist.model_config import JMVAEConfig
from tests.exports import export_untrained

NOTES = ["left lobe", "", "für 5 $"]


@pytest.mark.parametrize("text", NOTES)
def test_the_text_of_its_tokens(text: str) -> None:
    one_hot = np.eye(257)[token_ids(ByteTokenizer(), text, 12)]
    assert most_probable_text(one_hot) == text
    assert most_probable_text(0.9 * one_hot + 0.1 / 257) == text


def test_what_is_no_text() -> None:
    """A model may put padding anywhere, and bytes that are no UTF-8."""
    assert most_probable_text(np.eye(257)[[97, 256, 0xFF, 98]]) == "a\ufffdb"
    assert most_probable_text(np.full((2, 257), np.nan)) == "\0\0"


def test_samples_have_the_texts_beside_the_probabilities(tmp_path: Path) -> None:
    table = "".join(f'{number},"{note}"\n' for number, note in enumerate(NOTES))
    (tmp_path / "table.csv").write_text(f"x,note\n{table}", encoding="utf-8")
    source = ["csv", "--file", str(tmp_path / "table.csv"), "--split", "test", "--file-is-split"]
    columns = ["--vector", "x=x", "--text", "note=note", "--key", "x"]
    assert shards(["write", *source, *columns, "--out", str(tmp_path / "shards")]) == 0
    manifest = Manifest.load(tmp_path / "shards" / "manifest.json")
    config = JMVAEConfig(2, 2, {"x": (1,), "note": (9, 257)}, decoders_dist={"x": "normal", "note": "categorical"})
    modalities = {modality.name: modality.to_json() for modality in manifest.modalities}
    export = export_untrained(tmp_path / "export", config, modalities)
    given = ["--given", "x", "--manifest", str(manifest.path)]
    assert sample([str(export), "--out", str(tmp_path / "out"), *given]) == 0
    with np.load(tmp_path / "out" / "samples.npz", allow_pickle=False) as stored:
        order = stored["data.x"][:, 0].astype(int)
        assert stored["text.data.note"].tolist() == [NOTES[number] for number in order]
        made = [most_probable_text(value).rstrip("\0") for value in stored["generated.note"]]
        assert stored["text.generated.note"].tolist() == made

"""The target of checkpoints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from jmvae_dist.checkpoint.layout import CheckpointManifest, FileRecord, FragmentRecord, TensorRecord
from tests.fuzz.mutations import Random, mutate_json
from tests.fuzz.target import Target


class CheckpointTarget(Target):
    """A damaged manifest of a checkpoint, with a digest that fits."""

    def __init__(self) -> None:
        self._manifest = CheckpointManifest(
            global_step=3,
            engine="ddp",
            world_size=1,
            versions={"torch": "2"},
            model={"latent_dim": 2},
            modalities={"a": {}},
            config={},
            data_state={"global_step": 3},
            tracking={},
            optimizer={"groups": [1]},
            guards={},
            passed_over=[[1, 2]],
            elapsed_s=1.5,
            created="2024-01-01T00:00:00",
            tensors={"weight/a": TensorRecord([2, 2], "float32", [FragmentRecord("rank-00000.safetensors", 0, 4)])},
            files={"rank-00000.safetensors": FileRecord(10, "0" * 64)},
        )

    def run(self, rng: Random, folder: Path, number: int) -> None:
        content = mutate_json(rng, json.loads(self._manifest.to_json()), _seal_checkpoint)
        CheckpointManifest.from_json(content.decode(), folder / "manifest.json").to_json()


def _seal_checkpoint(document: dict[str, Any]) -> None:
    rest = {key: value for key, value in document.items() if key != "digest"}
    document["digest"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()

"""Manifests, and changes to their documents, that several modules of tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jmvae_dist.data.index import index_num_bytes
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.shard import IndexFile, Shard
from jmvae_dist.errors import DataError

MODALITIES = (
    Modality("image", "uint8", (1, 2), offset=[[1.0, 2.0]], scale=0.5),
    Modality.classes("label", 10),
)
NEW_KINDS = [
    Modality.image("photo", (3, None, None), "jpg|jpeg|png", scale=1 / 255),
    Modality.image("mask", (1, 32, 32), "seg.png"),
    Modality.text("caption", 16, "txt"),
    Modality.classes("label", 10, "cls"),
    Modality("pose", "float32", (2, 3), "json", member="json", field="pose.0"),
    Modality("score", "float64", (), "json", member="json", field="score"),
]


def example(urls: tuple[str, ...] = ("a.tar", "b.tar"), modalities: tuple[Modality, ...] = MODALITIES) -> Manifest:
    shards = [
        Shard(
            url,
            3 + number,
            2048,
            f"{number:064x}",
            IndexFile(f"{url}.index", index_num_bytes(3 + number, len(modalities)), "f" * 64),
        )
        for number, url in enumerate(urls)
    ]
    return Manifest.create(modalities, shards, {"name": "example"})


def shard_for(num_modalities: int, index_sha256: str = "b" * 64) -> Shard:
    index = IndexFile("a.tar.index", 24 + 4 * num_modalities * 12, index_sha256)
    return Shard("a.tar", 4, 4096, "a" * 64, index)


def changed(*keys: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: Any) -> None:
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    return change


def removed(*keys: str | int) -> Callable[[dict[str, Any]], None]:
    def change(record: Any) -> None:
        for key in keys[:-1]:
            record = record[key]
        del record[keys[-1]]

    return change


def assert_refused(folder: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    """The example's document, changed, is refused with this message, which names the file."""
    record = example().to_json()
    change(record)
    path = folder / "manifest.json"
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=message) as caught:
        Manifest.load(path)
    assert str(path) in str(caught.value)

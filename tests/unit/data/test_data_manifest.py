"""Manifests: round trip, strictness, and what the fingerprint depends on."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from manifest_examples import MODALITIES, assert_refused, changed, example, removed, shard_for

from jmvae_dist.data.index import index_num_bytes
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.shard import IndexFile, Shard
from jmvae_dist.errors import ConfigError, DataError

GOLDEN_FINGERPRINT = "55238bdcd5b38c99a8dfee5eeeab2b9f62f46e3c5604b45c8d6af52ceb22b34a"


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    example().save(path)
    loaded = Manifest.load(path)
    assert loaded.to_json() == example().to_json()
    assert loaded.modalities == MODALITIES
    assert loaded.shard_sizes == (3, 4)
    assert (loaded.num_samples, loaded.num_bytes) == (7, 4096)
    assert loaded.shard_path(1) == tmp_path / "b.tar"
    assert loaded.index_path(1) == tmp_path / "b.tar.index"
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]


def test_fingerprint_depends_on_content_and_order_only() -> None:
    base = example().fingerprint
    assert example(("elsewhere/a.tar", "file:///b.tar")).fingerprint == base
    assert example(modalities=MODALITIES[::-1]).fingerprint != base
    assert example(modalities=MODALITIES[:1]).fingerprint != base
    shards = example().shards
    assert Manifest.create(MODALITIES, shards[::-1], {}).fingerprint != base
    assert Manifest.create(MODALITIES, shards, {"another": "source"}).fingerprint == base


def test_fingerprint_never_changes() -> None:
    assert example().fingerprint == GOLDEN_FINGERPRINT


def many_shards(num_shards: int) -> list[Shard]:
    """Alike but for names and digests, as most that one program has written are."""
    index_bytes = index_num_bytes(1000, len(MODALITIES))
    shards = []
    for number in range(num_shards):
        name = f"shard-{number:06d}.tar"
        index = IndexFile(f"{name}.index", index_bytes, f"{num_shards + number:064x}")
        shards.append(Shard(name, 1000, 10**6, f"{number:064x}", index))
    return shards


@pytest.mark.parametrize("format_version", [1, 2])
def test_fingerprint_of_many_shards_is_that_of_canonical_json(format_version: int) -> None:
    shards = many_shards(2345)
    content: dict[str, Any] = {
        "modalities": [modality.to_json() for modality in MODALITIES],
        "shards": [[shard.sha256, shard.num_samples] for shard in shards],
    }
    if format_version == 2:
        content |= {"format_version": 2, "indexes": [shard.index.sha256 for shard in shards]}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    fingerprint = Manifest.create(MODALITIES, shards, {}, format_version=format_version).fingerprint
    assert fingerprint == hashlib.sha256(canonical.encode()).hexdigest()


def test_memory_per_shard(tmp_path: Path) -> None:
    """Of two names and two digests, and what holds them; the text of a fingerprint is never there as a whole."""
    num_shards = 10_000
    path = tmp_path / "manifest.json"
    shards = many_shards(num_shards)
    Manifest.create(MODALITIES, shards, {}).save(path)
    tracemalloc.start()
    try:
        manifest = Manifest.load(path)
        held_bytes = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        again = Manifest.create(MODALITIES, manifest.shards, {})
        fingerprint_bytes = tracemalloc.get_traced_memory()[1] - held_bytes
    finally:
        tracemalloc.stop()
    assert again.fingerprint == manifest.fingerprint
    assert held_bytes < 540 * num_shards
    assert fingerprint_bytes < 200 * num_shards


def test_missing_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no manifest at .*nowhere/manifest\.json.*shards write SOURCE --out"):
        Manifest.load(tmp_path / "nowhere" / "manifest.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("format_version", value=3), "format_version: 3 is not supported"),
        (removed("fingerprint"), "fingerprint: is missing"),
        (changed("fingerprint", value="0" * 64), "fingerprint: does not match"),
        (changed("num_samples", value=8), "num_samples: says 8, but the shards add up to 7"),
        (changed("num_samples", value=True), "num_samples: True must be an integer"),
        (changed("num_bytes", value=4096.0), "num_bytes: 4096.0 must be an integer"),
        (changed("source", value="text"), "source: must be an object"),
    ],
)
def test_malformed_manifests_name_file_and_key(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    assert_refused(tmp_path, change, message)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"[" * 100_000, b"1" * 10_000, b"[]"]
)
def test_anything_but_a_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json: "):
        Manifest.load(path)


def test_short_text_that_would_need_much_memory_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(b'{"shards":[' + b"[]," * 10_000_000 + b"[]]}")
    with pytest.raises(DataError, match=r"manifest\.json: a manifest has at most 20000000 values"):
        Manifest.load(path)


@pytest.mark.parametrize("depth", [13, 200, 900, 100_000])
@pytest.mark.parametrize(
    "keys", [("source", "x"), ("modalities", 0, "offset"), ("modalities", 0, "shape"), ("shards", 0, "num_samples")]
)
def test_deep_nesting_is_an_error_of_the_file(tmp_path: Path, depth: int, keys: tuple[str | int, ...]) -> None:
    record = example().to_json()
    changed(*keys, value="DEEP")(record)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(record).replace('"DEEP"', "[" * depth + "1" + "]" * depth))
    with pytest.raises(DataError, match=r"nested more than 12 deep|not valid JSON"):
        Manifest.load(path)


def test_a_pipe_instead_of_a_manifest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"pipe: not a regular file"):
        Manifest.load(tmp_path / "pipe")


def test_the_folder_of_a_manifest(tmp_path: Path) -> None:
    """What `--out` of `shards write` was; relative URLs are relative to it all the same."""
    with pytest.raises(ConfigError, match=rf"no manifest at {tmp_path}/manifest\.json; .* --out {tmp_path}`"):
        Manifest.load(tmp_path)
    with pytest.raises(ConfigError, match=rf"no manifest at {tmp_path}/nowhere; .* --out {tmp_path}/nowhere`"):
        Manifest.load(tmp_path / "nowhere")
    example().save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path) == Manifest.load(tmp_path / "manifest.json")
    assert Manifest.load(str(tmp_path)).shard_path(0).parent == tmp_path


def test_select_modalities() -> None:
    assert [modality.name for modality in example().select(["label", "image"])] == ["label", "image"]
    assert example().select() == MODALITIES
    with pytest.raises(ConfigError, match=r"no modality 'lable'; it has image, label"):
        example().select(["lable"])
    with pytest.raises(ConfigError, match="once"):
        example().select(["label", "label"])


def test_the_order_of_a_foreign_tar_is_part_of_the_fingerprint() -> None:
    """Its bytes do not fix the order: a new index of the same tar must not pass for the same data."""
    modality = Modality("x", "float32", (2,))
    one, other = (shard_for(1, digit * 64) for digit in "bc")
    written = [Manifest.create([modality], [shard], {}).fingerprint for shard in (one, other)]
    foreign = [Manifest.create([modality], [shard], {}, format_version=2).fingerprint for shard in (one, other)]
    assert written[0] == written[1]
    assert len({*written, *foreign}) == 3

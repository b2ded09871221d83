"""Manifests: round trip, strictness, and what the fingerprint depends on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jmvae_dist.data.index import index_num_bytes
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality, check_distinct_names
from jmvae_dist.data.shard import IndexFile, Shard
from jmvae_dist.errors import ConfigError, DataError

GOLDEN_FINGERPRINT = "55238bdcd5b38c99a8dfee5eeeab2b9f62f46e3c5604b45c8d6af52ceb22b34a"
MODALITIES = (
    Modality("image", "uint8", (1, 2), offset=[[1.0, 2.0]], scale=0.5),
    Modality.classes("label", 10),
)


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


def test_missing_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no manifest at .*nowhere/manifest\.json.*shards write SOURCE --out"):
        Manifest.load(tmp_path / "nowhere" / "manifest.json")


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


def shard_of(num_samples: int) -> dict[str, Any]:
    index = {"url": "b.tar.index", "num_bytes": index_num_bytes(num_samples, 2), "sha256": "c" * 64}
    return {"url": "b.tar", "num_samples": num_samples, "num_bytes": 2**40, "sha256": "b" * 64, "index": index}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("format_version", value=3), "format_version: 3 is not supported"),
        (removed("fingerprint"), "fingerprint: is missing"),
        (changed("fingerprint", value="0" * 64), "fingerprint: does not match"),
        (changed("num_samples", value=8), "num_samples: says 8, but the shards add up to 7"),
        (changed("num_samples", value=True), "num_samples: True must be an integer"),
        (changed("num_bytes", value=4096.0), "num_bytes: 4096.0 must be an integer"),
        (changed("modalities", value=[]), "modalities: must be a list with at least one"),
        (changed("modalities", 0, "dtype", value="object"), r"modalities\[0\]: dtype 'object'"),
        (changed("modalities", 0, "encoding", value="pickle"), r"modalities\[0\]: encoding 'pickle'"),
        (changed("modalities", 0, "shape", value=[-1, 2]), r"modalities\[0\]: shape"),
        (changed("modalities", 0, "shape", value=[2**31, 2]), r"modalities\[0\]: shape .* more than"),
        (changed("modalities", 0, "scale", value=0), r"modalities\[0\]: scale must not be 0"),
        (changed("modalities", 0, "offset", value=[1.0, 2.0]), r"modalities\[0\]: offset must be"),
        (changed("modalities", 0, "name", value="../x"), r"modalities\[0\]: name"),
        (changed("modalities", 0, "decoder", value="eval"), r"modalities\[0\]\.decoder: is not a known key"),
        (changed("modalities", 1, "num_classes", value=11), r"modalities\[1\]: encoding 'cls' needs"),
        (changed("modalities", 1, "num_classes", value=None), r"modalities\[1\]: encoding 'cls' needs"),
        (changed("modalities", 1, "name", value="IMAGE"), "modalities: two modalities have the same name"),
        (changed("shards", 1, "url", value="a.tar"), "shards: 'a.tar' is listed twice"),
        (changed("shards", 1, "url", value="pipe:rm -rf /"), r"shards\[1\]\.url: scheme 'pipe'"),
        (changed("shards", 1, "url", value="memory://host/b.tar"), r"shards\[1\]\.url: scheme 'memory'"),
        (changed("shards", 1, "url", value="file://host/b.tar"), r"shards\[1\]\.url: .* must have the form"),
        (changed("shards", 1, "url", value="a\0b"), r"shards\[1\]\.url: .* printable"),
        (changed("shards", 1, "sha256", value="zz"), r"shards\[1\]\.sha256: must be a sha256"),
        (changed("shards", 1, "num_samples", value=0), r"shards\[1\]\.num_samples: 0 must be"),
        (changed("shards", 1, "num_samples", value=2**40), r"shards\[1\]\.index: 1099511627776 samples in one shard"),
        (
            changed("shards", 1, "index", "num_bytes", value=96),
            r"shards\[1\]\.index\.num_bytes: says 96, but 4 samples with 2 modalities take 120",
        ),
        (changed("modalities", 0, "scale", value=1e300), r"modalities\[0\]: scale is beyond the range of float32"),
        (changed("modalities", 0, "offset", value=-1e39), r"modalities\[0\]: offset is beyond the range of float32"),
        (changed("modalities", 0, "scale", value=1e-60), r"modalities\[0\]: scale must not be 0 \(as float32\)"),
        (changed("modalities", 0, "a\x1b[2J", value=0), r"modalities\[0\]\.a\\x1b\[2J: is not a known key"),
        (changed("shards", 1, "url", value="file:///a%00b"), r"shards\[1\]\.url: .* must have the form"),
        (changed("shards", 1, "url", value="file:///a%1b[2J"), r"shards\[1\]\.url: .* must have the form"),
        (
            changed("shards", 1, value=shard_of(30_000_000)),
            r"shards\[1\]\.index: 30000000 samples in one shard: an index has at most 268435456 bytes",
        ),
        (removed("shards", 1, "index", "url"), r"shards\[1\]\.index\.url: is missing"),
        (changed("source", value="text"), "source: must be an object"),
    ],
)
def test_malformed_manifests_name_file_and_key(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    record = example().to_json()
    change(record)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=message) as caught:
        Manifest.load(path)
    assert str(path) in str(caught.value)


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


def test_a_modality_of_deep_lists() -> None:
    offset: Any = 0.0
    for _ in range(5000):
        offset = [offset]
    with pytest.raises(ValueError, match="offset must be"):
        Modality("x", "float32", (1,), offset=offset)


def test_a_pipe_or_folder_instead_of_a_manifest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ConfigError, match=r"not a regular file; name the manifest\.json"):
            Manifest.load(path)


def test_file_urls(tmp_path: Path) -> None:
    assert str(example(("file:///data/a%20b.tar",)).shard_path(0)) == "/data/a b.tar"
    assert str(example(("/data/a.tar",)).shard_path(0)) == "/data/a.tar"


def test_select_modalities() -> None:
    assert [modality.name for modality in example().select(["label", "image"])] == ["label", "image"]
    assert example().select() == MODALITIES
    with pytest.raises(ConfigError, match=r"no modality 'lable'; it has image, label"):
        example().select(["lable"])
    with pytest.raises(ConfigError, match="once"):
        example().select(["label", "label"])


def test_transform_and_one_hot() -> None:
    image, label = MODALITIES
    values = image.to_model(np.array([[[1, 4]], [[255, 0]]], dtype=np.uint8))
    assert values.dtype == np.float32
    assert values.tolist() == [[[0.0, 1.0]], [[127.0, -1.0]]]
    assert label.to_model(np.array([3, 0])).tolist() == [np.eye(10)[3].tolist(), np.eye(10)[0].tolist()]


def test_the_transform_is_checked_as_it_is_computed() -> None:
    """What float64 holds may be infinite or 0 in the float32 that is computed with."""
    for offset, scale in ((1e39, 1.0), (0.0, 1e39), (0.0, 1e-50)):
        with pytest.raises(ValueError, match="float32"):
            Modality("x", "float32", (1,), offset=offset, scale=scale)
        Modality("x", "float64", (1,), offset=offset, scale=scale)


def test_large_stored_values_are_centred_in_double_precision() -> None:
    """In float32, 2**30 + 1 and 2**30 are the same number."""
    modality = Modality("counter", "int64", (1,), offset=float(2**30))
    assert modality.to_model(np.array([[2**30 + 1]])).tolist() == [[1.0]]


def shard_for(num_modalities: int, index_sha256: str = "b" * 64) -> Shard:
    index = IndexFile("a.tar.index", 24 + 4 * num_modalities * 12, index_sha256)
    return Shard("a.tar", 4, 4096, "a" * 64, index)


NEW_KINDS = [
    Modality.image("photo", (3, None, None), "jpg|jpeg|png", scale=1 / 255),
    Modality.image("mask", (1, 32, 32), "seg.png"),
    Modality.text("caption", 16, "txt"),
    Modality.classes("label", 10, "cls"),
    Modality("pose", "float32", (2, 3), "json", member="json", field="pose.0"),
    Modality("score", "float64", (), "json", member="json", field="score"),
]


@pytest.mark.parametrize("modality", NEW_KINDS, ids=lambda modality: modality.name)
def test_every_kind_of_modality_survives_a_file(tmp_path: Path, modality: Modality) -> None:
    manifest = Manifest.create([modality], [shard_for(1)], {})
    manifest.save(tmp_path / "manifest.json")
    loaded = Manifest.load(tmp_path / "manifest.json")
    assert loaded.format_version == 2
    assert loaded.modalities == (modality,)


def test_names_of_members() -> None:
    photo, mask, *_ = NEW_KINDS
    assert (photo.extension, photo.extensions) == ("jpg", ("jpg", "jpeg", "png"))
    assert mask.extensions == ("seg.png",)
    assert Modality("x", "float32", (2,)).extensions == ("x.npy",)
    for member in ("", "../x", "a|a", "a|A", "a b", ".jpg", "jpg.", "a/b", "x" * 81):
        with pytest.raises(ValueError, match="member"):
            Modality.image("photo", (3, 8, 8), member)


@pytest.mark.parametrize(
    ("attributes", "problem"),
    [
        ({"encoding": "image", "dtype": "float32", "shape": (3, 8, 8)}, "dtype 'uint8'"),
        ({"encoding": "image", "dtype": "uint8", "shape": (4, 8, 8)}, "C = 1 or 3"),
        ({"encoding": "image", "dtype": "uint8", "shape": (3, None, 8)}, "both fixed or both null"),
        ({"encoding": "image", "dtype": "uint8", "shape": (None, 8, 8)}, "only height and width"),
        ({"encoding": "npy", "dtype": "uint8", "shape": (3, None)}, "only height and width"),
        ({"encoding": "text", "dtype": "int64", "shape": (4, 257)}, "needs an integer length"),
        ({"encoding": "text", "dtype": "int64", "shape": (4, 256), "length": 4, "tokenizer": "bytes"}, "4, 257"),
        (
            {"encoding": "text", "dtype": "int64", "shape": (4, 9), "length": 4, "tokenizer": "os.system"},
            "not one of",
        ),
        ({"encoding": "npy", "dtype": "int64", "shape": (4,), "tokenizer": "bytes"}, "belongs to encoding 'text'"),
        ({"encoding": "json", "dtype": "int64", "shape": (4,), "field": "a..b"}, "joined by dots"),
        ({"encoding": "npy", "dtype": "int64", "shape": (4,), "field": "a"}, "belongs to encoding 'json'"),
    ],
    ids=lambda value: value.get("encoding") if isinstance(value, dict) else value.replace(" ", "_"),
)
def test_contradictory_modalities_are_refused(attributes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Modality("x", **attributes)


def test_the_order_of_a_foreign_tar_is_part_of_the_fingerprint() -> None:
    """Its bytes do not fix the order: a new index of the same tar must not pass for the same data."""
    modality = Modality("x", "float32", (2,))
    one, other = (shard_for(1, digit * 64) for digit in "bc")
    written = [Manifest.create([modality], [shard], {}).fingerprint for shard in (one, other)]
    foreign = [Manifest.create([modality], [shard], {}, format_version=2).fingerprint for shard in (one, other)]
    assert written[0] == written[1]
    assert len({*written, *foreign}) == 3


def test_version_1_has_none_of_the_new_kinds(tmp_path: Path) -> None:
    record = Manifest.create([NEW_KINDS[2]], [shard_for(1)], {}).to_json() | {"format_version": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"modalities\[0\]: needs format_version 2"):
        Manifest.load(tmp_path / "manifest.json")


def test_two_modalities_of_one_member() -> None:
    check_distinct_names(NEW_KINDS[4:])  # different fields of one JSON document
    with pytest.raises(ValueError, match="both the member 'JPG'"):
        check_distinct_names([NEW_KINDS[0], Modality.image("other", (3, 8, 8), "JPG")])

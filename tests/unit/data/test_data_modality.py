"""Modalities: what is refused, how stored values become the model's, names of members."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from manifest_examples import MODALITIES, NEW_KINDS, assert_refused, changed, shard_for

from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality, check_distinct_names
from jmvae_dist.errors import DataError


@pytest.mark.parametrize(
    ("change", "message"),
    [
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
        (changed("modalities", 0, "scale", value=1e300), r"modalities\[0\]: scale is beyond the range of float32"),
        (changed("modalities", 0, "offset", value=-1e39), r"modalities\[0\]: offset is beyond the range of float32"),
        (changed("modalities", 0, "scale", value=1e-60), r"modalities\[0\]: scale must not be 0 \(as float32\)"),
        (changed("modalities", 0, "a\x1b[2J", value=0), r"modalities\[0\]\.a\\x1b\[2J: is not a known key"),
    ],
)
def test_malformed_modalities_name_file_and_key(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    assert_refused(tmp_path, change, message)


def test_a_modality_of_deep_lists() -> None:
    offset: Any = 0.0
    for _ in range(5000):
        offset = [offset]
    with pytest.raises(ValueError, match="offset must be"):
        Modality("x", "float32", (1,), offset=offset)


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


def test_version_1_has_none_of_the_new_kinds(tmp_path: Path) -> None:
    record = Manifest.create([NEW_KINDS[2]], [shard_for(1)], {}).to_json() | {"format_version": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"modalities\[0\]: needs format_version 2"):
        Manifest.load(tmp_path / "manifest.json")


def test_two_modalities_of_one_member() -> None:
    check_distinct_names(NEW_KINDS[4:])  # different fields of one JSON document
    with pytest.raises(ValueError, match="both the member 'JPG'"):
        check_distinct_names([NEW_KINDS[0], Modality.image("other", (3, 8, 8), "JPG")])

"""Names of classes out of manifests and checkpoints, of which nobody vouches for either."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmvae_dist.data.class_names import (
    MAX_NAME_CHARACTERS,
    MAX_NAMED_CLASSES,
    class_names,
    find_moved_class,
    manifest_class_names,
)
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality

STATE = Modality.classes("state", 2)
VECTOR = Modality("vector", "float32", (3,))


def manifest_of(stated: Any) -> Manifest:
    return Manifest.create([STATE, VECTOR], [], {"name": "csv", "class_names": stated})


def described(stated: Any, **others: Any) -> dict[str, Any]:
    return {"state": {**STATE.to_json(), "class_names": stated, **others}, "vector": VECTOR.to_json()}


def test_names_are_those_of_the_data_or_else_of_the_model() -> None:
    names = ["benign", "malignant"]
    assert manifest_class_names(manifest_of({"state": names})) == {"state": tuple(names)}
    assert manifest_class_names(Manifest.create([STATE], [], {})) == {}
    assert class_names(described(names)) == {"state": tuple(names)}
    assert class_names(described(names), manifest_of({})) == {"state": tuple(names)}
    assert class_names(described(names), manifest_of({"state": ["well", "sick"]})) == {"state": ("well", "sick")}
    # An older checkpoint, and one that is not ours, say nothing.
    assert class_names({"state": STATE.to_json()}) == class_names({}) == {}
    assert class_names({}, manifest_of({"state": names})) == {"state": tuple(names)}


def test_transformed_classes_are_other_ones() -> None:
    transforms = [{"class_path": "mine.Merge"}]
    stated = manifest_of({"state": ["a", "b"]})
    assert class_names(described(["a", "b"], transforms=transforms), stated) == {}


@pytest.mark.parametrize(
    "value",
    [None, 5, "ab", {"0": "a"}, [], ["a"], ["a", "b", "c"], ["a", 1], ["a", ""], ["a", "a"], ["a", ["b"]]],
    ids=str,
)
def test_names_that_do_not_fit_are_none(value: Any) -> None:
    assert manifest_class_names(manifest_of({"state": value})) == {}
    assert manifest_class_names(manifest_of(value)) == {}
    assert class_names(described(value)) == {}


def test_number_and_length_are_limited() -> None:
    most = {"a": {"num_classes": MAX_NAMED_CLASSES, "class_names": [str(n) for n in range(MAX_NAMED_CLASSES)]}}
    assert len(class_names(most)["a"]) == MAX_NAMED_CLASSES
    more = {"a": {"num_classes": MAX_NAMED_CLASSES + 1, "class_names": [*most["a"]["class_names"], "x"]}}
    assert class_names(more) == {}
    long = "x" * MAX_NAME_CHARACTERS
    assert class_names(described([long, f"y{long}"]))["state"] == (long, f"y{'x' * (MAX_NAME_CHARACTERS - 4)}...")
    # Two that cannot be told apart any more are none.
    assert class_names(described([f"{long}1", f"{long}2"])) == {}


@pytest.mark.parametrize("entry", [None, 3, "state", ["class_names"], {"class_names": ["a", "b"]}], ids=str)
def test_a_checkpoint_may_say_anything(entry: Any) -> None:
    assert class_names({"state": entry}) == {}


@given(st.lists(st.text(), min_size=2, max_size=2))
def test_what_is_shown_is_short_and_printable(stated: list[str]) -> None:
    for name in class_names(described(stated)).get("state", ()):
        assert name.isprintable()
        assert 0 < len(name) <= MAX_NAME_CHARACTERS


def test_moved_classes_are_found_and_renamed_ones_are_not() -> None:
    assert find_moved_class(["a", "b"], ["a", "b"]) is None
    assert find_moved_class(["gut", "schlecht"], ["good", "bad"]) is None
    assert find_moved_class(["b", "a"], ["a", "b"]) == (0, 1)
    assert find_moved_class(["x", "c", "a"], ["a", "b", "c"]) == (1, 2)

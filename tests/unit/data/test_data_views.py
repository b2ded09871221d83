"""What the model sees: resizing, transforms by name, keyed randomness, and classes of the user's own."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jmvae_dist.data.modality import Modality
from jmvae_dist.data.views import SampleKeys, View, make_views, padding_ids
from jmvae_dist.errors import ConfigError, DataError

X = Modality("x", "float32", (2, 3))
PHOTO = Modality.image("photo", (3, None, None), "png", scale=1 / 255)
CAPTION = Modality.text("caption", 4, "txt")
GOLDEN_BITS = "100011011001110110100011"


def keys(*positions: int, is_training: bool = True) -> SampleKeys:
    return SampleKeys(np.array(positions, dtype=np.int64), is_training)


class AddPosition:
    """Adds a number and the sample's position."""

    def __init__(self, number: float = 0.0) -> None:
        self.number = number

    def __call__(self, values: np.ndarray, positions: np.ndarray) -> np.ndarray:
        if (values < 0).any():
            raise ValueError("negative")
        return (values + np.float32(self.number) + positions[:, None, None]).astype(np.float32)


class Flatten:
    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (int(np.prod(shape)),)

    def __call__(self, values: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return values.reshape(len(values), -1)


class Liar(Flatten):
    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape


class Words:
    vocabulary, padding_id = 5, 4

    def encode(self, text: str) -> list[int]:
        if not text.isprintable():
            raise ValueError("no words")
        return [len(word) for word in text.split()]


def own(name: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": f"{__name__}.{name}", "init_args": init_args}


def test_steps_are_taken_in_order() -> None:
    view = View(X, [{"name": "scale", "offset": 1, "scale": 2}, {"name": "binarize", "threshold": 3}])
    stored = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    assert view.shape == (2, 3)
    assert view.to_model(stored, keys(0)).reshape(-1).tolist() == [0, 0, 0, 1, 1, 1]


def test_one_hot_adds_a_dimension() -> None:
    view = View(Modality("x", "uint8", (2,)), [{"name": "one_hot", "num_classes": 3}])
    assert view.shape == (2, 3)
    assert view.to_model(np.array([[2, 0]], np.uint8), keys(0)).tolist() == [[[0, 0, 1], [1, 0, 0]]]
    with pytest.raises(DataError, match="integers from 0 to 2"):
        view.to_model(np.array([[3, 0]], np.uint8), keys(0))


def png(height: int, width: int) -> bytes:
    """Left half black, right half white."""
    array = np.zeros((height, width, 3), np.uint8)
    array[:, width // 2 :] = 255
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_images_of_any_size_are_resized(fit: str) -> None:
    view = View(PHOTO, [{"name": "resize", "size": [4, 6], "fit": fit, "resample": "nearest"}])
    assert view.shape == view.stored_shape == (3, 4, 6)
    stored = np.stack([view.decode(png(*size)) for size in ((4, 6), (40, 60), (64, 12), (8, 100))])
    seen = view.to_model(stored, keys(0, 1, 2, 3))
    assert seen.shape == (4, 3, 4, 6)
    assert np.array_equal(seen, np.broadcast_to(np.repeat([0.0, 1.0], 3), seen.shape).astype(np.float32))


def test_images_of_any_size_need_a_resize() -> None:
    with pytest.raises(ConfigError, match=r"data\.transforms\.photo: the images differ in size .* resize"):
        View(PHOTO)


@pytest.mark.parametrize(
    ("modality", "transforms", "problem"),
    [
        (X, [{"name": "resize", "size": [2, 2]}], r"data\.transforms\.x\[0\]: resize is for encoding 'image'"),
        (PHOTO, [{"name": "scale"}, {"name": "resize", "size": [2, 2]}], r"photo\[1\]: resize .* comes first"),
        (X, [own("Missing")], "Missing cannot be imported"),
        (X, [{"class_path": "no_such_module_here.Missing"}], "cannot be imported"),
        (X, [own("AddPosition", wrong=1)], "does not take them .*'wrong'"),
    ],
    ids=["array", "second", "no_class", "no_module", "init_args"],
)
def test_what_does_not_fit_is_named(modality: Modality, transforms: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        View(modality, transforms)


def test_settings_for_modalities_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match=r"data\.transforms\.y: there is no such modality; the run uses x"):
        make_views([X], {"y": []})
    with pytest.raises(ConfigError, match=r"data\.tokenizers\.x: the modality is 'npy', not 'text'"):
        make_views([X], tokenizers={"x": own("Words")})


KEYED = [{"name": "binarize", "keyed": True}]


def test_keyed_bits_never_change() -> None:
    """They are part of what a run is: a resumed one must see the same."""
    stored = np.full((4, 2, 3), 0.5, np.float32)
    bits = View(X, KEYED, seed=7).to_model(stored, keys(0, 1, 2**33, 2**61))
    assert "".join(str(int(bit)) for bit in bits.reshape(-1)) == GOLDEN_BITS


def test_keyed_bits_depend_on_seed_position_modality_and_use_alone() -> None:
    stored = np.full((2, 2, 300), 0.5, np.float32)
    wide = Modality("x", "float32", (2, 300))
    other = Modality("y", "float32", (2, 300))
    base = View(wide, KEYED, seed=1).to_model(stored, keys(5, 6))
    assert np.array_equal(View(wide, KEYED, seed=1).to_model(stored, keys(6, 5)), base[::-1])
    different = [
        base[1:],
        View(wide, KEYED, seed=2).to_model(stored, keys(5, 6)),
        View(other, KEYED, seed=1).to_model(stored, keys(5, 6)),
        View(wide, KEYED, seed=1).to_model(stored, keys(5, 6, is_training=False)),
        View(wide, [{"name": "scale"}, *KEYED], seed=1).to_model(stored, keys(5, 6)),
    ]
    for values in different:
        assert 0.4 < (values[0] != base[0]).mean() < 0.6


def test_keyed_bits_have_the_probability_that_the_value_states() -> None:
    probabilities = np.array([0.0, 1e-9, 0.25, 0.75, 1.0], np.float32)
    stored = np.broadcast_to(probabilities, (4000, 5)).copy()
    seen = View(Modality("x", "float32", (5,)), KEYED).to_model(stored, SampleKeys(np.arange(4000)))
    assert seen[:, 0].sum() == 0
    assert seen[:, 4].sum() == 4000
    assert np.allclose(seen.mean(0), probabilities, atol=0.03)
    with pytest.raises(DataError, match="between 0 and 1"):
        View(Modality("x", "float32", (5,)), KEYED).to_model(stored * 2, SampleKeys(np.arange(4000)))


@given(cut=st.integers(0, 7), positions=st.lists(st.integers(0, 2**62 - 1), min_size=7, max_size=7))
def test_keyed_bits_do_not_depend_on_the_batch(cut: int, positions: list[int]) -> None:
    view, stored = View(X, KEYED, seed=3), np.full((7, 2, 3), 0.5, np.float32)
    parts = [
        view.to_model(stored[part], keys(*positions).take(part)) for part in (slice(None, cut), slice(cut, None))
    ]
    assert np.array_equal(view.to_model(stored, keys(*positions)), np.concatenate(parts))


def test_a_class_of_the_users_own() -> None:
    view = View(X, [own("AddPosition", number=0.5), own("Flatten")])
    assert view.shape == (6,)
    seen = view.to_model(np.zeros((2, 2, 3), np.float32), keys(3, 9))
    assert seen.tolist() == [[3.5] * 6, [9.5] * 6]
    with pytest.raises(DataError, match="AddPosition: negative"):
        view.to_model(np.full((1, 2, 3), -1, np.float32), keys(0))
    with pytest.raises(DataError, match=r"Liar returned float32 of shape \[1, 6\]; .* promises float32 \[1, 2, 3\]"):
        View(X, [own("Liar")]).to_model(np.zeros((1, 2, 3), np.float32), keys(0))


def test_a_class_must_be_trusted_by_name() -> None:
    with pytest.raises(ConfigError, match=rf"add --trust-class {__name__}\.Flatten"):
        View(X, [own("Flatten")], trusted=[f"{__name__}.Liar"])
    assert View(X, [own("Flatten")], trusted=[f"{__name__}.Flatten"]).shape == (6,)


def test_padding_is_known_of_texts_alone() -> None:
    views = make_views([X, Modality.classes("state", 3), CAPTION])
    assert padding_ids(views) == {"caption": 256}
    assert View(CAPTION, tokenizer=own("Words")).padding_id == 4
    assert View(CAPTION, [own("Flatten")]).padding_id is None


def test_a_tokenizer_of_the_users_own() -> None:
    view = View(CAPTION, tokenizer={**own("Words"), "length": 3})
    assert view.shape == (3, 5)
    ids = view.decode(b"a bc")
    assert isinstance(ids, np.ndarray)
    assert ids.tolist() == [1, 2, 4]
    assert view.to_model(ids[None], keys(0)).argmax(-1).tolist() == [[1, 2, 4]]
    with pytest.raises(DataError, match=r"Words\.encode returned an id outside its vocabulary of 5"):
        view.decode(b"abcdefg")
    with pytest.raises(DataError, match="Words: no words"):
        view.decode(b"a\0b")
    with pytest.raises(ConfigError, match="must have integers `vocabulary`"):
        View(CAPTION, tokenizer=own("Flatten"))

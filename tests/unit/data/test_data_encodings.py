"""Decoders of members: right values, and a DataError, never anything else, for what is damaged or hostile."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jmvae_dist.data.encodings import MAX_DOCUMENT_BYTES, MAX_IMAGE_PIXELS, decode_member
from jmvae_dist.data.modality import Modality
from jmvae_dist.errors import DataError

RGB = Modality.image("photo", (3, 5, 7), "png|jpg")
GREY = Modality.image("photo", (1, 5, 7), "png")
CAPTION = Modality.text("caption", 6, "txt")
POSE = Modality("pose", "float32", (2, 2), "json", member="json", field="people.0.pose")


def pixels(channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)


def picture(array: np.ndarray, kind: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that claims, and decodes to, as many pixels as one likes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes((width + 1) * min(height, 8)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_png_is_exact_and_channels_come_first() -> None:
    array = pixels()
    assert np.array_equal(decode_member(picture(array), RGB), array.transpose(2, 0, 1))
    assert np.array_equal(decode_member(picture(array[..., :1]), GREY), array[None, ..., 0])


def test_jpeg_is_what_pillow_decodes() -> None:
    content = picture(pixels(), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1)
    assert np.array_equal(decode_member(content, RGB), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("modality", [RGB, GREY], ids=["to_rgb", "to_grey"])
def test_the_declared_channels_are_delivered(mode: str, modality: Modality) -> None:
    decoded = decode_member(picture(pixels(), mode=mode), modality)
    assert isinstance(decoded, np.ndarray)
    assert (decoded.shape, decoded.dtype) == (modality.shape, np.uint8)


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def grey_16_bit() -> bytes:
    return picture(np.arange(35, dtype=np.uint16).reshape(5, 7, 1) * 1000)


BAD_IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "not_an_image": (lambda: b"<html>", "not a sound PNG or JPEG: cannot identify"),
    "empty": (lambda: b"", "not a sound PNG or JPEG"),
    "truncated_png": (lambda: picture(pixels())[:-40], "the PNG is truncated"),
    "png_without_its_end": (lambda: picture(pixels())[:-12], "the PNG is truncated"),
    "png_with_a_flipped_bit": (lambda: flipped(picture(pixels()), 60), "a checksum of the PNG is wrong"),
    "truncated_jpeg": (lambda: picture(pixels(), "JPEG")[:-60], "not a sound PNG or JPEG: .*truncated"),
    "another_format": (lambda: picture(pixels(), "BMP"), "not a sound PNG or JPEG: cannot identify"),
    "another_size": (lambda: picture(pixels()[:4]), "4 x 7 pixels, the manifest says 5 x 7; bring it to this size"),
    "16_bits": (grey_16_bit, "more than 8 bits per channel"),
    "too_many_pixels": (lambda: bomb(2**13, 2**13), f"8192 x 8192 pixels; the limit is {MAX_IMAGE_PIXELS}"),
    "a_bomb": (lambda: bomb(2**15, 2**15), "not a sound PNG or JPEG|the limit is"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images_are_refused(kind: str) -> None:
    make, problem = BAD_IMAGES[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(DataError, match=problem):
            decode_member(make(), RGB)


def test_text_is_cut_and_padded() -> None:
    assert decode_member("häßlich".encode(), CAPTION).tolist() == list("häßlich".encode())[:6]  # type: ignore[union-attr]
    assert decode_member(b"ab", CAPTION).tolist() == [97, 98, 256, 256, 256, 256]  # type: ignore[union-attr]
    assert decode_member(b"", CAPTION).tolist() == [256] * 6  # type: ignore[union-attr]


def test_what_the_model_sees_of_a_text() -> None:
    seen = CAPTION.to_model(np.stack([decode_member(b"ab", CAPTION)]))
    assert (seen.shape, seen.dtype) == ((1, 6, 257), np.float32)
    assert seen.argmax(-1).tolist() == [[97, 98, 256, 256, 256, 256]]
    assert (seen.sum(-1) == 1).all()


def document(pose: Any) -> bytes:
    return json.dumps({"people": [{"pose": pose}, {}], "other": "text"}).encode()


def test_json_numbers_of_a_field() -> None:
    decoded = decode_member(document([[1, 2.5], [3, -4]]), POSE)
    assert np.array_equal(decoded, np.array([[1, 2.5], [3, -4]], dtype=np.float32))
    scalar = Modality("score", "int64", (), "json")
    assert decode_member(str(2**62 + 1).encode(), scalar) == 2**62 + 1
    assert decode_member(b"3.0", scalar) == 3
    flags = Modality("flags", "bool", (2,), "json")
    assert np.array_equal(decode_member(b"[true, false]", flags), [True, False])


BAD_JSON = {
    "not_json": (b"{", POSE, "not valid JSON"),
    "deep": (b"[" * 100_000, POSE, "not valid JSON"),
    "not_utf8": (b"\xff", POSE, "not UTF-8"),
    "no_field": (b'{"people": []}', POSE, "has no field 'people.0.pose'"),
    "repeated_key": (b'{"people": 1, "people": 2}', POSE, "same key twice"),
    "ragged": (document([[1, 2], [3]]), POSE, "something other than numbers"),
    "text": (document([["1", 2], [3, 4]]), POSE, "something other than numbers"),
    "null": (document(None), POSE, "something other than numbers"),
    "nan": (document([[float("nan"), 2], [3, 4]]), POSE, "NaN is not a number"),
    "infinite": (b"[1e999]", Modality("x", "float64", (1,), "json"), "something other than numbers"),
    "another_shape": (document([1, 2]), POSE, r"numbers of shape \[2\], the manifest says \[2, 2\]"),
    "fraction": (b"[1.5]", Modality("x", "int32", (1,), "json"), "a number that int32 cannot"),
    "negative": (b"[-1]", Modality("x", "uint8", (1,), "json"), "a number that uint8 cannot"),
    "rounded": (f"[{2**53 + 1}, 0.5]".encode(), Modality("x", "int64", (2,), "json"), "a number that int64 cannot"),
    "endless": (b"[" + b"9" * 5000 + b"]", Modality("x", "int64", (1,), "json"), "not valid JSON|beyond the range"),
    "too_long": (b" " * (MAX_DOCUMENT_BYTES + 1), POSE, "more than 16777216 bytes"),
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json_is_refused(kind: str) -> None:
    content, modality, problem = BAD_JSON[kind]
    with pytest.raises(DataError, match=problem):
        decode_member(content, modality)


@pytest.mark.parametrize("content", [b"7", b"07", b"007", b"7\n", b" 7 "])
def test_class_indices_as_others_write_them(content: bytes) -> None:
    assert decode_member(content, Modality.classes("label", 10, "cls")) == 7


PREFIXES = (b"", picture(pixels())[:60], picture(pixels(), "JPEG")[:200], b"[[1, 2], ", b'{"people": [')


@given(content=st.binary(max_size=300), prefix=st.sampled_from(PREFIXES))
def test_no_bytes_crash_the_decoders(content: bytes, prefix: bytes) -> None:
    for modality in (RGB, CAPTION, POSE):
        try:
            decode_member(prefix + content, modality)
        except DataError:
            continue

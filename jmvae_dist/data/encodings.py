"""Decoders: the bytes of one member to numbers, by the encoding that the manifest declares.

A fixed list. None of them can run code, and each bounds what it will hold in memory before it decodes.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from jmvae_dist.data.modality import Modality, nested_shape
from jmvae_dist.data.tokenizers import TOKENIZERS, Tokenizer, token_ids
from jmvae_dist.data.untrusted import parse_json
from jmvae_dist.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

# A decoded picture of this many pixels and three channels takes 100 MB.
MAX_IMAGE_PIXELS = 2**25
MAX_IMAGE_BYTES = 256 * 2**20
MAX_DOCUMENT_BYTES = 16 * 2**20
_MAX_NPY_HEADER_BYTES = 4096
MAX_NPY_HEADER_BYTES = _MAX_NPY_HEADER_BYTES + 16  # with magic, version and length
MAX_CLASS_BYTES = 24
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNK_BYTES = 12  # length, type and checksum around a chunk's data
_IMAGE_FORMATS = ("PNG", "JPEG")
# Eight bits per channel; what has more, or floats, would be clipped silently.
_IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")

# What becomes of a picture before it is an array, such as a resize; it says which size comes out.
Rework = Callable[["Image"], "Image"]


def max_member_bytes(modality: Modality) -> int:
    """Most bytes that a member of a modality can have; what is longer is refused, however it begins."""
    if modality.encoding == "cls":
        return MAX_CLASS_BYTES
    if modality.encoding == "image":
        return MAX_IMAGE_BYTES
    if modality.encoding in ("text", "json"):
        return MAX_DOCUMENT_BYTES
    return MAX_NPY_HEADER_BYTES + modality.stored_bytes


def decode_member(
    content: bytes,
    modality: Modality,
    tokenizer: Tokenizer | None = None,
    length: int | None = None,
    rework: Rework | None = None,
) -> np.ndarray | int:
    """One member's bytes to its decoded value, of the modality's dtype and `stored_shape`.

    Args:
        content: the member.
        modality: what it should be.
        tokenizer, length: in place of those that a `text` modality names.
        rework: for images, which may then have any size.

    Raises:
        DataError: the content is not what the modality declares.
    """
    if modality.encoding == "cls":
        return _decode_class(content, modality)
    if modality.encoding == "image":
        return _decode_image(content, modality, rework)
    if modality.encoding == "text":
        return _decode_text(content, modality, tokenizer, length or modality.length)
    if modality.encoding == "json":
        return _decode_json(content, modality)
    return _decode_npy(content, modality)


# Arrays and classes


def _decode_npy(content: bytes, modality: Modality) -> np.ndarray:
    dtype, shape, fortran_order, header_bytes = parse_npy_header(content)
    if dtype != np.dtype(modality.dtype):
        raise DataError(f"stored dtype is {dtype.str}, the manifest says {np.dtype(modality.dtype).str}")
    if shape != modality.shape:
        raise DataError(f"stored shape is {list(shape)}, the manifest says {list(modality.shape)}")
    if len(content) != header_bytes + modality.stored_bytes:
        raise DataError(f"{len(content)} bytes, expected {header_bytes + modality.stored_bytes}")
    return np.ndarray(shape, dtype, content, header_bytes, order="F" if fortran_order else "C")


def parse_npy_header(content: bytes) -> tuple[np.dtype, tuple[int, ...], bool, int]:
    """dtype, shape, Fortran order and length in bytes of an npy header (versions 1 and 2).

    numpy's own parser reads the header as a literal, never as code; object dtypes, which would need pickle,
    are refused.

    Raises:
        DataError: not a sound npy header.
    """
    file = io.BytesIO(content[:MAX_NPY_HEADER_BYTES])
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(file, max_header_size=_MAX_NPY_HEADER_BYTES)
        elif version == (2, 0):
            header = np.lib.format.read_array_header_2_0(file, max_header_size=_MAX_NPY_HEADER_BYTES)
        else:
            raise DataError(f"npy version {version} is not supported")
    except DataError:
        raise
    except Exception as error:  # numpy raises ValueError, TypeError, SyntaxError, tokenize errors on damaged headers
        raise DataError(f"not a valid npy array: {str(error)[:200]}") from None
    shape, fortran_order, dtype = header
    if dtype.hasobject:
        raise DataError("holds Python objects, which are never loaded")
    return dtype, shape, fortran_order, file.tell()


def _decode_class(content: bytes, modality: Modality) -> int:
    """Others write class indices without padding, with more of it, or with a line end."""
    assert modality.num_classes is not None
    if len(content) > MAX_CLASS_BYTES:
        raise DataError(f"more than {MAX_CLASS_BYTES} bytes, the limit of a class index")
    digits = content.strip()
    if not digits.isdigit():
        shown = content[:20].decode("ascii", "backslashreplace")
        raise DataError(f"{shown!r} is not a class index")
    class_index = int(digits)
    if class_index >= modality.num_classes:
        raise DataError(f"class index {class_index} is not below num_classes {modality.num_classes}")
    return class_index


# Images


def _decode_image(content: bytes, modality: Modality, rework: Rework | None) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    if len(content) > MAX_IMAGE_BYTES:
        raise DataError(f"more than {MAX_IMAGE_BYTES} bytes, the limit of an image")
    if content.startswith(_PNG_SIGNATURE):
        _check_png(content)
    channels = modality.fixed_channels
    try:
        # Opening reads the header only: size and mode are judged before any pixel is decoded.
        with Image.open(io.BytesIO(content), formats=_IMAGE_FORMATS) as image:
            _check_image(image, modality, has_rework=rework is not None)
            image.load()
            converted = _with_channels(image, channels)
            pixels = np.asarray(converted if rework is None else rework(converted), dtype=np.uint8)
    except (DataError, MemoryError):  # a lack of memory says nothing against the picture
        raise
    except UnidentifiedImageError:  # its message is about the object that held the bytes
        raise DataError("not a sound PNG or JPEG: cannot identify what it is") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, EOFError, zlib and struct errors
        raise DataError(f"not a sound PNG or JPEG: {str(error)[:200] or type(error).__name__}") from None
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _check_png(content: bytes) -> None:
    """Checksums and completeness of a PNG: Pillow looks at neither once it has the pixels it wants.

    Raises:
        DataError: a chunk is damaged, or the end is missing.
    """
    position = len(_PNG_SIGNATURE)
    while position + _PNG_CHUNK_BYTES <= len(content):
        (length,) = struct.unpack_from(">I", content, position)
        end = position + _PNG_CHUNK_BYTES + length
        if end > len(content):
            break
        if zlib.crc32(content[position + 4 : end - 4]) != struct.unpack_from(">I", content, end - 4)[0]:
            raise DataError("not a sound PNG or JPEG: a checksum of the PNG is wrong")
        if content[position + 4 : position + 8] == b"IEND":
            return
        position = end
    raise DataError("not a sound PNG or JPEG: the PNG is truncated")


def image_header(content: bytes) -> tuple[str, int, int]:
    """Mode, as Pillow calls it, height and width of an image, from the beginning of its file.

    Raises:
        DataError: not a PNG or JPEG, or one that would not be decoded.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=_IMAGE_FORMATS) as image:
            _check_picture(image)
            return image.mode, image.height, image.width
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError("not a sound PNG or JPEG: cannot identify what it is") from None
    except Exception as error:  # as above
        raise DataError(f"not a sound PNG or JPEG: {str(error)[:200] or type(error).__name__}") from None


def _check_image(image: Image, modality: Modality, has_rework: bool) -> None:
    _check_picture(image)
    width, height = image.size
    if not has_rework and modality.has_fixed_shape and (height, width) != modality.shape[1:]:
        raise DataError(
            f"an image of {height} x {width} pixels, the manifest says {modality.shape[1]} x {modality.shape[2]}; "
            "bring it to this size before it is written into shards, or train with a resize (data.transforms)"
        )


def _check_picture(image: Image) -> None:
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise DataError(f"an image of {height} x {width} pixels; the limit is {MAX_IMAGE_PIXELS} pixels")
    if image.mode not in _IMAGE_MODES:
        raise DataError(f"an image of mode {image.mode!r}; more than 8 bits per channel are not supported")


def _with_channels(image: Image, channels: int) -> Image:
    """As grey (L) or RGB; transparency is left out."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode:
        return image
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")
    return image.convert(mode)


# Documents


def decode_document(content: bytes) -> str:
    """The text of a member; raises DataError if it is not UTF-8 or too long."""
    if len(content) > MAX_DOCUMENT_BYTES:
        raise DataError(f"more than {MAX_DOCUMENT_BYTES} bytes, the limit of a text or JSON member")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text ({error.reason} at byte {error.start})") from None


def _decode_text(content: bytes, modality: Modality, tokenizer: Tokenizer | None, length: int | None) -> np.ndarray:
    assert modality.tokenizer is not None
    assert length is not None
    return token_ids(tokenizer or TOKENIZERS[modality.tokenizer](), decode_document(content), length)


def json_value(content: bytes, field: str | None) -> Any:
    """What a JSON member holds at a field, which is the document if it is None.

    Raises:
        DataError: not JSON, or without that field.
    """
    try:
        value = parse_json(decode_document(content))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {str(error)[:200]}") from None
    return value if field is None else _lookup(value, field)


def _decode_json(content: bytes, modality: Modality) -> np.ndarray:
    value = json_value(content, modality.field)
    shape = nested_shape(value, numbers=bool if modality.dtype == "bool" else None)
    if shape != modality.shape:
        found = "something other than numbers in even lists" if shape is None else f"numbers of shape {list(shape)}"
        raise DataError(f"JSON holds {found}, the manifest says {list(modality.shape)}")
    return _exact_array(value, modality)


def _lookup(value: Any, field: str) -> Any:
    for part in field.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and len(part) < 10 and int(part) < len(value):
            value = value[int(part)]
        else:
            raise DataError(f"JSON has no field {field!r}")
    return value


def _exact_array(value: Any, modality: Modality) -> np.ndarray:
    """Integers exactly or not at all; fractions rounded to the declared float."""
    try:
        numbers = np.asarray(value)
        if numbers.dtype.kind == "O":
            raise OverflowError
        with np.errstate(over="ignore", invalid="ignore"):
            array = numbers.astype(modality.dtype)
    except OverflowError:
        raise DataError(f"JSON holds an integer beyond the range of {modality.dtype}") from None
    # Of integers beyond 2**53 and fractions in one list numpy makes floats, which no longer tell them apart.
    is_rounded = numbers.dtype.kind == "f" and bool(np.any(np.abs(numbers) > 2**53))
    if array.dtype.kind in "iu" and (is_rounded or not np.array_equal(array, numbers)):
        raise DataError(f"JSON holds a number that {modality.dtype} cannot")
    return array

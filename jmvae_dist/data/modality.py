"""Modalities: what a sample is made of, and the arithmetic from what is stored of one to what the model sees.

A modality fixes dtype, shape, encoding and linear transform of one part of every sample, and checks that they fit
together; here is also how a manifest states it. What decodes the members is in `encodings`, what a run makes of the
values in `views`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jmvae_dist.checks import is_integer
from jmvae_dist.data.tokenizers import TOKENIZERS
from jmvae_dist.data.untrusted import DocumentChecks

ENCODINGS = ("npy", "cls", "image", "text", "json")
DTYPES = (
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float16",
    "float32",
    "float64",
)
MAX_SAMPLE_BYTES = 2**30
MAX_CLASSES = 1_000_000
MAX_DIMENSIONS = 8
MAX_ALTERNATIVES = 8

# The key ends at the first dot of a member's name, and USTAR names have 100 bytes.
_MODALITY_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
# What follows the first dot of a name: printable ASCII, and never a folder.
_MEMBER = re.compile(r"[A-Za-z0-9_+@=-]+(\.[A-Za-z0-9_+@=-]+)*")
_MAX_MEMBER_CHARACTERS = 80
_MAX_FIELD_CHARACTERS = 200

_REQUIRED_KEYS = {"name", "encoding", "dtype", "shape", "offset", "scale"}
_OPTIONAL_KEYS = ("num_classes", "member", "length", "tokenizer", "field")

NestedNumbers = float | list["NestedNumbers"]


@dataclass(frozen=True)
class Modality:
    """One modality of every sample.

    Attributes:
        name: how settings, metrics and messages call it.
        dtype: numpy name of the decoded dtype: that of the array for `npy` and `json`, `uint8` for `image`, `int64`
            for `cls` and `text`, whose class indices and token ids it is.
        shape: shape of one sample as the model sees it without transforms of a run: `(num_classes,)` for `cls`,
            `(length, vocabulary)` for `text`, (C, H, W) for `image`, where None for H and W says that they vary: a
            run must then resize.
        encoding: how the member holds it: `npy` (a numpy array), `cls` (an ASCII class index, which becomes a one-hot
            vector), `image` (PNG or JPEG; C is 1 or 3), `text` (UTF-8, which becomes one-hot vectors of token ids) or
            `json` (a number or nested lists of numbers).
        num_classes: for `cls` only.
        offset, scale: the model sees float32 `(decoded - offset) * scale`; a number, or nested lists of `shape`. Not
            for `cls` and `text`.
        member: what follows `<key>.` in the member's name, where that is not `<name>.<encoding>`. Several, separated
            by `|`, say that a sample may have any of them: `jpg|jpeg|png`.
        length: number of tokens, for `text` only; longer texts are cut, shorter ones padded.
        tokenizer: one of `TOKENIZERS`, for `text` only.
        field: for `json` only: where in the document the numbers are, keys and list positions joined by dots; None:
            they are the document.

    Raises:
        ValueError: an attribute is of the wrong type, out of range, or contradicts another.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    encoding: str = "npy"
    num_classes: int | None = None
    offset: NestedNumbers = 0.0
    scale: NestedNumbers = 1.0
    member: str | None = None
    length: int | None = None
    tokenizer: str | None = None
    field: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _MODALITY_NAME.fullmatch(self.name):
            raise ValueError(
                f"name {self.name!r} must be a letter followed by at most 39 letters, digits, '_' or '-'"
            )
        if self.encoding not in ENCODINGS:
            raise ValueError(f"encoding {self.encoding!r} is not one of {', '.join(ENCODINGS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        self._check_shape()
        self._check_member()
        self._check_encoding()
        self._check_transform()

    def _check_shape(self) -> None:
        if not isinstance(self.shape, tuple) or not all(_is_size(size) for size in self.shape):
            raise ValueError(f"shape {self.shape!r} must be positive integers")
        if None in self.shape and (self.encoding != "image" or None in self.shape[:1]):
            raise ValueError(f"shape {list(self.shape)}: only height and width of encoding 'image' may vary")
        if len(self.shape) > MAX_DIMENSIONS:
            raise ValueError(f"shape {list(self.shape)} has more than {MAX_DIMENSIONS} dimensions")
        if math.prod(size or 1 for size in self.shape) * max(4, np.dtype(self.dtype).itemsize) > MAX_SAMPLE_BYTES:
            raise ValueError(f"shape {list(self.shape)} needs more than {MAX_SAMPLE_BYTES} bytes per sample")

    def _check_member(self) -> None:
        if self.member is None:
            return
        alternatives = self.member.split("|") if isinstance(self.member, str) else [""]
        if len({name.lower() for name in alternatives}) != len(alternatives) or len(alternatives) > MAX_ALTERNATIVES:
            raise ValueError(f"member {self.member!r} must be at most {MAX_ALTERNATIVES} different names")
        for name in alternatives:
            if not _MEMBER.fullmatch(name) or len(name) > _MAX_MEMBER_CHARACTERS:
                raise ValueError(f"member {self.member!r} must be file extensions such as 'jpg' or 'seg.png'")

    def _check_encoding(self) -> None:
        for key, encoding in (("num_classes", "cls"), ("length", "text"), ("tokenizer", "text"), ("field", "json")):
            if self.encoding != encoding and getattr(self, key) is not None:
                raise ValueError(f"{key} belongs to encoding {encoding!r} only")
        if self.encoding == "cls":
            self._check_classes()
        elif self.encoding == "text":
            self._check_text()
        elif self.encoding == "image":
            if self.dtype != "uint8" or len(self.shape) != 3 or self.shape[0] not in (1, 3):
                raise ValueError("encoding 'image' needs dtype 'uint8' and shape [C, H, W] with C = 1 or 3")
            if (self.shape[1] is None) != (self.shape[2] is None):
                raise ValueError(f"shape {list(self.shape)}: height and width are both fixed or both null")
        elif self.encoding == "json" and self.field is not None:
            valid = isinstance(self.field, str) and 0 < len(self.field) <= _MAX_FIELD_CHARACTERS
            if not valid or not self.field.isprintable() or "" in self.field.split("."):
                raise ValueError(f"field {self.field!r} must be keys and list positions joined by dots")

    def _check_classes(self) -> None:
        if self.num_classes is None or not is_integer(self.num_classes):
            raise ValueError("encoding 'cls' needs an integer num_classes")
        if not 1 <= self.num_classes <= MAX_CLASSES:
            raise ValueError(f"num_classes {self.num_classes!r} must be between 1 and {MAX_CLASSES}")
        if self.dtype != "int64" or self.shape != (self.num_classes,):
            raise ValueError(f"encoding 'cls' needs dtype 'int64' and shape [{self.num_classes}]")

    def _check_text(self) -> None:
        if not is_integer(self.length) or not isinstance(self.tokenizer, str):
            raise ValueError("encoding 'text' needs an integer length and a tokenizer")
        if self.tokenizer not in TOKENIZERS:
            raise ValueError(f"tokenizer {self.tokenizer!r} is not one of {', '.join(TOKENIZERS)}")
        shape = (self.length, TOKENIZERS[self.tokenizer].vocabulary)
        if self.dtype != "int64" or self.shape != shape:
            raise ValueError(f"encoding 'text' needs dtype 'int64' and shape {list(shape)}")

    def _check_transform(self) -> None:
        if self.encoding in ("cls", "text"):
            if self.offset != 0 or self.scale != 1:
                raise ValueError(f"encoding {self.encoding!r} takes no offset or scale")
            return
        for key, value in (("offset", self.offset), ("scale", self.scale)):
            if not _is_number(value) and not (isinstance(value, list) and nested_shape(value) == self.shape):
                raise ValueError(f"{key} must be a finite number or nested lists of shape {list(self.shape)}")
        offset, scale = self._transform
        for key, numbers in (("offset", offset), ("scale", scale)):
            if not np.isfinite(numbers).all():
                raise ValueError(f"{key} is beyond the range of {self._compute_dtype}")
        if not scale.all():
            raise ValueError(f"scale must not be 0 (as {self._compute_dtype}): every value would become 0")

    @classmethod
    def classes(cls, name: str, num_classes: int, member: str | None = None) -> Modality:
        """A `cls` modality."""
        return cls(name, "int64", (num_classes,), "cls", num_classes, member=member)

    @classmethod
    def image(
        cls,
        name: str,
        shape: tuple[int | None, ...],
        member: str | None = None,
        offset: NestedNumbers = 0.0,
        scale: NestedNumbers = 1.0,
    ) -> Modality:
        """An `image` modality of shape (C, H, W); None for H and W: they vary."""
        return cls(name, "uint8", shape, "image", None, offset, scale, member)

    @classmethod
    def text(cls, name: str, length: int, member: str | None = None, tokenizer: str = "bytes") -> Modality:
        """A `text` modality of `length` tokens.

        Raises:
            ValueError: there is no such tokenizer.
        """
        vocabulary = TOKENIZERS[tokenizer].vocabulary if tokenizer in TOKENIZERS else 1
        return cls(name, "int64", (length, vocabulary), "text", member=member, length=length, tokenizer=tokenizer)

    @property
    def extensions(self) -> tuple[str, ...]:
        """What may follow `<key>.` in the member's name; one of them does."""
        return tuple(self.member.split("|")) if self.member is not None else (f"{self.name}.{self.encoding}",)

    @property
    def has_fixed_shape(self) -> bool:
        """Whether all samples have one shape."""
        return None not in self.shape

    @property
    def fixed_channels(self) -> int:
        """C of an `image`."""
        assert self.encoding == "image"
        assert self.shape[0] is not None
        return self.shape[0]

    @property
    def fixed_shape(self) -> tuple[int, ...]:
        """The shape of a modality whose shape does not vary."""
        assert self.has_fixed_shape
        return tuple(size for size in self.shape if size is not None)

    @property
    def extension(self) -> str:
        """What follows `<key>.` in the name of a member that is written; the first of `extensions`."""
        return self.extensions[0]

    @property
    def class_digits(self) -> int:
        """Digits of a stored class index; fixed, so that the samples of a shard have one layout."""
        assert self.num_classes is not None
        return len(str(self.num_classes - 1))

    @property
    def stored_bytes(self) -> int:
        """Bytes of the decoded value of one sample, without headers; 0 where it varies."""
        if self.encoding == "cls":
            return self.class_digits
        if not self.has_fixed_shape:
            return 0
        return math.prod(self.stored_shape) * np.dtype(self.dtype).itemsize

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one decoded value: () for a class index, (length,) for token ids, else `shape`."""
        if self.encoding == "cls":
            return ()
        if self.encoding == "text":
            return self.fixed_shape[:1]
        return self.fixed_shape

    def to_model(self, stored: np.ndarray) -> np.ndarray:
        """What the model sees, float32 (B, *shape), of decoded values (B, *stored_shape).

        The arithmetic is in float32 where it holds every decoded value exactly, in float64 otherwise.
        """
        if self.encoding in ("cls", "text"):
            return one_hot(stored, self.fixed_shape[-1])
        values = stored.astype(self._compute_dtype)
        offset, scale = self._transform
        # What is beyond the float32 range becomes infinite here; writer and reader report it as not finite.
        with np.errstate(over="ignore", invalid="ignore"):
            if self._has_offset:
                values -= offset
            if self._has_scale:
                values *= scale
            return values.astype(np.float32, copy=False)

    @cached_property
    def _has_offset(self) -> bool:
        return bool(np.any(self._transform[0]))

    @cached_property
    def _has_scale(self) -> bool:
        return bool(np.any(self._transform[1] != 1))

    @cached_property
    def is_always_finite(self) -> bool:
        """Whether `to_model` gives finite values for everything that the dtype can hold."""
        if self.encoding in ("cls", "text"):
            return True
        dtype = np.dtype(self.dtype)
        if dtype.kind not in "bui":
            return False
        # The transform is linear: what is largest afterwards was at one end of the range before.
        ends = [0, 1] if dtype.kind == "b" else [np.iinfo(dtype).min, np.iinfo(dtype).max]
        offset, scale = self._transform
        with np.errstate(over="ignore", invalid="ignore"):
            values = [((np.array(end, self._compute_dtype) - offset) * scale).astype(np.float32) for end in ends]
        return bool(np.isfinite(values).all())

    @cached_property
    def _compute_dtype(self) -> np.dtype:
        exact_in_float32 = np.can_cast(self.dtype, np.float32, casting="safe")
        return np.dtype(np.float32 if exact_in_float32 else np.float64)

    @cached_property
    def _transform(self) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(over="ignore"):
            return (
                np.asarray(self.offset, dtype=self._compute_dtype),
                np.asarray(self.scale, dtype=self._compute_dtype),
            )

    def to_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "name": self.name,
            "encoding": self.encoding,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "offset": self.offset,
            "scale": self.scale,
        }
        for key in _OPTIONAL_KEYS:
            if getattr(self, key) is not None:
                record[key] = getattr(self, key)
        return record

    @property
    def format_version(self) -> int:
        """The first version of the manifest that can describe this modality."""
        return 1 if self.encoding in ("npy", "cls") and self.member is None else 2


def parse_modalities(value: Any, checks: DocumentChecks) -> list[Modality]:
    """The entry `modalities` of a manifest.

    Raises:
        DataError: one is not sound, or two could be taken for each other.
    """
    modalities = []
    for number, entry in enumerate(checks.non_empty_list(value, "modalities")):
        key = f"modalities[{number}]"
        entry = checks.record(entry, key, _REQUIRED_KEYS, optional=frozenset(_OPTIONAL_KEYS))
        if not isinstance(entry["shape"], list):
            checks.fail(f"{key}.shape", "must be a list")
        try:
            modalities.append(Modality(**{**entry, "shape": tuple(entry["shape"])}))
        except (ValueError, TypeError) as error:
            checks.fail(key, str(error))
    try:
        check_distinct_names(modalities)
    except ValueError as error:
        checks.fail("modalities", str(error))
    return modalities


def check_distinct_names(modalities: Sequence[Modality]) -> None:
    """Raise ValueError if two modalities could be taken for each other.

    webdataset lower-cases extensions, so names that differ only in case would overwrite each other.
    """
    names: set[str] = set()
    for modality in modalities:
        if modality.name.lower() in names:
            raise ValueError(
                f"two modalities have the same name {modality.name!r} (upper and lower case are not told apart)"
            )
        names.add(modality.name.lower())
    members: dict[tuple[str, str | None], str] = {}
    for modality in modalities:
        for extension in modality.extensions:
            other = members.setdefault((extension.lower(), modality.field), modality.name)
            if other != modality.name:
                raise ValueError(f"modalities {other!r} and {modality.name!r} are both the member {extension!r}")


def one_hot(indices: np.ndarray, num_classes: int) -> np.ndarray:
    """One-hot vectors, float32 (*shape, num_classes), of integers (*shape) below `num_classes`."""
    vectors = np.zeros((indices.size, num_classes), dtype=np.float32)
    vectors[np.arange(indices.size), indices.reshape(-1)] = 1.0
    return vectors.reshape(*indices.shape, num_classes)


def nested_shape(
    value: Any, max_dimensions: int = MAX_DIMENSIONS, numbers: type[bool] | None = None
) -> tuple[int, ...] | None:
    """Shape of nested lists of finite numbers; None if ragged, too deep, or anything else is inside.

    Args:
        value: a JSON value.
        max_dimensions: how deep the lists may be.
        numbers: `bool`: true and false in place of numbers.
    """
    if not isinstance(value, list):
        return () if (isinstance(value, bool) if numbers is bool else _is_number(value)) else None
    if max_dimensions == 0:
        return None
    shapes = {nested_shape(entry, max_dimensions - 1, numbers) for entry in value}
    if len(shapes) != 1 or None in shapes:
        return None
    (inner,) = shapes
    assert inner is not None
    return (len(value), *inner)


def _is_size(value: Any) -> bool:
    return value is None or (is_integer(value) and value >= 1)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False

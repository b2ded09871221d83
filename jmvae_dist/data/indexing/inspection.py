"""What the members of a modality have in common: found while a foreign tar is indexed, from all of its samples.

Only headers and class indices are looked at here; `shards verify` decodes everything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from jmvae_dist.data.encodings import (
    MAX_CLASS_BYTES,
    MAX_DOCUMENT_BYTES,
    MAX_IMAGE_BYTES,
    decode_document,
    image_header,
    json_value,
    parse_npy_header,
)
from jmvae_dist.data.modality import DTYPES, MAX_CLASSES, Modality, NestedNumbers, nested_shape
from jmvae_dist.data.untrusted import printable
from jmvae_dist.errors import ConfigError, DataError

MAX_KINDS = 50
MAX_DEFAULT_TEXT_LENGTH = 512

_Key = TypeVar("_Key", bound=Hashable)

_MAX_HEADER_BYTES = 8192
_GRAY_MODES = {"1", "L"}

_ENCODINGS_BY_EXTENSION = {
    "npy": "npy",
    **dict.fromkeys(("cls", "cls2", "class", "count", "index", "inx", "id"), "cls"),
    **dict.fromkeys(("png", "jpg", "jpeg"), "image"),
    **dict.fromkeys(("txt", "text", "transcript"), "text"),
    "json": "json",
}


@dataclass(frozen=True)
class ModalityRequest:
    """A modality as far as its user describes it; what is None is found in the data.

    Attributes:
        name: of the modality.
        extensions: a sample has a member with one of these.
        encoding: as in `Modality`.
        num_classes: for `cls`.
        image_mode: `gray` or `rgb`, for `image`.
        length: number of tokens, for `text`.
        tokenizer: for `text`.
        field: for `json`.
        offset, scale: as in `Modality`; the scale of images is 1/255 if it is None.
    """

    name: str
    extensions: tuple[str, ...]
    encoding: str
    num_classes: int | None = None
    image_mode: str | None = None
    length: int | None = None
    tokenizer: str = "bytes"
    field: str | None = None
    offset: NestedNumbers = 0.0
    scale: NestedNumbers | None = None


def encoding_of_extension(extension: str) -> str | None:
    """The encoding that webdataset too would take an extension for; `mask.png` is an image like `png`."""
    return _ENCODINGS_BY_EXTENSION.get(extension.lower().rpartition(".")[2])


@dataclass
class Kind:
    """Members of one dtype and shape, or the like: how many there are, and where the first one is."""

    count: int
    example: str


@dataclass
class Facts:
    """What is known of the members of a modality so far.

    Attributes:
        kinds: by description, a JSON list: [dtype, shape] for `npy` and `json`, [mode, height, width] for `image`.
        largest: the largest class index, or number of bytes of a text; -1 before the first.
        largest_example: where that is.
    """

    kinds: dict[str, Kind] = field(default_factory=dict)
    largest: int = -1
    largest_example: str = ""

    def add_kind(self, description: Sequence[Any], example: str, count: int = 1) -> None:
        """Count members of one kind; images of more than `MAX_KINDS` sizes are counted by mode alone."""
        text = json.dumps(description)
        if text not in self.kinds and len(self.kinds) >= MAX_KINDS:
            text = json.dumps([description[0], *[None] * (len(description) - 1)])
        if text not in self.kinds:
            self.kinds[text] = Kind(0, printable(example))
        self.kinds[text].count += count

    def add_size(self, size: int, example: str) -> None:
        if size > self.largest:
            self.largest, self.largest_example = size, printable(example)

    def merge(self, other: Facts) -> None:
        """Take what is known of the members of another shard."""
        for text, kind in other.kinds.items():
            self.add_kind(json.loads(text), kind.example, kind.count)
        if other.largest >= 0:
            self.add_size(other.largest, other.largest_example)

    def name_shard(self, path: str) -> None:
        """Put the shard before the names of members."""
        for kind in self.kinds.values():
            kind.example = f"{path}: {kind.example}"
        self.largest_example = f"{path}: {self.largest_example}"

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Facts:
        kinds = {text: Kind(**kind) for text, kind in record["kinds"].items()}
        return cls(kinds, record["largest"], record["largest_example"])


class Inspector(Protocol):
    """Looks at the members of one modality in one shard.

    Attributes:
        facts: what was found so far.
        limit_bytes: how much of a member it wants to see at most.
    """

    facts: Facts
    limit_bytes: int

    def see(self, content: bytes, size: int, example: str) -> None:
        """Take in the first `limit_bytes` of a member of `size` bytes; `example` says where it is.

        Raises:
            DataError: it is not what the modality declares; does not say where.
        """
        ...


def make_inspector(request: ModalityRequest) -> Inspector:
    """An inspector for the members of a modality."""
    return _INSPECTORS[request.encoding](request)


class _NpyInspector:
    limit_bytes = _MAX_HEADER_BYTES

    def __init__(self, request: ModalityRequest) -> None:
        self.facts = Facts()
        self._known: tuple[bytes, int, Kind] | None = None

    def see(self, content: bytes, size: int, example: str) -> None:
        # Nearly always like the one before; parsing takes 20 times as long.
        if self._known is not None and size == self._known[1] and content.startswith(self._known[0]):
            self._known[2].count += 1
            return
        dtype, shape, _, header_bytes = parse_npy_header(content)
        if dtype.name not in DTYPES or (not dtype.isnative and dtype.itemsize > 1):
            raise DataError(f"dtype {dtype.str} is not supported; store one of {', '.join(DTYPES)}, little-endian")
        expected = header_bytes + int(np.prod(shape, dtype=object)) * dtype.itemsize
        if size != expected:
            raise DataError(f"{size} bytes, but its header promises {expected}")
        description = [dtype.name, list(shape)]
        self.facts.add_kind(description, example)
        kind = self.facts.kinds.get(json.dumps(description))
        self._known = None if kind is None else (content[:header_bytes], size, kind)


class _ClassInspector:
    limit_bytes = MAX_CLASS_BYTES

    def __init__(self, request: ModalityRequest) -> None:
        self.facts = Facts()
        self._limit = request.num_classes or MAX_CLASSES

    def see(self, content: bytes, size: int, example: str) -> None:
        _check_size(size, self.limit_bytes)
        digits = content.strip()
        if not digits.isdigit():
            raise DataError(f"{content[:20]!r} is not a class index")
        if int(digits) >= self._limit:
            raise DataError(f"class index {int(digits)} is not below {self._limit}")
        self.facts.add_size(int(digits), example)


class _ImageInspector:
    limit_bytes = MAX_IMAGE_BYTES

    def __init__(self, request: ModalityRequest) -> None:
        self.facts = Facts()

    def see(self, content: bytes, size: int, example: str) -> None:
        _check_size(size, self.limit_bytes)
        self.facts.add_kind(image_header(content), example)


class _TextInspector:
    limit_bytes = MAX_DOCUMENT_BYTES

    def __init__(self, request: ModalityRequest) -> None:
        self.facts = Facts()

    def see(self, content: bytes, size: int, example: str) -> None:
        _check_size(size, self.limit_bytes)
        decode_document(content)
        self.facts.add_size(size, example)


class _JsonInspector:
    limit_bytes = MAX_DOCUMENT_BYTES

    def __init__(self, request: ModalityRequest) -> None:
        self.facts = Facts()
        self._field = request.field

    def see(self, content: bytes, size: int, example: str) -> None:
        _check_size(size, self.limit_bytes)
        value = json_value(content, self._field)
        shape = nested_shape(value)
        if shape is None:
            raise DataError("JSON holds something other than numbers in even lists")
        # Whole numbers in a document have no point, whatever the others are like; those beyond 64 bits are floats.
        dtype = "int64" if np.asarray(value).dtype == np.int64 else "float32"
        self.facts.add_kind([dtype, list(shape)], example)


def _check_size(size: int, limit_bytes: int) -> None:
    if size > limit_bytes:
        raise DataError(f"{size} bytes, more than the limit of {limit_bytes}")


_INSPECTORS: dict[str, Callable[[ModalityRequest], Inspector]] = {
    "npy": _NpyInspector,
    "cls": _ClassInspector,
    "image": _ImageInspector,
    "text": _TextInspector,
    "json": _JsonInspector,
}


def conclude(request: ModalityRequest, facts: Facts) -> tuple[Modality, list[str]]:
    """The modality that fits all members, and what its user may want to know about it.

    Raises:
        ConfigError: the members differ in a way that needs a decision; the message names the option.
    """
    extensions = "|".join(request.extensions)
    member = None if extensions == f"{request.name}.{request.encoding}" else extensions
    offset, scale = request.offset, 1.0 if request.scale is None else request.scale
    notes: list[str] = []
    try:
        if request.encoding == "cls":
            return Modality.classes(request.name, request.num_classes or facts.largest + 1, member), notes
        if request.encoding == "text":
            length = _text_length(request, facts, notes)
            return Modality.text(request.name, length, member, request.tokenizer), notes
        if request.encoding == "image":
            shape = _image_shape(request, facts, notes)
            scale = 1 / 255 if request.scale is None else scale
            return Modality.image(request.name, shape, member, offset, scale), notes
        dtype, array_shape = _array_kind(request, facts)
        modality = Modality(request.name, dtype, array_shape, request.encoding, None, offset, scale, member)
        return replace(modality, field=request.field), notes
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"modality {request.name!r}: {error}") from None


def _text_length(request: ModalityRequest, facts: Facts, notes: list[str]) -> int:
    longest = f"the longest text has {facts.largest} bytes ({facts.largest_example})"
    if request.length is not None:
        if request.tokenizer == "bytes" and facts.largest > request.length:
            notes.append(f"modality {request.name!r}: texts are cut to {request.length} tokens; {longest}")
        return request.length
    if request.tokenizer != "bytes" or facts.largest > MAX_DEFAULT_TEXT_LENGTH:
        raise ConfigError(f"modality {request.name!r}: {longest}; give --text-length {request.name}=NUMBER")
    return max(1, facts.largest)


def _image_shape(request: ModalityRequest, facts: Facts, notes: list[str]) -> tuple[int | None, ...]:
    kinds = {tuple(json.loads(text)): kind for text, kind in facts.kinds.items()}
    modes = _merged((mode, kind) for (mode, *_), kind in kinds.items())
    counts = {mode: kind.count for mode, kind in modes.items()}
    channels = {"gray": 1, "rgb": 3, None: 1 if set(counts) <= _GRAY_MODES else 3}[request.image_mode]
    if len(counts) > 1 or not set(counts) <= _GRAY_MODES | {"RGB"}:
        seen = ", ".join(f"{count:,} {mode}" for mode, count in sorted(counts.items()))
        rare = f"; rarest: {_rarest(modes)}" if len(modes) > 1 else ""
        notes.append(f"modality {request.name!r}: images of various modes ({seen}) are converted{rare}")
    sizes = _merged(((height, width), kind) for (_, height, width), kind in kinds.items())
    if len(sizes) == 1 and (None, None) not in sizes:
        return (channels, *next(iter(sizes)))
    heights, widths = ([size[axis] for size in sizes if size[axis] is not None] for axis in (0, 1))
    ranges = f"heights {min(heights)} to {max(heights)}, widths {min(widths)} to {max(widths)}"
    more = " and others" if (None, None) in sizes else ""
    named = {f"{height}x{width}": kind for (height, width), kind in sizes.items() if height is not None}
    notes.append(
        f"modality {request.name!r}: image sizes vary ({ranges}{more}; rarest: {_rarest(named)}); "
        "a run has to resize them"
    )
    return (channels, None, None)


def _merged(kinds: Iterable[tuple[_Key, Kind]]) -> dict[_Key, Kind]:
    """Kinds that share a property, added up under it."""
    merged: dict[_Key, Kind] = {}
    for key, kind in kinds:
        merged[key] = Kind(merged[key].count + kind.count, merged[key].example) if key in merged else replace(kind)
    return merged


def _rarest(kinds: Mapping[str, Kind]) -> str:
    """The least frequent kind, which is often a mistake, and where the first one is."""
    name, kind = min(kinds.items(), key=lambda item: item[1].count)
    return f"{name} ({kind.count:,}), first {kind.example}"


def _array_kind(request: ModalityRequest, facts: Facts) -> tuple[str, tuple[int, ...]]:
    kinds = [(*json.loads(text), kind) for text, kind in facts.kinds.items()]
    shapes = {tuple(shape or ()) for _, shape, _ in kinds}
    dtypes = {dtype for dtype, _, _ in kinds}
    if len(shapes) == 1 and (len(dtypes) == 1 or request.encoding == "json"):
        return "float32" if len(dtypes) > 1 else dtypes.pop(), shapes.pop()
    seen = "; ".join(
        f"{dtype} {'other shapes' if shape is None else shape} ({kind.count:,}, first {kind.example})"
        for dtype, shape, kind in sorted(kinds, key=lambda entry: -entry[2].count)[:3]
    )
    raise ConfigError(f"modality {request.name!r}: all samples need one dtype and shape, but there are {seen}")

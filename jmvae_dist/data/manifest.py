"""The manifest: what a sharded data set contains, strictly checked.

A manifest is a JSON file beside the shards. It fixes the modalities (dtype, shape, encoding, transform),
lists the shards with sizes and checksums, and carries a fingerprint of everything that determines the content
and order of the data. Nothing read from it is trusted before it is checked, and nothing in it can run code.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jmvae_dist.data.files import open_regular
from jmvae_dist.data.index import MAX_INDEX_BYTES, index_num_bytes
from jmvae_dist.data.sums import sums_num_bytes
from jmvae_dist.data.tokenizers import TOKENIZERS
from jmvae_dist.data.transfer import RemoteFile
from jmvae_dist.data.urls import Location, is_remote, resolve, shown
from jmvae_dist.data_config import RemoteSection
from jmvae_dist.errors import ConfigError, DataError
from jmvae_dist.files import write_text_atomic

logger = logging.getLogger(__name__)

# Version 1 knows `npy` and `cls` members named after their modality. Version 2 adds the other encodings and names,
# and its fingerprint covers the indexes, which alone fix the order of samples in a tar that was not written here.
FORMAT_VERSION = 2
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
MAX_MANIFEST_BYTES = 256 * 2**20
# Two million shards have as many. Each takes up to a hundred bytes as an object, however short it is as text.
MAX_MANIFEST_VALUES = 20_000_000
MAX_SAMPLE_BYTES = 2**30
MAX_CLASSES = 1_000_000
MAX_DIMENSIONS = 8
MAX_ALTERNATIVES = 8
_MAX_COUNT = 2**62
_MAX_URL_CHARACTERS = 4096
_MAX_NESTING = 4 + MAX_DIMENSIONS  # an offset is nested lists inside document, list and modality

# The key ends at the first dot of a member's name, and USTAR names have 100 bytes.
_MODALITY_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
# What follows the first dot of a name: printable ASCII, and never a folder.
_MEMBER = re.compile(r"[A-Za-z0-9_+@=-]+(\.[A-Za-z0-9_+@=-]+)*")
_MAX_MEMBER_CHARACTERS = 80
_MAX_FIELD_CHARACTERS = 200
_SHA256 = re.compile(r"[0-9a-f]{64}")

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
        if self.num_classes is None or not _is_integer(self.num_classes):
            raise ValueError("encoding 'cls' needs an integer num_classes")
        if not 1 <= self.num_classes <= MAX_CLASSES:
            raise ValueError(f"num_classes {self.num_classes!r} must be between 1 and {MAX_CLASSES}")
        if self.dtype != "int64" or self.shape != (self.num_classes,):
            raise ValueError(f"encoding 'cls' needs dtype 'int64' and shape [{self.num_classes}]")

    def _check_text(self) -> None:
        if not _is_integer(self.length) or not isinstance(self.tokenizer, str):
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
        for key in ("num_classes", "member", "length", "tokenizer", "field"):
            if getattr(self, key) is not None:
                record[key] = getattr(self, key)
        return record

    @property
    def format_version(self) -> int:
        """The first version of the manifest that can describe this modality."""
        return 1 if self.encoding in ("npy", "cls") and self.member is None else 2


@dataclass(frozen=True, slots=True)
class IndexFile:
    """A file beside a shard: its index, or the sums of its members."""

    url: str
    num_bytes: int
    sha256: str

    @classmethod
    def write(cls, path: Path, content: bytes) -> IndexFile:
        """Write and fsync a new file; the result is what a manifest in its folder says of it."""
        with open(path, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return cls(path.name, len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file; with sums, its members can be checked one by one."""

    url: str
    num_samples: int
    num_bytes: int
    sha256: str
    index: IndexFile
    sums: IndexFile | None = None

    def to_json(self) -> dict[str, Any]:
        record = {
            "url": self.url,
            "num_samples": self.num_samples,
            "num_bytes": self.num_bytes,
            "sha256": self.sha256,
            "index": {"url": self.index.url, "num_bytes": self.index.num_bytes, "sha256": self.index.sha256},
        }
        if self.sums is not None:
            record[_SUMS_KEY] = {"url": self.sums.url, "num_bytes": self.sums.num_bytes, "sha256": self.sums.sha256}
        return record


@dataclass(frozen=True)
class Manifest:
    """A sharded data set. Make one with `Manifest.create` or `Manifest.load`.

    Attributes:
        modalities: in the order in which the index lists the members of a sample.
        fingerprint: sha256 over what determines content and order: the modalities, number of samples and sha256 of
            each shard in order, and from version 2 on the sha256 of each index. URLs are not part of it: a moved
            folder is the same data. Nor are the sums, which add nothing to what the sha256 of a shard says.
        source: how the data was made; free JSON.
        path: the file or URL it was loaded from; relative URLs are relative to its folder.
    """

    modalities: tuple[Modality, ...]
    shards: tuple[Shard, ...]
    num_samples: int
    num_bytes: int
    fingerprint: str
    source: dict[str, Any] = field(default_factory=dict)
    path: Location = Path("manifest.json")
    format_version: int = 1

    @classmethod
    def create(
        cls,
        modalities: Sequence[Modality],
        shards: Sequence[Shard],
        source: dict[str, Any],
        path: Location = Path("manifest.json"),
        format_version: int | None = None,
    ) -> Manifest:
        """A manifest with its totals and fingerprint computed.

        Args:
            modalities: in the order of the indexes.
            shards: in their order.
            source: how the data was made; free JSON.
            path: where it is or will be; a str may be a URL.
            format_version: 2 for shards whose bytes do not fix the order of their samples (all but those written by
                `write_shards`); None: the first one that can describe the modalities.
        """
        if format_version is None:
            format_version = max(modality.format_version for modality in modalities)
        return cls(
            modalities=tuple(modalities),
            shards=tuple(shards),
            num_samples=sum(shard.num_samples for shard in shards),
            num_bytes=sum(shard.num_bytes for shard in shards),
            fingerprint=_fingerprint(modalities, shards, format_version),
            source=source,
            path=_location(path),
            format_version=format_version,
        )

    @classmethod
    def load(cls, path: Location, remote: RemoteSection | None = None) -> Manifest:
        """Read and check a manifest.

        Args:
            path: a file, or as str a URL.
            remote: timeouts and retries, for a URL.

        Raises:
            ConfigError: there is no such file, or it is a folder or a pipe.
            DataError: the file is not a sound manifest; the message names file and key. A URL cannot be read.
        """
        path = _location(path)
        if isinstance(path, str):
            content = RemoteFile(path, None, "manifest", remote or RemoteSection()).read_whole(MAX_MANIFEST_BYTES)
            with _collector_paused():
                return _ManifestParser(path).parse(content)
        try:
            with open_regular(path) as file:
                content = file.read(MAX_MANIFEST_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(
                f"no manifest at {path}; make one with `jmvae-dist shards write SOURCE --out {path.parent}`"
            ) from None
        except DataError as error:
            raise ConfigError(f"{error}; name the manifest.json in the folder of the shards") from None
        except OSError as error:
            raise ConfigError(f"cannot read manifest {path}: {error.strerror}") from None
        if len(content) > MAX_MANIFEST_BYTES:
            raise DataError(f"{path}: a manifest has at most {MAX_MANIFEST_BYTES} bytes")
        with _collector_paused():
            return _ManifestParser(path).parse(content)

    def save(self, path: str | Path) -> None:
        """Write atomically and durably: the file at `path` is either the old one or all of the new one."""
        write_text_atomic(Path(path), json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": self.format_version,
            "fingerprint": self.fingerprint,
            "num_samples": self.num_samples,
            "num_bytes": self.num_bytes,
            "modalities": [modality.to_json() for modality in self.modalities],
            "source": self.source,
            "shards": [shard.to_json() for shard in self.shards],
        }

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples per shard, as `SamplePlan` takes them."""
        return tuple(shard.num_samples for shard in self.shards)

    def select(self, names: Sequence[str] | None = None) -> tuple[Modality, ...]:
        """The named modalities in the given order (default: all).

        Raises:
            ConfigError: a name is unknown or repeated, or there is none.
        """
        if names is None:
            return self.modalities
        known = {modality.name: modality for modality in self.modalities}
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"data.modalities: {shown(self.path)} has no modality {name!r}; it has {', '.join(known)}"
                )
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"data.modalities must name each modality once and at least one, not {list(names)}")
        return tuple(known[name] for name in names)

    def shard_location(self, shard_number: int) -> Location:
        """The tar file of a shard: a path, or a URL as str.

        Raises:
            DataError: the URL is malformed or has a scheme that is not opened.
        """
        return self._resolve(self.shards[shard_number].url, f"shards[{shard_number}].url")

    def index_location(self, shard_number: int) -> Location:
        """The index file of a shard; raises like `shard_location`."""
        return self._resolve(self.shards[shard_number].index.url, f"shards[{shard_number}].index.url")

    def sums_location(self, shard_number: int) -> Location:
        """The sums file of a shard that has one; raises like `shard_location`."""
        sums = self.shards[shard_number].sums
        assert sums is not None
        return self._resolve(sums.url, f"shards[{shard_number}].sums.url")

    def shard_path(self, shard_number: int) -> Path:
        """The tar file of a local shard; raises DataError if it is at a URL."""
        return self._local(self.shard_location(shard_number))

    def index_path(self, shard_number: int) -> Path:
        """The index file of a local shard; raises like `shard_path`."""
        return self._local(self.index_location(shard_number))

    def sums_path(self, shard_number: int) -> Path:
        """The sums file of a local shard that has one; raises like `shard_path`."""
        return self._local(self.sums_location(shard_number))

    @cached_property
    def has_remote_shards(self) -> bool:
        """Whether some shard, index or sums are at a URL."""
        if not isinstance(self.path, Path):
            return True
        return any(is_remote(url) for shard in self.shards for url in _urls(shard))

    def _local(self, location: Location) -> Path:
        if not isinstance(location, Path):
            raise DataError(f"{shown(location)} is not a local file")
        return location

    def _resolve(self, url: str, key: str) -> Location:
        try:
            return resolve(self.path, url)
        except ValueError as error:
            raise DataError(f"{shown(self.path)}: {key}: {error}") from None


def _urls(shard: Shard) -> list[str]:
    """All URLs that are stated of a shard."""
    return [shard.url, shard.index.url, *([] if shard.sums is None else [shard.sums.url])]


def _location(path: Location) -> Location:
    return path if isinstance(path, str) and is_remote(path) else Path(path)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without looking for reference cycles: a large manifest makes a million objects, none of them in one."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def one_hot(indices: np.ndarray, num_classes: int) -> np.ndarray:
    """One-hot vectors, float32 (*shape, num_classes), of integers (*shape) below `num_classes`."""
    vectors = np.zeros((indices.size, num_classes), dtype=np.float32)
    vectors[np.arange(indices.size), indices.reshape(-1)] = 1.0
    return vectors.reshape(*indices.shape, num_classes)


def _fingerprint(modalities: Sequence[Modality], shards: Sequence[Shard], format_version: int) -> str:
    content: dict[str, Any] = {
        "modalities": [modality.to_json() for modality in modalities],
        "shards": [[shard.sha256, shard.num_samples] for shard in shards],
    }
    if format_version > 1:
        content["format_version"] = format_version
        content["indexes"] = [shard.index.sha256 for shard in shards]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


_SHARD_KEYS = {"url", "num_samples", "num_bytes", "sha256", "index"}
_SUMS_KEY = "sums64"
# Of another kind, with 16 bytes per member: not read any more.
_FORMER_SUMS_KEY = "sums"
_OPTIONAL_SHARD_KEYS = frozenset({_SUMS_KEY})
_FILE_KEYS = {"url", "num_bytes", "sha256"}
_OPTIONAL_KEYS = frozenset({"num_classes", "member", "length", "tokenizer", "field"})


class _ManifestParser:
    """Turns the bytes of a manifest into a `Manifest`, naming file and key of whatever is wrong."""

    def __init__(self, path: Location) -> None:
        self._location = path
        self._path = shown(path)

    def _fail(self, key: str, problem: str) -> NoReturn:
        raise DataError(f"{self._path}: {printable(key)}: {problem}" if key else f"{self._path}: {problem}")

    def parse(self, content: bytes) -> Manifest:
        record = self._decode(content)
        version: Any = record.get("format_version") if isinstance(record, dict) else None
        if isinstance(record, dict) and not (_is_integer(version) and 1 <= version <= FORMAT_VERSION):
            self._fail(
                "format_version", f"{_shown(version)} is not supported; this version reads 1 to {FORMAT_VERSION}"
            )
        keys = {"format_version", "fingerprint", "num_samples", "num_bytes", "modalities", "source", "shards"}
        record = self._object(record, "", keys)
        modalities = self._modalities(record["modalities"])
        shards = self._shards(record["shards"], len(modalities))
        source = record["source"]
        if not isinstance(source, dict):
            self._fail("source", "must be an object")
        for number, modality in enumerate(modalities):
            if modality.format_version > version:
                self._fail(f"modalities[{number}]", f"needs format_version {modality.format_version}, not {version}")
        manifest = Manifest.create(modalities, shards, source, self._location, version)
        for key in ("num_samples", "num_bytes"):
            stated = self._integer(record[key], key, minimum=1)
            if stated != getattr(manifest, key):
                self._fail(key, f"says {stated}, but the shards add up to {getattr(manifest, key)}")
        if record["fingerprint"] != manifest.fingerprint:
            self._fail("fingerprint", "does not match the modalities and shards listed: the file was altered")
        self._check_locations(manifest)
        return manifest

    def _check_locations(self, manifest: Manifest) -> None:
        is_local = isinstance(self._location, Path)
        for shard_number, shard in enumerate(manifest.shards):
            # Most are plain paths, in which there is nothing to check.
            if not is_local or any(":" in url for url in _urls(shard)):
                manifest.shard_location(shard_number)
                manifest.index_location(shard_number)
                if shard.sums is not None:
                    manifest.sums_location(shard_number)

    def _decode(self, content: bytes) -> Any:
        if sum(content.count(mark) for mark in (b",", b"[", b"{")) > MAX_MANIFEST_VALUES:
            self._fail("", f"a manifest has at most {MAX_MANIFEST_VALUES} values")
        try:
            record = json.loads(
                content.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=_refuse_constant
            )
        except (ValueError, RecursionError) as error:
            self._fail("", f"not valid JSON: {error}")
        # The list of shards is looked at where it is read, once: it may have hundreds of thousands of entries.
        others = (
            {key: value for key, value in record.items() if key != "shards"} if isinstance(record, dict) else record
        )
        self._check_nesting(others)
        return record

    def _check_nesting(self, value: Any) -> None:
        if _is_nested_deeper(value, _MAX_NESTING):
            self._fail("", f"lists and objects are nested more than {_MAX_NESTING} deep")

    def _object(self, value: Any, key: str, keys: set[str], optional: frozenset[str] = frozenset()) -> Any:
        if not isinstance(value, dict):
            self._fail(key, "must be an object")
        prefix = f"{key}." if key else ""
        for name in sorted(keys - value.keys()):
            self._fail(f"{prefix}{name}", "is missing")
        for name in sorted(value.keys() - keys - optional):
            self._fail(f"{prefix}{name}", "is not a known key")
        return value

    def _list(self, value: Any, key: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            self._fail(key, "must be a list with at least one entry")
        return value

    def _integer(self, value: Any, key: str, minimum: int) -> int:
        if not _is_integer(value) or not minimum <= value < _MAX_COUNT:
            self._fail(key, f"{_shown(value)} must be an integer of at least {minimum}")
        return value

    def _sha256(self, value: Any, key: str) -> str:
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            self._fail(key, "must be a sha256 of 64 lower-case hexadecimal digits")
        return value

    def _url(self, value: Any, key: str) -> str:
        if not isinstance(value, str) or not value or len(value) > _MAX_URL_CHARACTERS or not value.isprintable():
            self._fail(
                key, f"{_shown(value)} must be a path or URL of 1 to {_MAX_URL_CHARACTERS} printable characters"
            )
        return value

    def _modalities(self, value: Any) -> list[Modality]:
        required = {"name", "encoding", "dtype", "shape", "offset", "scale"}
        modalities = []
        for number, entry in enumerate(self._list(value, "modalities")):
            key = f"modalities[{number}]"
            entry = self._object(entry, key, required, optional=_OPTIONAL_KEYS)
            if not isinstance(entry["shape"], list):
                self._fail(f"{key}.shape", "must be a list")
            try:
                modalities.append(Modality(**{**entry, "shape": tuple(entry["shape"])}))
            except (ValueError, TypeError) as error:
                self._fail(key, str(error))
        try:
            check_distinct_names(modalities)
        except ValueError as error:
            self._fail("modalities", str(error))
        return modalities

    def _shards(self, value: Any, num_modalities: int) -> list[Shard]:
        entries = self._list(value, "shards")
        self._drop_former_sums(entries)
        shards = _sound_shards(entries, num_modalities)
        if shards is None:
            self._check_nesting({"shards": entries})
            shards = self._shards_one_by_one(entries, num_modalities)
        urls = [shard.url for shard in shards]
        if len(set(urls)) != len(urls):
            repeated = next(url for url in urls if urls.count(url) > 1)
            self._fail("shards", f"{shown(repeated)!r} is listed twice: its samples would be seen twice per epoch")
        return shards

    def _drop_former_sums(self, entries: list[Any]) -> None:
        with_former = [entry for entry in entries if isinstance(entry, dict) and _FORMER_SUMS_KEY in entry]
        for entry in with_former:
            del entry[_FORMER_SUMS_KEY]
        if with_former:
            _warn_of_former_sums(self._path)

    def _shards_one_by_one(self, entries: list[Any], num_modalities: int) -> list[Shard]:
        """The shards, checked one value after another so that the first that is wrong can be named."""
        shards = []
        for number, entry in enumerate(entries):
            key = f"shards[{number}]"
            entry = self._object(entry, key, _SHARD_KEYS, _OPTIONAL_SHARD_KEYS)
            num_samples = self._integer(entry["num_samples"], f"{key}.num_samples", minimum=1)
            shards.append(
                Shard(
                    url=self._url(entry["url"], f"{key}.url"),
                    num_samples=num_samples,
                    num_bytes=self._integer(entry["num_bytes"], f"{key}.num_bytes", minimum=1),
                    sha256=self._sha256(entry["sha256"], f"{key}.sha256"),
                    index=self._index(entry["index"], f"{key}.index", num_samples, num_modalities),
                    sums=self._sums(entry[_SUMS_KEY], f"{key}.{_SUMS_KEY}", num_samples, num_modalities)
                    if _SUMS_KEY in entry
                    else None,
                )
            )
        return shards

    def _index(self, value: Any, key: str, num_samples: int, num_modalities: int) -> IndexFile:
        index = self._file(value, key)
        expected_bytes = index_num_bytes(num_samples, num_modalities)
        if expected_bytes > MAX_INDEX_BYTES:
            limit = f"an index has at most {MAX_INDEX_BYTES} bytes; make smaller shards"
            self._fail(key, f"{num_samples} samples in one shard: {limit}")
        self._check_size(index, key, expected_bytes, num_samples, num_modalities)
        return index

    def _sums(self, value: Any, key: str, num_samples: int, num_modalities: int) -> IndexFile:
        sums = self._file(value, key)
        self._check_size(sums, key, sums_num_bytes(num_samples, num_modalities), num_samples, num_modalities)
        return sums

    def _file(self, value: Any, key: str) -> IndexFile:
        entry = self._object(value, key, _FILE_KEYS)
        return IndexFile(
            url=self._url(entry["url"], f"{key}.url"),
            num_bytes=self._integer(entry["num_bytes"], f"{key}.num_bytes", minimum=1),
            sha256=self._sha256(entry["sha256"], f"{key}.sha256"),
        )

    def _check_size(
        self, file: IndexFile, key: str, expected_bytes: int, num_samples: int, num_modalities: int
    ) -> None:
        if file.num_bytes != expected_bytes:
            self._fail(
                f"{key}.num_bytes",
                f"says {file.num_bytes}, but {num_samples} samples with {num_modalities} modalities take "
                f"{expected_bytes}",
            )


@cache
def _warn_of_former_sums(path: str) -> None:
    """Once per process: a run loads its manifests several times."""
    logger.warning(
        "%s: its sums are of an earlier version, 16 bytes per member, and are not used: each shard is checked as a "
        "whole, by its sha256, when it is first opened; `jmvae-dist shards index` or `shards write`, whichever made "
        "this manifest, makes new ones when it is run again with the same arguments",
        path,
    )


def _sound_shards(entries: list[Any], num_modalities: int) -> list[Shard] | None:
    """The shards if nothing at all is wrong with them, else None: whole columns are checked at a time.

    A manifest of 100,000 shards is read at every start of every process of a run.
    """
    if set(map(type, entries)) != {dict}:
        return None
    if any(entry.keys() - _OPTIONAL_SHARD_KEYS != _SHARD_KEYS for entry in entries):
        return None
    indexes = [entry["index"] for entry in entries]
    with_sums = [entry for entry in entries if _SUMS_KEY in entry]
    files = [*indexes, *(entry[_SUMS_KEY] for entry in with_sums)]
    if set(map(type, files)) != {dict} or any(file.keys() != _FILE_KEYS for file in files):
        return None
    for records in (entries, files):
        if not _are_urls([record["url"] for record in records]):
            return None
        if not _are_digests([record["sha256"] for record in records]):
            return None
        if not _are_counts([record["num_bytes"] for record in records]):
            return None
    num_samples = [entry["num_samples"] for entry in entries]
    if not _are_counts(num_samples) or index_num_bytes(max(num_samples), num_modalities) > MAX_INDEX_BYTES:
        return None
    if any(
        index["num_bytes"] != index_num_bytes(samples, num_modalities)
        for samples, index in zip(num_samples, indexes, strict=True)
    ):
        return None
    if any(
        entry[_SUMS_KEY]["num_bytes"] != sums_num_bytes(entry["num_samples"], num_modalities) for entry in with_sums
    ):
        return None
    return [
        Shard(
            entry["url"],
            entry["num_samples"],
            entry["num_bytes"],
            entry["sha256"],
            IndexFile(**entry["index"]),
            IndexFile(**entry[_SUMS_KEY]) if _SUMS_KEY in entry else None,
        )
        for entry in entries
    ]


def _are_urls(values: list[Any]) -> bool:
    if set(map(type, values)) != {str}:
        return False
    lengths = set(map(len, values))
    return min(lengths) >= 1 and max(lengths) <= _MAX_URL_CHARACTERS and "".join(values).isprintable()


def _are_digests(values: list[Any]) -> bool:
    if set(map(type, values)) != {str} or set(map(len, values)) != {64}:
        return False
    joined = "".join(values)
    return joined.isascii() and not joined.encode("ascii").translate(None, b"0123456789abcdef")


def _are_counts(values: list[Any]) -> bool:
    return set(map(type, values)) == {int} and min(values) >= 1 and max(values) < _MAX_COUNT


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


def printable(text: str) -> str:
    """The text with control and other unprintable characters escaped: a terminal would act on them."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _shown(value: Any) -> str:
    return repr(value)[:80]


def _is_nested_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects of a JSON value are nested more than `depth` deep; does not recurse further."""
    if not isinstance(value, list | dict):
        return False
    entries = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_nested_deeper(entry, depth - 1) for entry in entries)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON document; raises ValueError where it has a key twice (`object_pairs_hook`)."""
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("an object has the same key twice")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return value is None or (_is_integer(value) and value >= 1)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


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

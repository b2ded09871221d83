"""What a run's model sees of a modality: the decoded value, then the transforms of the run configuration.

A `View` joins a modality of the manifest with the run's own wishes: a tokenizer, and transforms from a fixed list of
names or of a class of the user's. Those come from the run configuration alone, never from a manifest.

Shape suffix: B samples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from jmvae_dist.data.encodings import decode_member
from jmvae_dist.data.modality import Modality, one_hot
from jmvae_dist.data.philox import PURPOSE_EVALUATION_TRANSFORM, PURPOSE_TRAIN_TRANSFORM, uniform_words
from jmvae_dist.data.tokenizers import TOKENIZERS, Tokenizer
from jmvae_dist.errors import ConfigError, DataError
from jmvae_dist.user_code import check_trusted, construct

if TYPE_CHECKING:
    from PIL.Image import Image

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SampleKeys:
    """What randomness of samples may depend on: never on rank, worker or batch.

    Attributes:
        positions: int64 (B,): step * global batch size + row in training, the place in the data set otherwise.
        is_training: training and evaluation draw different numbers.
    """

    positions: np.ndarray
    is_training: bool = True

    def take(self, rows: slice) -> SampleKeys:
        """Those of some rows."""
        return SampleKeys(self.positions[rows], self.is_training)


class Transform(Protocol):
    """One step from the decoded value to what the model sees; a user's class looks the same but for `keys`."""

    def output_shape(self, shape: Shape) -> Shape:
        """Shape of one sample after the step; raises ConfigError (a user's class: ValueError) if it cannot be."""
        ...

    def __call__(self, values: np.ndarray, keys: SampleKeys) -> np.ndarray:
        """float32 (B, *shape) to float32 (B, *output_shape); raises ValueError or DataError for bad values."""
        ...


@dataclass(frozen=True)
class Resize:
    """A picture to a fixed size with Pillow, antialiased; acts on the 8-bit picture, before anything else."""

    size: tuple[int, int]
    resample: str
    fit: str

    def __call__(self, image: Image) -> Image:
        from PIL.Image import Resampling
        from PIL.ImageOps import fit

        height, width = self.size
        method = Resampling[self.resample.upper()]
        if self.fit == "crop":
            return fit(image, (width, height), method)
        return image if image.size == (width, height) else image.resize((width, height), method)


@dataclass(frozen=True)
class Scale:
    """(x - offset) * scale, in float32."""

    offset: float
    scale: float

    def output_shape(self, shape: Shape) -> Shape:
        return shape

    def __call__(self, values: np.ndarray, keys: SampleKeys) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            return (values - np.float32(self.offset)) * np.float32(self.scale)


@dataclass(frozen=True)
class Threshold:
    """1 where a value exceeds the threshold, else 0."""

    threshold: float

    def output_shape(self, shape: Shape) -> Shape:
        return shape

    def __call__(self, values: np.ndarray, keys: SampleKeys) -> np.ndarray:
        return (values > np.float32(self.threshold)).astype(np.float32)


@dataclass(frozen=True)
class KeyedBinarize:
    """1 with the probability that the value states: a new draw each time a sample is seen, the same in every run."""

    key: int
    number: int

    def output_shape(self, shape: Shape) -> Shape:
        return shape

    def __call__(self, values: np.ndarray, keys: SampleKeys) -> np.ndarray:
        if values.size and not (values.min() >= 0 and values.max() <= 1):
            raise DataError("binarize with keyed: true takes values as probabilities, between 0 and 1; scale them")
        flat = values.reshape(len(values), math.prod(values.shape[1:]))
        purpose = PURPOSE_TRAIN_TRANSFORM if keys.is_training else PURPOSE_EVALUATION_TRANSFORM
        words = uniform_words(flat.shape[1], keys.positions, seed=self.key, purpose=purpose, number=self.number)
        # In float64 every word and every probability is exact: 0 is never 1, and 1 always is.
        return (words < flat.astype(np.float64) * 2.0**32).astype(np.float32).reshape(values.shape)


@dataclass(frozen=True)
class OneHot:
    """Integers 0 .. num_classes - 1 to one-hot vectors along a new last dimension."""

    num_classes: int

    def output_shape(self, shape: Shape) -> Shape:
        return (*shape, self.num_classes)

    def __call__(self, values: np.ndarray, keys: SampleKeys) -> np.ndarray:
        indices = values.astype(np.int64)
        if not np.array_equal(indices, values) or (
            values.size and not 0 <= values.min() <= values.max() < self.num_classes
        ):
            raise DataError(f"one_hot takes integers from 0 to {self.num_classes - 1}")
        return one_hot(indices, self.num_classes)


class UserTransform:
    """A user's class, held to its contract."""

    def __init__(self, transform: Any, class_path: str) -> None:
        self._transform = transform
        self._class_path = class_path

    def output_shape(self, shape: Shape) -> Shape:
        if not hasattr(self._transform, "output_shape"):
            return shape
        return tuple(int(size) for size in self._transform.output_shape(shape))

    def __call__(self, values: np.ndarray, keys: SampleKeys) -> np.ndarray:
        expected = (len(values), *self.output_shape(values.shape[1:]))
        try:
            result = np.asarray(self._transform(values, keys.positions))
        except ValueError as error:
            raise DataError(f"{self._class_path}: {error}") from error
        if result.shape != expected or result.dtype != np.float32:
            raise DataError(
                f"{self._class_path} returned {result.dtype} of shape {list(result.shape)}; its output_shape "
                f"promises float32 {list(expected)}"
            )
        return result


class View:
    """One modality as the model sees it.

    Attributes:
        modality: what the manifest says.
        name: its name.
        shape: of one sample as the model sees it.
        stored_shape: of one decoded sample, before it becomes float32.
        dtype: of the decoded samples.

    Raises:
        ConfigError: transforms and modality do not fit together; the message names the setting.
    """

    def __init__(
        self,
        modality: Modality,
        transforms: Sequence[Mapping[str, Any]] = (),
        tokenizer: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        trusted: Collection[str] | None = None,
    ) -> None:
        """Make the view.

        Args:
            modality: of the manifest.
            transforms: of the run configuration, checked by `data_config.DataSection`.
            tokenizer: `{class_path, init_args, length}` of the run configuration.
            seed: of keyed transforms.
            trusted: the class paths that may be imported; None: all, since the user's own configuration names them.
        """
        self.modality = modality
        self.name = modality.name
        self.dtype = np.dtype(modality.dtype)
        self._transforms, self._seed = [dict(entry) for entry in transforms], seed
        self._tokenizer_settings = None if tokenizer is None else dict(tokenizer)
        self._tokenizer = None if tokenizer is None else self._make_tokenizer(tokenizer, trusted)
        self._length = modality.length if tokenizer is None else tokenizer.get("length") or modality.length
        self._resize = self._take_resize()
        self.stored_shape = self._find_stored_shape()
        shape = self._find_plain_shape()
        self._steps: list[Transform] = []
        for number, entry in enumerate(self._transforms):
            if entry.get("name") == "resize":
                continue
            step = self._make_step(entry, number, trusted)
            try:
                shape = step.output_shape(shape)
            except ValueError as error:
                raise ConfigError(f"{self._key(number)}: {error}") from None
            self._steps.append(step)
        self.shape = shape
        self.is_always_finite = modality.is_always_finite and not self._steps

    @property
    def is_array(self) -> bool:
        """Whether many samples are read at once, and not decoded one by one or transformed by a user's class."""
        is_transformed = any(isinstance(step, UserTransform) for step in self._steps)
        return self.modality.encoding in ("npy", "cls") and not is_transformed

    @property
    def padding_id(self) -> int | None:
        """The token that fills the places after the end of a text; None where the model sees no text as it is."""
        if self.modality.encoding != "text" or self._steps:
            return None
        if self._tokenizer is not None:
            return self._tokenizer.padding_id
        assert self.modality.tokenizer is not None
        return TOKENIZERS[self.modality.tokenizer].padding_id

    def decode(self, content: bytes) -> np.ndarray | int:
        """One member's bytes to the decoded value, of `dtype` and `stored_shape`; raises DataError."""
        return decode_member(content, self.modality, self._tokenizer, self._length, self._resize)

    def to_model(self, stored: np.ndarray, keys: SampleKeys) -> np.ndarray:
        """What the model sees, float32 (B, *shape), of decoded values (B, *stored_shape).

        Raises:
            DataError: a transform cannot take the values.
        """
        if self._tokenizer is not None:
            values = one_hot(stored, self._tokenizer.vocabulary)
        else:
            values = self.modality.to_model(stored)
        for step in self._steps:
            values = step(values, keys)
        return values

    def to_json(self) -> dict[str, Any]:
        """The modality's entry in the manifest, and the run's wishes where there are some."""
        record = self.modality.to_json()
        if self._transforms:
            record["transforms"] = self._transforms
            if any(entry.get("keyed") for entry in self._transforms):
                record["transforms_seed"] = self._seed
        if self._tokenizer_settings is not None:
            record["run_tokenizer"] = self._tokenizer_settings
        return record

    def _key(self, number: int) -> str:
        return f"data.transforms.{self.name}[{number}]"

    def _make_tokenizer(self, settings: Mapping[str, Any], trusted: Collection[str] | None) -> Tokenizer:
        key = f"data.tokenizers.{self.name}"
        if self.modality.encoding != "text":
            raise ConfigError(f"{key}: the modality is {self.modality.encoding!r}, not 'text'")
        tokenizer = _user_object(key, settings, trusted)
        vocabulary, padding = (getattr(tokenizer, name, None) for name in ("vocabulary", "padding_id"))
        valid = isinstance(vocabulary, int) and isinstance(padding, int) and 0 <= padding < vocabulary
        if not valid or not callable(getattr(tokenizer, "encode", None)):
            raise ConfigError(
                f"{key}: {settings['class_path']} must have integers `vocabulary` and `padding_id` (below it) and "
                "a method `encode(text)`"
            )
        return tokenizer

    def _take_resize(self) -> Resize | None:
        for number, entry in enumerate(self._transforms):
            if entry.get("name") != "resize":
                continue
            if self.modality.encoding != "image" or number != 0:
                raise ConfigError(f"{self._key(number)}: resize is for encoding 'image' and comes first")
            height, width = entry["size"]
            return Resize((height, width), entry.get("resample", "bilinear"), entry.get("fit", "stretch"))
        if not self.modality.has_fixed_shape:
            raise ConfigError(
                f"data.transforms.{self.name}: the images differ in size (the manifest's shape is "
                f"{list(self.modality.shape)}), and a model needs one; set data.transforms: "
                f"{{{self.name}: [{{name: resize, size: [64, 64]}}]}}"
            )
        return None

    def _find_stored_shape(self) -> Shape:
        if self._resize is not None:
            return (self.modality.fixed_channels, *self._resize.size)
        if self._tokenizer is not None:
            assert self._length is not None
            return (self._length,)
        return self.modality.stored_shape

    def _find_plain_shape(self) -> Shape:
        """What the model would see without further transforms."""
        if self._tokenizer is not None:
            return (*self.stored_shape, self._tokenizer.vocabulary)
        if self._resize is None:
            return self.modality.fixed_shape
        for key in ("offset", "scale"):
            if isinstance(getattr(self.modality, key), list):
                raise ConfigError(f"{self._key(0)}: the manifest has one {key} per pixel, which fits no other size")
        return self.stored_shape

    def _make_step(self, entry: Mapping[str, Any], number: int, trusted: Collection[str] | None) -> Transform:
        if "class_path" in entry:
            return UserTransform(_user_object(self._key(number), entry, trusted), entry["class_path"])
        if entry["name"] == "scale":
            return Scale(float(entry.get("offset", 0.0)), float(entry.get("scale", 1.0)))
        if entry["name"] == "one_hot":
            return OneHot(entry["num_classes"])
        assert entry["name"] == "binarize"
        if entry.get("keyed", False):
            return KeyedBinarize(_modality_key(self._seed, self.name), number)
        return Threshold(float(entry.get("threshold", 0.5)))


def make_views(
    modalities: Sequence[Modality],
    transforms: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    tokenizers: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    seed: int = 0,
    trusted: Collection[str] | None = None,
) -> tuple[View, ...]:
    """The views of the modalities in use.

    Raises:
        ConfigError: a setting names no modality in use, or does not fit its modality.
    """
    names = [modality.name for modality in modalities]
    for key, settings in (("transforms", transforms), ("tokenizers", tokenizers)):
        unknown = [name for name in settings or {} if name not in names]
        if unknown:
            raise ConfigError(f"data.{key}.{unknown[0]}: there is no such modality; the run uses {', '.join(names)}")
    return tuple(
        View(
            modality,
            (transforms or {}).get(modality.name, ()),
            (tokenizers or {}).get(modality.name),
            seed=seed,
            trusted=trusted,
        )
        for modality in modalities
    )


def padding_ids(views: Sequence[View]) -> dict[str, int]:
    """The tokens that fill up texts, by modality; of texts alone."""
    return {view.name: view.padding_id for view in views if view.padding_id is not None}


def _user_object(key: str, settings: Mapping[str, Any], trusted: Collection[str] | None) -> Any:
    """An instance of the class that the user's `{class_path, init_args}` names.

    Raises:
        ConfigError: it is not trusted, does not exist, or cannot be built.
    """
    if trusted is not None:
        check_trusted({key: settings["class_path"]}, trusted)
    return construct(key, settings)


def _modality_key(seed: int, name: str) -> int:
    """A 64-bit key that differs between seeds and modalities, and not with their number or order."""
    digest = hashlib.sha256(seed.to_bytes(8, "little") + name.encode("ascii")).digest()
    return int.from_bytes(digest[:8], "little")

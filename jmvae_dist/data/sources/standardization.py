"""Standardising the elements of a modality: by mean and standard deviation of the train split.

Stored data stay as they are. The numbers become offset and scale of the modality in the manifest, so that the model
sees every element with mean 0 and standard deviation 1 in the train split, whichever split is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality, NestedNumbers
from jmvae_dist.data.urls import shown
from jmvae_dist.errors import ConfigError

# Samples that are converted to float64 at once.
SAMPLES_AT_ONCE = 64


@dataclass(frozen=True)
class Standardization:
    """What is standardised.

    Attributes:
        names: of the modalities.
        like: a data set whose modalities of these names have the numbers; None: they are those of the train split.
    """

    names: tuple[str, ...] = ()
    like: Manifest | None = None

    def description(self) -> dict[str, Any]:
        """What was done, as JSON for the manifest."""
        if not self.names:
            return {}
        like = {} if self.like is None else {"standardized_like": self.like.fingerprint}
        return {"standardized": list(self.names), **like}


class Transform(NamedTuple):
    """The model sees (value - offset) * scale; both are nested lists of the modality's shape."""

    offset: NestedNumbers
    scale: NestedNumbers


class Moments:
    """Mean and standard deviation of every element over samples that come in parts; in float64.

    Each part is summed about its own mean and the parts are then joined: sums of squares, which lose all digits where
    the mean is large, are never subtracted.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean: np.ndarray = np.zeros(())
        self._squares: np.ndarray = np.zeros(())
        self._lowest: np.ndarray = np.array(np.inf)
        self._highest: np.ndarray = np.array(-np.inf)

    def add(self, part: np.ndarray) -> None:
        """Take some samples: (B, *shape) of any numeric dtype."""
        values = part.astype(np.float64)
        total = self._count + len(values)
        with np.errstate(over="ignore", invalid="ignore"):  # a modality refuses what is not finite
            mean = values.mean(axis=0)
            difference = mean - self._mean
            between = np.square(difference) * (self._count * len(values) / total)
            self._squares = self._squares + np.square(values - mean).sum(axis=0) + between
            self._mean = self._mean + difference * (len(values) / total)
        self._lowest = np.minimum(self._lowest, values.min(axis=0))
        self._highest = np.maximum(self._highest, values.max(axis=0))
        self._count = total

    @property
    def is_constant(self) -> np.ndarray:
        """Which elements have one value in all samples: bool, of their shape.

        Told by the values: rounding can give the deviation of a constant another value than 0.
        """
        is_constant: np.ndarray = self._lowest == self._highest
        return is_constant

    def transform(self) -> Transform:
        """What standardises the samples; a constant element becomes 0, with a scale of 1."""
        assert self._count
        is_constant = self.is_constant
        deviation = np.sqrt(self._squares / self._count)
        with np.errstate(divide="ignore"):
            scale = np.where(is_constant, 1.0, 1 / deviation)
        return Transform(np.where(is_constant, self._lowest, self._mean).tolist(), scale.tolist())


def standardized(
    modalities: Sequence[Modality],
    standardization: Standardization,
    train_moments: Callable[[], Mapping[str, Moments]],
) -> tuple[tuple[Modality, ...], list[str]]:
    """The modalities with the offsets and scales that standardise some of them, and notes for the user.

    Args:
        modalities: of the source.
        standardization: which of them.
        train_moments: computes those of the named modalities over the train split; called if they are needed.

    Raises:
        ConfigError: the other data set has no such numbers, or numbers are beyond the range of what the model sees.
    """
    if not standardization.names:
        return tuple(modalities), []
    if standardization.like is not None:
        stored = [modality for modality in modalities if modality.name in standardization.names]
        return _with_transforms(modalities, _transforms_of(standardization.like, stored)), []
    moments = train_moments()
    notes = [
        f"modality {name!r}: {int(of_modality.is_constant.sum()):,} of {of_modality.is_constant.size:,} elements are "
        "constant in the train split; they are centred only"
        for name, of_modality in moments.items()
        if of_modality.is_constant.any()
    ]
    transforms = {name: of_modality.transform() for name, of_modality in moments.items()}
    for name, numbers in transforms.items():
        if not np.isfinite(numbers).all():
            raise ConfigError(f"--standardize {name}: values are too large, or differ too little, for float64")
    return _with_transforms(modalities, transforms), notes


def _transforms_of(manifest: Manifest, modalities: Sequence[Modality]) -> dict[str, Transform]:
    there = {modality.name: modality for modality in manifest.modalities}
    for name, shape in ((modality.name, modality.shape) for modality in modalities):
        problem = None
        if name not in there:
            problem = f"has no modality {name!r}; it has {', '.join(there)}"
        elif there[name].shape != shape:
            problem = f"has {name!r} of shape {list(there[name].shape)}, and this one is of shape {list(shape)}"
        elif not isinstance(there[name].offset, list) or not isinstance(there[name].scale, list):
            problem = (
                f"has {name!r} as it is, not standardised; write it with --standardize {name}, or leave that out here"
            )
        if problem is not None:
            raise ConfigError(f"--standardize-like {shown(manifest.path)} {problem}")
    return {name: Transform(there[name].offset, there[name].scale) for name in (entry.name for entry in modalities)}


def _with_transforms(modalities: Sequence[Modality], transforms: Mapping[str, Transform]) -> tuple[Modality, ...]:
    changed = []
    for modality in modalities:
        offset, scale = transforms.get(modality.name, (modality.offset, modality.scale))
        try:
            changed.append(replace(modality, offset=offset, scale=scale))
        except ValueError as error:
            raise ConfigError(f"--standardize {modality.name}: {error}") from None
    return tuple(changed)

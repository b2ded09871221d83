"""Names of classes: what the source of a data set, or a checkpoint, says that class indices mean.

They are for people alone: nothing is computed from them. Nobody vouches for them either, so whoever shows them gets
them from here: escaped, of limited length and number, and as many different ones as there are classes, or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.untrusted import printable

# In a manifest's `source` and in the description of a modality that checkpoints keep.
CLASS_NAMES_KEY = "class_names"
MAX_NAMED_CLASSES = 10_000
MAX_NAME_CHARACTERS = 100


def manifest_class_names(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    """Names by modality, in the order of their numbers, where the source of the shards stated them and they fit."""
    stated = manifest.source.get(CLASS_NAMES_KEY)
    if not isinstance(stated, dict):
        return {}
    return {
        modality.name: names
        for modality in manifest.modalities
        if (names := _sound_names(stated.get(modality.name), modality.num_classes)) is not None
    }


def class_names(described: Mapping[str, Any], manifest: Manifest | None = None) -> dict[str, tuple[str, ...]]:
    """Names by modality, in the order of their numbers, of what a model sees.

    Args:
        described: Of a run or checkpoint (`ResolvedRun.describe_modalities`); what one of an older version, or none
            of ours, does not say has no names. Classes that a run transforms are other ones, and have none.
        manifest: Data that the model is given; its own names are taken first.
    """
    entries = {name: entry for name, entry in described.items() if isinstance(entry, dict)}
    names = {
        name: _sound_names(entry.get(CLASS_NAMES_KEY), entry.get("num_classes")) for name, entry in entries.items()
    }
    if manifest is not None:
        names |= manifest_class_names(manifest)
    return {
        name: found
        for name, found in names.items()
        if found is not None and not entries.get(name, {}).get("transforms")
    }


def find_moved_class(names: Sequence[str], others: Sequence[str]) -> tuple[int, int] | None:
    """A class that has one number in `names` and another one in `others`; None if there is none.

    A class that is called otherwise can be the same one. One that is found elsewhere is not: data of one order given
    to a model of the other makes it wrong about what it may have right.
    """
    numbers = {name: number for number, name in enumerate(others)}
    pairs = ((number, numbers.get(name, number)) for number, name in enumerate(names))
    return next(((number, other) for number, other in pairs if number != other), None)


def _sound_names(value: Any, num_classes: Any) -> tuple[str, ...] | None:
    if not isinstance(value, list) or len(value) != num_classes or len(value) > MAX_NAMED_CLASSES:
        return None
    if not all(isinstance(name, str) and name for name in value):
        return None
    names = tuple(_shortened(name) for name in value)
    return names if len(set(names)) == len(names) else None


def _shortened(name: str) -> str:
    # Cut first: nobody knows how long it is.
    shown = printable(name[: MAX_NAME_CHARACTERS + 1])
    return shown if len(shown) <= MAX_NAME_CHARACTERS else shown[: MAX_NAME_CHARACTERS - 3] + "..."

"""Guesses the modalities of foreign shards from the extensions in the first one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from jmvae_dist.data.indexing.grouping import split_name
from jmvae_dist.data.indexing.inspection import ModalityRequest, encoding_of_extension
from jmvae_dist.data.indexing.tar_scan import ByteStream, TarScanner
from jmvae_dist.data.untrusted import printable
from jmvae_dist.errors import DataError

_MEMBERS_SEEN = 100_000
_PLAIN_NAMES = {"image": "image", "cls": "label", "text": "text", "npy": "array"}


def infer_requests(stream: ByteStream, path: str) -> list[ModalityRequest]:
    """One modality per extension that most samples of a shard have, in the order of the members.

    `image.npy` becomes the modality `image`, like `shards write` names its members; `jpg`, `cls`, `txt` and `npy`
    become `image`, `label`, `text` and `array` unless another modality has that name. Samples may have any one of
    several picture formats. JSON mostly holds notes about a sample: it has to be asked for.

    Raises:
        DataError: the shard is damaged, or there is nothing that most of its samples have.
    """
    samples: dict[str, dict[str, None]] = {}
    ignored: dict[str, None] = {}
    num_members = 0
    for member in islice(TarScanner(stream, path), _MEMBERS_SEEN):
        num_members += 1
        name = split_name(member.name)
        if name is not None and encoding_of_extension(name.extension) in (None, "json"):
            ignored[name.extension] = None
        elif name is not None:
            samples.setdefault(name.key, {})[name.extension] = None
    if num_members == _MEMBERS_SEEN and len(samples) > 1:
        samples.popitem()  # may go on
    groups = _groups([list(extensions) for extensions in samples.values()])
    # Not all: that one sample lacks a modality is to be reported, not a reason to leave the modality out.
    common = [
        group
        for group in groups
        if 2 * sum(not extensions.keys().isdisjoint(group) for extensions in samples.values()) > len(samples)
    ]
    if not common:
        extensions = {extension for sample in samples.values() for extension in sample} | ignored.keys()
        found = ", ".join(sorted(printable(extension) for extension in extensions)[:20])
        raise DataError(
            f"{path}: cannot tell the modalities from its samples (extensions: {found or 'none'}); "
            "say --modality NAME=EXTENSION for each"
        )
    names = [_name(group[0]) for group in common]
    return [
        ModalityRequest(
            name if names.count(name) == 1 or "." in group[0] else group[0], tuple(group), _encoding(group[0])
        )
        for name, group in zip(names, common, strict=True)
    ]


def _groups(samples: Sequence[Sequence[str]]) -> list[list[str]]:
    """The extensions, those of pictures that no sample has two of in one group."""
    order = list(dict.fromkeys(extension for extensions in samples for extension in extensions))
    pictures = [extension for extension in order if "." not in extension and _encoding(extension) == "image"]
    if all(sum(extension in pictures for extension in extensions) <= 1 for extensions in samples):
        first = order.index(pictures[0]) if pictures else 0
        rest = [[extension] for extension in order if extension not in pictures]
        return [*rest[:first], sorted(pictures), *rest[first:]] if pictures else rest
    return [[extension] for extension in order]


def _encoding(extension: str) -> str:
    encoding = encoding_of_extension(extension)
    assert encoding is not None
    return encoding


def _name(extension: str) -> str:
    stem, dot, _ = extension.rpartition(".")
    return stem.replace(".", "_") if dot else _PLAIN_NAMES[_encoding(extension)]

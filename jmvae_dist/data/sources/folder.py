"""Paired files, one per sample and modality: `a/1.jpg` and `a/1.txt`, or `images/1.jpg` and `texts/1.txt`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jmvae_dist.data.indexing.inspection import Facts, ModalityRequest
from jmvae_dist.data.indexing.shard_lists import expand_braces
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.sources.base import SampleValue, member_bytes
from jmvae_dist.data.sources.packing import (
    PLAIN_KEY,
    check_names,
    conclude_all,
    default_samples_per_shard,
    inspect_sample,
    pack_file,
    request_for_files,
)
from jmvae_dist.data.sources.splits import SplitChoice, rows_of
from jmvae_dist.data.untrusted import printable
from jmvae_dist.errors import ConfigError, DataError
from jmvae_dist.progress import progress

_WILDCARD = re.compile(r"\*\*/|\*|\?")
_WILDCARD_PATTERNS = {"**/": "((?:[^/]+/)*)", "*": "([^/]*)", "?": "([^/])"}


@dataclass(frozen=True)
class FolderSource:
    """Samples whose modalities are files below a folder.

    Attributes:
        root: the folder.
        split: which part of the samples this is.
        modalities: of every sample.
        paths: by modality, relative to `root`, one per row.
        keys: by row.
        rows: those of the split.
        sample_bytes: what a sample takes in a tar, on average.
        details: further JSON for the manifest.
    """

    root: Path
    split: str
    modalities: tuple[Modality, ...]
    paths: dict[str, list[str]]
    keys: list[str]
    rows: np.ndarray
    sample_bytes: int
    details: dict[str, Any]

    @property
    def default_samples_per_shard(self) -> int:
        return default_samples_per_shard(self.sample_bytes, len(self))

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        return self.keys[int(self.rows[index])]

    def sample(self, index: int) -> Mapping[str, SampleValue]:
        row = int(self.rows[index])
        return {
            modality.name: pack_file(self.root / self.paths[modality.name][row], modality)
            for modality in self.modalities
        }

    def description(self) -> dict[str, Any]:
        return {"name": "folder", "split": self.split, **self.details}


def load_folder_source(
    root: Path,
    patterns: Mapping[str, str],
    requests: Sequence[ModalityRequest],
    choice: SplitChoice,
    skip_incomplete: bool = False,
) -> tuple[FolderSource, list[str]]:
    """Pair the files by what the wildcards of their patterns stand for.

    `images/*.jpg` and `texts/*.txt` pair `images/0001.jpg` with `texts/0001.txt`; `**/` stands for any folders.
    Samples are in the order of those names. Hidden files are left out.

    Args:
        root: patterns are relative to it.
        patterns: by modality.
        requests: the modalities; an empty encoding is told by the extensions of the files.
        choice: which samples to take, by row.
        skip_incomplete: leave out samples that lack a file or have an unreadable one, instead of refusing them.

    Returns:
        The source, and what its user may want to know.

    Raises:
        ConfigError: a pattern matches nothing, or files differ in a way that needs a decision.
        DataError: files are missing or unreadable; names them.
    """
    if not root.is_dir():
        raise ConfigError(f"--root {root} is not a folder")
    check_names(requests)
    found = {name: _matches(root, name, pattern) for name, pattern in patterns.items()}
    names, notes = _paired(found, skip_incomplete)
    requests = [request_for_files(request, (found[request.name][name] for name in names)) for request in requests]
    facts = {request.name: Facts() for request in requests}
    sizes: list[int] = []
    readable: list[str] = []
    with progress(len(names), "looking at samples") as advance:
        for name in names:
            try:
                files = {modality: root / paths[name] for modality, paths in found.items()}
                sizes.append(sum(map(member_bytes, inspect_sample(requests, files, facts))))
                readable.append(name)
            except DataError as error:
                if not skip_incomplete:
                    raise DataError(f"{error}; --incomplete skip leaves such samples out") from None
                notes.append(f"left out: {error}")
            advance(1)
    if not readable:
        raise DataError(f"{root}: no sample can be read")
    modalities, about = conclude_all(requests, facts)
    left_out = len(_all_names(found)) - len(readable)
    source = FolderSource(
        root=root,
        split=choice.split,
        modalities=modalities,
        paths={modality: [paths[name] for name in readable] for modality, paths in found.items()},
        keys=_keys(readable, choice.split),
        rows=rows_of(choice, choice.split, len(readable), {}),
        sample_bytes=max(1, sum(sizes) // len(sizes)),
        details={"patterns": dict(patterns), "left_out": left_out, **choice.description()},
    )
    return source, notes + about


def _matches(root: Path, modality: str, pattern: str) -> dict[str, str]:
    """Paths of the files that match, relative to the root, by what the wildcards stand for."""
    matches: dict[str, str] = {}
    for alternative in expand_braces(pattern):
        parts = alternative.split("/")
        if not _WILDCARD.search(alternative) or alternative.startswith("/") or ".." in parts or "[" in alternative:
            raise ConfigError(
                f"--modality {modality}={pattern} must be a pattern with * below --root, such as images/*.jpg, "
                "images/*.{jpg,png} or **/*.jpg"
            )
        expression = _expression(alternative)
        try:
            paths = [path.relative_to(root).as_posix() for path in root.glob(alternative) if not path.is_dir()]
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"--modality {modality}={pattern}: {error}") from None
        for path in paths:
            match = expression.fullmatch(path)
            if match is None or any(part.startswith(".") for part in path.split("/")):
                continue
            name = "/".join(part.rstrip("/") for part in match.groups() if part)
            other = matches.setdefault(name, path)
            if other != path:
                raise ConfigError(f"--modality {modality}={pattern}: {other} and {path} would be the same sample")
    if not matches:
        raise ConfigError(f"--modality {modality}={pattern}: no file below {root} matches")
    return matches


def _expression(pattern: str) -> re.Pattern[str]:
    """A pattern as a regular expression with a group for each wildcard."""
    parts = re.split(rf"({_WILDCARD.pattern})", pattern)
    return re.compile("".join(_WILDCARD_PATTERNS.get(part, re.escape(part)) for part in parts))


def _all_names(found: Mapping[str, Mapping[str, str]]) -> set[str]:
    return set().union(*found.values())


def _paired(found: Mapping[str, Mapping[str, str]], skip_incomplete: bool) -> tuple[list[str], list[str]]:
    """Names that every modality has, in order."""
    every = _all_names(found)
    names = sorted(name for name in every if all(name in matches for matches in found.values()))
    incomplete = sorted(every - set(names))
    if not incomplete:
        return names, []
    first = incomplete[0]
    has = next(path for matches in found.values() for name, path in matches.items() if name == first)
    lacks = ", ".join(modality for modality, matches in found.items() if first not in matches)
    problem = f"{len(incomplete):,} samples lack a file, first {printable(has)}, which has no {lacks}"
    if not names:
        raise DataError(f"no two files pair up: {problem}; the parts for which * stands must be the same")
    if not skip_incomplete:
        raise DataError(f"{problem}; --incomplete skip leaves them out")
    return names, [f"left out: {problem}"]


def _keys(names: Sequence[str], split: str) -> list[str]:
    """The names themselves where all of them can be keys, numbers in the order of the names otherwise."""
    if all(PLAIN_KEY.fullmatch(name) for name in names):
        return list(names)
    return [f"folder-{split}-{row:08d}" for row in range(len(names))]

"""The manifest: what a sharded data set contains, strictly checked.

A manifest is a JSON file beside the shards. It lists the modalities (`modality`) and the shards (`shard`), and
carries a fingerprint of everything that determines the content and order of the data. It is read, written and asked
for places of files here. Nothing read from it is trusted before it is checked, and nothing in it can run code.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jmvae_dist.checks import is_integer
from jmvae_dist.data.files import open_regular
from jmvae_dist.data.modality import MAX_DIMENSIONS, Modality, parse_modalities
from jmvae_dist.data.shard import Shard, parse_shards
from jmvae_dist.data.transfer import RemoteFile
from jmvae_dist.data.untrusted import DocumentChecks, parse_json, shortened
from jmvae_dist.data.urls import Location, is_remote, resolve, shown
from jmvae_dist.data_config import RemoteSection
from jmvae_dist.errors import ConfigError, DataError
from jmvae_dist.files import write_text_atomic

# Version 1 knows `npy` and `cls` members named after their modality. Version 2 adds the other encodings and names,
# and its fingerprint covers the indexes, which alone fix the order of samples in a tar that was not written here.
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 256 * 2**20
# Two million shards have as many. Each takes up to a hundred bytes as an object, however short it is as text.
MAX_MANIFEST_VALUES = 20_000_000
_SHARDS_AT_ONCE = 1000
_MAX_NESTING = 4 + MAX_DIMENSIONS  # an offset is nested lists inside document, list and modality


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
            path: a file, the folder in which it is called `manifest.json`, or as str a URL.
            remote: timeouts and retries, for a URL.

        Raises:
            ConfigError: there is no such file, or it is a pipe.
            DataError: the file is not a sound manifest; the message names file and key. A URL cannot be read.
        """
        path = _location(path)
        if isinstance(path, Path) and os.path.isdir(path):  # False where it cannot be told
            path /= MANIFEST_NAME
        parser = _ManifestParser(path)
        with _collector_paused():
            # Without names: what is done with goes before the next is made, each a hundred megabytes of many shards.
            return parser.parse(parser.decode(_read(path, remote or RemoteSection())))

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
        return any(is_remote(url) for shard in self.shards for url in shard.urls)

    def _local(self, location: Location) -> Path:
        if not isinstance(location, Path):
            raise DataError(f"{shown(location)} is not a local file")
        return location

    def _resolve(self, url: str, key: str) -> Location:
        try:
            return resolve(self.path, url)
        except ValueError as error:
            raise DataError(f"{shown(self.path)}: {key}: {error}") from None


def _location(path: Location) -> Location:
    return path if isinstance(path, str) and is_remote(path) else Path(path)


def _read(path: Location, remote: RemoteSection) -> bytes:
    if isinstance(path, str):
        return RemoteFile(path, None, "manifest", remote).read_whole(MAX_MANIFEST_BYTES)
    try:
        with open_regular(path) as file:
            content = file.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        folder = path.parent if path.suffix == ".json" else path  # a folder that is not there is no folder
        raise ConfigError(
            f"no manifest at {path}; make one with `jmvae-dist shards write SOURCE --out {folder}`"
        ) from None
    except DataError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"cannot read manifest {path}: {error.strerror}") from None
    if len(content) > MAX_MANIFEST_BYTES:
        raise DataError(f"{path}: a manifest has at most {MAX_MANIFEST_BYTES} bytes")
    return content


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


def _fingerprint(modalities: Sequence[Modality], shards: Sequence[Shard], format_version: int) -> str:
    """sha256 of canonical JSON: sorted keys, no spaces; of a part of the shards at a time, since it is long."""
    digest = hashlib.sha256()

    def add(text: str) -> None:
        digest.update(text.encode("ascii"))

    def add_of_shards(describe: Callable[[Shard], Any]) -> None:
        for start in range(0, len(shards), _SHARDS_AT_ONCE):
            part = _canonical([describe(shard) for shard in shards[start : start + _SHARDS_AT_ONCE]])
            add(("," if start else "") + part[1:-1])

    add("{")
    if format_version > 1:
        add(f'"format_version":{format_version},"indexes":[')
        add_of_shards(lambda shard: shard.index.sha256)
        add("],")
    add(f'"modalities":{_canonical([modality.to_json() for modality in modalities])},"shards":[')
    add_of_shards(lambda shard: [shard.sha256, shard.num_samples])
    add("]}")
    return digest.hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


class _ManifestParser:
    """Turns the bytes of a manifest into values and these into a `Manifest`; names file and key of what is wrong."""

    def __init__(self, path: Location) -> None:
        self._location = path
        self._checks = DocumentChecks(shown(path), _MAX_NESTING)

    def parse(self, record: Any) -> Manifest:
        """The manifest that a decoded document describes; its list of shards is taken out of it."""
        version: Any = record.get("format_version") if isinstance(record, dict) else None
        if isinstance(record, dict) and not (is_integer(version) and 1 <= version <= FORMAT_VERSION):
            self._checks.fail(
                "format_version", f"{shortened(version)} is not supported; this version reads 1 to {FORMAT_VERSION}"
            )
        keys = {"format_version", "fingerprint", "num_samples", "num_bytes", "modalities", "source", "shards"}
        record = self._checks.record(record, "", keys)
        modalities = parse_modalities(record["modalities"], self._checks)
        shards = parse_shards(record.pop("shards"), len(modalities), self._checks)
        source = record["source"]
        if not isinstance(source, dict):
            self._checks.fail("source", "must be an object")
        for number, modality in enumerate(modalities):
            if modality.format_version > version:
                self._checks.fail(
                    f"modalities[{number}]", f"needs format_version {modality.format_version}, not {version}"
                )
        manifest = Manifest.create(modalities, shards, source, self._location, version)
        for key in ("num_samples", "num_bytes"):
            stated = self._checks.integer(record[key], key, minimum=1)
            if stated != getattr(manifest, key):
                self._checks.fail(key, f"says {stated}, but the shards add up to {getattr(manifest, key)}")
        if record["fingerprint"] != manifest.fingerprint:
            self._checks.fail("fingerprint", "does not match the modalities and shards listed: the file was altered")
        self._check_locations(manifest)
        return manifest

    def _check_locations(self, manifest: Manifest) -> None:
        is_local = isinstance(self._location, Path)
        for shard_number, shard in enumerate(manifest.shards):
            # Most are plain paths, in which there is nothing to check.
            if not is_local or any(":" in url for url in shard.urls):
                manifest.shard_location(shard_number)
                manifest.index_location(shard_number)
                if shard.sums is not None:
                    manifest.sums_location(shard_number)

    def decode(self, content: bytes) -> Any:
        """The document as it is, but for the nesting of its list of shards."""
        if sum(content.count(mark) for mark in (b",", b"[", b"{")) > MAX_MANIFEST_VALUES:
            self._checks.fail("", f"a manifest has at most {MAX_MANIFEST_VALUES} values")
        try:
            text = content.decode("utf-8")
            del content
            record = parse_json(text, shares_integers=True)
        except (ValueError, RecursionError) as error:
            self._checks.fail("", f"not valid JSON: {error}")
        # The list of shards is looked at where it is read, once: it may have hundreds of thousands of entries.
        others = (
            {key: value for key, value in record.items() if key != "shards"} if isinstance(record, dict) else record
        )
        self._checks.nesting(others)
        return record

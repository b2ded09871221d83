"""Shards: the tar files of a data set and the files beside them, as a manifest lists them.

Here is what is known of a shard, and how the list of shards in a manifest is checked: whole columns at a time, since
it may have hundreds of thousands of entries, and one value after another where something is wrong, to say what.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jmvae_dist.data.index import MAX_INDEX_BYTES, index_num_bytes
from jmvae_dist.data.sums import sums_num_bytes
from jmvae_dist.data.untrusted import MAX_COUNT, DocumentChecks, shortened
from jmvae_dist.data.urls import shown

logger = logging.getLogger(__name__)

_MAX_URL_CHARACTERS = 4096
_SHA256 = re.compile(r"[0-9a-f]{64}")

_SHARD_KEYS = {"url", "num_samples", "num_bytes", "sha256", "index"}
_SUMS_KEY = "sums64"
# Of another kind, with 16 bytes per member: not read any more.
_FORMER_SUMS_KEY = "sums"
_OPTIONAL_SHARD_KEYS = frozenset({_SUMS_KEY})
_FILE_KEYS = {"url", "num_bytes", "sha256"}


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

    @property
    def urls(self) -> list[str]:
        """All URLs that are stated of it."""
        return [self.url, self.index.url, *([] if self.sums is None else [self.sums.url])]


def parse_shards(value: Any, num_modalities: int, checks: DocumentChecks) -> list[Shard]:
    """The entry `shards` of a manifest.

    Raises:
        DataError: one is not sound, or is listed twice.
    """
    return _ShardsParser(num_modalities, checks).parse(value)


class _ShardsParser:
    """Turns the list of shards of a manifest into `Shard`s, naming file and key of whatever is wrong."""

    def __init__(self, num_modalities: int, checks: DocumentChecks) -> None:
        self._num_modalities = num_modalities
        self._checks = checks

    def parse(self, value: Any) -> list[Shard]:
        entries = self._checks.non_empty_list(value, "shards")
        self._drop_former_sums(entries)
        shards = _sound_shards(entries, self._num_modalities)
        if shards is None:
            self._checks.nesting({"shards": entries})
            shards = self._parse_one_by_one(entries)
        urls = [shard.url for shard in shards]
        if len(set(urls)) != len(urls):
            repeated = next(url for url in urls if urls.count(url) > 1)
            self._checks.fail(
                "shards", f"{shown(repeated)!r} is listed twice: its samples would be seen twice per epoch"
            )
        return shards

    def _drop_former_sums(self, entries: list[Any]) -> None:
        with_former = [entry for entry in entries if isinstance(entry, dict) and _FORMER_SUMS_KEY in entry]
        for entry in with_former:
            del entry[_FORMER_SUMS_KEY]
        if with_former:
            _warn_of_former_sums(self._checks.path)

    def _parse_one_by_one(self, entries: list[Any]) -> list[Shard]:
        """The shards, checked one value after another so that the first that is wrong can be named."""
        shards = []
        for number, entry in enumerate(entries):
            key = f"shards[{number}]"
            entry = self._checks.record(entry, key, _SHARD_KEYS, _OPTIONAL_SHARD_KEYS)
            num_samples = self._checks.integer(entry["num_samples"], f"{key}.num_samples", minimum=1)
            shards.append(
                Shard(
                    url=self._url(entry["url"], f"{key}.url"),
                    num_samples=num_samples,
                    num_bytes=self._checks.integer(entry["num_bytes"], f"{key}.num_bytes", minimum=1),
                    sha256=self._sha256(entry["sha256"], f"{key}.sha256"),
                    index=self._index(entry["index"], f"{key}.index", num_samples),
                    sums=self._sums(entry[_SUMS_KEY], f"{key}.{_SUMS_KEY}", num_samples)
                    if _SUMS_KEY in entry
                    else None,
                )
            )
        return shards

    def _index(self, value: Any, key: str, num_samples: int) -> IndexFile:
        index = self._file(value, key)
        expected_bytes = index_num_bytes(num_samples, self._num_modalities)
        if expected_bytes > MAX_INDEX_BYTES:
            limit = f"an index has at most {MAX_INDEX_BYTES} bytes; make smaller shards"
            self._checks.fail(key, f"{num_samples} samples in one shard: {limit}")
        self._check_size(index, key, expected_bytes, num_samples)
        return index

    def _sums(self, value: Any, key: str, num_samples: int) -> IndexFile:
        sums = self._file(value, key)
        self._check_size(sums, key, sums_num_bytes(num_samples, self._num_modalities), num_samples)
        return sums

    def _file(self, value: Any, key: str) -> IndexFile:
        entry = self._checks.record(value, key, _FILE_KEYS)
        return IndexFile(
            url=self._url(entry["url"], f"{key}.url"),
            num_bytes=self._checks.integer(entry["num_bytes"], f"{key}.num_bytes", minimum=1),
            sha256=self._sha256(entry["sha256"], f"{key}.sha256"),
        )

    def _check_size(self, file: IndexFile, key: str, expected_bytes: int, num_samples: int) -> None:
        if file.num_bytes != expected_bytes:
            self._checks.fail(
                f"{key}.num_bytes",
                f"says {file.num_bytes}, but {num_samples} samples with {self._num_modalities} modalities take "
                f"{expected_bytes}",
            )

    def _sha256(self, value: Any, key: str) -> str:
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            self._checks.fail(key, "must be a sha256 of 64 lower-case hexadecimal digits")
        return value

    def _url(self, value: Any, key: str) -> str:
        if not isinstance(value, str) or not value or len(value) > _MAX_URL_CHARACTERS or not value.isprintable():
            self._checks.fail(
                key, f"{shortened(value)} must be a path or URL of 1 to {_MAX_URL_CHARACTERS} printable characters"
            )
        return value


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
    return set(map(type, values)) == {int} and min(values) >= 1 and max(values) < MAX_COUNT

"""One pass over a foreign shard: where its samples are, what they hold, and what is odd about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from jmvae_dist.data.digest import digest_of_pieces, member_digest
from jmvae_dist.data.indexing.grouping import SampleGrouper
from jmvae_dist.data.indexing.inspection import Facts, ModalityRequest, make_inspector
from jmvae_dist.data.indexing.tar_scan import ByteStream, TarScanner
from jmvae_dist.data.untrusted import printable
from jmvae_dist.errors import DataError


@dataclass
class Count:
    """How often something was found, and where first."""

    count: int = 0
    example: str = ""

    def add(self, example: str, count: int = 1) -> None:
        self.example = self.example or example
        self.count += count


@dataclass
class Findings:
    """What is in one shard, or in several.

    Attributes:
        facts: of the members of each modality.
        missing: how many samples lack each modality, or have a member for it that cannot be read.
        incomplete: samples that lack any modality.
        unreadable: members that are not what their extension says.
        scattered: samples whose members are not adjacent; webdataset would take each part for a sample.
        ignored: members with other extensions, by extension.
        skipped: members that belong to no sample: hidden files, files without extension, `__meta__`.
        extended_header_bytes: what PAX headers and GNU long names take.
    """

    facts: list[Facts]
    missing: list[int]
    incomplete: Count = field(default_factory=Count)
    unreadable: Count = field(default_factory=Count)
    scattered: Count = field(default_factory=Count)
    ignored: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    extended_header_bytes: int = 0

    @classmethod
    def empty(cls, num_modalities: int) -> Findings:
        return cls([Facts() for _ in range(num_modalities)], [0] * num_modalities)

    def merge(self, other: Findings) -> None:
        """Add what was found in another shard."""
        for mine, others in zip(self.facts, other.facts, strict=True):
            mine.merge(others)
        self.missing = [mine + others for mine, others in zip(self.missing, other.missing, strict=True)]
        for name in ("incomplete", "unreadable", "scattered"):
            getattr(self, name).add(getattr(other, name).example, getattr(other, name).count)
        for extension, count in other.ignored.items():
            self.ignored[extension] = self.ignored.get(extension, 0) + count
        self.skipped += other.skipped
        self.extended_header_bytes += other.extended_header_bytes

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Findings:
        counts = {name: Count(**record[name]) for name in ("incomplete", "unreadable", "scattered")}
        facts = [Facts.from_json(entry) for entry in record["facts"]]
        return cls(**{**record, **counts, "facts": facts})


@dataclass
class ShardScan:
    """A shard that was read once.

    Attributes:
        num_bytes, sha256: of the tar.
        keys: of its samples, in the order in which they begin.
        records: index records (samples, modalities); offset and size 0 where a member is missing or unreadable.
        digests: of the members, uint64 (samples, modalities); 0 where the record is.
        findings: what else there is to know.
    """

    num_bytes: int
    sha256: str
    keys: list[str]
    records: np.ndarray
    digests: np.ndarray
    findings: Findings


def columns_by_extension(requests: Sequence[ModalityRequest]) -> dict[str, tuple[int, ...]]:
    """Positions of the modalities that each extension holds; several may read fields of one JSON member."""
    columns: dict[str, tuple[int, ...]] = {}
    for column, request in enumerate(requests):
        for extension in request.extensions:
            columns[extension.lower()] = (*columns.get(extension.lower(), ()), column)
    return columns


def scan_shard(
    stream: ByteStream,
    path: str,
    requests: Sequence[ModalityRequest],
    on_bytes: Callable[[int], None] | None = None,
    inspect: bool = True,
) -> ShardScan:
    """Read a tar from the start to the end.

    Args:
        stream: its bytes.
        path: names it in messages.
        requests: the modalities, in the order of the index.
        on_bytes: called now and then with how many bytes were read by now.
        inspect: look into the members; what cannot be read is then as good as missing.

    Raises:
        DataError: the tar is damaged or has a sample twice.
    """
    scanner = TarScanner(stream, path, on_bytes)
    grouper = SampleGrouper(columns_by_extension(requests), len(requests), path)
    inspectors = [make_inspector(request) for request in requests]
    limits = [inspector.limit_bytes for inspector in inspectors]
    unreadable = Count()
    for member in scanner:
        columns = grouper.add(member)
        if not columns:
            continue
        content = scanner.content(max([limits[column] for column in columns]))
        is_whole = len(content) == member.size
        digest = member_digest(content) if is_whole else digest_of_pieces(chain((content,), scanner.rest()))
        grouper.set_digest(columns, digest)
        if not inspect:
            continue
        for column in columns:
            try:
                inspectors[column].see(content, member.size, member.name)
            except DataError as error:
                grouper.forget_last([column])
                unreadable.add(f"{path}: {printable(member.name)}: {error}")
    records_NM = grouper.records()
    findings = Findings([inspector.facts for inspector in inspectors], [], unreadable=unreadable)
    for facts in findings.facts:
        facts.name_shard(path)
    _note_incomplete(findings, records_NM, grouper.keys, requests, path)
    first_scattered, num_scattered = grouper.scattered
    findings.scattered.add(f"{path}: {printable(first_scattered)}" if num_scattered else "", num_scattered)
    findings.ignored, findings.skipped = dict(grouper.ignored), grouper.skipped
    findings.extended_header_bytes = scanner.extended_header_bytes
    return ShardScan(scanner.num_bytes, scanner.sha256, grouper.keys, records_NM, grouper.digests(), findings)


def is_complete(records_NM: np.ndarray) -> np.ndarray:
    """Which samples have all members: bool (samples,)."""
    return np.all(records_NM["offset"] > 0, axis=1)


def _note_incomplete(
    findings: Findings, records_NM: np.ndarray, keys: Sequence[str], requests: Sequence[ModalityRequest], path: str
) -> None:
    is_missing_NM = records_NM["offset"] == 0
    findings.missing = is_missing_NM.sum(axis=0).tolist()
    incomplete = np.flatnonzero(is_missing_NM.any(axis=1))
    if len(incomplete):
        row = int(incomplete[0])
        absent = [request.name for request, missing in zip(requests, is_missing_NM[row], strict=True) if missing]
        findings.incomplete.add(f"{path}: {printable(keys[row])} lacks {', '.join(absent)}", len(incomplete))

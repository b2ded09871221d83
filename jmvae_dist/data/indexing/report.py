"""What is wrong or odd about shards that were read, in words for their user."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jmvae_dist.data.indexing.inspection import ModalityRequest, conclude
from jmvae_dist.data.indexing.opening import shard_name
from jmvae_dist.data.indexing.shard_scan import Findings
from jmvae_dist.data.indexing.workspace import Incomplete, ShardRecord, Workspace
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.untrusted import printable
from jmvae_dist.errors import DataError

_MAX_SHOWN = 20
_MAX_KEYS_COMPARED = 20_000_000


def merged(records: Sequence[ShardRecord], num_modalities: int) -> Findings:
    """What was found in all shards together."""
    findings = Findings.empty(num_modalities)
    for record in records:
        findings.merge(record.findings)
    return findings


def check_present(findings: Findings, requests: Sequence[ModalityRequest]) -> None:
    """Raise DataError if no sample has one of the modalities."""
    for request, facts in zip(requests, findings.facts, strict=True):
        if facts.kinds or facts.largest >= 0:
            continue
        extensions = " or ".join(request.extensions)
        if findings.unreadable.count:
            why = f"no readable member with extension {extensions} ({findings.unreadable.example})"
        else:
            others = ", ".join(printable(extension) for extension in sorted(findings.ignored))
            why = f"no member with extension {extensions} in the shards" + (f"; there are {others}" if others else "")
        raise DataError(f"modality {request.name!r}: {why}")


def check_complete(findings: Findings, requests: Sequence[ModalityRequest], incomplete: Incomplete) -> None:
    """Raise DataError if samples are incomplete and the user did not say what to do with them."""
    if incomplete != "error" or not findings.incomplete.count:
        return
    lacking = ", ".join(
        f"{request.name}: {count:,}" for request, count in zip(requests, findings.missing, strict=True) if count
    )
    unreadable = ""
    if findings.unreadable.count:
        unreadable = f", {findings.unreadable.count:,} of them unreadable ({findings.unreadable.example})"
    raise DataError(
        f"{findings.incomplete.count:,} samples lack a modality ({lacking}{unreadable}; first "
        f"{findings.incomplete.example}); a JMVAE trains on complete samples: --incomplete skip leaves them out"
    )


def conclude_all(requests: Sequence[ModalityRequest], findings: Findings) -> tuple[list[Modality], list[str]]:
    """The modalities that fit all samples, and notes on them; raises like `conclude`."""
    modalities, notes = [], []
    for request, facts in zip(requests, findings.facts, strict=True):
        modality, about = conclude(request, facts)
        modalities.append(modality)
        notes += about
    return modalities, notes


def shard_notes(records: Sequence[ShardRecord], findings: Findings, incomplete: Incomplete) -> list[str]:
    """What a user may not expect, but what is no error."""
    notes = []
    if findings.incomplete.count:
        what = "left out" if incomplete == "skip" else "kept, without the modalities they lack"
        notes.append(
            f"incomplete samples, {what}: {findings.incomplete.count:,}, first {findings.incomplete.example}"
        )
    if findings.unreadable.count:
        notes.append(f"unreadable members: {findings.unreadable.count:,}, first {findings.unreadable.example}")
    if findings.scattered.count:
        notes.append(
            f"samples whose members are not adjacent: {findings.scattered.count:,}, first "
            f"{findings.scattered.example}; plain webdataset would take each part for a sample"
        )
    by_count = sorted(findings.ignored.items(), key=lambda entry: (-entry[1], entry[0]))
    for extension, count in by_count[:_MAX_SHOWN]:
        notes.append(f"members not used: {count:,} with extension {printable(extension)}")
    if len(by_count) > _MAX_SHOWN:
        count = sum(count for _, count in by_count[_MAX_SHOWN:])
        notes.append(f"members not used: {count:,} with further extensions")
    if findings.skipped:
        notes.append(f"members of no sample: {findings.skipped:,} (hidden, without extension, or __meta__)")
    sizes = [record.samples_kept(incomplete) for record in records]
    empty = [record.shard for record, size in zip(records, sizes, strict=True) if not size]
    if empty:
        notes.append(f"shards without samples, left out: {len(empty):,}, first {shard_name(empty[0])}")
    if max(sizes) > 2 * max(1, min(sizes)):
        notes.append(f"shards have {min(sizes):,} to {max(sizes):,} samples: the shuffle is better with even ones")
    total_bytes = sum(record.num_bytes for record in records)
    if findings.extended_header_bytes > total_bytes / 100:
        share = findings.extended_header_bytes / total_bytes
        notes.append(f"PAX headers and long names take {share:.0%} of the bytes; `shards write` makes none")
    notes += _repeated_shards(records)
    return notes


def _repeated_shards(records: Sequence[ShardRecord]) -> list[str]:
    first_by_sha256: dict[str, str] = {}
    notes = []
    for record in records:
        first = first_by_sha256.setdefault(record.sha256, record.shard)
        if first != record.shard:
            both = f"{shard_name(record.shard)} has the same content as {shard_name(first)}"
            notes.append(f"{both}: its samples are seen twice per epoch")
    return notes[:_MAX_SHOWN]


def repeated_keys(workspace: Workspace, records: Sequence[ShardRecord]) -> list[str]:
    """Keys that are in several shards, of all samples, or of a fixed part of them where they are very many."""
    num_samples = sum(record.num_samples for record in records)
    divisor = np.uint64(num_samples // _MAX_KEYS_COMPARED + 1)
    hashes, owners = [], []
    for position, record in enumerate(records):
        chosen = workspace.key_hashes(record)
        chosen = chosen[chosen % divisor == 0] if divisor > 1 else chosen
        hashes.append(chosen)
        owners.append(np.full(len(chosen), position, np.int32))
    hash_K, owner_K = np.concatenate(hashes), np.concatenate(owners)
    order = np.argsort(hash_K, kind="stable")
    repeated = np.flatnonzero(hash_K[order][1:] == hash_K[order][:-1])
    if not len(repeated):
        return []
    one, other = (shard_name(records[owner_K[order[repeated[0] + step]]].shard) for step in (0, 1))
    of = "" if divisor == 1 else f" of every {divisor}th one"
    return [f"keys that are in several shards: {len(repeated):,}{of}, first in {one} and {other}"]


def list_of_problems(problems: Sequence[str]) -> DataError:
    """One error for all shards that cannot be used."""
    if len(problems) == 1:
        return DataError(problems[0])
    shown = [f"  {problem}" for problem in problems[:_MAX_SHOWN]]
    if len(problems) > len(shown):
        shown.append(f"  and {len(problems) - len(shown):,} more")
    return DataError("\n".join([f"{len(problems):,} shards cannot be used:", *shown]))

"""Makes a manifest and indexes for tars that others wrote, which stay as they are and may be read-only.

    OUT                                  the manifest
    OUT.indexes-FINGERPRINT/             one index per shard
    .OUT.indexing/                       while it lasts: what was found in the shards read so far

Every shard is read once, from the start to the end. After a kill, shards that were read and have not changed are not
read again. The folder of indexes is named after what is in it, and the manifest is replaced atomically: at any moment
the manifest at OUT is complete and leads to its own indexes.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np

from jmvae_dist.data.exclusive import locked, os_errors_explained
from jmvae_dist.data.files import open_regular
from jmvae_dist.data.index import RECORD_DTYPE, index_bytes
from jmvae_dist.data.inference import infer_requests
from jmvae_dist.data.inspection import ModalityRequest, conclude
from jmvae_dist.data.manifest import IndexFile, Manifest, Modality, Shard, printable
from jmvae_dist.data.processes import Report, default_workers, run_in_processes
from jmvae_dist.data.shard_scan import Findings, is_complete, scan_shard
from jmvae_dist.errors import ConfigError, DataError
from jmvae_dist.files import fsync_path, writing_atomic
from jmvae_dist.progress import progress

Incomplete = Literal["error", "skip", "keep"]

_RECORD_VERSION = 1
_MEGABYTE = 10**6
_MAX_PROBLEMS_SHOWN = 20
_MAX_KEYS_COMPARED = 20_000_000


@dataclass(frozen=True)
class Indexed:
    """The result of `index_shards`.

    Attributes:
        manifest: as it is on disk.
        written: whether it was written now; False: it was already there.
        notes: what is odd about the shards, each a line for the user.
    """

    manifest: Manifest
    written: bool
    notes: list[str]


def index_shards(
    shards: Sequence[str],
    out: str | Path,
    requests: Sequence[ModalityRequest],
    *,
    incomplete: Incomplete = "error",
    workers: int | None = None,
    overwrite: bool = False,
) -> Indexed:
    """Index shards in the given order and write a manifest for them.

    With several workers, a script must call this inside `if __name__ == "__main__":`, because every worker imports
    the script.

    Args:
        shards: paths of tars, as from `expand_shards`.
        out: the manifest to write.
        requests: the modalities; see `infer_requests`.
        incomplete: what to do with samples that lack a modality: `error`, `skip` (leave them out), or `keep` (index
            what they have; training on them is an error, or a masked sample if `data.on_bad_sample` says so).
        workers: processes; by default the available CPUs, or one where that is faster.
        overwrite: replace a manifest of other data.

    Raises:
        ConfigError: an option is out of range, a shard does not exist, or `out` cannot be written.
        DataError: shards are damaged, or samples are incomplete; the message lists what is wrong.
    """
    out = Path(out).expanduser().resolve()
    _check_options(out, requests, incomplete, workers)
    identities = [_identity(shard) for shard in shards]
    with os_errors_explained(out), locked(out):
        existing = _existing_manifest(out, overwrite)
        workspace = _Workspace(out, requests)
        records = _scan_all(workspace, shards, identities, workers)
        findings = _merged(records, len(requests))
        _check_present(findings, requests)
        _check_complete(findings, requests, incomplete)
        modalities, notes = _conclude_all(requests, findings)
        notes += _notes(shards, records, findings, incomplete) + _repeated_keys(workspace, shards, records)
        kept = [record for record in records if record.samples_kept(incomplete)]
        if not kept:
            raise DataError("no sample has all modalities")
        manifest, written = _commit(workspace, existing, modalities, kept, incomplete, overwrite)
        workspace.remove()
    return Indexed(manifest, written, notes)


def infer_from(shard: str) -> list[ModalityRequest]:
    """The modalities that the beginning of a shard suggests; raises like `infer_requests`."""
    with _open(shard) as file:
        return infer_requests(file, shard)


@dataclass(frozen=True)
class _Job:
    """One shard to read: its position among all, and what it looked like before."""

    shard: str
    identity: dict[str, int]


@dataclass(frozen=True)
class _Record:
    """What was found in a shard, without its index, which stays on disk."""

    shard: str
    identity: dict[str, int]
    num_bytes: int
    sha256: str
    num_samples: int
    index_sha256: str
    findings: Findings

    def samples_kept(self, incomplete: Incomplete) -> int:
        return self.num_samples - (0 if incomplete == "keep" else self.findings.incomplete.count)

    def to_json(self) -> dict[str, Any]:
        return {"version": _RECORD_VERSION, **asdict(self)}


class _Workspace:
    """The folder beside the manifest that remembers what was read, for one choice of modalities."""

    def __init__(self, out: Path, requests: Sequence[ModalityRequest]) -> None:
        self.out = out
        self.requests = requests
        self.folder = out.with_name(f".{out.name}.indexing")
        self.folder.mkdir(exist_ok=True)
        # What is given later about a modality, such as a length, does not change what is found.
        what = [[request.extensions, request.encoding, request.field, request.num_classes] for request in requests]
        self._what = json.dumps(what)

    def path(self, shard: str, suffix: str) -> Path:
        digest = hashlib.sha256(f"{self._what}\0{shard}".encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / f"{digest[:32]}{suffix}"

    def load(self, shard: str, identity: dict[str, int]) -> _Record | None:
        """What an earlier process found in this shard; None if it did not, or if either has changed since."""
        try:
            content = json.loads(self.path(shard, ".json").read_bytes())
            if content.pop("version") != _RECORD_VERSION or content["identity"] != identity:
                return None
            record = _Record(**{**content, "findings": Findings.from_json(content["findings"])})
            index = self.path(shard, ".index").read_bytes()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        is_same = hashlib.sha256(index).hexdigest() == record.index_sha256 and record.shard == shard
        return record if is_same else None

    def save(self, record: _Record, index: bytes, key_hashes: np.ndarray) -> None:
        """Remember a shard; the record, which says that the rest is complete, last."""
        for suffix, content in ((".keys", key_hashes.tobytes()), (".index", index)):
            with writing_atomic(self.path(record.shard, suffix)) as file:
                file.write(content)
        with writing_atomic(self.path(record.shard, ".json")) as file:
            file.write(json.dumps(record.to_json()).encode())

    def records(self, record: _Record) -> np.ndarray:
        """The index records of a shard, with those of incomplete samples."""
        content = self.path(record.shard, ".index").read_bytes()
        return np.frombuffer(content, RECORD_DTYPE).reshape(record.num_samples, len(self.requests))

    def key_hashes(self, record: _Record) -> np.ndarray:
        """64-bit hashes of the keys of a shard: uint64 (samples,)."""
        return np.frombuffer(self.path(record.shard, ".keys").read_bytes(), np.uint64)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


# Reading the shards


def _scan_all(
    workspace: _Workspace, shards: Sequence[str], identities: Sequence[dict[str, int]], workers: int | None
) -> list[_Record]:
    found = [workspace.load(shard, identity) for shard, identity in zip(shards, identities, strict=True)]
    todo = [position for position, record in enumerate(found) if record is None]
    jobs = [_Job(shards[position], identities[position]) for position in todo]
    num_bytes = sum(job.identity["num_bytes"] for job in jobs)
    problems: dict[int, str] = {}
    with progress(num_bytes // _MEGABYTE, "indexing shards, MB") as advance:
        results = run_in_processes(
            _scan_one,
            workspace,
            jobs,
            workers or default_workers(0, num_bytes),
            folder=workspace.folder,
            advance=advance,
        )
        for position, result in results:
            if isinstance(result, str):
                problems[todo[position]] = result
            else:
                found[todo[position]] = result
    if problems:
        raise _list_of_problems([problems[position] for position in sorted(problems)])
    return [record for record in found if record is not None]


def _scan_one(workspace: _Workspace, job: _Job, report: Report) -> _Record | str:
    """Read one shard and remember it; returns what is wrong with it where it cannot be used.

    As a value, because the user of ten thousand shards wants to know all that are damaged, not one after another.
    """
    total = job.identity["num_bytes"] // _MEGABYTE
    try:
        with _open(job.shard) as file:
            scan = scan_shard(file, job.shard, workspace.requests, lambda done: report(min(total, done // _MEGABYTE)))
        if _identity(job.shard) != job.identity or scan.num_bytes != job.identity["num_bytes"]:
            return f"{job.shard}: changed while it was read"
    except (DataError, ConfigError) as error:
        return str(error)
    index = scan.records.tobytes()
    record = _Record(
        job.shard,
        job.identity,
        scan.num_bytes,
        scan.sha256,
        len(scan.keys),
        hashlib.sha256(index).hexdigest(),
        scan.findings,
    )
    workspace.save(record, index, _hashes(scan.keys))
    report(total)
    return record


def _hashes(keys: Sequence[str]) -> np.ndarray:
    digests = (hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest() for key in keys)
    return np.frombuffer(b"".join(digests), np.uint64)


@contextlib.contextmanager
def _open(shard: str) -> Iterator[BinaryIO]:
    try:
        with open_regular(shard) as file:
            yield file
    except OSError as error:
        raise DataError(f"{shard}: cannot read shard: {error.strerror}") from None


def _identity(shard: str) -> dict[str, int]:
    """What tells whether a shard has changed since it was read."""
    try:
        status = os.stat(shard)
    except OSError as error:
        raise ConfigError(f"{shard}: cannot read shard: {error.strerror}") from None
    return {"num_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


# What is odd


def _merged(records: Sequence[_Record], num_modalities: int) -> Findings:
    findings = Findings.empty(num_modalities)
    for record in records:
        findings.merge(record.findings)
    return findings


def _check_present(findings: Findings, requests: Sequence[ModalityRequest]) -> None:
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


def _check_complete(findings: Findings, requests: Sequence[ModalityRequest], incomplete: Incomplete) -> None:
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


def _conclude_all(requests: Sequence[ModalityRequest], findings: Findings) -> tuple[list[Modality], list[str]]:
    modalities, notes = [], []
    for request, facts in zip(requests, findings.facts, strict=True):
        modality, about = conclude(request, facts)
        modalities.append(modality)
        notes += about
    return modalities, notes


def _notes(
    shards: Sequence[str], records: Sequence[_Record], findings: Findings, incomplete: Incomplete
) -> list[str]:
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
    for extension, count in sorted(findings.ignored.items()):
        notes.append(f"members not used: {count:,} with extension {printable(extension)}")
    if findings.skipped:
        notes.append(f"members of no sample: {findings.skipped:,} (hidden, without extension, or __meta__)")
    sizes = [record.samples_kept(incomplete) for record in records]
    empty = [record.shard for record, size in zip(records, sizes, strict=True) if not size]
    if empty:
        notes.append(f"shards without samples, left out: {len(empty):,}, first {empty[0]}")
    if max(sizes) > 2 * max(1, min(sizes)):
        notes.append(f"shards have {min(sizes):,} to {max(sizes):,} samples: the shuffle is better with even ones")
    total_bytes = sum(record.num_bytes for record in records)
    if findings.extended_header_bytes > total_bytes / 100:
        share = findings.extended_header_bytes / total_bytes
        notes.append(f"PAX headers and long names take {share:.0%} of the bytes; `shards write` makes none")
    notes += _repeated_shards(records)
    return notes


def _repeated_shards(records: Sequence[_Record]) -> list[str]:
    first_by_sha256: dict[str, str] = {}
    notes = []
    for record in records:
        first = first_by_sha256.setdefault(record.sha256, record.shard)
        if first != record.shard:
            notes.append(f"{record.shard} has the same content as {first}: its samples are seen twice per epoch")
    return notes[:_MAX_PROBLEMS_SHOWN]


def _repeated_keys(workspace: _Workspace, shards: Sequence[str], records: Sequence[_Record]) -> list[str]:
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
    one, other = (records[owner_K[order[repeated[0] + step]]].shard for step in (0, 1))
    of = "" if divisor == 1 else f" of every {divisor}th one"
    return [f"keys that are in several shards: {len(repeated):,}{of}, first in {one} and {other}"]


def _list_of_problems(problems: Sequence[str]) -> DataError:
    if len(problems) == 1:
        return DataError(problems[0])
    shown = [f"  {problem}" for problem in problems[:_MAX_PROBLEMS_SHOWN]]
    if len(problems) > len(shown):
        shown.append(f"  and {len(problems) - len(shown):,} more")
    return DataError("\n".join([f"{len(problems):,} shards cannot be used:", *shown]))


# The result


def _commit(
    workspace: _Workspace,
    existing: Manifest | None,
    modalities: Sequence[Modality],
    records: Sequence[_Record],
    incomplete: Incomplete,
    overwrite: bool,
) -> tuple[Manifest, bool]:
    """Write the indexes and then the manifest, unless the same one is there."""
    out = workspace.out
    staging = workspace.folder / "result"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    shards = [
        _write_index(workspace, staging, position, record, incomplete) for position, record in enumerate(records)
    ]
    fsync_path(staging)
    source = {"name": "index", "incomplete": incomplete}
    fingerprint = Manifest.create(modalities, shards, source, out, format_version=2).fingerprint
    folder = out.with_name(f"{out.name}.indexes-{fingerprint[:16]}")
    # The fingerprint does not cover places: what is in the folder can depend on it.
    shards = [replace(shard, index=replace(shard.index, url=f"{folder.name}/{shard.index.url}")) for shard in shards]
    manifest = Manifest.create(modalities, shards, source, out, format_version=2)
    if existing is not None and existing.fingerprint != fingerprint and not overwrite:
        raise ConfigError(f"{out} describes other data; choose another --out, or add --overwrite")
    _publish(staging, folder)
    written = existing != manifest
    if written:
        manifest.save(out)
    for other in out.parent.glob(f"{glob.escape(out.name)}.indexes-{'[0-9a-f]' * 16}"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    # Whatever is wrong with it must show now, not at the start of a training run.
    return Manifest.load(out), written


def _write_index(
    workspace: _Workspace, folder: Path, position: int, record: _Record, incomplete: Incomplete
) -> Shard:
    """Write the index of one shard, without the samples that are left out."""
    records_NM = workspace.records(record)
    if incomplete != "keep":
        records_NM = records_NM[is_complete(records_NM)]
    content = index_bytes(records_NM)
    name = f"{position:06d}.index"
    with open(folder / name, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    index = IndexFile(name, len(content), hashlib.sha256(content).hexdigest())
    return Shard(_url(record.shard, workspace.out), len(records_NM), record.num_bytes, record.sha256, index)


def _url(shard: str, out: Path) -> str:
    """Relative to the manifest where the shard is in or below its folder, so that they can move together."""
    path = Path(shard).absolute()
    try:
        relative = str(path.relative_to(out.parent))
    except ValueError:
        return path.as_posix()
    return f"./{relative}" if ":" in relative else relative


def _publish(staging: Path, folder: Path) -> None:
    """Give the indexes their name; a folder of that name holds the same ones, but may be damaged."""
    if folder.exists():
        for file in staging.iterdir():
            os.replace(file, folder / file.name)
        fsync_path(folder)
    else:
        os.rename(staging, folder)
    fsync_path(folder.parent)


def _existing_manifest(out: Path, overwrite: bool) -> Manifest | None:
    if not out.exists():
        return None
    if not out.is_file():
        raise ConfigError(f"--out {out} is not a file; name the manifest to write, such as {out / 'manifest.json'}")
    try:
        return Manifest.load(out)
    except (ConfigError, DataError) as error:
        if overwrite:
            return None
        raise ConfigError(f"--out {out} is not a sound manifest ({error}); add --overwrite to replace it") from None


def _check_options(
    out: Path, requests: Sequence[ModalityRequest], incomplete: Incomplete, workers: int | None
) -> None:
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers must be at least 1, not {workers}")
    if incomplete not in get_args(Incomplete):
        raise ConfigError(f"--incomplete must be one of {', '.join(get_args(Incomplete))}, not {incomplete!r}")
    if out.suffix != ".json":
        raise ConfigError(f"--out {out} must name the manifest to write, such as {out / 'manifest.json'}")
    if not requests:
        raise ConfigError("no modalities given")

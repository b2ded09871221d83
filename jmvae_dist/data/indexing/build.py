"""Makes a manifest and indexes for tars that others wrote, which stay where and as they are.

    OUT                                  the manifest
    OUT.indexes-FINGERPRINT/             one index per shard, and the sums of its members
    .OUT.indexing/                       while it lasts: what was found in the shards read so far

Every shard is read once, from the start to the end. After a kill, shards that were read and have not changed are not
read again. The folder of indexes is named after what is in it, and the manifest is replaced atomically: at any moment
the manifest at OUT is complete and leads to its own indexes.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from jmvae_dist.data.exclusive import locked, os_errors_explained
from jmvae_dist.data.index import index_bytes
from jmvae_dist.data.indexing.inference import infer_requests
from jmvae_dist.data.indexing.inspection import ModalityRequest
from jmvae_dist.data.indexing.opening import Identity, identify, identify_all, open_shard, shard_name
from jmvae_dist.data.indexing.report import (
    check_complete,
    check_present,
    conclude_all,
    list_of_problems,
    merged,
    repeated_keys,
    shard_notes,
)
from jmvae_dist.data.indexing.shard_scan import is_complete, scan_shard
from jmvae_dist.data.indexing.workspace import Incomplete, ShardRecord, Workspace
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality, check_distinct_names
from jmvae_dist.data.processes import Report, default_workers, run_in_processes
from jmvae_dist.data.shard import IndexFile, Shard
from jmvae_dist.data.sums import sums_bytes
from jmvae_dist.data.urls import is_remote
from jmvae_dist.errors import ConfigError, DataError
from jmvae_dist.files import fsync_path
from jmvae_dist.progress import progress

_MEGABYTE = 10**6


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
        shards: paths or URLs of tars, as from `expand_shards`.
        out: the manifest to write.
        requests: the modalities; see `infer_requests`.
        incomplete: what to do with samples that lack a modality: `error`, `skip` (leave them out), or `keep` (index
            what they have; training on them is an error, or a masked sample if `data.on_bad_sample` says so).
        workers: processes; by default the available CPUs, or one where that is faster.
        overwrite: replace a manifest of other data.

    Raises:
        ConfigError: an option is out of range, a shard cannot be reached, or `out` cannot be written.
        DataError: shards are damaged, or samples are incomplete; the message lists what is wrong.
    """
    out = Path(out).expanduser().resolve()
    _check_options(out, requests, incomplete, workers)
    identities = identify_all(shards)
    with os_errors_explained(out), locked(out):
        existing = _existing_manifest(out, overwrite)
        workspace = Workspace(out, requests)
        records = _scan_all(workspace, shards, identities, workers)
        findings = merged(records, len(requests))
        check_present(findings, requests)
        check_complete(findings, requests, incomplete)
        modalities, notes = conclude_all(requests, findings)
        notes += shard_notes(records, findings, incomplete) + repeated_keys(workspace, records)
        kept = [record for record in records if record.samples_kept(incomplete)]
        if not kept:
            raise DataError("no sample has all modalities")
        manifest, written = _commit(workspace, existing, modalities, kept, incomplete, overwrite)
        workspace.remove()
    return Indexed(manifest, written, notes)


def infer_from(shard: str) -> list[ModalityRequest]:
    """The modalities that the beginning of a shard suggests; raises like `infer_requests`."""
    with open_shard(shard) as stream:
        return infer_requests(stream, shard_name(shard))


@dataclass(frozen=True)
class _Job:
    """One shard to read: its position among all, and what it looked like before."""

    shard: str
    identity: Identity


# Reading the shards


def _scan_all(
    workspace: Workspace, shards: Sequence[str], identities: Sequence[Identity], workers: int | None
) -> list[ShardRecord]:
    found = [workspace.load(shard, identity) for shard, identity in zip(shards, identities, strict=True)]
    todo = [position for position, record in enumerate(found) if record is None]
    jobs = [_Job(shards[position], identities[position]) for position in todo]
    num_bytes = sum(int(job.identity["num_bytes"]) for job in jobs)
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
        raise list_of_problems([problems[position] for position in sorted(problems)])
    return [record for record in found if record is not None]


def _scan_one(workspace: Workspace, job: _Job, report: Report) -> ShardRecord | str:
    """Read one shard and remember it; returns what is wrong with it where it cannot be used.

    As a value, because the user of ten thousand shards wants to know all that are damaged, not one after another.
    """
    num_bytes, name = int(job.identity["num_bytes"]), shard_name(job.shard)
    total = num_bytes // _MEGABYTE
    try:
        with open_shard(job.shard, num_bytes) as stream:
            scan = scan_shard(stream, name, workspace.requests, lambda done: report(min(total, done // _MEGABYTE)))
        if identify(job.shard) != job.identity or scan.num_bytes != num_bytes:
            return f"{name}: changed while it was read"
    except (DataError, ConfigError) as error:
        return str(error)
    record = workspace.save(job.shard, job.identity, scan)
    report(total)
    return record


# The result


def _commit(
    workspace: Workspace,
    existing: Manifest | None,
    modalities: Sequence[Modality],
    records: Sequence[ShardRecord],
    incomplete: Incomplete,
    overwrite: bool,
) -> tuple[Manifest, bool]:
    """Write the indexes and then the manifest, unless the same one is there."""
    out = workspace.out
    staging = workspace.folder / "result"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    shards = [
        _write_beside(workspace, staging, position, record, incomplete) for position, record in enumerate(records)
    ]
    fsync_path(staging)
    left_out = sum(record.num_samples for record in records) - sum(shard.num_samples for shard in shards)
    source = {"name": "index", "incomplete": incomplete, "left_out": left_out}
    fingerprint = Manifest.create(modalities, shards, source, out, format_version=2).fingerprint
    folder = out.with_name(f"{out.name}.indexes-{fingerprint[:16]}")
    # The fingerprint does not cover places: what is in the folder can depend on it.
    shards = [_in_folder(shard, folder.name) for shard in shards]
    manifest = Manifest.create(modalities, shards, source, out, format_version=2)
    if existing is not None and existing.fingerprint != fingerprint and not overwrite:
        raise ConfigError(f"{out} describes other data; choose another --out, or add --overwrite")
    # Whatever is wrong with it must show now, not at the start of a training run.
    manifest.save(workspace.folder / out.name)
    Manifest.load(workspace.folder / out.name)
    _publish(staging, folder)
    written = existing != manifest
    if written:
        manifest.save(out)
    for other in out.parent.glob(f"{glob.escape(out.name)}.indexes-{'[0-9a-f]' * 16}"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return Manifest.load(out), written


def _write_beside(
    workspace: Workspace, folder: Path, position: int, record: ShardRecord, incomplete: Incomplete
) -> Shard:
    """Write index and sums of one shard, without the samples that are left out."""
    records_NM, digests = workspace.index_records(record), workspace.digests(record)
    if incomplete != "keep":
        is_kept_N = is_complete(records_NM)
        records_NM, digests = records_NM[is_kept_N], digests[is_kept_N]
    index = IndexFile.write(folder / f"{position:06d}.index", index_bytes(records_NM))
    sums = IndexFile.write(folder / f"{position:06d}.sums", sums_bytes(digests))
    return Shard(_url(record.shard, workspace.out), len(records_NM), record.num_bytes, record.sha256, index, sums)


def _in_folder(shard: Shard, folder: str) -> Shard:
    """The shard with its files in a folder beside the manifest."""
    assert shard.sums is not None
    index, sums = (replace(file, url=f"{folder}/{file.url}") for file in (shard.index, shard.sums))
    return replace(shard, index=index, sums=sums)


def _url(shard: str, out: Path) -> str:
    """Relative to the manifest where the shard is in or below its folder, so that they can move together."""
    if is_remote(shard):
        return shard
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
    try:
        check_distinct_names([_sketch(request) for request in requests])
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _sketch(request: ModalityRequest) -> Modality:
    """The modality before anything is known of its values: a wrong name should not show after hours of reading."""
    encoding = "json" if request.encoding == "json" else "npy"
    return Modality(request.name, "uint8", (), encoding, member="|".join(request.extensions), field=request.field)

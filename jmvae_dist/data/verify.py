"""The full check of a data set: every byte, every sample, and an independent reading by plain webdataset."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from jmvae_dist.data.cache import CachedFile
from jmvae_dist.data.files import open_regular
from jmvae_dist.data.index import index_num_bytes, read_index
from jmvae_dist.data.indexing.inspection import ModalityRequest
from jmvae_dist.data.indexing.shard_scan import ShardScan, is_complete, scan_shard
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.processes import Report, default_workers, run_in_processes
from jmvae_dist.data.reader import ShardReader
from jmvae_dist.data.store import RemoteAccess, ShardStore, shard_files
from jmvae_dist.data.sums import read_sums
from jmvae_dist.data.untrusted import printable
from jmvae_dist.data.urls import Location, shown
from jmvae_dist.data_config import CacheSection
from jmvae_dist.errors import DataError
from jmvae_dist.files import sha256_of
from jmvae_dist.progress import progress

_CHUNK_BYTES = 64 * 2**20
# Of the members of a shard that differ from its sums.
_MOST_NAMED = 10


def verify_shards(manifest: Manifest, workers: int | None = None, access: RemoteAccess | None = None) -> list[str]:
    """Everything that is wrong with a data set, in shard order; empty if it is sound.

    Checks of every shard: size and sha256 of shard, index and sums; index and sums against the members that the
    tar holds; every member against the declared dtype, shape and number of classes; finite values; and that plain
    webdataset reads the same samples. With several workers, a script must call this inside
    `if __name__ == "__main__":`, because every worker imports the script.

    Args:
        manifest: the data set. Remote shards are downloaded.
        workers: processes; None: as many as are worth it.
        access: how remote shards are read; without a cache directory their copies are temporary.
    """
    shard_numbers = range(len(manifest.shards))
    workers = workers or default_workers(manifest.num_samples, manifest.num_bytes)
    with TemporaryDirectory() as folder, progress(manifest.num_samples, "verifying samples") as advance:
        data = _Data(manifest, None)
        if manifest.has_remote_shards:
            access = access or RemoteAccess()
            cache = access.cache if access.cache.dir is not None else CacheSection(dir=f"{folder}/copies")
            store = ShardStore(manifest, "first_use", replace(access, cache=cache))
            data = _Data(manifest, store, are_copies_temporary=access.cache.dir is None)
        problems = dict(
            run_in_processes(_verify_shard, data, shard_numbers, workers, folder=Path(folder), advance=advance)
        )
    repeated = _repeated_shards(manifest)
    return [problem for number in shard_numbers for problem in problems[number]] + repeated


def _repeated_shards(manifest: Manifest) -> list[str]:
    first_by_sha256: dict[str, int] = {}
    problems = []
    for number, shard in enumerate(manifest.shards):
        first = first_by_sha256.setdefault(shard.sha256, number)
        if first != number:
            names = [shown(manifest.shard_location(repeated)) for repeated in (number, first)]
            problems.append(f"{names[0]}: same content as {names[1]}")
    return problems


@dataclass(frozen=True)
class _Data:
    """What is verified, and if some of it is remote, how it is opened."""

    manifest: Manifest
    store: ShardStore | None
    are_copies_temporary: bool = False


def _verify_shard(data: _Data, number: int, report: Report) -> list[str]:
    if shard_files(data.manifest, number):
        problems = _remote_shard_problems(data, number, report)
    else:
        problems = _shard_problems(data.manifest, number, report)
    report(data.manifest.shards[number].num_samples)
    return problems


def _remote_shard_problems(data: _Data, number: int, report: Report) -> list[str]:
    """The problems of a shard at a URL, found in a copy of it."""
    assert data.store is not None
    cache = data.store.cache
    assert cache is not None
    copies: dict[str, CachedFile] = {}
    try:
        for file in shard_files(data.manifest, number):
            copies[file.url] = cache.open(file)

        def local_path(location: Location) -> str:
            return str(copies[location].path if isinstance(location, str) else location)

        shard = data.manifest.shards[number]
        index = replace(shard.index, url=local_path(data.manifest.index_location(number)))
        sums = None
        if shard.sums is not None:
            sums = replace(shard.sums, url=local_path(data.manifest.sums_location(number)))
        local = replace(shard, url=local_path(data.manifest.shard_location(number)), index=index, sums=sums)
        problems = _shard_problems(
            Manifest.create(data.manifest.modalities, [local], data.manifest.source), 0, report
        )
        for url, copy in copies.items():
            problems = [problem.replace(str(copy.path), shown(url)) for problem in problems]
        return problems
    except DataError as error:
        return [str(error)]
    finally:
        for copy in copies.values():
            # Copies are named after their content: equal files, such as the indexes of shards of one layout, are one
            # copy, which another process may be reading.
            if data.are_copies_temporary:
                cache.discard(copy)
            else:
                copy.close()


def _shard_problems(manifest: Manifest, number: int, report: Report) -> list[str]:
    """The problems of one shard; later checks are left out where an earlier one makes them meaningless."""
    shard, path = manifest.shards[number], manifest.shard_path(number)
    problems = []
    index_bytes = index_num_bytes(shard.num_samples, len(manifest.modalities))
    if shard.index.num_bytes != index_bytes:
        problems.append(
            f"{manifest.index_path(number)}: the manifest says {shard.index.num_bytes} bytes, but an index of "
            f"{shard.num_samples} samples with {len(manifest.modalities)} modalities has {index_bytes}"
        )
    try:
        if path.stat().st_size == shard.num_bytes and sha256_of(path) != shard.sha256:
            problems.append(f"{path}: sha256 differs from the manifest's")
        index_path = manifest.index_path(number)
        read_index(index_path, shard.num_samples, len(manifest.modalities), shard.num_bytes, shard.index.sha256)
    except OSError as error:
        return [f"{path}: cannot read shard: {error.strerror}"]
    except DataError as error:
        problems.append(str(error))
    try:
        reader = ShardReader(manifest, number, verify="never")
    except DataError as error:
        return [*problems, str(error)] if str(error) not in problems else problems
    try:
        layout_problems, is_plain = _check_layout(manifest, number, reader)
        problems += layout_problems
        may_lack = _IndexedBy.of(manifest).with_incomplete
        problems += _check_values(manifest.modalities, reader, report, may_lack)
        # Plain webdataset trusts a tar's own sizes, so it only gets one whose members are what the index says.
        if is_plain:
            problems += _check_webdataset(manifest.modalities, reader)
    finally:
        reader.close()
    return problems


def _check_layout(manifest: Manifest, number: int, reader: ShardReader) -> tuple[list[str], bool]:
    """What the tar itself says of its samples against the index: how many there are, and where their members lie.

    Returns:
        What is wrong, and whether plain webdataset should see the same samples: it does not if members of a sample
        are not adjacent, or if there is more in the tar than the samples of the index.
    """
    path = reader.path
    indexed = _IndexedBy.of(manifest)
    requests = [
        ModalityRequest(
            modality.name, modality.extensions, modality.encoding, modality.num_classes, field=modality.field
        )
        for modality in manifest.modalities
    ]
    try:
        with open_regular(path) as file:
            scan = scan_shard(file, str(path), requests, inspect=indexed.without_unreadable)
    except (DataError, OSError) as error:
        return [str(error)], False
    findings = scan.findings
    others = findings.skipped + sum(findings.ignored.values())
    if others and not indexed.foreign:
        extensions = ", ".join(printable(extension) for extension in sorted(findings.ignored)[:3])
        return [f"{path}: the tar has {others} members of no sample (extensions: {extensions or 'none'})"], False
    rows = np.arange(len(scan.keys))
    if not indexed.with_incomplete:
        rows = np.flatnonzero(is_complete(scan.records))
    problem = _compare_index(scan, rows, reader)
    if problem is not None:
        return [f"{path}: {problem}"], False
    is_plain = not others and not findings.incomplete.count and not findings.scattered.count
    return _compare_sums(scan.digests[rows], manifest, number, reader), is_plain


def _compare_sums(digests_NM: np.ndarray, manifest: Manifest, number: int, reader: ShardReader) -> list[str]:
    """What the sums say of the members against the members themselves."""
    sums = manifest.shards[number].sums
    if sums is None:
        return []
    try:
        num_samples, num_modalities = digests_NM.shape
        expected_NM = read_sums(manifest.sums_path(number), num_samples, num_modalities, sums.sha256)
    except DataError as error:
        return [str(error)]
    differs = np.argwhere(digests_NM != expected_NM)
    problems = []
    for index, column in differs[:_MOST_NAMED].tolist():
        modality = reader.modalities[column]
        where = f"{reader.path}: sample {index} (key {reader.key(index, modality)!r}), modality {modality!r}"
        problems.append(f"{where}: its bytes are not those that the shard's sums were made of")
    if len(differs) > _MOST_NAMED:
        problems.append(f"{reader.path}: {len(differs) - _MOST_NAMED} more members differ from the sums")
    return problems


def _compare_index(scan: ShardScan, rows: np.ndarray, reader: ShardReader) -> str | None:
    """What is wrong with the index, if the samples in these rows of a scan are right."""
    if len(rows) != reader.num_samples:
        return f"the tar has {len(rows)} samples, the index {reader.num_samples}"
    differs = np.flatnonzero((scan.records[rows] != reader.records).any(axis=1))
    if not len(differs):
        return None
    index = int(differs[0])
    keys = {reader.key(index, modality) for modality in reader.modalities}
    if len(keys) > 1:
        return f"sample {index}: the index joins members of different keys: {sorted(keys)}"
    return f"sample {index}: the index does not lead to the members of {printable(scan.keys[rows[index]])!r}"


class _IndexedBy(NamedTuple):
    """How the index of a data set was made, as far as it matters for what may be in its tars.

    Attributes:
        foreign: the tars may hold more than the data set.
        with_incomplete: samples may lack members.
        without_unreadable: members that cannot be read count as missing.
    """

    foreign: bool
    with_incomplete: bool
    without_unreadable: bool

    @classmethod
    def of(cls, manifest: Manifest) -> _IndexedBy:
        foreign = manifest.source.get("name") == "index"
        incomplete = manifest.source.get("incomplete")
        return cls(foreign, foreign and incomplete == "keep", foreign and incomplete in ("keep", "skip"))


def _chunks(modalities: Sequence[Modality], num_samples: int) -> Iterator[np.ndarray]:
    """Sample numbers in chunks whose decoded values fit in some tens of megabytes."""
    sample_bytes = sum(8 * math.prod(size or 1 for size in modality.shape) for modality in modalities)
    size = max(1, min(num_samples, _CHUNK_BYTES // sample_bytes))
    for start in range(0, num_samples, size):
        yield np.arange(start, min(start + size, num_samples), dtype=np.int64)


def _check_values(modalities: Sequence[Modality], reader: ShardReader, report: Report, may_lack: bool) -> list[str]:
    problems = []
    for chunk_B in _chunks(modalities, reader.num_samples):
        for column, modality in enumerate(modalities):
            index_B = chunk_B[reader.records["offset"][chunk_B, column] > 0] if may_lack else chunk_B
            if not modality.has_fixed_shape:
                problems += _check_one_by_one(modality, reader, index_B)
                continue
            try:
                reader.read(index_B, modality.name)
            except DataError:
                problems += _check_one_by_one(modality, reader, index_B)
        report(int(chunk_B[-1]) + 1)
    return problems


def _check_one_by_one(modality: Modality, reader: ShardReader, index_B: np.ndarray) -> list[str]:
    problems = []
    for index in index_B.tolist():
        try:
            if modality.has_fixed_shape:
                reader.read([index], modality.name)
            else:
                reader.decode(index, modality.name)
        except DataError as error:
            problems.append(str(error))
    return problems


def _check_webdataset(modalities: Sequence[Modality], reader: ShardReader) -> list[str]:
    """Whether plain webdataset, which knows no index, yields the same samples in the same order.

    Only its tar iteration and grouping are used, on a file opened here: no URL and no decoder of webdataset,
    either of which could run code.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    count = 0
    try:
        with open(reader.path, "rb") as file:
            samples = group_by_keys(tar_file_expander([{"url": str(reader.path), "stream": file}]))
            for index_B in _chunks(modalities, reader.num_samples):
                stored = {
                    modality.name: reader.read_stored(index_B, modality.name)
                    for modality in modalities
                    if modality.encoding in ("npy", "cls")
                }
                for row, sample in enumerate(islice(samples, len(index_B))):
                    values = {name: stored_B[row] for name, stored_B in stored.items()}
                    for modality in modalities:
                        if modality.name not in stored:
                            values[modality.name] = reader.member_bytes(int(index_B[row]), modality.name)
                    problem = _compare(modalities, sample, values)
                    if problem is not None:
                        return [f"{reader.path}: sample {count} as plain webdataset reads it: {problem}"]
                    count += 1
            count += sum(1 for _ in samples)
    except DataError:
        return []  # a sample that cannot be decoded was reported with its values
    except Exception as error:  # webdataset raises many types, with its streams among the arguments
        return [f"{reader.path}: plain webdataset cannot read it: {type(error).__name__} {error.args[:1]}"]
    if count != reader.num_samples:
        return [f"{reader.path}: plain webdataset reads {count} samples, expected {reader.num_samples}"]
    return []


def _compare(modalities: Sequence[Modality], sample: dict[str, Any], values: dict[str, Any]) -> str | None:
    members = {name for name in sample if not name.startswith("__")}
    expected = {modality.name: _member_of(modality, members) for modality in modalities}
    if members != set(expected.values()):
        return f"members {sorted(members)}, expected {sorted(expected.values())}"
    for modality in modalities:
        content = sample[expected[modality.name]]
        if modality.encoding == "cls":
            same = int(content) == values[modality.name]
        elif modality.encoding != "npy":
            same = content == values[modality.name]
        else:
            array = np.load(io.BytesIO(content), allow_pickle=False)
            same = array.dtype == values[modality.name].dtype and np.array_equal(
                array, values[modality.name], equal_nan=array.dtype.kind == "f"
            )
        if not same:
            return f"key {sample['__key__']!r}, modality {modality.name!r}: other values"
    return None


def _member_of(modality: Modality, members: set[str]) -> str:
    """The member of a sample that holds the modality, as webdataset calls it: in lower case."""
    extensions = [extension.lower() for extension in modality.extensions]
    return next((extension for extension in extensions if extension in members), extensions[0])

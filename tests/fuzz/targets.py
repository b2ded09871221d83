"""What is fuzzed. Each target damages sound data and reads them: they are correct, or refused with a user's error."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import requests  # noqa: F401  # what is imported in a case would be taken for code of the data

from jmvae_dist.checkpoint.layout import CheckpointManifest, FileRecord, FragmentRecord, TensorRecord
from jmvae_dist.data.encodings import decode_member
from jmvae_dist.data.index import RECORD_DTYPE
from jmvae_dist.data.indexing.build import index_shards
from jmvae_dist.data.indexing.inference import infer_requests
from jmvae_dist.data.indexing.inspection import ModalityRequest, conclude, make_inspector
from jmvae_dist.data.indexing.opening import identify
from jmvae_dist.data.indexing.shard_scan import scan_shard
from jmvae_dist.data.indexing.workspace import Workspace
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.plan import SamplePlan
from jmvae_dist.data.reader import ShardReader
from jmvae_dist.data.sample_names import describe_sample
from jmvae_dist.data.shard_set import ShardSet
from jmvae_dist.data.store import RemoteAccess, ShardStore, Verify
from jmvae_dist.data.views import SampleKeys, make_views
from jmvae_dist.data_config import CacheSection, RemoteSection
from jmvae_dist.errors import CheckpointError, ConfigError, DataError
from tests.faulty_server import Fault, serving
from tests.fuzz.hostile_members import HOSTILE_MEMBERS
from tests.fuzz.material import (
    ARRAYS,
    INDEX_HEADER_BYTES,
    MIXED,
    SAMPLES,
    SHARDS,
    DataSet,
    WrongDataError,
    array_members,
    check_value,
    make_dataset,
    make_tar,
    mixed_members,
    reference,
    seal_manifest,
    without_sums,
)
from tests.fuzz.mutations import PICKLE, Random, mutate_bytes, mutate_json, mutate_tar

REFUSALS = (DataError, ConfigError, CheckpointError)
REQUESTS = tuple(
    ModalityRequest(modality.name, modality.extensions, modality.encoding, modality.num_classes, field=modality.field)
    for modality in MIXED
)
# A manifest may name places that cannot be reached: what matters is that this ends.
_QUICK = RemoteSection(connect_timeout_s=2.0, stall_timeout_s=2.0, attempts=2, backoff_s=0.001)
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)


class Target:
    """One kind of input. `run` returns if the data were correct, and raises one of REFUSALS if they were refused."""

    def run(self, rng: Random, folder: Path, number: int) -> None:
        """Try one case.

        Args:
            rng: chooses it.
            folder: empty, the only place for files.
            number: of the case.
        """
        raise NotImplementedError

    def close(self) -> None:
        """End what was started."""


class _OfDataSets(Target):
    def __init__(self) -> None:
        self.datasets = (make_dataset(MIXED, mixed_members), make_dataset(ARRAYS, array_members))


class ShardTarget(_OfDataSets):
    """A damaged shard with the sound digests or those of the damaged bytes, with or without sums, verified or not."""

    def run(self, rng: Random, folder: Path, number: int) -> None:
        data, damaged = rng.choice(self.datasets), rng.randrange(SHARDS)
        tars = list(data.tars)
        kind = rng.random()
        if kind < 0.05:
            tars[damaged] = tars[1 - damaged]
        elif kind < 0.2:
            tars[damaged] = _flip_in_member(rng, tars[damaged], data.indexes[damaged])
        else:
            tars[damaged] = mutate_tar(rng, tars[damaged])
        is_stale, has_sums, verify = rng.random() < 0.5, rng.random() < 0.5, rng.choice(("never", "first_use"))
        sums = data.sums if is_stale else data.sums_of(tars, data.indexes)
        document = data.manifest if is_stale else data.described(tars, data.indexes, sums)
        document = document if has_sums else without_sums(document)
        manifest = data.write(folder, number, tars=tars, sums=sums, manifest=document)
        is_changed = tars[damaged] != data.tars[damaged]
        must_notice = is_stale and verify != "never" and is_changed
        must_refuse = {damaged} if must_notice and not has_sums else set()
        read_and_check(
            manifest,
            tars,
            data.indexes,
            verify,
            rng,
            must_refuse,
            originals=data.tars,
            must_be_original=must_notice and has_sums,
        )


def _flip_in_member(rng: Random, tar: bytes, index: bytes) -> bytes:
    """Another bit where a value is: mostly another value, which only a digest tells from the right one."""
    offset, size = rng.choice(np.frombuffer(index, RECORD_DTYPE, offset=INDEX_HEADER_BYTES).tolist())
    content = bytearray(tar)
    content[offset + rng.randrange(size)] ^= 1 << rng.randrange(8)
    return bytes(content)


class IndexTarget(_OfDataSets):
    """A damaged index, with the sound digest or that of the damaged bytes, or damaged sums."""

    def run(self, rng: Random, folder: Path, number: int) -> None:
        data, damaged = rng.choice(self.datasets), rng.randrange(SHARDS)
        indexes = list(data.indexes)
        change = _change_records if rng.random() < 0.6 else mutate_bytes
        indexes[damaged] = change(rng, indexes[damaged])
        is_stale, has_sums, verify = rng.random() < 0.3, rng.random() < 0.5, rng.choice(("never", "first_use"))
        sums = data.sums if is_stale else data.sums_of(data.tars, indexes)
        document = data.manifest if is_stale else data.described(data.tars, indexes, sums)
        must_refuse = {damaged} if is_stale and indexes[damaged] != data.indexes[damaged] else set()
        if has_sums and rng.random() < 0.2:
            other = rng.randrange(SHARDS)
            sums = [mutate_bytes(rng, digests) if number == other else digests for number, digests in enumerate(sums)]
            if verify != "never" and hashlib.sha256(sums[other]).hexdigest() != _sums_sha256(document, other):
                must_refuse.add(other)
        document = document if has_sums else without_sums(document)
        manifest = data.write(folder, number, indexes=indexes, sums=sums, manifest=document)
        read_and_check(manifest, data.tars, indexes, verify, rng, must_refuse)


def _sums_sha256(document: dict[str, Any], shard: int) -> str:
    return str(document["shards"][shard]["sums64"]["sha256"])


def _change_records(rng: Random, content: bytes) -> bytes:
    """Records that point elsewhere: to other members, between them, outside, or nowhere."""
    records = np.frombuffer(bytearray(content[INDEX_HEADER_BYTES:]), RECORD_DTYPE).copy()
    for _ in range(rng.choice((1, 1, 2, 5))):
        row, other = rng.randrange(len(records)), rng.randrange(len(records))
        kind = rng.randrange(7)
        if kind == 0:
            records[[row, other]] = records[[other, row]]
        elif kind == 1:
            records[row] = records[other]
        elif kind == 2:
            records["offset"][row] += np.uint64(rng.choice((1, 512, 2**64 - 1, 2**64 - 512, 2**32)))
        elif kind == 3:
            records["offset"][row] = rng.choice((0, 1, 511, 512, 2**31, 2**63, 2**64 - 1))
        elif kind == 4:
            records["size"][row] = rng.choice((0, 1, 2**31, 2**32 - 1, int(records["size"][row]) + 1))
        elif kind == 5:
            records[row] = (0, 0)
        else:  # evenly spaced, like a strided array
            step = rng.choice((0, 1, 512, 1024))
            records["offset"] = records["offset"][row] + np.arange(len(records), dtype=np.uint64) * np.uint64(step)
            records["size"] = records["size"][row]
    return content[:INDEX_HEADER_BYTES] + records.tobytes()


def read_and_check(
    manifest: Manifest,
    tars: Sequence[bytes],
    indexes: Sequence[bytes],
    verify: Verify,
    rng: Random,
    must_refuse: set[int],
    originals: Sequence[bytes] | None = None,
    must_be_original: bool = False,
) -> None:
    """Read every sample in every way; whatever is read must be what lies at its place in the files.

    Args:
        must_refuse: shards of which nothing may be read.
        originals: the sound tars; members that still are like theirs must be readable.
        must_be_original: no other members may be readable.
    """
    refused: dict[tuple[int, int], DataError] = {}
    for shard in range(len(tars)):
        try:
            reader = ShardReader(manifest, shard, verify)
        except DataError as error:
            refused |= dict.fromkeys(((shard, row) for row in range(SAMPLES)), error)
            continue
        if shard in must_refuse:
            raise WrongDataError(f"shard {shard} was changed, and was opened all the same")
        for row in range(SAMPLES):
            try:
                _check_sample(reader, manifest.modalities, shard, row, tars[shard], indexes[shard])
            except DataError as error:
                refused[shard, row] = error
        reader.close()
    if originals is not None:
        _check_spread(tars, indexes, originals, refused, must_be_original)
    _check_batches(manifest, verify, rng, refused)
    if refused:
        raise next(iter(refused.values()))


def _check_sample(
    reader: ShardReader, modalities: Sequence[Modality], shard: int, row: int, tar: bytes, index: bytes
) -> None:
    """Raise DataError if the sample is refused and WrongDataError if it is wrong."""
    values = {modality.name: reader.read_stored(np.array([row]), modality.name)[0] for modality in modalities}
    for modality in modalities:
        reader.read([row], modality.name)
    records = np.frombuffer(index, RECORD_DTYPE, offset=INDEX_HEADER_BYTES).reshape(SAMPLES, len(modalities))
    for column, modality in enumerate(modalities):
        offset, size = records[row, column].tolist()
        where = f"shard {shard}, sample {row}, {modality.name}"
        if offset == 0 or offset + size > len(tar):
            raise WrongDataError(f"{where}: there is no such member, but {values[modality.name]!r} was read")
        check_value(values[modality.name], tar[offset : offset + size], modality, where)


def _check_spread(
    tars: Sequence[bytes],
    indexes: Sequence[bytes],
    originals: Sequence[bytes],
    refused: dict[tuple[int, int], DataError],
    must_be_original: bool,
) -> None:
    """Damage must not spread: a sample whose members are as they were is not refused with its neighbours."""
    for shard, row in itertools.product(range(SHARDS), range(SAMPLES)):
        error = refused.get((shard, row))
        if any(words in str(error) for words in ("sha256", "truncated", "replaced", "outside the shard")):
            continue  # nothing of that shard is used
        records = np.frombuffer(indexes[shard], RECORD_DTYPE, offset=INDEX_HEADER_BYTES).reshape(SAMPLES, -1)[row]
        parts = [slice(int(record["offset"]), int(record["offset"]) + int(record["size"])) for record in records]
        is_original = all(tars[shard][part] == originals[shard][part] for part in parts)
        if is_original and error is not None:
            raise WrongDataError(f"sample {row} of shard {shard} is sound, but: {error}")
        if must_be_original and not is_original and error is None:
            raise WrongDataError(f"sample {row} of shard {shard} is damaged, and was read all the same")


def _check_batches(
    manifest: Manifest, verify: Verify, rng: Random, refused: dict[tuple[int, int], DataError]
) -> None:
    """Batches hold what single reads gave; one that masks leaves out exactly what single reads refused."""
    views = make_views(manifest.modalities)
    samples = [(shard, row) for shard in range(SHARDS) for row in range(SAMPLES)]
    rng.shuffle(samples)
    shard_B, index_B = (np.array(column) for column in zip(*samples, strict=True))
    keys = SampleKeys(np.arange(len(samples)))
    with contextlib.closing(ShardSet(manifest, verify, max_open=rng.choice((1, 8)))) as shards:
        values, problems = shards.gather_valid(shard_B, index_B, views, keys)
        expected = {row for row, sample in enumerate(samples) if sample in refused}
        if set(problems) != expected:
            raise WrongDataError(f"rows {sorted(problems)} were masked instead of {sorted(expected)}: {problems}")
        try:
            shards.gather(shard_B, index_B, views, keys)
            if refused:
                raise WrongDataError(f"a batch with bad samples was read: {refused}")
        except DataError:
            if not refused:
                raise
    kept = [sample for row, sample in enumerate(samples) if row not in problems]
    for position, (shard, row) in enumerate(kept):
        reader = ShardReader(manifest, shard, "never")
        for view in views:
            if not np.array_equal(values[view.name][position], reader.read([row], view.name)[0]):
                raise WrongDataError(f"row {position} is not sample {row} of shard {shard}")
        reader.close()


class ManifestTarget(_OfDataSets):
    """A damaged manifest: bytes, or values with a fingerprint that fits."""

    def run(self, rng: Random, folder: Path, number: int) -> None:
        data = rng.choice(self.datasets)
        if rng.random() < 0.3:
            content = mutate_bytes(rng, json.dumps(data.manifest, indent=rng.choice((None, 1))).encode())
        else:
            content = mutate_json(rng, data.manifest, seal_manifest)
        manifest = data.write(folder, number, manifest=content)
        Manifest.create(manifest.modalities, manifest.shards, manifest.source, folder / "copy.json").save(
            folder / "copy.json"
        )
        self._look(manifest)
        self._order(manifest)
        self._read(manifest, data)

    @staticmethod
    def _look(manifest: Manifest) -> None:
        for shard in range(len(manifest.shards)):
            manifest.index_location(shard)
            if manifest.shards[shard].sums is not None:
                manifest.sums_location(shard)
            describe_sample(manifest, shard, 0, manifest.modalities[0].name)
        manifest.select([modality.name for modality in manifest.modalities])

    @staticmethod
    def _order(manifest: Manifest) -> None:
        plan = SamplePlan(manifest.shard_sizes, global_batch_size=4, lanes=2, shuffle_window=64, seed=1)
        for step in (0, 1, 2, 1000):
            shard_B, index_B = plan.batch(step)
            sizes = np.array(manifest.shard_sizes)
            if not ((shard_B >= 0) & (index_B >= 0) & (index_B < sizes[shard_B])).all():
                raise WrongDataError(f"the order names samples that do not exist: {shard_B}, {index_B}")

    @staticmethod
    def _read(manifest: Manifest, data: DataSet) -> None:
        """Digests are what says which data are meant: whatever is read must be decoded from such bytes."""
        views = make_views(manifest.modalities)
        shard_B = np.repeat(np.arange(len(manifest.shards)), 2)
        index_B = np.array([[0, manifest.shards[shard].num_samples - 1] for shard in range(len(manifest.shards))])
        keys = SampleKeys(np.arange(len(shard_B)))
        with contextlib.closing(ShardSet(manifest, "first_use", access=RemoteAccess(remote=_QUICK))) as shards:
            shards.gather(shard_B, index_B.reshape(-1), views, keys)
        for shard, entry in enumerate(manifest.shards):
            tar, index = data.tar_of(entry), data.contents[entry.index.sha256]
            store = ShardStore(manifest, "first_use", RemoteAccess(remote=_QUICK))
            with contextlib.closing(ShardReader(manifest, shard, content=store.open(shard))) as reader:
                records = np.frombuffer(index, RECORD_DTYPE, offset=INDEX_HEADER_BYTES)
                records = records.reshape(entry.num_samples, len(manifest.modalities))
                for row, (column, modality) in itertools.product(range(SAMPLES), enumerate(manifest.modalities)):
                    offset, size = records[row, column].tolist()
                    value = reader.read_stored(np.array([row]), modality.name)[0]
                    check_value(value, tar[offset : offset + size], modality, f"shard {shard}, sample {row}")


class ForeignTarget(Target):
    """Tars of others, damaged, indexed: by Python, GNU and PAX, with long names and other people's members."""

    def __init__(self) -> None:
        samples = {f"{number:03d}": mixed_members(number) for number in range(SAMPLES)}
        deep = {f"{'folder/' * 20}schl\u00fcssel-{number}": mixed_members(number) for number in range(3)}
        hostile = {key: {**members, "pyd": b"x", "pkl": PICKLE} for key, members in samples.items()}
        self._tars = (
            make_tar(samples, tarfile.USTAR_FORMAT),
            make_tar(hostile, tarfile.GNU_FORMAT),
            make_tar(deep, tarfile.GNU_FORMAT),
            make_tar(samples, tarfile.PAX_FORMAT, mtime=1.5),
            make_tar(deep, tarfile.PAX_FORMAT, mtime=0.25, uname="\u00e9"),
        )

    def run(self, rng: Random, folder: Path, number: int) -> None:
        tar = mutate_tar(rng, rng.choice(self._tars))
        with contextlib.suppress(*REFUSALS):
            infer_requests(io.BytesIO(tar), "shard.tar")
        scan = scan_shard(io.BytesIO(tar), "shard.tar", REQUESTS)
        if (scan.num_bytes, scan.sha256) != (len(tar), hashlib.sha256(tar).hexdigest()):
            raise WrongDataError("size or digest of the tar is wrong")
        expected = _members_by_key(tar)
        if not set(expected) <= set(scan.keys):
            raise WrongDataError(f"samples {set(expected) - set(scan.keys)} were lost")
        may_lack = scan.findings.unreadable.count > 0
        for row, key in enumerate(scan.keys):
            for column, request in enumerate(REQUESTS):
                self._check_member(tar, scan.records[row, column], expected.get(key, {}), request, may_lack)
        for request, facts in zip(REQUESTS, scan.findings.facts, strict=True):
            if facts.kinds or facts.largest >= 0:
                conclude(request, facts)
        if number % 12 == 0:
            self._index(tar, folder)

    @staticmethod
    def _check_member(
        tar: bytes, record: np.ndarray, members: dict[str, list[bytes]], request: ModalityRequest, may_lack: bool
    ) -> None:
        offset, size = record.tolist()
        contents = [content for extension in request.extensions for content in members.get(extension, ())]
        if not contents or (may_lack and offset == 0):
            return  # `tarfile` sees no member where a time before it is not a number
        if tar[offset : offset + size] not in contents or (len(contents) > 1 and not may_lack):
            raise WrongDataError(f"{request.name}: offset {offset}, size {size} is not the member, or one of several")

    @staticmethod
    def _index(tar: bytes, folder: Path) -> None:
        """All the way: manifest and indexes on disk, and the samples read through them."""
        path = folder / "shard.tar"
        path.write_bytes(tar)
        out = folder / "manifest.json"
        manifest = index_shards([str(path)], out, REQUESTS, incomplete="skip", workers=1).manifest
        expected = _members_by_key(tar)
        with contextlib.closing(ShardReader(manifest, 0)) as reader:
            for row, modality in itertools.product(range(reader.num_samples), manifest.modalities):
                members = expected.get(reader.key(row, modality.name))
                if members is None:
                    continue
                value = reader.read_stored(np.array([row]), modality.name)[0] if modality.has_fixed_shape else None
                offset, size = reader.location(row, modality.name)
                if not any(tar[offset : offset + size] in members.get(name, ()) for name in modality.extensions):
                    raise WrongDataError(f"sample {row}, {modality.name}: not a member of the sample")
                if value is not None:
                    check_value(value, tar[offset : offset + size], modality, f"sample {row}")


def _members_by_key(tar: bytes) -> dict[str, dict[str, list[bytes]]]:
    """Samples as `tarfile` and webdataset's rules find them, with the extensions of REQUESTS."""
    wanted = {extension for request in REQUESTS for extension in request.extensions}
    samples: dict[str, dict[str, list[bytes]]] = {}
    with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as opened:
        for info in opened:
            match = _NAME.fullmatch(info.name)
            if not info.isreg() or match is None or re.match(r"__[^/]*__(/|$)", info.name):
                continue
            if match[2].lower() in wanted:
                content = tar[info.offset_data : info.offset_data + info.size]
                samples.setdefault(match[1], {}).setdefault(match[2].lower(), []).append(content)
    return samples


class DecodeTarget(Target):
    """Damaged members of every encoding, and hostile ones that are sound by their own rules."""

    def __init__(self) -> None:
        self._sound = [(modality, self._contents(modality)) for modality in (*MIXED, *ARRAYS)]

    @staticmethod
    def _contents(modality: Modality) -> list[bytes]:
        samples = [{**mixed_members(number), **array_members(number)} for number in (3, 4)]
        return [sample[name] for sample in samples for name in modality.extensions if name in sample]

    def run(self, rng: Random, folder: Path, number: int) -> None:
        modality, contents = rng.choice(self._sound)
        make = HOSTILE_MEMBERS[modality.encoding]
        content = make(rng, rng.choice(contents)) if rng.random() < 0.5 else mutate_bytes(rng, rng.choice(contents))
        request = ModalityRequest(modality.name, modality.extensions, modality.encoding, field=modality.field)
        inspector = make_inspector(request)
        with contextlib.suppress(DataError):
            inspector.see(content[: inspector.limit_bytes], len(content), "member")
            conclude(request, inspector.facts)
        value = decode_member(content, modality)
        stored = np.empty(modality.stored_shape, modality.dtype)
        stored[...] = value
        check_value(stored, content, modality, modality.encoding)
        modality.to_model(stored[None])


class RemoteTarget(_OfDataSets):
    """Damaged files on a server that errs, read member by member or through a cache that holds anything."""

    _FAULTS = (
        *(Fault(status) for status in (404, 403, 416, 500, 503, 206, 302, 304, 100)),
        *(Fault(cut_after=number) for number in (0, 1, 600)),
        *(Fault(content=content) for content in (b"", b"<html>log in</html>", bytes(40_000))),
        *(Fault(ignores_range=True), Fault(states_no_length=True), Fault(states_no_length=True, cut_after=700)),
        *(Fault(headers={"Content-Length": value}) for value in ("-1", "0", "9" * 30, "9" * 5000, "x", "1e3", "")),
        *(
            Fault(206, {"Content-Range": value})
            for value in ("bytes 0-0/1", "bytes 0-9/" + "9" * 5000, "bytes */*", "x")
        ),
        *(
            Fault(302, {"Location": value})
            for value in ("http://[", "/shard-000001.tar", "pipe:touch canary", "//", "")
        ),
        *(Fault(503, {"Retry-After": value}) for value in ("9" * 5000, "-1", "0", "Thu, 01 Jan 1970 00:00:00 GMT")),
        *(Fault(headers={"Content-Encoding": value}) for value in ("gzip", "identity", "x" * 5000)),
        *(Fault(headers={"ETag": value}) for value in ('"a"', "a" * 5000, "W/")),
        Fault(headers={"Content-Type": "text/html"}),
    )

    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        self._server = self._stack.enter_context(serving(Path("/nowhere")))

    def close(self) -> None:
        self._stack.close()

    def run(self, rng: Random, folder: Path, number: int) -> None:
        data = rng.choice(self.datasets)
        tars, indexes = list(data.tars), list(data.indexes)
        files = rng.choice(((), (), (tars,), (indexes,), (tars, indexes)))
        for contents in files:
            shard = rng.randrange(SHARDS)
            contents[shard] = (mutate_tar if contents is tars else mutate_bytes)(rng, contents[shard])
        served = folder / "served"
        served.mkdir()
        sums, document = data.sums, data.manifest
        if rng.random() < 0.3:
            sums = data.sums_of(tars, indexes)
            document = data.described(tars, indexes, sums)
        if rng.random() < 0.5:
            document = without_sums(document)
        with contextlib.suppress(*REFUSALS):  # whether it is sound is for the reader at the other end to say
            data.write(served, number, tars=tars, indexes=indexes, sums=sums, manifest=document)
        self._serve(rng, served)
        access = RemoteAccess(remote=_QUICK)
        if rng.random() < 0.6:
            access = RemoteAccess(CacheSection(dir=str(folder / "cache")), _QUICK)
            self._fill_cache(rng, folder, document, number)
        manifest = Manifest.load(f"{self._server.url}/manifest.json", _QUICK)
        self._read(manifest, access, data, tars, indexes)

    def _serve(self, rng: Random, folder: Path) -> None:
        server = self._server
        server.folder = folder
        server.faults.clear()
        server.always.clear()
        for path in folder.iterdir():
            if rng.random() < 0.15:
                fault = rng.choice(self._FAULTS)
                if rng.random() < 0.5:
                    server.always[f"/{path.name}"] = fault
                else:
                    server.faults[f"/{path.name}"].append(fault)

    @staticmethod
    def _fill_cache(rng: Random, folder: Path, document: dict[str, Any], number: int) -> None:
        cache = folder / "cache"
        cache.mkdir()
        for shard in document["shards"]:
            for entry in (shard, shard["index"], *([shard["sums64"]] if "sums64" in shard else [])):
                content = (folder / "served" / entry["url"]).read_bytes()
                name = rng.choice((entry["sha256"], f"{entry['sha256']}-{entry['num_bytes']}.part", "lock", "wanted"))
                kind = rng.randrange(9)
                if os.path.lexists(cache / name):
                    continue
                if kind == 0:
                    (cache / name).symlink_to(folder / "served" / "manifest.json")
                elif kind == 1:
                    os.mkfifo(cache / name)
                elif kind == 2:
                    (cache / name).mkdir()
                elif kind <= 5:
                    (cache / name).write_bytes(mutate_bytes(rng, content))
                    os.utime(cache / name, ns=(10**9 * (number + 1),) * 2)

    @staticmethod
    def _read(
        manifest: Manifest, access: RemoteAccess, data: DataSet, tars: Sequence[bytes], indexes: Sequence[bytes]
    ) -> None:
        views = make_views(manifest.modalities)
        shard_B, index_B = np.repeat(np.arange(SHARDS), SAMPLES), np.tile(np.arange(SAMPLES), SHARDS)
        with contextlib.closing(ShardSet(manifest, "first_use", access=access)) as shards:
            values, problems = shards.gather_valid(shard_B, index_B, views, SampleKeys(np.arange(len(shard_B))))
        by_digest = {hashlib.sha256(content).hexdigest(): content for content in (*tars, *indexes)} | data.contents
        kept = [row for row in range(len(shard_B)) if row not in problems]
        for position, row in enumerate(kept):
            shard, sample = int(shard_B[row]), int(index_B[row])
            entry = manifest.shards[shard]
            # A shard that is read in parts cannot be compared with its digest: what the server has is what counts.
            tar = by_digest.get(entry.sha256, b"") if access.cache.dir else tars[shard]
            records = np.frombuffer(by_digest[entry.index.sha256], RECORD_DTYPE, offset=INDEX_HEADER_BYTES)
            for column, view in enumerate(views):
                offset, size = records.reshape(SAMPLES, len(views))[sample, column].tolist()
                stored = np.empty(view.stored_shape, view.dtype)
                stored[...] = reference(tar[offset : offset + size], view.modality)
                if not np.array_equal(values[view.name][position], view.modality.to_model(stored[None])[0]):
                    raise WrongDataError(
                        f"sample {sample} of shard {shard}, {view.name}: {values[view.name][position]}"
                    )
        if problems:
            raise DataError(next(iter(problems.values())))


class WorkspaceTarget(Target):
    """What an interrupted indexing has left, damaged: the result is the same, or there is none."""

    def __init__(self) -> None:
        self._tars = [
            make_tar(
                {f"{shard}-{row}": mixed_members(SAMPLES * shard + row) for row in range(SAMPLES)}, tarfile.PAX_FORMAT
            )
            for shard in range(SHARDS)
        ]
        self._expected: tuple[str, ...] | None = None

    def run(self, rng: Random, folder: Path, number: int) -> None:
        paths = [folder / f"{shard}.tar" for shard in range(SHARDS)]
        for path, tar in zip(paths, self._tars, strict=True):
            path.write_bytes(tar)
        if self._expected is None:
            self._expected = self._indexes(paths, folder / "expected.json")
        workspace = Workspace(folder / "manifest.json", REQUESTS)
        for path, tar in zip(paths, self._tars, strict=True):
            workspace.save(str(path), identify(str(path)), scan_shard(io.BytesIO(tar), str(path), REQUESTS))
        for file in sorted(workspace.folder.iterdir()):
            if rng.random() < 0.4:
                content = file.read_bytes()
                is_json = file.suffix == ".json" and rng.random() < 0.5
                file.write_bytes(mutate_json(rng, _json_in(content)) if is_json else mutate_bytes(rng, content))
        if self._indexes(paths, folder / "manifest.json") != self._expected:
            raise WrongDataError("the indexes differ from those of a run without interruption")

    @staticmethod
    def _indexes(paths: Sequence[Path], out: Path) -> tuple[str, ...]:
        manifest = index_shards([str(path) for path in paths], out, REQUESTS, workers=1).manifest
        files = [file for shard in manifest.shards for file in (shard.index, shard.sums)]
        return manifest.fingerprint, *(file.sha256 for file in files if file is not None)


def _json_in(content: bytes) -> Any:
    """The document in a file of a workspace, which may have a line before it."""
    return json.loads(content[content.index(b"{") :])


class CheckpointTarget(Target):
    """A damaged manifest of a checkpoint, with a digest that fits."""

    def __init__(self) -> None:
        self._manifest = CheckpointManifest(
            global_step=3,
            engine="ddp",
            world_size=1,
            versions={"torch": "2"},
            model={"latent_dim": 2},
            modalities={"a": {}},
            config={},
            data_state={"global_step": 3},
            tracking={},
            optimizer={"groups": [1]},
            guards={},
            passed_over=[[1, 2]],
            elapsed_s=1.5,
            created="2024-01-01T00:00:00",
            tensors={"weight/a": TensorRecord([2, 2], "float32", [FragmentRecord("rank-00000.safetensors", 0, 4)])},
            files={"rank-00000.safetensors": FileRecord(10, "0" * 64)},
        )

    def run(self, rng: Random, folder: Path, number: int) -> None:
        content = mutate_json(rng, json.loads(self._manifest.to_json()), _seal_checkpoint)
        CheckpointManifest.from_json(content.decode(), folder / "manifest.json").to_json()


def _seal_checkpoint(document: dict[str, Any]) -> None:
    rest = {key: value for key, value in document.items() if key != "digest"}
    document["digest"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


TARGETS: dict[str, Callable[[], Target]] = {
    "decode": DecodeTarget,
    "manifest": ManifestTarget,
    "index": IndexTarget,
    "shard": ShardTarget,
    "foreign": ForeignTarget,
    "remote": RemoteTarget,
    "workspace": WorkspaceTarget,
    "checkpoint": CheckpointTarget,
}

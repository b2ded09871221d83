"""Targets of local data: members, shards, their indexes, and the manifest."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jmvae_dist.data.encodings import decode_member
from jmvae_dist.data.index import RECORD_DTYPE
from jmvae_dist.data.indexing.inspection import ModalityRequest, conclude, make_inspector
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.plan import SamplePlan
from jmvae_dist.data.reader import ShardReader
from jmvae_dist.data.sample_names import describe_sample
from jmvae_dist.data.shard_set import ShardSet
from jmvae_dist.data.store import RemoteAccess, ShardStore, Verify
from jmvae_dist.data.views import SampleKeys, make_views
from jmvae_dist.errors import DataError
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
    mixed_members,
    seal_manifest,
    without_sums,
)
from tests.fuzz.mutations import Random, mutate_bytes, mutate_json, mutate_tar
from tests.fuzz.target import QUICK, OfDataSets, Target


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


class ShardTarget(OfDataSets):
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


class IndexTarget(OfDataSets):
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


class ManifestTarget(OfDataSets):
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
        with contextlib.closing(ShardSet(manifest, "first_use", access=RemoteAccess(remote=QUICK))) as shards:
            shards.gather(shard_B, index_B.reshape(-1), views, keys)
        for shard, entry in enumerate(manifest.shards):
            tar, index = data.tar_of(entry), data.contents[entry.index.sha256]
            store = ShardStore(manifest, "first_use", RemoteAccess(remote=QUICK))
            with contextlib.closing(ShardReader(manifest, shard, content=store.open(shard))) as reader:
                records = np.frombuffer(index, RECORD_DTYPE, offset=INDEX_HEADER_BYTES)
                records = records.reshape(entry.num_samples, len(manifest.modalities))
                for row, (column, modality) in itertools.product(range(SAMPLES), enumerate(manifest.modalities)):
                    offset, size = records[row, column].tolist()
                    value = reader.read_stored(np.array([row]), modality.name)[0]
                    check_value(value, tar[offset : offset + size], modality, f"shard {shard}, sample {row}")

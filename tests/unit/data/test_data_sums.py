"""The digests of members: damage is found in the sample that is damaged, when that is first used."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_examples import npy_bytes, without_sums

from jmvae_dist.data import columns
from jmvae_dist.data.digest import member_digest
from jmvae_dist.data.index import RECORD_DTYPE, read_index
from jmvae_dist.data.indexing.build import index_shards
from jmvae_dist.data.indexing.inspection import ModalityRequest
from jmvae_dist.data.loader import TrainLoader
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.plan import SamplePlan
from jmvae_dist.data.reader import ShardReader
from jmvae_dist.data.shard_set import ShardSet
from jmvae_dist.data.sources.base import ArraySource
from jmvae_dist.data.store import Verify
from jmvae_dist.data.sums import CheckedMembers, read_sums
from jmvae_dist.data.verify import verify_shards
from jmvae_dist.data.views import SampleKeys, make_views
from jmvae_dist.data.writer import write_shards
from jmvae_dist.errors import DataError, UnreachableError
from tests.faulty_server import serving

MakeManifest = Callable[..., Manifest]
REQUESTS = [ModalityRequest("image", ("image.npy",), "npy"), ModalityRequest("label", ("label.cls",), "cls")]
CAUSE = "its bytes are not those that the shard's sums were made of"


def indexed(foreign_manifest: MakeManifest, out: Path) -> Manifest:
    """A tar whose labels have several lengths, so that they are no strided array, indexed like those of others."""
    modalities = Modality("image", "float32", (6,)), Modality.classes("label", 12)
    samples = [
        {"label.cls": b"%d" % (number % 12), "image.npy": npy_bytes(np.arange(6, dtype=np.float32) + number)}
        for number in range(15)
    ]
    tar = foreign_manifest(modalities, samples).shard_path(0)
    return index_shards([str(tar)], out, REQUESTS).manifest


@pytest.fixture(params=["mapped", "decoded", "ranged"])
def places(
    request: pytest.FixtureRequest, example_manifest: MakeManifest, foreign_manifest: MakeManifest, tmp_path: Path
) -> Iterator[tuple[Manifest, Manifest]]:
    """One data set twice: as files that can be damaged, and as it is read."""
    if request.param == "decoded":
        local = indexed(foreign_manifest, tmp_path / "manifest.json")
        assert ShardReader(local, 0, "never").columns(("image", "label")).others == ("label",)
        yield local, local
        return
    local = example_manifest(15, samples_per_shard=15)
    if request.param == "mapped":
        assert ShardReader(local, 0, "never").columns(("image", "label")).others == ()
        yield local, local
        return
    with serving(local.path.parent) as server:
        yield local, Manifest.load(f"{server.url}/manifest.json")


def gather(shards: ShardSet, manifest: Manifest, indices: list[int]) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    index_B = np.array(indices)
    keys, views = SampleKeys(index_B), make_views(manifest.modalities)
    return shards.gather_valid(np.zeros(len(indices), np.int64), index_B, views, keys)


def damage(manifest: Manifest, index: int, column: int) -> None:
    """Another valid value in one member."""
    shard, path = manifest.shards[0], manifest.shard_path(0)
    num_modalities = len(manifest.modalities)
    records = read_index(manifest.index_path(0), shard.num_samples, num_modalities, shard.num_bytes, None)
    content = bytearray(path.read_bytes())
    content[int(records["offset"][index, column]) + int(records["size"][index, column]) - 1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("column", [0, 1])
def test_damage_is_found_in_its_sample_at_first_use(places: tuple[Manifest, Manifest], column: int) -> None:
    local, manifest = places
    expected, _ = gather(ShardSet(manifest, "never"), manifest, list(range(15)))
    damage(local, 7, column)
    shards = ShardSet(manifest, max_open=1)
    assert not gather(shards, manifest, [3, 8, 3])[1]
    for _ in range(2):
        values, problems = gather(shards, manifest, list(range(15)))
        assert list(problems) == [7]
        assert f"sample 7 (key '{ShardReader(local, 0, 'never').key(7, 'image')}')" in problems[7]
        assert f"modality '{('image', 'label')[column]}': {CAUSE}" in problems[7]
        for name in expected:
            assert np.array_equal(values[name], np.delete(expected[name], 7, axis=0))
    assert not gather(ShardSet(manifest, "never"), manifest, [7])[1]


def test_single_reads_are_checked_alike(places: tuple[Manifest, Manifest]) -> None:
    local, manifest = places
    damage(local, 7, 0)
    reader = ShardReader(manifest, 0)
    assert len(reader.read([6, 8], "image")) == 2
    with pytest.raises(DataError, match=rf"sample 7 .*{CAUSE}"):
        reader.read([6, 7, 8], "image")
    if not manifest.has_remote_shards:
        with pytest.raises(DataError, match="sha256 differs"):
            ShardReader(manifest, 0, "always")


def test_what_is_read_is_compared_until_its_shard_has_been(
    example_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a shard that has been compared as a whole not even the sums are read."""
    manifest, compared = example_manifest(15, samples_per_shard=15), []
    hash_rows = columns.digests_of_rows

    def counting(words_BW: np.ndarray, num_bytes: int) -> np.ndarray:
        compared.extend(row.tobytes()[:num_bytes] for row in words_BW)
        return hash_rows(words_BW, num_bytes)

    monkeypatch.setattr(columns, "digests_of_rows", counting)
    first = ShardSet(manifest)
    batches = [[1, 2, 3], [3, 4], list(range(5, 15)), [4, 2, 0]]
    for samples, batch in zip((first, first, ShardSet(manifest), ShardSet(manifest)), batches, strict=True):
        gather(samples, manifest, batch)
    reader = ShardReader(manifest, 0, "never")
    members = [reader.member_bytes(index, name) for batch in batches for index in batch for name in reader.modalities]
    assert sorted(compared) == sorted(members)
    manifest.sums_path(0).unlink()
    assert not gather(ShardSet(manifest), manifest, list(range(15)))[1]
    assert len(compared) == len(members)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "sums file should have 240 bytes but has only 239; copy it again"),
        (flip, "sums do not have the sha256 of the manifest"),
        (Path.unlink, "cannot read sums file: No such file"),
    ],
)
def test_damaged_sums(example_manifest: MakeManifest, spoil: Callable[[Path], None], message: str) -> None:
    manifest = example_manifest(15, samples_per_shard=15)
    path = manifest.sums_path(0)
    spoil(path)
    with pytest.raises(DataError, match=f"{path}: {message}") as caught:
        ShardReader(manifest, 0)
    assert not isinstance(caught.value, UnreachableError)
    assert len(gather(ShardSet(manifest), manifest, [0, 1])[1]) == 2
    for verify in ("always", "never"):
        ShardReader(manifest, 0, verify)


def test_what_is_in_the_file(foreign_manifest: MakeManifest, tmp_path: Path) -> None:
    manifest = indexed(foreign_manifest, tmp_path / "manifest.json")
    assert manifest.shards[0].sums is not None
    digests = read_sums(manifest.sums_path(0), 15, 2, manifest.shards[0].sums.sha256)
    for row in range(15):
        label = member_digest(b"%d" % (row % 12))
        image = member_digest(npy_bytes(np.arange(6, dtype=np.float32) + row))
        assert digests[row].tolist() == [image, label]


@pytest.mark.parametrize("verify", ["first_use", "always", "never"])
def test_runs_go_on_with_and_without_sums(example_manifest: MakeManifest, verify: Verify, tmp_path: Path) -> None:
    """Data that get sums, or lose them, stay the same data in the same order."""
    manifest = example_manifest()
    plain = without_sums(manifest)
    assert plain.fingerprint == manifest.fingerprint
    plain.save(manifest.path.with_name("plain.json"))
    plain = Manifest.load(manifest.path.with_name("plain.json"))
    assert [shard.sums for shard in plain.shards] == [None] * 5
    plan = SamplePlan(manifest.shard_sizes, 12, 4, 8, seed=5)
    steps = [
        list(TrainLoader(kind, plan, rank=0, world_size=1, verify=verify).iterate(first, first + 3))
        for kind, first in ((manifest, 0), (plain, 3), (manifest, 3))
    ]
    for left, right in zip(steps[1], steps[2], strict=True):
        assert all((left.inputs[name] == right.inputs[name]).all() for name in left.inputs)
    some = replace(manifest, shards=(*manifest.shards[:2], *plain.shards[2:]))
    some.save(manifest.path)
    assert [shard.sums is None for shard in Manifest.load(manifest.path).shards] == [False, False, True, True, True]


def test_shards_written_before_there_were_sums_get_them(example_manifest: MakeManifest) -> None:
    manifest = example_manifest()
    without_sums(manifest).save(manifest.path)
    assert example_manifest() == manifest


def test_samples_of_other_sets_of_modalities_are_told_apart() -> None:
    """What was compared of one modality says nothing of another one; samples that come twice count once."""
    records = np.zeros((4, 2), RECORD_DTYPE)
    records["offset"] = 512
    records["offset"][3] = 0  # this sample has no members: there is nothing to compare
    checked = CheckedMembers(records)
    both, first = checked.of((0, 1), records), checked.of((0,), records)
    both.add(np.array([0, 0, 1]))
    assert both.are_in(np.arange(4)).tolist() == [True, True, False, True]
    assert first.are_in(np.arange(4)).tolist() == [False, False, False, True]
    first.add(np.array([0, 1, 2]))
    assert first.are_all
    assert first.are_in(np.arange(4)).all()  # to another thread that has looked at `are_all` before
    assert not checked.are_all
    both.add(np.array([0, 2]))
    both.add(np.array([2]))
    assert checked.are_all


def test_padding_of_the_tar_is_not_compared(example_manifest: MakeManifest) -> None:
    """Members whose length is no multiple of 8 are followed by bytes that are not theirs."""
    manifest = example_manifest(15, samples_per_shard=15)
    shard, path = manifest.shards[0], manifest.shard_path(0)
    records = read_index(manifest.index_path(0), shard.num_samples, 2, shard.num_bytes, None)
    assert (records["size"][:, 1] % 8 != 0).all()
    content = bytearray(path.read_bytes())
    for offset, size in records[:, 1].tolist():
        content[offset + size : offset + size + 8] = b"\xff" * 8
    path.write_bytes(content)
    values, problems = gather(ShardSet(manifest), manifest, list(range(15)))
    assert not problems
    expected, _ = gather(ShardSet(manifest, "never"), manifest, list(range(15)))
    assert all(np.array_equal(values[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_members_of_any_length_are_compared_by_columns(dtype: str, tmp_path: Path) -> None:
    """Also those that do not end at a 64-bit word, and those of several chunks of a digest."""
    sizes = (3, 13, 70_001) if dtype == "uint8" else (3,)
    for size in sizes:
        modalities = (Modality("x", dtype, (size,)),)
        arrays = {"x": (np.arange(5 * size) % 251).reshape(5, size).astype(dtype)}
        source = ArraySource("bytes", "train", modalities, arrays, np.arange(5), 5, {})
        folder = tmp_path / f"{size}"
        write_shards(source, folder, workers=1)
        manifest = Manifest.load(folder / "manifest.json")
        expected, _ = gather(ShardSet(manifest, "never"), manifest, list(range(5)))
        values, problems = gather(ShardSet(manifest), manifest, list(range(5)))
        assert not problems
        assert np.array_equal(values["x"], expected["x"])
        damage(manifest, 4, 0)
        assert list(gather(ShardSet(manifest), manifest, list(range(5)))[1]) == [4]


def with_old_sums(document: dict[str, Any]) -> dict[str, Any]:
    """A manifest of the version whose sums had 16 bytes per member."""
    for shard in document["shards"]:
        shard["sums"] = {**shard.pop("sums64"), "num_bytes": 2 * 16 * shard["num_samples"]}
    return document


def test_sums_of_an_earlier_version_are_not_read_and_made_anew(
    example_manifest: MakeManifest,
    foreign_manifest: MakeManifest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("jmvae_dist"), "propagate", True)
    written = example_manifest()
    indexed_manifest = indexed(foreign_manifest, tmp_path / "indexed.json")
    for manifest in (written, indexed_manifest):
        manifest.path.write_text(json.dumps(with_old_sums(json.loads(manifest.path.read_text()))))
        for number in range(len(manifest.shards)):
            manifest.sums_path(number).write_bytes(b"of an earlier version")
        caplog.clear()
        assert [Manifest.load(manifest.path) for _ in range(2)] == [without_sums(manifest)] * 2
        (message,) = caplog.messages
        assert str(manifest.path) in message
        assert "its sums are of an earlier version" in message
    old = Manifest.load(written.path)
    assert gather(ShardSet(old), old, [0, 3])[1] == {}
    damage(old, 3, 1)
    problems = gather(ShardSet(old), old, [0, 3])[1]  # all of the shard
    assert list(problems) == [0, 1]
    assert "sha256 differs" in problems[0]
    assert example_manifest() == written
    tar = indexed_manifest.shard_path(0)
    again = index_shards([str(tar)], indexed_manifest.path, REQUESTS)
    assert (again.manifest, again.written) == (indexed_manifest, True)
    assert verify_shards(again.manifest) == verify_shards(Manifest.load(written.path)) == []

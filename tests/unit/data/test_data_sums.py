"""The digests of members: damage is found in the sample that is damaged, when that is first used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_examples import npy_bytes, without_sums

from jmvae_dist.data.index import read_index
from jmvae_dist.data.indexing.build import index_shards
from jmvae_dist.data.indexing.inspection import ModalityRequest
from jmvae_dist.data.loader import TrainLoader
from jmvae_dist.data.manifest import Manifest, Modality
from jmvae_dist.data.plan import SamplePlan
from jmvae_dist.data.reader import ShardReader, ShardSet, Verify
from jmvae_dist.data.sums import MemberChecks, member_digest, read_sums
from jmvae_dist.data.views import SampleKeys, make_views
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
        assert ShardReader(local, 0, "never").column("label") is None
        yield local, local
        return
    local = example_manifest(15, samples_per_shard=15)
    if request.param == "mapped":
        assert ShardReader(local, 0, "never").column("label") is not None
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
    records = read_index(manifest.index_path(0), shard.num_samples, 2, shard.num_bytes, None)
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


def test_nothing_is_checked_twice(example_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the same member again, and of a shard that was read as a whole not even the sums."""
    manifest, compared = example_manifest(15, samples_per_shard=15), []
    compare = MemberChecks.compare

    def counting(checks: MemberChecks, column: int, index_B: np.ndarray, contents: list[bytes]) -> np.ndarray:
        compared.extend((column, index) for index in index_B.tolist())
        return compare(checks, column, index_B, contents)

    monkeypatch.setattr(MemberChecks, "compare", counting)
    first = ShardSet(manifest)
    gather(first, manifest, [1, 2, 3])
    gather(first, manifest, [3, 4])
    gather(ShardSet(manifest), manifest, [4, 2])
    assert sorted(compared) == [(column, index) for column in range(2) for index in range(1, 5)]
    gather(ShardSet(manifest), manifest, list(range(15)))
    assert len(compared) == 30
    manifest.sums_path(0).unlink()
    assert not gather(ShardSet(manifest), manifest, list(range(15)))[1]
    assert len(compared) == 30


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "sums file should have 480 bytes but has only 479; copy it again"),
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
        image = hashlib.sha256(npy_bytes(np.arange(6, dtype=np.float32) + row)).digest()[:16]
        assert [digest.tobytes() for digest in digests[row]] == [image, label]


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

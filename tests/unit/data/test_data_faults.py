"""Every fault of a shard, an index or a member: one error that names it, or a masked sample at its own position."""

from __future__ import annotations

import hashlib
import io
import os
import re
import resource
import tarfile
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_examples import npy_bytes
from PIL import Image

from jmvae_dist.data.index import RECORD_DTYPE, index_bytes, read_index
from jmvae_dist.data.loader import Batch, EvaluationLoader, TrainLoader
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.plan import SamplePlan
from jmvae_dist.data.shard import IndexFile, Shard
from jmvae_dist.data.shard_set import ShardSet
from jmvae_dist.data.store import Verify
from jmvae_dist.data.views import SampleKeys, make_views
from jmvae_dist.errors import DataError, UnreachableError
from jmvae_dist.files import sha256_of_descriptor

MODALITIES = (
    Modality.image("photo", (3, 4, 4), "jpg|png"),
    Modality("x", "float32", (3,), member="npy"),
    Modality.classes("label", 9, "cls"),
    Modality.text("caption", 4, "txt"),
    Modality("score", "float32", (), "json", member="json"),
)
SHARDS, SIZE = 3, 4
BAD_SHARD, BAD_INDEX = 1, 2
BAD_KEY = f"s{BAD_SHARD}/{BAD_INDEX:03d}"
Members = dict[str, bytes]


def members(number: int) -> Members:
    picture = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(picture, "PNG")
    return {
        "png": picture.getvalue(),
        "npy": npy_bytes(np.full(3, number, np.float32)),
        "cls": str(number % 9).encode(),
        "txt": f"{number}".encode(),
        "json": f"{number}.5".encode(),
    }


def write(folder: Path, change: Callable[[Members], None] = lambda sample: None) -> Manifest:
    """Three shards as others might write them; `change` spoils one sample before it is packed."""
    folder.mkdir()
    shards = []
    for number in range(SHARDS):
        path = folder / f"data-{number}.tar"
        records = np.zeros((SIZE, len(MODALITIES)), RECORD_DTYPE)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(SIZE):
                sample = members(number * SIZE + index)
                if (number, index) == (BAD_SHARD, BAD_INDEX):
                    change(sample)
                for extension, content in sample.items():
                    info = tarfile.TarInfo(f"s{number}/{index:03d}.{extension}")
                    info.size = len(content)
                    column = next(c for c, modality in enumerate(MODALITIES) if extension in modality.extensions)
                    records[index, column] = (tar.offset + 512, len(content))
                    tar.addfile(info, io.BytesIO(content))
        index_content, content = index_bytes(records), path.read_bytes()
        (folder / f"{path.name}.index").write_bytes(index_content)
        index_file = IndexFile(f"{path.name}.index", len(index_content), hashlib.sha256(index_content).hexdigest())
        shards.append(Shard(path.name, SIZE, len(content), hashlib.sha256(content).hexdigest(), index_file))
    Manifest.create(MODALITIES, shards, {}, format_version=2).save(folder / "manifest.json")
    return Manifest.load(folder / "manifest.json")


@dataclass(frozen=True)
class Fault:
    """How to spoil a sample or its finished shard, and what the error says."""

    modality: str
    cause: str
    change: Callable[[Members], None] = lambda sample: None
    damage: Callable[[Path], None] = lambda path: None
    verify: Verify = "first_use"
    is_whole_shard: bool = False
    key: str = BAD_KEY


def replaced(extension: str, content: bytes) -> Callable[[Members], None]:
    return lambda sample: sample.update({extension: content})


def flipped(position: int) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)

    return flip


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: -20 * 512])


def html(path: Path) -> None:
    path.write_bytes(b"<html>not found</html>")


def html_of_the_same_size(path: Path) -> None:
    path.write_bytes(b"<html>not found</html>".ljust(path.stat().st_size))


def whole(cause: str, damage: Callable[[Path], None], verify: Verify, key: str = r"s1/\d{3}") -> Fault:
    return Fault("photo", cause, damage=damage, verify=verify, is_whole_shard=True, key=key)


FAULTS = {
    "cut_on_a_block": whole("the shard was truncated", cut, "never"),
    "flipped_header_byte": whole("sha256 differs", flipped(3), "first_use"),
    "flipped_data_byte": whole("sha256 differs", flipped(600), "always"),
    "zero_length": whole("0 bytes, .* truncated", lambda path: path.write_bytes(b"") and None, "never", "unknown"),
    "html": whole("22 bytes, .* truncated", html, "first_use", "unknown"),
    "html_of_the_same_size": Fault(
        "photo",
        "not a sound PNG or JPEG: cannot identify what it is",
        damage=html_of_the_same_size,
        verify="never",
        is_whole_shard=True,
        key="unknown",
    ),
    "missing_shard": whole("cannot read shard: No such file", Path.unlink, "first_use", "unknown"),
    "missing_index": whole(
        "cannot read index: No such file",
        lambda path: path.with_name(f"{path.name}.index").unlink(),
        "first_use",
        "unknown",
    ),
    "missing_member": Fault("x", "the sample has no member 'npy'", lambda sample: sample.pop("npy") and None),
    "missing_first_member": Fault("photo", "no member 'jpg' or 'png'", lambda sample: sample.pop("png") and None),
    "dtype": Fault("x", "stored dtype is <f8", replaced("npy", npy_bytes(np.zeros(3)))),
    "shape": Fault("x", r"stored shape is \[4\]", replaced("npy", npy_bytes(np.zeros(4, np.float32)))),
    "nan": Fault("x", "not finite", replaced("npy", npy_bytes(np.full(3, np.nan, np.float32)))),
    "bad_image": Fault("photo", "not a sound PNG or JPEG", replaced("png", members(0)["png"][:50])),
    "class": Fault("label", "class index 9 is not below", replaced("cls", b"9")),
    "text": Fault("caption", "not UTF-8", replaced("txt", b"\xff\xfe")),
    "json": Fault("score", "not valid JSON", replaced("json", b"{")),
}


def damaged(folder: Path, fault: Fault) -> Manifest:
    manifest = write(folder, fault.change)
    fault.damage(folder / f"data-{BAD_SHARD}.tar")
    return manifest


def batches(manifest: Manifest, verify: Verify, policy: str, threads: int = 1) -> list[Batch]:
    plan = SamplePlan(manifest.shard_sizes, global_batch_size=6, lanes=2, shuffle_window=5, seed=1)
    loader = TrainLoader(manifest, plan, rank=0, world_size=1, verify=verify, threads=threads, on_bad_sample=policy)
    return list(loader.iterate(0, 4))


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_ends_in_one_error_that_names_it(tmp_path: Path, kind: str) -> None:
    fault = FAULTS[kind]
    manifest = damaged(tmp_path / "data", fault)
    with pytest.raises(DataError, match=fault.cause) as caught:
        batches(manifest, fault.verify, "stop")
    message = str(caught.value)
    assert f"data-{BAD_SHARD}.tar" in message
    assert f"modality '{fault.modality}'" in message
    assert re.search(f"key '{fault.key}'", message)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_masked_at_its_own_position(tmp_path: Path, kind: str) -> None:
    fault = FAULTS[kind]
    sound = batches(write(tmp_path / "sound"), "never", "stop")
    masked = batches(damaged(tmp_path / "data", fault), fault.verify, "mask", threads=2)
    lost = range(BAD_SHARD * SIZE, (BAD_SHARD + 1) * SIZE) if fault.is_whole_shard else [BAD_SHARD * SIZE + BAD_INDEX]
    assert sum(len(batch.problems) for batch in masked) == 2 * len(lost)  # two epochs
    for batch, expected in zip(masked, sound, strict=True):
        kept = ~torch.isin(expected.inputs["score"], torch.tensor(lost) + 0.5)
        assert len(batch) + len(batch.problems) == len(expected)
        assert torch.equal(batch.rows, expected.rows[kept])
        for name, values in expected.inputs.items():
            assert torch.equal(batch.inputs[name], values[kept])
        for problem in batch.problems:
            assert f"data-{BAD_SHARD}.tar" in problem


def test_a_lack_of_open_files_masks_nothing(tmp_path: Path) -> None:
    """It passes, and says nothing against the data: the run stops, and the samples are still good."""
    manifest = write(tmp_path / "data")
    shards, keys = ShardSet(manifest, "never"), SampleKeys(np.arange(2))
    wanted = np.array([0, 1]), np.array([0, 0]), make_views(manifest.modalities), keys
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(UnreachableError, match=r"Too many open files \(needed for sample 0"):
            shards.gather_valid(*wanted)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not shards.gather_valid(*wanted)[1]


@pytest.mark.parametrize("lost", ["folder", "all files"])
def test_a_lost_mount_masks_nothing(tmp_path: Path, lost: str) -> None:
    """Where a disk is not mounted, files are missing like those that were deleted."""
    manifest = write(tmp_path / "data")
    shards, views = ShardSet(manifest, "never"), make_views(manifest.modalities)
    wanted = np.array([0, 1]), np.array([0, 0]), views, SampleKeys(np.arange(2))
    aside = (tmp_path / "data").rename(tmp_path / "aside")
    if lost == "all files":
        (tmp_path / "data").mkdir()  # the place where the disk was
    with pytest.raises(UnreachableError, match=r"No such file .* is gone too: is the file system mounted\?"):
        shards.gather_valid(*wanted)
    if lost == "all files":
        (tmp_path / "data").rmdir()
    aside.rename(tmp_path / "data")
    assert not shards.gather_valid(*wanted)[1]


def test_a_damaged_shard_is_hashed_once_until_it_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, hashed = write(tmp_path / "data"), []
    monkeypatch.setattr(
        "jmvae_dist.data.store.sha256_of_descriptor", lambda file: hashed.append(file) or sha256_of_descriptor(file)
    )
    path = manifest.shard_path(BAD_SHARD)
    sound = path.read_bytes()
    flipped(600)(path)
    shards, views = ShardSet(manifest), make_views(manifest.modalities)
    wanted = np.array([BAD_SHARD, 0, 2]), np.arange(3), views, SampleKeys(np.arange(3))
    for _ in range(2):
        assert list(shards.gather_valid(*wanted)[1]) == [0]
        assert len(hashed) == 3
    path.write_bytes(sound)
    assert not shards.gather_valid(*wanted)[1]
    assert len(hashed) == 4


@pytest.mark.parametrize(("modality", "cause"), [(0, "limit of an image"), (1, "not a valid npy"), (3, "16777216")])
def test_no_more_of_a_member_is_read_than_it_may_have(tmp_path: Path, modality: int, cause: str) -> None:
    manifest = write(tmp_path / "data")
    path, index_path = manifest.shard_path(BAD_SHARD), manifest.index_path(BAD_SHARD)
    records = np.array(read_index(index_path, SIZE, len(MODALITIES), manifest.shards[BAD_SHARD].num_bytes, None))
    records[:, modality] = path.stat().st_size, 2**31  # a hole, which takes no room on disk
    os.truncate(path, path.stat().st_size + 2**31)
    content = index_bytes(records)
    index_path.write_bytes(content)
    shards = list(manifest.shards)
    index = replace(shards[BAD_SHARD].index, sha256=hashlib.sha256(content).hexdigest())
    shards[BAD_SHARD] = replace(shards[BAD_SHARD], num_bytes=path.stat().st_size, index=index)
    hostile = replace(manifest, shards=tuple(shards))
    views = make_views(hostile.select([MODALITIES[modality].name]))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=cause):
            ShardSet(hostile, "never").gather(np.full(4, BAD_SHARD), np.arange(4), views, SampleKeys(np.arange(4)))
        assert tracemalloc.get_traced_memory()[1] < 600 * 2**20
    finally:
        tracemalloc.stop()


def test_evaluation_masks_alike(tmp_path: Path) -> None:
    manifest = damaged(tmp_path / "data", FAULTS["nan"])
    loader = EvaluationLoader(manifest, rank=0, world_size=1, batch_size=5, on_bad_sample="mask")
    rows = torch.cat([batch.rows for batch in loader]).tolist()
    assert rows == [row for row in range(SHARDS * SIZE) if row != BAD_SHARD * SIZE + BAD_INDEX]


def test_a_batch_of_nothing_but_bad_samples(tmp_path: Path) -> None:
    manifest = write(tmp_path / "data")
    for number in range(SHARDS):
        (tmp_path / "data" / f"data-{number}.tar").write_bytes(b"")
    for batch in batches(manifest, "first_use", "mask"):
        assert len(batch) == 0
        assert len(batch.problems) == 6
        assert {name: tuple(values.shape) for name, values in batch.inputs.items()} == {
            modality.name: (0, *modality.fixed_shape) for modality in MODALITIES
        }

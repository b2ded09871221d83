"""Reading: the strided and the general path agree, and every kind of damage is named."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from data_examples import npy_bytes, without_sums
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jmvae_dist.data.columns import Alike, Columns
from jmvae_dist.data.encodings import decode_member, parse_npy_header
from jmvae_dist.data.files import open_regular
from jmvae_dist.data.index import RECORD_DTYPE, index_bytes, read_index
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.reader import ShardReader
from jmvae_dist.data.shard_set import ShardSet
from jmvae_dist.data.views import SampleKeys, make_views
from jmvae_dist.errors import ConfigError, DataError, UnreachableError
from jmvae_dist.files import sha256_of_descriptor

MakeManifest = Callable[..., Manifest]
IMAGE = Modality("image", "float32", (2, 3), offset=1.0, scale=2.0)
LABEL = Modality.classes("label", 12)


def image(number: int) -> np.ndarray:
    return np.arange(6, dtype=np.float32).reshape(2, 3) + 100 * number


def sample(number: int) -> dict[str, bytes]:
    return {"image.npy": npy_bytes(image(number)), "label.cls": f"{number % 12:02d}".encode()}


def test_written_shards_are_read_as_strided_arrays(example_manifest: MakeManifest) -> None:
    manifest = example_manifest()
    reader = ShardReader(manifest, 0)
    assert reader.columns(("image", "label")).others == ()
    for index in range(manifest.shards[0].num_samples):
        number = int(reader.key(index, "image").split("-")[-1])
        assert reader.read([index], "image")[0].tolist() == image(number).tolist()
        assert reader.read([index], "label")[0].argmax() == number % 12


UNEVEN = {
    "one index without leading zero": lambda members: {**members, "label.cls": b"7"},
    "one array in Fortran order": lambda members: {**members, "image.npy": npy_bytes(np.asfortranarray(image(3)))},
    "one large extra member": lambda members: {"other.txt": b"x" * 2000, **members},
}


@pytest.mark.parametrize("kind", UNEVEN)
def test_general_path_gives_the_same_values(foreign_manifest: MakeManifest, kind: str) -> None:
    samples = [sample(number) for number in range(6)]
    even = foreign_manifest([IMAGE, LABEL], samples)
    readers = [ShardReader(even, 0)]
    order = np.array([5, 0, 2, 3, 2])
    expected = {name: readers[0].read(order, name) for name in ("image", "label")}
    expected_label = expected["label"].copy()
    samples[3] = UNEVEN[kind](samples[3])
    if kind == "one index without leading zero":
        expected_label[3] = np.eye(12)[7]
    # A folder may not change under an open reader, so the first one is closed before its files are replaced.
    readers[0].close()
    reader = ShardReader(foreign_manifest([IMAGE, LABEL], samples), 0)
    assert np.array_equal(reader.read(order, "image"), expected["image"])
    assert np.array_equal(reader.read(order, "label"), expected_label)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_gather_is_in_row_order(example_manifest: MakeManifest, data: st.DataObject, tmp_path: Path) -> None:
    if not (tmp_path / "shards").exists():
        example_manifest()
    manifest = Manifest.load(tmp_path / "shards" / "manifest.json")
    places = [(shard, index) for shard, size in enumerate(manifest.shard_sizes) for index in range(size)]
    chosen = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=30))
    shards = ShardSet(manifest, max_open=data.draw(st.integers(1, 5)))
    shard_B, index_B = (np.array(column) for column in zip(*chosen, strict=True))
    values = shards.gather(shard_B, index_B, make_views(manifest.modalities), SampleKeys(index_B))
    for row, (shard, index) in enumerate(chosen):
        number = int(shards.reader(shard).key(index, "label").split("-")[-1])
        assert values["image"][row].tolist() == image(number).tolist()
        assert values["label"][row].argmax() == number % 12


def test_more_layouts_in_a_batch_take_memory_for_their_own_samples(
    foreign_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels of one, two and three digits are three layouts."""
    label, shards = Modality.classes("label", 1000), []
    for position, digits in enumerate((1, 2, 3, 3)):
        samples = [{"image.npy": npy_bytes(image(n)), "label.cls": f"{n:0{digits}d}".encode()} for n in range(6)]
        manifest = foreign_manifest([IMAGE, label], samples)
        (shard,) = manifest.shards
        paths = manifest.shard_path(0), manifest.index_path(0)
        urls = [path.rename(path.with_name(f"{position}-{path.name}")).name for path in paths]
        shards.append(replace(shard, url=urls[0], index=replace(shard.index, url=urls[1])))
    manifest = Manifest.create([IMAGE, label], shards, {}, manifest.path)
    alike: list[Alike] = []

    class Watched(Alike):
        def __init__(self, first: Columns, num_rows: int, room: int) -> None:
            super().__init__(first, num_rows, room)
            alike.append(self)

    monkeypatch.setattr("jmvae_dist.data.shard_set.Alike", Watched)
    shard_B, index_B = np.array([2, 0, 1, 2, 0, 1, 2, 3]), np.array([5, 0, 3, 1, 0, 4, 2, 5])
    for max_open in (3, 1):
        shards_open = ShardSet(manifest, max_open=max_open)
        values = shards_open.gather(shard_B, index_B, make_views(manifest.modalities), SampleKeys(index_B))
        assert values["label"].argmax(axis=1).tolist() == index_B.tolist()
        assert np.array_equal(values["image"], np.stack([2 * (image(number) - 1) for number in index_B]))
    # The first, which usually is the only one, for all of the batch; the last one has grown from 3.
    assert [len(kind._members[0].contents_B) for kind in alike] == [8, 2, 6] * 2


def test_no_more_than_max_open_files_are_open(example_manifest: MakeManifest) -> None:
    manifest = example_manifest()
    shards = ShardSet(manifest, max_open=2)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(len(manifest.shards)):
        shards.reader(number)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    shards.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_shard_set_can_be_sent_to_another_process(example_manifest: MakeManifest) -> None:
    manifest = example_manifest()
    shards = ShardSet(manifest)
    wanted = np.array([1]), np.array([2]), make_views(manifest.modalities), SampleKeys(np.array([2]))
    expected = shards.gather(*wanted)
    received = pickle.loads(pickle.dumps(shards)).gather(*wanted)
    assert np.array_equal(expected["image"], received["image"])


BAD_MEMBERS = {
    "truncated array": ("image.npy", npy_bytes(image(3))[:-4], "148 bytes, expected 152"),
    "not npy": ("image.npy", b"<html>", "not a valid npy array"),
    "damaged header": ("image.npy", npy_bytes(image(3)).replace(b"descr", b"des\0r"), "not a valid npy array"),
    "other dtype": (
        "image.npy",
        npy_bytes(image(3).astype(np.float64)),
        "stored dtype is <f8, the manifest says <f4",
    ),
    "big endian": ("image.npy", npy_bytes(image(3).astype(">f4")), "stored dtype is >f4"),
    "other shape": (
        "image.npy",
        npy_bytes(image(3).T.copy()),
        r"stored shape is \[3, 2\], the manifest says \[2, 3\]",
    ),
    "objects": ("image.npy", npy_bytes(np.array([print], dtype=object)), "Python objects, which are never loaded"),
    "NaN": ("image.npy", npy_bytes(np.full((2, 3), np.nan, np.float32)), "not finite"),
    "infinite": ("image.npy", npy_bytes(np.full((2, 3), np.inf, np.float32)), "not finite"),
    "class too large": ("label.cls", b"12", "class index 12 is not below num_classes 12"),
    "not a class": ("label.cls", b"-1", "'-1' is not a class index"),
    "empty class": ("label.cls", b"", "'' is not a class index"),
    "endless class": ("label.cls", b"9" * 5000, "more than 24 bytes, the limit of a class index"),
}


@pytest.mark.parametrize("kind", BAD_MEMBERS)
def test_a_bad_sample_is_named(foreign_manifest: MakeManifest, kind: str) -> None:
    extension, content, message = BAD_MEMBERS[kind]
    samples = [sample(number) for number in range(6)]
    samples[3][extension] = content
    manifest = foreign_manifest([IMAGE, LABEL], samples)
    name = extension.split(".")[0]
    reader = ShardReader(manifest, 0)
    assert len(reader.read([0, 1, 2, 4, 5], name)) == 5
    shards = ShardSet(manifest)
    index_B = np.arange(6)
    everything = np.zeros(6, dtype=np.int64), index_B, make_views(manifest.modalities), SampleKeys(index_B)
    for read in (lambda: reader.read(range(6), name), lambda: shards.gather(*everything)):
        with pytest.raises(DataError, match=message) as caught:
            read()
        for part in ("shard-000000.tar", "sample 3", "'foreign-003'", f"modality '{name}'"):
            assert part in str(caught.value)


def test_all_samples_of_another_dtype_are_refused(foreign_manifest: MakeManifest) -> None:
    """Uniform, so only the comparison with the manifest can tell."""
    samples = [{"image.npy": npy_bytes(image(number).astype(np.int32))} for number in range(3)]
    with pytest.raises(DataError, match="stored dtype is <i4, the manifest says <f4"):
        ShardReader(foreign_manifest([IMAGE], samples), 0).read([0], "image")


def test_values_beyond_float32_are_refused(foreign_manifest: MakeManifest) -> None:
    modality = Modality("x", "float64", (1,))
    samples = [{"x.npy": npy_bytes(np.array([value]))} for value in (1.0, 1e300)]
    with pytest.raises(DataError, match=r"sample 1 .* not finite"):
        ShardReader(foreign_manifest([modality], samples), 0).read([0, 1], "x")


def test_a_number_of_samples_that_no_memory_can_hold(tmp_path: Path) -> None:
    write_index_file(tmp_path / "index", 512, 100)
    with pytest.raises(DataError, match="index should have 422212465065996 bytes but has only 36"):
        read_index(tmp_path / "index", 2**45 - 1, 1, 1024, None)


@pytest.mark.parametrize("index", [-1, 10])
def test_samples_that_do_not_exist(example_manifest: MakeManifest, index: int) -> None:
    with pytest.raises(DataError, match=rf"sample {index} does not exist; the shard has 10 samples"):
        ShardReader(example_manifest(20), 0).read([0, index], "image")


# Whole files


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_truncated_shard(example_manifest: MakeManifest) -> None:
    manifest = example_manifest()
    path = manifest.shard_path(1)
    os.truncate(path, path.stat().st_size - 512)
    with pytest.raises(DataError, match=r"shard-000001\.tar: .* the shard was truncated; copy it again"):
        ShardReader(manifest, 1, verify="never")


def test_missing_shard_and_index(example_manifest: MakeManifest) -> None:
    manifest = example_manifest()
    manifest.shard_path(0).unlink()
    with pytest.raises(DataError, match=r"shard-000000\.tar: cannot read shard: No such file"):
        ShardReader(manifest, 0)
    manifest.index_path(1).unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar\.index: cannot read index: No such file"):
        ShardReader(manifest, 1)


def test_without_sums_a_flipped_bit_is_found_when_its_shard_is_opened(example_manifest: MakeManifest) -> None:
    manifest = without_sums(example_manifest())
    flip_byte(manifest.shard_path(0), 700)
    with pytest.raises(DataError, match="sha256 differs"):
        ShardReader(manifest, 0, verify="first_use")
    ShardReader(manifest, 0, verify="never")


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every file of which all bytes are hashed."""
    hashed: list[int] = []

    def counting(descriptor: int) -> str:
        hashed.append(descriptor)
        return sha256_of_descriptor(descriptor)

    monkeypatch.setattr("jmvae_dist.data.store.sha256_of_descriptor", counting)
    return hashed


def test_first_use_checks_once_and_always_checks_again(
    example_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = without_sums(example_manifest())
    path = manifest.shard_path(0)
    ShardReader(manifest, 0, verify="first_use").close()
    hashed = count_hashes(monkeypatch)
    ShardReader(manifest, 0, verify="first_use").close()
    assert not hashed
    ShardReader(manifest, 0, verify="always").close()
    assert len(hashed) == 1
    status = path.stat()
    flip_byte(path, 700)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # only the time of the last change tells
    for verify in ("always", "first_use"):
        with pytest.raises(DataError, match="sha256 differs"):
            ShardReader(manifest, 0, verify=verify)


def test_the_bytes_that_are_hashed_are_those_that_are_read(
    example_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file takes the name of a damaged shard after that was opened."""
    manifest = example_manifest()
    path = manifest.shard_path(0)
    sound = path.with_name("sound")
    sound.write_bytes(path.read_bytes())
    flip_byte(path, 700)

    def opened_then_replaced(name: Path) -> BinaryIO:
        file = open_regular(name)
        if name == path and sound.exists():
            sound.replace(path)
        return file

    monkeypatch.setattr("jmvae_dist.data.store.open_regular", opened_then_replaced)
    with pytest.raises(DataError, match="sha256 differs"):
        ShardReader(manifest, 0, verify="always")


def test_unknown_verify_mode(example_manifest: MakeManifest) -> None:
    with pytest.raises(ConfigError, match=r"data\.verify must be one of always, first_use, never, not 'sometimes'"):
        ShardReader(example_manifest(), 0, verify="sometimes")  # type: ignore[arg-type]


def test_a_damaged_index_is_found_without_verification(example_manifest: MakeManifest) -> None:
    """Damage to it would make one sample pass for another."""
    manifest = example_manifest()
    path = manifest.index_path(0)
    content = path.read_bytes()
    path.write_bytes(content[:24] + content[48:72] + content[24:48] + content[72:])  # samples 0 and 1 exchanged
    with pytest.raises(DataError, match="index does not have the sha256"):
        ShardReader(manifest, 0, verify="never")


def test_a_batch_beyond_all_memory_is_an_error_of_its_size(example_manifest: MakeManifest) -> None:
    manifest = example_manifest()
    huge = replace(manifest, modalities=(Modality("image", "float32", (2**28,)), LABEL))
    rows = np.zeros(2**18, np.int64)
    views, keys = make_views(huge.modalities), SampleKeys(rows)
    for gather in (ShardSet(huge).gather, ShardSet(huge).gather_valid):
        with pytest.raises(UnreachableError, match=r"memory is too small for a batch of 262144 .* 'image'"):
            gather(rows, rows, views, keys)


# Index files


def write_index_file(path: Path, offset: int, size: int, num_samples: int = 1) -> None:
    path.write_bytes(index_bytes(np.array([[(offset, size)]] * num_samples, dtype=RECORD_DTYPE)))


def test_index_round_trip(tmp_path: Path) -> None:
    records = np.array([[(512, 3), (1536, 600)], [(2560, 4), (3584, 1)]], dtype=RECORD_DTYPE)
    (tmp_path / "index").write_bytes(index_bytes(records))
    loaded = read_index(tmp_path / "index", 2, 2, 4096, None)
    assert np.array_equal(loaded, records)
    assert not loaded.flags.owndata
    assert not loaded.flags.writeable


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 1), (511, 1), (4000, 97), (4097, 0), (2**64 - 1, 2), (512, 2**32 - 1)]
)
def test_index_may_not_point_outside_its_shard(tmp_path: Path, offset: int, size: int) -> None:
    write_index_file(tmp_path / "index", offset, size)
    with pytest.raises(DataError, match="lies outside the shard's 4096 bytes"):
        read_index(tmp_path / "index", 1, 1, 4096, None)


def test_index_of_another_size_magic_version_or_content(tmp_path: Path) -> None:
    path = tmp_path / "index"
    write_index_file(path, 512, 1, num_samples=2)
    with pytest.raises(DataError, match="should have 36 bytes but has more"):
        read_index(path, 1, 1, 4096, None)
    with pytest.raises(DataError, match="should have 60 bytes but has only 48"):
        read_index(path, 3, 1, 4096, None)
    with pytest.raises(DataError, match="index of 2 samples with 1 modalities; the manifest says 1 with 2"):
        read_index(path, 1, 2, 4096, None)
    with pytest.raises(DataError, match="sha256"):
        read_index(path, 2, 1, 4096, "0" * 64)
    flip_byte(path, 8)
    with pytest.raises(DataError, match="not a version 1 index"):
        read_index(path, 2, 1, 4096, None)


@given(content=st.binary(max_size=300))
def test_no_bytes_crash_the_decoders(content: bytes) -> None:
    for modality in (IMAGE, LABEL):
        for prefix in (b"", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00\x40\x00\x00\x00"):
            try:
                decode_member(prefix + content, modality)
            except DataError:
                continue


def test_npy_headers_of_versions_one_and_two() -> None:
    content = npy_bytes(image(0))
    assert parse_npy_header(content) == (np.dtype("<f4"), (2, 3), False, 128)
    length = len(content[10:128])
    version_2 = b"\x93NUMPY\x02\x00" + length.to_bytes(4, "little") + content[10:]
    assert parse_npy_header(version_2) == (np.dtype("<f4"), (2, 3), False, 130)
    with pytest.raises(DataError, match="version"):
        parse_npy_header(b"\x93NUMPY\x03\x00" + content[8:])


def test_index_that_joins_other_keys_is_not_trusted_blindly(example_manifest: MakeManifest) -> None:
    """The sha256 of the index is part of the manifest: swapping index files is found."""
    manifest = example_manifest()
    shards = list(manifest.shards)
    shards[0] = replace(shards[0], index=replace(shards[0].index, url=shards[1].index.url))
    swapped = Manifest.create(manifest.modalities, shards, {}, manifest.path)
    flip_byte(manifest.index_path(1), 30)
    with pytest.raises(DataError, match="index"):
        ShardReader(swapped, 0)

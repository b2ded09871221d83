"""Sources: values, splits, and what is said about malformed input."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jmvae_dist.data.sources import files
from jmvae_dist.data.sources.base import samples_for_shuffle, split_rows
from jmvae_dist.data.sources.digits import load_digits_source
from jmvae_dist.data.sources.mfeat import VIEWS, load_mfeat_source
from jmvae_dist.data.sources.mnist import load_mnist_source
from jmvae_dist.data.sources.npz import load_npz_source
from jmvae_dist.data.sources.splits import SplitChoice
from jmvae_dist.errors import ConfigError, DataError

# Splits


@pytest.mark.parametrize("classes", [None, np.repeat(np.arange(5), 20)])
def test_splits_partition_the_rows(classes: np.ndarray | None) -> None:
    train, test = (split_rows(100, split, 0.3, 7, classes) for split in ("train", "test"))
    assert sorted([*train, *test]) == list(range(100))
    assert len(test) == 30
    if classes is not None:
        assert np.bincount(classes[test]).tolist() == [6] * 5
    assert not np.array_equal(test, split_rows(100, "test", 0.3, 8, classes))


@pytest.mark.parametrize(
    ("num_samples", "expected"), [(1, 256), (2048, 256), (2049, 257), (2272, 284), (79_999, 10_000), (10**9, 10_000)]
)
def test_little_data_gets_several_shards(num_samples: int, expected: int) -> None:
    assert samples_for_shuffle(num_samples, 10_000) == expected


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_impossible_fractions(fraction: float) -> None:
    with pytest.raises(ConfigError, match="--test-fraction"):
        split_rows(10, "test", fraction, 0)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves the test split empty"):
        split_rows(10, "test", 0.01, 0)


# digits


def test_digits() -> None:
    from sklearn.datasets import load_digits

    train, test = (load_digits_source(split, 0.2, 0) for split in ("train", "test"))
    assert (len(train), len(test)) == (1438, 359)
    assert not set(train.rows) & set(test.rows)
    raw = load_digits()
    for index in (0, 100, 358):
        row = int(test.key(index).removeprefix("digits-test-"))
        sample = test.sample(index)
        assert np.array_equal(np.asarray(sample["image"])[0], raw.images[row])
        assert sample["label"] == raw.target[row]
    image, label = train.modalities
    assert (image.dtype, image.shape, image.scale, label.num_classes) == ("uint8", (1, 8, 8), 1 / 16, 10)


# IDX


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">{array.ndim + 1}I", 0x800 | array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


IMAGES = (np.arange(5 * 4 * 3) % 256).reshape(5, 4, 3)
LABELS = np.array([3, 1, 4, 1, 5])


@pytest.mark.parametrize("compress", [gzip.compress, bytes])
def test_idx_files(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    (tmp_path / "images").write_bytes(compress(idx(IMAGES)))
    (tmp_path / "labels").write_bytes(compress(idx(LABELS)))
    source = load_mnist_source(tmp_path / "images", tmp_path / "labels", "test")
    assert len(source) == 5
    assert source.modalities[0].shape == (1, 4, 3)
    assert np.array_equal(np.asarray(source.sample(2)["image"])[0], IMAGES[2])
    assert [source.sample(index)["label"] for index in range(5)] == LABELS.tolist()
    assert source.key(2) == "mnist-test-00000002"


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (idx(LABELS), idx(LABELS), "images: magic 0x00000801 is not 0x00000803.*exchanged"),
        (idx(IMAGES)[:-1], idx(LABELS), "images: 75 bytes, but its header .* means 76"),
        (idx(IMAGES) + b"x", idx(LABELS), "images: 77 bytes"),
        (idx(IMAGES), idx(LABELS[:4]), "5 images, but .* has 4 labels"),
        (idx(IMAGES), idx(LABELS + 5), "label 10 of row 4"),
        (b"", idx(LABELS), "images: magic 0x00000000"),
        (idx(IMAGES)[:7], idx(LABELS), "too few for an IDX header"),
        (struct.pack(">4I", 0x803, 2**32 - 1, 2**32 - 1, 2**32 - 1), idx(LABELS), "images: 16 bytes"),
        (idx(IMAGES[:0]), idx(LABELS[:0]), "holds no pixels"),
        (gzip.compress(idx(IMAGES), mtime=0)[:-9], idx(LABELS), "images: damaged gzip"),
    ],
)
def test_malformed_idx_files(tmp_path: Path, images: bytes, labels: bytes, message: str) -> None:
    (tmp_path / "images").write_bytes(images)
    (tmp_path / "labels").write_bytes(labels)
    with pytest.raises(DataError, match=message):
        load_mnist_source(tmp_path / "images", tmp_path / "labels", "train")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*images: No such file"):
        load_mnist_source(tmp_path / "images", tmp_path / "labels", "train")


def test_decompression_is_limited(tmp_path: Path) -> None:
    (tmp_path / "bomb").write_bytes(gzip.compress(bytes(10_000)))
    with pytest.raises(DataError, match="exceeds the limit of 9999 bytes"):
        files.read_plain_or_gzip(tmp_path / "bomb", limit_bytes=9999)


# Multiple Features


def write_mfeat(folder: Path, rows: int = 40) -> dict[str, np.ndarray]:
    """A small data set of the same format, sorted by class, one constant column in `mor`."""
    rng = np.random.default_rng(0)
    views = {}
    for number, view in enumerate(VIEWS):
        columns = number + 2
        features = rng.normal(size=(rows, columns)) * 10**number + 5
        features[:, -1] = 3.0 if view == "mor" else features[:, -1]
        labels = np.arange(rows) * 10 // rows
        lines = [",".join([*(str(column) for column in range(columns)), "0"])]
        lines += [",".join([*map(str, row), str(label)]) for row, label in zip(features, labels, strict=True)]
        content = ("\n".join(lines) + "\n").encode()
        suffix, packed = (".csv.gz", gzip.compress(content)) if number % 2 else (".csv", content)
        (folder / f"mfeat-{view}{suffix}").write_bytes(packed)
        views[view] = features.astype(np.float32)
    return views


def test_mfeat(tmp_path: Path) -> None:
    raw = write_mfeat(tmp_path)
    train, test = (load_mfeat_source(tmp_path, split, 0.25, 0) for split in ("train", "test"))
    assert [modality.name for modality in train.modalities] == [*VIEWS, "label"]
    assert (len(train), len(test)) == (30, 10)
    assert sorted(int(test.sample(index)["label"]) for index in range(10)) == list(range(10))
    assert train.modalities == test.modalities
    for modality in train.modalities[:-1]:
        stored = np.stack([np.asarray(train.sample(index)[modality.name]) for index in range(len(train))])
        assert np.array_equal(stored, raw[modality.name][train.rows])
        seen = modality.to_model(stored).astype(np.float64)
        assert np.allclose(seen.mean(axis=0), 0, atol=1e-5)
        varying = stored.std(axis=0) > 0
        assert np.allclose(seen.std(axis=0)[varying], 1, atol=1e-5)
        assert not seen[:, ~varying].any()
    assert load_mfeat_source(tmp_path, "train", 0.25, 0, with_label=False).modalities == train.modalities[:-1]


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (0, "1.5,2.5,3", r"fac\.csv: line 1 is not the expected header"),
        (7, "1.0,2.0,9", r"row 6: .*mfeat-fou\.csv\.gz says label 1, but .*mfeat-fac\.csv says 9"),
        (7, "1.0,2.0", r"fac\.csv: line 8 has 2 columns, the header has 3"),
        (7, "1.0,x,1", r"fac\.csv: line 8: could not convert"),
        (7, "1.0,nan,1", r"fac\.csv: line 8 holds a value that is not finite"),
        (7, "1.0,2.0,1.5", r"fac\.csv: line 8: label 1\.5 is not a digit"),
        (40, "", r"fac\.csv: line 41"),
    ],
)
def test_malformed_mfeat(tmp_path: Path, line: int, text: str, message: str) -> None:
    write_mfeat(tmp_path)
    path = tmp_path / "mfeat-fac.csv"
    lines = path.read_text().splitlines()
    lines[line] = text
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        load_mfeat_source(tmp_path, "train", 0.25, 0)


def test_mfeat_with_a_missing_view_or_row(tmp_path: Path) -> None:
    write_mfeat(tmp_path)
    path = tmp_path / "mfeat-kar.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match=r"mfeat-kar\.csv has 39 samples, but .*mfeat-fac\.csv has 40"):
        load_mfeat_source(tmp_path, "train", 0.25, 0)
    path.unlink()
    with pytest.raises(ConfigError, match=r"has neither mfeat-kar\.csv nor mfeat-kar\.csv\.gz"):
        load_mfeat_source(tmp_path, "train", 0.25, 0)


@pytest.mark.skipif("JMVAE_TEST_MFEAT" not in os.environ, reason="JMVAE_TEST_MFEAT names no folder with mfeat-*.csv")
def test_the_real_mfeat() -> None:
    source = load_mfeat_source(Path(os.environ["JMVAE_TEST_MFEAT"]), "train", 0.2, 0)
    assert len(source) == 1600
    assert [modality.shape[0] for modality in source.modalities] == [216, 76, 64, 6, 240, 47, 10]
    assert np.bincount([int(source.sample(index)["label"]) for index in range(1600)]).tolist() == [160] * 10


# npz


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    pixels = np.arange(24, dtype=np.uint8).reshape(6, 2, 2)
    big_endian = np.arange(6, dtype=">f8")
    np.savez(path, pixels=pixels, kind=np.array([2, 0, 1, 2, 0, 1], dtype=np.int16), scalar=big_endian)
    source, _ = load_npz_source(path, SplitChoice("train"), {"kind": None}, scales={"pixels": 1 / 255})
    pixel, kind, scalar = source.modalities
    assert (pixel.dtype, pixel.shape, pixel.scale) == ("uint8", (2, 2), 1 / 255)
    assert (kind.encoding, kind.num_classes) == ("cls", 3)
    assert (scalar.dtype, scalar.shape) == ("float64", (1,))
    assert len(source) == 6
    assert np.array_equal(source.sample(4)["pixels"], pixels[4])
    assert source.sample(3)["kind"] == 2
    assert np.asarray(source.sample(5)["scalar"]).dtype.str == "<f8"
    assert len(load_npz_source(path, SplitChoice("test", 0.5))[0]) == 3


@pytest.mark.parametrize(
    ("arrays", "options", "error", "message"),
    [
        ({"a": np.zeros((3, 2)), "b": np.zeros((4, 2))}, {}, DataError, "same first dimension, but have a: 3, b: 4"),
        ({"a": np.array([object()])}, {}, DataError, "cannot be read as .npz: Object arrays"),
        ({"a": np.array(["x"])}, {}, DataError, "array 'a' has dtype <U1"),
        ({"a": np.array([[1.0], [np.nan]])}, {}, DataError, "array 'a': row 1 is not finite"),
        ({"a.b": np.zeros((3, 2))}, {}, DataError, "array 'a.b': name"),
        ({"a": np.zeros((0, 2))}, {}, DataError, "empty"),
        ({"a": np.float64(3)}, {}, DataError, "same first dimension, but have a: None"),
        ({}, {}, DataError, "holds no arrays"),
        ({"a": np.zeros(3)}, {"class_modalities": {"a": None}}, DataError, "must be a one-dimensional integer array"),
        ({"a": np.array([0, -1])}, {"class_modalities": {"a": None}}, DataError, "row 1 is negative"),
        ({"a.b": np.array([0, 1])}, {"class_modalities": {"a.b": None}}, DataError, "array 'a.b': name"),
        (
            {"a": np.array([0, 2_000_000])},
            {"class_modalities": {"a": None}},
            DataError,
            "row 1 is 2000000, not below the limit of 1000000 classes",
        ),
        (
            {"a": np.array([0, 2**64 - 1], dtype=np.uint64)},
            {"class_modalities": {"a": None}},
            DataError,
            "row 1 is 18446744073709551615, not below",
        ),
        (
            {"a": np.array([0, 3])},
            {"class_modalities": {"a": 3}},
            DataError,
            "row 1 is 3, not below the 3 classes given",
        ),
        ({"a": np.array([0, 3])}, {"class_modalities": {"a": 10**7}}, DataError, "num_classes 10000000 must be"),
        ({"a": np.zeros(3)}, {"class_modalities": {"b": None}}, ConfigError, "no array 'b'; it has a"),
        ({"a": np.zeros(3)}, {"scales": {"b": 2.0}}, ConfigError, "no array 'b'"),
        ({"a": np.zeros(3)}, {"scales": {"a": 0.0}}, DataError, "scale must not be 0"),
    ],
)
def test_unsuitable_npz(tmp_path: Path, arrays: dict, options: dict, error: type[Exception], message: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(error, match=message):
        load_npz_source(tmp_path / "data.npz", SplitChoice("train"), **options)


def test_files_of_one_data_set_agree_on_the_number_of_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "test.npz", kind=np.arange(5))
    source, _ = load_npz_source(tmp_path / "test.npz", SplitChoice("test"), {"kind": 10})
    assert source.modalities[0].num_classes == 10


def test_files_that_are_not_npz(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    with pytest.raises(ConfigError, match="cannot read"):
        load_npz_source(path, SplitChoice("train"))
    for content in (b"", b"PK\x03\x04garbage", b"text"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as"):
            load_npz_source(path, SplitChoice("train"))
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="a single array"):
        load_npz_source(path, SplitChoice("train"))


def _npy_of_shape(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("readme.txt", b"hello", "'readme.txt' is not an array"),
        ("image.npy", _npy_of_shape((10**14,)), "too large for the memory"),
        ("image.npy", _npy_of_shape((10**30,)), "cannot be read as"),
        ("image.npy", _npy_of_shape((10,)), "cannot be read as"),
    ],
)
def test_npz_members_that_are_not_arrays(tmp_path: Path, member: str, content: bytes, message: str) -> None:
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    with pytest.raises(DataError, match=message):
        load_npz_source(path, SplitChoice("train"))


def test_npz_that_is_encrypted_or_of_unknown_compression(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, image=np.zeros((3, 2)))
    archive = path.read_bytes()
    local, central = archive.index(b"PK\x03\x04"), archive.index(b"PK\x01\x02")
    for place_in_local, place_in_central, value in ((6, 8, 1), (8, 10, 99)):  # flags, method
        changed = bytearray(archive)
        changed[local + place_in_local] = changed[central + place_in_central] = value
        path.write_bytes(changed)
        with pytest.raises(DataError, match="cannot be read as"):
            load_npz_source(path, SplitChoice("train"))


@pytest.mark.parametrize("compressed", [False, True])
def test_reading_reserves_no_more_memory_than_the_content_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    """A single read with the limit of 16 GiB fails where memory is limited, however small the file."""
    path = tmp_path / "file"
    content = np.random.default_rng(0).bytes(100_000)
    path.write_bytes(gzip.compress(content) if compressed else content)
    monkeypatch.setattr(files, "_CHUNK_BYTES", 7_000)
    tracemalloc.start()
    try:
        assert files.read_plain_or_gzip(path) == content
        assert tracemalloc.get_traced_memory()[1] < 10 * len(content)
    finally:
        tracemalloc.stop()

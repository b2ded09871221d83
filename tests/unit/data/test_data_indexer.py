"""Indexing tars of others: every sample once, in order, whatever wrote it; and nothing odd unsaid."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_examples import npy_bytes
from hypothesis import given
from hypothesis import strategies as st

from jmvae_dist.commands.shards import main
from jmvae_dist.data.indexing import build
from jmvae_dist.data.indexing.build import Indexed, index_shards, infer_from
from jmvae_dist.data.indexing.grouping import split_name
from jmvae_dist.data.indexing.inspection import ModalityRequest
from jmvae_dist.data.indexing.shard_lists import expand_shards
from jmvae_dist.data.indexing.shard_scan import scan_shard
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.reader import ShardReader
from jmvae_dist.data.sample_names import describe_sample
from jmvae_dist.data.verify import verify_shards
from jmvae_dist.errors import ConfigError, DataError

Samples = list[dict[str, Any]]
IMAGE_AND_LABEL = [ModalityRequest("image", ("image.npy",), "npy"), ModalityRequest("label", ("cls",), "cls")]


def example(number: int) -> dict[str, Any]:
    """Values that tell their sample."""
    return {"image.npy": np.full((2, 3), number, np.int16), "cls": number % 7}


def members_of(numbers: Iterable[int], folder: str = "") -> dict[str, bytes]:
    members = {}
    for number in numbers:
        sample = example(number)
        members[f"{folder}{number:04d}.image.npy"] = npy_bytes(sample["image.npy"])
        members[f"{folder}{number:04d}.cls"] = str(sample["cls"]).encode()
    return members


def write_tar(
    path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def index(shards: Iterable[Path], out: Path, **options: Any) -> Indexed:
    requests = options.pop("requests", IMAGE_AND_LABEL)
    return index_shards([str(shard) for shard in shards], out, requests, **options)


def read_numbers(manifest: Manifest) -> list[int]:
    """The samples in stored order, after checking that image and label are of the same one."""
    numbers = []
    for shard_number, size in enumerate(manifest.shard_sizes):
        reader = ShardReader(manifest, shard_number)
        image, label = (reader.read(range(size), name) for name in ("image", "label"))
        of_image = image.reshape(size, -1)[:, 0].astype(int)
        assert (image == of_image[:, None, None]).all()
        assert label.argmax(axis=1).tolist() == (of_image % 7).tolist()
        numbers += of_image.tolist()
        reader.close()
    return numbers


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Three tars of uneven size, in a folder that cannot be written to."""
    folder = tmp_path / "tars"
    folder.mkdir()
    numbers = iter(range(20))
    paths = [write_tar(folder / f"s-{n}.tar", members_of([next(numbers) for _ in range(5 + n)])) for n in range(3)]
    folder.chmod(0o555)
    return paths


def test_all_samples_in_order(shards: list[Path], tmp_path: Path) -> None:
    result = index(shards, tmp_path / "out" / "manifest.json")
    manifest = Manifest.load(tmp_path / "out" / "manifest.json")
    assert result == Indexed(manifest, True, [])
    assert read_numbers(manifest) == list(range(18))
    assert manifest.shard_sizes == (5, 6, 7)
    assert verify_shards(manifest) == []
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["manifest.json", f"manifest.json.indexes-{manifest.fingerprint[:16]}"]
    assert index(shards, tmp_path / "out" / "manifest.json", workers=2) == Indexed(manifest, False, [])


@pytest.mark.parametrize("writer", ["webdataset", "tar", "tar --sort=name", "tar --format=pax"])
def test_what_others_write(tmp_path: Path, writer: str) -> None:
    """The same values as plain webdataset reads, for whatever packed the samples."""
    import webdataset

    (tmp_path / "tars").mkdir()
    for shard in range(2):
        path = tmp_path / "tars" / f"train-{shard:03d}.tar"
        if writer == "webdataset":
            with webdataset.TarWriter(str(path)) as tar:
                for number in range(shard * 9, shard * 9 + 9):
                    tar.write({"__key__": f"train/{number:04d}", **example(number)})
            continue
        folder = tmp_path / f"in-{shard}"
        for name, content in members_of(range(shard * 9, shard * 9 + 9), "train/").items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        subprocess.run([*writer.split(), "-cf", str(path), "-C", str(folder), "."], check=True)
    out = tmp_path / "manifest.json"
    assert main(["index", str(tmp_path / "tars"), "--out", str(out), "--workers", "1"]) == 0
    manifest = Manifest.load(out)
    assert [(modality.name, modality.num_classes) for modality in manifest.modalities if modality.num_classes] == [
        ("label", 7)
    ]
    numbers = read_numbers(manifest)
    assert sorted(numbers) == list(range(18))
    if writer in ("webdataset", "tar --sort=name"):
        urls = [str(manifest.shard_path(shard)) for shard in range(2)]
        plain = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode()
        assert [int(sample["image.npy"][0, 0]) for sample in plain] == numbers
    assert main(["verify", str(out)]) == 0
    assert main(["show", str(out)]) == 0


def test_members_that_are_not_adjacent(tmp_path: Path) -> None:
    """One folder per modality, packed one after the other; samples keep the order in which they begin."""
    members = list(members_of([3, 1, 2]).items())
    path = write_tar(tmp_path / "s.tar", members[0::2] + members[5::-2])
    result = index([path], tmp_path / "m.json")
    assert read_numbers(result.manifest) == [3, 1, 2]
    assert result.notes == [
        f"samples whose members are not adjacent: 2, first {path}: 0003; plain webdataset would take each part for a "
        "sample"
    ]
    assert verify_shards(result.manifest) == []


@given(st.lists(st.sampled_from(["a", "B", ".", "/", "__", "é", "-"]), max_size=12).map("".join))
def test_keys_and_extensions_are_webdatasets(path: str) -> None:
    from webdataset.tariterators import base_plus_ext

    hidden = path.rpartition("/")[2].startswith(".")
    if hidden or path.startswith("__"):
        return  # hidden files of a folder would become a sample of it; __meta__ is left out by another stage
    key, extension = base_plus_ext(path)
    found = split_name(path)
    assert (None if found is None else tuple(found)) == (None if key is None else (key, extension.lower()))


def test_what_belongs_to_no_sample() -> None:
    for name in ("__meta__/0001.txt", "__index__", "a/.hidden", ".hidden.txt", "README", "folder.d/README"):
        assert split_name(name) is None
    assert split_name("a.b/C.tar.GZ") == ("a.b/C", "tar.gz")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["txt", "cls", "TXT", "md"])), max_size=9))
def test_any_order_of_members(members: list[tuple[str, str]]) -> None:
    """Against a plain model: samples in the order in which they begin, each with its own members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number, (key, extension) in enumerate(members):
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = number
            tar.addfile(info, io.BytesIO(b"1" * number))
    model: dict[str, dict[str, int]] = {}
    repeated = False
    for number, (key, extension) in enumerate(members):
        if extension != "md":
            sample = model.setdefault(key, {})
            repeated |= extension.lower() in sample
            sample[extension.lower()] = number
    requests = [ModalityRequest("text", ("txt",), "text"), ModalityRequest("label", ("cls",), "cls")]
    file.seek(0)
    if repeated:
        with pytest.raises(DataError, match="second one of sample"):
            scan_shard(file, "s.tar", requests, inspect=False)
        return
    scan = scan_shard(file, "s.tar", requests, inspect=False)
    assert scan.keys == list(model)
    found = [
        {
            name: int(size)
            for name, offset, size in zip(("txt", "cls"), row["offset"], row["size"], strict=True)
            if offset
        }
        for row in scan.records
    ]
    assert found == list(model.values())
    assert scan.findings.incomplete.count == sum(len(sample) < 2 for sample in model.values())


def test_incomplete_samples(tmp_path: Path) -> None:
    members = members_of(range(6))
    del members["0002.cls"]
    members["0004.image.npy"] = b"damaged"
    members["0005.json"] = b"{}"
    path = write_tar(tmp_path / "s.tar", members)
    message = (
        rf"2 samples lack a modality \(image: 1, label: 1, 1 of them unreadable \({path}: 0004.image.npy: not a "
        rf"valid npy.*\); first {path}: 0002 lacks label\).*--incomplete skip"
    )
    with pytest.raises(DataError, match=message):
        index([path], tmp_path / "m.json")
    assert not (tmp_path / "m.json").exists()
    skipped = index([path], tmp_path / "skip.json", incomplete="skip")
    assert read_numbers(skipped.manifest) == [0, 1, 3, 5]
    assert any("incomplete samples, left out: 2" in note for note in skipped.notes)
    assert any("members not used: 1 with extension json" in note for note in skipped.notes)
    kept = index([path], tmp_path / "keep.json", incomplete="keep")
    assert kept.manifest.num_samples == 6
    with pytest.raises(DataError, match=r"key '0002'.*no member 'cls'"):
        ShardReader(kept.manifest, 0).read([2], "label")
    assert verify_shards(kept.manifest) == verify_shards(skipped.manifest) == []
    assert kept.manifest.fingerprint != skipped.manifest.fingerprint


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*members_of([1]).items(), *members_of([1]).items()], "second one of sample '0001' for one modality"),
        ([("1.image.npy", npy_bytes(np.zeros(2))), ("1.cls", b"0"), ("1.CLS", b"0")], "second one of sample '1'"),
        (
            [("1.cls", b"0"), ("1.image.npy", npy_bytes(np.array([{}], object)))],
            r"no readable member with extension image\.npy .*never loaded",
        ),
        ([("1.image.npy", npy_bytes(np.zeros(2)))], "no member with extension cls"),
        ([("1.txt", b"0")], r"no member with extension image\.npy in the shards; there are txt"),
        ([("1.image.npy", npy_bytes(np.zeros(2))), ("1.cls", b"-1")], "'-1' is not a class index"),
        ([("1.image.npy", npy_bytes(np.zeros(2))), ("1.cls", b"0" * 25)], "25 bytes, more than the limit of 24"),
    ],
)
def test_what_is_refused(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    path = write_tar(tmp_path / "s.tar", members)
    with pytest.raises(DataError, match=message):
        index([path], tmp_path / "m.json")
    assert not (tmp_path / "m.json").exists()


def test_arrays_of_different_shapes(tmp_path: Path) -> None:
    members = {**members_of([1, 2]), "3.image.npy": npy_bytes(np.zeros((2, 4), np.int16)), "3.cls": b"1"}
    path = write_tar(tmp_path / "s.tar", members)
    with pytest.raises(ConfigError) as caught:
        index([path], tmp_path / "m.json")
    assert str(caught.value) == (
        "modality 'image': all samples need one dtype and shape, but there are int16 [2, 3] (2, first "
        f"{path}: 0001.image.npy); int16 [2, 4] (1, first {path}: 3.image.npy)"
    )


def test_all_damaged_shards_are_named(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{n}.tar", members_of([n])) for n in range(5)]
    for damaged in (1, 3):
        paths[damaged].write_bytes(paths[damaged].read_bytes()[:1024])
    with pytest.raises(DataError) as caught:
        index(paths, tmp_path / "m.json")
    assert str(caught.value).splitlines()[0] == "2 shards cannot be used:"
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        str(paths[1]),
        str(paths[3]),
    ]


def test_only_what_has_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure the shards that were read are not read again, unless they or the work folder changed."""
    paths = [write_tar(tmp_path / f"{n}.tar", members_of([n, n + 10])) for n in range(4)]
    good = paths[3].read_bytes()
    paths[3].write_bytes(good[:600])
    with pytest.raises(DataError, match="cut off"):
        index(paths, tmp_path / "m.json")
    paths[3].write_bytes(good)
    write_tar(paths[1], members_of([1, 11, 21]))
    next((tmp_path / ".m.json.indexing").glob("*.data")).write_bytes(b"damaged")
    read: list[str] = []
    scan = build.scan_shard
    monkeypatch.setattr(build, "scan_shard", lambda file, path, *rest: read.append(path) or scan(file, path, *rest))
    result = index(paths, tmp_path / "m.json")
    assert read_numbers(result.manifest) == [0, 10, 1, 11, 21, 2, 12, 3, 13]
    assert {str(paths[1]), str(paths[3])} <= set(read)
    assert 2 <= len(read) <= 3
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".tar") == [
        "m.json",
        f"m.json.indexes-{result.manifest.fingerprint[:16]}",
    ]


@pytest.mark.parametrize("text", [b"", b"5", b"[]", b"x" * 64 + b"\n{}", b"[" * 100_000])
def test_damaged_notes_of_an_interrupted_run_are_not_used(tmp_path: Path, text: bytes) -> None:
    paths = [write_tar(tmp_path / f"{n}.tar", members_of([n])) for n in range(2)]
    good = paths[1].read_bytes()
    paths[1].write_bytes(good[:600])
    with pytest.raises(DataError, match="cut off"):
        index(paths, tmp_path / "m.json")
    paths[1].write_bytes(good)
    (notes,) = (tmp_path / ".m.json.indexing").glob("*.json")
    # As if the disk had damaged it: JSON all the same, but with other types and numbers.
    notes.write_bytes(text or notes.read_bytes().replace(b'"num_samples": 1', b'"num_samples": []'))
    assert read_numbers(index(paths, tmp_path / "m.json").manifest) == [0, 1]


def test_killed_at_any_time(tmp_path: Path) -> None:
    """Nothing that looks complete is left, and the next process goes on."""
    for n in range(30):
        write_tar(tmp_path / f"{n}.tar", members_of(range(n * 50, n * 50 + 50)))
    out = tmp_path / "out" / "m.json"
    command = [
        sys.executable,
        "-m",
        "jmvae_dist",
        "shards",
        "index",
        str(tmp_path),
        "--out",
        str(out),
        "--workers",
        "1",
    ]
    for num_shards in (2, 12):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 60
        while process.poll() is None and len(list(out.parent.glob(".m.json.indexing/*.json"))) < num_shards:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the process finished too early to be killed"
        assert not out.exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert read_numbers(Manifest.load(out)) == list(range(1500))
    assert len(list(out.parent.iterdir())) == 2


def test_order_and_places(tmp_path: Path) -> None:
    """The order is part of the fingerprint; shards below the manifest move with it."""
    paths = [write_tar(tmp_path / f"{n}.tar", members_of([n])) for n in range(2)]
    forward = index(paths, tmp_path / "a.json").manifest
    backward = index(paths[::-1], tmp_path / "b.json").manifest
    assert read_numbers(backward) == [1, 0]
    assert forward.fingerprint != backward.fingerprint
    assert [shard.url for shard in forward.shards] == ["0.tar", "1.tar"]
    (tmp_path / "elsewhere").mkdir()
    away = index(paths, tmp_path / "elsewhere" / "a.json").manifest
    assert [shard.url for shard in away.shards] == [str(path) for path in paths]
    assert away.fingerprint == forward.fingerprint


def test_other_data_is_replaced_only_on_demand(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{n}.tar", members_of([n])) for n in range(2)]
    first = index(paths[:1], tmp_path / "m.json").manifest
    with pytest.raises(ConfigError, match=r"describes other data.*--overwrite"):
        index(paths, tmp_path / "m.json")
    assert read_numbers(Manifest.load(tmp_path / "m.json")) == [0]
    second = index(paths, tmp_path / "m.json", overwrite=True).manifest
    assert read_numbers(Manifest.load(tmp_path / "m.json")) == [0, 1]
    folders = {path.name for path in tmp_path.glob("m.json.indexes-*")}
    assert folders == {f"m.json.indexes-{second.fingerprint[:16]}"}
    assert first.fingerprint != second.fingerprint


def test_notes_on_shards(tmp_path: Path) -> None:
    import webdataset

    paths = [write_tar(tmp_path / f"{n}.tar", members_of(range(3 * n, 4 * n))) for n in (1, 9)]
    paths.append(write_tar(tmp_path / "empty.tar", {}))
    with webdataset.TarWriter(str(tmp_path / "pax.tar")) as tar:
        tar.write({"__key__": "0003", **example(3)})
    notes = "\n".join(index([*paths, tmp_path / "pax.tar"], tmp_path / "m.json").notes)
    for part in (
        f"shards without samples, left out: 1, first {tmp_path}/empty.tar",
        "shards have 0 to 9 samples",
        "PAX headers and long names take",
        f"keys that are in several shards: 1, first in {paths[0]} and {tmp_path}/pax.tar",
    ):
        assert part in notes


def test_inference(tmp_path: Path) -> None:
    members = {}
    for number in range(3):
        members |= {f"{number}.{'png' if number else 'jpg'}": b"", f"{number}.mask.png": b"", f"{number}.txt": b""}
        members |= {f"{number}.text.npy": b"", f"{number}.json": b"", f"{number}.cls": b""}
    del members["2.cls"]
    members["README.md"] = b""
    path = write_tar(tmp_path / "s.tar", {**members, "__meta__/x.cls": b""})
    # Two of three samples have a label, which is reported rather than left out in silence.
    assert [(request.name, request.extensions, request.encoding) for request in infer_from(str(path))] == [
        ("image", ("jpg", "png"), "image"),
        ("mask", ("mask.png",), "image"),
        ("txt", ("txt",), "text"),
        ("text", ("text.npy",), "npy"),
        ("label", ("cls",), "cls"),
    ]


def test_shard_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("s-10.tar", "s-9.tar", "x.tar", "odd-{1}.tar"):
        (tmp_path / name).touch()
    assert expand_shards([str(tmp_path)]) == [
        str(tmp_path / n) for n in ("odd-{1}.tar", "s-9.tar", "s-10.tar", "x.tar")
    ]
    assert expand_shards(["s-*.tar", "x.tar"]) == ["s-9.tar", "s-10.tar", "x.tar"]
    assert expand_shards(["s-{10..9}.tar"]) == ["s-10.tar", "s-9.tar"]
    assert expand_shards(["odd-{1}.tar"]) == ["odd-{1}.tar"]
    assert expand_shards(["https://h/s-{00..02}.tar"]) == [f"https://h/s-0{n}.tar" for n in range(3)]
    for arguments, message in (
        (["nothing-*.tar"], "no file matches"),
        (["x.tar", "./x.tar"], "is given twice"),
        (["s-{0..999999999}.tar"], "more than 1,000,000 shards"),
        (["{0..9999}{0..9999}.tar"], "more than 1,000,000 shards"),
        (["s-{1..2.tar"], "Unbalanced braces"),
        ([], "no shards given"),
    ):
        with pytest.raises(ConfigError, match=message):
            expand_shards(arguments)
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"no \*\.tar file in folder"):
        expand_shards(["none"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modality", "image"], "NAME=EXTENSION"),
        (["--modality", "x=bin"], "which encoding"),
        (["--modality", "x=cls", "--modality", "x=npy"], "names a modality twice"),
        (["--modality", "x=cls", "--classes", "y=3"], "there is no modality 'y'"),
        (["--modality", "x=cls", "--text-length", "x=3"], "does not apply to 'x'"),
        (["--modality", "x=jpg", "--image-mode", "x=cmyk"], "one of gray, rgb"),
        (["--modality", "1x=cls"], "name '1x' must be a letter"),
        (["--modality", "x=cls", "--modality", "X=image.npy"], "two modalities have the same name"),
        (["--modality", "x=cls", "--modality", "y=cls"], "modalities 'x' and 'y' are both the member 'cls'"),
        (["--modality", "x=a/b.cls"], "must be file extensions"),
        (["--modality", "x=cls", "--classes", "x=2"], "class index 2 is not below 2"),
    ],
)
def test_usage_mistakes(tmp_path: Path, options: list[str], message: str) -> None:
    write_tar(tmp_path / "s.tar", members_of(range(3)))
    with pytest.raises((ConfigError, DataError)) as caught:
        main(["index", str(tmp_path / "s.tar"), "--out", str(tmp_path / "m.json"), *options])
    assert message in str(caught.value)


def test_missing_shards_and_places(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", members_of([1]))
    with pytest.raises(ConfigError, match=r"none\.tar: cannot read shard: No such file"):
        index([tmp_path / "none.tar"], tmp_path / "m.json")
    with pytest.raises(ConfigError, match="must name the manifest to write"):
        index([shard], tmp_path)
    (tmp_path / "m.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"not a sound manifest.*--overwrite"):
        index([shard], tmp_path / "m.json")
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(DataError, match="not a regular file"):
        index([tmp_path / "pipe.tar"], tmp_path / "n.json")


def test_documents_and_pictures(tmp_path: Path) -> None:
    """Facts that need all samples: sizes, modes, longest text, fields of one JSON member."""
    image = pytest.importorskip("PIL.Image")
    members = {}
    for number in range(3):
        for name, mode, size in (("fixed.png", "L", (4, 6)), ("jpg", "RGB" if number else "L", (8, 8 + number))):
            file = io.BytesIO()
            image.new(mode, size).save(file, "PNG" if name.endswith("png") else "JPEG")
            members[f"{number}.{name}"] = file.getvalue()
        members[f"{number}.txt"] = ("ü" * number).encode()
        members[f"{number}.json"] = b'{"box": [1, 2.5, %d], "age": {"years": %d}}' % (number, number)
    path = write_tar(tmp_path / "s.tar", members)
    modalities = [
        f"--modality={pair}" for pair in ("mask=fixed.png", "photo=jpg", "text=txt", "box=json", "age=json")
    ]
    options = ["--json-field", "box=box", "--json-field", "age=age.years", "--scale", "photo=1", "--offset", "age=5"]
    out = tmp_path / "m.json"
    assert main(["index", str(path), "--out", str(out), *modalities, *options]) == 0
    mask, photo, text, box, age = Manifest.load(out).modalities
    assert (mask.shape, mask.extensions, mask.scale) == ((1, 6, 4), ("fixed.png",), 1 / 255)
    assert (photo.shape, photo.scale) == ((3, None, None), 1)
    assert (text.length, text.shape) == (4, (4, 257))
    assert (box.dtype, box.shape, box.field) == ("float32", (3,), "box")
    assert (age.dtype, age.shape, age.field, age.offset) == ("int64", (), "age.years", 5)
    assert main(["verify", str(out)]) == 0
    assert main(["index", str(path), "--out", str(tmp_path / "gray.json"), "--image-mode", "image=gray"]) == 0
    gray = Manifest.load(tmp_path / "gray.json")
    assert {modality.name: modality.shape for modality in gray.modalities}["image"] == (1, None, None)


def test_long_texts_need_a_length(tmp_path: Path) -> None:
    """A default would make vectors of any size, or cut texts unasked."""
    path = write_tar(tmp_path / "s.tar", {"1.txt": b"x" * 600, "2.txt": b"y"})
    with pytest.raises(
        ConfigError, match=r"longest text has 600 bytes \(.*s\.tar: 1\.txt\); give --text-length text="
    ):
        main(["index", str(path), "--out", str(tmp_path / "m.json")])
    assert main(["index", str(path), "--out", str(tmp_path / "m.json"), "--text-length", "text=16"]) == 0
    assert Manifest.load(tmp_path / "m.json").modalities[0].length == 16


def test_keys_are_never_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither is anything of a tar written elsewhere, nor does a name in it reach the terminal as it is."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    members = {**members_of([1], "../../"), **members_of([2], "/tmp/absolute/"), "\u202e\x9b1m.evil\u202e": b""}
    path = write_tar(folder / "s.tar", members, tarfile.PAX_FORMAT)
    with pytest.raises(DataError, match="without control characters"):
        index([path], folder / "m.json")
    members["\u202e.evil\u202e"] = members.popitem()[1]
    write_tar(path, members, tarfile.PAX_FORMAT)
    assert main(["index", str(path), "--out", str(folder / "m.json")]) == 0
    assert read_numbers(Manifest.load(folder / "m.json")) == [1, 2]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a"]
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir()) == ["b"]
    shown = capsys.readouterr().out
    assert "with extension evil\\u202e" in shown
    assert all(char.isprintable() or char == "\n" for char in shown)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_messages_name_keys_that_only_an_extended_header_holds(tmp_path: Path, format: int) -> None:
    folder = f"{'folder/' * 20}schl\u00fcssel-"
    members = members_of(range(3), folder)
    members[f"{folder}0001.image.npy"] = npy_bytes(np.full((2, 3), 7, np.int16)).replace(b"descr", b"discr")
    path = write_tar(tmp_path / "s.tar", members, format)
    manifest = index([path], tmp_path / "m.json", incomplete="keep").manifest
    key = f"key '{folder}0001'"
    with pytest.raises(DataError, match=f"sample 1 .{key}.*no member"):
        ShardReader(manifest, 0).read([0, 1], "image")
    assert key in describe_sample(manifest, 0, 1, "image")


def test_a_sample_without_any_member_has_no_key(tmp_path: Path) -> None:
    """Not that of the first sample."""
    path = write_tar(tmp_path / "s.tar", members_of(range(3)))
    manifest = index([path], tmp_path / "m.json").manifest
    content = bytearray(manifest.index_path(0).read_bytes())
    content[24 + 24 : 24 + 48] = bytes(24)
    manifest.index_path(0).write_bytes(content)
    assert "key '0000'" in describe_sample(manifest, 0, 0, "image")
    assert "key 'unknown'" in describe_sample(manifest, 0, 1, "image")


def test_extensions_without_end(tmp_path: Path) -> None:
    """Neither memory nor the report grow with what a tar invents."""
    members = {**members_of([1]), **{f"{n}.e{n}": b"" for n in range(300)}}
    notes = index([write_tar(tmp_path / "s.tar", members)], tmp_path / "m.json").notes
    assert len(notes) == 21
    assert notes[0] == "members not used: 200 with extension (others)"
    assert notes[-1] == "members not used: 81 with further extensions"

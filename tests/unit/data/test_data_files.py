"""`shards write folder` and `csv`: every file and row as it is, under its own sample, or an error that names it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_examples import npy_bytes

from jmvae_dist.commands.options import num_bytes
from jmvae_dist.commands.shards import main
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.sources.folder import load_folder_source
from jmvae_dist.data.sources.splits import SplitChoice
from jmvae_dist.data.verify import verify_shards
from jmvae_dist.errors import ConfigError, DataError

IS_SPLIT = ["--split", "train", "--folder-is-split"]


def picture(number: int, size: tuple[int, int] = (4, 3), format: str = "PNG") -> bytes:
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.new("RGB", size, (number, 2 * number, 7)).save(file, format)
    return file.getvalue()


def members_of(out: Path) -> dict[str, bytes]:
    manifest = Manifest.load(out / "manifest.json")
    members = {}
    for number in range(len(manifest.shards)):
        with tarfile.open(manifest.shard_path(number), "r:") as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                members[info.name] = file.read()
    return members


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Twelve samples in two folders: pictures, and texts with arrays and classes beside them."""
    root = tmp_path / "raw"
    for folder in ("pictures", "notes"):
        (root / folder).mkdir(parents=True)
    for number in range(12):
        (root / "pictures" / f"{number:04d}.png").write_bytes(picture(number))
        (root / "notes" / f"{number:04d}.txt").write_text(f"Nr. {number} ü", encoding="utf-8")
        (root / "notes" / f"{number:04d}.npy").write_bytes(npy_bytes(np.arange(3, dtype=np.float32) + number))
        (root / "notes" / f"{number:04d}.cls").write_text(f"{number % 3}\n")
    return root


MODALITIES = ["--modality=image=pictures/*.png", "--modality=caption=notes/*.txt"]
MODALITIES += ["--modality=values=notes/*.npy", "--modality=kind=notes/*.cls"]


def test_folder(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All files byte for byte under the name of their sample; plain webdataset reads and decodes them."""
    import webdataset

    out = tmp_path / "out"
    command = ["write", "folder", "--root", str(pairs), "--out", str(out), *MODALITIES]
    assert main([*command, *IS_SPLIT, "--samples-per-shard", "5"]) == 0
    members = members_of(out)
    assert len(members) == 48
    for number in range(12):
        assert members[f"{number:04d}.image.png"] == (pairs / f"pictures/{number:04d}.png").read_bytes()
        assert members[f"{number:04d}.caption.txt"] == f"Nr. {number} ü".encode()
        assert members[f"{number:04d}.values.npy"] == (pairs / f"notes/{number:04d}.npy").read_bytes()
        assert members[f"{number:04d}.kind.cls"] == b"%d" % (number % 3)
    manifest = Manifest.load(out / "manifest.json")
    assert manifest.shard_sizes == (4, 4, 4)
    image, caption, values, kind = manifest.modalities
    assert (image.shape, image.scale, image.extensions) == ((3, 3, 4), 1 / 255, ("image.png",))
    assert (caption.length, values.shape, kind.num_classes) == (9, (3,), 3)
    assert verify_shards(manifest) == []
    urls = [str(manifest.shard_path(number)) for number in range(3)]
    numbers = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"):
        number = int(sample["__key__"])
        assert sample["image.png"][0, 0].tolist() == [number, 2 * number, 7]
        assert sample["kind.cls"] == number % 3
        numbers.append(number)
    assert sorted(numbers) == list(range(12)) != numbers
    capsys.readouterr()
    assert main([*command, *IS_SPLIT, "--samples-per-shard", "5"]) == 0
    assert "already there, unchanged" in capsys.readouterr().out


def test_folder_splits(pairs: Path, tmp_path: Path) -> None:
    """Both splits together are everything, and agree on what is derived from all samples."""
    keys, modalities = {}, {}
    for split in ("train", "test"):
        options = ["--out", str(tmp_path / split), "--split", split, "--test-fraction", "0.25"]
        assert main(["write", "folder", "--root", str(pairs), *MODALITIES, *options]) == 0
        keys[split] = {name.split(".")[0] for name in members_of(tmp_path / split)}
        modalities[split] = Manifest.load(tmp_path / split / "manifest.json").modalities
    assert len(keys["test"]) == 3
    assert keys["train"] | keys["test"] == {f"{number:04d}" for number in range(12)}
    assert not keys["train"] & keys["test"]
    assert modalities["train"] == modalities["test"]


def test_target_size_in_bytes(pairs: Path, tmp_path: Path) -> None:
    """A sample takes four headers and four blocks of content: 4 KiB."""
    options = ["--out", str(tmp_path / "out"), *IS_SPLIT, "--bytes-per-shard", "16KiB"]
    assert main(["write", "folder", "--root", str(pairs), *MODALITIES, *options]) == 0
    assert Manifest.load(tmp_path / "out" / "manifest.json").shard_sizes == (4, 4, 4)
    with pytest.raises(ConfigError, match="exclude each other"):
        main(
            [
                "write",
                "folder",
                "--root",
                str(pairs),
                *MODALITIES,
                *options,
                "--samples-per-shard",
                "3",
                "--overwrite",
            ]
        )
    assert [num_bytes(text) for text in ("5", "1kB", "1.5 MiB", "2G")] == [5, 1000, 3 * 2**19, 2 * 10**9]


def test_pairs_in_folders_with_names_that_are_no_keys(tmp_path: Path) -> None:
    """Samples get numbers then; pictures keep their format and their size."""
    for number, name in enumerate(["a/x.1", "b/x.1", "c"]):
        path = tmp_path / "raw" / f"{name}.{'jpg' if number else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, (4 + number, 3), "JPEG" if number else "PNG"))
        path.with_name(f"{path.name.removesuffix(path.suffix)}.txt").write_text(name)
    (tmp_path / "raw" / ".hidden.png").write_bytes(b"")
    patterns = ["--modality=image=**/*.{jpg,png}", "--modality=text=**/*.txt"]
    options = ["--root", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), *IS_SPLIT]
    assert main(["write", "folder", *options, *patterns]) == 0
    members = members_of(tmp_path / "out")
    names = {"folder-train-00000000": "a/x.1", "folder-train-00000001": "b/x.1", "folder-train-00000002": "c"}
    assert {key: members[f"{key}.text.txt"].decode() for key in names} == names
    assert sorted(name for name in members if "image" in name) == [
        "folder-train-00000000.image.png",
        "folder-train-00000001.image.jpg",
        "folder-train-00000002.image.jpg",
    ]
    manifest = Manifest.load(tmp_path / "out" / "manifest.json")
    assert manifest.modalities[0].shape == (3, None, None)
    assert manifest.modalities[0].extensions == ("image.jpg", "image.png")


def test_files_that_lack_a_partner_or_cannot_be_read(pairs: Path, tmp_path: Path) -> None:
    (pairs / "notes" / "0003.txt").unlink()
    command = ["write", "folder", "--root", str(pairs), "--out", str(tmp_path / "out"), *MODALITIES, *IS_SPLIT]
    with pytest.raises(DataError, match=r"1 samples lack a file, first pictures/0003\.png, which has no caption"):
        main(command)
    (pairs / "notes" / "0003.txt").write_text("back")
    (pairs / "pictures" / "0005.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"pictures/0005\.png: not a sound PNG or JPEG.*--incomplete skip"):
        main(command)
    assert main([*command, "--incomplete", "skip"]) == 0
    assert Manifest.load(tmp_path / "out" / "manifest.json").num_samples == 11
    damaged = picture(6, (40, 40))
    (pairs / "pictures" / "0005.png").write_bytes(picture(5))
    (pairs / "pictures" / "0006.png").write_bytes(damaged[:-40])
    with pytest.raises(DataError, match=r"pictures/0006\.png: modality 'image'"):
        main(["write", "folder", "--root", str(pairs), "--out", str(tmp_path / "new"), MODALITIES[0], *IS_SPLIT])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name the split to write"),
        (["--split", "test", "--folder-is-split", "--test-fraction", "0.1"], "name the split to write"),
        ([*IS_SPLIT, "--modality", "image=pictures/0001.png"], "must be a pattern with *"),
        ([*IS_SPLIT, "--modality", "image=../raw/*.png"], "must be a pattern with *"),
        ([*IS_SPLIT, "--modality", "image=pictures/*.gif"], "no file below"),
        ([*IS_SPLIT, "--modality", "x=*/*_*.txt"], "would be the same sample"),
        (
            [*IS_SPLIT, "--modality", "x=notes/*1.*s", "--modality", "y=notes/*.txt"],
            "no two files pair up|lack a file",
        ),
        ([*IS_SPLIT, "--modality", "kind=notes/*.cls", "--classes", "kind=2"], "class index 2 is not below 2"),
        ([*IS_SPLIT, "--modality", "a=notes/*.txt", "--classes", "b=2"], "there is no modality 'b'"),
    ],
    ids=range(9),
)
def test_folder_mistakes(pairs: Path, tmp_path: Path, options: list[str], message: str) -> None:
    for name in ("a_.txt", "_a.txt"):
        (pairs / "notes" / name).write_text(name)
    if not any("--modality" in option for option in options):
        options = [*options, *MODALITIES]
    with pytest.raises((ConfigError, DataError), match=message.replace("*", r"\*")):
        main(["write", "folder", "--root", str(pairs), "--out", str(tmp_path / "out"), *options])


def test_files_are_read_while_packing(pairs: Path) -> None:
    """The source holds paths, not contents."""
    import pickle

    from jmvae_dist.data.indexing.inspection import ModalityRequest

    source, _ = load_folder_source(
        pairs, {"image": "pictures/*.png"}, [ModalityRequest("image", (), "")], SplitChoice("train")
    )
    assert len(pickle.dumps(source)) < 3000


TABLE = """\
id,pixel0,pixel1,pixel10,digit,animal,title,file
1,0,255,3,4,cat,"a, ""quoted""
title",pictures/0001.png
2,1,2,3,0,dog,ü,pictures/0002.png

3,4,5,6,2,cat,,pictures/0003.png
"""
COLUMNS = ["--vector=pixels=pixel*", "--class=digit=digit", "--class=animal=animal", "--text=title=title"]
COLUMNS += ["--path=image=file", "--dtype=pixels=uint8", "--scale=pixels=1/255", "--classes=digit=10"]


@pytest.fixture
def table(pairs: Path) -> Path:
    path = pairs / "table.csv"
    path.write_text(TABLE, encoding="utf-8-sig")
    return path


def test_the_picture_that_differs_is_named(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of another size makes a run resize all; it is often a mistake."""
    image = pytest.importorskip("PIL.Image")
    odd = pairs / "pictures" / "0004.png"
    image.new("L", (5, 2)).save(odd)
    command = ["write", "folder", "--root", str(pairs), "--out", str(tmp_path / "out"), *IS_SPLIT]
    assert main([*command, "--modality=image=pictures/*.png"]) == 0
    printed = capsys.readouterr().out
    assert f"image sizes vary (heights 2 to 3, widths 4 to 5; rarest: 2x5 (1), first {odd})" in printed
    assert f"RGB) are converted; rarest: L (1), first {odd}" in printed


def test_integers_of_64_bits_are_exact(tmp_path: Path) -> None:
    """Floats leave integers out beyond 2^53; what is written like a float may be one below."""
    largest = 2**63 - 1
    (tmp_path / "table.csv").write_text(f"a,b\n{largest},3.0\n{2**53 + 1},-1e3\n")
    command = ["write", "csv", "--file", str(tmp_path / "table.csv"), "--vector=x=*", "--dtype=x=int64"]
    command += ["--split", "train", "--file-is-split"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    values = [np.load(io.BytesIO(content)).tolist() for _, content in sorted(members_of(tmp_path / "out").items())]
    assert values == [[largest, 3], [2**53 + 1, -1000]]
    (tmp_path / "table.csv").write_text(f"a,b\n{largest + 1},1\n")
    with pytest.raises(DataError, match=r"line 2: column 'a': '9223372036854775808' is not a number of dtype int64"):
        main([*command, "--out", str(tmp_path / "other")])
    (tmp_path / "table.csv").write_text("a,b\n1,9.1e15\n")
    with pytest.raises(DataError, match=r"column 'b': '9\.1e15' is not a number of dtype int64"):
        main([*command, "--out", str(tmp_path / "other")])


@pytest.mark.parametrize("workers", [1, 2])
def test_csv(table: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out"
    options = ["--split", "train", "--test-fraction", "0.01", "--samples-per-shard", "2", "--workers", str(workers)]
    assert main(["write", "csv", "--file", str(table), "--out", str(out), *COLUMNS, *options]) == 0
    members = members_of(out)
    assert len(members) == 15
    rows = [([0, 255, 3], b"4", b"0", 'a, "quoted"\ntitle', 1), ([1, 2, 3], b"0", b"1", "ü", 2)]
    rows.append(([4, 5, 6], b"2", b"0", "", 3))
    for row, (pixels, digit, animal, title, file) in enumerate(rows):
        key = f"csv-train-{row:08d}"
        stored = np.load(io.BytesIO(members[f"{key}.pixels.npy"]))
        assert (stored.dtype, stored.tolist()) == (np.uint8, pixels)
        assert (members[f"{key}.digit.cls"], members[f"{key}.animal.cls"]) == (digit, animal)
        assert members[f"{key}.title.txt"].decode() == title
        assert members[f"{key}.image.png"] == (table.parent / f"pictures/{file:04d}.png").read_bytes()
    manifest = Manifest.load(out / "manifest.json")
    assert [modality.num_classes for modality in manifest.modalities] == [None, 10, 2, None, None]
    assert manifest.source["class_names"] == {"animal": ["cat", "dog"]}
    assert verify_shards(manifest) == []


def replaced(old: str, new: str) -> str:
    assert old in TABLE
    return TABLE.replace(old, new)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (replaced("4,5,6", "4,x,6"), [], "table.csv: line 6: column 'pixel1': 'x' is not a number"),
        (replaced("4,5,6", "4,inf,6"), [], "line 6: column 'pixel1': 'inf' is not finite; --incomplete skip leaves"),
        (replaced("4,5,6", "4,256,6"), [], "line 6: column 'pixel1': '256' is not a number of dtype uint8"),
        (replaced("4,5,6", "4,5"), [], "line 6: 7 cells, the header has 8"),
        (replaced("cat,,", " ,,"), [], "line 6: column 'animal': is empty"),
        (replaced("/0003.png", "/0009.txt"), [], "line 6: column 'file': "),
        (replaced("pictures/0003.png", "../secret.png"), [], "'../secret.png' is not a file below"),
        (replaced("pictures/0003.png", "/etc/passwd"), [], "'/etc/passwd' is not a file below"),
        (replaced("6,2,cat", "6,10,cat"), [], "digit: class 10 is not below the 10 classes given"),
        (replaced('"a, ', 'a" "b'), [], "line 2"),
        ("", [], "the file is empty"),
        ("id,pixel0\n", [], "has no column"),
        (TABLE.splitlines()[0] + "\n", [], "no rows after the header"),
        (TABLE, ["--shape", "pixels=2x2"], "--shape pixels: [2, 2] does not fit 3 columns"),
        (TABLE, ["--shape", "title=2x2"], "there is no --vector title"),
        (
            replaced("4,5,6", "4,x,6"),
            ["--text", "my text=title"],
            "name 'my text' must be a letter followed",
        ),
        ("", ["--text", "Title=title"], "two modalities have the same name 'Title' (upper and lower case"),
        (TABLE, ["--text", "title=id"], "names a modality twice"),
        (TABLE, ["--text", "other=nothing"], "has no column 'nothing'; it has id, pixel0"),
        (TABLE, ["--delimiter", "ab"], "must be one character"),
        (TABLE, ["--classes", "animal=1"], "class 1 is not below the 1 classes given (the names are cat, dog)"),
        (
            TABLE,
            ["--class-names", "animal=cat,cow"],
            "column 'animal': 'dog' is not one of the --class-names: cat, cow",
        ),
        (TABLE, ["--class-names", "title=a,b"], "there is no --class title"),
        (TABLE, ["--class-names", "animal=cat,dog,cat"], "a name is empty or occurs twice"),
        (TABLE, ["--key", "ids"], "--key: {table} has no column 'ids'"),
        (TABLE, ["--key", "file"], "line 2: column 'file': 'pictures/0001.png' cannot be a key"),
        (TABLE, ["--key", "animal"], "line 6: column 'animal': line 2 has the key 'cat', too"),
        (TABLE, ["--root", "/", "--incomplete", "skip"], "no row is complete: 3 rows (3 by 'file'); first line 2"),
        (
            replaced("3,4,5,6", "1e39,4,5,6"),
            ["--vector=wide=id"],
            "column 'id': '1e39' is beyond the range of float32",
        ),
        (
            replaced("6,2,cat", f"6,{'9' * 5000},cat"),
            [],
            "column 'digit': '" + "9" * 60 + "'... has 5,000 characters",
        ),
    ],
    ids=range(30),
)
def test_csv_mistakes(table: Path, tmp_path: Path, text: str, options: list[str], message: str) -> None:
    table.write_text(text, encoding="utf-8")
    command: list[Any] = ["write", "csv", "--file", str(table), "--out", str(tmp_path / "out"), *COLUMNS, *options]
    with pytest.raises((ConfigError, DataError)) as caught:
        main([*command, "--split", "train", "--test-fraction", "0.01"])
    assert message.format(table=table) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_incomplete_rows_are_left_out(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is left out shows nowhere, neither its class nor the length of its text; keys stay with their rows."""
    broken = '4,4,nan,6,2,eel,"a text that is longer than any other",pictures/0003.png\n'
    broken += (
        "5,1,5,6,2,eel,x,pictures/nowhere.png\n6,1,5,,2,cat,x,pictures/0003.png\n7,1,5,6,2,,x,pictures/0003.png\n"
    )
    head, _, rest = TABLE.partition("\n")
    table.write_text(f"{head}\n{broken}{rest}8,1,,6,2,cat,x,pictures/0003.png\n", encoding="utf-8")
    out = tmp_path / "out"
    command = ["write", "csv", "--file", str(table), "--out", str(out), *COLUMNS, "--incomplete", "skip"]
    assert main([*command, "--key", "id", "--split", "train", "--test-fraction", "0.01"]) == 0
    assert "note: left out: 5 rows (2 by 'pixel1'" in capsys.readouterr().out
    assert {name.partition(".")[0] for name in members_of(out)} == {"1", "2", "3"}
    manifest = Manifest.load(out / "manifest.json")
    assert [modality.shape for modality in manifest.modalities if modality.name == "title"] == [(17, 257)]
    assert (manifest.source["class_names"], manifest.source["left_out"]) == ({"animal": ["cat", "dog"]}, 5)
    assert verify_shards(manifest) == []


@pytest.mark.parametrize("source", ["folder", "csv"])
def test_a_file_of_a_sample_that_is_left_out_does_not_count(
    tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its size would make a run resize all the others."""
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(number, (9, 9) if number == 0 else (4, 3)))
        (tmp_path / f"{number}.txt").write_bytes(b"\xff" * 9 if number == 0 else b"text")
    table = tmp_path / "table.csv"
    table.write_text("file,text\nx.txt,0.txt\n" + "".join(f"{number}.png,{number}.txt\n" for number in range(4)))
    options = {
        "folder": ["--root", str(tmp_path), "--modality", "image=*.png", "--modality", "text=*.txt", *IS_SPLIT],
        "csv": [
            "--file",
            str(table),
            "--path",
            "image=file",
            "--path",
            "text=text",
            "--split=test",
            "--file-is-split",
        ],
    }
    out = tmp_path / "out"
    assert main(["write", source, "--out", str(out), *options[source], "--incomplete", "skip"]) == 0
    assert "sizes vary" not in capsys.readouterr().out
    manifest = Manifest.load(out)
    assert (manifest.num_samples, [modality.shape for modality in manifest.modalities]) == (3, [(3, 3, 4), (4, 257)])


def test_a_row_that_is_left_out_does_not_add_a_class(tmp_path: Path) -> None:
    """Whichever column it is left out for: a class more would be another model."""
    table, out = tmp_path / "table.csv", tmp_path / "out"
    table.write_text("a,b,t\nx,u,1\ny,v,2\nrare,,3\n,odd,long\nx,v,4\n")
    command = ["write", "csv", "--file", str(table), "--out", str(out), "--split", "train", "--test-fraction", "0.01"]
    assert main([*command, "--class=a=a", "--class=b=b", "--text=t=t", "--incomplete", "skip"]) == 0
    manifest = Manifest.load(out)
    assert manifest.source["class_names"] == {"a": ["x", "y"], "b": ["u", "v"]}
    assert [modality.shape[0] for modality in manifest.modalities] == [2, 2, 1]


def test_stated_names_of_classes(table: Path, tmp_path: Path) -> None:
    """A file that lacks a class gives the others the same numbers."""
    out = tmp_path / "out"
    command = ["write", "csv", "--file", str(table), "--out", str(out), "--class", "animal=animal", "--key", "id"]
    assert main([*command, "--class-names", "animal=eel, dog,cat", "--split", "test", "--file-is-split"]) == 0
    assert members_of(out) == {"1.animal.cls": b"2", "2.animal.cls": b"1", "3.animal.cls": b"2"}
    manifest = Manifest.load(out / "manifest.json")
    assert manifest.modalities[0].num_classes == 3
    assert manifest.source["class_names"] == {"animal": ["eel", "dog", "cat"]}


def test_named_classes_of_one_split_are_refused(table: Path, tmp_path: Path) -> None:
    """The test file might lack a class, and the others would get other numbers."""
    command = ["write", "csv", "--file", str(table), "--out", str(tmp_path / "out"), "--class", "animal=animal"]
    with pytest.raises(ConfigError, match="alphabetical order, which could differ between files"):
        main([*command, "--split", "train", "--file-is-split"])


def test_not_utf8(table: Path, tmp_path: Path) -> None:
    table.write_bytes(TABLE.encode("latin-1"))
    command = ["write", "csv", "--file", str(table), "--out", str(tmp_path / "out"), *COLUMNS]
    with pytest.raises(DataError, match=r"table\.csv: line 4: 'utf-8' codec can't decode"):
        main([*command, "--split", "train", "--file-is-split"])

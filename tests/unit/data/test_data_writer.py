"""Writing: plain tars with reproducible bytes, and nothing that looks complete unless it is."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_examples import example_source

from jmvae_dist.commands.shards import main
from jmvae_dist.data import writer
from jmvae_dist.data.index import read_index
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.verify import verify_shards
from jmvae_dist.data.writer import write_shards
from jmvae_dist.errors import ConfigError, DataError

MakeManifest = Callable[..., Manifest]


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_layout(example_manifest: MakeManifest, tmp_path: Path) -> None:
    manifest = example_manifest(25, samples_per_shard=10)
    assert list(content_of(tmp_path / "shards")) == [
        "manifest.json",
        *(f"shard-00000{n}.tar{suffix}" for n in range(3) for suffix in ("", ".index", ".sums")),
    ]
    assert manifest.shard_sizes == (9, 8, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_tars_are_ustar_without_extra_headers(example_manifest: MakeManifest) -> None:
    """One 512-byte header and padded content per member, and the index leads to the content."""
    manifest = example_manifest(12, samples_per_shard=12)
    content = manifest.shard_path(0).read_bytes()
    shard = manifest.shards[0]
    records = read_index(manifest.index_path(0), 12, 2, shard.num_bytes, shard.index.sha256)
    with tarfile.open(manifest.shard_path(0), "r:") as tar:
        members = tar.getmembers()
    assert len(members) == 24
    position = 0
    for number, member in enumerate(members):
        header = content[position : position + 512]
        assert header[257:265] == b"ustar\x0000"
        assert header[156:157] == tarfile.REGTYPE
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
        assert tuple(records[number // 2, number % 2]) == (position + 512, member.size)
        position += 512 + -(-member.size // 512) * 512
    assert not content[position:].strip(b"\0")
    assert len(content) % 10240 == 0


def test_webdataset_reads_the_shards_with_its_own_decoders(example_manifest: MakeManifest) -> None:
    import webdataset

    manifest = example_manifest(23)
    urls = [str(manifest.shard_path(number)) for number in range(len(manifest.shards))]
    read = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode():
        number = int(sample["__key__"].removeprefix("example-train-"))
        read[number] = sample["image.npy"], sample["label.cls"]
    assert sorted(read) == list(range(23))
    for number, (image, label) in read.items():
        assert image.tolist() == (np.arange(6).reshape(2, 3) + 100 * number).tolist()
        assert label == number % 12


def test_samples_are_shuffled_before_packing(example_manifest: MakeManifest) -> None:
    manifest = example_manifest(50, samples_per_shard=25)
    with tarfile.open(manifest.shard_path(0), "r:") as tar:
        numbers = [int(name.split(".")[0].split("-")[-1]) for name in tar.getnames()[::2]]
    assert numbers != sorted(numbers)
    assert max(numbers) > 25


def test_bytes_depend_on_source_and_options_only(tmp_path: Path) -> None:
    source = example_source(40)
    write_shards(source, tmp_path / "one")
    write_shards(source, tmp_path / "two", workers=2)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")
    manifest, _ = write_shards(source, tmp_path / "three", shuffle_seed=1)
    assert manifest.fingerprint != Manifest.load(tmp_path / "one" / "manifest.json").fingerprint


def test_the_same_data_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    assert write_shards(example_source(20), out)[1]
    inode = out.stat().st_ino
    manifest, written = write_shards(example_source(20), out)
    assert not written
    assert manifest.num_samples == 20
    assert out.stat().st_ino == inode


def test_damaged_shards_of_the_same_data_are_repaired(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    write_shards(example_source(20), out)
    before = content_of(out)
    (out / "shard-000001.tar").write_bytes(b"damaged")
    (out / "shard-000000.tar.index").unlink()
    assert write_shards(example_source(20), out)[1]
    assert content_of(out) == before


@pytest.mark.parametrize("change", [{"num_samples": 21}, {"shuffle_seed": 1}, {"samples_per_shard": 7}])
def test_other_data_is_replaced_only_on_demand(tmp_path: Path, change: dict[str, int]) -> None:
    out = tmp_path / "shards"
    write_shards(example_source(20), out)
    before = content_of(out)
    source = example_source(change.pop("num_samples", 20))
    with pytest.raises(ConfigError, match=r"other content.*--overwrite"):
        write_shards(source, out, **change)  # type: ignore[arg-type]
    assert content_of(out) == before
    manifest, written = write_shards(source, out, overwrite=True, **change)  # type: ignore[arg-type]
    assert written
    assert Manifest.load(out / "manifest.json") == manifest
    assert verify_shards(manifest) == []
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_files_of_others_are_never_deleted(tmp_path: Path) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.tex").write_text("...")
    with pytest.raises(ConfigError, match=r"holds other files \(thesis\.tex\)"):
        write_shards(example_source(5), out, overwrite=True)
    write_shards(example_source(5), tmp_path / "shards")
    (tmp_path / "shards" / "notes.txt").write_text("...")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        write_shards(example_source(6), tmp_path / "shards", overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        write_shards(example_source(5), out / "thesis.tex", overwrite=True)
    assert (out / "thesis.tex").read_text() == (tmp_path / "shards" / "notes.txt").read_text() == "..."


def test_an_empty_folder_and_a_link_are_filled(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    write_shards(example_source(5), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert Manifest.load(tmp_path / "target" / "manifest.json").num_samples == 5


def test_shards_without_a_sound_manifest_are_replaced_only_on_demand(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    write_shards(example_source(5), out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match="without a sound manifest"):
        write_shards(example_source(5), out)
    write_shards(example_source(5), out, overwrite=True)
    assert Manifest.load(out / "manifest.json").num_samples == 5


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": np.zeros((5, 3, 2), np.float32)}, r"'image': is float32 \[3, 2\], declared as float32 \[2, 3\]"),
        ({"image": np.zeros((5, 2, 3))}, r"'image': is float64"),
        ({"image": np.full((5, 2, 3), np.nan, np.float32)}, r"'image': is not finite"),
        ({"label": np.full(5, 12)}, r"'label': class 12 is not in 0\.\.11"),
    ],
)
def test_a_source_that_breaks_its_word(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    source = example_source(5)
    source = replace(source, arrays={**source.arrays, **arrays})
    with pytest.raises(DataError, match=rf"sample example-train-0000000\d: modality {message}"):
        write_shards(source, tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


class SourceWithoutLabels:
    """Yields samples that lack a modality."""

    modalities = (Modality("image", "float32", (1,)), Modality.classes("label", 2))
    default_samples_per_shard = 10
    sample_bytes = 2048

    def __len__(self) -> int:
        return 2

    def key(self, index: int) -> str:
        return f"incomplete-{index}"

    def sample(self, index: int) -> dict[str, np.ndarray | int]:
        return {"image": np.zeros(1, np.float32)}

    def description(self) -> dict[str, object]:
        return {}


def test_an_incomplete_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sample incomplete-\d: modality 'label': is missing"):
        write_shards(SourceWithoutLabels(), tmp_path / "shards")


def test_an_error_in_a_worker_process_arrives(tmp_path: Path) -> None:
    source = example_source(20)
    source.arrays["image"][7] = np.inf
    with pytest.raises(DataError, match=r"sample example-train-00000007: modality 'image': is not finite"):
        write_shards(source, tmp_path / "shards", workers=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_shard": 0}, "--samples-per-shard"),
        ({"workers": 0}, "--workers"),
        ({"shuffle_seed": 2**64}, "--shuffle-seed"),
    ],
)
def test_impossible_options(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_shards(example_source(5), tmp_path / "shards", **options)  # type: ignore[arg-type]


def test_shards_of_too_many_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_INDEX_BYTES", 200)
    with pytest.raises(ConfigError, match=r"10 samples of 2 modalities are too many.*--samples-per-shard"):
        write_shards(example_source(20), tmp_path / "shards")
    write_shards(example_source(20), tmp_path / "shards", samples_per_shard=5)


WRITE_NPZ = [sys.executable, "-m", "jmvae_dist", "shards", "write", "npz", "--samples-per-shard", "20"]
WRITE_NPZ += ["--split", "train", "--file-is-split"]


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_time_leaves_nothing_that_looks_complete(tmp_path: Path, workers: int) -> None:
    """Kill the writer when it has begun some number of shards, then let another one finish and clean up."""
    np.savez(tmp_path / "data.npz", x=np.arange(6000, dtype=np.float32).reshape(2000, 3))
    target = tmp_path / "out"
    command = [*WRITE_NPZ, "--file", str(tmp_path / "data.npz"), "--out", str(target / "shards")]
    for num_shards in (1, 60) if workers == 1 else (20,):
        writer = subprocess.Popen([*command, "--workers", str(workers)], stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 60
        while writer.poll() is None and len(list(target.glob(".*/shard-*.tar"))) < num_shards:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        os.kill(writer.pid, signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL, "the writer finished too early to be killed"
        assert not (target / "shards").exists()
        assert len(list(target.glob(".*.writing-*"))) == 1, "leftovers of earlier writers are removed by the next"
    assert main(command[4:]) == 0
    assert [path.name for path in target.iterdir()] == ["shards"]
    assert verify_shards(Manifest.load(target / "shards" / "manifest.json"), workers=1) == []


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    """The first one is stopped in the middle, so that it is surely there, and goes on afterwards."""
    np.savez(tmp_path / "data.npz", x=np.arange(6000, dtype=np.float32).reshape(2000, 3))
    out = tmp_path / "out" / "shards"
    command = [*WRITE_NPZ, "--file", str(tmp_path / "data.npz"), "--out", str(out), "--workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as writer:
        try:
            deadline_s = time.monotonic() + 60
            while writer.poll() is None and not list(out.parent.glob(".*/shard-*.tar")):
                assert time.monotonic() < deadline_s
                time.sleep(0.001)
            os.kill(writer.pid, signal.SIGSTOP)
            with pytest.raises(ConfigError, match="another process is writing to"):
                write_shards(example_source(5), out)
        finally:
            os.kill(writer.pid, signal.SIGCONT)
    assert writer.returncode == 0
    assert [path.name for path in out.parent.iterdir()] == ["shards"]
    assert Manifest.load(out / "manifest.json").num_samples == 2000


class SourceDuringWhichTheFolderChanges(SourceWithoutLabels):
    """Somebody else makes `out` while its samples are written."""

    def __init__(self, out: Path, name: str) -> None:
        self.file = out / name

    def sample(self, index: int) -> dict[str, np.ndarray | int]:
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_text("{}")
        return {"image": np.zeros(1, np.float32), "label": 1}


@pytest.mark.parametrize(
    ("name", "message"), [("thesis.tex", "holds other files"), ("manifest.json", "without a sound manifest")]
)
def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path: Path, name: str, message: str) -> None:
    source = SourceDuringWhichTheFolderChanges(tmp_path / "shards", name)
    with pytest.raises(ConfigError, match=message):
        write_shards(source, tmp_path / "shards")
    assert content_of(tmp_path / "shards") == {name: b"{}"}


def test_shards_that_are_replaced_meanwhile_are_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    write_shards(example_source(20), tmp_path / "other")
    write_shards(example_source(5), out)

    class Source(SourceWithoutLabels):
        def sample(self, index: int) -> dict[str, np.ndarray | int]:
            if (tmp_path / "other").exists():
                out.rename(tmp_path / "old")
                (tmp_path / "other").rename(out)
            return {"image": np.zeros(1, np.float32), "label": 1}

    with pytest.raises(ConfigError, match="was changed by somebody else"):
        write_shards(Source(), out, overwrite=True)
    assert Manifest.load(out / "manifest.json").num_samples == 20


def test_names_that_differ_only_in_case_are_refused_before_writing(tmp_path: Path) -> None:
    source = example_source(5)
    source = replace(source, modalities=(*source.modalities, Modality.classes("Image", 2)))
    with pytest.raises(DataError, match="two modalities have the same name 'Image'"):
        write_shards(source, tmp_path / "out" / "shards")
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_could_not_be_read_back_is_not_committed(tmp_path: Path) -> None:
    details: dict[str, object] = {}
    for _ in range(20):
        details = {"deeper": details}
    with pytest.raises(DataError, match="nested more than"):
        write_shards(replace(example_source(5), details=details), tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_values_that_the_model_could_not_see_are_refused(tmp_path: Path) -> None:
    """3e38 is finite in float32, and 30 times as much is not."""
    source = example_source(5)
    source.arrays["image"][3, 1, 2] = 3e38
    source = replace(source, modalities=(Modality("image", "float32", (2, 3), scale=30.0), source.modalities[1]))
    with pytest.raises(
        DataError, match=r"sample example-train-00000003: modality 'image': \(value - offset\) \* scale"
    ):
        write_shards(source, tmp_path / "shards")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path, workers: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ConfigError) as caught:
            write_shards(example_source(40), tmp_path / "shards", workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == f"cannot write --out {tmp_path / 'shards'}: File too large"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write --out .*file/shards: File exists \(.*file\)"):
        write_shards(example_source(5), tmp_path / "file" / "shards")


def test_large_arrays_are_shared_and_leave_nothing_behind(tmp_path: Path) -> None:
    source = example_source(3000)
    assert source.arrays["image"].nbytes > 2**16
    write_shards(source, tmp_path / "two", samples_per_shard=750, workers=2)
    write_shards(source, tmp_path / "one", samples_per_shard=750, workers=1)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]

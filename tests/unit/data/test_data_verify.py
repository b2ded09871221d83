"""The full check finds every kind of damage, and only damage."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_examples import npy_bytes

from jmvae_dist.data.index import RECORD_DTYPE, index_bytes, read_index
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.verify import verify_shards

MakeManifest = Callable[..., Manifest]
IMAGE = Modality("image", "float32", (2,))
LABEL = Modality.classes("Label", 12)


def members(number: int) -> dict[str, bytes]:
    return {
        "image.npy": npy_bytes(np.full(2, number, np.float32)),
        "Label.cls": f"{number % 12:02d}".encode(),
    }


def with_true_checksums(manifest: Manifest) -> Manifest:
    """The manifest with sizes and sha256 of the files as they are now: only deeper checks can find damage."""
    shards = []
    for number, shard in enumerate(manifest.shards):
        content, index = manifest.shard_path(number).read_bytes(), manifest.index_path(number).read_bytes()
        changes = {"index": replace(shard.index, num_bytes=len(index), sha256=hashlib.sha256(index).hexdigest())}
        if shard.sums is not None:
            sums = manifest.sums_path(number).read_bytes()
            changes["sums"] = replace(shard.sums, sha256=hashlib.sha256(sums).hexdigest())
        shards.append(replace(shard, num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), **changes))
    return Manifest.create(manifest.modalities, shards, {}, manifest.path)


def test_sound_shards(example_manifest: MakeManifest) -> None:
    assert verify_shards(example_manifest()) == []


def test_sound_foreign_shards(foreign_manifest: MakeManifest) -> None:
    """Of uneven layout, and with upper case in a name, which webdataset lowers."""
    samples = [members(number) for number in range(5)]
    samples[2]["Label.cls"] = b"2"
    assert verify_shards(foreign_manifest([IMAGE, LABEL], samples)) == []


@pytest.mark.parametrize("position", [3, 100, 150, 257, 520, 700, 1100, 1600, 4000])
def test_every_flipped_bit_is_found(example_manifest: MakeManifest, position: int) -> None:
    manifest = example_manifest()
    path = manifest.shard_path(1)
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
    problems = verify_shards(manifest)
    assert any("shard-000001.tar: sha256 differs" in problem for problem in problems)


def test_sums_of_other_members_are_found(example_manifest: MakeManifest) -> None:
    """Training would refuse these samples, although the shard is sound."""
    manifest = example_manifest()
    path = manifest.sums_path(1)
    content = bytearray(path.read_bytes())
    content[8 * (2 * 3 + 1)] ^= 1
    path.write_bytes(content)
    (problem,) = verify_shards(with_true_checksums(manifest))
    assert re.search(r"shard-000001.tar: sample 3 \(key '.*'\), modality 'label': its bytes are not those", problem)
    path.write_bytes(b"short")
    (problem,) = verify_shards(manifest)
    assert problem == f"{path}: sums file should have 160 bytes but has only 5; copy it again"


def test_all_problems_are_listed(example_manifest: MakeManifest) -> None:
    manifest = example_manifest()
    manifest.shard_path(0).unlink()
    os.truncate(manifest.shard_path(1), 1024)
    manifest.index_path(2).write_bytes(b"short")
    problems = verify_shards(manifest)
    assert [problem.split(": ")[1] for problem in problems] == [
        "cannot read shard",
        "1024 bytes, the manifest says 30720",
        "index should have 240 bytes but has only 5; copy it again",
    ]


def test_several_bad_samples_are_each_named(foreign_manifest: MakeManifest) -> None:
    samples = [members(number) for number in range(6)]
    samples[1]["image.npy"] = npy_bytes(np.array([1, np.nan], np.float32))
    samples[4]["image.npy"] = b"junk"
    samples[4]["Label.cls"] = b"99"
    problems = verify_shards(foreign_manifest([IMAGE, LABEL], samples))
    assert len(problems) == 3
    for problem, parts in zip(
        problems,
        [("'foreign-001'", "not finite"), ("'foreign-004'", "not a valid npy"), ("'foreign-004'", "99")],
        strict=True,
    ):
        assert all(part in problem for part in parts)


def test_an_index_that_exchanges_samples_is_found(example_manifest: MakeManifest) -> None:
    """All sizes fit and all checksums are true: only the names in the tar tell."""
    manifest = example_manifest()
    shard = manifest.shards[0]
    records = read_index(manifest.index_path(0), shard.num_samples, 2, shard.num_bytes, None).copy()
    records[[0, 1], 1] = records[[1, 0], 1]
    manifest.index_path(0).write_bytes(index_bytes(records))
    problems = verify_shards(with_true_checksums(manifest))
    assert len(problems) == 1
    assert "sample 0: the index joins members of different keys" in problems[0]


def test_an_index_with_a_wrong_size_is_found(foreign_manifest: MakeManifest) -> None:
    manifest = foreign_manifest([LABEL], [{"Label.cls": b"07"}, {"Label.cls": b"08"}])
    manifest.index_path(0).write_bytes(index_bytes(np.array([[(512, 1)], [(1536, 1)]], dtype=RECORD_DTYPE)))
    problems = verify_shards(with_true_checksums(manifest))
    assert any("the index does not lead to the members of 'foreign-000'" in problem for problem in problems)


def test_members_unknown_to_the_index_are_found(foreign_manifest: MakeManifest) -> None:
    manifest = foreign_manifest([IMAGE], [members(number) for number in range(3)])
    assert [
        "the tar has 3 members of no sample (extensions: label.cls)" in problem for problem in verify_shards(manifest)
    ] == [True]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("dotted.{:03d}", r"2 members of no sample \(extensions: 000.label.cls, 001.label.cls\)"),
        ("__hidden__/{:03d}", r"2 members of no sample \(extensions: none\)"),
        ("same", "second one of sample 'same'"),
    ],
)
def test_keys_that_webdataset_misreads(foreign_manifest: MakeManifest, key: str, message: str) -> None:
    """The index leads to the right members: only the rules of webdataset show the difference."""
    samples = [{"Label.cls": b"07"}, {"Label.cls": b"08"}]
    problems = verify_shards(foreign_manifest([LABEL], samples, key))
    assert len(problems) == 1
    assert re.search(message, problems[0])


def test_links_and_compressed_tars_are_refused(foreign_manifest: MakeManifest, tmp_path: Path) -> None:
    manifest = foreign_manifest([LABEL], [{"Label.cls": b"07"}])
    path = manifest.shard_path(0)
    plain = path.read_bytes()
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("foreign-000.Label.cls"), io.BytesIO(b""))
    path.write_bytes(path.read_bytes() + bytes(len(plain)))
    problems = verify_shards(with_true_checksums(manifest))
    assert any("a gzip file" in problem for problem in problems)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        link = tarfile.TarInfo("foreign-000.Label.cls")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    problems = verify_shards(with_true_checksums(manifest))
    assert any("is a symbolic link" in problem for problem in problems)


def test_a_wrong_index_size_in_the_manifest_is_found(example_manifest: MakeManifest) -> None:
    manifest = example_manifest(20)
    shard = manifest.shards[1]
    wrong = replace(shard, index=replace(shard.index, num_bytes=shard.index.num_bytes + 12))
    problems = verify_shards(replace(manifest, shards=(manifest.shards[0], wrong)))
    assert len(problems) == 1
    assert re.search(r"shard-000001\.tar\.index: the manifest says 276 bytes, but an index of 10 .* 264", problems[0])


@pytest.mark.parametrize("suffix", ["", ".index"])
def test_a_pipe_instead_of_a_shard_or_index(example_manifest: MakeManifest, suffix: str) -> None:
    manifest = example_manifest(20)
    path = manifest.path.with_name(f"shard-000001.tar{suffix}")
    path.unlink()
    os.mkfifo(path)
    problems = verify_shards(manifest)
    assert len(problems) == 1
    assert f"{path}: not a regular file" in problems[0]


def test_progress_counts_every_sample_once(
    example_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = example_manifest(20)
    manifest.shard_path(0).unlink()
    monkeypatch.setattr("jmvae_dist.progress._SILENT_S", 0.0)
    for workers in (1, 2):
        assert len(verify_shards(manifest, workers)) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("verifying samples: 20 in ")


def test_progress_moves_within_a_shard(
    example_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = example_manifest(20, samples_per_shard=20)
    monkeypatch.setattr("jmvae_dist.progress._SILENT_S", 0.0)
    monkeypatch.setattr("jmvae_dist.progress._LINE_INTERVAL_S", 0.0)
    monkeypatch.setattr("jmvae_dist.data.verify._CHUNK_BYTES", 8 * (6 + 12) * 8)  # 8 samples
    assert verify_shards(manifest) == []
    lines = [line.split(" in ")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines[:2] == ["verifying samples: 8 of 20", "verifying samples: 16 of 20"]
    assert lines[-1] == "verifying samples: 20"


def test_the_same_shard_twice_is_found(example_manifest: MakeManifest) -> None:
    manifest = example_manifest(20)
    manifest.shard_path(1).write_bytes(manifest.shard_path(0).read_bytes())
    manifest.index_path(1).write_bytes(manifest.index_path(0).read_bytes())
    manifest.sums_path(1).write_bytes(manifest.sums_path(0).read_bytes())
    problems = verify_shards(with_true_checksums(manifest))
    assert len(problems) == 1
    assert "shard-000001.tar: same content as" in problems[0]

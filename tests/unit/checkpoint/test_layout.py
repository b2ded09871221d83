"""The directory of checkpoints: commit, validity, sweeping, retention, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from jmvae_dist.checkpoint.layout import (
    CheckpointManifest,
    FileRecord,
    FragmentRecord,
    NewerFormatError,
    TensorRecord,
    commit,
    find_damage,
    find_intact,
    list_checkpoints,
    measure_progress,
    read_manifest,
    remove_checkpoint,
    seal_file,
    sweep,
    temporary_directory,
)
from jmvae_dist.errors import CheckpointError
from tests.unit.checkpoint.test_fragments import make_manifest


def write_checkpoint(root: Path, global_step: int, content: bytes = b"weights", **changes: object) -> Path:
    temporary = temporary_directory(root, global_step)
    temporary.mkdir(parents=True)
    (temporary / "rank-00000.safetensors").write_bytes(content)
    record = seal_file(temporary / "rank-00000.safetensors")
    return commit(root, make_manifest(global_step=global_step, files={"rank-00000.safetensors": record}, **changes))


def test_commit_publishes_and_names_the_latest(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 7)
    assert path == tmp_path / "step-00000007"
    assert (tmp_path / "LATEST").read_text() == "step-00000007\n"
    assert find_damage(path, read_manifest(path)) is None
    assert sweep(tmp_path) == []


def test_order_is_that_of_the_steps_not_of_the_names(tmp_path: Path) -> None:
    for global_step in (99_999_999, 100_000_000, 5):
        write_checkpoint(tmp_path, global_step)
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-00000005", "step-99999999", "step-100000000"]


def test_progress_is_made_by_checkpoints_after_a_rewind_and_not_by_the_same_ones_again(tmp_path: Path) -> None:
    found = [measure_progress(tmp_path)]
    for step, passed_over in ((20, []), (40, []), (30, [[35, 41]])):
        newest = write_checkpoint(tmp_path, step, passed_over=passed_over)
        for other in list_checkpoints(tmp_path):
            if other.name > newest.name:
                other.rename(tmp_path / f"rewound-{other.name}")
        found.append(measure_progress(tmp_path))
    assert found == sorted(set(found))
    (newest / "manifest.json").write_text("{")  # as a resume passes over it
    assert measure_progress(tmp_path) == found[1]
    (tmp_path / "step-00000020" / "manifest.json").unlink()
    assert measure_progress(tmp_path) == found[0]


def test_only_complete_directories_count_and_the_rest_is_swept(tmp_path: Path) -> None:
    kept = write_checkpoint(tmp_path, 1)
    deleted = write_checkpoint(tmp_path, 2)
    (deleted / "manifest.json").unlink()  # as a deletion that was interrupted leaves it
    temporary_directory(tmp_path, 3).mkdir()
    (tmp_path / "step-notes").mkdir()  # not ours
    assert list_checkpoints(tmp_path) == [kept]
    assert sweep(tmp_path) == [".tmp-step-00000003", "step-00000002"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-00000001", "step-notes"]


def test_damage_to_files(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, b"0123456789")
    manifest, file = read_manifest(path), path / "rank-00000.safetensors"
    for content, expected in ((b"0123456788", "sha256"), (b"012345678", "9 bytes instead of 10")):
        file.write_bytes(content)
        assert expected in (find_damage(path, manifest) or "")
    file.unlink()
    assert "cannot be read" in (find_damage(path, manifest) or "")


def test_ranks_share_the_checking(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1)
    manifest = read_manifest(path)
    manifest.files["rank-00001.safetensors"] = FileRecord(1, "0" * 64)
    found = [find_damage(path, manifest, part, parts=2) for part in range(2)]
    assert found[0] is None
    assert "rank-00001" in (found[1] or "")


@pytest.mark.parametrize("position", range(0, 700, 23))
def test_any_flipped_bit_in_a_manifest_is_noticed(tmp_path: Path, position: int) -> None:
    path = write_checkpoint(tmp_path, 1) / "manifest.json"
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_manifest(path.parent)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"digest": 1}', "[" * 100_000, '{"format_version": 2, "digest": ""}']
)
def test_what_is_not_a_manifest(text: str) -> None:
    with pytest.raises(CheckpointError, match="here"):
        CheckpointManifest.from_json(text, Path("here"))


def resealed(text: str, **changes: object) -> str:
    """A manifest with other content, and the digest of that."""
    content = {**json.loads(text), **changes}
    del content["digest"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "digest": digest})


HOSTILE = "\x1b[2J" * 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({HOSTILE: 0}, "not a checkpoint manifest"),
        ({"format_version": HOSTILE}, "format version"),
        ({"files": {HOSTILE: {"num_bytes": 1, "sha256": ""}}}, "file name"),
        ({"tensors": {HOSTILE: {"shape": [1], "dtype": "float32", "fragments": []}}}, "the fragments of"),
    ],
    ids=["field", "version", "file", "tensor"],
)
def test_messages_neither_control_nor_flood_the_terminal(changes: dict, message: str) -> None:
    text = resealed(make_manifest(global_step=1).to_json(), **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointManifest.from_json(text, Path("here"))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_the_format_is_as_old_as_its_content_allows(tmp_path: Path) -> None:
    """A version that does not know `micro_batch` reads what does not need it, and refuses the rest by its format."""
    plain, found = (make_manifest(micro_batch=value) for value in ({}, {"micro_batch_size": 8}))
    first, second = (json.loads(manifest.to_json()) for manifest in (plain, found))
    assert first["format_version"] == 1
    assert "micro_batch" not in first
    assert second["format_version"] == 2
    for manifest in (plain, found):
        assert CheckpointManifest.from_json(manifest.to_json(), tmp_path) == manifest


def test_a_newer_format_is_no_damage(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoints", 1)
    path = write_checkpoint(tmp_path / "checkpoints", 2) / "manifest.json"
    path.write_text(resealed(path.read_text(), format_version=3, unknown=0))
    with pytest.raises(NewerFormatError, match=r"format 3, written by a newer version .* formats up to 2"):
        find_intact(tmp_path)
    path.write_text(resealed(path.read_text(), format_version="3"))
    assert find_intact(tmp_path)[0].name == "step-00000001"


def test_file_names_cannot_leave_the_directory() -> None:
    manifest = make_manifest(files={"../../secret": FileRecord(1, "0" * 64)})
    with pytest.raises(CheckpointError, match="not allowed"):
        CheckpointManifest.from_json(manifest.to_json(), Path("here"))


FILE = "rank-00000.safetensors"


@pytest.mark.parametrize(
    "changes",
    [
        {"global_step": "1"},
        {"guards": []},
        {"passed_over": 3},
        *({"tensors": {"weight/a": {"shape": shape, "dtype": "float32", "fragments": []}}} for shape in (0, ["a"])),
        *(
            {"tensors": {"weight/a": {"shape": shape, "dtype": "float32", "fragments": [fragment]}}}
            for shape, fragment in [
                ([2], {"file": FILE, "start": 0.0, "numel": 2.0}),
                ([2], {"file": FILE, "start": 0, "numel": "2"}),
                ([2], {"file": [FILE], "start": 0, "numel": 2}),
                ([-1, -2], {"file": FILE, "start": 0, "numel": 2}),
            ]
        ),
    ],
)
def test_a_manifest_with_a_digest_but_other_types_is_refused(changes: dict) -> None:
    text = resealed(make_manifest(files={FILE: FileRecord(1, "0" * 64)}).to_json(), **changes)
    with pytest.raises(CheckpointError, match="here"):
        CheckpointManifest.from_json(text, Path("here"))


def test_finding_what_a_user_names(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    first, second = write_checkpoint(root, 1), write_checkpoint(root, 2)
    assert find_intact(tmp_path)[0] == second
    assert find_intact(first)[0] == first
    (second / "rank-00000.safetensors").write_bytes(b"damaged")
    assert find_intact(tmp_path)[0] == first
    remove_checkpoint(first)
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        find_intact(tmp_path)
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        find_intact(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "fragments",
    [[], [("rank-00000.safetensors", 0, 3)], [("other.safetensors", 0, 4)], [("rank-00000.safetensors", 1, 4)]],
)
def test_fragments_must_cover_their_tensor(fragments: list[tuple[str, int, int]]) -> None:
    record = TensorRecord([2, 2], "float32", [FragmentRecord(*fragment) for fragment in fragments])
    files = {"rank-00000.safetensors": FileRecord(1, "0" * 64)}
    manifest = make_manifest(files=files, tensors={"weight/a": record})
    with pytest.raises(CheckpointError, match="fragments of 'weight/a'"):
        CheckpointManifest.from_json(manifest.to_json(), Path("here"))

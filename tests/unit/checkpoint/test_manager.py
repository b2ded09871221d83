"""The manager on one process: what it resumes from, and what becomes of the other checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from jmvae_dist.checkpoint.layout import NewerFormatError
from jmvae_dist.checkpoint.manager import CheckpointManager
from jmvae_dist.config import CheckpointSection
from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.errors import CheckpointError, is_on_all_ranks
from tests.unit.checkpoint.test_fragments import make_engine, make_manifest
from tests.unit.checkpoint.test_layout import resealed


def make_manager(root: Path) -> CheckpointManager:
    return CheckpointManager(root, CheckpointSection(keep_last=9), make_engine(seed=0, fused=False), Collectives())


def write_checkpoints(root: Path, *steps: int) -> None:
    root.mkdir(exist_ok=True)
    with make_manager(root) as manager:
        for step in steps:
            manager.save(lambda step=step: make_manifest(global_step=step), wait=False)


def damage(root: Path, step: int) -> None:
    (root / f"step-{step:08d}" / "rank-00000.safetensors").write_bytes(b"")


def accept(manifest: object) -> None:
    """Any checkpoint is one of this run."""


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_latest_names_what_was_resumed(tmp_path: Path) -> None:
    write_checkpoints(tmp_path, 1, 2, 3, 4)
    assert (tmp_path / "LATEST").read_text() == "step-00000004\n"
    damage(tmp_path, 3)
    manifest = make_manager(tmp_path).resume(accept, at_most=3)
    assert manifest is not None
    assert manifest.global_step == 2
    aside = ["damaged-step-00000003", "rewound-step-00000004"]
    assert names(tmp_path) == ["LATEST", *aside, "step-00000001", "step-00000002"]
    assert (tmp_path / "LATEST").read_text() == "step-00000002\n"


def test_nothing_is_set_aside_unless_there_is_something_to_go_back_to(tmp_path: Path) -> None:
    write_checkpoints(tmp_path, 1, 2, 3)
    damage(tmp_path, 1)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints up to step 1, to go back to, is intact"):
        make_manager(tmp_path).resume(accept, at_most=1)
    assert names(tmp_path) == ["LATEST", "step-00000001", "step-00000002", "step-00000003"]
    manifest = make_manager(tmp_path).resume(accept)
    assert manifest is not None
    assert manifest.global_step == 3


def test_a_checkpoint_of_a_newer_format_ends_a_resume_and_stays_where_it_is(tmp_path: Path) -> None:
    write_checkpoints(tmp_path, 1, 2)
    path = tmp_path / "step-00000002" / "manifest.json"
    path.write_text(resealed(path.read_text(), format_version=3))
    with pytest.raises(NewerFormatError, match="written by a newer version") as caught:
        make_manager(tmp_path).resume(accept)
    assert is_on_all_ranks(caught.value)
    assert names(tmp_path) == ["LATEST", "step-00000001", "step-00000002"]

"""Fragments: any number of writers covers every entry once, any reader gets the same values back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from jmvae_dist.checkpoint.fragments import (
    check_same_entries,
    create_optimizer_state,
    merge_index,
    optimizer_record,
    own_fragments,
    read_entries,
    replicated_entries,
    restore_steps,
    write_fragments,
)
from jmvae_dist.checkpoint.layout import CheckpointManifest, FileRecord
from jmvae_dist.errors import CheckpointError

SHAPES = st.lists(st.lists(st.integers(0, 7), min_size=0, max_size=3), min_size=1, max_size=8)


def make_manifest(**changes: object) -> CheckpointManifest:
    empty: dict = {"versions": {}, "model": {}, "modalities": {}, "config": {}, "data_state": {}, "tracking": {}}
    fields = {"global_step": 3, "engine": "ddp", "world_size": 1, "optimizer": {}, "elapsed_s": 0.0, "created": ""}
    return CheckpointManifest(**{**empty, **fields, **changes})


@given(shapes=SHAPES, world_size=st.integers(1, 9))
def test_ranks_cut_the_entries_into_equal_disjoint_parts(shapes: list[list[int]], world_size: int) -> None:
    entries = {f"weight/{number}": torch.randn(shape) for number, shape in enumerate(shapes)}
    total = sum(tensor.numel() for tensor in entries.values())
    covered = {name: torch.zeros(tensor.numel(), dtype=torch.int64) for name, tensor in entries.items()}
    for rank in range(world_size):
        fragments = own_fragments(entries, rank, world_size)
        for fragment in fragments:
            stop = fragment.start + fragment.values.numel()
            covered[fragment.name][fragment.start : stop] += 1
            assert torch.equal(entries[fragment.name].reshape(-1)[fragment.start : stop], fragment.values)
        size = sum(fragment.values.numel() for fragment in fragments)
        assert abs(size - total / world_size) < 1
    assert all(bool((count == 1).all()) for count in covered.values())


@settings(max_examples=30, deadline=None)
@given(
    shapes=SHAPES, world_size=st.integers(1, 5), dtype=st.sampled_from([torch.float32, torch.float64, torch.int64])
)
def test_what_many_wrote_one_reads(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], world_size: int, dtype: torch.dtype
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    entries = {f"weight/{number}": torch.randn(shape).mul(100).to(dtype) for number, shape in enumerate(shapes)}
    indexes = [
        write_fragments(folder / f"rank-{rank:05d}.safetensors", own_fragments(entries, rank, world_size))
        for rank in range(world_size)
    ]
    files = {f"rank-{rank:05d}.safetensors": FileRecord(0, "") for rank in range(world_size)}
    manifest = make_manifest(tensors=merge_index(entries, indexes), files=files)
    manifest = CheckpointManifest.from_json(manifest.to_json(), folder)
    read = {name: torch.zeros_like(tensor) for name, tensor in entries.items()}
    read_entries(folder, manifest, read)
    assert all(torch.equal(entries[name], read[name]) for name in entries)


def test_overlapping_or_missing_fragments_are_noticed(tmp_path: Path) -> None:
    entries = {"weight/a": torch.arange(10.0)}
    first = write_fragments(tmp_path / "rank-00000.safetensors", own_fragments(entries, 0, 2))
    with pytest.raises(AssertionError, match="5 elements written"):
        merge_index(entries, [first])
    with pytest.raises(AssertionError, match="overlap"):
        merge_index(entries, [first, first])


def make_trained(seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    """A small module with a frozen parameter and a buffer, after two steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model[0].bias.requires_grad_(False)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1, fused=True)
    for _ in range(2):
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_a_fresh_optimizer_continues_exactly(tmp_path: Path) -> None:
    source, source_optimizer = make_trained(seed=0)
    entries = replicated_entries(source, source_optimizer)
    assert {name.split("/")[0] for name in entries} == {"weight", "buffer", "exp_avg", "exp_avg_sq"}
    assert "exp_avg/0.bias" not in entries
    index = write_fragments(tmp_path / "rank-00000.safetensors", own_fragments(entries, 0, 1))
    manifest = make_manifest(
        tensors=merge_index(entries, [index]), optimizer=optimizer_record(source, source_optimizer)
    )
    target, _ = make_trained(seed=1)
    trainable = [parameter for parameter in target.parameters() if parameter.requires_grad]
    target_optimizer = torch.optim.AdamW(trainable, lr=0.1, fused=True)
    create_optimizer_state(target_optimizer)
    read_entries(tmp_path, manifest, replicated_entries(target, target_optimizer))
    restore_steps(target, target_optimizer, manifest.optimizer)
    batch = torch.randn(8, 3)
    for model, optimizer in ((source, source_optimizer), (target, target_optimizer)):
        model(batch).square().sum().backward()
        optimizer.step()
    states = zip(source.state_dict().items(), target.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(value, copy) for (name, value), (other, copy) in states)


def test_another_model_is_refused() -> None:
    model, optimizer = make_trained(seed=0)
    entries = replicated_entries(model, optimizer)
    everything = own_fragments(entries, 0, 1)
    index = {part.name: record for part, record in zip(everything, _records(everything), strict=True)}
    manifest = make_manifest(tensors=merge_index(entries, [index]))
    check_same_entries(entries, manifest, Path("here"))
    with pytest.raises(CheckpointError, match=r"weight/0.weight is \[9\] here and \[4, 3\] there"):
        check_same_entries({**entries, "weight/0.weight": torch.zeros(9)}, manifest, Path("here"))
    with pytest.raises(CheckpointError, match="weight/new is missing there"):
        check_same_entries({**entries, "weight/new": torch.zeros(9)}, manifest, Path("here"))
    entries.pop("weight/2.bias")
    with pytest.raises(CheckpointError, match=r"weight/2.bias is unknown here"):
        check_same_entries(entries, manifest, Path("here"))


def _records(fragments: list) -> list:
    from jmvae_dist.checkpoint.layout import FragmentRecord

    return [FragmentRecord("rank-00000.safetensors", part.start, part.values.numel()) for part in fragments]


def test_file_records_survive_json() -> None:
    files = {"rank-00000.safetensors": FileRecord(12, "ab" * 32)}
    manifest = make_manifest(files=files)
    again = CheckpointManifest.from_json(manifest.to_json(), Path("here"))
    assert asdict(again) == asdict(manifest)

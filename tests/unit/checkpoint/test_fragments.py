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
    EntrySpec,
    Fragment,
    check_same_entries,
    copy_to_host,
    fragments_to_write,
    merge_index,
    read_fragments,
    whole,
    write_fragments,
)
from jmvae_dist.checkpoint.layout import CheckpointManifest, FileRecord
from jmvae_dist.checkpoint.live_state import live_state, optimizer_record, restore_steps
from jmvae_dist.distributed.engine import Engine
from jmvae_dist.errors import CheckpointError
from jmvae_dist.training.optimizer import GuardedAdamW

SHAPES = st.lists(st.lists(st.integers(0, 7), min_size=0, max_size=3), min_size=1, max_size=8)


def make_manifest(**changes: object) -> CheckpointManifest:
    empty: dict = {"versions": {}, "model": {}, "modalities": {}, "config": {}, "data_state": {}, "tracking": {}}
    fields = {"global_step": 3, "engine": "ddp", "world_size": 1, "optimizer": {}, "elapsed_s": 0.0, "created": ""}
    fields.update(guards={}, passed_over=[])
    return CheckpointManifest(**{**empty, **fields, **changes})


def specs_of(entries: dict[str, torch.Tensor]) -> dict[str, EntrySpec]:
    return {name: EntrySpec(tuple(tensor.shape), tensor.dtype) for name, tensor in entries.items()}


def wholes(entries: dict[str, torch.Tensor]) -> list[Fragment]:
    return [whole(name, tensor) for name, tensor in entries.items()]


@given(shapes=SHAPES, world_size=st.integers(1, 9))
def test_ranks_cut_replicated_entries_into_equal_disjoint_parts(shapes: list[list[int]], world_size: int) -> None:
    entries = {f"weight/{number}": torch.randn(shape) for number, shape in enumerate(shapes)}
    total = sum(tensor.numel() for tensor in entries.values())
    covered = {name: torch.zeros(tensor.numel(), dtype=torch.int64) for name, tensor in entries.items()}
    for rank in range(world_size):
        fragments = fragments_to_write(wholes(entries), rank, world_size)
        for fragment in fragments:
            stop = fragment.start + fragment.values.numel()
            covered[fragment.name][fragment.start : stop] += 1
            assert torch.equal(entries[fragment.name].reshape(-1)[fragment.start : stop], fragment.values)
        size = sum(fragment.values.numel() for fragment in fragments)
        assert abs(size - total / world_size) < 1
    assert all(bool((count == 1).all()) for count in covered.values())


def test_what_a_rank_alone_holds_it_writes_entirely() -> None:
    own = Fragment("weight/own", 7, torch.arange(5.0))
    for rank in range(2):
        written = fragments_to_write([own, whole("weight/shared", torch.arange(4.0))], rank, 2)
        assert written[0] == own
        assert [(part.start, part.values.numel()) for part in written[1:]] == [(2 * rank, 2)]


def cut(entries: dict[str, torch.Tensor], cuts: list[float]) -> list[list[Fragment]]:
    """Every entry cut at the same fractions: an owner's part for each of len(cuts) + 1 ranks."""
    ranks: list[list[Fragment]] = [[] for _ in range(len(cuts) + 1)]
    for name, tensor in entries.items():
        bounds = [0, *(round(tensor.numel() * fraction) for fraction in sorted(cuts)), tensor.numel()]
        for rank, fragments in enumerate(ranks):
            if bounds[rank] < bounds[rank + 1]:
                values = tensor.view(-1)[bounds[rank] : bounds[rank + 1]]
                fragments.append(Fragment(name, bounds[rank], values))
    return ranks


CUTS = st.lists(st.floats(0, 1), max_size=4)


@settings(max_examples=40)
@given(shapes=SHAPES, writers=CUTS, readers=CUTS, dtype=st.sampled_from([torch.float32, torch.float64, torch.int64]))
def test_any_ranks_read_what_any_other_ranks_wrote(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[list[int]],
    writers: list[float],
    readers: list[float],
    dtype: torch.dtype,
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    entries = {f"weight/{number}": torch.randn(shape).mul(100).to(dtype) for number, shape in enumerate(shapes)}
    parts = cut(entries, writers)
    indexes = [
        write_fragments(folder / f"rank-{rank:05d}.safetensors", copy_to_host(fragments))
        for rank, fragments in enumerate(parts)
    ]
    files = {f"rank-{rank:05d}.safetensors": FileRecord(0, "") for rank in range(len(parts))}
    manifest = make_manifest(tensors=merge_index(specs_of(entries), indexes), files=files)
    manifest = CheckpointManifest.from_json(manifest.to_json(), folder)
    read = {name: torch.zeros_like(tensor) for name, tensor in entries.items()}
    for fragments in cut(read, readers):
        read_fragments(folder, manifest, fragments)
    assert all(torch.equal(entries[name], read[name]) for name in entries)


def test_overlapping_or_missing_fragments_are_noticed(tmp_path: Path) -> None:
    entries = {"weight/a": torch.arange(10.0)}
    first = write_fragments(tmp_path / "rank-00000.safetensors", fragments_to_write(wholes(entries), 0, 2))
    with pytest.raises(AssertionError, match="5 elements written"):
        merge_index(specs_of(entries), [first])
    with pytest.raises(AssertionError, match="overlap"):
        merge_index(specs_of(entries), [first, first])


class PlainEngine(Engine):
    """A model and its optimizer on one process, without Accelerate."""

    name = "ddp"

    def forward(self, **inputs: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.model(inputs["batch"]).square().sum(), {}

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        assert isinstance(self.optimizer, GuardedAdamW)
        self.optimizer.is_sound = torch.tensor(True)
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_engine(seed: int, fused: bool) -> PlainEngine:
    """A small module with a frozen parameter and a buffer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model[0].bias.requires_grad_(False)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trainable[:2], "weight_decay": 0.1}, {"params": trainable[2:], "weight_decay": 0.0}]
    return PlainEngine(model, GuardedAdamW(groups, lr=0.1, fused=fused))


@pytest.mark.parametrize("fused", [False, True])
def test_a_fresh_engine_continues_exactly(tmp_path: Path, fused: bool) -> None:
    source, target = make_engine(seed=0, fused=fused), make_engine(seed=1, fused=fused)
    batches = torch.randn(4, 8, 3)
    for batch in batches[:2]:
        source.forward_backward(1.0, True, batch=batch)
        source.step()
    state = live_state(source, rank=0)
    assert {name.split("/")[0] for name in state.specs} == {"weight", "buffer", "exp_avg", "exp_avg_sq"}
    assert "exp_avg/0.bias" not in state.specs
    index = write_fragments(tmp_path / "rank-00000.safetensors", fragments_to_write(state.fragments, 0, 1))
    manifest = make_manifest(
        tensors=merge_index(state.specs, [index]),
        files={"rank-00000.safetensors": FileRecord(0, "")},
        optimizer=optimizer_record(source, state),
    )
    manifest = CheckpointManifest.from_json(manifest.to_json(), tmp_path)
    assert [group["parameters"] for group in manifest.optimizer["groups"]] == source.group_parameters
    assert [group["options"]["weight_decay"] for group in manifest.optimizer["groups"]] == [0.1, 0.0]
    fresh = live_state(target, rank=0)
    read_fragments(tmp_path, manifest, fresh.fragments)
    restore_steps(target, fresh, manifest.optimizer)
    for batch in batches[2:]:
        for engine in (source, target):
            engine.forward_backward(1.0, True, batch=batch)
            engine.step()
    states = zip(source.model.state_dict().items(), target.model.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(value, copy) for (name, value), (other, copy) in states)


def test_step_counts_that_an_engine_cannot_keep_apart_are_refused() -> None:
    engine = make_engine(seed=0, fused=False)
    state = live_state(engine, rank=0)
    record = optimizer_record(engine, state)
    record["steps"]["2.bias"] = 3.0
    flat = state.owners["0.weight"]
    state.owners = dict.fromkeys(state.owners, flat)
    with pytest.raises(CheckpointError, match=r"one step count for parameters that have taken \[0.0, 3.0\] steps"):
        restore_steps(engine, state, record)


def test_another_model_is_refused() -> None:
    specs = live_state(make_engine(seed=0, fused=False), rank=0).specs
    everything = [whole(name, torch.zeros(spec.shape, dtype=spec.dtype)) for name, spec in specs.items()]
    index = {part.name: record for part, record in zip(everything, _records(everything), strict=True)}
    manifest = make_manifest(tensors=merge_index(specs, [index]))
    check_same_entries(specs, manifest, Path("here"))
    other = EntrySpec((9,), torch.float32)
    with pytest.raises(CheckpointError, match=r"weight/0.weight is float32 \[9\] here and float32 \[4, 3\] there"):
        check_same_entries({**specs, "weight/0.weight": other}, manifest, Path("here"))
    double = EntrySpec((4, 3), torch.float64)
    with pytest.raises(CheckpointError, match=r"weight/0.weight is float64 \[4, 3\] here"):
        check_same_entries({**specs, "weight/0.weight": double}, manifest, Path("here"))
    with pytest.raises(CheckpointError, match="weight/new is missing there"):
        check_same_entries({**specs, "weight/new": other}, manifest, Path("here"))
    without = {name: spec for name, spec in specs.items() if name != "weight/2.bias"}
    with pytest.raises(CheckpointError, match=r"weight/2.bias is unknown here"):
        check_same_entries(without, manifest, Path("here"))


def _records(fragments: list) -> list:
    from jmvae_dist.checkpoint.layout import FragmentRecord

    return [FragmentRecord("rank-00000.safetensors", part.start, part.values.numel()) for part in fragments]


def test_file_records_survive_json() -> None:
    files = {"rank-00000.safetensors": FileRecord(12, "ab" * 32)}
    manifest = make_manifest(files=files)
    again = CheckpointManifest.from_json(manifest.to_json(), Path("here"))
    assert asdict(again) == asdict(manifest)

"""The pieces of a checkpoint: which ranges of which tensors a rank writes, and which it reads.

An entry is one tensor of the training state, flattened: `weight/NAME`, `buffer/NAME`, and the optimizer's moments
`exp_avg/NAME`, `exp_avg_sq/NAME`. A fragment is a range of an entry. Ranks write disjoint fragments that cover
every entry, and read whatever ranges they need: nothing in the format depends on the engine or the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jmvae_dist.checkpoint.layout import CheckpointManifest, FragmentRecord, TensorRecord, shown
from jmvae_dist.errors import CheckpointError


@dataclass(frozen=True)
class EntrySpec:
    """Shape and dtype of a whole entry."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Fragment:
    """A range of an entry, as a one-dimensional view on the live tensor.

    Args:
        name: The entry's name.
        start: First element within the flattened entry.
        values: The elements.
        is_replicated: Whether every rank holds these elements, so that any one of them may write them.
    """

    name: str
    start: int
    values: Tensor
    is_replicated: bool = False


def whole(name: str, tensor: Tensor) -> Fragment:
    """All of an entry that every rank holds."""
    return Fragment(name, 0, tensor.detach().view(-1), is_replicated=True)


def fragments_to_write(fragments: Iterable[Fragment], rank: int, world_size: int) -> list[Fragment]:
    """What `rank` writes of the fragments it holds.

    Its own ones entirely. The replicated ones are laid end to end and cut into `world_size` equal pieces: every
    rank writes equally much, and the number of pieces stays near the number of entries.
    """
    fragments = list(fragments)
    total = sum(fragment.values.numel() for fragment in fragments if fragment.is_replicated)
    begin, end = total * rank // world_size, total * (rank + 1) // world_size
    chosen, offset = [], 0
    for fragment in fragments:
        if not fragment.is_replicated:
            chosen.append(fragment)
            continue
        numel = fragment.values.numel()
        start, stop = max(begin - offset, 0), min(end - offset, numel)
        if start < stop:
            chosen.append(Fragment(fragment.name, fragment.start + start, fragment.values[start:stop]))
        offset += numel
    return chosen


def copy_to_host(fragments: Iterable[Fragment]) -> list[Fragment]:
    """The fragments with values of their own in host memory, which training may no longer change."""
    return [Fragment(fragment.name, fragment.start, fragment.values.to("cpu", copy=True)) for fragment in fragments]


def write_fragments(path: Path, fragments: Iterable[Fragment]) -> dict[str, FragmentRecord]:
    """Write one rank's fragments as a safetensors file; returns the entry of each for the index."""
    from safetensors.torch import save_file

    fragments = list(fragments)
    save_file({fragment.name: fragment.values.cpu().contiguous() for fragment in fragments}, path)
    return {
        fragment.name: FragmentRecord(path.name, fragment.start, fragment.values.numel()) for fragment in fragments
    }


def merge_index(
    specs: Mapping[str, EntrySpec], indexes: Iterable[Mapping[str, FragmentRecord]]
) -> dict[str, TensorRecord]:
    """The index over all ranks' files; asserts that the fragments cover every entry exactly once."""
    tensors = {name: TensorRecord(list(spec.shape), _dtype_name(spec.dtype), []) for name, spec in specs.items()}
    for index in indexes:
        for name, record in index.items():
            tensors[name].fragments.append(record)
    for name, tensor_record in tensors.items():
        tensor_record.fragments.sort(key=lambda fragment: fragment.start)
        covered = 0
        for fragment in tensor_record.fragments:
            assert fragment.start == covered, f"{name}: fragments overlap or leave a gap at {covered}"
            covered += fragment.numel
        assert covered == math.prod(tensor_record.shape), f"{name}: {covered} elements written"
    return tensors


def check_same_entries(specs: Mapping[str, EntrySpec], manifest: CheckpointManifest, where: Path) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        CheckpointError: Names, shapes or dtypes of tensors differ.
    """
    missing = [name for name in specs if name not in manifest.tensors]
    unknown = [name for name in manifest.tensors if name not in specs]
    shapes = []
    for name, spec in specs.items():
        record = manifest.tensors.get(name)
        if record is not None and (list(spec.shape), _dtype_name(spec.dtype)) != (record.shape, record.dtype):
            here, there = f"{_dtype_name(spec.dtype)} {list(spec.shape)}", shown(f"{record.dtype} {record.shape}")
            shapes.append(f"{name} is {here} here and {there} there")
    if missing or unknown or shapes:
        names = [f"{name} is missing there" for name in missing] + [
            f"{shown(name)} is unknown here" for name in unknown
        ]
        raise CheckpointError(
            f"{where}: the checkpoint is that of another model ({(shapes + names)[0]}; {len(shapes)} shapes differ, "
            f"{len(missing)} tensors are missing, {len(unknown)} unknown); restore the model section of the "
            "configuration, or choose a new output_dir"
        )


@torch.no_grad()
def read_fragments(checkpoint: Path, manifest: CheckpointManifest, fragments: Iterable[Fragment]) -> None:
    """Fill live tensors, in place, with the values of a verified checkpoint; reads only the ranges needed.

    Raises:
        CheckpointError: A file does not hold what the index says.
    """
    from safetensors import SafetensorError, safe_open

    wanted: dict[str, list[tuple[Fragment, FragmentRecord]]] = {}
    for fragment in fragments:
        for record in manifest.tensors[fragment.name].fragments:
            if max(fragment.start, record.start) < min(_stop(fragment), record.start + record.numel):
                wanted.setdefault(record.file, []).append((fragment, record))
    for file_name, pairs in wanted.items():
        try:
            with safe_open(checkpoint / file_name, framework="pt") as file:
                for fragment, record in pairs:
                    _read_range(file, fragment, record, checkpoint / file_name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{checkpoint / file_name}: {error}") from None


def _read_range(file: Any, fragment: Fragment, record: FragmentRecord, where: Path) -> None:
    stored = file.get_slice(fragment.name)
    if stored.get_shape() != [record.numel]:
        raise CheckpointError(f"{where}: {fragment.name} has shape {stored.get_shape()}, not what the index says")
    start, stop = max(fragment.start, record.start), min(_stop(fragment), record.start + record.numel)
    values = stored[start - record.start : stop - record.start]
    if values.dtype != fragment.values.dtype:
        raise CheckpointError(f"{where}: {fragment.name} is {values.dtype}, not what the index says")
    fragment.values[start - fragment.start : stop - fragment.start].copy_(values)


def _stop(fragment: Fragment) -> int:
    return fragment.start + fragment.values.numel()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""The training state as named flat tensors, and which part of them a rank writes.

An entry is one tensor of the state, flattened: `weight/NAME`, `buffer/NAME`, and the optimizer's moments
`exp_avg/NAME`, `exp_avg_sq/NAME`. A fragment is a range of an entry. Ranks write disjoint fragments that cover
every entry, and read whatever ranges they need: nothing in the format depends on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jmvae_dist.checkpoint.layout import CheckpointManifest, FragmentRecord, TensorRecord
from jmvae_dist.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A range of an entry, as a view on the live tensor."""

    name: str
    start: int
    values: Tensor


def create_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the state that torch's AdamW would create at its first step, so that it can be read into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if parameter.requires_grad and not state:
                # A fused optimizer keeps its step counter beside the parameter; the others keep it on the host.
                device = parameter.device if group.get("fused") else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                for moment in MOMENTS:
                    state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def replicated_entries(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The entries of an engine that holds the whole state on every rank (one process, or DDP).

    Returns:
        Name -> live tensor, in an order that is the same on every rank. `create_optimizer_state` comes first.
    """
    entries: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        entries[f"weight/{name}"] = parameter.detach()
    for name, buffer in model.named_buffers():
        entries[f"buffer/{name}"] = buffer
    for name, parameter in model.named_parameters():
        for moment in MOMENTS:
            if moment in optimizer.state[parameter]:
                entries[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    return entries


def own_fragments(entries: dict[str, Tensor], rank: int, world_size: int) -> list[Fragment]:
    """The fragments that `rank` writes when all ranks hold all entries.

    The entries are laid end to end and cut into `world_size` equal pieces: every rank writes equally much, and
    the number of fragments stays near the number of entries.
    """
    total = sum(tensor.numel() for tensor in entries.values())
    begin, end = total * rank // world_size, total * (rank + 1) // world_size
    fragments, offset = [], 0
    for name, tensor in entries.items():
        start = max(begin - offset, 0)
        stop = min(end - offset, tensor.numel())
        if start < stop:
            fragments.append(Fragment(name, start, tensor.reshape(-1)[start:stop]))
        offset += tensor.numel()
    return fragments


def write_fragments(path: Path, fragments: Iterable[Fragment]) -> dict[str, FragmentRecord]:
    """Write one rank's fragments as a safetensors file; returns the entry of each for the index."""
    from safetensors.torch import save_file

    tensors = {fragment.name: fragment.values.cpu().contiguous() for fragment in fragments}
    save_file(tensors, path)
    return {
        fragment.name: FragmentRecord(path.name, fragment.start, fragment.values.numel()) for fragment in fragments
    }


def merge_index(entries: dict[str, Tensor], indexes: Iterable[dict[str, FragmentRecord]]) -> dict[str, TensorRecord]:
    """The index over all ranks' files; asserts that the fragments cover every entry exactly once."""
    tensors = {
        name: TensorRecord(list(tensor.shape), str(tensor.dtype).removeprefix("torch."), [])
        for name, tensor in entries.items()
    }
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


def check_same_entries(entries: dict[str, Tensor], manifest: CheckpointManifest, where: Path) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        CheckpointError: Names or shapes of tensors differ.
    """
    missing = [name for name in entries if name not in manifest.tensors]
    unknown = [name for name in manifest.tensors if name not in entries]
    shapes = [
        f"{name} is {list(tensor.shape)} here and {manifest.tensors[name].shape} there"
        for name, tensor in entries.items()
        if name in manifest.tensors and list(tensor.shape) != manifest.tensors[name].shape
    ]
    if missing or unknown or shapes:
        names = [f"{name} is missing there" for name in missing] + [f"{name} is unknown here" for name in unknown]
        raise CheckpointError(
            f"{where}: the checkpoint is that of another model ({(shapes + names)[0]}; {len(shapes)} shapes differ, "
            f"{len(missing)} tensors are missing, {len(unknown)} unknown); restore the model section of the "
            "configuration, or choose a new output_dir"
        )


@torch.no_grad()
def read_entries(checkpoint: Path, manifest: CheckpointManifest, entries: dict[str, Tensor]) -> None:
    """Fill live tensors, in place, with the values of a verified checkpoint.

    Raises:
        CheckpointError: A file does not hold what the index says.
    """
    from safetensors import SafetensorError, safe_open

    by_file: dict[str, list[tuple[str, FragmentRecord]]] = {}
    for name in entries:
        for fragment in manifest.tensors[name].fragments:
            by_file.setdefault(fragment.file, []).append((name, fragment))
    for file_name, wanted in by_file.items():
        try:
            with safe_open(checkpoint / file_name, framework="pt") as file:
                for name, fragment in wanted:
                    values = file.get_tensor(name)
                    target = entries[name].view(-1)[fragment.start : fragment.start + fragment.numel]
                    if values.shape != target.shape or values.dtype != target.dtype:
                        found = f"{values.dtype} {list(values.shape)}"
                        raise CheckpointError(f"{checkpoint / file_name}: {name} is {found}, not what the index says")
                    target.copy_(values)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{checkpoint / file_name}: {error}") from None


def optimizer_record(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Parameter groups by parameter name, and each parameter's step count, as JSON values."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key != "params"}
        groups.append({"parameters": [names[id(parameter)] for parameter in group["params"]], "options": options})
    steps = {
        name: float(optimizer.state[parameter]["step"])
        for name, parameter in model.named_parameters()
        if "step" in optimizer.state[parameter]
    }
    return {"groups": groups, "steps": steps}


def restore_steps(model: nn.Module, optimizer: torch.optim.Optimizer, record: dict[str, Any]) -> None:
    """Set every parameter's step count. Options of the groups come from the configuration, not from here."""
    for name, parameter in model.named_parameters():
        if name in record["steps"]:
            optimizer.state[parameter]["step"].fill_(record["steps"][name])

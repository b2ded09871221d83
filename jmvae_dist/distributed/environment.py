"""Who am I: rank and world size as the launcher set them, read before any process group exists."""

from __future__ import annotations

import os
from dataclasses import dataclass

from jmvae_dist.errors import LaunchError


@dataclass(frozen=True)
class ProcessInfo:
    """This process among those of the run."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str  # "torchrun" (also accelerate launch, which sets the same variables) or "single"


def detect_process(environment: dict[str, str] | None = None) -> ProcessInfo:
    """Read the launcher's variables.

    Raises:
        LaunchError: Some of torchrun's variables are missing or not numbers, or Slurm started several tasks that
            would each train alone.
    """
    variables = dict(os.environ) if environment is None else environment
    if "RANK" in variables or "WORLD_SIZE" in variables:
        rank, world_size, local_rank = (_integer(variables, n) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if not 0 <= rank < world_size:
            raise LaunchError(f"RANK={rank} does not lie in 0..WORLD_SIZE-1 with WORLD_SIZE={world_size}")
        return ProcessInfo(rank, world_size, local_rank, "torchrun")
    num_tasks = variables.get("SLURM_NTASKS", "1")
    if num_tasks != "1":
        raise LaunchError(
            f"Slurm has SLURM_NTASKS={num_tasks} tasks, but RANK and WORLD_SIZE are not set, so each task would "
            "train alone; start one torchrun per node, or unset SLURM_NTASKS for a run with one process"
        )
    return ProcessInfo(rank=0, world_size=1, local_rank=0, launcher="single")


def _integer(variables: dict[str, str], name: str) -> int:
    value = variables.get(name)
    if value is None or not value.isdigit():
        raise LaunchError(
            f"{name}={value!r}: the launcher must set RANK, WORLD_SIZE and LOCAL_RANK to numbers "
            "(torchrun and accelerate launch do)"
        )
    return int(value)

"""Rank and world size from the launcher's variables."""

from __future__ import annotations

import pytest

from jmvae_dist.distributed.environment import ProcessInfo, detect_process
from jmvae_dist.errors import LaunchError


def test_single_process() -> None:
    assert detect_process({}) == ProcessInfo(rank=0, world_size=1, local_rank=0, launcher="single")
    assert detect_process({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).world_size == 1


def test_torchrun() -> None:
    variables = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_NTASKS": "2"}
    assert detect_process(variables) == ProcessInfo(rank=3, world_size=8, local_rank=1, launcher="torchrun")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, "WORLD_SIZE='two'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, "each task would train alone"),
    ],
)
def test_half_set_launchers_are_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        detect_process(variables)

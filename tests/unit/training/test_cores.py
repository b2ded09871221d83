"""Which CPUs a node's processes have together, and whether one is left."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.training import cores
from jmvae_dist.training.cores import has_spare_core, usable_cores


def test_a_quota_counts_where_it_is_less_than_the_cores() -> None:
    assert usable_cores([[0, 1], [1, 2]], [None, None]) == 3
    assert usable_cores([[0, 1], [1, 2]], [None, 2.5]) == 2.5


class _TwoRanks(Collectives):
    """Ranks of which the other one says what a test wants."""

    def __init__(self, other: dict[str, Any]) -> None:
        super().__init__()
        self._other = other

    def gather(self, value: Any) -> list[Any]:
        return [value, {**value, **self._other}]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"host": "another node", "threads": 64}, True),
        ({"threads": 1}, True),  # 3 of 4
        ({"threads": 2}, False),
        ({"threads": 2, "cores": [4, 5]}, True),  # bound to cores of its own
        ({"threads": 1, "quota": 3.0}, False),
    ],
)
def test_all_ranks_of_the_node_count(other: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)
    assert socket.gethostname() != "another node"
    assert has_spare_core(_TwoRanks(other), threads=2) == expected

"""How many CPUs the processes of a node may use: by their affinity, and by the quota of their container."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jmvae_dist.distributed.collectives import Collectives

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def cpu_quota() -> float | None:
    """CPUs that a container may use, where it has a limit; its cores do not show it."""
    try:
        limit, period = _CPU_QUOTA.read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def usable_cores(cores: Iterable[Iterable[int]], quotas: Iterable[float | None]) -> float:
    """CPUs that processes of one node may use together.

    Args:
        cores: Numbers of the cores that each may run on.
        quotas: What `cpu_quota` says to each.
    """
    return min([len(set().union(*cores)), *(quota for quota in quotas if quota is not None)])


def has_spare_core(collectives: Collectives, threads: int) -> bool:
    """Whether the processes of this node leave a CPU without a thread that computes; called by all ranks.

    Args:
        collectives: Of all ranks.
        threads: That take part in an operation of this process.
    """
    host = socket.gethostname()
    own: dict[str, Any] = {
        "host": host,
        "cores": sorted(os.sched_getaffinity(0)),
        "quota": cpu_quota(),
        "threads": threads,
    }
    node = [rank for rank in collectives.gather(own) if rank["host"] == host]
    cores = usable_cores((rank["cores"] for rank in node), (rank["quota"] for rank in node))
    return bool(sum(rank["threads"] for rank in node) < cores)

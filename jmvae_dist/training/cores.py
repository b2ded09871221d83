"""How many CPUs the processes of a node may use: by their affinity, and by the quota of their container."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

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

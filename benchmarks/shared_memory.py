"""A prototype: the sum over the ranks of one machine through shared memory, to see what it would bring."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import torch
from torch import Tensor

from jmvae_dist.distributed.runtime import Runtime


class SharedMemoryReduction:
    """All-reduce of float32 between processes that see the same /dev/shm.

    Every rank publishes what the others add up, adds up its own share of the elements in the order of ranks, and
    publishes that: the traffic of reduce-scatter and all-gather, as plain copies. Ranks wait for each other by
    spinning on counters, which relies on stores becoming visible in order, as on x86.

    Args:
        runtime: The ranks.
        num_elements: Largest size of a sum.
    """

    def __init__(self, runtime: Runtime, num_elements: int) -> None:
        self._rank, self._world_size = runtime.process.rank, runtime.process.world_size
        path = runtime.collectives.broadcast(f"/dev/shm/jmvae-dist-reduction-{os.getpid()}")
        size = num_elements * (self._world_size + 1)
        self._published = torch.from_file(path, shared=True, size=size).view(self._world_size + 1, num_elements)
        self._counters = torch.from_file(f"{path}-counters", shared=True, size=self._world_size, dtype=torch.int64)
        self._counters[self._rank] = self._count = 0
        runtime.collectives.gather(None)  # all ranks have mapped both
        if self._rank == 0:
            for file in (path, f"{path}-counters"):
                Path(file).unlink()
        self._values = self._counters.numpy()

    def all_reduce(self, values: Tensor) -> None:
        """Replace a flat tensor by its sum over ranks."""
        size = len(values)
        bounds = [size * rank // self._world_size for rank in range(self._world_size + 1)]
        shares = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
        for rank, share in enumerate(shares):
            if rank != self._rank:
                self._published[self._rank, share].copy_(values[share])
        self._wait()
        own, total = shares[self._rank], self._published[-1, shares[self._rank]]
        parts = [
            values[own] if rank == self._rank else self._published[rank, own] for rank in range(self._world_size)
        ]
        torch.add(parts[0], parts[1], out=total)
        for part in parts[2:]:
            total.add_(part)
        self._wait()
        # The next sums are written only after all ranks have met again, that is after this copy.
        values.copy_(self._published[-1, :size])

    def _wait(self) -> None:
        self._count += 1
        self._values[self._rank] = self._count
        while self._values.min() < self._count:
            os.sched_yield()

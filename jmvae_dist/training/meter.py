"""Throughput, waiting and memory between two records."""

from __future__ import annotations

import time

import psutil
import torch


class Meter:
    """Measures training steps only: evaluations and checkpoints between them are left out of the rate.

    Args:
        global_batch_size: Samples per step over all ranks.
    """

    def __init__(self, global_batch_size: int) -> None:
        self._global_batch_size = global_batch_size
        self._process = psutil.Process()
        self._reset()
        self.resume()

    def resume(self) -> None:
        """Begin a step, or go on after something that is not one."""
        self._mark_s = time.perf_counter()

    def batch_arrived(self) -> None:
        """The batch of the step is here: what passed since `resume` was waiting."""
        now = time.perf_counter()
        self._waited_s += now - self._mark_s
        self._busy_s += now - self._mark_s
        self._mark_s = now

    def step_taken(self) -> None:
        """The step is done (on a GPU: queued)."""
        now = time.perf_counter()
        self._busy_s += now - self._mark_s
        self._mark_s = now
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Values since the last reading, of this process; starts anew."""
        # Reading the metrics back has just waited for the device: that time belongs to the steps.
        self._busy_s += time.perf_counter() - self._mark_s
        busy_s = max(self._busy_s, 1e-9)
        values: dict[str, float] = {
            "speed/samples_per_s": self._steps * self._global_batch_size / busy_s,
            "speed/data_wait_fraction": self._waited_s / busy_s,
            "memory/rss_bytes": self._process.memory_info().rss,
        }
        if torch.cuda.is_available():
            values["memory/device_bytes"] = torch.cuda.max_memory_allocated()
        self._reset()
        self.resume()
        return values

    def _reset(self) -> None:
        self._steps, self._busy_s, self._waited_s = 0, 0.0, 0.0

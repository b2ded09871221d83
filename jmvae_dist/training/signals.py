"""Requests to stop or to checkpoint, and how all ranks come to act on them at the same step."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from jmvae_dist.distributed.collectives import Collectives

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_REPEAT_S = 2.0


class StopSignals:
    """While active, the stop signals set a flag instead of ending the process.

    A second SIGINT gives up at once, for someone at a keyboard who does not want to wait for the checkpoint.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_s = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # A terminal's Ctrl-C reaches this process twice at once, also through torchrun, which passes it on.
        is_new = time.monotonic() - self._received_s > _REPEAT_S
        if number == signal.SIGINT and self.received == "SIGINT" and is_new:
            raise KeyboardInterrupt
        self.received, self._received_s = signal.Signals(number).name, time.monotonic()


class Requests:
    """What all ranks agreed to do after a step: the maximum of what each one asked for a step earlier.

    The maximum is taken asynchronously, over one step, so that no step waits for it. Every rank calls `poll` once
    per step and thus learns of a request at the same step.

    Args:
        collectives: Agreement between ranks.
        signals: This process's stop flag.
        checkpoint_every_s: Rank 0 asks for a checkpoint after this many seconds; None never.
    """

    def __init__(self, collectives: Collectives, signals: StopSignals, checkpoint_every_s: float | None) -> None:
        self._collectives = collectives
        self._signals = signals
        self._checkpoint_every_s = checkpoint_every_s
        self._last_checkpoint_s = time.monotonic()
        self._flags = torch.zeros(2, dtype=torch.int32)
        self._pending: dist.Work | None = None

    def poll(self) -> tuple[bool, bool]:
        """(stop, checkpoint), equal on all ranks."""
        if self._pending is not None:
            self._pending.wait()
        stop, checkpoint = bool(self._flags[0]), bool(self._flags[1])
        self._flags = torch.tensor([self._signals.received is not None, self._is_checkpoint_due()]).int()
        self._pending = self._collectives.start_maximum(self._flags)
        return stop, checkpoint

    def checkpoint_written(self) -> None:
        """Start the clock of the time-based cadence anew."""
        self._last_checkpoint_s = time.monotonic()

    def close(self) -> None:
        """Finish the collective that is still under way, so that the next one on the group cannot meet it."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def _is_checkpoint_due(self) -> bool:
        if self._checkpoint_every_s is None or self._collectives.rank != 0:
            return False
        return time.monotonic() - self._last_checkpoint_s >= self._checkpoint_every_s

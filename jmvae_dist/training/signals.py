"""The signals that ask a process to stop. Light, so that they can be heeded before anything heavy is imported."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

from jmvae_dist.errors import StopRequested

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_REPEAT_S = 2.0


class StopSignals:
    """While active, SIGUSR1, and from `catch_all` on SIGTERM and SIGINT, set a flag instead of ending the process.

    A SIGINT after another signal gives up at once, for someone who does not want to wait for the checkpoint.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_s = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._catch(signal.SIGUSR1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def catch_all(self) -> None:
        """Heed all stop signals from now on.

        Not before the ranks are about to meet: until then there is nothing to save, and SIGTERM is how launchers
        end the ranks of one that has found a mistake.
        """
        for number in STOP_SIGNALS:
            self._catch(number)

    def _catch(self, number: signal.Signals) -> None:
        previous = signal.signal(number, self._receive)
        self._previous.setdefault(number, previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_s = signal.Signals(number).name, time.monotonic()
        # A terminal's Ctrl-C reaches this process twice at once, also through torchrun, which passes it on.
        elif number == signal.SIGINT and time.monotonic() - self._received_s > _REPEAT_S:
            raise KeyboardInterrupt

    def raise_if_received(self) -> None:
        """For work that has no steps to finish.

        Raises:
            StopRequested: A stop signal has come.
        """
        if self.received is not None:
            raise StopRequested(f"{self.received} received")

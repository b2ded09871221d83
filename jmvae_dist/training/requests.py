"""Requests to stop or to checkpoint, and how all ranks come to act on them at the same step."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.errors import is_on_all_ranks
from jmvae_dist.training.signals import StopSignals

_LOOK_INTERVAL_S = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Agreement:
    """What all ranks do after a step."""

    stop: bool
    checkpoint: bool
    failure: bool
    is_writing: bool  # some rank was still writing the checkpoint that was begun


class Requests:
    """What all ranks agreed to do after a step: the union of what each one asked for a step earlier.

    It is found asynchronously, over one step, so that no step waits for it. Every rank calls `poll` once per step
    and thus learns of a request at the same step. It is entered while steps are taken, and again after a rewind,
    which a request for a checkpoint outlives.

    Args:
        collectives: Agreement between ranks.
        signals: This process's stop flag.
        checkpoint_every_s: Rank 0 asks for a checkpoint after this many seconds; None never.
        checkpoint_file: Rank 0 also asks for one when this file appears, and then removes it.
    """

    def __init__(
        self,
        collectives: Collectives,
        signals: StopSignals,
        checkpoint_every_s: float | None,
        checkpoint_file: Path,
    ) -> None:
        self._collectives = collectives
        self._signals = signals
        self._checkpoint_every_s = checkpoint_every_s
        self._checkpoint_file = checkpoint_file
        self._looked_s = -_LOOK_INTERVAL_S
        self._flags = torch.zeros(4, dtype=torch.int32)
        self._pending: dist.Work | None = None
        self._last_checkpoint_s = 0.0  # until it is entered
        self._is_outdated = False

    def __enter__(self) -> Requests:
        self._last_checkpoint_s = time.monotonic()
        # The file is gone already, and a rewind may have set aside the checkpoint that was begun since. All else
        # was about batches and files before the rewind, or is said again.
        _, checkpoint, _, _ = self._flags.tolist()
        self._flags = torch.tensor((0, checkpoint, 0, 0)).int()
        self._is_outdated = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An exchange is still under way: finish it if the others do, so that nobody ends in the middle of it.
        if self._pending is not None and (error is None or is_on_all_ranks(error)):
            self._pending.wait()
            self._pending = None

    def poll(self, failure: bool, is_writing: bool) -> Agreement:
        """The agreement on what was asked for at the previous call; equal on all ranks.

        Args:
            failure: Whether this rank knows that it will have no batch two steps from now.
            is_writing: Whether this rank still writes its file of a checkpoint.
        """
        if self._pending is not None:
            self._pending.wait()
        stop, checkpoint, failed, writing = self._flags.bool().tolist()
        agreement = Agreement(stop, checkpoint and not self._is_outdated, failed, writing or self._is_outdated)
        asks = (self._signals.received is not None, self._is_checkpoint_due(), failure, is_writing)
        self._flags = torch.tensor(asks).int()
        self._is_outdated = False
        self._pending = self._collectives.start_maximum(self._flags)
        return agreement

    def checkpoint_begun(self) -> None:
        """Start the clock of the time-based cadence anew, on all ranks after the same step."""
        self._last_checkpoint_s = time.monotonic()
        # What is under way was said before this checkpoint was begun: it must not cause a second one, and does not
        # tell who is still writing this one.
        self._is_outdated = True

    def _is_checkpoint_due(self) -> bool:
        if self._collectives.rank != 0:
            return False
        every_s = self._checkpoint_every_s
        is_late = every_s is not None and time.monotonic() - self._last_checkpoint_s >= every_s
        return is_late or self._was_file_found()

    def _was_file_found(self) -> bool:
        """Whether the user's request file was there; looked for once a second, as file systems may be slow."""
        if time.monotonic() - self._looked_s < _LOOK_INTERVAL_S:
            return False
        self._looked_s = time.monotonic()
        try:
            self._checkpoint_file.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            logger.warning("%s: cannot be removed (%s); the request is ignored", self._checkpoint_file, error)
            return False
        return True

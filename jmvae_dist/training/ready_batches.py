"""Batches as a step takes them: on the run's device and with their noise, usually made by a thread, one ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from jmvae_dist.data.loader import Batch
from jmvae_dist.distributed.single_thread import start_single_thread
from jmvae_dist.errors import DataError
from jmvae_dist.kernels.noise import normal_noise_of_steps
from jmvae_dist.training.batches import CheckedBatches
from jmvae_dist.training.device_copies import DeviceCopies, DeviceCopy
from jmvae_dist.training.setup import ResolvedRun

# The thread gets this long to end, more than downloads ahead of use get to end in it (`Prefetcher.stop`).
_STOP_S = 2.0
# Noise of small batches is drawn for several steps at once, up to so many rows: operations on few numbers take longer
# to begin than to compute.
_ROWS_OF_NOISE = 1024


@dataclass(frozen=True)
class ReadyBatch:
    """One rank's share of a global batch, on the run's device.

    Attributes:
        inputs: By modality, float32 (B, *shape).
        rows: int64 (B,): rows of the global batch.
        global_step: The training step.
        noise: Of the latent sample, float32 (B, latent_dim); None where the model computes it where it is used.
        copy: On CUDA, what has the tensors there.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    global_step: int
    noise: Tensor | None
    copy: DeviceCopy | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def await_copy(self) -> None:
        """See `DeviceCopy`; nothing to wait for on a CPU."""
        if self.copy is not None:
            self.copy.await_copy()

    def release(self) -> None:
        """See `DeviceCopy`; nothing to be released on a CPU."""
        if self.copy is not None:
            self.copy.release()


class Preparation:
    """Makes batches ready, in one thread at a time.

    Args:
        run: The resolved run.
        copies: What copies them to the GPU on which the run trains; None: it trains on a CPU.
    """

    def __init__(self, run: ResolvedRun, copies: DeviceCopies | None = None) -> None:
        self._seed = run.config.training.seed
        self._latent_dim = run.model_config.latent_dim
        self._copies = copies
        self._drawn_steps = range(0)
        self._drawn_rows_B = torch.empty(0, dtype=torch.int64)
        self._drawn_SBD = torch.empty(0)

    def __call__(self, batch: Batch) -> ReadyBatch:
        """The batch, on the device."""
        if self._copies is None:
            return ReadyBatch(batch.inputs, batch.rows, batch.global_step, self._noise_of(batch))
        copy = self._copies.copy(batch.inputs, batch.rows)
        # Without noise: CUDA kernels compute it where it is used.
        return ReadyBatch(copy.inputs, copy.rows, batch.global_step, None, copy)

    def _noise_of(self, batch: Batch) -> Tensor:
        """Keyed by step and row: whenever it is drawn, and for whatever part of the rows, it is the same."""
        step, rows_B = batch.global_step, batch.rows
        if step not in self._drawn_steps or not torch.equal(rows_B, self._drawn_rows_B):
            self._drawn_steps = range(step, step + max(1, _ROWS_OF_NOISE // max(1, len(rows_B))))
            self._drawn_rows_B = rows_B
            # In portions: what is computed on the way takes several times the memory of the noise.
            self._drawn_SBD = torch.cat(
                [
                    normal_noise_of_steps(self._seed, self._drawn_steps, part, self._latent_dim)
                    for part in rows_B.split(_ROWS_OF_NOISE)
                ],
                dim=1,
            )
        return self._drawn_SBD[step - self._drawn_steps.start]

    def device_chosen(self) -> AbstractContextManager[Any]:
        """What concerns the current GPU concerns the run's inside of this."""
        return nullcontext() if self._copies is None else self._copies.device_chosen()


@dataclass(frozen=True)
class _Outcome:
    """What came of asking for the next batch.

    Args:
        batch: None at the end, or after an error.
        failure, last_problem: Of `CheckedBatches`, when the batch came from there.
        error: That came instead.
    """

    batch: ReadyBatch | None
    failure: DataError | None = None
    last_problem: str | None = None
    error: BaseException | None = None


class ReadyBatches:
    """The batches of one rank, each made ready while the step before it is computed, if there is a thread for it.

    A thread takes the next one from `checked` as soon as the loop has taken one, and no earlier: reading is two steps
    ahead whenever a batch is handed out, so that a failure becomes known at the same step as without a thread, and
    just one more batch is held.

    Args:
        checked: The batches, on the host.
        prepare: Makes them ready.
        interrupt: Makes a read that is under way in another thread end early; None: work without a thread, each batch
            when it is asked for.

    Attributes:
        failure: What ends the run, once it is known.
        last_problem: What was wrong with the sample of this rank that was masked last.
    """

    def __init__(self, checked: CheckedBatches, prepare: Preparation, interrupt: Callable[[], None] | None) -> None:
        self.failure = checked.failure
        self.last_problem = checked.last_problem
        self._checked = checked
        self._arriving = iter(checked)
        self._prepare = prepare
        self._interrupt = interrupt
        # True: one more batch. False: no more.
        self._orders: SimpleQueue[bool] = SimpleQueue()
        self._outcomes: SimpleQueue[_Outcome] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._has_ended = False
        if interrupt is not None:
            # A daemon, for the case in which `close` leaves it behind.
            self._thread = start_single_thread(self._work, "jmvae-batches")
            self._orders.put(True)

    def __iter__(self) -> Iterator[ReadyBatch]:
        """The batches up to the failing one; all ranks stop before they reach it."""
        while not self._has_ended:
            outcome = self._next()
            self._has_ended = outcome.batch is None
            if outcome.error is not None:
                raise outcome.error
            self.failure, self.last_problem = outcome.failure, outcome.last_problem
            if outcome.batch is not None:
                outcome.batch.await_copy()
                yield outcome.batch

    def raise_failure(self) -> None:
        """Raise what was found, if anything."""
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """End the thread, and the loader's worker processes.

        A read under way ends with the next piece that a server sends. Where a server is silent, a network file system
        does not answer, or a large shard is hashed, nothing can make the thread return: after a while it is left
        behind, and ends when the call does. It is a daemon, as are the threads that it waits for: none of them keeps
        the process from ending.
        """
        if self._thread is None or self._interrupt is None:
            self._checked.close()
            return
        self._orders.put(False)
        self._interrupt()
        self._thread.join(_STOP_S)

    def _next(self) -> _Outcome:
        if self._thread is None:
            return self._make()
        outcome = self._outcomes.get()
        self._orders.put(outcome.batch is not None)
        return outcome

    def _make(self) -> _Outcome:
        try:
            # A thread begins with the first GPU, where page-locked memory would take up room on behalf of every rank.
            with self._prepare.device_chosen():
                batch = next(self._arriving, None)
                ready = None if batch is None else self._prepare(batch)
        except BaseException as error:  # whatever it is, the loop would wait for ever if it did not hear of it
            return _Outcome(None, error=error)
        return _Outcome(ready, self._checked.failure, self._checked.last_problem)

    def _work(self) -> None:
        try:
            while self._orders.get():
                self._outcomes.put(self._make())
        finally:
            self._checked.close()

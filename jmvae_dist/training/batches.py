"""Batches, checked on the host and fetched early enough for all ranks to learn of a failure together."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterator

from jmvae_dist.data.loader import Batch, check_batch
from jmvae_dist.errors import DataError
from jmvae_dist.model.inputs import check_values
from jmvae_dist.model.likelihoods import Likelihood
from jmvae_dist.training.setup import ResolvedRun

logger = logging.getLogger(__name__)

# A failure is announced after one step and known to all ranks after the next: the batch of the step after that is
# the first one that must not be missing.
STEPS_AHEAD = 2


# Bad samples that are logged one by one; then every so many.
_LOGGED_SINGLY = 10
_LOGGED_EVERY = 1000


class CheckedBatches:
    """The batches of one rank, fetched two steps ahead.

    A rank that cannot read a batch must not leave the others in the reduction of that step's gradients: it says so
    while it still has batches for the steps until all have heard of it.

    Args:
        batches: From the loader.
        run: The resolved run, to name the place of a bad sample, and what is to be done with it.
        likelihoods: By modality; each target must be in the support of its likelihood.
        lanes: The rank's lanes.

    Attributes:
        failure: What ends the run, once it is known.
        last_problem: What was wrong with the sample of this rank that was masked last.
    """

    def __init__(
        self,
        batches: Generator[Batch, None, None],
        run: ResolvedRun,
        likelihoods: dict[str, Likelihood],
        lanes: range,
    ) -> None:
        self.failure: DataError | None = None
        self.last_problem: str | None = None
        self._batches = batches
        self._run = run
        self._likelihoods = likelihoods
        self._lanes = lanes
        self._fetched: deque[Batch] = deque()
        self._num_masked = 0

    def fetch_ahead(self) -> None:
        """Have the next batch and those of the two steps after it; a failure is kept in `failure`."""
        while self.failure is None and len(self._fetched) <= STEPS_AHEAD:
            try:
                batch = next(self._batches, None)
                if batch is None:
                    return
                batch = self._checked(batch)
            except DataError as error:
                self.failure = error
                return
            self._report(batch)
            self._fetched.append(batch)

    def raise_failure(self) -> None:
        """Raise what was found, if anything."""
        if self.failure is not None:
            raise self.failure

    def __iter__(self) -> Iterator[Batch]:
        """The batches up to the failing one; all ranks stop before they reach it."""
        self.fetch_ahead()
        while self._fetched:
            yield self._fetched.popleft()
            self.fetch_ahead()

    def close(self) -> None:
        """End the loader's worker processes."""
        self._batches.close()

    def _checked(self, batch: Batch) -> Batch:
        """The batch, in which every value can be explained by its likelihood."""
        plan = self._run.plan

        def locate(row: int) -> tuple[int, int]:
            shard_B, index_B = plan.batch(batch.global_step, self._lanes)
            at = row - self._lanes.start * plan.samples_per_lane
            return int(shard_B[at]), int(index_B[at])

        return check_batch(
            batch,
            lambda inputs: check_values(inputs, self._likelihoods),
            self._run.train_manifest,
            locate,
            self._run.config.data.on_bad_sample,
        )

    def _report(self, batch: Batch) -> None:
        for problem in batch.problems:
            self._num_masked += 1
            self.last_problem = problem
            if self._num_masked <= _LOGGED_SINGLY or self._num_masked % _LOGGED_EVERY == 0:
                logger.warning("masked sample %d of this rank: %s", self._num_masked, problem)
            if self._num_masked == _LOGGED_SINGLY:
                logger.warning("from now on only every %dth masked sample is shown", _LOGGED_EVERY)

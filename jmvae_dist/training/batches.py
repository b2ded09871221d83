"""Batches, checked on the host and fetched early enough for all ranks to learn of a failure together."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator

from jmvae_dist.data.loader import Batch
from jmvae_dist.errors import DataError
from jmvae_dist.model.inputs import check_values
from jmvae_dist.model.likelihoods import Likelihood
from jmvae_dist.training.setup import ResolvedRun

# A failure is announced after one step and known to all ranks after the next: the batch of the step after that is
# the first one that must not be missing.
_STEPS_AHEAD = 2


class CheckedBatches:
    """The batches of one rank, fetched two steps ahead.

    A rank that cannot read a batch must not leave the others in the reduction of that step's gradients: it says so
    while it still has batches for the steps until all have heard of it.

    Args:
        batches: From the loader.
        run: The resolved run, to name the place of a bad sample.
        likelihoods: By modality; each target must be in the support of its likelihood.
        lanes: The rank's lanes.
    """

    def __init__(
        self,
        batches: Generator[Batch, None, None],
        run: ResolvedRun,
        likelihoods: dict[str, Likelihood],
        lanes: range,
    ) -> None:
        self.failure: DataError | None = None
        self._batches = batches
        self._run = run
        self._likelihoods = likelihoods
        self._lanes = lanes
        self._fetched: deque[Batch] = deque()

    def fetch_ahead(self) -> None:
        """Have the next batch and those of the two steps after it; a failure is kept in `failure`."""
        while self.failure is None and len(self._fetched) <= _STEPS_AHEAD:
            try:
                batch = next(self._batches, None)
                if batch is None:
                    return
                self._check(batch)
            except DataError as error:
                self.failure = error
                return
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

    def _check(self, batch: Batch) -> None:
        try:
            check_values(batch.inputs, self._likelihoods)
        except DataError:
            self._raise_with_place(batch)

    def _raise_with_place(self, batch: Batch) -> None:
        """Find the first bad sample of a batch and name its shard."""
        shard_B, index_B = self._run.plan.batch(batch.global_step, self._lanes)
        for row in range(len(batch)):
            try:
                check_values(
                    {name: values[row : row + 1] for name, values in batch.inputs.items()}, self._likelihoods
                )
            except DataError as error:
                shard = self._run.train_manifest.shards[shard_B[row]]
                raise DataError(f"{shard.url}, sample {index_B[row]}: {error}") from None
        raise AssertionError("no sample of the batch fails the check that the batch failed")

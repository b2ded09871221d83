"""What a target of the fuzzing is, and what several of them need."""

from __future__ import annotations

from pathlib import Path

import requests  # noqa: F401  # what is imported in a case would be taken for code of the data

from jmvae_dist.data_config import RemoteSection
from jmvae_dist.errors import CheckpointError, ConfigError, DataError
from tests.fuzz.material import ARRAYS, MIXED, array_members, make_dataset, mixed_members
from tests.fuzz.mutations import Random

REFUSALS = (DataError, ConfigError, CheckpointError)
# A manifest may name places that cannot be reached: what matters is that this ends.
QUICK = RemoteSection(connect_timeout_s=2.0, stall_timeout_s=2.0, attempts=2, backoff_s=0.001)


class Target:
    """One kind of input. `run` returns if the data were correct, and raises one of REFUSALS if they were refused."""

    def run(self, rng: Random, folder: Path, number: int) -> None:
        """Try one case.

        Args:
            rng: chooses it.
            folder: empty, the only place for files.
            number: of the case.
        """
        raise NotImplementedError

    def close(self) -> None:
        """End what was started."""


class OfDataSets(Target):
    """A target that damages one of two sets of shards: with members of mixed kinds, or with arrays."""

    def __init__(self) -> None:
        self.datasets = (make_dataset(MIXED, mixed_members), make_dataset(ARRAYS, array_members))

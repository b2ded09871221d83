"""Agreement between ranks on small host-side values.

Rank 0 decides, broadcasts, all obey; and what fails on one rank fails on all of them with that rank's message.
Values travel as JSON over a gloo group of their own: no pickle, and no device synchronisation on a GPU run.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from jmvae_dist.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LaunchError,
    PeerError,
    StopRequested,
    TrainingError,
    UnreachableError,
    mark_on_all_ranks,
)

logger = logging.getLogger(__name__)

_ERROR_CLASSES: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (
        *(CheckpointError, ConfigError, DataError, LaunchError, PeerError, StopRequested, TrainingError),
        UnreachableError,
    )
}
T = TypeVar("T")


def _kind_of(error: Exception) -> type[Exception]:
    """The most special class of errors that other ranks can raise for this one."""
    return next((kind for kind in type(error).__mro__ if _ERROR_CLASSES.get(kind.__name__) is kind), PeerError)


class Collectives:
    """Small collectives over all ranks; every method must be called by every rank, in the same order.

    Args:
        rank: This process.
        world_size: Number of processes.
        group: A gloo process group; None with one process, where every method returns at once.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        assert (group is None) == (world_size == 1)
        self.rank = rank
        self.world_size = world_size
        self._group = group

    def gather(self, value: T) -> list[T]:
        """The JSON values of all ranks, in rank order, on every rank."""
        if self._group is None:
            return [value]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor([payload.numel()]), group=self._group)
        sizes = [int(length) for length in lengths]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: payload.numel()] = payload
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded, group=self._group)
        texts = (bytes(data[:size].numpy()) for data, size in zip(received, sizes, strict=True))
        return [json.loads(text) for text in texts]

    def broadcast(self, value: T) -> T:
        """Rank 0's JSON value, on every rank; the other ranks' values are ignored."""
        if self._group is None:
            return value
        payload = bytearray(json.dumps(value).encode()) if self.rank == 0 else bytearray()
        length = torch.tensor([len(payload)])
        dist.broadcast(length, src=0, group=self._group)
        data = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == 0:
            data = torch.frombuffer(payload, dtype=torch.uint8)
        dist.broadcast(data, src=0, group=self._group)
        return json.loads(bytes(data.numpy()))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around work without collectives that may fail on some ranks: it then fails on all of them.

        The first failing rank raises its own error, the others one of the same kind, caused by their own if they
        have one: callers that branch on the kind all go the same way. Without this the failing rank leaves and the
        others wait for it in their next collective.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as failure:  # whatever it is, the other ranks must hear of it
            error = failure
        self._raise_together(error)

    def on_main(self, decide: Callable[[], T]) -> T:
        """The JSON value that `decide` returns on rank 0, on every rank; what it raises is raised on all."""
        value: T | None = None
        with self.together():
            if self.rank == 0:
                value = decide()
        return cast(T, self.broadcast(value))

    def require_equal(self, name: str, value: str) -> None:
        """Make sure that all ranks have read the same, which decides what they do together.

        Args:
            name: What was read, such as the path of a file.
            value: What tells it from another, such as its fingerprint.

        Raises:
            DataError: Some rank has another value than rank 0; on every rank.
        """
        of_main = self.broadcast(value)
        with self.together():
            if value != of_main:
                raise DataError(
                    f"{name}: rank {self.rank} has read {value}, rank 0 has read {of_main}; do all nodes see the "
                    "same file, and was it replaced a moment ago?"
                )

    def _raise_together(self, error: Exception | None) -> None:
        report = None if error is None else [_kind_of(error).__name__, str(error)]
        failed = {rank: other for rank, other in enumerate(self.gather(report)) if other is not None}
        if not failed:
            return
        first = min(failed)
        name, message = failed[first]
        if first == self.rank:
            assert error is not None
            raise mark_on_all_ranks(error)
        kind = _ERROR_CLASSES[name]
        if error is not None and not isinstance(error, kind):
            # A caller that goes on after the other rank's error would never tell of this one.
            logger.warning("rank %d has failed too: %s: %s", self.rank, type(error).__name__, error)
        raise mark_on_all_ranks(kind(f"rank {first}: {message}")) from error

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over ranks of a CPU tensor of equal shape everywhere; returns a new tensor."""
        total = values.clone()
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return total

    def start_maximum(self, values: torch.Tensor) -> dist.Work | None:
        """Begin replacing a CPU tensor by its element-wise maximum over ranks; `wait()` on the result."""
        if self._group is None:
            return None
        return dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

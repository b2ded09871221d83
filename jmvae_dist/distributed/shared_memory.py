"""The mean of gradients over the ranks of one machine, through memory that all of them have mapped.

Sockets copy every byte through the kernel, also between two processes of a machine; here ranks read what the others
have written. Only the data take this way: ranks wait for each other in tiny sums of the process group, so that a rank
that dies or hangs ends the others just as it does without.

No `from __future__ import annotations` here: DDP compares the annotations of its hooks with classes.
"""

import itertools
import logging
import mmap
import os
import secrets
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.errors import ConfigError, LaunchError, mark_on_all_ranks
from jmvae_dist.progress import format_bytes

logger = logging.getLogger(__name__)

SETTING = "training.gradient_reduction"
# Files here are memory.
FOLDER = Path("/dev/shm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_TOKEN_BYTES = 16
# Where a tensor begins: a multiple of every element's size, and of a cache line.
_ALIGNMENT = 64
_MORE_ROOM = "enlarge it (docker run --shm-size, mount -o remount,size=)"


class SharedMemoryMean:
    """Replaces tensors by their means over ranks: DDP's communication hook for ranks of one machine.

    Elements are divided first and then added in the order of ranks, whatever tensors they lie in: on two ranks the
    bits are those of DDP over gloo, which on more ranks adds in an order that depends on the tensors.

    Every rank writes what the others add up, adds up its own part of the elements, and reads the sums of the others:
    a reduce-scatter and an all-gather, and each rank needs room for its gradients once.

    Args:
        collectives: Of ranks whose default process group is gloo's.
        tensor_bytes: Sizes of all gradients of a step.
        folder: Where files are memory.
        left_bytes: To be left there for others.

    Raises:
        LaunchError: The ranks have no memory in common, or too little of it; on all ranks.
    """

    def __init__(
        self, collectives: Collectives, tensor_bytes: Iterable[int], folder: Path = FOLDER, left_bytes: int = 0
    ) -> None:
        self._rank, self._world_size = collectives.rank, collectives.world_size
        # As if each lay in a bucket of its own, since it is not known how DDP will put them together.
        self._rows = map_together(collectives, sum(map(_aligned, tensor_bytes)), folder, left_bytes)
        self._signal = torch.zeros(1)
        self._last_sizes: list[int] = []
        self._waiting: list[tuple[Tensor, torch.futures.Future[Tensor]]] = []

    def hook(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """For `DistributedDataParallel.register_comm_hook`.

        All buckets wait for the last one, which is the large one: ranks that compute and copy on the same cores gain
        nothing from meeting in the middle of a backward pass.
        """
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        self._waiting.append((bucket.buffer(), future))
        if bucket.is_last():
            waiting, self._waiting = self._waiting, []
            self.average([buffer for buffer, _ in waiting])
            for buffer, done in waiting:
                done.set_result(buffer)
        return future

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace flat tensors by their means over ranks; all ranks at once, with equal sizes and dtypes.

        Raises:
            RuntimeError: A rank is gone, or has not come within the timeout of the process group.
        """
        rows, sizes = self._rows_of(tensors), [tensor.nbytes for tensor in tensors]
        if sizes != self._last_sizes:
            # Where this call writes first, others may still read the sums of the last one.
            self._wait_for_all()
            self._last_sizes = sizes
        for values, of_ranks in zip(tensors, rows, strict=True):
            self._publish(values, of_ranks)
        self._wait_for_all()
        for values, of_ranks in zip(tensors, rows, strict=True):
            self._add_own_part(values, of_ranks)
        self._wait_for_all()
        for values, of_ranks in zip(tensors, rows, strict=True):
            for rank, part in enumerate(self._parts(values)):
                values[part] = of_ranks[rank, part]
        # What others may still read now, the next call of the same sizes writes over only when they have met again.

    def _rows_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Where each tensor lies in the row of every rank: (world_size, size), in its dtype."""
        stops = itertools.accumulate((_aligned(tensor.nbytes) for tensor in tensors), initial=0)
        return [
            self._rows[:, start : start + tensor.nbytes].view(tensor.dtype)
            for tensor, start in zip(tensors, stops, strict=False)
        ]

    def _parts(self, values: Tensor) -> list[slice]:
        """Which elements each rank adds up."""
        bounds = [len(values) * rank // self._world_size for rank in range(self._world_size + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]

    def _publish(self, values: Tensor, of_ranks: Tensor) -> None:
        # As DDP: by the factor and not by a division, which for three ranks is another number.
        factor = 1 / self._world_size
        for rank, part in enumerate(self._parts(values)):
            if rank == self._rank:
                values[part].mul_(factor)
            else:
                torch.mul(values[part], factor, out=of_ranks[self._rank, part])

    def _add_own_part(self, values: Tensor, of_ranks: Tensor) -> None:
        part = self._parts(values)[self._rank]
        first, second, *others = (
            values[part] if rank == self._rank else row[part] for rank, row in enumerate(of_ranks)
        )
        total = of_ranks[self._rank, part]
        torch.add(first, second, out=total)
        for terms in others:
            total.add_(terms)

    def _wait_for_all(self) -> None:
        dist.all_reduce(self._signal)


def share_gradients(
    setting: str, collectives: Collectives, device: torch.device, tensor_bytes: Iterable[int], left_bytes: int = 0
) -> SharedMemoryMean | None:
    """What averages gradients as `training.gradient_reduction` says; None: the process group.

    Args:
        setting: Of the configuration.
        collectives: Of all ranks.
        device: Of this rank.
        tensor_bytes, left_bytes: See `SharedMemoryMean`.

    Raises:
        ConfigError: Shared memory was asked for and cannot be had; on all ranks.
    """
    if collectives.world_size == 1 or setting == "process_group":
        return None
    if device.type != "cpu":
        if setting == "auto":
            return None
        raise mark_on_all_ranks(ConfigError(f"{SETTING}: shared_memory is for CPUs, and training runs on {device}"))
    try:
        return SharedMemoryMean(collectives, tensor_bytes, left_bytes=left_bytes)
    except LaunchError as error:
        if setting == "shared_memory":
            message = f"{SETTING}: shared_memory cannot be had: {error}; or use auto, or process_group"
            raise mark_on_all_ranks(ConfigError(message)) from error
        if collectives.rank == 0:
            logger.info("gradients are not averaged in shared memory (%s): %s", SETTING, error)
        return None


def map_together(collectives: Collectives, row_bytes: int, folder: Path = FOLDER, left_bytes: int = 0) -> Tensor:
    """Memory that all ranks read and write, one row each; nothing of it outlives the processes.

    Args:
        collectives: Of all ranks.
        row_bytes: Of each row, rounded up to whole pages.
        folder: Where files are memory.
        left_bytes: To be left there for others.

    Returns:
        (world_size, row_bytes), uint8, of undefined values.

    Raises:
        LaunchError: The ranks do not see the same memory, or there is not enough of it; on all ranks.
    """
    rank, world_size = collectives.rank, collectives.world_size
    row_bytes = -(-max(row_bytes, _TOKEN_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE
    _require_one_machine(collectives)
    descriptor = _open_together(collectives, folder, world_size * row_bytes, left_bytes)
    try:
        with collectives.together():
            # Each rank its own row, which then is near to it. Without a reservation, writing to a page that cannot be
            # had would kill the process (SIGBUS), and containers often have 64 MB in all.
            _reserve(descriptor, rank * row_bytes, row_bytes, world_size * row_bytes, folder)
        with collectives.together():
            mapped = _map(descriptor, world_size * row_bytes)
    finally:
        os.close(descriptor)
    rows = torch.frombuffer(mapped, dtype=torch.uint8).view(world_size, row_bytes)
    _prove_shared(collectives, rows)
    return rows


def _require_one_machine(collectives: Collectives) -> None:
    try:
        own = _BOOT_ID.read_text().strip()
    except OSError as error:
        own = f"{type(error).__name__} of rank {collectives.rank}"
    machines = len(set(collectives.gather(own)))
    if machines > 1:
        raise mark_on_all_ranks(LaunchError(f"the ranks are on {machines} machines"))


def _open_together(collectives: Collectives, folder: Path, num_bytes: int, left_bytes: int) -> int:
    """A new file that all ranks have open, and that has no name any more: a rank that is killed leaves nothing."""
    path = ""
    try:
        with collectives.together():
            if collectives.rank == 0:
                path = _create(folder, num_bytes, left_bytes)
        path_of_main = collectives.broadcast(path)
        descriptor = -1
        try:
            with collectives.together():
                descriptor = _open(path_of_main)
        except BaseException:
            if descriptor >= 0:
                os.close(descriptor)
            raise
        return descriptor
    finally:
        if path:
            os.unlink(path)


def _create(folder: Path, num_bytes: int, left_bytes: int) -> str:
    try:
        status = os.statvfs(folder)
        free_bytes = status.f_bavail * status.f_frsize
        # Reader processes that find no room are killed, and so are those of other jobs.
        if num_bytes > (free_bytes - left_bytes) // 2:
            raise LaunchError(
                f"{format_bytes(num_bytes)} would be more than half of the {format_bytes(free_bytes)} that are free "
                f"in {folder}, less {format_bytes(left_bytes)} for reader processes; {_MORE_ROOM}"
            )
        descriptor, path = tempfile.mkstemp(prefix="jmvae-dist-", dir=folder)  # 0600, and not there before
    except OSError as error:
        raise LaunchError(f"{folder} takes no file: {error.strerror}") from error
    os.close(descriptor)
    return path


def _open(path: str) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise LaunchError(f"{path} of rank 0: {error.strerror}; do the ranks run in several containers?") from error
    return descriptor


def _reserve(descriptor: int, start: int, num_bytes: int, all_bytes: int, folder: Path) -> None:
    try:
        os.posix_fallocate(descriptor, start, num_bytes)
    except OSError as error:
        raise LaunchError(
            f"{folder} has no room for {format_bytes(all_bytes)} ({error.strerror}); {_MORE_ROOM}"
        ) from error


def _map(descriptor: int, num_bytes: int) -> mmap.mmap:
    try:
        return mmap.mmap(descriptor, num_bytes)
    except OSError as error:
        raise LaunchError(f"{format_bytes(num_bytes)} cannot be mapped ({error.strerror})") from error


def _prove_shared(collectives: Collectives, rows: Tensor) -> None:
    """What every rank has written must be what every other rank finds."""
    token = secrets.token_bytes(_TOKEN_BYTES)
    rows[collectives.rank, :_TOKEN_BYTES] = torch.frombuffer(bytearray(token), dtype=torch.uint8)
    expected = collectives.gather(token.hex())
    with collectives.together():
        found = [bytes(row[:_TOKEN_BYTES].numpy()).hex() for row in rows]
        if found != expected:
            raise LaunchError("the ranks do not see each other's memory")


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT

"""Downloads the shards of coming steps into the cache while the current ones are computed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence

from jmvae_dist.data.cache import CacheEntry, ShardCache
from jmvae_dist.data.transfer import TransferCancelled
from jmvae_dist.errors import DataError

logger = logging.getLogger(__name__)

# How soon a shard is tried again for which the cache had no room.
_RETRY_S = 1.0
_STOP_S = 1.0


class Prefetcher:
    """Threads of one rank that run ahead of its reading.

    Nothing depends on them: what is not in the cache when it is needed is downloaded by whoever needs it, and a
    download that fails here is tried again there, where its error stops the run at the step that needs the shard.
    They belong to the rank's main process, whether or not there are worker processes, so that a rank downloads each
    shard once and knows which step it is at.

    Args:
        upcoming: (first step that may need it, shard number, files) in order of the steps. A shard may occur again.
        cache: Where to.
        first_step: The step at which reading begins.
        shards_ahead: How many shards that the current step does not need yet may be downloaded.
        connections: Downloads at the same time.
    """

    def __init__(
        self,
        upcoming: Iterable[tuple[int, int, Sequence[CacheEntry]]],
        cache: ShardCache,
        *,
        first_step: int,
        shards_ahead: int,
        connections: int,
    ) -> None:
        self._upcoming = iter(upcoming)
        self._cache = cache
        self._step = first_step
        self._shards_ahead = shards_ahead
        self._next: tuple[int, int, Sequence[CacheEntry]] | None = None
        # First step that needs it, by shard: what has been taken on and is not needed yet, done or not.
        self._ahead: dict[int, int] = {}
        self._changed = threading.Condition()
        self._cancelled = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"jmvae-prefetch-{number}", daemon=True)
            for number in range(connections)
        ]

    def start(self) -> None:
        """Begin; not before the last fork of this process, since threads do not live on in the child."""
        for thread in self._threads:
            thread.start()

    def advance(self, step: int) -> None:
        """Reading has come to this step."""
        with self._changed:
            self._step = step
            self._ahead = {shard: first_step for shard, first_step in self._ahead.items() if first_step > step}
            self._changed.notify_all()

    def stop(self) -> None:
        """End all downloads, soon if not at once: a thread that waits for a silent server is not waited for."""
        with self._changed:
            self._cancelled.set()
            self._changed.notify_all()
        deadline_s = time.monotonic() + _STOP_S
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline_s - time.monotonic()))

    def _run(self) -> None:
        while (files := self._take()) is not None:
            try:
                for file in files:
                    while not self._cache.download_ahead(file, self._cancelled):
                        self._wait_for_room()
            except TransferCancelled:
                return
            except DataError as error:
                # Whoever needs the shard tries again, and stops the run if that fails too.
                logger.warning("not downloaded ahead of use: %s", error)

    def _take(self) -> Sequence[CacheEntry] | None:
        """The files of the next shard to be downloaded, once it is time; None at the end."""
        with self._changed:
            while not self._cancelled.is_set():
                if self._next is None:
                    self._next = next(self._upcoming, None)
                if self._next is None:
                    return None
                first_step, shard_number, files = self._next
                if shard_number in self._ahead:  # for another lane, or the next epoch
                    self._next = None
                elif first_step <= self._step or len(self._ahead) < self._shards_ahead:
                    self._next = None
                    if first_step > self._step:
                        self._ahead[shard_number] = first_step
                    return files
                else:
                    self._changed.wait()
            return None

    def _wait_for_room(self) -> None:
        """Room comes when reading goes on, in this process or another one."""
        if self._cancelled.wait(_RETRY_S):
            raise TransferCancelled

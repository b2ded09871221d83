"""Shards to be indexed, on a disk or at a URL: what they look like from outside, and their bytes from the start."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from jmvae_dist.data.files import open_regular
from jmvae_dist.data.indexing.tar_scan import ByteStream
from jmvae_dist.data.transfer import RemoteFile
from jmvae_dist.data.urls import is_remote, shown
from jmvae_dist.data_config import RemoteSection
from jmvae_dist.errors import ConfigError, DataError

Identity = dict[str, int | str]
"""What tells whether a shard has changed since it was read: `num_bytes`, and a time or what else a server offers."""

_CONNECTIONS = 16


def identify_all(shards: Sequence[str]) -> list[Identity]:
    """The identities of shards; those at URLs are asked for at the same time.

    Raises:
        ConfigError: a shard does not exist or cannot be reached.
    """
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        remote = {shard: pool.submit(identify, shard) for shard in shards if is_remote(shard)}
        try:
            return [remote[shard].result() if shard in remote else identify(shard) for shard in shards]
        finally:
            pool.shutdown(cancel_futures=True)


def identify(shard: str) -> Identity:
    """The identity of one shard; raises like `identify_all`."""
    if is_remote(shard):
        try:
            num_bytes, version = _remote(shard, None).identify()
        except DataError as error:
            raise ConfigError(str(error)) from None
        return {"num_bytes": num_bytes, "version": version}
    try:
        status = os.stat(shard)
    except OSError as error:
        raise ConfigError(f"{shard}: cannot read shard: {error.strerror}") from None
    return {"num_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


@contextlib.contextmanager
def open_shard(shard: str, num_bytes: int | None = None) -> Iterator[ByteStream]:
    """The bytes of a shard from the start; `num_bytes` is its size, which is looked up if it is None.

    Raises:
        ConfigError: it does not exist or cannot be reached.
        DataError: it cannot be read.
    """
    if num_bytes is None:
        num_bytes = int(identify(shard)["num_bytes"])
    if is_remote(shard):
        with contextlib.closing(_remote(shard, num_bytes).stream()) as stream:
            yield stream
        return
    try:
        with open_regular(shard) as file:
            yield file
    except OSError as error:
        raise DataError(f"{shard}: cannot read shard: {error.strerror}") from None


def shard_name(shard: str) -> str:
    """A shard for messages: without what a URL may keep secret."""
    return shown(shard) if is_remote(shard) else shard


def _remote(shard: str, num_bytes: int | None) -> RemoteFile:
    return RemoteFile(shard, num_bytes, "shard", RemoteSection())

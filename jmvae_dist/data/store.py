"""The bytes of shards: mapped from local files or from the cache, or read over the network member by member."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from jmvae_dist.data.cache import CachedFile, CacheEntry, ShardCache
from jmvae_dist.data.files import open_regular, read_error
from jmvae_dist.data.index import parse_index, read_index
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.transfer import RemoteFile
from jmvae_dist.data.urls import shown
from jmvae_dist.data_config import CacheSection, RemoteSection
from jmvae_dist.errors import ConfigError, DataError, UnreachableError
from jmvae_dist.files import sha256_of_descriptor

Verify = Literal["always", "first_use", "never"]

TAR_BLOCK_BYTES = 512
# Bytes between two members that are read along, because another request would take longer.
_MAX_GAP_BYTES = 64 * 2**10
_MAX_REQUEST_BYTES = 8 * 2**20

# Files whose sha256 this process has checked. The identity includes inode and times, so a file that is replaced or
# changed while the process runs is checked again.
_Identity = tuple[int, int, int, int, int, str]
_checked_files: set[_Identity] = set()


@dataclass(frozen=True)
class RemoteAccess:
    """How remote shards are read; irrelevant for local ones."""

    cache: CacheSection = field(default_factory=CacheSection)
    remote: RemoteSection = field(default_factory=RemoteSection)

    def open_cache(self) -> ShardCache | None:
        """The cache, if one is configured; raises like `ShardCache`."""
        if self.cache.dir is None:
            return None
        # The directory that a cluster gives a job on its node is known by a variable only.
        folder = os.path.expandvars(os.path.expanduser(self.cache.dir))
        if "$" in folder:
            raise ConfigError(f"data.cache.dir: {self.cache.dir!r} names a variable that is not set here")
        return ShardCache(Path(folder), self.cache.max_bytes, self.remote)

    def files_per_shard(self, manifest: Manifest) -> int:
        """How many open files an open shard takes: a copy in the cache is mapped, and held open for its lock."""
        return 2 if manifest.has_remote_shards and self.cache.dir is not None else 1


class MappedShard:
    """A shard of which all bytes are at hand.

    Attributes:
        name: path or URL, for messages.
        buffer: the whole tar, mapped into memory.
        records_NM: the index.
    """

    def __init__(self, name: str, buffer: mmap.mmap, records_NM: np.ndarray, file: CachedFile | None = None) -> None:
        self.name = name
        self.buffer: mmap.mmap | None = buffer
        self.records_NM = records_NM
        self._map = buffer
        self._file = file

    def read(self, offset: int, size: int) -> bytes:
        """Some bytes of the tar."""
        return self._map[offset : offset + size]

    def read_member(self, offset: int, size: int, most_bytes: int) -> bytes:
        """The first up to `most_bytes` of the content of a member."""
        return self.read(offset, min(size, most_bytes))

    def close(self) -> None:
        # A traceback may still refer to a view; the mapping then goes when the view does.
        with contextlib.suppress(BufferError):
            self._map.close()
        if self._file is not None:
            self._file.close()
            self._file = None


class RangedShard:
    """A shard on a server, of which only the members that are asked for are read, and kept until the next ones are.

    Its sha256 cannot be checked. Each member's tar header is.
    """

    buffer = None

    def __init__(self, name: str, remote: RemoteFile, records_NM: np.ndarray) -> None:
        self.name = name
        self.records_NM = records_NM
        self._remote = remote
        self._starts: list[int] = []
        self._pieces: list[bytes] = []

    def load(self, members: np.ndarray) -> list[Callable[[], None]]:
        """Requests that bring the given members (records, any shape), to be run in any order and by any threads."""
        members = np.unique(members[members["offset"] >= TAR_BLOCK_BYTES])
        starts = members["offset"].astype(np.int64) - TAR_BLOCK_BYTES
        groups = _coalesce(starts, members["offset"].astype(np.int64) + members["size"])
        self._starts = [start for start, _ in groups]
        # Bound now: a request that outlives its batch, because another one failed, must not write into the next one.
        self._pieces = pieces = [b""] * len(groups)
        return [partial(self._load_piece, pieces, number, start, stop) for number, (start, stop) in enumerate(groups)]

    def unload(self) -> None:
        """Forget what was loaded."""
        self._starts, self._pieces = [], []

    def _load_piece(self, pieces: list[bytes], number: int, start: int, stop: int) -> None:
        pieces[number] = self._remote.read_range(start, stop)

    def read(self, offset: int, size: int) -> bytes:
        """Some bytes of the tar; over the network unless they have been loaded."""
        number = bisect_right(self._starts, offset) - 1
        if number >= 0:
            start = offset - self._starts[number]
            if start + size <= len(self._pieces[number]):
                return self._pieces[number][start : start + size]
        return self._remote.read_range(offset, offset + size) if size else b""

    def read_member(self, offset: int, size: int, most_bytes: int) -> bytes:
        """The first up to `most_bytes` of the content of a member.

        Raises:
            DataError: The tar header before it is damaged, or that of another member.
        """
        content = self.read(offset - TAR_BLOCK_BYTES, TAR_BLOCK_BYTES + min(size, most_bytes))
        if not _is_header_of(content[:TAR_BLOCK_BYTES], size):
            raise DataError("the tar header before it is damaged, or that of another member")
        return content[TAR_BLOCK_BYTES:]

    def close(self) -> None:
        self.unload()


ShardBytes = MappedShard | RangedShard


class ShardStore:
    """Opens the shards of a manifest, wherever they are. Can be pickled.

    Args:
        manifest: the data set.
        verify: when to compare the sha256 of shard and index with the manifest: `always` (each opening),
            `first_use` (once per process) or `never` (that of the index alone). Downloads are always
            compared.
        access: how remote shards are read.

    Attributes:
        cache: where whole remote shards are kept, if anywhere.
        reads_ranges: whether remote shards are read member by member.

    Raises:
        ConfigError: a setting is not possible.
    """

    def __init__(self, manifest: Manifest, verify: Verify, access: RemoteAccess | None = None) -> None:
        check_verify(verify)
        self._manifest = manifest
        self._verify: Verify = verify
        self._access = access or RemoteAccess()
        self.cache = self._access.open_cache() if manifest.has_remote_shards else None
        self.reads_ranges = manifest.has_remote_shards and self.cache is None
        if self.reads_ranges and verify == "always":
            raise ConfigError(
                "data.verify: 'always' needs whole shards, and they are at URLs: set data.cache.dir or use first_use"
            )
        # Of the shards that are read in parts: one that is closed and opened again must still be the same.
        self._versions: dict[str, str] = {}
        self._cancelled = threading.Event()
        self._executor: ThreadPoolExecutor | None = None
        self._pid = os.getpid()

    def open(self, shard_number: int, release: Callable[[], bool] = lambda: False) -> ShardBytes:
        """Open a shard.

        Args:
            shard_number: which.
            release: closes some other shard of this process, to make room in the cache; False if there is none.

        Raises:
            DataError: the shard or its index cannot be had, is damaged, or is not what the manifest says.
            UnreachableError: for a reason that says nothing against it.
        """
        location = self._manifest.shard_location(shard_number)
        if isinstance(location, Path):
            # Before the shard, which may have to be hashed.
            records_NM = self._read_index(shard_number, release)
            return MappedShard(str(location), self._map_local(location, shard_number), records_NM)
        if self.cache is None:
            return self._open_ranged(shard_number, location)
        return self._open_cached(shard_number, location, self.cache, release)

    def _read_index(self, shard_number: int, release: Callable[[], bool]) -> np.ndarray:
        location = self._manifest.index_location(shard_number)
        if isinstance(location, Path):
            shard = self._manifest.shards[shard_number]
            # Whatever `verify` says: it is small, and damage to it makes one sample pass for another.
            counts = shard.num_samples, len(self._manifest.modalities), shard.num_bytes
            return read_index(location, *counts, shard.index.sha256, self._manifest.path)
        if self.cache is not None:
            return self._read_cached_index(shard_number, self.cache, release)
        num_bytes, name = self._manifest.shards[shard_number].index.num_bytes, f"index of shard {shard_number}"
        file = RemoteFile(location, num_bytes, name, self._access.remote, self._cancelled)
        return self._parse_index(file.read_whole(num_bytes), shown(location), shard_number)

    def load(self, wanted: Iterable[tuple[RangedShard, np.ndarray]]) -> None:
        """Read members (records) of several shards, some at a time.

        Raises:
            DataError: one of them cannot be read.
        """
        requests = [request for shard, members in wanted for request in shard.load(members)]
        self._run_together(requests)

    def open_together(self, shard_numbers: Sequence[int]) -> dict[int, ShardBytes]:
        """Open several shards, some at a time; leaves those out that `open` refuses, and those in the cache.

        Raises:
            UnreachableError: one of them is not to be had at the moment.
        """
        opened: dict[int, ShardBytes] = {}

        def open_one(shard_number: int) -> None:
            try:
                opened[shard_number] = self.open(shard_number)
            except UnreachableError:
                raise
            except DataError:
                pass  # whoever needs the shard meets the error again, and knows which sample needs it

        takes_time = [number for number in shard_numbers if self.is_ranged(number) or self._is_hashed(number)]
        self._run_together([partial(open_one, shard_number) for shard_number in takes_time])
        return opened

    def _is_hashed(self, shard_number: int) -> bool:
        """Whether to open a shard may mean to read all of it from a local disk."""
        return self._verify != "never" and isinstance(self._manifest.shard_location(shard_number), Path)

    def is_ranged(self, shard_number: int) -> bool:
        """Whether a shard is read over the network, member by member."""
        return self.reads_ranges and not isinstance(self._manifest.shard_location(shard_number), Path)

    def close(self) -> None:
        """End transfers; the store can be used again."""
        self._cancelled.set()
        if self._executor is not None and self._pid == os.getpid():
            self._executor.shutdown(cancel_futures=True)
        self._executor, self._cancelled = None, threading.Event()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_executor": None, "_cancelled": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _cancelled=threading.Event(), _pid=os.getpid())

    def _run_together(self, requests: Sequence[Callable[[], None]]) -> None:
        if len(requests) <= 1:
            for request in requests:
                request()
            return
        if self._executor is None or self._pid != os.getpid():  # threads do not live on in a forked process
            self._executor = ThreadPoolExecutor(self._access.remote.connections, "jmvae-shards")
            self._pid = os.getpid()
        futures = [self._executor.submit(request) for request in requests]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()

    def _map_local(self, path: Path, shard_number: int) -> mmap.mmap:
        """Map a shard read-only after checking its size and, as `verify` says, its sha256."""
        shard = self._manifest.shards[shard_number]
        try:
            with open_regular(path) as file:
                status = os.fstat(file.fileno())
                if status.st_size != shard.num_bytes:
                    what = "truncated" if status.st_size < shard.num_bytes else "replaced"
                    raise DataError(
                        f"{path}: {status.st_size} bytes, the manifest says {shard.num_bytes}: "
                        f"the shard was {what}; copy it again"
                    )
                # By descriptor: another file may have taken the name meanwhile.
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                identity = _identity(status, shard.sha256)
                if _must_hash(identity, self._verify):
                    if sha256_of_descriptor(file.fileno()) != shard.sha256:
                        raise DataError(
                            f"{path}: sha256 differs from the manifest's: the shard is damaged or was "
                            "replaced; copy it again"
                        )
                    _checked_files.add(identity)
                return buffer
        except OSError as error:
            raise read_error(path, "shard", error, self._manifest.path) from None

    # Remote shards

    def _open_ranged(self, shard_number: int, url: str) -> RangedShard:
        num_bytes = self._manifest.shards[shard_number].num_bytes
        name = f"shard {shard_number}"
        remote = RemoteFile(url, num_bytes, name, self._access.remote, self._cancelled, self._versions)
        return RangedShard(shown(url), remote, self._read_index(shard_number, lambda: False))

    def _open_cached(
        self, shard_number: int, url: str, cache: ShardCache, release: Callable[[], bool]
    ) -> MappedShard:
        records_NM = self._read_index(shard_number, release)
        entry = shard_files(self._manifest, shard_number)[-1]
        for _ in range(2):
            file = cache.open(entry, release)
            try:
                identity = _identity(os.fstat(file.descriptor), entry.sha256, is_copy=True)
                must_hash = not file.is_new and _must_hash(identity, self._verify)
                if must_hash and sha256_of_descriptor(file.descriptor) != entry.sha256:
                    cache.remove_damaged(file)  # and download it again, once
                    continue
                if must_hash or file.is_new:
                    _checked_files.add(identity)
                buffer = mmap.mmap(file.descriptor, 0, access=mmap.ACCESS_READ)
            except OSError as error:
                file.close()
                raise UnreachableError(f"{shown(url)}: cannot read its copy {file.path}: {error.strerror}") from None
            return MappedShard(shown(url), buffer, records_NM, file)
        raise UnreachableError(
            f"{file.path}: the copy of {shown(url)} is damaged again and again; is the disk sound?"
        )

    def _read_cached_index(self, shard_number: int, cache: ShardCache, release: Callable[[], bool]) -> np.ndarray:
        entry = shard_files(self._manifest, shard_number)[0]
        for is_last in (False, True):
            file = cache.open(entry, release)
            try:
                with file.path.open("rb") as opened:  # pinned, so still there
                    content = opened.read(entry.num_bytes)
                records_NM = self._parse_index(content, shown(entry.url), shard_number)
            except OSError as error:
                file.close()
                raise UnreachableError(
                    f"{shown(entry.url)}: cannot read its copy {file.path}: {error.strerror}"
                ) from None
            except DataError:
                if file.is_new or is_last:
                    file.close()
                    raise
                cache.remove_damaged(file)
                continue
            file.close()
            return records_NM
        raise AssertionError("the last attempt returns or raises")

    def _parse_index(self, content: bytes, name: str, shard_number: int) -> np.ndarray:
        shard, num_modalities = self._manifest.shards[shard_number], len(self._manifest.modalities)
        if len(content) != shard.index.num_bytes:
            raise DataError(f"{name}: {len(content)} bytes, the manifest says {shard.index.num_bytes}")
        return parse_index(content, name, shard.num_samples, num_modalities, shard.num_bytes, shard.index.sha256)


def shard_files(manifest: Manifest, shard_number: int) -> list[CacheEntry]:
    """The files of a shard, index first, as far as they are remote."""
    shard = manifest.shards[shard_number]
    files = []
    for location, file, name in (
        (manifest.index_location(shard_number), shard.index, f"index of shard {shard_number}"),
        (manifest.shard_location(shard_number), shard, f"shard {shard_number}"),
    ):
        if not isinstance(location, Path):
            files.append(CacheEntry(location, file.num_bytes, file.sha256, name))
    return files


def check_verify(verify: str) -> None:
    """Raise ConfigError unless `verify` is one of always, first_use, never."""
    if verify not in get_args(Verify):
        raise ConfigError(f"data.verify must be one of {', '.join(get_args(Verify))}, not {verify!r}")


def _coalesce(starts: np.ndarray, stops: np.ndarray) -> list[tuple[int, int]]:
    """Joins ranges, in ascending order of their starts, that lie close together."""
    groups: list[tuple[int, int]] = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if groups:
            first, last = groups[-1]
            if start - last <= _MAX_GAP_BYTES and stop - first <= _MAX_REQUEST_BYTES:
                groups[-1] = first, max(last, stop)
                continue
        groups.append((start, stop))
    return groups


def _is_header_of(header: bytes, size: int) -> bool:
    """Whether 512 bytes are a tar header of a member of this size, with a sound checksum."""
    try:
        checksum = int(header[148:156].strip(b"\0 "), 8)
        # A size that octal digits cannot hold is in another form; such a member is too large anyway.
        stated_size = int(header[124:136].strip(b"\0 "), 8)
    except ValueError:
        return False
    content = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(content)
    signed = unsigned - 256 * sum(byte > 127 for byte in content)  # as some old programs have it
    return checksum in (unsigned, signed) and stated_size == size


def _must_hash(identity: _Identity, verify: Verify) -> bool:
    return verify == "always" or (verify == "first_use" and identity not in _checked_files)


def _identity(status: os.stat_result, sha256: str, *, is_copy: bool = False) -> _Identity:
    # Whoever uses a copy in the cache sets its time of access, and with it that of the last change of its entry.
    changed_ns = 0 if is_copy else status.st_ctime_ns
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, changed_ns, sha256

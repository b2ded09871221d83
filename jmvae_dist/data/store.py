"""Where the bytes of shards come from: local files, the cache, or servers; checked as far as was asked for."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from jmvae_dist.data.cache import CacheEntry, ShardCache
from jmvae_dist.data.daemon_threads import DaemonThreads
from jmvae_dist.data.files import open_regular, read_error
from jmvae_dist.data.index import parse_index, read_index
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.shard_bytes import MappedShard, RangedShard, ShardBytes
from jmvae_dist.data.sums import CheckedMembers, MemberChecks, parse_sums, read_sums, sums_num_bytes
from jmvae_dist.data.transfer import RemoteFile
from jmvae_dist.data.urls import shown
from jmvae_dist.data_config import CacheSection, RemoteSection
from jmvae_dist.errors import ConfigError, DataError, UnreachableError
from jmvae_dist.files import sha256_of_descriptor

Verify = Literal["always", "first_use", "never"]

# Files whose sha256 this process has checked. The identity includes inode and times, so a file that is replaced or
# changed while the process runs is checked again.
_Identity = tuple[int, int, int, int, int, str]
_checked_files: set[_Identity] = set()
# What was found to be right in shards that are checked member by member, by identity of the shard and sha256 of index
# and sums, which say what the members are and should be.
_checked_members: dict[tuple[_Identity, str, str], CheckedMembers] = {}


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


Explain = Callable[[int, DataError], DataError]
"""Adds to the error of a shard, which is given by its number, what it is needed for."""


class ShardStore:
    """Opens the shards of a manifest, wherever they are. Can be pickled.

    Args:
        manifest: the data set.
        verify: when the bytes of shards are checked: `always` (at each opening, by the sha256 of the whole shard),
            `first_use` (once per process: each member when it is first used, or the whole shard when it is first
            opened if it has no sums) or `never`. The sha256 of an index is compared at each opening, that of a
            download always.
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
        # Threads that wait for servers, and threads that compute sums over local files.
        self._threads: dict[bool, DaemonThreads] = {}
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
            return self._open_local(shard_number, location, release)
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
        entry = _index_entry(self._manifest, shard_number, location)
        return self._read_small(entry, partial(self._parse_index, shard_number), release)

    def _read_sums(self, shard_number: int, release: Callable[[], bool]) -> np.ndarray:
        """The digests of all members of a shard that has sums: uint64 (N, M)."""
        location, shard = self._manifest.sums_location(shard_number), self._manifest.shards[shard_number]
        assert shard.sums is not None
        shape = shard.num_samples, len(self._manifest.modalities)
        if isinstance(location, Path):
            return read_sums(location, *shape, shard.sums.sha256, self._manifest.path)

        def parse(content: bytes, name: str) -> np.ndarray:
            assert shard.sums is not None
            _check_length(content, name, sums_num_bytes(*shape))
            return parse_sums(content, name, *shape, shard.sums.sha256)

        return self._read_small(_sums_entry(self._manifest, shard_number, location), parse, release)

    def _checks_members(self, shard_number: int) -> bool:
        """Whether a shard's members are checked one by one, and not the shard as a whole."""
        return self._verify == "first_use" and self._manifest.shards[shard_number].sums is not None

    def _member_checks(
        self,
        shard_number: int,
        identity: _Identity | None,
        records_NM: np.ndarray,
        read_digests: Callable[[], np.ndarray],
    ) -> MemberChecks | None:
        """What checks the members of a shard when they are used, if anything is left to be checked.

        Args:
            shard_number: which.
            identity: of the file that was opened; None for one that is not at hand, whose bytes come anew each time.
            records_NM: its index.
            read_digests: gives the digests from its sums.
        """
        shard = self._manifest.shards[shard_number]
        if not self._checks_members(shard_number) or identity in _checked_files:
            return None
        if identity is None:
            return MemberChecks(read_digests(), records_NM, None)
        assert shard.sums is not None
        key = (identity, shard.index.sha256, shard.sums.sha256)
        checked = _checked_members.get(key) or _checked_members.setdefault(key, CheckedMembers(records_NM))
        return None if checked.are_all else MemberChecks(read_digests(), records_NM, checked)

    def load(self, wanted: Iterable[tuple[int, RangedShard, np.ndarray]], explain: Explain) -> None:
        """Read members (records) of several shards, given with their numbers, some at a time.

        Raises:
            DataError: one of them cannot be read; what `explain` makes of it.
        """

        def run(shard_number: int, request: Callable[[], None]) -> None:
            try:
                request()
            except DataError as error:
                raise explain(shard_number, error) from None

        requests = [
            partial(run, number, request) for number, shard, members in wanted for request in shard.load(members)
        ]
        self._run_together(requests)

    def open_together(self, shard_numbers: Sequence[int], explain: Explain) -> dict[int, ShardBytes | DataError]:
        """Open those of several shards that take time, some at a time; what `open` raises takes the place of a shard.

        Raises:
            UnreachableError: one of them is not to be had at the moment; what `explain` makes of it.
        """
        opened: dict[int, ShardBytes | DataError] = {}

        def open_one(shard_number: int) -> None:
            try:
                opened[shard_number] = self.open(shard_number)
            except UnreachableError as error:
                raise explain(shard_number, error) from None
            except DataError as error:
                opened[shard_number] = error

        ranged = [number for number in shard_numbers if self.is_ranged(number)]
        hashed = [number for number in shard_numbers if self._is_hashed(number)]
        self._run_together([partial(open_one, shard_number) for shard_number in ranged])
        self._run_together([partial(open_one, shard_number) for shard_number in hashed], is_local=True)
        return opened

    def state_of_files(self, shard_number: int) -> tuple[tuple[int, ...] | None, ...]:
        """What tells whether the files of a shard have changed since it was asked for; of local ones only."""
        shard = self._manifest.shards[shard_number]
        locations = [self._manifest.shard_location(shard_number), self._manifest.index_location(shard_number)]
        if shard.sums is not None:
            locations.append(self._manifest.sums_location(shard_number))
        return tuple(_state_of_file(location) for location in locations if isinstance(location, Path))

    def _is_hashed(self, shard_number: int) -> bool:
        """Whether to open a shard may mean to read all of it from a local disk."""
        if self._verify == "never" or self._checks_members(shard_number):
            return False
        return isinstance(self._manifest.shard_location(shard_number), Path)

    def is_ranged(self, shard_number: int) -> bool:
        """Whether a shard is read over the network, member by member."""
        return self.reads_ranges and not isinstance(self._manifest.shard_location(shard_number), Path)

    def cancel(self) -> None:
        """End transfers of other threads, with TransferCancelled, until the store is closed."""
        self._cancelled.set()

    def close(self) -> None:
        """End transfers, soon if not at once: a server that says nothing is not waited for.

        The store can be used again.
        """
        self._cancelled.set()
        if self._pid == os.getpid():
            for threads in self._threads.values():
                threads.stop()
        self._threads, self._cancelled = {}, threading.Event()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_threads": {}, "_cancelled": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _cancelled=threading.Event(), _pid=os.getpid())

    def _run_together(self, requests: Sequence[Callable[[], None]], *, is_local: bool = False) -> None:
        if len(requests) <= 1:
            for request in requests:
                request()
            return
        if self._pid != os.getpid():  # threads do not live on in a forked process
            self._threads, self._pid = {}, os.getpid()
        if is_local not in self._threads:
            number = len(os.sched_getaffinity(0)) if is_local else self._access.remote.connections
            self._threads[is_local] = DaemonThreads(number, "jmvae-shards")
        futures = [self._threads[is_local].submit(request) for request in requests]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()

    def _open_local(self, shard_number: int, path: Path, release: Callable[[], bool]) -> MappedShard:
        shard = self._manifest.shards[shard_number]
        try:
            # All by one descriptor: another file may take the name meanwhile.
            with open_regular(path) as file:
                status = os.fstat(file.fileno())
                if status.st_size != shard.num_bytes:
                    what = "truncated" if status.st_size < shard.num_bytes else "replaced"
                    raise DataError(
                        f"{path}: {status.st_size} bytes, the manifest says {shard.num_bytes}: "
                        f"the shard was {what}; copy it again"
                    )
                records_NM = self._read_index(shard_number, release)  # soon done, unlike the sum over the shard
                identity = _identity(status, shard.sha256)
                if self._must_hash(shard_number, identity):
                    if sha256_of_descriptor(file.fileno()) != shard.sha256:
                        raise DataError(
                            f"{path}: sha256 differs from the manifest's: the shard is damaged or was "
                            "replaced; copy it again"
                        )
                    _checked_files.add(identity)
                read_digests = partial(self._read_sums, shard_number, release)
                checks = self._member_checks(shard_number, identity, records_NM, read_digests)
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise read_error(path, "shard", error, self._manifest.path) from None
        return MappedShard(str(path), buffer, records_NM, checks)

    def _must_hash(self, shard_number: int, identity: _Identity) -> bool:
        """Whether the whole shard must be hashed before anything of it is used."""
        if self._verify == "first_use":
            return not self._checks_members(shard_number) and identity not in _checked_files
        return self._verify == "always"

    # Remote shards

    def _open_ranged(self, shard_number: int, url: str) -> RangedShard:
        records_NM = self._read_index(shard_number, lambda: False)
        read_digests = partial(self._read_sums, shard_number, lambda: False)
        checks = self._member_checks(shard_number, None, records_NM, read_digests)
        num_bytes = self._manifest.shards[shard_number].num_bytes
        name = f"shard {shard_number}"
        remote = RemoteFile(url, num_bytes, name, self._access.remote, self._cancelled, self._versions)
        return RangedShard(shown(url), remote, records_NM, checks)

    def _open_cached(
        self, shard_number: int, url: str, cache: ShardCache, release: Callable[[], bool]
    ) -> MappedShard:
        records_NM = self._read_index(shard_number, release)
        # Before the shard, which takes up room in the cache that another process may wait for while it is open.
        digests_NM = self._read_sums(shard_number, release) if self._checks_members(shard_number) else None
        entry = shard_files(self._manifest, shard_number)[-1]
        for _ in range(2):
            file = cache.open(entry, release, self._cancelled)
            try:
                identity = _identity(os.fstat(file.descriptor), entry.sha256, is_copy=True)
                if file.is_own:
                    _checked_files.add(identity)
                must_hash = not file.is_new and self._must_hash(shard_number, identity)
                if must_hash and sha256_of_descriptor(file.descriptor) != entry.sha256:
                    cache.remove_damaged(file)  # and download it again, once
                    continue
                if must_hash:
                    _checked_files.add(identity)
                buffer = mmap.mmap(file.descriptor, 0, access=mmap.ACCESS_READ)
            except OSError as error:
                file.close()
                raise UnreachableError(f"{shown(url)}: cannot read its copy {file.path}: {error.strerror}") from None
            checks = None
            if digests_NM is not None:
                checks = self._member_checks(shard_number, identity, records_NM, partial(np.asarray, digests_NM))
            return MappedShard(shown(url), buffer, records_NM, checks, file)
        raise UnreachableError(
            f"{file.path}: the copy of {shown(url)} is damaged again and again; is the disk sound?"
        )

    def _read_small(
        self, entry: CacheEntry, parse: Callable[[bytes, str], np.ndarray], release: Callable[[], bool]
    ) -> np.ndarray:
        """What `parse` makes of a whole remote file beside a shard and its name; from the cache if there is one."""
        if self.cache is not None:
            return self._read_cached(entry, self.cache, parse, release)
        file = RemoteFile(entry.url, entry.num_bytes, entry.name, self._access.remote, self._cancelled)
        return parse(file.read_whole(entry.num_bytes), shown(entry.url))

    def _read_cached(
        self,
        entry: CacheEntry,
        cache: ShardCache,
        parse: Callable[[bytes, str], np.ndarray],
        release: Callable[[], bool],
    ) -> np.ndarray:
        for is_last in (False, True):
            file = cache.open(entry, release, self._cancelled)
            try:
                with open(file.descriptor, "rb", closefd=False) as opened:
                    opened.seek(0)
                    content = opened.read(entry.num_bytes)
                result = parse(content, shown(entry.url))
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
            return result
        raise AssertionError("the last attempt returns or raises")

    def _parse_index(self, shard_number: int, content: bytes, name: str) -> np.ndarray:
        shard, num_modalities = self._manifest.shards[shard_number], len(self._manifest.modalities)
        _check_length(content, name, shard.index.num_bytes)
        return parse_index(content, name, shard.num_samples, num_modalities, shard.num_bytes, shard.index.sha256)


def shard_files(manifest: Manifest, shard_number: int) -> list[CacheEntry]:
    """The files of a shard, index and sums first, as far as they are remote."""
    shard = manifest.shards[shard_number]
    files = []
    if not isinstance(location := manifest.index_location(shard_number), Path):
        files.append(_index_entry(manifest, shard_number, location))
    if shard.sums is not None and not isinstance(location := manifest.sums_location(shard_number), Path):
        files.append(_sums_entry(manifest, shard_number, location))
    if not isinstance(location := manifest.shard_location(shard_number), Path):
        files.append(CacheEntry(location, shard.num_bytes, shard.sha256, f"shard {shard_number}"))
    return files


def _index_entry(manifest: Manifest, shard_number: int, url: str) -> CacheEntry:
    index = manifest.shards[shard_number].index
    return CacheEntry(url, index.num_bytes, index.sha256, f"index of shard {shard_number}")


def _sums_entry(manifest: Manifest, shard_number: int, url: str) -> CacheEntry:
    sums = manifest.shards[shard_number].sums
    assert sums is not None
    return CacheEntry(url, sums.num_bytes, sums.sha256, f"sums of shard {shard_number}")


def _check_length(content: bytes, name: str, num_bytes: int) -> None:
    if len(content) != num_bytes:
        raise DataError(f"{name}: {len(content)} bytes, the manifest says {num_bytes}")


def check_verify(verify: str) -> None:
    """Raise ConfigError unless `verify` is one of always, first_use, never."""
    if verify not in get_args(Verify):
        raise ConfigError(f"data.verify must be one of {', '.join(get_args(Verify))}, not {verify!r}")


def _state_of_file(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _identity(status: os.stat_result, sha256: str, *, is_copy: bool = False) -> _Identity:
    # Whoever uses a copy in the cache sets its time of access, and with it that of the last change of its entry.
    changed_ns = 0 if is_copy else status.st_ctime_ns
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, changed_ns, sha256

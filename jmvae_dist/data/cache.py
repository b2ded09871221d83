"""Copies of remote files on a disk of the node, shared by all its processes and runs.

    DIR/lock                      held while files are counted, made or removed; never while one is downloaded
    DIR/wanted                    touched by a process that finds no room, for others to close what they can
    DIR/<sha256>                  a complete file; a process that uses it holds a shared lock on it
    DIR/<sha256>-<bytes>.part     a download; the process that downloads holds an exclusive lock on it

A name is made of a digest and a number alone, so nothing from a manifest or server chooses a place. The kernel
releases locks when their holder dies, however it dies: what is locked is in use, and what is not may be removed, or
continued if it is a download.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jmvae_dist.data.transfer import RemoteFile, TransferCancelled
from jmvae_dist.data_config import RemoteSection
from jmvae_dist.errors import ConfigError, UnreachableError
from jmvae_dist.files import fsync_path

logger = logging.getLogger(__name__)

_COMPLETE = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"([0-9a-f]{64})-(\d{1,19})\.part")
_POLL_S = 0.05
_SAY_AFTER_S = 15.0
_LOCK_TIMEOUT_S = 60.0
# Longest time in which a download by another process may not grow: that process gives up long before.
_WAIT_WITHOUT_PROGRESS_S = 600.0
# A process that waits for room says so again and again; this old, its last word counts no more.
_ASKING_S = 2.0
_ABANDONED_PART_S = 86400.0
# For this long a copy that was made ahead of use is not removed to make room for another such copy.
_AHEAD_OF_USE_NS = 3600 * 10**9
# Copies that this process has downloaded, and so hashed: device, inode, size and time of modification.
_downloaded: set[tuple[int, int, int, int]] = set()
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class CacheEntry:
    """A file to be had.

    Args:
        url: Where it comes from.
        num_bytes, sha256: What it is.
        name: For messages: `shard 3`.
    """

    url: str
    num_bytes: int
    sha256: str
    name: str


class CachedFile:
    """A complete copy, open and kept from being removed until it is closed."""

    def __init__(self, path: Path, descriptor: int, *, is_new: bool) -> None:
        self.path = path
        self.descriptor = descriptor
        self.is_new = is_new
        """Whether this process has just downloaded it, and so checked its sha256."""
        identity = _identity(descriptor)
        if is_new:
            _downloaded.add(identity)
        self.is_own = identity in _downloaded
        """Whether this process has downloaded it, now or earlier, and nobody has changed it since."""

    def close(self) -> None:
        # Not left to the closing: a process forked meanwhile shares the lock and would keep it.
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)


class _NoRoomError(Exception):
    """Everything that could make room is in use."""


class ShardCache:
    """The cache in a directory, as one process sees it; any number of processes may use it at the same time.

    Args:
        folder: On a local disk; made if it is missing. Files in it that are not the cache's are left alone.
        max_bytes: Most bytes of all copies together; None: what the disk has.
        settings: Timeouts and retries of downloads.

    Raises:
        ConfigError: The directory cannot be used.
    """

    def __init__(self, folder: Path, max_bytes: int | None, settings: RemoteSection) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._settings = settings
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._remove_abandoned_parts()
        except OSError as error:
            raise ConfigError(
                f"data.cache.dir: {folder} cannot be used ({error.strerror}); it must be a writable directory on a "
                "local disk, whose file system has locks"
            ) from None

    def open(
        self,
        entry: CacheEntry,
        release: Callable[[], bool] = lambda: False,
        cancelled: threading.Event | None = None,
    ) -> CachedFile:
        """The copy of a file, downloaded if there is none; waits for another process that downloads it.

        Args:
            entry: The file.
            release: Called when everything in the cache is in use: closes some file of this process and says
                whether there was any.
            cancelled: Ends the waiting once it is set.

        Raises:
            DataError: The file cannot be downloaded.
            UnreachableError: For a reason that says nothing against it, such as that there is no room.
            TransferCancelled: `cancelled` was set.
        """
        self._check_fits(entry)
        cancelled = cancelled or threading.Event()
        deadline_s = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                file = self._open_complete(entry) or self._download(entry, cancelled, ahead_of_use=False)
            except _NoRoomError:
                if release():
                    continue
                if time.monotonic() > deadline_s:
                    raise UnreachableError(self._no_room(entry)) from None
                self._ask_for_room()
                _sleep(_POLL_S, cancelled)
                continue
            except OSError as error:
                raise self._unusable(entry, error) from None
            if file is not None:
                self._mark_used(file)
                return file
            self._wait_for_other(entry, cancelled)
            deadline_s = time.monotonic() + _LOCK_TIMEOUT_S

    def download_ahead(self, entry: CacheEntry, cancelled: threading.Event) -> bool:
        """Make a copy of a file that will be needed; False if there is no room for it now.

        Does not wait where another process downloads the same file.

        Raises:
            DataError: The file cannot be downloaded.
            TransferCancelled: `cancelled` was set.
        """
        self._check_fits(entry)
        try:
            if (self.folder / entry.sha256).exists():
                return True
            file = self._download(entry, cancelled, ahead_of_use=True)
        except _NoRoomError:
            return False
        except OSError as error:
            raise self._unusable(entry, error) from None
        if file is not None:
            file.close()
        return True

    def used_bytes(self) -> int:
        """What all copies take, with those under way."""
        return sum(file.num_bytes for file in self._files())

    def is_room_asked_for(self) -> bool:
        """Whether a process is waiting for others to close files that they do not need at the moment."""
        try:
            return time.time() - os.stat(self.folder / "wanted").st_mtime < _ASKING_S
        except OSError:
            return False

    def _ask_for_room(self) -> None:
        os.close(_open(self.folder / "wanted", os.O_RDWR | os.O_CREAT))
        os.utime(self.folder / "wanted")

    def remove_damaged(self, file: CachedFile) -> None:
        """Remove a copy that turned out not to be what its name says; closes it."""
        with self._locked():
            if _is_same_file(file.path, file.descriptor):
                file.path.unlink()
        file.close()

    def discard(self, file: CachedFile) -> None:
        """Close a copy, and remove it unless somebody else has it open; whoever closes it last removes it then."""
        file.close()
        with self._locked():
            self._remove_unused(file.path)

    # Complete copies

    def _open_complete(self, entry: CacheEntry) -> CachedFile | None:
        path = self.folder / entry.sha256
        try:
            descriptor = _open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        # Exclusive locks on complete files are held for moments only.
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        file = CachedFile(path, descriptor, is_new=False)
        status = os.fstat(descriptor)
        if status.st_nlink == 0:  # removed between the two calls above
            file.close()
            return None
        if status.st_size != entry.num_bytes:
            self.remove_damaged(file)
            return None
        return file

    @staticmethod
    def _mark_used(file: CachedFile) -> None:
        """Set the time of access, explicitly since many disks are mounted without it; not that of modification."""
        with contextlib.suppress(PermissionError):  # a copy that another user made
            os.utime(file.descriptor, ns=(time.time_ns(), os.fstat(file.descriptor).st_mtime_ns))

    # Downloads

    def _download(self, entry: CacheEntry, cancelled: threading.Event, *, ahead_of_use: bool) -> CachedFile | None:
        """Download a file; None if another process is at it, or has just finished."""
        descriptor = self._reserve(entry, ahead_of_use)
        if descriptor is None:
            return None
        try:
            remote = RemoteFile(entry.url, entry.num_bytes, entry.name, self._settings, cancelled)
            # Unbuffered, so that a full disk is noticed where something can be done about it.
            with os.fdopen(os.dup(descriptor), "r+b", buffering=0) as file:
                self._fill(remote, file, entry, ahead_of_use)
                os.fsync(descriptor)
            return self._commit(entry, descriptor)
        except BaseException as error:
            # The next attempt goes on behind what there is, unless it is that which fills the disk.
            is_useless = os.fstat(descriptor).st_size == 0 or getattr(error, "errno", None) in _FULL
            self._release_part(entry, descriptor, remove=is_useless)
            raise

    def _fill(self, remote: RemoteFile, file: BinaryIO, entry: CacheEntry, ahead_of_use: bool) -> None:
        try:
            remote.download(file, entry.sha256)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            # Others fill the disk too. What is in use stays, so this ends.
            with self._locked():
                self._free(entry.num_bytes, ahead_of_use)
            remote.download(file, entry.sha256)

    def _reserve(self, entry: CacheEntry, ahead_of_use: bool) -> int | None:
        """Lock the part file of a download and make room for all of it; None if it is there or locked already."""
        with self._locked():
            if (self.folder / entry.sha256).exists():
                return None
            part = self._part_path(entry)
            descriptor = _open(part, os.O_RDWR | os.O_CREAT)
            if not _try_lock(descriptor):
                os.close(descriptor)
                return None
            try:
                self._make_room(entry, ahead_of_use, os.fstat(descriptor).st_size)
            except BaseException:
                part.unlink()
                _unlock(descriptor)
                raise
            return descriptor

    def _release_part(self, entry: CacheEntry, descriptor: int, *, remove: bool) -> None:
        try:
            if remove:
                # With the cache's lock: another process could else lock a file that has no name any more.
                with self._locked():
                    self._part_path(entry).unlink(missing_ok=True)
        finally:
            _unlock(descriptor)

    def _commit(self, entry: CacheEntry, descriptor: int) -> CachedFile:
        path = self.folder / entry.sha256
        with self._locked():
            os.replace(self._part_path(entry), path)
            # Not used yet: times of access and modification are equal.
            now_ns = time.time_ns()
            os.utime(descriptor, ns=(now_ns, now_ns))
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        fsync_path(self.folder)
        return CachedFile(path, descriptor, is_new=True)

    def _wait_for_other(self, entry: CacheEntry, cancelled: threading.Event) -> None:
        """Return when no other process is downloading the file any more.

        Raises:
            DataError: The other process does not get on.
            TransferCancelled: `cancelled` was set.
        """
        part = self._part_path(entry)
        size, since_s = -1, time.monotonic()
        say_at_s = since_s + _SAY_AFTER_S
        while True:
            try:
                descriptor = _open(part, os.O_RDONLY)
            except FileNotFoundError:
                return
            try:
                if _try_lock(descriptor):
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
                    return
                new_size = os.fstat(descriptor).st_size
            finally:
                os.close(descriptor)
            now_s = time.monotonic()
            if new_size != size:
                size, since_s = new_size, now_s
            elif now_s - since_s > _WAIT_WITHOUT_PROGRESS_S:
                raise UnreachableError(
                    f"{entry.name}: another process holds {part} but has not gone on downloading for "
                    f"{_WAIT_WITHOUT_PROGRESS_S:.0f} s; is it stopped?"
                )
            if now_s > say_at_s:
                say_at_s = now_s + _SAY_AFTER_S
                logger.info("waiting for %s: %d of %d bytes are here", entry.name, new_size, entry.num_bytes)
            _sleep(_POLL_S, cancelled)

    # Room

    def _make_room(self, entry: CacheEntry, ahead_of_use: bool, bytes_there: int) -> None:
        part_name = self._part_path(entry).name
        wanted = 0
        if self._max_bytes is not None:
            files = [file for file in self._files() if file.path.name != part_name]
            wanted = sum(file.num_bytes for file in files) + entry.num_bytes - self._max_bytes
        disk = os.statvfs(self.folder)
        wanted = max(wanted, entry.num_bytes - bytes_there - disk.f_bavail * disk.f_frsize)
        if wanted > 0 and self._free(wanted, ahead_of_use) < wanted:
            raise _NoRoomError

    def _free(self, wanted: int, ahead_of_use: bool) -> int:
        """Remove files that nobody uses until `wanted` bytes are free, or there are none; returns the bytes freed.

        First go interrupted downloads, then the least recently used copies, and last copies made ahead of use; the
        latter not for another one of their kind, which would undo what another process has just prepared.
        """
        newly_made_ns = time.time_ns() - _AHEAD_OF_USE_NS

        def is_ahead_of_use(file: _File) -> bool:
            return not file.is_part and file.accessed_ns <= file.modified_ns and file.modified_ns > newly_made_ns

        candidates = self._files()
        if ahead_of_use:
            candidates = [file for file in candidates if not is_ahead_of_use(file)]
        candidates.sort(key=lambda file: (not file.is_part, is_ahead_of_use(file), file.accessed_ns))
        freed = 0
        for file in candidates:
            if freed >= wanted:
                break
            if self._remove_unused(file.path):
                freed += file.num_bytes
        return freed

    def _remove_unused(self, path: Path) -> bool:
        """Remove a file unless a process uses it; the caller holds the cache's lock."""
        try:
            descriptor = _open(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            is_unused = _try_lock(descriptor)
            if is_unused:
                path.unlink(missing_ok=True)
            return is_unused
        finally:
            _unlock(descriptor)

    def _remove_abandoned_parts(self) -> None:
        for file in self._files(parts_only=True):
            if time.time_ns() - file.modified_ns > _ABANDONED_PART_S * 1e9:
                self._remove_unused(file.path)

    def _files(self, *, parts_only: bool = False) -> list[_File]:
        """The cache's files. Downloads that go on count with the size they will have."""
        files = []
        with os.scandir(self.folder) as entries:
            for found in entries:
                part = _PART.fullmatch(found.name)
                if part is None and (parts_only or not _COMPLETE.fullmatch(found.name)):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = found.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        num_bytes = status.st_size if part is None or not _is_locked(found.path) else int(part[2])
                        times_ns = status.st_atime_ns, status.st_mtime_ns
                        files.append(_File(Path(found.path), num_bytes, *times_ns, is_part=part is not None))
        return files

    # Locks and messages

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = _open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
        try:
            deadline_s = time.monotonic() + _LOCK_TIMEOUT_S
            while not _try_lock(descriptor):
                if time.monotonic() > deadline_s:
                    raise UnreachableError(
                        f"{self.folder / 'lock'} has been held for {_LOCK_TIMEOUT_S:.0f} s; is a process stopped, or "
                        "data.cache.dir on a network file system?"
                    )
                time.sleep(_POLL_S / 10)
            yield
        finally:
            _unlock(descriptor)

    def _part_path(self, entry: CacheEntry) -> Path:
        assert _COMPLETE.fullmatch(entry.sha256)
        return self.folder / f"{entry.sha256}-{entry.num_bytes}.part"

    def _check_fits(self, entry: CacheEntry) -> None:
        if self._max_bytes is not None and entry.num_bytes > self._max_bytes:
            raise UnreachableError(
                f"{entry.name} has {entry.num_bytes} bytes, more than data.cache.max_bytes ({self._max_bytes})"
            )

    def _no_room(self, entry: CacheEntry) -> str:
        in_use = self.used_bytes()
        limit = "what the disk has" if self._max_bytes is None else f"data.cache.max_bytes ({self._max_bytes})"
        return (
            f"{entry.name} ({entry.num_bytes} bytes) finds no room in {self.folder} ({in_use} bytes in use); "
            f"the limit is {limit}: raise it, or lower data.lanes or data.shuffle_window"
        )

    def _unusable(self, entry: CacheEntry, error: OSError) -> UnreachableError:
        advice = (
            "free some space there, or choose another data.cache.dir" if error.errno in _FULL else "data.cache.dir"
        )
        return UnreachableError(f"{entry.name} cannot be copied to {self.folder}: {error.strerror} ({advice})")


@dataclass(frozen=True)
class _File:
    path: Path
    num_bytes: int
    accessed_ns: int
    modified_ns: int
    is_part: bool


def _open(path: Path, flags: int) -> int:
    """Open a regular file; a link could lead out of the cache, and a pipe would make its reader wait for ever."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def _identity(descriptor: int) -> tuple[int, int, int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _sleep(seconds: float, cancelled: threading.Event) -> None:
    if cancelled.wait(seconds):
        raise TransferCancelled


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(descriptor: int) -> None:
    # Not left to the closing: a process forked meanwhile shares the lock and would keep it.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _is_locked(path: str) -> bool:
    try:
        descriptor = _open(Path(path), os.O_RDONLY)
    except OSError:
        return False
    try:
        is_free = _try_lock(descriptor)
    finally:
        _unlock(descriptor)
    return not is_free


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        status = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(status, os.fstat(descriptor))

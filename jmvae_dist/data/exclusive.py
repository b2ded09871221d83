"""Writing to a place that others may want to write to at the same time, or that takes no more."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from jmvae_dist.errors import ConfigError


@contextmanager
def os_errors_explained(out: Path) -> Iterator[None]:
    """A full or read-only disk is not a defect of this program: one line instead of a traceback."""
    try:
        yield
    except OSError as error:
        about = f" ({error.filename})" if error.filename is not None else ""
        raise ConfigError(f"cannot write --out {out}: {error.strerror or error}{about}") from None


@contextmanager
def locked(out: Path) -> Iterator[bool]:
    """Keep other writers away from `out`; yields False where the file system has no locks.

    Raises:
        ConfigError: another process writes to `out`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f".{out.name}.lock")
    while True:
        with open(path, "ab") as lock:
            is_locked = _lock(lock, out)
            # The previous owner may have removed the file between its opening and its locking here.
            if is_locked and not _is_same_file(lock, path):
                continue
            try:
                yield is_locked
            finally:
                if is_locked:
                    path.unlink(missing_ok=True)
            return


def _lock(lock: BinaryIO, out: Path) -> bool:
    """Lock an open file until it is closed; False where the file system has no locks."""
    try:
        # Unlike `flock`, record locks also hold between the nodes of a network file system.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ConfigError(f"another process is writing to {out}; wait for it, or choose another --out") from None
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return False
        raise
    return True


def _is_same_file(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

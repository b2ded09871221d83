"""Opening files that others provide."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from jmvae_dist.data.urls import Location
from jmvae_dist.errors import DataError, UnreachableError

# What says that the file itself is not there; all else (too many open files, no memory, a lost mount) may pass.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


def read_error(path: str | Path, what: str, error: OSError, manifest: Location | None = None) -> DataError:
    """The error of a file that cannot be read; an UnreachableError unless the file is not there.

    A sample of a shard that is missing is bad, and may be masked. One of a shard that this process cannot open at the
    moment is not, and where the folder or the manifest is missing as well, a disk is, and not a shard.

    Args:
        path: the file.
        what: it is, for the message.
        error: of the operating system.
        manifest: the one that names the file.
    """
    message = f"{path}: cannot read {what}: {error.strerror}"
    if error.errno not in _ABSENT:
        return UnreachableError(message)
    if error.errno == errno.ENOENT:
        beside = [Path(path).parent, *([manifest] if isinstance(manifest, Path) else [])]
        for place in beside:
            if not place.exists():
                return UnreachableError(f"{message}, and {place} is gone too: is the file system mounted?")
    return DataError(message)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; a pipe or device of that name would make its reader wait for ever.

    Raises:
        DataError: not a regular file.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb")


def read_exactly(path: str | Path, what: str, expected_bytes: int, manifest: Location | None = None) -> bytes:
    """The content of a small file beside a shard, whose size is known beforehand.

    Args:
        path: the file.
        what: it is, for messages.
        expected_bytes: its size.
        manifest: the one that names the file; see `read_error`.

    Raises:
        DataError: it is missing, or has another size.
        UnreachableError: it cannot be read for a reason that says nothing against it.
    """
    try:
        with open_regular(path) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            # Not before the size is right: to read reserves memory for whatever number a manifest states.
            content = file.read(expected_bytes) if num_bytes == expected_bytes else b""
    except OSError as error:
        raise read_error(path, what, error, manifest) from None
    if len(content) != expected_bytes:
        size = f"only {num_bytes}" if num_bytes < expected_bytes else "more"
        raise DataError(f"{path}: {what} should have {expected_bytes} bytes but has {size}; copy it again")
    return content

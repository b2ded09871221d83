"""Opening files that others provide."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from jmvae_dist.errors import DataError


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

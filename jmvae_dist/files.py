"""Writing files that others read: complete or absent, and still there after a power cut."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_CHUNK_BYTES = 1 << 20


def fsync_path(path: Path) -> None:
    """Make a file's content, or the renames in a directory, durable: without it a power cut may undo them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing_atomic(path: Path) -> Iterator[BinaryIO]:
    """Write a file that replaces `path` when the block ends without an error.

    A reader, or a crash at any moment, sees the old file or the complete new one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace the content of `path` by `text`, atomically and durably."""
    with writing_atomic(path) as file:
        file.write(text.encode())


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's content, read in chunks."""
    with path.open("rb", buffering=0) as file:
        return sha256_of_descriptor(file.fileno())


def sha256_of_descriptor(descriptor: int) -> str:
    """Hexadecimal sha256 of the content of an open file, wherever its position is; leaves that as it is."""
    digest, position = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, _CHUNK_BYTES, position):
        digest.update(chunk)
        position += len(chunk)
    return digest.hexdigest()

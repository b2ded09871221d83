"""Reading input files of sources: plain or gzip, with limits and checksums."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from jmvae_dist.errors import ConfigError, DataError
from jmvae_dist.files import sha256_of

MAX_CONTENT_BYTES = 16 * 2**30

_CHUNK_BYTES = 16 * 2**20


def read_plain_or_gzip(path: Path, limit_bytes: int = MAX_CONTENT_BYTES) -> bytes:
    """The content of a file, decompressed if it is gzip (told by its first bytes, not by its name).

    Raises:
        ConfigError: the file cannot be opened.
        DataError: the gzip stream is damaged, or the content exceeds the limit.
    """
    try:
        with open(path, "rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if compressed else open(path, "rb") as file:
            content = _read_at_most(file, limit_bytes + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > limit_bytes:
        raise DataError(f"{path}: content exceeds the limit of {limit_bytes} bytes")
    return content


def _read_at_most(file: BinaryIO | gzip.GzipFile, limit_bytes: int) -> bytes:
    """Up to `limit_bytes`, in chunks: `file.read(limit_bytes)` would reserve all of them in memory at once."""
    content = bytearray()
    while len(content) < limit_bytes and (chunk := file.read(min(_CHUNK_BYTES, limit_bytes - len(content)))):
        content += chunk
    return bytes(content)


def input_files(*paths: Path) -> list[dict[str, Any]]:
    """Name and sha256 of input files, for the manifest."""
    return [{"name": path.name, "sha256": sha256_of(path)} for path in paths]

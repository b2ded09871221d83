"""Reads remote files, wherever they are: with retries from the byte reached, checked sizes, and resumed downloads.

Whatever goes wrong ends as one DataError that names the file, the cause and the number of attempts; it is an
UnreachableError where it says nothing against the file. Nothing waits for ever. Messages show neither passwords nor
signatures of URLs. The requests themselves are in `transfer_http` and `transfer_fsspec`.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

from jmvae_dist.data.transfer_failures import LastingFailure, PassingFailure, WrongFile
from jmvae_dist.data.transfer_fsspec import StoreSource
from jmvae_dist.data.transfer_http import HttpSource
from jmvae_dist.data.urls import HTTP_SCHEMES, check_remote, scheme_of, shown
from jmvae_dist.data_config import RemoteSection
from jmvae_dist.errors import DataError, UnreachableError

_READ_BYTES = 256 * 2**10
# An attempt that brings this much was not in vain: the count of failed ones starts anew, so that a long download over
# a bad line ends, and one that does not get on ends as well.
_PROGRESS_BYTES = 2**20
_MAX_BACKOFF_S = 30.0

# Not the global generator: jitter must differ between ranks that were seeded alike, and leave their numbers alone.
_jitter = random.SystemRandom()


class TransferCancelled(Exception):  # noqa: N818  # a request, not an error
    """The transfer was asked to stop."""


class _Source(Protocol):
    def read(self, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
        """Position and content of the file's pieces from `start` on; from 0 where the server cannot do otherwise."""

    def identify(self) -> tuple[int, str]:
        """Size and version of the file."""


class RemoteFile:
    """A file at a URL.

    Args:
        url: Absolute, of one of the schemes in `data.urls`.
        num_bytes: Its size; None if it is not known.
        name: What it is, for messages: `shard 3`.
        settings: Timeouts and retries.
        cancelled: Ends any transfer of this file with TransferCancelled once it is set.
        versions: By URL, the version of which parts have been read; where files are opened again and again, shared
            by all openings, so that all parts are of one version.

    Raises:
        DataError: The URL may not be opened.
    """

    def __init__(
        self,
        url: str,
        num_bytes: int | None,
        name: str,
        settings: RemoteSection,
        cancelled: threading.Event | None = None,
        versions: dict[str, str] | None = None,
    ) -> None:
        try:
            check_remote(url)
        except ValueError as error:
            raise DataError(f"{name}: {error}") from None
        self._label = f"{name} {shown(url)}"
        self._num_bytes = num_bytes
        self._settings = settings
        self._cancelled = cancelled or threading.Event()
        source = HttpSource if scheme_of(url) in HTTP_SCHEMES else StoreSource
        self._source: _Source = source(url, num_bytes, settings, {} if versions is None else versions)

    def read_whole(self, max_bytes: int) -> bytes:
        """The content of a small file.

        Raises:
            DataError: It cannot be read or has more than `max_bytes` bytes.
        """
        content = bytearray()

        def attempt() -> None:
            content.clear()
            for _, chunk in self._source.read(0, self._num_bytes):
                self._check_cancelled()
                content.extend(chunk)
                if len(content) > max_bytes:
                    raise WrongFile(f"more than {max_bytes} bytes")
            self._check_complete(len(content), self._num_bytes)

        self._retry(attempt, lambda: 0)
        return bytes(content)

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes start .. stop - 1.

        Raises:
            DataError: They cannot be read.
            UnreachableError: For a reason that says nothing against the file.
        """
        assert 0 <= start < stop
        content = bytearray()

        def attempt() -> None:
            for position, chunk in self._source.read(start + len(content), stop):
                self._check_cancelled()
                if position != start + len(content):
                    raise LastingFailure(
                        "the server does not serve parts of files (it ignores Range); set data.cache.dir, so that "
                        "whole shards are downloaded"
                    )
                content.extend(chunk)
            self._check_complete(start + len(content), stop)

        self._retry(attempt, lambda: len(content))
        return bytes(content)

    def identify(self) -> tuple[int, str]:
        """Size in bytes, and what the server offers to tell versions apart; empty if it offers nothing.

        Raises:
            DataError: There is no such file, or the server does not say its size.
        """
        found: list[tuple[int, str]] = []
        self._retry(lambda: found.append(self._source.identify()), lambda: 0)
        return found[0]

    def stream(self) -> RemoteStream:
        """The content from the start, read as it comes; for a file of known size.

        Unlike `download`, nothing checks a sha256.
        """
        assert self._num_bytes is not None
        return RemoteStream(self._num_bytes, self._source, self._retry)

    def download(self, file: BinaryIO, sha256: str) -> None:
        """Write the whole content to `file`, going on behind what an earlier download of it has left there.

        Raises:
            DataError: It cannot be read, or its size or sha256 is another.
            OSError: It cannot be written.
        """
        assert self._num_bytes is not None
        sink = _Sink(file, self._num_bytes)
        for _ in range(2):
            self._retry(lambda: self._download_rest(sink), lambda: sink.received)
            if sink.digest.hexdigest() == sha256:
                return
            # The beginning may be that of another version, or be damaged on disk or on the way.
            sink.restart()
        raise DataError(
            f"{self._label}: sha256 differs from the manifest's, also when downloaded again: the file was replaced "
            "or is damaged where it comes from"
        )

    def _download_rest(self, sink: _Sink) -> None:
        if sink.position < sink.num_bytes:
            for position, chunk in self._source.read(sink.position, sink.num_bytes):
                self._check_cancelled()
                if position != sink.position:
                    sink.restart()
                sink.write(chunk)
        self._check_complete(sink.position, sink.num_bytes)

    @staticmethod
    def _check_complete(position: int, stop: int | None) -> None:
        if stop is not None and position < stop:
            raise PassingFailure(f"the connection ended after {position} of {stop} bytes")

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise TransferCancelled

    def _retry(self, attempt: Callable[[], None], received: Callable[[], int]) -> None:
        failures = attempts = 0
        while True:
            self._check_cancelled()
            attempts += 1
            received_before = received()
            try:
                return attempt()
            except WrongFile as failure:
                raise DataError(f"{self._label}: {failure}") from None
            except LastingFailure as failure:
                raise UnreachableError(f"{self._label}: {failure}") from None
            except PassingFailure as failure:
                gained = received() - received_before
                failures = 1 if gained >= _PROGRESS_BYTES else failures + 1
                if failures >= self._settings.attempts:
                    raise UnreachableError(
                        f"{self._label}: {failure}; given up after {attempts} attempts (data.remote.attempts)"
                    ) from None
                backoff_s = min(_MAX_BACKOFF_S, self._settings.backoff_s * 2 ** (failures - 1))
                asked_s = min(_MAX_BACKOFF_S, failure.pause_s)  # a server may ask for hours
                self._cancelled.wait(max(asked_s, _jitter.uniform(0.5, 1.0) * backoff_s))


class RemoteStream:
    """Reads a remote file once, from the start to the end, going on where a connection broke."""

    def __init__(
        self,
        num_bytes: int,
        source: _Source,
        retry: Callable[[Callable[[], None], Callable[[], int]], None],
    ) -> None:
        self._num_bytes, self._source, self._retry = num_bytes, source, retry
        self._pieces: Iterator[tuple[int, bytes]] | None = None
        self._rest = b""
        self._position = 0

    def read(self, size: int, /) -> bytes:
        """The next bytes, at least one and at most `size`; none at the end of the file.

        Raises:
            DataError: They cannot be read.
        """
        if not self._rest and self._position < self._num_bytes:
            self._retry(self._next_piece, lambda: self._position)
        content, self._rest = self._rest[:size], self._rest[size:]
        return content

    def close(self) -> None:
        """End the connection."""
        # Generators end their connection when they are closed.
        if self._pieces is not None:
            self._pieces.close()  # type: ignore[attr-defined]
        self._pieces = None

    def _next_piece(self) -> None:
        if self._pieces is None:
            self._pieces = self._source.read(self._position, self._num_bytes)
        try:
            for start, piece in self._pieces:
                # A server that ignores Range begins anew.
                if start + len(piece) > self._position:
                    self._rest = piece[self._position - start :]
                    self._position = start + len(piece)
                    return
        except (PassingFailure, LastingFailure):
            self._pieces = None
            raise
        self._pieces = None
        raise PassingFailure(f"the connection ended after {self._position} of {self._num_bytes} bytes")


class _Sink:
    """What has arrived of a download: in a file, hashed as it comes."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.digest = hashlib.sha256()
        self.position = 0
        self.received = 0
        self._file = file
        file.seek(0)
        while chunk := file.read(_READ_BYTES):
            self.digest.update(chunk)
            self.position += len(chunk)
        if self.position > num_bytes:
            self.restart()

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self.digest = hashlib.sha256()
        self.position = 0

    def write(self, chunk: bytes) -> None:
        rest = memoryview(chunk)
        while rest:  # an unbuffered file may take a part only
            rest = rest[self._file.write(rest) :]
        self.digest.update(chunk)
        self.position += len(chunk)
        self.received += len(chunk)

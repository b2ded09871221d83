"""Reads remote files: HTTP and object stores, with timeouts, retries from the byte reached, and checked sizes.

Whatever goes wrong ends as one DataError that names the file, the cause and the number of attempts; it is an
UnreachableError where it says nothing against the file. Nothing waits for ever. Messages show neither passwords nor
signatures of URLs.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import queue
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import urljoin

from jmvae_dist.data.urls import HTTP_SCHEMES, check_remote, scheme_of, shown
from jmvae_dist.data_config import RemoteSection
from jmvae_dist.errors import DataError, UnreachableError

Result = TypeVar("Result")

_CHUNK_BYTES = 256 * 2**10
_STORE_BLOCK_BYTES = 8 * 2**20
# An attempt that brings this much was not in vain: the count of failed ones starts anew, so that a long download over
# a bad line ends, and one that does not get on ends as well.
_PROGRESS_BYTES = 2**20
# Less than this within `stall_timeout_s` is a stall: a server could send a byte now and then for ever.
_STALL_BYTES = 16 * 2**10
_MAX_BACKOFF_S = 30.0
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_MAX_DIGITS = 19  # of a 64-bit number; Python refuses to convert thousands of them
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
# What stores call that which differs between versions of an object: S3, Azure, Google, Hugging Face.
_VERSIONS = ("ETag", "etag", "generation", "blob_id")
_DRIVERS = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
}

# Not the global generator: jitter must differ between ranks that were seeded alike, and leave their numbers alone.
_jitter = random.SystemRandom()
_of_thread = threading.local()


class TransferCancelled(Exception):  # noqa: N818  # a request, not an error
    """The transfer was asked to stop."""


class _PassingFailure(Exception):  # noqa: N818  # becomes a DataError when it does not pass
    """Another attempt may succeed.

    Args:
        reason: For the message.
        pause_s: How long the server asks to wait.
    """

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


class _LastingFailure(Exception):  # noqa: N818
    """Another attempt would fail as well."""


class _WrongFile(_LastingFailure):
    """What is at the URL is not the file that the manifest means."""


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
        source = _HttpSource if scheme_of(url) in HTTP_SCHEMES else _StoreSource
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
                    raise _WrongFile(f"more than {max_bytes} bytes")
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
                    raise _LastingFailure(
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
            raise _PassingFailure(f"the connection ended after {position} of {stop} bytes")

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
            except _WrongFile as failure:
                raise DataError(f"{self._label}: {failure}") from None
            except _LastingFailure as failure:
                raise UnreachableError(f"{self._label}: {failure}") from None
            except _PassingFailure as failure:
                gained = received() - received_before
                failures = 1 if gained >= _PROGRESS_BYTES else failures + 1
                if failures >= self._settings.attempts:
                    raise UnreachableError(
                        f"{self._label}: {failure}; given up after {attempts} attempts (data.remote.attempts)"
                    ) from None
                backoff_s = min(_MAX_BACKOFF_S, self._settings.backoff_s * 2 ** (failures - 1))
                self._cancelled.wait(max(failure.pause_s, _jitter.uniform(0.5, 1.0) * backoff_s))


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
        except (_PassingFailure, _LastingFailure):
            self._pieces = None
            raise
        self._pieces = None
        raise _PassingFailure(f"the connection ended after {self._position} of {self._num_bytes} bytes")


class _Sink:
    """What has arrived of a download: in a file, hashed as it comes."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.digest = hashlib.sha256()
        self.position = 0
        self.received = 0
        self._file = file
        file.seek(0)
        while chunk := file.read(_CHUNK_BYTES):
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


class _HttpSource:
    """A file at http:// or https://, through `requests`: proxies and certificates are those of the environment."""

    def __init__(self, url: str, num_bytes: int | None, settings: RemoteSection, versions: dict[str, str]) -> None:
        self._url = url
        self._num_bytes = num_bytes
        self._settings = settings
        self._versions = versions

    def read(self, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
        # Without Range where the whole file is wanted: some servers answer it with an error.
        ranged = start > 0 or stop != self._num_bytes
        last = "" if stop is None else str(stop - 1)
        response = self._request({"Range": f"bytes={start}-{last}"} if ranged else {})
        try:
            position = start if self._check_head(response, start, ranged) else 0
            if stop != self._num_bytes:
                self._check_same_version(response)
            yield from self._body(response, position, stop)
        finally:
            response.close()

    def identify(self) -> tuple[int, str]:
        # The first byte instead of HEAD, which signed URLs and some servers refuse.
        response = self._request({"Range": "bytes=0-0"})
        try:
            self._check_head(response, 0, ranged=True)
            length = response.headers.get("Content-Length", "")
            if response.status_code == 206:
                length = response.headers.get("Content-Range", "").rpartition("/")[2]
            num_bytes = _number(length)
            if num_bytes is None:
                raise _LastingFailure("the server does not say how large the file is")
            return num_bytes, response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        finally:
            response.close()

    def _request(self, headers: dict[str, str]) -> Any:
        """The response to a GET of the file, after redirects, which may not lead away from HTTP."""
        url = self._url
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._get(url, headers)
            target = response.headers.get("Location")
            if response.status_code not in _REDIRECTS or target is None:
                return response
            response.close()
            try:
                target = urljoin(url, target)
            except ValueError:  # such as half an IPv6 address
                raise _LastingFailure("redirected to something that is no URL") from None
            if scheme_of(target) not in HTTP_SCHEMES:
                raise _LastingFailure(f"redirected to {shown(target)!r}, which is not http:// or https://")
            if scheme_of(url) == "https" and scheme_of(target) == "http":
                raise _LastingFailure(f"redirected from https:// to the unprotected {shown(target)!r}")
            url = target
        raise _LastingFailure(f"redirected more than {_MAX_REDIRECTS} times")

    def _get(self, url: str, headers: dict[str, str]) -> Any:
        import requests
        import urllib3

        timeout_s = (self._settings.connect_timeout_s, self._settings.stall_timeout_s)
        try:
            return _session().get(url, headers=headers, stream=True, allow_redirects=False, timeout=timeout_s)
        except requests.exceptions.SSLError as error:
            is_refused = any(isinstance(item, ssl.SSLCertVerificationError) for item in _chain(error))
            raise (_LastingFailure if is_refused else _PassingFailure)(
                f"no secure connection: {_cause(error)}"
            ) from None
        except requests.exceptions.ConnectTimeout:
            raise _PassingFailure(
                f"no connection within {timeout_s[0]:g} s (data.remote.connect_timeout_s)"
            ) from None
        except requests.exceptions.ReadTimeout:
            raise _PassingFailure(f"no answer within {timeout_s[1]:g} s (data.remote.stall_timeout_s)") from None
        except (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError, OSError) as error:
            if isinstance(error, ValueError):  # InvalidURL and its like
                raise _LastingFailure(f"cannot be requested: {type(error).__name__}") from None
            raise _PassingFailure(_cause(error)) from None
        except (ValueError, urllib3.exceptions.HTTPError) as error:
            raise _LastingFailure(f"cannot be requested: {type(error).__name__}") from None

    def _check_head(self, response: Any, start: int, ranged: bool) -> bool:
        """Whether the response is the part that was asked for, and not the whole file."""
        status = response.status_code
        if status == 206 and ranged:
            content_range = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if content_range is None or int(content_range[1]) != start:
                raise _LastingFailure("the server's answer to Range is not the part that was asked for")
            total = None if content_range[3] == "*" else int(content_range[3])
        elif status == 200:
            total = _number(response.headers.get("Content-Length", ""))
        else:
            self._refuse(response)
        self._check_identity(response, total)
        return bool(status == 206)

    def _refuse(self, response: Any) -> None:
        status = response.status_code
        phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "unknown status"
        reason = f"the server answered {status} ({phrase})"
        if status == 416:
            raise _WrongFile(f"{reason}: the file is shorter than the manifest says")
        if status in (404, 410):
            raise _WrongFile(reason)
        if status not in _PASSING_STATUSES:
            raise _LastingFailure(reason)
        pause_s = _number(response.headers.get("Retry-After", "")) or 0
        raise _PassingFailure(reason, min(_MAX_BACKOFF_S, pause_s))

    def _check_identity(self, response: Any, total: int | None) -> None:
        if response.headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
            raise _LastingFailure("the server compresses it on the way, although it was asked not to")
        is_right_size = total is not None and total == self._num_bytes
        if not is_right_size and response.headers.get("Content-Type", "").lower().startswith("text/html"):
            raise _WrongFile("an HTML page, such as a login form or a message, instead of the file")
        if total is not None and self._num_bytes is not None and total != self._num_bytes:
            raise _WrongFile(f"{total} bytes, the manifest says {self._num_bytes}: the file was replaced")

    def _check_same_version(self, response: Any) -> None:
        """Parts of one file must be of one version; that of a whole file is known by its sha256."""
        etag = response.headers.get("ETag", "")
        if etag.startswith('"'):  # a weak one (W/) says nothing about bytes
            _check_version(self._versions, self._url, etag)

    def _body(self, response: Any, position: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
        import requests
        import urllib3

        stall = _StallGuard(self._settings.stall_timeout_s)
        while stop is None or position < stop:
            wanted = _CHUNK_BYTES if stop is None else min(_CHUNK_BYTES, stop - position)
            try:
                # One read of the socket at most: to wait for a full chunk would hide a stall.
                chunk = response.raw.read1(wanted, decode_content=False)
            except (urllib3.exceptions.ReadTimeoutError, TimeoutError):
                raise _PassingFailure(stall.message(position)) from None
            except (
                requests.exceptions.RequestException,
                urllib3.exceptions.HTTPError,
                http.client.HTTPException,
                OSError,
            ) as error:
                raise _PassingFailure(f"{_cause(error)} after {position} bytes") from None
            if not chunk:
                return
            yield position, chunk
            position += len(chunk)
            stall.received(len(chunk), position)
        if stop is not None and stop == self._num_bytes and response.headers.get("Content-Length") is None:
            self._check_ended(response)

    @staticmethod
    def _check_ended(response: Any) -> None:
        """A body of unstated length may go on behind the size that the manifest gives."""
        import urllib3

        try:
            more = response.raw.read1(1, decode_content=False)
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError):
            return  # what was wanted is here
        if more:
            raise _WrongFile("more bytes than the manifest says: the file was replaced")


def _check_version(versions: dict[str, str], url: str, version: str) -> None:
    if versions.setdefault(url, version) != version:
        raise _WrongFile("the file has changed on the server since this process began to read it")


class _StallGuard:
    """Notices a transfer that goes on, but hardly."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._since_s = time.monotonic()
        self._num_bytes = 0

    def received(self, num_bytes: int, position: int) -> None:
        self._num_bytes += num_bytes
        now_s = time.monotonic()
        if now_s - self._since_s < self._timeout_s:
            return
        if self._num_bytes < _STALL_BYTES:
            raise _PassingFailure(self.message(position))
        self._since_s, self._num_bytes = now_s, 0

    def message(self, position: int) -> str:
        return f"stalled for {self._timeout_s:g} s after {position} bytes (data.remote.stall_timeout_s)"


class _StoreSource:
    """An object in a store, through `fsspec` and the package of the store; options are those of the environment."""

    def __init__(self, url: str, num_bytes: int | None, settings: RemoteSection, versions: dict[str, str]) -> None:
        self._url = url
        self._num_bytes = num_bytes
        self._versions = versions
        self._timeout_s = settings.connect_timeout_s + settings.stall_timeout_s
        self._size: int | None = None

    def read(self, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
        if self._size is None:
            self._size = self._look()
        stop = self._size if stop is None else stop
        while start < stop:
            end = min(stop, start + _STORE_BLOCK_BYTES)
            block = self._read_block(start, end)
            if len(block) > end - start:
                raise _LastingFailure("the store answered with more than the part that was asked for")
            if not block:
                return
            yield start, block
            start += len(block)

    def _look(self) -> int:
        """The size, once size and version are what they should be: stores do not say them with each part."""
        facts = self._call(lambda system: system.info(self._url))
        size, version = facts.get("size"), next((str(facts[key]) for key in _VERSIONS if facts.get(key)), None)
        if not isinstance(size, int):
            raise _WrongFile("not a file of known size")
        if self._num_bytes is not None and size != self._num_bytes:
            raise _WrongFile(f"{size} bytes, the manifest says {self._num_bytes}: the file was replaced")
        if version is not None:
            _check_version(self._versions, self._url, version)
        return size

    def identify(self) -> tuple[int, str]:
        facts = self._call(lambda system: system.info(self._url))
        if not isinstance(facts.get("size"), int):
            raise _LastingFailure("not a file of known size")
        versions = (facts.get(key) for key in (*_VERSIONS, "LastModified", "mtime"))
        return facts["size"], next((str(version) for version in versions if version), "")

    def _read_block(self, start: int, end: int) -> bytes:
        return self._call(lambda system: system.cat_file(self._url, start=start, end=end))

    def _call(self, function: Callable[[Any], Result]) -> Result:
        """The result of a request; fsspec and the packages behind it know no common timeout."""
        answer: queue.SimpleQueue[tuple[Result | None, Exception | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                answer.put((function(_file_system(self._url)), None))
            except Exception as error:
                answer.put((None, error))

        threading.Thread(target=run, daemon=True).start()
        try:
            result, error = answer.get(timeout=self._timeout_s)
        except queue.Empty:
            raise _PassingFailure(f"no answer within {self._timeout_s:g} s (data.remote.stall_timeout_s)") from None
        if isinstance(error, (_LastingFailure, _PassingFailure)):
            raise error
        if isinstance(error, FileNotFoundError):
            raise _WrongFile(_cause(error)) from None
        if isinstance(error, (PermissionError, IsADirectoryError, NotImplementedError)):
            raise _LastingFailure(_cause(error)) from None
        if error is not None:
            raise _PassingFailure(_cause(error)) from None
        return result  # type: ignore[return-value]


def _file_system(url: str) -> Any:
    scheme = scheme_of(url)
    assert scheme is not None
    try:
        import fsspec

        # By scheme and not by URL, which fsspec would search for more than a place.
        return fsspec.filesystem(scheme)
    except ImportError:
        raise _LastingFailure(
            f"{scheme}:// needs the packages fsspec and {_DRIVERS[scheme]}; install them beside jmvae_dist"
        ) from None


def _session() -> Any:
    """The HTTP session of this thread: neither threads nor a forked process may share connections."""
    import requests

    if getattr(_of_thread, "pid", None) != os.getpid():
        session = requests.Session()
        # Even with allow_redirects=False it would read the whole body of a redirect, which may never end.
        session.get_redirect_target = lambda response: None  # type: ignore[assignment, method-assign]
        session.headers.update({"Accept-Encoding": "identity", "User-Agent": "jmvae-dist"})
        _of_thread.session, _of_thread.pid = session, os.getpid()
    return _of_thread.session


def _number(text: str) -> int | None:
    """A number in a header; None if it is none, or one that nothing has."""
    return int(text) if text.isdecimal() and len(text) <= _MAX_DIGITS else None


def _cause(error: BaseException) -> str:
    """What the operating system said, from inside the libraries' exceptions, which repeat the URL."""
    chain = _chain(error)
    for inner in reversed(chain):
        if isinstance(inner, OSError) and inner.strerror:
            return str(inner.strerror)
        if isinstance(inner, http.client.IncompleteRead):
            return "the connection ended early"
    text = f" {' '.join(str(error).split())[:200]}" if len(chain) == 1 and str(error) else ""
    return f"{type(error).__name__}{text}"


def _chain(error: BaseException) -> list[BaseException]:
    """The exception and those it was made from, outermost first."""
    chain = [error]
    for item in chain:  # grows meanwhile
        inner = (*item.args, getattr(item, "reason", None), item.__cause__, item.__context__)
        chain += [other for other in inner if isinstance(other, BaseException) and other not in chain]
    return chain

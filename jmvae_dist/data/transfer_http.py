"""Files at http:// and https://, through `requests`: one request, its redirects, and what its answer must be.

Every answer is judged before a byte of it is believed: status, size, range, version, and that it comes on at all.
Retries are those of `transfer`.
"""

from __future__ import annotations

import http.client
import os
import re
import ssl
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any
from urllib.parse import urljoin

from jmvae_dist.data.transfer_failures import (
    LastingFailure,
    PassingFailure,
    WrongFile,
    cause_of,
    check_version,
    exception_chain,
)
from jmvae_dist.data.urls import HTTP_SCHEMES, scheme_of, shown
from jmvae_dist.data_config import RemoteSection

_CHUNK_BYTES = 256 * 2**10
# Less than this within `stall_timeout_s` is a stall: a server could send a byte now and then for ever.
_STALL_BYTES = 16 * 2**10
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_MAX_DIGITS = 19  # of a 64-bit number; Python refuses to convert thousands of them
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")

_of_thread = threading.local()


class HttpSource:
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
                raise LastingFailure("the server does not say how large the file is")
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
                raise LastingFailure("redirected to something that is no URL") from None
            if scheme_of(target) not in HTTP_SCHEMES:
                raise LastingFailure(f"redirected to {shown(target)!r}, which is not http:// or https://")
            if scheme_of(url) == "https" and scheme_of(target) == "http":
                raise LastingFailure(f"redirected from https:// to the unprotected {shown(target)!r}")
            url = target
        raise LastingFailure(f"redirected more than {_MAX_REDIRECTS} times")

    def _get(self, url: str, headers: dict[str, str]) -> Any:
        import requests
        import urllib3

        timeout_s = (self._settings.connect_timeout_s, self._settings.stall_timeout_s)
        try:
            return _session().get(url, headers=headers, stream=True, allow_redirects=False, timeout=timeout_s)
        except requests.exceptions.SSLError as error:
            is_refused = any(isinstance(item, ssl.SSLCertVerificationError) for item in exception_chain(error))
            raise (LastingFailure if is_refused else PassingFailure)(
                f"no secure connection: {cause_of(error)}"
            ) from None
        except requests.exceptions.ConnectTimeout:
            raise PassingFailure(f"no connection within {timeout_s[0]:g} s (data.remote.connect_timeout_s)") from None
        except requests.exceptions.ReadTimeout:
            raise PassingFailure(f"no answer within {timeout_s[1]:g} s (data.remote.stall_timeout_s)") from None
        except (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError, OSError) as error:
            if isinstance(error, ValueError):  # InvalidURL and its like
                raise LastingFailure(f"cannot be requested: {type(error).__name__}") from None
            raise PassingFailure(cause_of(error)) from None
        except (ValueError, urllib3.exceptions.HTTPError) as error:
            raise LastingFailure(f"cannot be requested: {type(error).__name__}") from None

    def _check_head(self, response: Any, start: int, ranged: bool) -> bool:
        """Whether the response is the part that was asked for, and not the whole file."""
        status = response.status_code
        if status == 206 and ranged:
            content_range = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if content_range is None or int(content_range[1]) != start:
                raise LastingFailure("the server's answer to Range is not the part that was asked for")
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
            raise WrongFile(f"{reason}: the file is shorter than the manifest says")
        if status in (404, 410):
            raise WrongFile(reason)
        if status not in _PASSING_STATUSES:
            raise LastingFailure(reason)
        pause_s = _number(response.headers.get("Retry-After", "")) or 0
        raise PassingFailure(reason, pause_s)

    def _check_identity(self, response: Any, total: int | None) -> None:
        if response.headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
            raise LastingFailure("the server compresses it on the way, although it was asked not to")
        is_right_size = total is not None and total == self._num_bytes
        if not is_right_size and response.headers.get("Content-Type", "").lower().startswith("text/html"):
            raise WrongFile("an HTML page, such as a login form or a message, instead of the file")
        if total is not None and self._num_bytes is not None and total != self._num_bytes:
            raise WrongFile(f"{total} bytes, the manifest says {self._num_bytes}: the file was replaced")

    def _check_same_version(self, response: Any) -> None:
        """Parts of one file must be of one version; that of a whole file is known by its sha256."""
        etag = response.headers.get("ETag", "")
        if etag.startswith('"'):  # a weak one (W/) says nothing about bytes
            check_version(self._versions, self._url, etag)

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
                raise PassingFailure(stall.message(position)) from None
            except (
                requests.exceptions.RequestException,
                urllib3.exceptions.HTTPError,
                http.client.HTTPException,
                OSError,
            ) as error:
                raise PassingFailure(f"{cause_of(error)} after {position} bytes") from None
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
            raise WrongFile("more bytes than the manifest says: the file was replaced")


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
            raise PassingFailure(self.message(position))
        self._since_s, self._num_bytes = now_s, 0

    def message(self, position: int) -> str:
        return f"stalled for {self._timeout_s:g} s after {position} bytes (data.remote.stall_timeout_s)"


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

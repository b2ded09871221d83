"""A web server on loopback that serves a folder, with Range, and with the faults that a test asks for."""

from __future__ import annotations

import os
import re
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock


@dataclass
class Fault:
    """What is wrong with one answer.

    Args:
        status: Answer this instead, with an empty body.
        headers: More headers, or others.
        content: Answer with this instead of the file, whole.
        ignores_range: Answer with the whole file.
        cut_after: Close the connection after so many bytes of the body.
        stall_after: Send no more after so many bytes of the body, until the server ends.
        piece_bytes: Send pieces of so many bytes, a hundredth of a second apart.
        states_no_length: Send no Content-Length, and end the body with the connection.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes | None = None
    ignores_range: bool = False
    cut_after: int | None = None
    stall_after: int | None = None
    piece_bytes: int | None = None
    states_no_length: bool = False


class FaultyServer(ThreadingHTTPServer):
    """Serves `folder` at `url`.

    Attributes:
        faults: Per path, the faults of its next answers.
        always: Per path, the fault of every answer after those.
        requests: (path, Range header or "") of all requests so far.
        delay_s: Pause before each answer.
        unanswered: Paths of requests that get no answer, as all do after one for `/silence`; their number is at
            `/unanswered`.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self.always: dict[str, Fault] = {}
        self.requests: list[tuple[str, str]] = []
        self.delay_s = 0.0
        self.unanswered: list[str] = []
        self.is_silent = False
        self.ended = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, path: str) -> int:
        """Number of requests for a path."""
        return sum(requested == path for requested, _ in self.requests)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle is what some tests are about."""


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    """A running server; it ends with the block."""
    # A proxy of the environment does not know this machine's loopback.
    with FaultyServer(folder) as server, mock.patch.dict(os.environ, {"NO_PROXY": "*", "no_proxy": "*"}):
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the body would wait 40 ms for the client to acknowledge the headers
    server: FaultyServer

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        path = self.path.split("?")[0]
        if path == "/unanswered":
            self._answer(200, {}, str(len(self.server.unanswered)).encode(), Fault())
            return
        if self.server.is_silent:
            self.server.unanswered.append(path)
            self.close_connection = True
            self.server.ended.wait()
            return
        if path == "/silence":
            self.server.is_silent = True
            self._answer(200, {}, b"", Fault())
            return
        self.server.requests.append((path, wanted))
        queue = self.server.faults[path]
        fault = queue.popleft() if queue else self.server.always.get(path, Fault())
        self.server.ended.wait(self.server.delay_s)
        file = self.server.folder / path.lstrip("/")
        if fault.status is not None or (fault.content is None and not file.is_file()):
            self._answer(fault.status or 404, fault.headers, b"", fault)
            return
        content = file.read_bytes() if fault.content is None else fault.content
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
        if match is None or fault.ignores_range or fault.content is not None:
            self._answer(200, fault.headers, content, fault)
        elif int(match[1]) >= len(content):
            self._answer(416, {"Content-Range": f"bytes */{len(content)}"}, b"", fault)
        else:
            start, stop = int(match[1]), min(len(content), int(match[2] or len(content)) + 1)
            content_range = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            self._answer(206, {**content_range, **fault.headers}, content[start:stop], fault)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, fault: Fault) -> None:
        self.send_response(status)
        if fault.states_no_length:
            self.close_connection = True
        else:
            headers = {"Content-Length": str(len(body)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if fault.piece_bytes is not None:
            for position in range(0, len(body), fault.piece_bytes):
                self.wfile.write(body[position : position + fault.piece_bytes])
                if self.server.ended.wait(0.01):
                    return
            return
        sent = min(number for number in (len(body), fault.cut_after, fault.stall_after) if number is not None)
        self.wfile.write(body[:sent])
        if fault.stall_after is not None:
            self.wfile.flush()
            self.server.ended.wait()
        if sent < len(body):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass

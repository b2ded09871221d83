"""Reading over the network: every fault passes or ends in one error that names file and cause."""

from __future__ import annotations

import hashlib
import io
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jmvae_dist.data.transfer import RemoteFile, TransferCancelled
from jmvae_dist.data_config import RemoteSection
from jmvae_dist.errors import DataError, UnreachableError
from tests.faulty_server import Fault, FaultyServer, serving

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = bytes(len(CONTENT))
QUICK = RemoteSection(connect_timeout_s=2.0, stall_timeout_s=0.3, attempts=3, backoff_s=0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    with serving(tmp_path) as server:
        yield server


def remote(server: FaultyServer, path: str = "a.tar", **more: Any) -> RemoteFile:
    return RemoteFile(f"{server.url}/{path}", len(CONTENT), "shard 7", QUICK, **more)


def download(file: RemoteFile, there: bytes = b"") -> bytes:
    target = io.BytesIO(there)
    file.download(target, SHA256)
    return target.getvalue()


# (faults of the first answers, Range headers of all requests)
PASSING = {
    "none": ([], [""]),
    "503 twice": ([Fault(503), Fault(503)], ["", "", ""]),
    "429 with Retry-After": ([Fault(429, headers={"Retry-After": "0"})], ["", ""]),
    "cut": ([Fault(cut_after=1_500_000)], ["", "bytes=1500000-2999999"]),
    "cut often, but with progress": (
        [Fault(cut_after=n) for n in (1_100_000, 300_000, 1_200_000, 100_000)],
        ["", "bytes=1100000-2999999", "bytes=1400000-2999999", "bytes=2600000-2999999", "bytes=2700000-2999999"],
    ),
    "stall": ([Fault(stall_after=1_200_000)], ["", "bytes=1200000-2999999"]),
    "no answer": ([Fault(stall_after=0)], ["", ""]),
    "cut, then no Range": ([Fault(cut_after=500_000), Fault(ignores_range=True)], ["", "bytes=500000-2999999"]),
    "length unstated": ([Fault(states_no_length=True)], [""]),
    "length unstated and cut": ([Fault(states_no_length=True, cut_after=9)], ["", "bytes=9-2999999"]),
    "other content once": ([Fault(content=OTHER)], ["", ""]),
    "cut, then another version": (
        [Fault(content=OTHER, cut_after=2_000_000)],
        ["", "bytes=2000000-2999999", ""],
    ),
    "redirect": ([Fault(302, headers={"Location": "/a.tar?signature=1"})], ["", ""]),
}


@pytest.mark.parametrize("case", PASSING)
def test_a_download_survives(server: FaultyServer, case: str) -> None:
    faults, ranges = PASSING[case]
    server.faults["/a.tar"].extend(faults)
    assert download(remote(server)) == CONTENT
    assert [requested for _, requested in server.requests] == ranges


HTML = Fault(content=b"<html>log in</html>", headers={"Content-Type": "text/html; charset=utf-8"})
# (fault of every answer, what the message says, number of requests)
LASTING = {
    "404": (Fault(404), "answered 404 (Not Found)", 1),
    "403": (Fault(403), "answered 403 (Forbidden)", 1),
    "503": (Fault(503), "answered 503 (Service Unavailable); given up after 3 attempts (data.remote.attempts)", 3),
    "shorter": (Fault(content=CONTENT[:-1]), "2999999 bytes, the manifest says 3000000: the file was replaced", 1),
    "longer": (Fault(content=CONTENT + b"x"), "3000001 bytes, the manifest says 3000000", 1),
    "longer, length unstated": (Fault(content=CONTENT + b"x", states_no_length=True), "more bytes than the", 1),
    "shorter, length unstated": (Fault(content=CONTENT[:99], states_no_length=True), "ended after 99 of 3000000", 3),
    "other content": (Fault(content=OTHER), "sha256 differs from the manifest's, also when downloaded again", 2),
    "HTML": (HTML, "an HTML page, such as a login form or a message, instead of the file", 1),
    "stall": (Fault(stall_after=10), "stalled for 0.3 s after 30 bytes (data.remote.stall_timeout_s)", 3),
    "single bytes": (Fault(piece_bytes=1), "stalled for 0.3 s after", 3),
    "cut": (Fault(cut_after=10), "the connection ended early after 30 bytes; given up after 3", 3),
    "compressed": (Fault(headers={"Content-Encoding": "gzip"}), "compresses it on the way", 1),
    "redirect to a file": (Fault(302, {"Location": "file:///etc/passwd"}), "redirected to 'file:///etc/passwd'", 1),
    "redirect to a pipe": (Fault(301, {"Location": "pipe:cat /etc/passwd"}), "which is not http:// or https://", 1),
    "redirects for ever": (Fault(307, {"Location": "/a.tar"}), "redirected more than 5 times", 6),
    "redirect to nowhere": (Fault(302, {"Location": "http://["}), "redirected to something that is no URL", 1),
    "503 with a pause of 5000 digits": (
        Fault(503, {"Retry-After": "9" * 5000}),
        "503 (Service Unavailable); given",
        3,
    ),
    "a part not asked for": (Fault(206, {"Content-Range": "bytes 5-9/10"}), "answered 206", 1),
}


# What says something against the file itself.
WRONG_FILE = ("404", "shorter", "longer", "longer, length unstated", "other content", "HTML")


@pytest.mark.parametrize("case", LASTING)
def test_a_download_ends_with_its_cause(server: FaultyServer, case: str) -> None:
    fault, message, num_requests = LASTING[case]
    server.always["/a.tar"] = fault
    with pytest.raises(DataError) as caught:
        download(remote(server))
    assert str(caught.value).startswith(f"shard 7 {server.url}/a.tar: ")
    assert message in str(caught.value)
    assert isinstance(caught.value, UnreachableError) == (case not in WRONG_FILE)
    assert "\n" not in str(caught.value)
    assert len(server.requests) == num_requests


def test_a_download_goes_on_behind_what_is_there(server: FaultyServer) -> None:
    assert download(remote(server), CONTENT[:2_000_000]) == CONTENT
    assert download(remote(server), CONTENT) == CONTENT
    assert [requested for _, requested in server.requests] == ["bytes=2000000-2999999"]
    for damaged in (OTHER[:2_000_000], OTHER, CONTENT + b"more"):
        assert download(remote(server), damaged) == CONTENT


def test_parts_of_a_file(server: FaultyServer) -> None:
    server.faults["/a.tar"].extend([Fault(cut_after=100), Fault(503)])
    file = remote(server)
    assert file.read_range(1000, 5000) == CONTENT[1000:5000]
    assert file.read_range(2_999_999, 3_000_000) == CONTENT[-1:]
    assert [requested for _, requested in server.requests] == [
        *("bytes=1000-4999", "bytes=1100-4999", "bytes=1100-4999", "bytes=2999999-2999999")
    ]


# (fault of every answer to a request for bytes 1000 .. 1999, what the message says)
PARTS = {
    "no Range": (Fault(ignores_range=True), "does not serve parts of files (it ignores Range); set data.cache.dir"),
    "another part": (Fault(headers={"Content-Range": "bytes 1001-2000/3000000"}), "not the part that was asked for"),
    "nonsense": (Fault(headers={"Content-Range": "bytes 1000-"}), "not the part that was asked for"),
    "another size": (Fault(headers={"Content-Range": "bytes 1000-1999/9"}), "9 bytes, the manifest says 3000000"),
    "shorter": (Fault(416), "the file is shorter than the manifest says"),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_part_that_cannot_be_had(server: FaultyServer, case: str) -> None:
    server.always["/a.tar"], message = PARTS[case]
    with pytest.raises(DataError) as caught:
        remote(server).read_range(1000, 2000)
    assert message in str(caught.value)
    assert len(server.requests) == 1


def test_parts_are_of_one_version(server: FaultyServer) -> None:
    file = remote(server)
    server.faults["/a.tar"].extend([Fault(headers={"ETag": '"1"'})] * 2 + [Fault(headers={"ETag": '"2"'})])
    assert file.read_range(0, 10) + file.read_range(10, 20) == CONTENT[:20]
    with pytest.raises(DataError, match="has changed on the server"):
        file.read_range(20, 30)


def test_a_small_file_of_unknown_size(server: FaultyServer) -> None:
    file = RemoteFile(f"{server.url}/a.tar", None, "manifest", QUICK)
    server.faults["/a.tar"].extend([Fault(503), Fault(cut_after=100)])
    assert file.read_whole(len(CONTENT)) == CONTENT
    with pytest.raises(DataError, match="more than 1000 bytes"):
        file.read_whole(1000)
    server.always["/a.tar"] = HTML
    with pytest.raises(DataError, match="HTML page"):
        file.read_whole(1000)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.tar"
        with pytest.raises(DataError, match="Connection refused; given up after 3 attempts"):
            RemoteFile(url, 10, "shard 0", QUICK).read_range(0, 5)


def test_messages_do_not_give_away_secrets(server: FaultyServer) -> None:
    server.always["/b.tar"] = Fault(403)
    address = server.url.removeprefix("http://")
    with pytest.raises(DataError) as caught:
        RemoteFile(f"http://user:secret@{address}/b.tar?signature=secret", 9, "shard 1", QUICK).read_range(0, 5)
    assert "secret" not in str(caught.value)
    assert f"http://{address}/b.tar?..." in str(caught.value)


def test_a_transfer_can_be_cancelled(server: FaultyServer) -> None:
    server.always["/a.tar"] = Fault(503)
    cancelled = threading.Event()
    patient = RemoteSection(attempts=100, backoff_s=30.0)
    file = RemoteFile(f"{server.url}/a.tar", len(CONTENT), "shard 7", patient, cancelled)
    ended: list[BaseException] = []

    def run() -> None:
        try:
            file.read_range(0, 5)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while not server.requests:
        time.sleep(0.01)
    cancelled.set()
    thread.join(timeout=10)
    assert isinstance(ended[0], TransferCancelled)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "pipe:cat /etc/passwd",
            "pipe://x/y",
            "file:///etc/passwd",
            "memory://a/b",
            "ftp://host/a",
            "github://a:b@/c",
        ),
        *("s3://bucket/a::file:///etc/passwd", "simplecache::s3://bucket/a", "zip://a::s3://b/c", "local://a/b"),
        *("http:///a", "http://host:port/a", "http://host/a b", "s3://bucket/a?x=1", "javascript:alert(1)", "/a", ""),
    ],
)
def test_only_some_urls_are_opened(url: str) -> None:
    with pytest.raises(DataError, match=r"shard 0: .*(not supported|must have the form)"):
        RemoteFile(url, 10, "shard 0", QUICK)


class TestStores:
    """Object stores, with fsspec's own file system in memory in the place of one."""

    @pytest.fixture
    def bucket(self) -> Iterator[Any]:
        fsspec = pytest.importorskip("fsspec")
        from fsspec.implementations.memory import MemoryFileSystem
        from fsspec.registry import _registry

        class Bucket(MemoryFileSystem):  # type: ignore[misc]
            protocol = "s3"
            store: dict[str, Any] = {}  # noqa: RUF012
            pseudo_dirs = [""]  # noqa: RUF012
            failures: list[Exception] = []  # noqa: RUF012
            etag = ""

            @classmethod
            def _strip_protocol(cls, path: str) -> str:
                return "/" + path.removeprefix("s3://").strip("/")

            def info(self, path: str, **options: Any) -> dict[str, Any]:
                return {**super().info(path, **options), "ETag": self.etag}

            def cat_file(self, path: str, **options: Any) -> bytes:
                if self.failures:
                    raise self.failures.pop()
                return super().cat_file(path, **options)

        fsspec.register_implementation("s3", Bucket, clobber=True)
        bucket = fsspec.filesystem("s3")
        bucket.pipe_file("s3://bucket/a.tar", CONTENT)
        yield bucket
        del _registry["s3"]

    def test_download_and_parts(self, bucket: Any) -> None:
        bucket.failures.extend([RuntimeError("slow down"), TimeoutError()])
        file = RemoteFile("s3://bucket/a.tar", len(CONTENT), "shard 7", QUICK)
        assert download(file) == CONTENT
        assert file.read_range(10, 20) == CONTENT[10:20]

    def test_faults(self, bucket: Any) -> None:
        for url, num_bytes, message in (
            ("s3://bucket/b.tar", 10, "FileNotFoundError|No such file"),
            ("s3://bucket/a.tar", 10, "3000000 bytes, the manifest says 10"),
        ):
            with pytest.raises(DataError, match=f"shard 7 {url}: ({message})"):
                RemoteFile(url, num_bytes, "shard 7", QUICK).read_range(0, 5)
        bucket.failures.extend([RuntimeError("slow down")] * 3)
        with pytest.raises(DataError, match="RuntimeError slow down; given up after 3 attempts"):
            RemoteFile("s3://bucket/a.tar", len(CONTENT), "shard 7", QUICK).read_range(0, 5)

    def test_all_openings_are_of_one_version(self, bucket: Any) -> None:
        versions: dict[str, str] = {}
        for etag in ("1", "1", "2"):
            type(bucket).etag = etag  # every thread has its own bucket
            file = RemoteFile("s3://bucket/a.tar", len(CONTENT), "shard 7", QUICK, versions=versions)
            if etag == "1":
                assert file.read_range(10, 20) == CONTENT[10:20]
        with pytest.raises(DataError, match=r"shard 7 s3://bucket/a.tar: the file has changed"):
            file.read_range(10, 20)

    def test_a_missing_package_is_named(self) -> None:
        pytest.importorskip("fsspec")
        with pytest.raises(DataError, match=r"gs:// needs the packages fsspec and gcsfs"):
            RemoteFile("gs://bucket/a.tar", 10, "shard 7", QUICK).read_range(0, 5)


def test_the_body_of_a_redirect_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have no end."""
    monkeypatch.setenv("NO_PROXY", "*")
    ended: list[OSError] = []

    class Endless(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://[\r\n\r\n")
            try:
                while True:
                    self.request.sendall(bytes(2**16))
            except OSError as error:
                ended.append(error)

    with socketserver.TCPServer(("127.0.0.1", 0), Endless) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/a"
        with pytest.raises(DataError, match="redirected to something"):
            RemoteFile(url, 10, "shard 7", QUICK).read_range(0, 5)
        thread.join()
    assert ended


@pytest.mark.parametrize("header", ["Content-Length", "Content-Range"])
def test_a_size_of_5000_digits(server: FaultyServer, header: str) -> None:
    """Python refuses to convert it, with an error of its own."""
    status = 206 if header == "Content-Range" else 200
    server.always["/a.tar"] = Fault(status, {header: f"bytes 0-0/{'9' * 5000}" if status == 206 else "9" * 5000})
    with pytest.raises(DataError):
        remote(server).identify()


BODY = CONTENT[:2000]
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\nContent-Type: application/x-tar\r\n\r\n" + BODY
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7d0\r\n" + BODY + b"\r\n0\r\n\r\n"
REDIRECT = b"HTTP/1.1 302 Found\r\nLocation: /b\r\nContent-Length: 0\r\n\r\n"


def test_a_server_that_answers_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Correct content or a DataError, whatever bytes a server sends."""
    monkeypatch.setenv("NO_PROXY", "*")
    answers: list[bytes] = []
    messages: list[str] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            request = b""
            while b"\r\n\r\n" not in request and (piece := self.request.recv(65536)):
                request += piece
            self.request.sendall(answers[0])

    once = RemoteSection(connect_timeout_s=2.0, stall_timeout_s=2.0, attempts=1)
    numbers = np.random.default_rng(0)
    correct = 0
    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        for number in range(300):
            answer = bytearray((ANSWER, CHUNKED, REDIRECT)[number % 3])
            head = answer.index(b"\r\n\r\n") + 10
            for _ in range(numbers.integers(4)):
                place = numbers.integers(head)
                answer[place : place + numbers.integers(3)] = numbers.bytes(numbers.integers(3))
            answers[:] = [bytes(answer[: numbers.integers(len(answer))] if number % 7 == 0 else answer)]
            file = RemoteFile(f"http://127.0.0.1:{server.server_address[1]}/a", len(BODY), "shard 7", once)
            target = io.BytesIO()
            try:
                file.download(target, hashlib.sha256(BODY).hexdigest())
            except DataError as error:
                messages.append(str(error))
            else:
                assert target.getvalue() == BODY
                correct += 1
        server.shutdown()
        thread.join()
    assert all(message.startswith("shard 7 http://127.0.0.1:") for message in messages)
    assert min(correct, len(messages)) > 10

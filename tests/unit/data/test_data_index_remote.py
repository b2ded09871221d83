"""Indexing tars at URLs: the same manifest as of files, over a bad line as well."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from jmvae_dist.commands.shards import main
from jmvae_dist.data.indexing.opening import identify, open_shard
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.reader import ShardReader
from jmvae_dist.errors import ConfigError, DataError
from tests.faulty_server import Fault, FaultyServer, serving

NUM_SAMPLES = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tars of 40 samples with 10 kB each."""
    folder = tmp_path / "served"
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
            for number in range(NUM_SAMPLES):
                for extension, content in (("cls", b"%d" % (number % 5)), ("txt", b"x" * 10_000)):
                    info = tarfile.TarInfo(f"{'long/' * 30}{shard}-{number:03d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def index(shards: list[str], out: Path) -> Manifest:
    assert main(["index", *shards, "--out", str(out), "--workers", "1", "--text-length", "text=8"]) == 0
    return Manifest.load(out)


def test_as_of_files(folder: Path, tmp_path: Path) -> None:
    local = index([str(folder)], tmp_path / "local.json")
    with serving(folder) as server:
        remote = index([f"{server.url}/s-{{0..1}}.tar"], tmp_path / "remote.json")
        assert [shard.url for shard in remote.shards] == [f"{server.url}/s-{n}.tar" for n in range(2)]
        assert main(["verify", str(tmp_path / "remote.json"), "--workers", "1"]) == 0
        reader = ShardReader(remote, 1)
        assert reader.read([7, 3], "label").argmax(axis=1).tolist() == [2, 3]
        reader.close()
    assert remote.fingerprint == local.fingerprint


@pytest.mark.parametrize(
    "fault",
    [
        Fault(cut_after=100_000),
        Fault(cut_after=0),
        Fault(status=503),
        Fault(cut_after=250_000, states_no_length=True),
    ],
    ids=["cut", "cut at once", "busy", "cut without length"],
)
def test_a_bad_line(folder: Path, fault: Fault) -> None:
    """Reading goes on where it broke; a server that ignores Range begins anew, and nothing is read twice."""
    content = (folder / "s-0.tar").read_bytes()
    for ignores_range in (False, True):
        with serving(folder) as server:
            url = f"{server.url}/s-0.tar"
            server.faults["/s-0.tar"] += [Fault(), fault, Fault(ignores_range=ignores_range)]
            num_bytes = int(identify(url)["num_bytes"])
            assert read_all(url, num_bytes) == content
            assert server.count("/s-0.tar") == 3


def read_all(url: str, num_bytes: int) -> bytes:
    with open_shard(url, num_bytes) as stream:
        return b"".join(iter(lambda: stream.read(100_000), b""))


def test_what_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    with serving(folder) as server:
        for url, message in (
            (f"{server.url}/none.tar", r"none\.tar: the server answered 404"),
            ("pipe:cat /etc/passwd", "No such file"),
            ("ftp://example.org/s.tar", "scheme 'ftp' .* is not supported"),
        ):
            with pytest.raises(ConfigError, match=message):
                index([url], tmp_path / "m.json")
        server.always["/s-0.tar"] = Fault(content=b"<html>login</html>", headers={"Content-Type": "text/html"})
        with pytest.raises(ConfigError, match="an HTML page"):
            index([f"{server.url}/s-0.tar"], tmp_path / "m.json")


def test_a_shard_that_is_replaced_meanwhile(folder: Path, tmp_path: Path) -> None:
    """The bytes that were hashed must be those of one version."""
    with serving(folder) as server:
        fixed = dict.fromkeys(range(3), None)
        server.faults["/s-0.tar"] += [Fault(headers={"ETag": f'"{version}"'}) for version in (1, *fixed, 2)]
        with pytest.raises(DataError, match=r"s-0\.tar: changed while it was read"):
            index([f"{server.url}/s-0.tar"], tmp_path / "m.json")
    assert not (tmp_path / "m.json").exists()


def test_secrets_of_urls_are_not_shown(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(folder) as server:
        signed: list[str] = [f"{url_of(server, n)}?signature=secret" for n in (0, 0)]
        with pytest.raises(ConfigError) as caught:
            index(signed, tmp_path / "m.json")
        assert "secret" not in str(caught.value)
        (folder / "s-1.tar").write_bytes(b"damaged" * 100)
        with pytest.raises(DataError) as damaged:
            main(["index", f"{url_of(server, 1)}?signature=secret", "--out", str(tmp_path / "m.json")])
        assert "secret" not in str(damaged.value)


def url_of(server: FaultyServer, shard: int) -> str:
    return f"{server.url}/s-{shard}.tar"

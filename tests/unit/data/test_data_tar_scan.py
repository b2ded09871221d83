"""Scanning tars: what real programs write is read like they mean it, and nothing damaged passes for an end."""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmvae_dist.data.indexing import tar_scan
from jmvae_dist.data.indexing.tar_scan import BLOCK_BYTES, TarScanner
from jmvae_dist.errors import DataError

Members = dict[str, bytes]
EXAMPLE: Members = {"a/0001.jpg": b"x" * 700, "a/0001.txt": b"words", "a/0002.jpg": b"", "a/0002.txt": b"y" * 512}
LONG_NAME = "folder/" * 30 + "0001.jpg"


def scan(content: bytes) -> Members:
    """Name and content of all members, each read where the scanner says it lies."""
    scanner = TarScanner(io.BytesIO(content), "shard.tar")
    members = {member.name: content[member.offset : member.offset + member.size] for member in scanner}
    assert scanner.num_bytes == len(content)
    assert scanner.sha256 == hashlib.sha256(content).hexdigest()
    return members


def make_tar(members: Members, format: int = tarfile.USTAR_FORMAT, **attributes: object) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def with_checksum(header: bytes) -> bytes:
    return header[:148] + b"%06o\0 " % (sum(header[:148] + header[156:512]) + 256) + header[156:]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_of_python(format: int) -> None:
    members = {**EXAMPLE, "bücher/ü.txt": b"utf-8", "d/" * 60 + "0003.txt": b"prefix"}
    assert scan(make_tar(members, format, mtime=1.5 if format == tarfile.PAX_FORMAT else 1)) == members


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(format: int) -> None:
    assert scan(make_tar({LONG_NAME: b"content", "b.txt": b"next"}, format)) == {
        LONG_NAME: b"content",
        "b.txt": b"next",
    }


@pytest.mark.parametrize("format", ["gnu", "oldgnu", "ustar", "pax", "v7"])
def test_formats_of_gnu_tar(tmp_path: Path, format: str) -> None:
    members = {f"./{name}": content for name, content in EXAMPLE.items()}
    if format in ("gnu", "oldgnu", "pax"):
        members[f"./{LONG_NAME}"] = b"long"
    for name, content in members.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    command = ["tar", f"--format={format}", "--sort=name", "-cf", str(tmp_path / "s.tar"), "-C", str(tmp_path / "in")]
    subprocess.run([*command, "."], check=True)
    found = scan((tmp_path / "s.tar").read_bytes())
    assert found == members
    assert list(found) == sorted(members)


def test_webdatasets_writer(tmp_path: Path) -> None:
    """Its modification time is a fraction, which takes a PAX header of 1 KiB per member."""
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "s.tar")) as tar:
        tar.write({"__key__": "a/0001", "txt": "words", "cls": 7})
    content = (tmp_path / "s.tar").read_bytes()
    assert scan(content) == {"a/0001.cls": b"7", "a/0001.txt": b"words"}
    scanner = TarScanner(io.BytesIO(content), "shard.tar")
    assert [scanner.content(2) for _ in scanner] == [b"7", b"wo"]
    assert scanner.extended_header_bytes == 2 * 1024


def test_binary_sizes() -> None:
    header = bytearray(make_tar({"a.txt": b"12345"}))
    header[124:136] = b"\x80" + (5).to_bytes(11, "big")
    assert scan(with_checksum(bytes(header[:512])) + bytes(header[512:])) == {"a.txt": b"12345"}


@pytest.mark.parametrize("cut", range(BLOCK_BYTES, 8 * BLOCK_BYTES, 300))
def test_a_cut_at_any_place_is_found(cut: int) -> None:
    """webdataset silently loses the rest of a shard that is cut between two blocks."""
    content = make_tar(EXAMPLE)
    end = len(content.rstrip(b"\0")) // BLOCK_BYTES * BLOCK_BYTES + BLOCK_BYTES
    with pytest.raises(DataError, match=r"shard\.tar: byte \d+: .*cut off"):
        scan(content[: min(cut, end)])


def test_a_flipped_byte_in_any_header_is_found() -> None:
    content = make_tar(EXAMPLE)
    for header in [member.offset - BLOCK_BYTES for member in TarScanner(io.BytesIO(content), "")]:
        for place in (0, 99, 130, 150, 156, 258, 400):
            damaged = bytearray(content)
            damaged[header + place] ^= 1
            with pytest.raises(DataError, match=r"not a tar file|damaged header"):
                scan(bytes(damaged))


def long_name_of_stated_size(size: int) -> bytes:
    content = make_tar({LONG_NAME: b""}, tarfile.GNU_FORMAT)
    return with_checksum(content[:124] + b"%011o\0" % size + content[136:512]) + content[512:]


def special(kind: bytes, **attributes: object) -> bytes:
    return make_tar({"a.txt": b"1"})[:1024] + make_tar({"b.txt": b""}, type=kind, **attributes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no end marker: the file is cut off"),
        (b"<html><body>404 Not Found</body></html>", "not a tar file"),
        (gzip.compress(make_tar(EXAMPLE)), "a gzip file: samples in a compressed tar"),
        (b"<html>" * 200, "not a tar file"),
        (make_tar(EXAMPLE) + make_tar(EXAMPLE), "something follows the end marker"),
        (make_tar({"a.txt": b"1"})[:1024] + bytes(512), "half an end marker"),
        (special(tarfile.LNKTYPE, linkname="a.txt"), "'b.txt' is a hard link"),
        (special(tarfile.SYMTYPE, linkname="/etc/passwd"), "'b.txt' is a symbolic link"),
        (special(tarfile.CHRTYPE), "is a character device"),
        (special(tarfile.FIFOTYPE), "is a named pipe"),
        (special(tarfile.GNUTYPE_SPARSE), "is a sparse file"),
        (special(b"Z"), "of unknown type b'Z'"),
        (make_tar({"a\nb.txt": b""}), "without control characters"),
        (make_tar({"": b""}), "'' is no name"),
        (make_tar({"a.txt": b""}, tarfile.PAX_FORMAT, pax_headers={"GNU.sparse.major": "1"}), "a sparse file"),
        (make_tar({"a.txt": b""}, tarfile.PAX_FORMAT, pax_headers={"size": "-1"}), "is not a size"),
        (make_tar({"a.txt": b""}, tarfile.PAX_FORMAT, pax_headers={"size": "5000000000"}), "more than the limit"),
        (make_tar({"a.txt": b""}, tarfile.PAX_FORMAT, pax_headers={"note": "x" * 2**21}), "an extended header of"),
        (make_tar({"n" * 5000: b""}, tarfile.PAX_FORMAT), "name of 1 to 4096 bytes"),
        (make_tar({LONG_NAME: b""}, tarfile.GNU_FORMAT)[:1024] + bytes(1024), "extended header without its member"),
        (long_name_of_stated_size(5), "whose content goes on behind its size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        scan(content)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_the_number_of_members_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_scan, "MAX_MEMBERS", 4)
    with pytest.raises(DataError, match="more than 4 members"):
        scan(make_tar({**EXAMPLE, "more.txt": b""}))


def test_directories_are_skipped() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(3000):
            info = tarfile.TarInfo(f"d{number}")
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
    assert scan(file.getvalue()) == {}


BASES = [make_tar(EXAMPLE), make_tar({LONG_NAME: b"1", "b.cls": b"2"}, tarfile.PAX_FORMAT, mtime=0.5)]
BASES.append(make_tar({LONG_NAME: b"1", "b.cls": b"2"}, tarfile.GNU_FORMAT))


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_mutations_are_found_or_harmless(data: st.DataObject) -> None:
    """Whatever is done to a tar: members where `tarfile` sees them too, or a DataError."""
    content = bytearray(BASES[data.draw(st.integers(0, len(BASES) - 1))])
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, min(len(content), 4096) - 1))
        kind = data.draw(st.sampled_from(["byte", "cut", "repeat", "checksum"]))
        if kind == "byte":
            content[position] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[position : position + data.draw(st.sampled_from([1, 512, 1024]))]
        elif kind == "repeat":
            start = position // 512 * 512
            content[start:start] = content[start : start + 512]
        else:  # a change that was made on purpose has a right checksum
            start = position // 512 * 512
            content[start : start + 512] = with_checksum(bytes(content[start : start + 512]).ljust(512, b"\0"))
    try:
        members = [tuple(member) for member in TarScanner(io.BytesIO(content), "shard.tar")]
    except DataError:
        return
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            expected = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    except tarfile.TarError:
        expected = []
    # `tarfile` ends, or refuses, where an owner or a time is not a number, which says nothing of the content.
    assert members[: len(expected)] == expected

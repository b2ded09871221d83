"""Walks a tar written by anybody, from the first byte to the last, without unpacking it.

Python's `tarfile` is not used here. It takes a damaged header in the middle of a file for the end of the archive and
says nothing, so that one flipped byte loses the rest of a shard; it holds extended headers of any length in memory;
and it takes several times as long per member.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn, Protocol

from jmvae_dist.data.index import MAX_MEMBER_BYTES
from jmvae_dist.data.untrusted import printable
from jmvae_dist.errors import DataError

BLOCK_BYTES = 512
MAX_MEMBERS = 4_000_000
MAX_NAME_BYTES = 4096
MAX_EXTENDED_HEADER_BYTES = 2**20

_CHUNK_BYTES = 2**20
_ZERO_BLOCK = bytes(BLOCK_BYTES)
_MAGIC_USTAR = b"ustar\x0000"
_MAGIC_GNU = b"ustar  \x00"
_MAGIC_V7 = bytes(8)
_REGULAR = b"0\x007"  # also of v7, and "contiguous", which POSIX treats like a regular file
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
    b"S": "a sparse file",
    b"D": "a directory listing of an incremental archive",
    b"M": "the continuation of a file from another volume",
    b"V": "a volume label",
}
_EXTENDED = b"LKxg"
_END = b""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MAX_LENGTH_DIGITS = 8
_ADLER_MODULUS = 65521
_OCTAL = re.compile(rb"[0-7]{1,12}")
_DECIMAL = re.compile(rb"[0-9]{1,20}")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class ByteStream(Protocol):
    """Anything that can be read from the start to the end, such as an open file or a download."""

    def read(self, size: int, /) -> bytes: ...


class TarMember(NamedTuple):
    """A regular file of a tar: its name, and where its content lies (bytes)."""

    name: str
    offset: int
    size: int


class TarScanner:
    """The regular files of a tar in order, and the sha256 of all its bytes, in one pass.

    Reads USTAR, GNU (long names, base-256 sizes), PAX (path, size) and v7. Directories are skipped.

    Args:
        stream: read once, strictly forward.
        path: names the tar in messages.
        on_bytes: called now and then with how many bytes were read by now.

    Attributes:
        num_bytes: read so far; once the iteration is over, the size of the tar.
        extended_header_bytes: what PAX headers and GNU long names take.
    """

    def __init__(self, stream: ByteStream, path: str, on_bytes: Callable[[int], None] | None = None) -> None:
        self.num_bytes = 0
        self.extended_header_bytes = 0
        self._stream, self._path, self._on_bytes = stream, path, on_bytes
        self._digest = hashlib.sha256()
        self._chunk, self._position = b"", 0
        self._content_left = self._padding_left = 0

    def __iter__(self) -> Iterator[TarMember]:
        """Yield every regular file; after the last one, everything up to the last byte has been checked.

        Raises:
            DataError: damaged, cut off, followed by something else, beyond a limit, or holds a member that is
                neither a regular file nor a directory. Names the tar and the offset.
        """
        for _ in range(MAX_MEMBERS):
            self._skip(self._content_left + self._padding_left)
            self._content_left = self._padding_left = 0
            start = self._offset
            name, kind, size = self._next_header(start)
            if kind == _END:
                self._check_end()
                return
            if kind == b"5" or (kind == b"\0" and name.endswith("/")):
                if size:
                    self._fail(start, f"directory {name!r} with {size} bytes of content")
                continue
            yield self._member(name, kind, size, start)
        self._fail(self._offset, f"more than {MAX_MEMBERS:,} members")

    def content(self, limit_bytes: int = MAX_MEMBER_BYTES) -> bytes:
        """The next up to `limit_bytes` of the content of the member that was yielded last.

        Raises:
            DataError: the tar ends within it.
        """
        size = min(limit_bytes, self._content_left)
        content = self._read(size)
        if len(content) < size:
            self._fail_truncated("within a member")
        self._content_left -= size
        return content

    def rest(self) -> Iterator[bytes]:
        """The rest of that content, in pieces; raises like `content`."""
        while self._content_left:
            yield self.content(_CHUNK_BYTES)

    @property
    def sha256(self) -> str:
        """Of the bytes read so far; once the iteration is over, of the tar."""
        return self._digest.hexdigest()

    # Members

    def _next_header(self, start: int) -> tuple[str, bytes, int]:
        """Name, type and size of the next member, which extended headers before its own may override."""
        name: str | None = None
        size: int | None = None
        seen = b""
        while (header := self._read(BLOCK_BYTES)) != _ZERO_BLOCK:
            kind, stated_size = self._check_header(header, start)
            if kind not in _EXTENDED:
                name = self._header_name(header, start) if name is None else name
                return name, kind, stated_size if size is None else size
            if kind in seen:
                self._fail(start, "two extended headers of the same kind before one member")
            seen += kind
            content = self._extended_header(stated_size, start)
            if kind == b"L":
                name = self._name(_until_zero(content), start)
            elif kind != b"K":  # the target of a link; the link that follows is refused
                path, pax_size = self._pax(content, kind, start)
                name, size = name if path is None else path, size if pax_size is None else pax_size
        if seen.replace(b"g", b""):
            self._fail(start, "an extended header without its member")
        return "", _END, 0

    def _member(self, name: str, kind: bytes, size: int, start: int) -> TarMember:
        if kind not in _REGULAR:
            what = _REFUSED.get(kind, f"of unknown type {kind!r}")
            self._fail(start, f"member {name!r} is {what}; shards hold regular files only")
        if size > MAX_MEMBER_BYTES:
            self._fail(start, f"member {name!r} has {size} bytes, more than the limit of {MAX_MEMBER_BYTES}")
        self._content_left, self._padding_left = size, -size % BLOCK_BYTES
        return TarMember(name, self._offset, size)

    def _check_header(self, header: bytes, start: int) -> tuple[bytes, int]:
        """Type and size of a sound header."""
        if len(header) < BLOCK_BYTES:
            what = "has no end marker" if not header else "ends within a header"
            self._fail(start, f"{what}: the file is cut off" if start or not header else _what_else(header))
        stated = _octal(header[148:156])
        if stated is None or stated % _ADLER_MODULUS != _byte_sum(header):
            # Some old programs added the bytes up as signed numbers.
            signed = sum(byte - 256 if byte > 127 else byte for byte in _without_checksum(header))
            if stated is None or stated != signed:
                self._fail(start, "damaged header (its checksum is wrong)" if start else _what_else(header))
        if header[257:265] not in (_MAGIC_USTAR, _MAGIC_GNU, _MAGIC_V7):
            self._fail(start, f"a tar of an unknown format ({header[257:265]!r})")
        return header[156:157], self._size(header[124:136], start)

    def _size(self, field: bytes, start: int) -> int:
        if field[0] == 0x80:  # GNU: a binary number of 11 bytes
            return int.from_bytes(field[1:], "big")
        size = _octal(field)
        if size is None:
            self._fail(start, f"{field!r} is not a size")
        return size

    def _header_name(self, header: bytes, start: int) -> str:
        name, prefix = _until_zero(header[:100]), _until_zero(header[345:500])
        if prefix:
            if header[257:265] != _MAGIC_USTAR:
                # GNU keeps times of incremental archives here, which other readers take for a part of the name.
                self._fail(start, "a member of an incremental GNU archive; pack the files into a plain tar")
            name = prefix + b"/" + name
        return self._name(name, start)

    def _name(self, encoded: bytes, start: int) -> str:
        name = encoded.decode("utf-8", "surrogateescape")
        if not 1 <= len(encoded) <= MAX_NAME_BYTES or _CONTROL_CHARACTER.search(name):
            self._fail(start, f"{name[:80]!r} is no name of 1 to {MAX_NAME_BYTES} bytes without control characters")
        return name

    # Extended headers, which say more of the member that follows

    def _extended_header(self, size: int, start: int) -> bytes:
        if size > MAX_EXTENDED_HEADER_BYTES:
            self._fail(start, f"an extended header of {size} bytes, more than {MAX_EXTENDED_HEADER_BYTES}")
        content, padding = self._read(size), self._read(-size % BLOCK_BYTES)
        if len(content) < size or len(padding) < -size % BLOCK_BYTES:
            self._fail_truncated("within an extended header")
        # Some readers go by the size, others (Python) go on to a zero: they must find the same.
        if b"\0" not in content and padding and padding[0]:
            self._fail(start, "an extended header whose content goes on behind its size")
        self.extended_header_bytes += self._offset - start
        return content

    def _pax(self, content: bytes, kind: bytes, start: int) -> tuple[str | None, int | None]:
        """Path and size that a PAX header states; other records do not matter here."""
        records = self._pax_records(content, start)
        if any(key.startswith(b"GNU.sparse.") for key in records):
            self._fail(start, "a sparse file; shards hold regular files only")
        if kind == b"g" and {b"path", b"size", b"linkpath"} & records.keys():
            self._fail(start, "a global PAX header that gives all members one name or size")
        path, size = records.get(b"path"), records.get(b"size")
        if size is not None and not _DECIMAL.fullmatch(size):
            self._fail(start, f"{size[:30]!r} is not a size in a PAX header")
        return None if path is None else self._name(path, start), None if size is None else int(size)

    def _pax_records(self, content: bytes, start: int) -> dict[bytes, bytes]:
        """Records of the form b"LENGTH KEY=VALUE\\n", where LENGTH counts all of the record."""
        records = {}
        position = 0
        while position < len(content):
            digits = content[position : position + _MAX_LENGTH_DIGITS].split(b" ", 1)[0]
            end = position + int(digits) if digits.isdigit() else 0
            key, separator, value = content[position + len(digits) + 1 : end - 1].partition(b"=")
            if not position < end <= len(content) or content[end - 1 : end] != b"\n" or not key or not separator:
                self._fail(start, "a damaged PAX header")
            records[key] = value
            position = end
        return records

    # Bytes

    def _check_end(self) -> None:
        """After the first zero block: another one, and nothing but zeros up to the end of the file."""
        if self._read(BLOCK_BYTES) != _ZERO_BLOCK:
            self._fail(self._offset, "has half an end marker: the file is cut off, or damaged")
        while rest := self._read(_CHUNK_BYTES):
            if rest.count(0) != len(rest):
                self._fail(
                    self._offset - len(rest),
                    "something follows the end marker (tars joined by `cat`?); other readers would not see it",
                )

    @property
    def _offset(self) -> int:
        return self.num_bytes - len(self._chunk) + self._position

    def _next_chunk(self) -> bool:
        self._chunk, self._position = self._stream.read(_CHUNK_BYTES), 0
        self._digest.update(self._chunk)
        self.num_bytes += len(self._chunk)
        if self._on_bytes is not None:
            self._on_bytes(self.num_bytes)
        return bool(self._chunk)

    def _read(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end of the file."""
        content = self._chunk[self._position : self._position + size]
        self._position += len(content)
        if len(content) == size:
            return content
        parts = [content]
        missing = size - len(content)
        while missing and self._next_chunk():
            parts.append(self._chunk[:missing])
            self._position = len(parts[-1])
            missing -= self._position
        return b"".join(parts)

    def _skip(self, size: int) -> None:
        while size > (available := len(self._chunk) - self._position):
            size -= available
            if not self._next_chunk():
                self._fail_truncated("within a member")
        self._position += size

    def _fail_truncated(self, where: str) -> NoReturn:
        self._fail(self.num_bytes, f"the file ends {where}: it is cut off")

    def _fail(self, offset: int, problem: str) -> NoReturn:
        raise DataError(f"{self._path}: byte {offset}: {printable(problem)}")


def name_before(blocks: bytes) -> str | None:
    """The name of the member whose content begins where `blocks` of a tar end; None if they hold no sound header."""
    # From the first block: an extended header, which says more of the name, comes before the member's own.
    for start in range(0, len(blocks), BLOCK_BYTES):
        with contextlib.suppress(DataError, StopIteration):
            member = next(iter(TarScanner(io.BytesIO(blocks[start:]), "")))
            if start + member.offset == len(blocks):
                return member.name
    return None


def _what_else(start: bytes) -> str:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            return f"a {name} file: samples in a compressed tar cannot be reached one by one; decompress it"
    return "not a tar file"


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits, 8) if _OCTAL.fullmatch(digits) else None


def _until_zero(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _byte_sum(header: bytes) -> int:
    """Sum of the bytes, with blanks for the checksum, modulo 65521.

    The lower half of Adler-32 is that sum + 1: ten times as fast as to add 512 bytes in Python. No damage that is
    not made on purpose changes a sum by a multiple of 65521.
    """
    return (zlib.adler32(_without_checksum(header)) & 0xFFFF) - 1


def _without_checksum(header: bytes) -> bytes:
    return header[:148] + b"        " + header[156:]

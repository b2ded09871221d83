"""Members that are hostile, but sound by the rules of their own format: they reach what is behind the first check."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator

from PIL import Image

from tests.fuzz.mutations import PICKLE, Random, mutate_bytes, mutate_json

# Saving a picture would import the plug-ins of all formats in the middle of a case.
Image.init()


def _hostile_npy(rng: Random, content: bytes) -> bytes:
    """A header of one's own choice before the same values."""
    descr = rng.choice(
        ("'<f4'", "'|O'", "'>f4'", "'<f8'", "'V4'", "[('a','<f4')]", "('<f4',(3,))", "'<U1'", "''", "1")
    )
    shape = rng.choice(
        ("(3,)", "(2,3)", "(-3,)", "(2**40,)", "(10**30, 10**30)", "()", "[3]", "(3.0,)", "(True,)", "3")
    )
    shape = rng.choice(
        (shape, "(" * rng.choice((50, 1900)) + "3" + ",)" * 50, "-" * 3000 + "3", "(9" + "9" * 3900 + ",)")
    )
    order = rng.choice(("False", "True", "None", "0", "__import__('os').system('touch canary')"))
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode("latin-1")
    header += b" " * (rng.choice((0, 1, 64, 5000)))
    version = rng.choice((b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\0\0"))
    length = struct.pack(
        "<H" if version == b"\1\0" else "<I", min(len(header), 65535) + rng.choice((0, 0, 0, 1, 30000))
    )
    body = rng.choice((content[-12:], PICKLE, b"", rng.randbytes(24)))
    return b"\x93NUMPY" + version + length + header + body


def _hostile_class(rng: Random, content: bytes) -> bytes:
    return rng.choice(
        *(
            [
                b"7\n",
                b" 7 ",
                b"07",
                b"+7",
                b"-7",
                b"7_0",
                b"1e1",
                b"",
                b" ",
                b"9" * 5000,
                b"0" * 24,
                "\u0667".encode(),
            ],
        )
    )


def _hostile_image(rng: Random, content: bytes) -> bytes:
    """PNGs with other chunks and sound checksums; JPEGs with other sizes; files of other formats."""
    if not content.startswith(b"\x89PNG"):
        changed = bytearray(content)
        for place in re.finditer(rb"\xff[\xc0-\xc2\xc4\xdb\xda\xe1\xe2]", content):
            if rng.random() < 0.4:
                start = place.end() + rng.randrange(8)
                changed[start : start + 2] = rng.choice((b"\xff\xff", b"\0\0", rng.randbytes(2)))
        return bytes(changed)
    if rng.random() < 0.2:
        other = io.BytesIO()
        kind = rng.choice(("GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"))
        Image.new("RGB", (5, 6)).save(other, kind)
        return other.getvalue()
    chunks = [
        [content[place + 4 : place + 8], content[place + 8 : place + 8 + length]]
        for place, length in _chunks(content)
    ]
    kind = rng.randrange(5)
    if kind == 0:
        sizes = struct.pack(
            ">II", *rng.choice(((5, 6), (6, 5), (2**31 - 1, 1), (60000, 60000), (0, 6), (5792, 5793)))
        )
        tail = bytes(rng.choice((value, rng.randrange(256))) for value in chunks[0][1][8:])
        chunks[0][1] = sizes + tail
    elif kind == 1:
        bomb = zlib.compress(bytes(rng.choice((10**5, 5 * 10**7))), 9)
        name = rng.choice((b"zTXt", b"iCCP", b"iTXt", b"IDAT"))
        prefix = {b"zTXt": b"a\0\0", b"iCCP": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"IDAT": b""}[name]
        chunks.insert(rng.randrange(1, len(chunks)), [name, prefix + bomb])
    elif kind == 2:
        extra = rng.choice(
            (b"tRNS", b"PLTE", b"acTL", b"fcTL", b"fdAT", b"gAMA", b"eXIf", b"sBIT", b"pHYs", b"ABCD", b"IHDR")
        )
        chunks.insert(rng.randrange(len(chunks)), [extra, rng.randbytes(rng.choice((0, 1, 8, 26, 300)))])
    elif kind == 3:
        chunk = rng.choice(chunks)
        chunk[1] = mutate_bytes(rng, bytes(chunk[1]))
    else:
        rng.shuffle(chunks)
    return content[:8] + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def _chunks(content: bytes) -> Iterator[tuple[int, int]]:
    place = 8
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        yield place, length
        place += 12 + length


def _hostile_text(rng: Random, content: bytes) -> bytes:
    return rng.choice(
        (b"\xed\xa0\x80", b"\xc0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", b"\0", b"", b"\xef\xbb\xbfa", b"a" * 10**6)
    )


def _hostile_json(rng: Random, content: bytes) -> bytes:
    if rng.random() < 0.02:
        return rng.choice((b"[" * 10**6, b"[" + b"[]," * 10**6 + b"[]]", b'{"score":[1,' + b"2," * 10**6 + b"3]}"))
    return mutate_json(rng, json.loads(content))


HOSTILE_MEMBERS: dict[str, Callable[[Random, bytes], bytes]] = {
    "npy": _hostile_npy,
    "cls": _hostile_class,
    "image": _hostile_image,
    "text": _hostile_text,
    "json": _hostile_json,
}

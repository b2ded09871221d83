"""Ways to damage bytes, tars and JSON documents: at random, and on purpose with checksums that fit again."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

BLOCK = 512
Random = random.Random
Change = Callable[[Random, bytearray], None]

HOSTILE_NAMES = (
    b"../../../canary.npy",
    b"/etc/passwd",
    b"a/../../b.x.npy",
    b".hidden",
    b"no_extension",
    b"x.pyd",
    b"x.pkl.gz",
    b"pipe:touch canary",
    b"\xff\xfe\xfd.npy",
    "schl\u00fcssel-\u0645\u0641\u062a\u0627\u062d.npy".encode(),
    b"tab\there\x1b[31m.npy",
    b"__meta__/__index__",
    b"n" * 100,
    b"",
)
HOSTILE_SIZES = (
    b"77777777777\0",
    b"\x80" + bytes(10) + b"\x05",
    b"\x80" + b"\x7f" + bytes(10),
    b"\x80" + bytes(3) + b"\xff" * 8,
    b"\xff" * 12,
    b"\xff" * 11 + b"\x00",
    b"-0000000001\0",
    b"+0000000001\0",
    b"0x000000010\0",
    b"00000000009\0",
    b"1_000000000\0",
    b" " * 12,
    b"\0" * 12,
    b"00000001000\0",
    b"00000000777\0",
    b"00000004000\0",
)
OTHER_FILES = (
    b"",
    b"<html><body>404 Not Found</body></html>",
    b"<html>" * 2000,
    b"\x1f\x8b\x08\0" + bytes(2000),
    b"PK\x03\x04" + bytes(2000),
    bytes(1024),
    bytes(20480),
)
# numpy would load it with allow_pickle: a call of os.system("touch canary").
PICKLE = b"cposix\nsystem\n(S'touch canary'\ntR."


def mutate_bytes(rng: Random, content: bytes) -> bytes:
    """A few changes of random kinds."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(BYTE_CHANGES)(rng, changed)
    return bytes(changed)


def mutate_tar(rng: Random, content: bytes) -> bytes:
    """Changes of bytes, of blocks, and of headers whose checksum then fits again."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(TAR_CHANGES)(rng, changed)
    return bytes(changed)


def flip(rng: Random, content: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def overwrite(rng: Random, content: bytearray) -> None:
    start, size = _part(rng, content)
    fill = rng.choice((b"\0", b"\xff", b"9", b" ", b"\x80"))
    content[start : start + size] = rng.randbytes(size) if rng.random() < 0.3 else fill * size


def cut(rng: Random, content: bytearray) -> None:
    del content[rng.randrange(len(content) + 1) :]


def cut_at_block(rng: Random, content: bytearray) -> None:
    del content[rng.randrange(len(content) // BLOCK + 1) * BLOCK :]


def delete(rng: Random, content: bytearray) -> None:
    start, size = _part(rng, content)
    del content[start : start + size]


def insert(rng: Random, content: bytearray) -> None:
    start, size = _part(rng, content)
    content[start:start] = rng.choice((rng.randbytes(size), bytes(size)))


def duplicate(rng: Random, content: bytearray) -> None:
    start, size = _part(rng, content)
    content[start:start] = content[start : start + size]


def move(rng: Random, content: bytearray) -> None:
    start, size = _part(rng, content)
    part = content[start : start + size]
    del content[start : start + size]
    place = rng.randrange(len(content) + 1)
    content[place:place] = part


def shift_keeping_size(rng: Random, content: bytearray) -> None:
    """Everything behind some place moves on by a byte or a block; what is at the end is lost."""
    size = rng.choice((1, BLOCK))
    start = rng.randrange(len(content) + 1)
    content[start:start] = bytes(size)
    del content[-size:]


def replace_all(rng: Random, content: bytearray) -> None:
    other = rng.choice(OTHER_FILES)
    # Of the same size it is not told by its size.
    content[:] = other[: len(content)].ljust(len(content), rng.choice((b" ", b"\0"))) if rng.random() < 0.5 else other


def replace_blocks(rng: Random, content: bytearray) -> None:
    """Blocks exchanged, repeated over others, or left out, on their boundaries."""
    count = len(content) // BLOCK
    if count < 2:
        return
    one, other = rng.randrange(count) * BLOCK, rng.randrange(count) * BLOCK
    size = BLOCK * rng.choice((1, 1, 2, 4))
    first, second = bytes(content[one : one + size]), bytes(content[other : other + size])
    kind = rng.randrange(4)
    if kind == 0 and len(first) == len(second) and abs(one - other) >= size:
        content[one : one + size], content[other : other + size] = second, first
    elif kind == 1:
        content[other : other + len(first)] = first
    elif kind == 2:
        del content[one : one + size]
    else:
        content[other:other] = first


def edit_header(rng: Random, content: bytearray) -> None:
    """One field of one tar header; mostly with a checksum that fits, so that the change reaches what is behind it."""
    start = rng.choice(header_positions(content) or [0])
    header = bytearray(content[start : start + BLOCK].ljust(BLOCK, b"\0"))
    kind = rng.randrange(8)
    if kind <= 1:
        header[0:100] = rng.choice((*HOSTILE_NAMES, _other_name(rng, content))).ljust(100, b"\0")[:100]
    elif kind <= 3:
        header[124:136] = rng.choice((*HOSTILE_SIZES, b"%011o\0" % rng.randrange(2 ** rng.randrange(1, 33))))
    elif kind == 4:
        header[156:157] = rng.choice(
            (b"0", b"\0", *(bytes([code]) for code in b"1234567DKLMNSVXgx"), rng.randbytes(1))
        )
    elif kind == 5:
        header[345:500] = rng.choice((b"..", b"prefix/sub", *HOSTILE_NAMES, rng.randbytes(20))).ljust(155, b"\0")
    elif kind == 6:
        header[257:265] = rng.choice((b"ustar\x0000", b"ustar  \0", bytes(8), rng.randbytes(8)))
    else:
        place = rng.randrange(BLOCK)
        header[place] = rng.randrange(256)
    if rng.random() < 0.85:
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    content[start : start + BLOCK] = header


def edit_content(rng: Random, content: bytearray) -> None:
    """The content of a member of a tar, its headers left alone."""
    start = rng.choice(header_positions(content) or [0]) + BLOCK
    end = min(len(content), start + BLOCK)
    if start >= end:
        return
    part = bytearray(content[start:end])
    rng.choice((flip, overwrite, shift_keeping_size))(rng, part)
    content[start:end] = part.ljust(end - start, b"\0")[: end - start]


def header_positions(content: bytes | bytearray) -> list[int]:
    """Where tar headers lie, told by their magic."""
    return [start for start in range(0, len(content), BLOCK) if content[start + 257 : start + 262] == b"ustar"]


def _other_name(rng: Random, content: bytearray) -> bytes:
    start = rng.choice(header_positions(content) or [0])
    return bytes(content[start : start + 100])


def _part(rng: Random, content: bytearray) -> tuple[int, int]:
    if not content:
        return 0, rng.choice((1, BLOCK))
    size = min(len(content), rng.choice((1, 2, rng.randrange(1, 64), BLOCK, 2 * BLOCK)))
    start = rng.randrange(len(content) - size + 1)
    return (start // BLOCK * BLOCK if rng.random() < 0.3 else start), size


BYTE_CHANGES: tuple[Change, ...] = (
    *(flip, flip, overwrite, cut, delete, insert, duplicate, move),
    *(shift_keeping_size, replace_all),
)
TAR_CHANGES: tuple[Change, ...] = (
    *(flip, flip, overwrite, cut, cut_at_block, delete, insert, duplicate, move, shift_keeping_size, replace_all),
    *(replace_blocks, replace_blocks, edit_header, edit_header, edit_header, edit_header, edit_content, edit_content),
)

# JSON

_DEEP = "@DEEP@"
HOSTILE_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(2**31, 2**53 + 1, 2**62 - 1, 2**62, 2**63, 2**64, 10**400, -(2**63), 1e-320),
    *("", "\0", "\ud800", "a\nb", "\x1b[31mred", "x" * 5000, "\u0664\u0662", "\N{SMILING FACE WITH SUNGLASSES}"),
    *(
        "object",
        "O",
        "V8",
        "float128",
        ">f4",
        "float64",
        "uint8",
        "int64",
        "<U5",
        "npy",
        "cls",
        "image",
        "text",
        "json",
    ),
    *("pipe:touch canary", "pipe://touch canary", "file:///etc/passwd", "file:///%00", "file:///a%0ab", "file:x"),
    *("http://[", "http://127.0.0.1:1/x", "http://127.0.0.1:99999/x", "s3://bucket/x", "memory://x", "s3://a::b"),
    *("../../../etc/passwd", "/dev/zero", "/dev/stdin", ".", "..", "/", "shard-000000.tar/x", "n" * 300, "0" * 64),
    *(
        [],
        {},
        [[]],
        [None],
        [1, 2],
        [0],
        [-1],
        [2**62],
        [2**31, 2**31],
        [1] * 9,
        ["a"],
        [[1.0, 2.0], [3.0]],
        [1, None],
        [2**28],
        [2**20, 257],
    ),
    *({"a": 1}, {"url": "x"}, [{}], _DEEP),
)


def mutate_json(rng: Random, document: Any, seal: Callable[[Any], None] = lambda document: None) -> bytes:
    """Changes of a document's tree; `seal` then makes digests in it fit again."""
    changed = deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change_tree(rng, changed)
    if rng.random() < 0.85:
        # What is too far from a manifest has no digest.
        with contextlib.suppress(KeyError, TypeError, IndexError, AttributeError, ValueError):
            seal(changed)
    text = json.dumps(changed)
    depth = rng.choice((10, 13, 100, 3000, 200_000))
    text = text.replace(
        json.dumps(_DEEP), rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "0" + "}" * depth))
    )
    if rng.random() < 0.05:
        text = text.replace(":", ": " + rng.choice(("", "1, ", "NaN, ", '"a": ')), 1)
    return text.encode()


def _change_tree(rng: Random, document: Any) -> None:
    places = list(_places(document))
    if not places:
        return
    owner, key = rng.choice(places)
    kind = rng.randrange(10)
    if kind <= 5:
        # Copies everywhere: what later changes do to a value must not reach another place, or the next case.
        owner[key] = deepcopy(rng.choice(HOSTILE_VALUES))
    elif kind == 6:
        other, other_key = rng.choice(places)
        owner[key] = deepcopy(other[other_key])
    elif kind == 7:
        del owner[key]
    elif isinstance(owner, dict):
        owner[rng.choice((*owner, "surprise", "__class__", "\x1b[0m", ""))] = deepcopy(owner[key])
    else:
        owner.insert(key, deepcopy(owner[key]))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    if isinstance(value, dict):
        entries: list[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list):
        entries = list(enumerate(value))
    else:
        return []
    return [place for key, entry in entries for place in ((value, key), *_places(entry))]

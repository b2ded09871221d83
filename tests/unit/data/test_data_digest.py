"""The digest of members: its definition in plain integers, known values, and what it must not miss."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jmvae_dist.data.digest import CHUNK_BYTES, digest_of_pieces, digests_of_rows, member_digest, multipliers

LENGTHS = [*range(1, 18), 912, 1001, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 5]
KNOWN_MULTIPLIERS = [
    ["0x38c985dc40ef3013", "0x796930e5b7933b20", "0x2c661ea6beb343f9"],
    ["0xae4a1aed53b0cbb9", "0x67b7f6c7038a2390", "0x43dc2290ffc644ef"],
]
KNOWN_DIGESTS = [
    "0x0",
    "0x4e630736b190e3f3",
    "0x38c985dc40ef3013",
    "0xcd450fca4c88676c",
    "0x8a58ad6fca3168bc",
    "0xe5e2dc1f09bb490c",
    "0x85dc40ef30130000",
    "0x14aa353ee1908c64",
]


def plain_digest(content: bytes, level: int = 0) -> int:
    """The definition, word by word."""
    if len(content) > CHUNK_BYTES:
        chunks = [content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES)]
        return plain_digest(b"".join(plain_digest(chunk, level).to_bytes(8, "little") for chunk in chunks), level + 1)
    factors = multipliers(level).tolist()
    words = [int.from_bytes(content[start : start + 4], "little") for start in range(0, len(content), 4)]
    total = factors[0] * len(content) + sum(factors[number + 1] * word for number, word in enumerate(words))
    return total % 2**64


def random_rows(num_rows: int, num_bytes: int) -> tuple[np.ndarray, list[bytes]]:
    """Members of one length as `digests_of_rows` takes them, and as bytes."""
    words = np.zeros((num_rows, -(-num_bytes // 8)), np.uint64)
    words.view(np.uint8)[:, :num_bytes] = np.random.default_rng(num_bytes).integers(
        0, 256, (num_rows, num_bytes), np.uint8
    )
    return words, [row.tobytes()[:num_bytes] for row in words]


def test_known_values() -> None:
    """They are in files: whatever computes them, they must stay."""
    assert [hex(factor) for factor in multipliers(0)[:3].tolist()] == KNOWN_MULTIPLIERS[0]
    assert [hex(factor) for factor in multipliers(1)[:3].tolist()] == KNOWN_MULTIPLIERS[1]
    contents = (b"", b"7", b"\0", b"abcd", b"abcde", bytes(range(256)), bytes(CHUNK_BYTES), b"x" * (CHUNK_BYTES + 1))
    assert [hex(member_digest(content)) for content in contents] == KNOWN_DIGESTS


@settings(deadline=None, max_examples=60)
@given(content=st.binary(max_size=70))
@example(content=b"")
def test_small_members_follow_the_definition(content: bytes) -> None:
    assert member_digest(content) == member_digest(memoryview(content)) == plain_digest(content)


@pytest.mark.parametrize("num_bytes", LENGTHS)
def test_rows_members_and_pieces_follow_the_definition(num_bytes: int) -> None:
    words, contents = random_rows(3, num_bytes)
    expected = [plain_digest(content) for content in contents]
    assert digests_of_rows(words, num_bytes).tolist() == expected
    assert [member_digest(content) for content in contents] == expected
    for cuts in ((), (1,), (num_bytes // 2,), (CHUNK_BYTES,), (7, CHUNK_BYTES + 7)):
        bounds = [0, *cuts, num_bytes]
        pieces = [contents[0][start:stop] for start, stop in pairwise(bounds)]
        assert digest_of_pieces(pieces) == expected[0]


def test_many_rows_are_taken_in_blocks() -> None:
    words, contents = random_rows(700, 1001)
    assert digests_of_rows(words, 1001).tolist() == [member_digest(content) for content in contents]
    assert digests_of_rows(words[:0], 1001).tolist() == []


@pytest.mark.parametrize("num_bytes", [64, CHUNK_BYTES + 64])
def test_damage_that_weaker_sums_miss(num_bytes: int) -> None:
    """Two flipped highest bits, which cancel where words have 64 bits; words that changed places; other lengths."""
    content = random_rows(1, num_bytes)[1][0]
    damaged = []
    for bit in (0, 31, 32, 63):
        for first, second in ((0, 1), (2, 7), (0, num_bytes // 8 - 1)):
            words = np.frombuffer(content, np.uint64).copy()
            words[[first, second]] ^= np.uint64(1 << bit)
            damaged.append(words.tobytes())
    damaged += [content[4:8] + content[:4] + content[8:], content[-8:] + content[8:-8] + content[:8]]
    damaged += [content[:-1], content + b"\0", bytes(num_bytes), content[:32] + bytes(num_bytes - 32)]
    assert len({member_digest(content), *map(member_digest, damaged)}) == 1 + len(damaged)


def test_each_flipped_bit_is_noticed() -> None:
    content = random_rows(1, 21)[1][0]
    digests = {member_digest(content)}
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        digests.add(member_digest(bytes(damaged)))
    assert len(digests) == 1 + 8 * len(content)

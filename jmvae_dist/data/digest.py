"""The digest of a member: eight bytes that tell whether its content is damaged, at little more than reading it once.

It is multilinear (Carter and Wegman 1979; Lemire and Kaser 2014, "Strongly universal string hashing is fast"):

    digest = m[0] * num_bytes + m[1] * w[0] + m[2] * w[1] + ...   modulo 2**64

w[j] are the content's little-endian 32-bit words, the last one filled up with zeros. The multipliers m are 64-bit
words of a fixed Philox stream (`words_64` with key 0, `PURPOSE_MEMBER_DIGEST`, and the level as lane), and part of
the format. Content of more than `CHUNK_BYTES` is cut into chunks of that size. Their digests, as eight little-endian
bytes each, are the content of the next level, which has multipliers of its own: 128 KiB of them per level are enough
for content of any length, and stay in a CPU's cache.

Any given damage, such as a flipped bit, words that were swapped or a sector of zeros, goes unnoticed for at most one
in 2**33 choices of the multipliers, per level. 64-bit words would take fewer products, but then two flipped highest
bits would cancel, whatever the multipliers are. Damage without any structure goes unnoticed once in 2**64 times.

This is a check against damage and NOT against forgery: the multipliers are public, so whoever wants to can make other
content with the same digest. What must not be forged is to be compared by sha256.

Shape suffixes: B members, W 64-bit words of each.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, lru_cache

import numpy as np

from jmvae_dist.data.philox import PURPOSE_MEMBER_DIGEST, words_64

DIGEST_BYTES = 8
CHUNK_BYTES = 2**16

_MASK64 = 2**64 - 1
_SHIFT32 = np.uint64(32)
_WORD = np.dtype("<u4")
# Rows are taken in blocks of so many bytes, which with their halves fit into the L2 cache.
_BLOCK_BYTES = 2**19


@cache
def multipliers(level: int = 0) -> np.ndarray:
    """The multipliers m of a level, uint64 (1 + CHUNK_BYTES / 4,)."""
    return words_64(1 + CHUNK_BYTES // 4, seed=0, purpose=PURPOSE_MEMBER_DIGEST, lane=level)


@cache
def _factors_of_words(level: int) -> tuple[int, int, np.ndarray]:
    """m[0], m[1], and m[1:]."""
    factors = multipliers(level)
    return int(factors[0]), int(factors[1]), factors[1:]


@lru_cache(64)
def _factors_of_pairs(num_bytes: int, level: int) -> tuple[np.uint64, np.ndarray, np.ndarray]:
    """What a member of some length has in its sum for that, and what its 64-bit words and their upper halves are
    multiplied by: uint64 (W,) each.

    m_low * low + m_high * high = m_low * (low + 2**32 * high) + (m_high - 2**32 * m_low) * high
    """
    num_words = -(-num_bytes // 8)
    factors = multipliers(level)
    low, high = factors[1::2][:num_words], factors[2::2][:num_words]
    return np.uint64(int(factors[0]) * num_bytes & _MASK64), low.copy(), high - (low << _SHIFT32)


def member_digest(content: bytes | memoryview, level: int = 0) -> int:
    """The digest of some content."""
    num_bytes = len(content)
    if num_bytes > CHUNK_BYTES:
        view = memoryview(content)
        chunks = (view[start : start + CHUNK_BYTES] for start in range(0, num_bytes, CHUNK_BYTES))
        return _join([member_digest(chunk, level) for chunk in chunks], level)
    for_length, first, factors = _factors_of_words(level)
    if num_bytes <= 4:  # of labels and other small members there are many: numpy would take four times as long
        return (for_length * num_bytes + first * int.from_bytes(content, "little")) & _MASK64
    if num_bytes % 4:
        content = bytes(content) + bytes(-num_bytes % 4)
    words = np.frombuffer(content, _WORD)
    return (for_length * num_bytes + int(words.dot(factors[: len(words)]))) & _MASK64


def digest_of_pieces(pieces: Iterable[bytes]) -> int:
    """`member_digest` of content that comes in pieces of any length."""
    digests, rest = [], bytearray()
    for piece in pieces:
        rest += piece
        # A whole chunk stays behind, too: if nothing follows, there is but one.
        whole = max(0, len(rest) - 1) // CHUNK_BYTES * CHUNK_BYTES
        digests += [member_digest(bytes(rest[start : start + CHUNK_BYTES])) for start in range(0, whole, CHUNK_BYTES)]
        del rest[:whole]
    digests.append(member_digest(bytes(rest)))
    return digests[0] if len(digests) == 1 else _join(digests, 0)


def _join(digests: list[int], level: int) -> int:
    """The digest of content whose chunks have these digests."""
    return member_digest(np.array(digests, "<u8").tobytes(), level + 1)


def digests_of_rows(words_BW: np.ndarray, num_bytes: int, level: int = 0) -> np.ndarray:
    """`member_digest` of many members of one length: uint64 (B,).

    Args:
        words_BW: their content, uint64 little-endian; beyond `num_bytes` it must be zeros.
        num_bytes: of each, more than 8 (W - 1).
        level: see above.
    """
    if num_bytes > CHUNK_BYTES:
        chunks = [
            digests_of_rows(
                words_BW[:, start // 8 : (start + CHUNK_BYTES) // 8], min(CHUNK_BYTES, num_bytes - start), level
            )
            for start in range(0, num_bytes, CHUNK_BYTES)
        ]
        return digests_of_rows(np.stack(chunks, axis=1), DIGEST_BYTES * len(chunks), level + 1)
    length, low, high = _factors_of_pairs(num_bytes, level)
    rows_per_block = max(1, _BLOCK_BYTES // max(8, num_bytes))
    if len(words_BW) > rows_per_block:
        blocks = [words_BW[start : start + rows_per_block] for start in range(0, len(words_BW), rows_per_block)]
        return np.concatenate([digests_of_rows(block, num_bytes, level) for block in blocks])
    # Of integers, einsum takes two thirds of the time of a matrix product.
    digests_B: np.ndarray = np.einsum("bw,w->b", words_BW, low)
    if num_bytes > 4:  # else all upper halves are zeros
        digests_B += np.einsum("bw,w->b", words_BW >> _SHIFT32, high)
    digests_B += length
    return digests_B

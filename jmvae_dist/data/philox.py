"""Keyed random permutations from Philox4x32-10, a counter-based generator, in explicit integer arithmetic.

The order of training data must be the same today, after a library upgrade, and on another machine. Philox
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is a fixed function of a 64-bit key and a
128-bit counter; nothing here depends on numpy's generators, on `hash` or on how a number is printed.

Counter layout (four 32-bit words): element pair, window, epoch, purpose << 24 | lane. Purposes start at 0xF0,
which keeps these counters apart from those of the latent noise, whose streams (the top 16 bits of the same
word) are small numbers: the same seed never yields the same words for order and for noise. Transforms of samples
use (element group, position mod 2**32, position div 2**32, purpose << 24 | transform), with a key per modality.
"""

from __future__ import annotations

import numpy as np

PURPOSE_SHARD_ORDER = 0xF0
PURPOSE_WINDOW_ORDER = 0xF1
PURPOSE_PACKING = 0xF2
PURPOSE_SPLIT = 0xF3
PURPOSE_TRAIN_TRANSFORM = 0xF4
PURPOSE_EVALUATION_TRANSFORM = 0xF5
PURPOSE_MEMBER_DIGEST = 0xF6

MAX_EPOCH = 2**32
MAX_WINDOWS = 2**32
MAX_LANES = 2**24

_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_ROUNDS = 10


def philox4x32(
    counter_0: np.ndarray, counter_1: int | np.ndarray, counter_2: int | np.ndarray, counter_3: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Four 32-bit words per counter.

    Args:
        counter_0: uint64 array of any shape with values below 2**32.
        counter_1, counter_2, counter_3: below 2**32; shared, or (the first two) uint64 arrays of that shape.
        seed: the 64-bit key, low word first.

    Returns:
        Four uint64 arrays shaped like `counter_0`, values below 2**32.
    """
    assert counter_0.dtype == np.uint64
    for word in (counter_1, counter_2, counter_3):
        assert np.all(np.less(word, 2**32))
    assert 0 <= seed < 2**64
    c0 = counter_0
    c1, c2, c3 = (np.full_like(c0, word) for word in (counter_1, counter_2, counter_3))
    key_0, key_1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(_ROUNDS):
        # A product of two 32-bit words fits in 64 bits: no wrap-around is relied on.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> _SHIFT32) ^ c1 ^ np.uint64(key_0),
            product_1 & _MASK32,
            (product_0 >> _SHIFT32) ^ c3 ^ np.uint64(key_1),
            product_0 & _MASK32,
        )
        key_0, key_1 = (key_0 + _WEYL_0) & 0xFFFFFFFF, (key_1 + _WEYL_1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def permutation(n: int, *, seed: int, purpose: int, epoch: int = 0, lane: int = 0, window: int = 0) -> np.ndarray:
    """A permutation of 0..n-1 that is a pure function of its arguments: int64, shape (n,).

    Sorts n keyed 64-bit words; the sort is stable, so even equal words (odds n**2 / 2**65) give one answer.
    """
    keys = words_64(n, seed=seed, purpose=purpose, epoch=epoch, lane=lane, window=window)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def words_64(n: int, *, seed: int, purpose: int, epoch: int = 0, lane: int = 0, window: int = 0) -> np.ndarray:
    """Uniform 64-bit words, a pure function of the arguments: uint64 (n,); the first ones are the same for any n."""
    assert 0 <= n < 2**33
    assert 0 <= epoch < MAX_EPOCH
    assert 0 <= lane < MAX_LANES
    assert 0 <= window < MAX_WINDOWS
    assert 0xF0 <= purpose <= 0xFF
    pairs = np.arange((n + 1) // 2, dtype=np.uint64)
    word_0, word_1, word_2, word_3 = philox4x32(pairs, window, epoch, purpose << 24 | lane, seed)
    words = np.empty((len(pairs), 2), dtype=np.uint64)
    words[:, 0] = word_1 << _SHIFT32 | word_0
    words[:, 1] = word_3 << _SHIFT32 | word_2
    return words.reshape(-1)[:n]


def uniform_words(num_elements: int, position_B: np.ndarray, *, seed: int, purpose: int, number: int) -> np.ndarray:
    """Uniform 32-bit words for the elements of samples: uint64 (B, num_elements), values below 2**32.

    Args:
        num_elements: per sample.
        position_B: int64 (B,), what a sample's words depend on besides the other arguments.
        seed: the 64-bit key.
        purpose: one of the purposes above.
        number: of the user among those with the same key and purpose.
    """
    assert 0xF0 <= purpose <= 0xFF
    assert 0 <= number < 2**24
    groups = -(-num_elements // 4)
    group_BG = np.broadcast_to(np.arange(groups, dtype=np.uint64), (len(position_B), groups))
    position_BG = np.broadcast_to(position_B.astype(np.uint64)[:, None], group_BG.shape)
    words = philox4x32(group_BG, position_BG & _MASK32, position_BG >> _SHIFT32, purpose << 24 | number, seed)
    return np.stack(words, axis=-1).reshape(len(position_B), 4 * groups)[:, :num_elements]

"""The generator against the published vectors, and the permutations pinned for ever."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jmvae_dist.data.philox import PURPOSE_PACKING, PURPOSE_WINDOW_ORDER, permutation, philox4x32
from jmvae_dist.kernels import noise

GOLDEN_SMALL = [1, 4, 3, 8, 7, 0, 5, 9, 2, 6]
GOLDEN_LARGE = [56, 345, 829, 816, 595, 10, 801, 660]


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_matches_the_vectors_of_random123(
    counter: tuple[int, ...], seed: int, expected: tuple[int, ...]
) -> None:
    words = philox4x32(np.array([counter[0]], dtype=np.uint64), *counter[1:], seed)
    assert tuple(int(word[0]) for word in words) == expected


def test_the_noise_kernels_make_the_same_words() -> None:
    """Two implementations, in numpy and in torch: a mistake in one of them shows here."""
    counters = np.array([0, 1, 5, 2**32 - 1], dtype=np.uint64)
    words = philox4x32(counters, 7, 2**31, 0xF1000003, seed=2**64 - 3)
    noise_counter = [torch.tensor([column] * 4) for column in (0, 7, 2**31, 0xF1000003)]
    noise_counter[0] = torch.tensor(counters.astype(np.int64))
    noise_words = noise._philox(noise_counter, [2**32 - 3, 2**32 - 1])
    assert [word.tolist() for word in words] == [word.tolist() for word in noise_words]


def test_permutations_never_change() -> None:
    order = permutation(10, seed=7, purpose=PURPOSE_WINDOW_ORDER, epoch=3, lane=2, window=1)
    assert order.tolist() == GOLDEN_SMALL
    large = permutation(1000, seed=2**64 - 1, purpose=PURPOSE_PACKING)
    assert large[:8].tolist() == GOLDEN_LARGE


@given(n=st.integers(0, 300), seed=st.integers(0, 2**64 - 1), window=st.integers(0, 2**32 - 1))
def test_every_number_occurs_once(n: int, seed: int, window: int) -> None:
    order = permutation(n, seed=seed, purpose=PURPOSE_WINDOW_ORDER, window=window)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


def test_every_argument_matters() -> None:
    base = {"seed": 1, "purpose": PURPOSE_WINDOW_ORDER, "epoch": 1, "lane": 1, "window": 1}
    orders = [permutation(50, **base)]
    orders += [permutation(50, **{**base, name: value + 1}) for name, value in base.items()]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_first_places_are_uniform() -> None:
    firsts = [permutation(8, seed=5, purpose=PURPOSE_WINDOW_ORDER, window=window)[0] for window in range(4000)]
    counts = np.bincount(firsts, minlength=8)
    chi_square = float(((counts - 500) ** 2 / 500).sum())
    assert chi_square < 24.3  # 99.9 % quantile at 7 degrees of freedom; the orders are fixed, so is the outcome

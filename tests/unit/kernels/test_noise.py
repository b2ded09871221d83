"""Keyed noise: golden values, an independent implementation, independence of any split, and statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jmvae_dist.kernels.noise import Stream, _philox, normal_noise

# seed 7, step 3, rows 0, 1 and 4,000,000,000, six columns, stream PRIOR; float32 as int32.
GOLDEN_BITS = [
    [-1103387289, 1067566717, -1091773833, -1076518904, -1084364939, 1021321518],
    [1052923032, 1061831196, 1053561849, -1128054820, 1058789730, -1085189250],
    [1069783245, -1090152136, -1130619864, 1068522574, -1108815139, -1117230510],
]


def numpy_noise(seed: int, step: int, rows: list[int], dim: int, stream: int) -> np.ndarray:
    """The documented layout, written once more with Python integers and numpy, one value at a time."""
    result = np.zeros((len(rows), dim), np.float32)
    for i, row in enumerate(rows):
        for group in range((dim + 3) // 4):
            counter = [group, row, step % 2**32, (stream << 16) + step // 2**32]
            key = [seed % 2**32, seed // 2**32]
            for _ in range(10):
                high0, low0 = divmod(counter[0] * 0xD2511F53, 2**32)
                high2, low2 = divmod(counter[2] * 0xCD9E8D57, 2**32)
                counter = [high2 ^ counter[1] ^ key[0], low2, high0 ^ counter[3] ^ key[1], low0]
                key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
            for pair in (0, 2):
                radius = np.sqrt(-2 * np.log((np.float64(counter[pair]) + 0.5) / 2**32))
                angle = 2 * np.pi * (np.float64(counter[pair + 1]) + 0.5) / 2**32
                for offset, value in enumerate((radius * np.cos(angle), radius * np.sin(angle))):
                    column = 4 * group + pair + offset
                    if column < dim:
                        result[i, column] = value
    return result


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    """Known-answer vectors of the authors' reference implementation (Random123, philox4x32-10)."""
    words = _philox([torch.tensor([word]) for word in counter], key)
    assert [int(word) for word in words] == expected


def test_golden_values() -> None:
    """Runs are reproducible across versions only while these bits stay."""
    noise = normal_noise(seed=7, global_step=3, rows=torch.tensor([0, 1, 4_000_000_000]), dim=6, stream=Stream.PRIOR)
    assert noise.dtype == torch.float32
    assert noise.view(torch.int32).tolist() == GOLDEN_BITS


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**48 - 1),
    rows=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3),
    dim=st.integers(1, 9),
    stream=st.integers(0, 2**16 - 1),
)
def test_equals_an_independent_implementation(seed: int, step: int, rows: list[int], dim: int, stream: int) -> None:
    noise = normal_noise(seed, step, torch.tensor(rows), dim, stream)
    expected = numpy_noise(seed, step, rows, dim, stream)
    # One unit in the last place: C libraries' cosines differ in float64's last digit, which may change a
    # rounding.
    np.testing.assert_array_max_ulp(noise.numpy(), expected, maxulp=1)


@settings(deadline=None, max_examples=30)
@given(dim=st.integers(1, 40), wider=st.integers(0, 40), cut=st.integers(0, 20), step=st.integers(0, 2**40))
def test_any_split_equals_the_whole(dim: int, wider: int, cut: int, step: int) -> None:
    rows = torch.arange(20) * 12_345
    whole = normal_noise(1, step, rows, dim)
    assert torch.equal(normal_noise(1, step, rows, dim + wider)[:, :dim], whole)
    parts = [normal_noise(1, step, part, dim) for part in (rows[:cut], rows[cut:])]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(cut))
    assert torch.equal(normal_noise(1, step, rows[order], dim), whole[order])


def test_moments_and_tails() -> None:
    values = normal_noise(2026, 0, torch.arange(4096), 256).double().flatten()
    count = values.numel()
    # Five standard errors of each moment of a standard normal.
    assert abs(values.mean()) < 5 / count**0.5
    assert abs(values.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((values**3).mean()) < 5 * (15 / count) ** 0.5
    assert abs((values**4).mean() - 3) < 5 * (96 / count) ** 0.5
    sorted_values = values.sort().values
    cdf = torch.special.ndtr(sorted_values)
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    kolmogorov_smirnov = (cdf - steps).abs().max() * count**0.5
    assert kolmogorov_smirnov < 1.95  # p = 0.001
    assert values.abs().max() < 6.77


@pytest.mark.parametrize("neighbour", ["row", "column", "step", "seed", "high seed", "stream"])
def test_neighbours_are_uncorrelated(neighbour: str) -> None:
    rows, dim = torch.arange(2048), 128
    base = normal_noise(5, 9, rows, dim)
    other = {
        "row": lambda: normal_noise(5, 9, rows + 1, dim),
        "column": lambda: normal_noise(5, 9, rows, dim + 1)[:, 1:],
        "step": lambda: normal_noise(5, 10, rows, dim),
        "seed": lambda: normal_noise(6, 9, rows, dim),
        "high seed": lambda: normal_noise(5 + 2**32, 9, rows, dim),
        "stream": lambda: normal_noise(5, 9, rows, dim, Stream.IMPORTANCE),
    }[neighbour]()
    for first, second in ((base, other), (base.abs(), other.abs())):
        correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
        assert abs(correlation) < 5 / base.numel() ** 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"global_step": 2**48}, "global_step"),
        ({"stream": 2**16}, "stream"),
        ({"rows": torch.tensor([2**32])}, "rows"),
        ({"rows": torch.tensor([-1])}, "rows"),
        ({"rows": torch.tensor([1], dtype=torch.int32)}, "int64"),
        ({"rows": torch.tensor([[1]])}, "int64"),
    ],
)
def test_out_of_range_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normal_noise(**{"seed": 0, "global_step": 0, "rows": torch.tensor([0]), "dim": 4, **arguments})


def test_stream_numbers_are_permanent() -> None:
    numbers = {"LATENT": 0, "EVALUATION_LATENT": 1, "IMPORTANCE": 2, "PRIOR": 3, "CONDITIONAL": 4}
    assert {stream.name: stream.value for stream in Stream} == numbers

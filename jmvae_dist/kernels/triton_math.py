"""Device functions shared by the Triton kernels: exp, log, phi and keyed normal noise.

Everything in float32 here is made of additions, multiplications, comparisons and bit operations, which IEEE 754
rounds in one way only, and the kernels are compiled without fused multiply-adds. So an element comes out the same
from Triton's interpreter, where it is tested, and from a GPU; the hardware's approximate exponential would not
(its relative error grows to 2e-6 at |x| = 30), and the interpreter, which calls numpy's, would hide that.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below this |x|, phi and expm1 are computed by the power series of phi.
_SERIES_RADIUS = tl.constexpr(1.0)
# ln 2 in two parts; the first has so few digits that its product with an exponent is exact.
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440e-4)
_LOG2_E = tl.constexpr(1.4426950408889634)
_SQRT_HALF = tl.constexpr(0.70710678118654752)
_TURN = tl.constexpr(6.283185307179586 / 4294967296.0)
_WORD = tl.constexpr(1.0 / 4294967296.0)


@triton.jit
def _power_of_two(exponent):
    """2^exponent for int32 `exponent` from -126 to 127, from its bit pattern."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp(x):
    """exp(x), float32, within 2 units in the last place; inf, 0 and NaN as usual."""
    # Beyond these limits the result is inf or 0 anyway, and the exponent would not fit.
    limited = tl.minimum(tl.maximum(x, -105.0), 89.0)
    exponent = tl.floor(limited * _LOG2_E + 0.5)
    r = (limited - exponent * _LN2_HIGH) - exponent * _LN2_LOW
    # Taylor series; |r| <= ln 2 / 2, so that the first term left out is below 6e-9.
    series = r * (1.0 / 5040) + 1.0 / 720
    series = series * r + 1.0 / 120
    series = series * r + 1.0 / 24
    series = series * r + 1.0 / 6
    series = series * r + 0.5
    series = series * r * r + r + 1.0
    # Scaled in two steps: 2^exponent alone may overflow where the result does not, or be subnormal.
    half = exponent.to(tl.int32) >> 1
    result = series * _power_of_two(half) * _power_of_two(exponent.to(tl.int32) - half)
    # min and max drop NaN, which must reach the loss, where a guard looks for it.
    return tl.where(x == x, result, x)


@triton.jit
def log(x):
    """log(x) for normal float32 x > 0, within 2e-7 absolutely or relatively (Cephes' logf, Moshier 1989)."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    is_large = mantissa > 2 * _SQRT_HALF
    r = tl.where(is_large, 0.5 * mantissa, mantissa) - 1.0
    e = tl.where(is_large, exponent + 1, exponent).to(tl.float32)
    square = r * r
    series = r * 7.0376836292e-2 - 1.1514610310e-1
    series = series * r + 1.1676998740e-1
    series = series * r - 1.2420140846e-1
    series = series * r + 1.4249322787e-1
    series = series * r - 1.6668057665e-1
    series = series * r + 2.0000714765e-1
    series = series * r - 2.4999993993e-1
    series = series * r + 3.3333331174e-1
    result = r + (series * r * square + e * _LN2_LOW - 0.5 * square) + e * _LN2_HIGH
    return tl.where(x == x, result, x)


@triton.jit
def log1p(x):
    """log(1 + x) for float32 x from 0 to 1, accurate to a few units in the last place (Kahan's correction)."""
    total = 1.0 + x
    # What rounding took from the sum is put right by the ratio; where all of x was lost, log(1 + x) is x.
    excess = total - 1.0
    return tl.where(excess == 0.0, x, log(total) * tl.div_rn(x, tl.where(excess == 0.0, 1.0, excess)))


@triton.jit
def _phi_series(x):
    """exp(x) - 1 - x for |x| <= 1, by its power series up to x^12 / 12!."""
    series = x * (1.0 / 479001600) + 1.0 / 39916800
    series = series * x + 1.0 / 3628800
    series = series * x + 1.0 / 362880
    series = series * x + 1.0 / 40320
    series = series * x + 1.0 / 5040
    series = series * x + 1.0 / 720
    series = series * x + 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x + 1.0 / 6
    series = series * x + 0.5
    return series * x * x


@triton.jit
def phi(x):
    """exp(x) - 1 - x, accurate to rounding error and never negative (see `reference.phi`)."""
    is_small = tl.abs(x) < _SERIES_RADIUS
    return tl.where(is_small, _phi_series(tl.where(is_small, x, 0.0)), exp(x) - 1.0 - x)


@triton.jit
def expm1(x):
    """exp(x) - 1, accurate to rounding error: the derivative of phi."""
    is_small = tl.abs(x) < _SERIES_RADIUS
    near = tl.where(is_small, x, 0.0)
    return tl.where(is_small, near + _phi_series(near), exp(x) - 1.0)


@triton.jit
def _cos_sin(word):
    """Cosine and sine (float64) of the angle (word + 1/2) / 2^32 turns, by Taylor series around whole quarters.

    The library's cosine would reserve local memory for arguments of any size. The first terms left out are below
    float64's rounding error at an eighth of a turn.
    """
    shifted = word + 0x20000000
    quarter = shifted >> 30
    x = ((shifted & 0x3FFFFFFF).to(tl.float64) - 536870912.0 + 0.5) * _TURN
    y = x * x
    sin = y * (-1.0 / 1307674368000.0) + 1.0 / 6227020800.0
    sin = sin * y - 1.0 / 39916800.0
    sin = sin * y + 1.0 / 362880.0
    sin = sin * y - 1.0 / 5040.0
    sin = sin * y + 1.0 / 120.0
    sin = sin * y - 1.0 / 6.0
    sin = sin * y * x + x
    cos = y * (1.0 / 20922789888000.0) - 1.0 / 87178291200.0
    cos = cos * y + 1.0 / 479001600.0
    cos = cos * y - 1.0 / 3628800.0
    cos = cos * y + 1.0 / 40320.0
    cos = cos * y - 1.0 / 720.0
    cos = cos * y + 1.0 / 24.0
    cos = cos * y - 0.5
    cos = cos * y + 1.0
    is_odd = (quarter & 1) == 1
    first, second = tl.where(is_odd, sin, cos), tl.where(is_odd, cos, sin)
    is_left, is_below = (quarter == 1) | (quarter == 2), quarter >= 2
    return tl.where(is_left, -first, first), tl.where(is_below, -second, second)


@triton.jit
def _box_muller(first, second):
    """Two independent normals (float32) from two words (uint32), as `noise._box_muller` computes them."""
    radius = tl.sqrt(-2.0 * tl.log((first.to(tl.float64) + 0.5) * _WORD))
    cos, sin = _cos_sin(second)
    return (radius * cos).to(tl.float32), (radius * sin).to(tl.float32)


@triton.jit
def normal_noise(seed, step_low, step_high, rows, first_column, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """Noise (BLOCK_B, BLOCK_D), float32, equal to `jmvae_dist.kernels.noise.normal_noise` (layout: there).

    Args:
        seed: int64, the bits of the 64-bit seed.
        step_low: global step mod 2^32.
        step_high: stream * 2^16 + global step div 2^32.
        rows: int64 (BLOCK_B,): numbers of the rows.
        first_column: Column of the first value, a multiple of 4.
        BLOCK_B: Number of rows.
        BLOCK_D: Number of columns, a multiple of 4.
    """
    groups = first_column // 4 + tl.arange(0, BLOCK_D // 4)
    zeros = tl.zeros([BLOCK_B, BLOCK_D // 4], tl.uint32)
    c0 = zeros + groups.to(tl.uint32)[None, :]
    c1 = zeros + rows.to(tl.uint32)[:, None]
    c2 = zeros + tl.to_tensor(step_low).to(tl.uint32)
    c3 = zeros + tl.to_tensor(step_high).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.to_tensor(seed).to(tl.int64), c0, c1, c2, c3)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))

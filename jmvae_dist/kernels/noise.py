"""Standard normal noise as a pure function of (seed, stream, step, row, column).

A generator with a state would tie the noise of a sample to the rank, the micro-batch and the number of
restarts. Here the noise of column `col` of row `row` at step `step` is computed from these numbers alone, by
the counter-based generator Philox4x32-10 (Salmon et al. 2011): any split of the rows over ranks, workers and
micro-batches gives the same values, and resuming needs no state.

Layout (part of what makes a run reproducible, so it never changes)::

    key     = (seed mod 2^32, seed div 2^32)
    counter = (col div 4, row, step mod 2^32, stream * 2^16 + step div 2^32)

The four output words w0..w3 give the columns 4g..4g+3, in pairs (w0, w1) and (w2, w3), by the Box-Muller
transform. It is evaluated in float64 and rounded to float32, so that the last-digit differences between the
logarithms and cosines of different platforms and libraries vanish in the rounding.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

_WORD_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Stream(IntEnum):
    """What noise is for: one stream per purpose. The numbers are permanent: never reuse or change one."""

    LATENT = 0  # latent sample of a training step; row = position in the global batch
    EVALUATION_LATENT = 1  # latent sample of an evaluation; row = position in the data set, step = 0
    IMPORTANCE = 2  # importance samples of an evaluation; row = position in the data set, step = draw
    PRIOR = 3  # samples of the prior; row = number of the sample
    CONDITIONAL = 4  # samples given some modalities; row = position in the data set, step = draw


def _philox(counter: list[Tensor], key: list[int]) -> list[Tensor]:
    """Four 32-bit words per counter, as int64 tensors (torch has no full uint32 arithmetic).

    The product of two 32-bit words overflows int64, but wraps modulo 2^64, so both of its halves are exact
    after masking.
    """
    for _ in range(_ROUNDS):
        product0, product2 = counter[0] * _MULTIPLIERS[0], counter[2] * _MULTIPLIERS[1]
        counter = [
            ((product2 >> 32) & _WORD_MASK) ^ counter[1] ^ key[0],
            product2 & _WORD_MASK,
            ((product0 >> 32) & _WORD_MASK) ^ counter[3] ^ key[1],
            product0 & _WORD_MASK,
        ]
        key = [(word + increment) & _WORD_MASK for word, increment in zip(key, _KEY_INCREMENTS, strict=True)]
    return counter


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals (float32) from two 32-bit words (int64)."""
    # The half keeps the logarithm off 0; adding it is exact in float64.
    radius = torch.sqrt(-2.0 * torch.log((first.double() + 0.5) * 2.0**-32))
    angle = (second.double() + 0.5) * (2.0 * math.pi * 2.0**-32)
    return (radius * torch.cos(angle)).float(), (radius * torch.sin(angle)).float()


class KeyedNoise(NamedTuple):
    """Noise named by its key, for whoever can compute it where it is used, instead of reading it from memory.

    Attributes:
        seed: See `normal_noise`, as for the other attributes.
        global_step: Step of the run.
        rows: int64, shape (B,): numbers of the rows.
        stream: What the noise is for.
    """

    seed: int
    global_step: int
    rows: Tensor
    stream: int = Stream.LATENT

    def draw(self, dim: int) -> Tensor:
        """The noise itself: float32, shape (B, dim)."""
        return normal_noise(self.seed, self.global_step, self.rows, dim, self.stream)

    def draw_steps(self, offsets: range, dim: int) -> Tensor:
        """The noise of the steps `global_step + offsets`: float32, shape (len(offsets), B, dim)."""
        steps = range(self.global_step + offsets.start, self.global_step + offsets.stop)
        return normal_noise_of_steps(self.seed, steps, self.rows, dim, self.stream)


def check_key(key: KeyedNoise) -> None:
    """Refuse numbers out of range: two different ones would otherwise get the same noise.

    Raises:
        ValueError: Names the argument.
    """
    for name, limit in (("seed", 64), ("global_step", 48), ("stream", 16)):
        value = getattr(key, name)
        if not 0 <= value < 2**limit:
            raise ValueError(f"{name}: {value} is not allowed; it must be at least 0 and below 2^{limit}")
    rows = key.rows
    if rows.dtype != torch.int64 or rows.ndim != 1:
        raise ValueError(f"rows: expected int64 of shape (B,), got {rows.dtype} of shape {tuple(rows.shape)}")
    if rows.device.type == "cpu" and bool(((rows < 0) | (rows > _WORD_MASK)).any()):
        raise ValueError("rows: every row must be at least 0 and below 2^32")


def normal_noise(seed: int, global_step: int, rows: Tensor, dim: int, stream: int = Stream.LATENT) -> Tensor:
    """Standard normal noise of the given rows; the same numbers in whatever split they are computed.

    Args:
        seed: 0 <= seed < 2^64.
        global_step: 0 <= global_step < 2^48.
        rows: int64, shape (B,): numbers that identify the rows, each 0 <= row < 2^32 (checked on the CPU
            only; on other devices the check would wait for the device, and rows count modulo 2^32).
        dim: Number of columns. Column c does not depend on `dim`.
        stream: What the noise is for, 0 <= stream < 2^16; see :class:`Stream`.

    Returns:
        float32, shape (B, dim), on the device of `rows`. Magnitudes reach at most 6.77.

    Raises:
        ValueError: An argument is out of range: two different ones would otherwise get the same noise.
    """
    return normal_noise_of_steps(seed, range(global_step, global_step + 1), rows, dim, stream)[0]


def normal_noise_of_steps(seed: int, steps: range, rows: Tensor, dim: int, stream: int = Stream.LATENT) -> Tensor:
    """`normal_noise` of consecutive steps at once: float32, shape (len(steps), B, dim).

    Raises:
        ValueError: As `normal_noise`, or `steps` is empty or not consecutive.
    """
    if len(steps) < 1 or steps.step != 1:
        raise ValueError(f"steps: {steps} must be consecutive and at least one")
    for step in (steps.start, steps.stop - 1):
        check_key(KeyedNoise(seed, step, rows, stream))
    groups = torch.arange((dim + 3) // 4, device=rows.device)
    # Filled on the device: copying numbers from the host would make it wait.
    steps_S11 = torch.arange(steps.start, steps.stop, device=rows.device)[:, None, None]
    words = (steps_S11 & _WORD_MASK, steps_S11 >> 32 | int(stream) << 16)
    counter = [groups[None, None, :], (rows & _WORD_MASK)[None, :, None], *words]
    w0, w1, w2, w3 = _philox(counter, [seed & _WORD_MASK, seed >> 32])
    normals = torch.stack((*_box_muller(w0, w1), *_box_muller(w2, w3)), dim=-1)
    return normals.flatten(2)[..., :dim]

"""Triton kernels of log-likelihoods summed over a sample, forward and backward, and what launches them.

Eager torch writes the log-probability of every element to memory, several times over, before it sums them. Here
decoder output and data are read once; backward reads them once more and writes the gradient. The formulas are those
of `model.likelihoods`, in float32.

Shape suffixes: N rows of decoder output, B samples of data, F elements of a sample. Row n belongs to sample n mod B.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from jmvae_dist.kernels.triton_gaussian import OPTIONS, tile_shape
from jmvae_dist.kernels.triton_math import exp, log1p

# Values of KIND.
KINDS = {"normal": 0, "laplace": 1, "bernoulli": 2}
_NORMAL, _LAPLACE = tl.constexpr(KINDS["normal"]), tl.constexpr(KINDS["laplace"])
_NOT_SPECIALIZED = ["num_rows", "num_samples", "inverse_scale", "normalizer"]


@triton.jit
def _load_pair(decoded_ptr, target_ptr, rows, columns, num_rows, num_samples, size):
    """Tiles of decoder output and data in float32, and which of their elements exist."""
    inside = (rows < num_rows)[:, None] & (columns < size)[None, :]
    decoded = tl.load(decoded_ptr + rows[:, None] * size + columns[None, :], mask=inside, other=0.0)
    samples = rows % num_samples
    target = tl.load(target_ptr + samples[:, None] * size + columns[None, :], mask=inside, other=0.0)
    return decoded.to(tl.float32), target.to(tl.float32), inside


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def log_prob_forward(
    decoded_ptr,  # (N, F), contiguous
    target_ptr,  # (B, F), contiguous
    sum_ptr,  # float32 (N,)
    inverse_scale, normalizer, num_rows, num_samples, size,
    KIND: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum over F of log p(target | decoded); `normalizer` is that of the whole sample. Grid: (row tiles,)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    total = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, size, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D).to(tl.int64)
        decoded, target, inside = _load_pair(decoded_ptr, target_ptr, rows, columns, num_rows, num_samples, size)
        difference = (target - decoded) * inverse_scale
        if KIND == _NORMAL:
            loss = 0.5 * difference * difference
        elif KIND == _LAPLACE:
            loss = tl.abs(difference)
        else:
            # Exact where the decoder is confident and right, and target * decoded - softplus(decoded) would cancel.
            loss = tl.maximum(decoded, 0.0) - decoded * target + log1p(exp(-tl.abs(decoded)))
        # NaN, which the maximum drops, must reach the sum.
        loss = tl.where(difference == difference, loss, difference)
        total += tl.sum(tl.where(inside, loss, 0.0), axis=1)
    tl.store(sum_ptr + rows, -total - normalizer, mask=rows < num_rows)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def log_prob_backward(
    decoded_ptr,  # (N, F), contiguous
    target_ptr,  # (B, F), contiguous
    grad_ptr, grad_n,  # float32 (N,) and its stride
    d_decoded_ptr,  # (N, F), contiguous, in the dtype of decoded
    inverse_scale, num_rows, num_samples, size,
    KIND: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of the decoder output. Grid: (row tiles, column tiles)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    decoded, target, inside = _load_pair(decoded_ptr, target_ptr, rows, columns, num_rows, num_samples, size)
    grad = tl.load(grad_ptr + rows * grad_n, mask=rows < num_rows, other=0.0)[:, None]
    difference = (target - decoded) * inverse_scale
    if KIND == _NORMAL:
        slope = difference * inverse_scale
    elif KIND == _LAPLACE:
        slope = tl.where(difference > 0.0, inverse_scale, tl.where(difference < 0.0, -inverse_scale, difference))
    else:
        # target - sigmoid(decoded), from the smaller one of sigmoid and 1 - sigmoid.
        small = exp(-tl.abs(decoded))
        small = tl.div_rn(small, 1.0 + small)
        slope = tl.where(decoded >= 0.0, (target - 1.0) + small, target - small)
    values = (grad * slope).to(d_decoded_ptr.dtype.element_ty)
    tl.store(d_decoded_ptr + rows[:, None] * size + columns[None, :], values, mask=inside)


def launch_log_prob_forward(kind: str, scale: float, decoded_NF: Tensor, target_BF: Tensor, sum_N: Tensor) -> None:
    """Fill `sum_N` (float32): log p of every row. All tensors are contiguous."""
    num_rows, size = decoded_NF.shape
    block_b, block_d = tile_shape(size)
    normalizers = {"normal": math.log(scale) + 0.5 * math.log(2 * math.pi), "laplace": math.log(2 * scale)}
    with torch.cuda.device_of(decoded_NF):
        log_prob_forward[(triton.cdiv(num_rows, block_b),)](
            decoded_NF, target_BF, sum_N, 1.0 / scale, size * normalizers.get(kind, 0.0),
            num_rows, len(target_BF), size,
            KIND=KINDS[kind], BLOCK_B=block_b, BLOCK_D=block_d, **OPTIONS,
        )  # fmt: skip


def launch_log_prob_backward(
    kind: str, scale: float, decoded_NF: Tensor, target_BF: Tensor, grad_N: Tensor, d_decoded_NF: Tensor
) -> None:
    """Fill `d_decoded_NF` from the gradient of the sums (float32, any stride)."""
    num_rows, size = decoded_NF.shape
    block_b, block_d = tile_shape(size)
    with torch.cuda.device_of(decoded_NF):
        log_prob_backward[(triton.cdiv(num_rows, block_b), triton.cdiv(size, block_d))](
            decoded_NF, target_BF, grad_N, *grad_N.stride(), d_decoded_NF, 1.0 / scale,
            num_rows, len(target_BF), size,
            KIND=KINDS[kind], BLOCK_B=block_b, BLOCK_D=block_d, **OPTIONS,
        )  # fmt: skip

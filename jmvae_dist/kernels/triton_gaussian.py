"""Triton kernels of the operations on diagonal Gaussians, forward and backward, and what launches them.

Each kernel reads every input element once and writes every output element once. It computes in float32 whatever
the inputs' dtype (float32, bfloat16 or float16), takes any strides, so that the two halves of one linear layer need
no copy, and addresses with int64, so that tensors of more than 2^31 elements do not wrap around. The mathematics is
that of `reference`; `ops` makes the launchers differentiable.

Shape suffixes: B batch, D latent dimension, M experts. A program works on a tile of BLOCK_B rows and BLOCK_D columns.
Block sizes depend on D and M only and the batch size is not specialised on: no batch size compiles anything anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from jmvae_dist.kernels.triton_math import exp, expm1, log, normal_noise, phi

# Elements of a tile, so that no register is spilled: with 4 warps 4 per thread, which one wide load may bring, or 2
# where rows are narrow and each element may need a pointer of its own.
_TILE, _NARROW_TILE = 512, 256
_MAX_BLOCK_D = 512
_MIN_WIDE_BLOCK_D = 256
# Sums per tile (rows x experts) that still fit into registers.
_MAX_SUMS = 2048

_NOT_SPECIALIZED = ["batch_size", "num_experts", "seed", "step_low", "step_high", "grad_experts_m"]
# Without fused multiply-adds a GPU rounds every element as the interpreter does.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _load(pointer, row_stride, column_stride, rows, columns, inside):
    """Tile of a (B, D) tensor in float32; 0 outside, where it contributes nothing to any sum."""
    offsets = rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, values, dim, rows, columns, inside):
    """Write a tile of a contiguous (B, D) tensor in its dtype."""
    tl.store(pointer + rows[:, None] * dim + columns[None, :], values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _load_noise(
    noise_ptr, noise_b, noise_d, rows_ptr, rows_b, seed, step_low, step_high, rows, columns, start, inside,
    batch_size, IS_KEYED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tile of the noise: the given one, or generated."""
    if IS_KEYED:
        numbers_B = tl.load(rows_ptr + rows * rows_b, mask=rows < batch_size, other=0)
        noise = normal_noise(seed, step_low, step_high, numbers_B, start, BLOCK_B, BLOCK_D)
    else:
        noise = _load(noise_ptr, noise_b, noise_d, rows, columns, inside)
    return noise


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def kl_terms_forward(
    mu_ptr, mu_b, mu_d,  # (B, D) and its strides
    logvar_ptr, logvar_b, logvar_d,  # (B, D)
    mus_ptr, mus_m, mus_b, mus_d,  # (M, B, D)
    logvars_ptr, logvars_m, logvars_b, logvars_d,  # (M, B, D)
    noise_ptr, noise_b, noise_d,  # (B, D), unless keyed
    rows_ptr, rows_b,  # int64 (B,), if keyed
    z_ptr,  # float32 (B, D), contiguous as all outputs
    kl_prior_ptr,  # float32 (B,)
    kl_experts_ptr,  # float32 (M, B)
    seed, step_low, step_high, batch_size, dim, num_experts,
    IS_KEYED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`reference.gaussian_kl_terms`; BLOCK_M is at least M. Grid: (row tiles,)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    slots_M = tl.arange(0, BLOCK_M)
    prior_B = tl.zeros([BLOCK_B], tl.float32)
    # A register for every sum of the tile: looping over the experts outside would read q once per expert.
    experts_BM = tl.zeros([BLOCK_B, BLOCK_M], tl.float32)
    for start in range(0, dim, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D).to(tl.int64)
        inside = (rows < batch_size)[:, None] & (columns < dim)[None, :]
        mu = _load(mu_ptr, mu_b, mu_d, rows, columns, inside)
        logvar = _load(logvar_ptr, logvar_b, logvar_d, rows, columns, inside)
        noise = _load_noise(
            noise_ptr, noise_b, noise_d, rows_ptr, rows_b, seed, step_low, step_high, rows, columns, start, inside,
            batch_size, IS_KEYED, BLOCK_B, BLOCK_D,
        )  # fmt: skip
        _store(z_ptr, mu + exp(0.5 * logvar) * noise, dim, rows, columns, inside)
        prior_B += tl.sum(mu * mu + phi(logvar), axis=1)
        for m in range(num_experts):
            expert = tl.to_tensor(m).to(tl.int64)
            mu_m = _load(mus_ptr + expert * mus_m, mus_b, mus_d, rows, columns, inside)
            logvar_m = _load(logvars_ptr + expert * logvars_m, logvars_b, logvars_d, rows, columns, inside)
            difference = mu - mu_m
            terms = difference * difference * exp(-logvar_m) + phi(logvar - logvar_m)
            experts_BM += tl.where(slots_M[None, :] == m, tl.sum(terms, axis=1)[:, None], 0.0)
    tl.store(kl_prior_ptr + rows, 0.5 * prior_B, mask=rows < batch_size)
    is_sum = (rows < batch_size)[:, None] & (slots_M < num_experts)[None, :]
    offsets = slots_M.to(tl.int64)[None, :] * batch_size + rows[:, None]
    tl.store(kl_experts_ptr + offsets, 0.5 * experts_BM, mask=is_sum)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def kl_terms_backward(
    mu_ptr, mu_b, mu_d,
    logvar_ptr, logvar_b, logvar_d,
    mus_ptr, mus_m, mus_b, mus_d,
    logvars_ptr, logvars_m, logvars_b, logvars_d,
    noise_ptr, noise_b, noise_d,
    rows_ptr, rows_b,
    grad_z_ptr, grad_z_b, grad_z_d,  # float32 (B, D)
    grad_prior_ptr, grad_prior_b,  # float32 (B,)
    grad_experts_ptr, grad_experts_m, grad_experts_b,  # float32 (M, B)
    d_mu_ptr, d_logvar_ptr,  # (B, D), contiguous, in the dtypes of mu and logvar
    d_mus_ptr, d_logvars_ptr,  # (M, B, D), likewise
    seed, step_low, step_high, batch_size, dim, num_experts,
    IS_KEYED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs of `kl_terms_forward`. Grid: (row tiles, column tiles).

    With d = logvar - logvar_m and p = exp(-logvar_m): the derivatives of KL(q || q_m) are ``(mu - mu_m) p`` for mu,
    ``expm1(d) / 2`` for logvar, and for logvar_m ``-((mu - mu_m)^2 p + expm1(d)) / 2``.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    start = tl.program_id(1) * BLOCK_D
    columns = start + tl.arange(0, BLOCK_D).to(tl.int64)
    is_row = rows < batch_size
    inside = is_row[:, None] & (columns < dim)[None, :]
    mu = _load(mu_ptr, mu_b, mu_d, rows, columns, inside)
    logvar = _load(logvar_ptr, logvar_b, logvar_d, rows, columns, inside)
    grad_z = _load(grad_z_ptr, grad_z_b, grad_z_d, rows, columns, inside)
    noise = _load_noise(
        noise_ptr, noise_b, noise_d, rows_ptr, rows_b, seed, step_low, step_high, rows, columns, start, inside,
        batch_size, IS_KEYED, BLOCK_B, BLOCK_D,
    )  # fmt: skip
    grad_prior = tl.load(grad_prior_ptr + rows * grad_prior_b, mask=is_row, other=0.0)[:, None]
    d_mu = grad_z + grad_prior * mu
    d_logvar = 0.5 * (grad_z * noise * exp(0.5 * logvar) + grad_prior * expm1(logvar))
    for m in range(num_experts):
        expert = tl.to_tensor(m).to(tl.int64)
        mu_m = _load(mus_ptr + expert * mus_m, mus_b, mus_d, rows, columns, inside)
        logvar_m = _load(logvars_ptr + expert * logvars_m, logvars_b, logvars_d, rows, columns, inside)
        grad_ptr = grad_experts_ptr + expert * grad_experts_m
        grad = tl.load(grad_ptr + rows * grad_experts_b, mask=is_row, other=0.0)[:, None]
        difference = mu - mu_m
        pull = grad * difference * exp(-logvar_m)
        growth = 0.5 * grad * expm1(logvar - logvar_m)
        d_mu += pull
        d_logvar += growth
        first = expert * batch_size * dim
        _store(d_mus_ptr + first, -pull, dim, rows, columns, inside)
        _store(d_logvars_ptr + first, -0.5 * pull * difference - growth, dim, rows, columns, inside)
    _store(d_mu_ptr, d_mu, dim, rows, columns, inside)
    _store(d_logvar_ptr, d_logvar, dim, rows, columns, inside)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def product_forward(
    mus_ptr, mus_m, mus_b, mus_d,  # (M, B, D)
    logvars_ptr, logvars_m, logvars_b, logvars_d,  # (M, B, D)
    mask_ptr, mask_b, mask_m,  # bool (B, M), if masked
    mu_ptr, logvar_ptr,  # float32 (B, D), contiguous
    batch_size, dim, num_experts,
    HAS_PRIOR: tl.constexpr, IS_MASKED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`reference.product_of_experts`, with a running maximum. Grid: (row tiles, column tiles)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    is_row = rows < batch_size
    inside = is_row[:, None] & (columns < dim)[None, :]
    zeros = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    # The prior's log-precision and mean are 0. Without it nothing has been added up yet; the maximum then starts
    # below all log-precisions, but finite: the difference of -inf to itself would be NaN.
    largest = zeros if HAS_PRIOR else zeros - 3.0e38
    total = zeros + 1.0 if HAS_PRIOR else zeros
    weighted = zeros
    for m in range(num_experts):
        expert = tl.to_tensor(m).to(tl.int64)
        takes_part = inside
        if IS_MASKED:
            is_present = tl.load(mask_ptr + rows * mask_b + expert * mask_m, mask=is_row, other=0)
            takes_part = inside & (is_present != 0)[:, None]
        # What is absent is not even read, so that no NaN can come from there.
        mu_m = _load(mus_ptr + expert * mus_m, mus_b, mus_d, rows, columns, takes_part)
        logvar_m = _load(logvars_ptr + expert * logvars_m, logvars_b, logvars_d, rows, columns, takes_part)
        highest = tl.where(takes_part, tl.maximum(largest, -logvar_m), largest)
        rescale = exp(largest - highest)
        weight = tl.where(takes_part, exp(-logvar_m - highest), 0.0)
        total = total * rescale + weight
        weighted = weighted * rescale + weight * mu_m
        largest = highest
    # No expert at all: the prior. (A NaN total is not 0 and comes through.)
    is_empty = total == 0.0
    mu = tl.div_rn(weighted, tl.where(is_empty, 1.0, total))  # `/` would be approximate on a GPU
    logvar = tl.where(is_empty, 0.0, -largest - log(tl.where(is_empty, 1.0, total)))
    _store(mu_ptr, mu, dim, rows, columns, inside)
    _store(logvar_ptr, logvar, dim, rows, columns, inside)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def product_backward(
    mus_ptr, mus_m, mus_b, mus_d,
    logvars_ptr, logvars_m, logvars_b, logvars_d,
    mask_ptr, mask_b, mask_m,
    mu_ptr, logvar_ptr,  # float32 (B, D), contiguous: the results
    grad_mu_ptr, grad_mu_b, grad_mu_d,  # float32 (B, D)
    grad_logvar_ptr, grad_logvar_b, grad_logvar_d,  # float32 (B, D)
    d_mus_ptr, d_logvars_ptr,  # (M, B, D), contiguous, in the dtypes of mus and logvars
    batch_size, dim, num_experts,
    IS_MASKED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs of `product_forward`. Grid: (row tiles, column tiles).

    An expert's weight is its share of the precision, ``w_m = exp(logvar - logvar_m)``. Then ``d mu / d mu_m = w_m``,
    ``d mu / d logvar_m = -w_m (mu_m - mu)`` and ``d logvar / d logvar_m = w_m``.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    is_row = rows < batch_size
    inside = is_row[:, None] & (columns < dim)[None, :]
    mu = _load(mu_ptr, dim, 1, rows, columns, inside)
    logvar = _load(logvar_ptr, dim, 1, rows, columns, inside)
    grad_mu = _load(grad_mu_ptr, grad_mu_b, grad_mu_d, rows, columns, inside)
    grad_logvar = _load(grad_logvar_ptr, grad_logvar_b, grad_logvar_d, rows, columns, inside)
    for m in range(num_experts):
        expert = tl.to_tensor(m).to(tl.int64)
        takes_part = inside
        if IS_MASKED:
            is_present = tl.load(mask_ptr + rows * mask_b + expert * mask_m, mask=is_row, other=0)
            takes_part = inside & (is_present != 0)[:, None]
        mu_m = _load(mus_ptr + expert * mus_m, mus_b, mus_d, rows, columns, takes_part)
        logvar_m = _load(logvars_ptr + expert * logvars_m, logvars_b, logvars_d, rows, columns, takes_part)
        weight = tl.where(takes_part, exp(logvar - logvar_m), 0.0)
        d_mu = tl.where(takes_part, weight * grad_mu, 0.0)
        d_logvar = tl.where(takes_part, weight * (grad_logvar - grad_mu * (mu_m - mu)), 0.0)
        first = expert * batch_size * dim
        _store(d_mus_ptr + first, d_mu, dim, rows, columns, inside)
        _store(d_logvars_ptr + first, d_logvar, dim, rows, columns, inside)


def tile_shape(dim: int, num_sums: int = 1) -> tuple[int, int]:
    """(BLOCK_B, BLOCK_D), powers of 2: whole rows as far as they fit, and as many rows as fill the tile.

    Args:
        dim: Latent dimension D.
        num_sums: Sums per row that are kept in registers.
    """
    block_d = min(max(triton.next_power_of_2(dim), 4), _MAX_BLOCK_D)
    tile = _TILE if block_d >= _MIN_WIDE_BLOCK_D else _NARROW_TILE
    return max(1, min(tile // block_d, _MAX_SUMS // num_sums)), block_d


def num_sums(num_experts: int) -> int:
    """BLOCK_M of `kl_terms_forward`: a power of 2 that is at least M."""
    return max(1, triton.next_power_of_2(num_experts))


def _noise_arguments(noise_BD: Tensor | None, rows_B: Tensor | None, like: Tensor) -> tuple[object, ...]:
    # A kernel that does not use a pointer still needs one of a fixed type: else there would be more variants.
    given = (like, 0, 0) if noise_BD is None else (noise_BD, *noise_BD.stride())
    numbered = (like, 0) if rows_B is None else (rows_B, *rows_B.stride())
    return *given, *numbered


def _key_arguments(seed: int, global_step: int, stream: int) -> tuple[int, int, int]:
    return seed, global_step & 0xFFFFFFFF, stream << 16 | global_step >> 32


def launch_kl_terms_forward(
    mu_BD: Tensor,
    logvar_BD: Tensor,
    mus_MBD: Tensor,
    logvars_MBD: Tensor,
    noise_BD: Tensor | None,
    rows_B: Tensor | None,
    seed: int,
    global_step: int,
    stream: int,
    outputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fill `outputs`: z (B, D), KL to the prior (B,), KL to the experts (M, B); float32, contiguous.

    Either `noise_BD` is given, or `rows_B` (int64) and the numbers that key the noise (`noise.KeyedNoise`).
    """
    num_experts, batch_size, dim = mus_MBD.shape
    block_m = num_sums(num_experts)
    block_b, block_d = tile_shape(dim, block_m)
    with torch.cuda.device_of(mu_BD):
        kl_terms_forward[(triton.cdiv(batch_size, block_b),)](
            mu_BD, *mu_BD.stride(), logvar_BD, *logvar_BD.stride(),
            mus_MBD, *mus_MBD.stride(), logvars_MBD, *logvars_MBD.stride(),
            *_noise_arguments(noise_BD, rows_B, mu_BD), *outputs,
            *_key_arguments(seed, global_step, stream), batch_size, dim, num_experts,
            IS_KEYED=noise_BD is None, BLOCK_B=block_b, BLOCK_D=block_d, BLOCK_M=block_m, **OPTIONS,
        )  # fmt: skip


def launch_kl_terms_backward(
    mu_BD: Tensor,
    logvar_BD: Tensor,
    mus_MBD: Tensor,
    logvars_MBD: Tensor,
    noise_BD: Tensor | None,
    rows_B: Tensor | None,
    seed: int,
    global_step: int,
    stream: int,
    grads: tuple[Tensor, Tensor, Tensor],
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Fill `outputs`, the gradients of the first four arguments, from those of the results (float32)."""
    num_experts, batch_size, dim = mus_MBD.shape
    block_b, block_d = tile_shape(dim)
    grad_z_BD, grad_prior_B, grad_experts_MB = grads
    with torch.cuda.device_of(mu_BD):
        kl_terms_backward[(triton.cdiv(batch_size, block_b), triton.cdiv(dim, block_d))](
            mu_BD, *mu_BD.stride(), logvar_BD, *logvar_BD.stride(),
            mus_MBD, *mus_MBD.stride(), logvars_MBD, *logvars_MBD.stride(),
            *_noise_arguments(noise_BD, rows_B, mu_BD), grad_z_BD, *grad_z_BD.stride(),
            grad_prior_B, *grad_prior_B.stride(), grad_experts_MB, *grad_experts_MB.stride(), *outputs,
            *_key_arguments(seed, global_step, stream), batch_size, dim, num_experts,
            IS_KEYED=noise_BD is None, BLOCK_B=block_b, BLOCK_D=block_d, **OPTIONS,
        )  # fmt: skip


def _mask_arguments(mask_BM: Tensor | None, like: Tensor) -> tuple[object, ...]:
    return (like, 0, 0) if mask_BM is None else (mask_BM, *mask_BM.stride())


def launch_product_forward(
    mus_MBD: Tensor, logvars_MBD: Tensor, mask_BM: Tensor | None, prior_expert: bool, outputs: tuple[Tensor, Tensor]
) -> None:
    """Fill `outputs`, mean and log-variance of the product: float32 (B, D), contiguous."""
    num_experts, batch_size, dim = mus_MBD.shape
    block_b, block_d = tile_shape(dim)
    with torch.cuda.device_of(mus_MBD):
        product_forward[(triton.cdiv(batch_size, block_b), triton.cdiv(dim, block_d))](
            mus_MBD, *mus_MBD.stride(), logvars_MBD, *logvars_MBD.stride(), *_mask_arguments(mask_BM, mus_MBD),
            *outputs, batch_size, dim, num_experts,
            HAS_PRIOR=prior_expert, IS_MASKED=mask_BM is not None, BLOCK_B=block_b, BLOCK_D=block_d, **OPTIONS,
        )  # fmt: skip


def launch_product_backward(
    mus_MBD: Tensor,
    logvars_MBD: Tensor,
    mask_BM: Tensor | None,
    results: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
) -> None:
    """Fill `outputs`, the gradients of the experts, from the results and their gradients (float32)."""
    num_experts, batch_size, dim = mus_MBD.shape
    block_b, block_d = tile_shape(dim)
    grad_mu_BD, grad_logvar_BD = grads
    with torch.cuda.device_of(mus_MBD):
        product_backward[(triton.cdiv(batch_size, block_b), triton.cdiv(dim, block_d))](
            mus_MBD, *mus_MBD.stride(), logvars_MBD, *logvars_MBD.stride(), *_mask_arguments(mask_BM, mus_MBD),
            *results, grad_mu_BD, *grad_mu_BD.stride(), grad_logvar_BD, *grad_logvar_BD.stride(), *outputs,
            batch_size, dim, num_experts,
            IS_MASKED=mask_BM is not None, BLOCK_B=block_b, BLOCK_D=block_d, **OPTIONS,
        )  # fmt: skip

"""The Triton kernels as differentiable operators of torch (`torch.ops.jmvae_dist`).

Registered, they are opaque to `torch.compile`, which needs to know only the shapes and dtypes of the results
(`register_fake`) and the gradients (`register_autograd`). Autocast passes them by: they take 16-bit inputs as they
are and compute in float32, so that casting would only cost a copy. Arguments are checked in `gaussian`, and triton
is imported by the first launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_INT64_RANGE = 2**64


def as_int64(seed: int) -> int:
    """The int64 with the bits of a seed below 2^64: operators take no larger integers."""
    return seed - _INT64_RANGE if seed >= _INT64_RANGE // 2 else seed


def _empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


@torch.library.custom_op("jmvae_dist::gaussian_kl_terms", mutates_args=())
def kl_terms(
    mu_BD: Tensor,
    logvar_BD: Tensor,
    mus_MBD: Tensor,
    logvars_MBD: Tensor,
    noise_BD: Tensor | None,
    rows_B: Tensor | None,
    seed: int,
    global_step: int,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `gaussian.gaussian_kl_terms`; either `noise_BD`, or `rows_B` with `as_int64(seed)` and what follows."""
    from jmvae_dist.kernels.triton_gaussian import launch_kl_terms_forward

    outputs = _kl_terms_outputs(mu_BD, mus_MBD)
    if mu_BD.numel() > 0:
        launch_kl_terms_forward(
            mu_BD, logvar_BD, mus_MBD, logvars_MBD, noise_BD, rows_B, seed, global_step, stream, outputs
        )
    return outputs


@kl_terms.register_fake
def _(mu_BD: Tensor, logvar_BD: Tensor, mus_MBD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _kl_terms_outputs(mu_BD, mus_MBD)


def _kl_terms_outputs(mu_BD: Tensor, mus_MBD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z_BD = mu_BD.new_empty(mu_BD.shape, dtype=torch.float32)
    kl_prior_B = mu_BD.new_empty(mu_BD.shape[:1], dtype=torch.float32)
    return z_BD, kl_prior_B, mu_BD.new_empty(mus_MBD.shape[:2], dtype=torch.float32)


@torch.library.custom_op("jmvae_dist::gaussian_kl_terms_backward", mutates_args=())
def kl_terms_backward(
    grad_z_BD: Tensor,
    grad_prior_B: Tensor,
    grad_experts_MB: Tensor,
    mu_BD: Tensor,
    logvar_BD: Tensor,
    mus_MBD: Tensor,
    logvars_MBD: Tensor,
    noise_BD: Tensor | None,
    rows_B: Tensor | None,
    seed: int,
    global_step: int,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first four arguments of `kl_terms`, in their dtypes."""
    from jmvae_dist.kernels.triton_gaussian import launch_kl_terms_backward

    gaussians = (mu_BD, logvar_BD, mus_MBD, logvars_MBD)
    d_mu_BD, d_logvar_BD, d_mus_MBD, d_logvars_MBD = _empty_like(*gaussians)
    outputs = (d_mu_BD, d_logvar_BD, d_mus_MBD, d_logvars_MBD)
    if mu_BD.numel() > 0:
        grads = (grad_z_BD, grad_prior_B, grad_experts_MB)
        launch_kl_terms_backward(*gaussians, noise_BD, rows_B, seed, global_step, stream, grads, outputs)
    return outputs


@kl_terms_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _empty_like(*arguments[3:7])


def _save_for_kl_terms(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.key = inputs[6:]


def _differentiate_kl_terms(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    _, logvar_BD, _, _, noise_BD, _ = ctx.saved_tensors
    d_gaussians = kl_terms_backward(*grads, *ctx.saved_tensors, *ctx.key)
    d_noise = None
    if ctx.needs_input_grad[4]:
        d_noise = (grads[0] * torch.exp(0.5 * logvar_BD.float())).to(noise_BD.dtype)
    return *d_gaussians, d_noise, None, None, None, None


kl_terms.register_autograd(_differentiate_kl_terms, setup_context=_save_for_kl_terms)


@torch.library.custom_op("jmvae_dist::product_of_experts", mutates_args=())
def product(
    mus_MBD: Tensor, logvars_MBD: Tensor, mask_BM: Tensor | None, prior_expert: bool
) -> tuple[Tensor, Tensor]:
    """See `gaussian.product_of_experts`."""
    from jmvae_dist.kernels.triton_gaussian import launch_product_forward

    outputs = _product_outputs(mus_MBD)
    if outputs[0].numel() > 0:
        launch_product_forward(mus_MBD, logvars_MBD, mask_BM, prior_expert, outputs)
    return outputs


@product.register_fake
def _(mus_MBD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _product_outputs(mus_MBD)


def _product_outputs(mus_MBD: Tensor) -> tuple[Tensor, Tensor]:
    shape_BD = mus_MBD.shape[1:]
    return mus_MBD.new_empty(shape_BD, dtype=torch.float32), mus_MBD.new_empty(shape_BD, dtype=torch.float32)


@torch.library.custom_op("jmvae_dist::product_of_experts_backward", mutates_args=())
def product_backward(
    grad_mu_BD: Tensor,
    grad_logvar_BD: Tensor,
    mu_BD: Tensor,
    logvar_BD: Tensor,
    mus_MBD: Tensor,
    logvars_MBD: Tensor,
    mask_BM: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the experts, in their dtypes, from the product and its gradients."""
    from jmvae_dist.kernels.triton_gaussian import launch_product_backward

    d_mus_MBD, d_logvars_MBD = _empty_like(mus_MBD, logvars_MBD)
    if mus_MBD.numel() > 0:
        launch_product_backward(
            mus_MBD,
            logvars_MBD,
            mask_BM,
            (mu_BD, logvar_BD),
            (grad_mu_BD, grad_logvar_BD),
            (d_mus_MBD, d_logvars_MBD),
        )
    return d_mus_MBD, d_logvars_MBD


@product_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _empty_like(*arguments[4:6])


def _save_for_product(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    mus_MBD, logvars_MBD, mask_BM, _ = inputs
    ctx.save_for_backward(*output, mus_MBD, logvars_MBD, mask_BM)


def _differentiate_product(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return *product_backward(*grads, *ctx.saved_tensors), None, None


product.register_autograd(_differentiate_product, setup_context=_save_for_product)


@torch.library.custom_op("jmvae_dist::log_prob", mutates_args=())
def log_prob(decoded_NF: Tensor, target_BF: Tensor, kind: str, scale: float) -> Tensor:
    """See `likelihood.fused_log_prob`; contiguous tensors, float32 (N,)."""
    from jmvae_dist.kernels.triton_likelihood import launch_log_prob_forward

    sum_N = decoded_NF.new_empty(decoded_NF.shape[:1], dtype=torch.float32)
    if sum_N.numel() > 0:
        launch_log_prob_forward(kind, scale, decoded_NF, target_BF, sum_N)
    return sum_N


@log_prob.register_fake
def _(decoded_NF: Tensor, *rest: Any) -> Tensor:
    return decoded_NF.new_empty(decoded_NF.shape[:1], dtype=torch.float32)


@torch.library.custom_op("jmvae_dist::log_prob_backward", mutates_args=())
def log_prob_backward(grad_N: Tensor, decoded_NF: Tensor, target_BF: Tensor, kind: str, scale: float) -> Tensor:
    """Gradient of the decoder output, in its dtype."""
    from jmvae_dist.kernels.triton_likelihood import launch_log_prob_backward

    (d_decoded_NF,) = _empty_like(decoded_NF)
    if decoded_NF.numel() > 0:
        launch_log_prob_backward(kind, scale, decoded_NF, target_BF, grad_N, d_decoded_NF)
    return d_decoded_NF


@log_prob_backward.register_fake
def _(grad_N: Tensor, decoded_NF: Tensor, *rest: Any) -> Tensor:
    return _empty_like(decoded_NF)[0]


def _save_for_log_prob(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.kind, ctx.scale = inputs[2:]


def _differentiate_log_prob(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
    return log_prob_backward(grad_N, *ctx.saved_tensors, ctx.kind, ctx.scale), None, None, None


log_prob.register_autograd(_differentiate_log_prob, setup_context=_save_for_log_prob)

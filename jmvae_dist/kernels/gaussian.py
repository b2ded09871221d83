"""The operations on diagonal Gaussians that the model uses. Other modules import them from here only.

Which implementation computes them is a choice by name (`KERNELS`), made for each call by :func:`choose`. All give
the same numbers up to rounding.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from jmvae_dist.errors import ConfigError
from jmvae_dist.kernels import ops, reference
from jmvae_dist.kernels.noise import KeyedNoise, check_key
from jmvae_dist.model_config import Kernels

__all__ = ["KERNELS", "VARIABLE", "choose", "gaussian_kl_terms", "product_of_experts"]

logger = logging.getLogger(__name__)

KERNELS = get_args(Kernels)
# Goes before the configuration, so that a run can be tried otherwise without touching it.
VARIABLE = "JMVAE_DIST_KERNELS"
# From this many elements of all experts on, compiled code is faster than eager torch (docs/kernels.md).
_COMPILED_MIN_ELEMENTS = 100_000
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def gaussian_kl_terms(
    mu_BD: Tensor,
    logvar_BD: Tensor,
    mus_MBD: Tensor,
    logvars_MBD: Tensor,
    noise: Tensor | KeyedNoise,
    *,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample of q (B, D), KL(q || prior) (B,) and KL(q || q_m) (M, B); float32 or float64 under any autocast.

    See :func:`jmvae_dist.kernels.reference.gaussian_kl_terms`.

    Args:
        mu_BD: Mean of q; float32, bfloat16, float16 or float64, with any strides, as for the next three.
        logvar_BD: Log-variance of q.
        mus_MBD: Means of the experts.
        logvars_MBD: Log-variances of the experts.
        noise: Standard normal noise (B, D); or its key, from which the Triton kernels compute it where they need
            it, in the backward pass once more instead of keeping it.
        kernels: Which implementation; one of `KERNELS`.

    Raises:
        ValueError: Shape, dtype or device of an argument does not fit the others.
        ConfigError: `kernels` cannot be had on this device.
    """
    _check_gaussians(mu_BD=mu_BD, logvar_BD=logvar_BD, mus_MBD=mus_MBD, logvars_MBD=logvars_MBD)
    _check_noise(noise, mu_BD)
    gaussians = (mu_BD, logvar_BD, mus_MBD, logvars_MBD)
    floats = gaussians if isinstance(noise, KeyedNoise) else (*gaussians, noise)
    implementation = _implementation(kernels, floats)
    with torch.autocast(mu_BD.device.type, enabled=False):
        if implementation == "triton":
            if isinstance(noise, KeyedNoise):
                key = (ops.as_int64(noise.seed), noise.global_step, int(noise.stream))
                return ops.kl_terms(*gaussians, None, noise.rows, *key)
            return ops.kl_terms(*gaussians, noise, None, 0, 0, 0)
        if implementation == "compiled":
            noise_BD = noise.draw(mu_BD.shape[1]) if isinstance(noise, KeyedNoise) else noise
            return _compiled(reference.gaussian_kl_terms)(*gaussians, noise_BD)
        return reference.gaussian_kl_terms(*gaussians, noise)


def product_of_experts(
    mus_MBD: Tensor,
    logvars_MBD: Tensor,
    mask: Tensor | None = None,
    prior_expert: bool = False,
    *,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean and log-variance (B, D) of the product of experts; float32 or float64 under any autocast.

    See :func:`jmvae_dist.kernels.reference.product_of_experts`.

    Args:
        mus_MBD: Means of the experts; float32, bfloat16, float16 or float64, with any strides.
        logvars_MBD: Log-variances of the experts, likewise.
        mask: bool, shape (M,) or (B, M): which experts take part.
        prior_expert: Let the prior N(0, I) take part as one more expert.
        kernels: Which implementation; one of `KERNELS`.

    Raises:
        ValueError: Shape, dtype or device of an argument does not fit the others.
        ConfigError: `kernels` cannot be had on this device.
    """
    _check_gaussians(mus_MBD=mus_MBD, logvars_MBD=logvars_MBD)
    num_experts, batch_size, _ = mus_MBD.shape
    if mask is not None:
        _check("mask", mask, mus_MBD.device, (torch.bool,), (num_experts,), (batch_size, num_experts))
    implementation = _implementation(kernels, (mus_MBD, logvars_MBD))
    with torch.autocast(mus_MBD.device.type, enabled=False):
        if implementation == "triton":
            mask_BM = None if mask is None else mask.expand(batch_size, num_experts)
            return ops.product(mus_MBD, logvars_MBD, mask_BM, prior_expert)
        if implementation == "compiled":
            return _compiled(reference.product_of_experts)(mus_MBD, logvars_MBD, mask, prior_expert)
        return reference.product_of_experts(mus_MBD, logvars_MBD, mask, prior_expert)


# Checks: a kernel reads and writes whatever memory wrong shapes make it.


def _check(
    name: str, tensor: Any, device: torch.device, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...]
) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: a {type(tensor).__name__} is not a tensor")
    if tensor.shape not in shapes:
        allowed = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {allowed}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, but the first argument is on {device}")


def _check_gaussians(**tensors: Tensor) -> None:
    """The tensors named ..._BD and ..._MBD have one B, D, M and device."""
    sizes: dict[str, int] = {}
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        letters = name.rsplit("_", 1)[1]
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: a {type(tensor).__name__} is not a tensor")
        if tensor.ndim != len(letters):
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected ({', '.join(letters)})")
        for letter, size in zip(letters, tensor.shape, strict=True):
            sizes.setdefault(letter, size)
        _check(name, tensor, first.device, _FLOATS, tuple(sizes[letter] for letter in letters))


def _check_noise(noise: Tensor | KeyedNoise, mu_BD: Tensor) -> None:
    if isinstance(noise, KeyedNoise):
        check_key(noise)
        _check("noise.rows", noise.rows, mu_BD.device, (torch.int64,), (len(mu_BD),))
    else:
        _check("noise", noise, mu_BD.device, _FLOATS, tuple(mu_BD.shape))


# Dispatch


def _implementation(kernels: str, tensors: tuple[Tensor, ...]) -> str:
    """What computes these tensors: the choice for their device, where it can and is worth it."""
    chosen = choose(kernels, tensors[0].device.type)
    if chosen == "triton" and reference.computation_dtype(tensors) == torch.float64:
        return "reference"
    if chosen == "compiled":
        # Inside a compiled model the reference is compiled with everything around it.
        is_small = max(tensor.numel() for tensor in tensors) < _COMPILED_MIN_ELEMENTS
        if torch.compiler.is_compiling() or is_small or not _can_compile(tensors[0].device.type):
            return "reference"
    return chosen


@torch.compiler.assume_constant_result
def choose(kernels: str, device_type: str) -> str:
    """The implementation for a device: reference, compiled or triton; logged once per process.

    Args:
        kernels: One of `KERNELS`; the environment variable `VARIABLE` goes before it.
        device_type: cpu, cuda, ...

    Raises:
        ConfigError: The name is unknown, or Triton cannot run there.
    """
    chosen, reason = find_kernels(kernels, device_type)
    _log_once(device_type, chosen, reason)
    return chosen


def find_kernels(kernels: str, device_type: str) -> tuple[str, str]:
    """What `choose` would choose, and why; without saying so in the log."""
    key = VARIABLE if os.environ.get(VARIABLE) else "model.kernels"
    kernels = os.environ.get(VARIABLE) or kernels
    if kernels not in KERNELS:
        raise ConfigError(f"{key}: {kernels!r} is not allowed; it must be one of {list(KERNELS)}")
    obstacle = _obstacle_to_triton(device_type)
    if kernels == "triton" and obstacle:
        raise ConfigError(f"{key}: triton cannot be used: {obstacle}; use auto, reference or compiled")
    if kernels != "auto":
        return kernels, ""
    return ("reference", f" ({obstacle})") if obstacle else ("triton", "")


@functools.cache
def _log_once(device_type: str, chosen: str, reason: str) -> None:
    logger.info("KL and products of experts on %s: %s%s", device_type, chosen, reason)


@functools.cache
def _obstacle_to_triton(device_type: str) -> str:
    """Why Triton kernels cannot run on a device; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    # Triton itself looks at this variable; its interpreter is for tests, hundreds of times slower than torch.
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels need a CUDA device"
    return ""


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Sizes stay symbolic: one program for all batches, compiled once. Programs for single sizes would be chosen
    # by the order in which the sizes came up, and a resumed run would differ from an uninterrupted one.
    return torch.compile(function, fullgraph=True, dynamic=True)


@functools.cache
def _can_compile(device_type: str) -> bool:
    """Whether torch.compile works here; on a CPU it needs a C++ compiler."""
    try:
        zeros = torch.zeros(8, device=device_type)
        _compiled(reference.phi)(zeros, zeros)
    except RuntimeError as error:
        first_line = str(error).strip().splitlines()[0]
        logger.warning("torch.compile does not work here (%s); KL and products of experts: reference", first_line)
        return False
    return True

"""Calls of encoders and decoders, which may be the user's: inputs in the dtype of their weights, results checked.

What an encoder returns becomes a Gaussian in float32 (or float64) here, with its log-variance in a range that float32
bears.

Shape suffixes: B batch, D latent dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jmvae_dist.errors import ConfigError
from jmvae_dist.kernels.reference import computation_dtype
from jmvae_dist.model.modules import GaussianParams

# Log-variances of all posteriors are limited to this range (standard deviations from 4.5e-5 to 2.2e4).
# Differences then stay below 40, so that neither exp(difference) nor its square, which Adam keeps, overflows
# float32.
LOGVAR_RANGE = (-20.0, 20.0)


def call_encoder(key: str, encoder: nn.Module, x: Tensor, latent_dim: int) -> GaussianParams:
    """The posterior of a batch of one modality.

    Args:
        key: The encoder's name in errors.
        encoder: ``(B, *shape) -> GaussianParams``, or a plain pair.
        x: (B, *shape).
        latent_dim: D.

    Raises:
        ConfigError: The encoder returns something else than two tensors (B, D).
    """
    return _gaussian(key, encoder(_in_weights_dtype(encoder, x)), (len(x), latent_dim))


def call_joint_encoder(key: str, encoder: nn.Module, inputs: dict[str, Tensor], latent_dim: int) -> GaussianParams:
    """The posterior of a batch of all modalities, in their order; see `call_encoder`.

    Args:
        key: The encoder's name in errors.
        encoder: ``{modality: (B, *shape)} -> GaussianParams``, or a plain pair.
        inputs: (B, *shape) by modality.
        latent_dim: D.

    Raises:
        ConfigError: The encoder returns something else than two tensors (B, D).
    """
    converted = {name: _in_weights_dtype(encoder, x) for name, x in inputs.items()}
    batch_size = len(next(iter(inputs.values())))
    return _gaussian(key, encoder(converted), (batch_size, latent_dim))


def call_decoder(key: str, decoder: nn.Module, z: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """Decoded latents (n, *shape).

    Args:
        key: The decoder's name in errors.
        decoder: ``(n, D) -> (n, *shape)``.
        z: Latents (n, D): with one leading dimension, as convolutions want it.
        shape: Of one sample; None: not known; then it is what the decoder returns.

    Raises:
        ConfigError: The decoder returns another shape.
    """
    output = decoder(_in_weights_dtype(decoder, z))
    expected = (len(z), *(output.shape[1:] if shape is None else shape))
    if tuple(output.shape) != expected:
        raise ConfigError(f"{key}: returned shape {tuple(output.shape)}, expected {expected}")
    return output


class _RecoverableClamp(torch.autograd.Function):
    """Clamp to `LOGVAR_RANGE`; outside, the gradient passes if descending along it leads back inside.

    The gradient of torch.clamp is 0 outside: one large optimizer step would freeze a dimension for good.
    """

    @staticmethod
    def forward(ctx: Any, logvar: Tensor) -> Tensor:
        clamped = logvar.clamp(*LOGVAR_RANGE)
        ctx.save_for_backward(logvar - clamped)
        return clamped

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (excess,), (grad,) = ctx.saved_tensors, grad_outputs
        # An optimizer goes against the gradient: further out where the two have different signs.
        return torch.where(excess * grad < 0, 0.0, grad)


def _in_weights_dtype(module: nn.Module, tensor: Tensor) -> Tensor:
    """`tensor` in the dtype of the module's weights: engines may hold 16-bit weights, data may be float64."""
    parameter = next(module.parameters(), None)
    if parameter is None or not parameter.is_floating_point():
        return tensor
    return tensor.to(parameter.dtype)


def _gaussian(key: str, output: Any, shape: tuple[int, int]) -> GaussianParams:
    """Check what an encoder returned; make it float32 (or float64), with its log-variance in range."""
    if not (isinstance(output, (tuple, list)) and len(output) == 2):
        raise ConfigError(f"{key}: returned a {type(output).__name__}, expected GaussianParams(mu, logvar)")
    for name, tensor in zip(GaussianParams._fields, output, strict=True):
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ConfigError(f"{key}: returned {name} of shape {got}, expected (batch, latent_dim) = {shape}")
    mu, logvar = (tensor.to(computation_dtype(output)) for tensor in output)
    return GaussianParams(mu, _RecoverableClamp.apply(logvar))

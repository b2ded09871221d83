"""Log-likelihoods summed over a sample, in torch, with few passes over the decoder's output.

Left to autograd, a normal distribution takes six passes over the largest tensor of a step forwards and eight
backwards; here it takes three and one. Gradients of gradients are refused by an error: `create_graph=True` would get
those of the last operation alone, and be wrong without a word.

Shape suffixes: L leading dimensions, which end in B; B batch; F elements of a sample.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def summed_log_prob(kind: str, scale: float, decoded_LF: Tensor, target_BF: Tensor) -> Tensor:
    """log p(target | decoded) in nats, summed over F.

    Args:
        kind: normal or laplace.
        scale: Standard deviation of the normal, b of the Laplace distribution.
        decoded_LF: float32 or float64.
        target_BF: The same dtype; it gets no gradient.

    Returns:
        Shape L, in the same dtype.
    """
    num_elements = decoded_LF.shape[-1]
    if kind == "normal":
        log_normalizer = math.log(scale) + 0.5 * math.log(2.0 * math.pi)
        return _Normal.apply(decoded_LF, target_BF, scale) - num_elements * log_normalizer
    assert kind == "laplace", kind
    return _Laplace.apply(decoded_LF, target_BF, scale) - num_elements * math.log(2.0 * scale)


class _Normal(torch.autograd.Function):
    """-1/2 sum_F ((target - decoded) / scale)^2."""

    @staticmethod
    def forward(ctx: Any, decoded_LF: Tensor, target_BF: Tensor, scale: float) -> Tensor:
        difference_LF = target_BF - decoded_LF
        ctx.save_for_backward(difference_LF)
        ctx.precision = 1.0 / scale**2
        return -0.5 * ctx.precision * difference_LF.square().sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (difference_LF,) = ctx.saved_tensors
        return difference_LF * (grad_outputs[0] * ctx.precision)[..., None], None, None


class _Laplace(torch.autograd.Function):
    """-sum_F |target - decoded| / scale."""

    @staticmethod
    def forward(ctx: Any, decoded_LF: Tensor, target_BF: Tensor, scale: float) -> Tensor:
        difference_LF = target_BF - decoded_LF
        ctx.save_for_backward(difference_LF)
        ctx.rate = 1.0 / scale
        return -ctx.rate * difference_LF.abs().sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (difference_LF,) = ctx.saved_tensors
        return difference_LF.sign() * (grad_outputs[0] * ctx.rate)[..., None], None, None

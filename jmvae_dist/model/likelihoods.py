"""Likelihoods p(x_m | z): log-probabilities in nats, the values they accept, and their means.

`decoded` is a decoder's output (*leading, *shape), `target` the data (B, *shape), where `leading` ends in B.
Log-probabilities are computed in float32 (float64 if an argument is float64) under any autocast and summed
over `shape`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from jmvae_dist.errors import ConfigError
from jmvae_dist.kernels.likelihood import fused_log_prob, is_fused
from jmvae_dist.kernels.reference import computation_dtype
from jmvae_dist.user_code import import_object

# Targets of a categorical with soft targets must sum to 1 up to the rounding of float32 or bfloat16 storage.
_SUM_TOLERANCE = 1e-2


class Likelihood(Protocol):
    """One modality's observation model."""

    name: ClassVar[str]

    def log_prob_per_element(self, decoded: Tensor, target: Tensor) -> Tensor:
        """Log-probability before the sum over the sample's shape."""

    def mean(self, decoded: Tensor) -> Tensor:
        """Expected value of x, with the shape of `decoded`."""

    def invalid(self, target: Tensor) -> tuple[Tensor | None, str]:
        """Which elements of `target` (finite) it cannot explain, bool, or None for none; and what it wants."""


@dataclass(frozen=True)
class Normal:
    """Normal distribution around the decoded mean, with a fixed standard deviation."""

    name: ClassVar[str] = "normal"
    scale: float = 1.0

    def log_prob_per_element(self, decoded: Tensor, target: Tensor) -> Tensor:
        normalizer = math.log(self.scale) + 0.5 * math.log(2.0 * math.pi)
        return -0.5 * ((target - decoded) / self.scale).square() - normalizer

    def mean(self, decoded: Tensor) -> Tensor:
        return decoded

    def invalid(self, target: Tensor) -> tuple[None, str]:
        return None, "finite"


@dataclass(frozen=True)
class Laplace:
    """Laplace distribution around the decoded mean with a fixed scale b (standard deviation sqrt(2) b)."""

    name: ClassVar[str] = "laplace"
    scale: float = 1.0

    def log_prob_per_element(self, decoded: Tensor, target: Tensor) -> Tensor:
        return -(target - decoded).abs() / self.scale - math.log(2.0 * self.scale)

    def mean(self, decoded: Tensor) -> Tensor:
        return decoded

    def invalid(self, target: Tensor) -> tuple[None, str]:
        return None, "finite"


@dataclass(frozen=True)
class Bernoulli:
    """Bernoulli distribution of every element, parametrised by logits.

    With `soft_targets`, targets between 0 and 1 are accepted: the value is then the cross-entropy, which is
    not the logarithm of a normalised density of grey values.
    """

    name: ClassVar[str] = "bernoulli"
    soft_targets: bool = False

    def log_prob_per_element(self, decoded: Tensor, target: Tensor) -> Tensor:
        if self.soft_targets:
            return -F.binary_cross_entropy_with_logits(decoded, target.expand_as(decoded), reduction="none")
        # The same for targets 0 and 1, in half the passes, and exact where those would cancel (confident and right).
        return F.logsigmoid((2.0 * target - 1.0) * decoded)

    def mean(self, decoded: Tensor) -> Tensor:
        return torch.sigmoid(decoded)

    def invalid(self, target: Tensor) -> tuple[Tensor, str]:
        if self.soft_targets:
            return (target < 0) | (target > 1), "between 0 and 1"
        wanted = "0 or 1 (for values between them set decoder_dist_params.<modality>.soft_targets: true)"
        return (target != 0) & (target != 1), wanted


@dataclass(frozen=True)
class Categorical:
    """Categorical distribution over the last dimension, parametrised by logits; targets are one-hot.

    Leading dimensions of the sample's shape are independent variables. With `soft_targets`, any distribution
    over the classes is accepted as a target: the value is then the cross-entropy.
    """

    name: ClassVar[str] = "categorical"
    soft_targets: bool = False

    def log_prob_per_element(self, decoded: Tensor, target: Tensor) -> Tensor:
        return target * torch.log_softmax(decoded, dim=-1)

    def mean(self, decoded: Tensor) -> Tensor:
        return torch.softmax(decoded, dim=-1)

    def invalid(self, target: Tensor) -> tuple[Tensor, str]:
        totals = target.float().sum(-1, keepdim=True)
        if self.soft_targets:
            wrong_total = (totals - 1).abs() > _SUM_TOLERANCE
            return (target < 0) | wrong_total, "probabilities that sum to 1 over the last dimension"
        wanted = "one-hot (for other distributions set decoder_dist_params.<modality>.soft_targets: true)"
        return ((target != 0) & (target != 1)) | (totals != 1), wanted


@dataclass(frozen=True)
class UserLikelihood:
    """A function of the user's, ``(recon, target) -> log p`` per element, in nats.

    It gets the decoder's output and the data in one shape, (*leading, *shape), and returns that shape, or one
    without some of its last dimensions, over which it has summed. The expected value is the function's attribute
    `mean`, if it has one (a callable), else the decoder's output.
    """

    name: ClassVar[str] = "user"
    function: Callable[..., Tensor]
    parameters: dict[str, Any] = field(default_factory=dict)

    def log_prob_per_element(self, decoded: Tensor, target: Tensor) -> Tensor:
        values = self.function(decoded, target.expand_as(decoded), **self.parameters)
        if not isinstance(values, Tensor):
            raise ConfigError(f"decoders_dist: {self.function!r} returned a {type(values).__name__}, not a tensor")
        return values

    def mean(self, decoded: Tensor) -> Tensor:
        mean = getattr(self.function, "mean", None)
        return mean(decoded) if callable(mean) else decoded

    def invalid(self, target: Tensor) -> tuple[None, str]:
        return None, "finite"


_LIKELIHOODS: dict[str, type[Any]] = {kind.name: kind for kind in (Normal, Laplace, Bernoulli, Categorical)}


def build_likelihood(distribution: str | Callable[..., Tensor], parameters: dict[str, Any]) -> Likelihood:
    """The likelihood named `distribution`; name and parameters have been checked by `JMVAEConfig`.

    Raises:
        ConfigError: A function of the user's cannot be imported.
    """
    if isinstance(distribution, str) and distribution in _LIKELIHOODS:
        return _LIKELIHOODS[distribution](**parameters)
    function = import_object("decoders_dist", distribution) if isinstance(distribution, str) else distribution
    if not callable(function) or isinstance(function, type):
        raise ConfigError(f"decoders_dist: {distribution} is not a function (recon, target) -> log p")
    return UserLikelihood(function, parameters)


def log_prob(likelihood: Likelihood, decoded: Tensor, target: Tensor, kernels: str = "auto") -> Tensor:
    """log p(target | decoded) in nats, summed over the sample's shape.

    Args:
        likelihood: The observation model.
        decoded: Decoder output, shape (*leading, *shape), where `leading` ends in B.
        target: Data, shape (B, *shape).
        kernels: Who computes; see `model_config.ModelSection`.

    Returns:
        Shape `leading`; float32, or float64 if an argument is float64.
    """
    if is_fused(likelihood.name, decoded, target, kernels):
        return fused_log_prob(likelihood.name, getattr(likelihood, "scale", 1.0), decoded, target, kernels)
    dtype = computation_dtype((decoded, target))
    with torch.autocast(decoded.device.type, enabled=False):
        values = likelihood.log_prob_per_element(decoded.to(dtype), target.to(dtype))
    num_leading = decoded.ndim - target.ndim + 1
    if values.shape != decoded.shape[: values.ndim] or values.ndim < num_leading:
        raise ConfigError(
            f"decoders_dist: {likelihood} returned shape {tuple(values.shape)} for values of shape "
            f"{tuple(decoded.shape)}; it must keep all dimensions, or leave out last ones that it sums over"
        )
    return values.flatten(num_leading).sum(-1) if values.ndim > num_leading else values

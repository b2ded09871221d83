"""Parts of Monte Carlo estimates of likelihoods: sums of weights that fit any cut of the draws, and that cut.

Shape suffixes: B batch, K draws of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Latents of the first chunk, whose activations say how many fit in the budget.
_FIRST_LATENTS = 8
# What is decoded at once then stays in a core's cache, which halves the time of likelihoods (benchmarks/nll.py).
_CPU_BUDGET_BYTES = 4 << 20
_DEVICE_BUDGET_BYTES = 1 << 30
_NOISE_ELEMENTS = 1 << 16
# A likelihood holds its decoded values, the per-element log-probabilities and one intermediate at once.
_LIKELIHOOD_COPIES = 3


class NLLEstimate(NamedTuple):
    """A Monte Carlo estimate ``-log 1/K sum_k w_k`` per sample, and how far to trust it.

    Attributes:
        nll: The estimate in nats, float64 (B,).
        stderr: Its Monte Carlo standard error in nats, float64 (B,), by the delta method: the relative standard
            error of the mean weight, ``std(w) / (mean(w) sqrt(K))``. NaN for K = 1. It is itself estimated from
            the weights: with few effective samples it is too small.
        effective_samples: ``(sum_k w_k)^2 / sum_k w_k^2`` (Kong 1992), float64 (B,), between 1 and K. Near 1, a
            single draw carries the estimate, which is then too high by an unknown amount.
    """

    nll: Tensor
    stderr: Tensor
    effective_samples: Tensor


class LogWeightSums:
    """Sums of weights and of their squares per sample, in float64 and in logarithms, one chunk after the other.

    Args:
        like: (B, ...), for number and device of the samples.
    """

    def __init__(self, like: Tensor) -> None:
        shape, device = like.shape[:1], like.device
        self._log_sum_B = torch.full(shape, -math.inf, dtype=torch.float64, device=device)
        self._log_squares_B = self._log_sum_B.clone()
        self._num_draws_B = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, log_weights_KB: Tensor) -> None:
        """Add the weights of some draws of all samples, float64 (K, B)."""
        for total_B, power in ((self._log_sum_B, 1.0), (self._log_squares_B, 2.0)):
            torch.logaddexp(total_B, torch.logsumexp(power * log_weights_KB, dim=0), out=total_B)
        self._num_draws_B += len(log_weights_KB)

    def estimate(self) -> NLLEstimate:
        """The estimate from all draws so far."""
        num_B = self._num_draws_B
        log_effective_B = 2 * self._log_sum_B - self._log_squares_B
        # Rounding may put K equal weights a little above K effective samples.
        excess_B = (num_B * torch.exp(-log_effective_B) - 1).clamp(min=0)
        return NLLEstimate(
            num_B.log() - self._log_sum_B, torch.sqrt(excess_B / (num_B - 1)), torch.exp(log_effective_B)
        )


class DecodingChunks:
    """How many latents are decoded at once: what fits in a memory budget, as the first chunk measures it.

    What a decoder needs is known when it has run: convolutions hold far more than they return. Hooks add up what
    goes into and comes out of each of its layers; without gradients, the largest of these is what is alive at once.

    Args:
        decoders: By modality.
        names: The modalities that are decoded, one after the other.
        budget_bytes: None: a default by device.
        max_draws: At most this many draws at once; None: no limit.
        device: Where.
    """

    def __init__(
        self,
        decoders: nn.ModuleDict,
        names: list[str],
        budget_bytes: int | None,
        max_draws: int | None,
        device: torch.device,
    ) -> None:
        default = _CPU_BUDGET_BYTES if device.type == "cpu" else _DEVICE_BUDGET_BYTES
        self._budget_bytes = default if budget_bytes is None else budget_bytes
        self._decoders = [decoders[name] for name in names]
        self._max_draws = max_draws
        self._latents = _FIRST_LATENTS
        self._is_measured = False

    def noise_draws(self, num_samples: int, latent_dim: int) -> int:
        """Draws whose noise is made at once: more than are decoded at once, since few rows cost as much as many."""
        return max(1, _NOISE_ELEMENTS // max(1, num_samples * latent_dim))

    def cut(self, num_draws: int, num_samples: int) -> Iterator[tuple[slice, slice]]:
        """Chunks (draws, samples) of a table of latents; their size may change after the first one.

        An empty batch is one empty chunk.
        """
        start = 0
        while start < num_draws:
            draws = max(1, self._latents // max(1, num_samples))
            draws = draws if self._max_draws is None else min(draws, self._max_draws)
            stop = start + _share(num_draws - start, draws)
            first = 0
            while first < num_samples or first == 0:
                last = first + _share(num_samples - first, self._latents)
                yield slice(start, stop), slice(first, last)
                first = max(last, 1)
            start = stop

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around the first chunk: sets the size of the others."""
        if self._is_measured:
            yield
            return
        largest_bytes = 1

        def measure(module: nn.Module, arguments: Any, output: Any) -> None:
            nonlocal largest_bytes
            tensors = [value for value in (*arguments, output) if isinstance(value, Tensor) and value.ndim > 0]
            per_latent = [value.numel() * value.element_size() / max(1, len(value)) for value in tensors]
            copies = _LIKELIHOOD_COPIES * per_latent[-1] if module in self._decoders and per_latent else 0
            largest_bytes = max(largest_bytes, math.ceil(sum(per_latent)), math.ceil(copies))

        layers = [layer for decoder in self._decoders for layer in decoder.modules()]
        hooks = [layer.register_forward_hook(measure) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._latents = max(1, self._budget_bytes // largest_bytes)
        self._is_measured = True


def _share(remaining: int, limit: int) -> int:
    """The next part of what remains, cut into parts of like size: a short last one is as slow as a long one."""
    return math.ceil(remaining / max(1, math.ceil(remaining / limit)))

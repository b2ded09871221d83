"""How a table of draws by samples is cut for decoding: as many latents at once as fit in a memory budget.

`importance` estimates likelihoods from such tables; what they come to does not depend on the cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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

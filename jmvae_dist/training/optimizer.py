"""AdamW, with the means to drop an update without asking the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jmvae_dist.config import OptimizerSection


class GuardedAdamW(torch.optim.AdamW):
    """AdamW whose update, step counts included, is dropped while `is_sound` is false.

    Every engine calls `step` in the end, DeepSpeed's on its flat partitions, so that one place decides for all.

    Attributes:
        is_sound: Scalar bool, set before each step. The fused kernel reads it on the device; the plain one runs
            on the host's own memory, where reading it costs nothing, or after DeepSpeed has waited anyway.
    """

    is_sound: Tensor | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the weights if the step is sound."""
        assert self.is_sound is not None, "`is_sound` was not set for this step"
        if self.defaults["fused"]:
            self.found_inf = (~self.is_sound).float()
            super().step(closure)
        elif bool(self.is_sound):
            super().step(closure)


def make_optimizer(model: nn.Module, section: OptimizerSection, device: torch.device) -> GuardedAdamW:
    """AdamW with weight decay on matrices only, fused on GPUs (see `OptimizerSection.fused` for why not on CPUs)."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = device.type == "cuda" if section.fused is None else section.fused
    return GuardedAdamW(groups, betas=section.betas, eps=section.eps, fused=fused)

"""AdamW, with the means to drop an update without asking the device, and the same bits however parameters are cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from jmvae_dist.config import OptimizerSection

# A multiple of the lanes of every vector unit, for float32 and float64.
_VECTOR_ELEMENTS = 16


class GuardedAdamW(torch.optim.AdamW):
    """AdamW whose update, step counts included, is dropped while `is_sound` is false.

    Every engine calls `step` in the end, DeepSpeed's on its flat partitions, so that one place decides for all.

    Attributes:
        is_sound: Scalar bool, set before each step. On a GPU the fused kernel reads it there; elsewhere it lies in
            the host's own memory, where reading it costs nothing, or DeepSpeed has waited for it anyway.
    """

    is_sound: Tensor | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the weights if the step is sound."""
        assert self.is_sound is not None, "`is_sound` was not set for this step"
        devices = {parameter.device.type for group in self.param_groups for parameter in group["params"]}
        if self.defaults["fused"] and devices != {"cpu"}:
            self.found_inf = (~self.is_sound).float()
            super().step(closure)
        elif bool(self.is_sound):
            if self.defaults["fused"]:
                self._step_in_whole_vectors()
            else:
                super().step(closure)

    @torch.no_grad()
    def _step_in_whole_vectors(self) -> None:
        """The fused kernel for CPUs, on whole vectors only.

        It computes the elements beyond the last whole vector of a tensor by other instructions, which round
        differently. Engines and world sizes cut parameters differently, and would no longer agree bit for bit.
        """
        for group in self.param_groups:
            pieces = _Pieces()
            for parameter in group["params"]:
                if parameter.grad is not None:
                    pieces.add(parameter, self._state_of(parameter))
            if not pieces.steps:
                continue
            weights, gradients, first_moments, second_moments = pieces.columns
            adamw(
                weights,
                gradients,
                first_moments,
                second_moments,
                max_exp_avg_sqs=[],
                state_steps=pieces.steps,
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            pieces.copy_back()

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Step count and moments of a parameter, as torch's own AdamW keeps them."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


class _Pieces:
    """Flat tensors whose sizes are whole vectors: parameters cut in two, the second part a padded copy.

    Attributes:
        columns: Weights, gradients, first and second moments of all pieces.
        steps: Step count of each piece.
    """

    def __init__(self) -> None:
        self.columns: tuple[list[Tensor], ...] = ([], [], [], [])
        self.steps: list[Tensor] = []
        self._originals: list[Tensor] = []
        self._copies: list[Tensor] = []

    def add(self, parameter: Tensor, state: dict[str, Tensor]) -> None:
        """Add a parameter that has a gradient."""
        assert parameter.grad is not None
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        are_flat = all(tensor.is_contiguous() for tensor in tensors)
        whole = parameter.numel() // _VECTOR_ELEMENTS * _VECTOR_ELEMENTS if are_flat else 0
        if whole == parameter.numel():
            self._append(tensors, state["step"])
        elif whole > 0:
            self._append([tensor.view(-1)[:whole] for tensor in tensors], state["step"])
        if whole < parameter.numel():
            rests = [tensor.view(-1)[whole:] if are_flat else tensor for tensor in tensors]
            copies = [_padded(rest) for rest in rests]
            # The kernel counts the steps of each piece.
            self._append(copies, state["step"].clone() if whole > 0 else state["step"])
            for rest, copy in zip(rests, copies, strict=True):
                if rest is not rests[1]:
                    self._originals.append(rest)
                    self._copies.append(copy[: rest.numel()].view(rest.shape))

    def _append(self, tensors: Sequence[Tensor], step: Tensor) -> None:
        for column, tensor in zip(self.columns, tensors, strict=True):
            column.append(tensor)
        self.steps.append(step)

    def copy_back(self) -> None:
        """Take over what was computed on the copies."""
        for original, copy in zip(self._originals, self._copies, strict=True):
            original.copy_(copy)


def _padded(tensor: Tensor) -> Tensor:
    """A flat copy, filled up with zeros to whole vectors."""
    size = math.ceil(tensor.numel() / _VECTOR_ELEMENTS) * _VECTOR_ELEMENTS
    copy = tensor.new_zeros(size)
    copy[: tensor.numel()] = tensor.reshape(-1)
    return copy


def make_optimizer(model: nn.Module, section: OptimizerSection) -> GuardedAdamW:
    """AdamW with weight decay on matrices only, in torch's fused kernel unless the configuration says otherwise."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return GuardedAdamW(groups, betas=section.betas, eps=section.eps, fused=section.fused)

"""AdamW, with the means to drop an update without asking the device, and the same bits however parameters are cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._pieces: dict[int, _Pieces] = {}  # by number of the group

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Of a copy, or of a state that is loaded: its tensors are others.
        super().__setstate__(state)
        self._pieces = {}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the weights if the step is sound."""
        assert self.is_sound is not None, "`is_sound` was not set for this step"
        is_on_cpu = all(parameter.is_cpu for group in self.param_groups for parameter in group["params"])
        if self.defaults["fused"] and not is_on_cpu:
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
        for number, group in enumerate(self.param_groups):
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            pieces = self._pieces_of(
                number, [_Updated(parameter, **self._state_of(parameter)) for parameter in parameters]
            )
            gradients = pieces.copy_in([parameter.grad for parameter in parameters])
            adamw(
                pieces.weights,
                gradients,
                pieces.first_moments,
                pieces.second_moments,
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

    def _pieces_of(self, number: int, updated: list[_Updated]) -> _Pieces:
        """The pieces of a group: those of the last step, unless tensors have been replaced since."""
        places = [tensor.data_ptr() for of_parameter in updated for tensor in of_parameter]
        pieces = self._pieces.get(number)
        if pieces is None or pieces.places != places:
            pieces = self._pieces[number] = _Pieces(updated, places)
        return pieces

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Step count and moments of a parameter, as torch's own AdamW keeps them."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


class _Updated(NamedTuple):
    """What an update changes of a parameter."""

    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


class _Pieces:
    """Flat tensors whose sizes are whole vectors: parameters cut in two, the second part a padded copy.

    Args:
        updated: Of each parameter.
        places: Where in memory all of these tensors lie.

    Attributes:
        places: As given. What lies there cannot be replaced unnoticed: pieces keep the memory that they are of.
        weights, first_moments, second_moments, steps: Of all pieces.
    """

    def __init__(self, updated: Sequence[_Updated], places: list[int]) -> None:
        self.places = places
        self.weights: list[Tensor] = []
        self.first_moments: list[Tensor] = []
        self.second_moments: list[Tensor] = []
        self.steps: list[Tensor] = []
        self._num_whole: list[int] = []  # by parameter: elements that need no copy
        self._copied: list[tuple[Tensor, Tensor]] = []  # originals and copies
        for of_parameter in updated:
            self._add(of_parameter)

    def _add(self, updated: _Updated) -> None:
        tensors, step = updated[:3], updated.step
        size = updated.weights.numel()
        is_flat = all(tensor.is_contiguous() for tensor in tensors)
        num_whole = size // _VECTOR_ELEMENTS * _VECTOR_ELEMENTS if is_flat else 0
        self._num_whole.append(num_whole)
        if num_whole == size:
            self._append(tensors, step)
            return
        if num_whole > 0:
            self._append([tensor.view(-1)[:num_whole] for tensor in tensors], step)
        rests = [tensor.view(-1)[num_whole:] if is_flat else tensor for tensor in tensors]
        copies = [rest.new_zeros(_whole_vectors(rest.numel())) for rest in rests]
        self._copied += [
            (rest, copy[: rest.numel()].view(rest.shape)) for rest, copy in zip(rests, copies, strict=True)
        ]
        # The kernel counts the steps of each piece.
        own_step = step.clone() if num_whole > 0 else step
        self._copied.append((step, own_step))
        self._append(copies, own_step)

    def _append(self, tensors: Sequence[Tensor], step: Tensor) -> None:
        for column, tensor in zip((self.weights, self.first_moments, self.second_moments), tensors, strict=True):
            column.append(tensor)
        self.steps.append(step)

    def copy_in(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Take over what has become of the copied parts in the meantime.

        Args:
            gradients: Of the parameters.

        Returns:
            Those of the pieces.
        """
        for original, copy in self._copied:
            copy.copy_(original)
        of_pieces = []
        for gradient, num_whole in zip(gradients, self._num_whole, strict=True):
            if num_whole == gradient.numel():
                of_pieces.append(gradient.contiguous())
                continue
            flat = gradient.reshape(-1)
            if num_whole > 0:
                of_pieces.append(flat[:num_whole])
            rest = flat[num_whole:]
            padded = rest.new_zeros(_whole_vectors(len(rest)))
            padded[: len(rest)] = rest
            of_pieces.append(padded)
        return of_pieces

    def copy_back(self) -> None:
        """Give back what was computed on copies."""
        for original, copy in self._copied:
            original.copy_(copy)


def _whole_vectors(num_elements: int) -> int:
    """The next number of elements that fills whole vectors."""
    return math.ceil(num_elements / _VECTOR_ELEMENTS) * _VECTOR_ELEMENTS


def make_optimizer(model: nn.Module, section: OptimizerSection) -> GuardedAdamW:
    """AdamW with weight decay on matrices only, in torch's fused kernel unless the configuration says otherwise."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return GuardedAdamW(groups, betas=section.betas, eps=section.eps, fused=section.fused)

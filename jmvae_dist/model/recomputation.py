"""Activation checkpointing (Chen et al. 2016): a block keeps its input alone, and computes the rest again when the
backward pass gets there: memory of one block at a time, for a second forward pass.

Blocks are large enough to save something. A linear layer with its ReLU would save nothing: the input of the layer
and the output of the ReLU, which is the input of the next one, are all that autograd keeps of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Blocks(nn.Sequential):
    """Modules in a row, in blocks; numbered, and thus named in checkpoints, as if there were no blocks.

    Args:
        blocks: The modules of every block.

    Attributes:
        recomputes: Keep the input of every block alone for the backward pass.
    """

    def __init__(self, blocks: Sequence[Sequence[nn.Module]]) -> None:
        super().__init__(*itertools.chain.from_iterable(blocks))
        self.recomputes = False
        self._bounds = list(itertools.pairwise(itertools.accumulate(map(len, blocks), initial=0)))

    def forward(self, input: Tensor) -> Tensor:
        if not (self.recomputes and torch.is_grad_enabled()):
            return super().forward(input)
        modules = list(self)
        for start, stop in self._bounds:
            # Nothing in a block draws random numbers.
            block = partial(_run, modules[start:stop])
            input = checkpoint(block, input, use_reentrant=False, preserve_rng_state=False)
        return input


def _run(modules: Sequence[nn.Module], input: Tensor) -> Tensor:
    for module in modules:
        input = module(input)
    return input


def recompute(network: nn.Module) -> bool:
    """Let a network recompute: one of this package block by block, one of the user's as one block.

    A network of the user's may have `Blocks` in it: what lies around them is to be recomputed too.

    Returns:
        False if it keeps everything, because it has buffers: those that a forward pass changes, such as the running
        statistics of batch norm, would be changed twice.
    """
    blocks = [module for module in network.modules() if isinstance(module, Blocks)]
    is_own = type(network).__module__.partition(".")[0] == __name__.partition(".")[0]
    for block in blocks:
        block.recomputes = is_own  # not also inside of what is recomputed as a whole
    if is_own and blocks:
        return True
    if next(network.buffers(), None) is not None:
        return False
    network.forward = partial(_recomputed, network.forward)  # its random numbers (dropout) included
    return True


def _recomputed(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    # Not as options of `checkpoint`, which has some of its own.
    forward = partial(forward, **options)
    return checkpoint(forward, *inputs, use_reentrant=False) if torch.is_grad_enabled() else forward(*inputs)

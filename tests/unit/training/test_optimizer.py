"""The optimizer computes the same bits however parameters are cut, and what torch's own AdamW computes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from jmvae_dist.training.optimizer import GuardedAdamW

SIZE = 1_003


def train(tensors: list[Tensor], steps: int = 5, optimizer_type: type[torch.optim.AdamW] = GuardedAdamW) -> Tensor:
    """Weights after some steps with gradients that depend on the position alone; flat."""
    parameters = [nn.Parameter(tensor.clone(memory_format=torch.preserve_format)) for tensor in tensors]
    optimizer = optimizer_type(parameters, lr=1e-2, weight_decay=0.1, fused=optimizer_type is GuardedAdamW)
    for step in range(steps):
        gradient = torch.randn(SIZE, generator=torch.Generator().manual_seed(step))
        pieces = gradient.split([parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(piece.reshape(parameter.shape))
        if isinstance(optimizer, GuardedAdamW):
            optimizer.is_sound = torch.tensor(True)
        optimizer.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters])


@pytest.fixture(scope="module")
def weights() -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(100))


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, SIZE), max_size=12))
def test_bits_do_not_depend_on_how_parameters_are_cut(weights: Tensor, cuts: list[int]) -> None:
    """As ZeRO's partitions and other world sizes cut them."""
    bounds = [0, *sorted(cuts), SIZE]
    pieces = [weights[start:stop] for start, stop in itertools.pairwise(bounds)]
    assert torch.equal(train(pieces), train([weights]))


def test_it_is_torchs_adamw(weights: Tensor) -> None:
    torch.testing.assert_close(train([weights]), train([weights], optimizer_type=torch.optim.AdamW))


def test_weights_that_do_not_lie_in_order_are_updated_in_place(weights: Tensor) -> None:
    """Convolutions may hold theirs with the channels last."""
    pictures = weights[:960].reshape(4, 8, 5, 6)
    pieces = [pictures.contiguous(memory_format=torch.channels_last), weights[960:]]
    assert torch.equal(train(pieces), train([weights]))


@pytest.mark.parametrize("size", [SIZE, 7])
def test_what_was_replaced_between_steps_is_what_is_updated(weights: Tensor, size: int) -> None:
    """Checkpoints and engines replace weights and moments, or write into them."""

    def run(replace: Callable[[nn.Parameter, GuardedAdamW], None]) -> Tensor:
        parameter = nn.Parameter(weights[:size].clone())
        optimizer = GuardedAdamW([parameter], lr=1e-2, weight_decay=0.1, fused=True)
        optimizer.is_sound = torch.tensor(True)
        for step in range(4):
            parameter.grad = torch.randn(size, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            replace(parameter, optimizer)
        assert float(optimizer.state[parameter]["step"]) == 4
        return parameter.detach()

    def with_new_tensors(parameter: nn.Parameter, optimizer: GuardedAdamW) -> None:
        parameter.data = parameter.data * 2
        state = copy.deepcopy(optimizer.state_dict())
        state["state"][0]["exp_avg"] *= 3
        optimizer.load_state_dict(state)

    def in_place(parameter: nn.Parameter, optimizer: GuardedAdamW) -> None:
        parameter.data.mul_(2)
        optimizer.state[parameter]["exp_avg"].mul_(3)

    assert torch.equal(run(with_new_tensors), run(in_place))
    assert not torch.equal(run(in_place), run(lambda parameter, optimizer: None))


def test_a_copy_goes_on_like_the_original(weights: Tensor) -> None:
    optimizer = GuardedAdamW([nn.Parameter(weights.clone())], lr=1e-2, fused=True)
    optimizer.is_sound = torch.tensor(True)

    def step(one: GuardedAdamW) -> Tensor:
        (parameter,) = one.param_groups[0]["params"]
        parameter.grad = torch.ones_like(parameter)
        one.step()
        return parameter.detach()

    step(optimizer)
    copied = copy.deepcopy(optimizer)
    copied.is_sound = optimizer.is_sound
    assert torch.equal(step(optimizer), step(copied))

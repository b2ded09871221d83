"""How much a training step has to compute, and how fast this machine multiplies matrices.

Shape legend: (M, K) times (K, N) is a matrix product, of 2 * M * K * N floating-point operations (FLOPs).
"""

from __future__ import annotations

import statistics
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from jmvae_dist.config import RunConfig
from jmvae_dist.distributed.engine import AUTOCAST_DTYPES
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.training.fake_pass import fake_pass

# Large enough for a device to show what it can do, small enough for a busy CPU.
_SQUARE_SIZES = {"cpu": 1024, "cuda": 8192}
_BLOCKS = 5
_BLOCK_S = 0.005
# torch adds advice for its developers to some messages.
_PROBLEM_CHARACTERS = 200


class Matrix(NamedTuple):
    """Layout of one factor of a product."""

    shape: tuple[int, int]
    stride: tuple[int, int]


class Product(NamedTuple):
    """A matrix product as the model makes it."""

    left: Matrix
    right: Matrix
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        """Of one such product."""
        return 2 * self.left.shape[0] * self.left.shape[1] * self.right.shape[1]


@dataclass(frozen=True)
class Arithmetic:
    """What one forward and backward pass computes.

    Args:
        num_samples: Of the pass.
        flops: Of its matrix products, convolutions and attention; other operations do not count. What is computed
            again (`training.activation_checkpointing`) counts again. None if a network of the user's cannot be run
            without values.
        products: The plain matrix products among them, as linear layers make them, and how often each occurs.
        problem: Type and message of the error where FLOPs could not be counted.
    """

    num_samples: int
    flops: int | None
    products: dict[Product, int]
    problem: str | None = None

    @property
    def product_flops(self) -> int:
        """Of the plain matrix products alone."""
        return sum(count * product.flops for product, count in self.products.items())


def count_arithmetic(config: RunConfig, model_config: JMVAEConfig, num_samples: int) -> Arithmetic:
    """Count a forward and backward pass in the run's precision, without computing it."""
    try:
        with fake_pass(config, model_config, num_samples) as take:
            with FlopCounterMode(display=False) as counter, _ProductCounter() as products:
                take().backward()
            return Arithmetic(num_samples, counter.get_total_flops(), dict(products.found))
    except Exception as error:  # a network of the user's may look at values
        problem = textwrap.shorten(f"{type(error).__name__}: {error}", _PROBLEM_CHARACTERS, placeholder=" ...")
        return Arithmetic(num_samples, None, {}, problem)


class _ProductCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.found[Product(_layout(left), _layout(right), left.dtype)] += 1
        return func(*args, **(kwargs or {}))


def _layout(matrix: Tensor) -> Matrix:
    rows, columns = map(int, matrix.shape)
    row_stride, column_stride = map(int, matrix.stride())
    # An expanded tensor repeats its elements; a kernel copies it first.
    stride = (row_stride, column_stride) if row_stride and column_stride else (columns, 1)
    return Matrix((rows, columns), stride)


def time_products(products: dict[Product, int], device: torch.device) -> float:
    """Seconds that the products take one after the other, into tensors that exist: medians, factors in the cache."""
    return sum(count * _time_product(product, device) for product, count in products.items())


def square_flops_per_s(precision: str, device: torch.device) -> float:
    """FLOP/s of a large square product in the run's precision: the ceiling of everything else."""
    size = _SQUARE_SIZES[device.type]
    square = Matrix((size, size), (size, 1))
    product = Product(square, square, AUTOCAST_DTYPES.get(precision, torch.float32))
    return product.flops / _time_product(product, device)


def _time_product(product: Product, device: torch.device) -> float:
    left, right = (
        torch.empty_strided(*layout, dtype=product.dtype, device=device).normal_()
        for layout in (product.left, product.right)
    )
    out = torch.empty(left.shape[0], right.shape[1], dtype=product.dtype, device=device)

    def multiply() -> None:
        torch.mm(left, right, out=out)

    _time_block(multiply, 1, device)  # chooses kernels and allocates workspaces
    calls = max(1, int(_BLOCK_S / _time_block(multiply, 1, device)))
    return statistics.median(_time_block(multiply, calls, device) / calls for _ in range(_BLOCKS))


def _time_block(call: Callable[[], None], calls: int, device: torch.device) -> float:
    """Seconds of so many calls, which a GPU takes without waiting for the host in between."""
    _wait_for(device)
    start_s = time.perf_counter()
    for _ in range(calls):
        call()
    _wait_for(device)
    return time.perf_counter() - start_s


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

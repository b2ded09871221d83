"""Compile the Triton kernels for GPUs that this machine need not have, and read what they use from the binaries.

The launchers run as they would on a GPU, on tensors in host memory, up to the point where the kernel would start: so
what is compiled is what a launch with these arguments compiles.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from jmvae_dist.kernels import ops, triton_gaussian, triton_likelihood

# Compute capabilities: sm_80 (A100), sm_90 (H100).
ARCHITECTURES = (80, 90)
# (B, D, M) and dtype of the inputs: one element, rows of odd width, tiles of several rows, rows of several tiles.
CASES = (
    *(((1, 1, 1), torch.float32), ((256, 256, 5), torch.float32), ((64, 2048, 16), torch.float32)),
    *(((128, 20, 2), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
)
KERNELS = {
    "kl_terms_forward": triton_gaussian,
    "kl_terms_backward": triton_gaussian,
    "product_forward": triton_gaussian,
    "product_backward": triton_gaussian,
    "log_prob_forward": triton_likelihood,
    "log_prob_backward": triton_likelihood,
}
_WARP_SIZE = 32


@dataclass(frozen=True)
class Binary:
    """A compiled kernel and what one thread of it uses.

    Attributes:
        kernel: Name of the function; a key of `KERNELS`.
        size: B,D,M of the launch.
        dtype: Of the inputs.
        options: Its switches and block sizes.
        registers: Number of 32-bit registers.
        stack_bytes: Local memory, which includes registers that were spilled.
        shared_bytes: Shared memory of a block.
    """

    kernel: str
    size: str
    dtype: str
    options: str
    registers: int
    stack_bytes: int
    shared_bytes: int


class _Driver:
    """What a launch asks Triton's driver for a GPU, without a GPU."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, _WARP_SIZE)

    def get_current_device(self) -> int:
        return self._architecture

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiler:
    """Stands in for a kernel: compiles where the kernel would be launched."""

    def __init__(self, name: str, compiled: dict[str, Any]) -> None:
        self._name = name
        self._kernel = getattr(KERNELS[name], name)
        self._compiled = compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_only(*arguments: Any, **options: Any) -> None:
            binary = self._kernel.run(*arguments, grid=grid, warmup=True, **options)
            constants = " ".join(f"{key}={value}" for key, value in options.items() if key.isupper())
            self._compiled[binary.hash] = (self._name, constants, binary.asm["cubin"])

        return compile_only


@contextlib.contextmanager
def compiling(architecture: int) -> Iterator[dict[str, Any]]:
    """Launches inside compile for a compute capability (80, 90, ...) and do nothing else.

    Yields:
        (name of the kernel, its constants, its machine code) of every different binary so far, by hash.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled")
    compiled: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", _Driver(architecture)))
        for name, module in KERNELS.items():
            stack.enter_context(mock.patch.object(module, name, _Compiler(name, compiled)))
        yield compiled


def launch_all(batch_size: int, dim: int, num_experts: int, dtype: torch.dtype) -> None:
    """Launch every kernel with every combination of its options, on tensors that are the halves of wider ones."""

    def halves(*shape: int) -> tuple[Tensor, ...]:
        return torch.zeros(*shape, 2 * dim, dtype=dtype).chunk(2, dim=-1)

    one, experts = halves(batch_size), halves(num_experts, batch_size)
    noise_BD, mask_BM = torch.zeros(batch_size, dim), torch.ones(batch_size, num_experts, dtype=torch.bool)
    rows_B = torch.arange(batch_size)
    grad_BD, grad_B, grad_MB = noise_BD, torch.zeros(batch_size), torch.zeros(num_experts, batch_size)
    for noise in ((noise_BD, None, 0, 0, 0), (None, rows_B, 0, 0, 0)):
        ops.kl_terms(*one, *experts, *noise)
        ops.kl_terms_backward(grad_BD, grad_B, grad_MB, *one, *experts, *noise)
    for mask, prior_expert in itertools.product((None, mask_BM), (False, True)):
        ops.product(*experts, mask, prior_expert)
        ops.product_backward(grad_BD, grad_BD, grad_BD, grad_BD, *experts, mask)
    # Decoder output for as many draws as there are experts, with samples of D elements.
    decoded_NF, target_BF = experts[0].reshape(-1, dim), one[0].contiguous()
    for kind in triton_likelihood.KINDS:
        ops.log_prob(decoded_NF, target_BF, kind, 0.5)
        ops.log_prob_backward(torch.zeros(len(decoded_NF)), decoded_NF, target_BF, kind, 0.5)


def compile_all(architecture: int) -> Iterator[Binary]:
    """Compile every kernel in every case of `CASES` for a compute capability (80, 90, ...)."""
    with compiling(architecture) as compiled:
        for size, dtype in CASES:
            before = len(compiled)
            launch_all(*size, dtype)
            for name, constants, code in list(compiled.values())[before:]:
                case = (",".join(map(str, size)), str(dtype).removeprefix("torch."), constants)
                yield Binary(name, *case, *_read_usage(code))


def _read_usage(code: bytes) -> tuple[int, int, int]:
    """The last three attributes of `Binary`, read by the `cuobjdump` that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code)
        tool = triton.knobs.nvidia.cuobjdump.path
        output = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", output)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"], numbers["SHARED"]

"""What the kernels cost and how exact they are, on the machine at hand.

Times are medians; bytes per second count what an operation must move at least (every input read once, every output
written once), and are compared with a copy timed in the same run. Small tensors that stay in a cache can beat it.

Shape suffixes: B batch, D latent dimension, M experts.
"""

from __future__ import annotations

import functools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jmvae_dist.kernels import gaussian, reference
from jmvae_dist.kernels.gaussian import choose
from jmvae_dist.kernels.noise import KeyedNoise

# (B, D, M): from a toy to wide latent spaces of many modalities.
SIZES = ((32, 10, 2), (128, 20, 2), (256, 64, 2), (512, 128, 3), (1024, 256, 3), (4096, 512, 5))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MEASUREMENTS = 25
_MEASURE_S = 2.0
_WARM_UPS = 3
_COPY_BYTES = 2**27

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Row:
    """One line of the results.

    Attributes:
        device: The device's name.
        torch: Version of torch.
        threads: Threads of a CPU.
        operation: gaussian_kl_terms or product_of_experts.
        implementation: eager (the reference), compiled or triton.
        dtype: Of the inputs.
        batch: B.
        dim: D.
        experts: M.
        direction: forward, or forward+backward.
        time_ms: Median duration.
        times_eager: How many times faster than eager.
        gb_per_s: Bytes that must be moved at least, per time.
        copy_gb_per_s: The same of a copy.
    """

    device: str
    torch: str
    threads: int
    operation: str
    implementation: str
    dtype: str
    batch: int
    dim: int
    experts: int
    direction: str
    time_ms: float
    times_eager: float
    gb_per_s: float
    copy_gb_per_s: float


def least_bytes(operation: str, direction: str, batch: int, dim: int, experts: int, itemsize: int) -> int:
    """Bytes that an operation moves if it reads each input and writes each output once, with noise in memory.

    Args:
        operation: gaussian_kl_terms or product_of_experts.
        direction: forward, backward, or forward+backward.
        batch: B.
        dim: D.
        experts: M.
        itemsize: Bytes of an input element; results and their gradients have 4.
    """
    if direction == "forward+backward":
        parts = (least_bytes(operation, part, batch, dim, experts, itemsize) for part in direction.split("+"))
        return sum(parts)
    is_kl = operation == "gaussian_kl_terms"
    inputs = (2 * experts + 2 * is_kl) * batch * dim * itemsize
    if is_kl:
        # z, a KL per sample and Gaussian, or their gradients; and the noise.
        results, noise = 4 * (batch * dim + (1 + experts) * batch), 4 * batch * dim
        return inputs + noise + results + (inputs if direction == "backward" else 0)
    results = 4 * 2 * batch * dim
    return inputs + results if direction == "forward" else 2 * inputs + 2 * results


def measure(device: str, sizes: list[tuple[int, int, int]], dtype: str) -> Iterator[Row]:
    """Time every operation with everything that runs on a device, forward and backward.

    Args:
        device: cpu or cuda.
        sizes: Triples (B, D, M).
        dtype: A key of `DTYPES`.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    ceiling = copy_gb_per_s(device)
    implementations = {"eager": "reference", "compiled": "compiled"}
    if choose("auto", device) == "triton":
        implementations["triton"] = "triton"
    for batch, dim, experts in sizes:
        inputs = _inputs(batch, dim, experts, device, DTYPES[dtype])
        for operation in ("gaussian_kl_terms", "product_of_experts"):
            for direction in ("forward", "forward+backward"):
                num_bytes = least_bytes(operation, direction, batch, dim, experts, DTYPES[dtype].itemsize)
                eager_ms = None
                for implementation, kernels in implementations.items():
                    time_ms = _time_ms(_work(operation, direction, kernels, inputs), device)
                    eager_ms = eager_ms or time_ms
                    yield Row(
                        device=name,
                        torch=torch.__version__,
                        threads=torch.get_num_threads(),
                        operation=operation,
                        implementation=implementation,
                        dtype=dtype,
                        batch=batch,
                        dim=dim,
                        experts=experts,
                        direction=direction,
                        time_ms=round(time_ms, 4),
                        times_eager=round(eager_ms / time_ms, 2),
                        gb_per_s=round(num_bytes / time_ms / 1e6, 2),
                        copy_gb_per_s=round(ceiling, 2),
                    )


def copy_gb_per_s(device: str) -> float:
    """Bytes read and written per second by a copy too large for any cache, in 10^9."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _time_ms(lambda: target.copy_(source), device) / 1e6


def _inputs(batch: int, dim: int, experts: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """mu, logvar, mus, logvars and noise; q as the halves of one tensor, as a linear layer returns it."""
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    mu_BD, logvar_BD = draw(batch, 2 * dim).to(dtype).chunk(2, dim=-1)
    gaussians = (mu_BD, logvar_BD, draw(experts, batch, dim).to(dtype), draw(experts, batch, dim).to(dtype))
    return *(tensor.requires_grad_() for tensor in gaussians), draw(batch, dim)


def _work(operation: str, direction: str, kernels: str, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    used = inputs if operation == "gaussian_kl_terms" else inputs[2:4]
    function: Callable[..., Results] = getattr(gaussian, operation)
    if direction == "forward":
        return lambda: function(*used, kernels=kernels)

    differentiable = [tensor for tensor in used if tensor.requires_grad]
    grads = [torch.ones_like(result) for result in function(*used, kernels=kernels)]

    def forward_and_backward() -> None:
        torch.autograd.grad(function(*used, kernels=kernels), differentiable, grads)

    return forward_and_backward


def _time_ms(work: Callable[[], Any], device: str) -> float:
    """Median duration. On a GPU, of batches of calls, so that launching overlaps as it does in training."""
    calls = 10 if device == "cuda" else 1

    def once() -> float:
        started_s = time.perf_counter()
        for _ in range(calls):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started_s) / calls * 1e3

    for _ in range(_WARM_UPS):
        once()
    times_ms, end_s = [once()], time.perf_counter() + _MEASURE_S
    while len(times_ms) < _MEASUREMENTS and time.perf_counter() < end_s:
        times_ms.append(once())
    return statistics.median(times_ms)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


# Errors against float64


@dataclass(frozen=True)
class ErrorRow:
    """Relative errors in one situation: norm of the error over norm of the values in float64.

    Attributes:
        case: The situation.
        quantity: What was computed.
        errors: By implementation.
    """

    case: str
    quantity: str
    errors: dict[str, float]


def measure_errors(device: str, implementations: list[str]) -> Iterator[ErrorRow]:
    """Errors of the textbook formulas and of the implementations, in float32."""
    methods: dict[str, Callable[..., Results]] = {"textbook": _textbook_kl}
    methods.update({name: functools.partial(gaussian.gaussian_kl_terms, kernels=name) for name in implementations})
    exact = functools.partial(gaussian.gaussian_kl_terms, kernels="reference")
    for case, arguments in _kl_cases(device).items():
        for quantity in ("KL", "gradient of mu", "gradient of logvar"):
            yield ErrorRow(case, quantity, _errors(methods, exact, arguments, 4, quantity))

    methods = {"textbook": _textbook_product}
    methods.update({name: functools.partial(gaussian.product_of_experts, kernels=name) for name in implementations})
    exact_product = functools.partial(gaussian.product_of_experts, kernels="reference")
    for case, arguments in _product_cases(device).items():
        for quantity in ("product's mean", "product's logvar", "gradient of mus", "gradient of logvars"):
            yield ErrorRow(case, quantity, _errors(methods, exact_product, arguments, 2, quantity))


def _errors(
    methods: dict[str, Callable[..., Results]],
    exact_method: Callable[..., Results],
    arguments: tuple[Tensor, ...],
    num_inputs: int,
    quantity: str,
) -> dict[str, float]:
    exact = _quantity(exact_method, tuple(tensor.double() for tensor in arguments), num_inputs, quantity)
    return {
        name: float((_quantity(method, arguments, num_inputs, quantity) - exact).norm() / exact.norm())
        for name, method in methods.items()
    }


def _quantity(
    method: Callable[..., Results], arguments: tuple[Tensor, ...], num_inputs: int, quantity: str
) -> Tensor:
    inputs = [tensor.detach().clone().requires_grad_() for tensor in arguments[:num_inputs]]
    results = method(*inputs, *arguments[num_inputs:])
    values = {"KL": 2, "product's mean": 0, "product's logvar": 1}
    if quantity in values:
        return results[values[quantity]].detach().double()
    # The KL to the experts, or the whole product, as a loss whose derivatives are not all alike.
    loss = results[2].sum() if num_inputs == 4 else (results[0] + results[1].square()).sum()
    position = {"gradient of mu": 0, "gradient of logvar": 1, "gradient of mus": 0, "gradient of logvars": 1}
    return torch.autograd.grad(loss, inputs)[position[quantity]].double()


def _textbook_kl(mu_BD: Tensor, logvar_BD: Tensor, mus_MBD: Tensor, logvars_MBD: Tensor, noise_BD: Tensor) -> Results:
    variance_BD, variances_MBD = logvar_BD.exp(), logvars_MBD.exp()
    ratios_MBD = (variance_BD + (mu_BD - mus_MBD).square()) / variances_MBD
    kl_experts_MB = 0.5 * (ratios_MBD - 1 - logvar_BD + logvars_MBD).sum(-1)
    kl_prior_B = 0.5 * (variance_BD + mu_BD.square() - 1 - logvar_BD).sum(-1)
    return mu_BD + variance_BD.sqrt() * noise_BD, kl_prior_B, kl_experts_MB


def _textbook_product(mus_MBD: Tensor, logvars_MBD: Tensor) -> Results:
    precisions_MBD = 1 / (logvars_MBD.exp() + 1e-8)
    precision_BD = precisions_MBD.sum(0)
    return (precisions_MBD * mus_MBD).sum(0) / precision_BD, -precision_BD.log()


def _kl_cases(device: str) -> dict[str, tuple[Tensor, ...]]:
    """Arguments of `gaussian_kl_terms` in float32, by what they stand for."""
    mu, logvar, mus, logvars, noise = (tensor.detach() for tensor in _inputs(64, 32, 2, device, torch.float32))
    cases: dict[str, tuple[Tensor, ...]] = {"unrelated posteriors": (mu, logvar, mus, logvars, noise)}
    for distance in (1e-1, 1e-2, 1e-4):
        experts = (mu + distance * mus, logvar + distance * logvars)
        cases[f"posteriors {distance:g} apart"] = (mu, logvar, *experts, noise)
    cases["logvar from -20 to 20"] = (mu, (8 * logvar).clamp(-20, 20), mus, (8 * logvars).clamp(-20, 20), noise)
    rounded = tuple(tensor.bfloat16() for tensor in (mu, logvar, mus, logvars))
    cases["unrelated, from bfloat16"] = (*rounded, noise)
    return cases


def _product_cases(device: str) -> dict[str, tuple[Tensor, ...]]:
    """Arguments of `product_of_experts` in float32, by what they stand for."""
    _, _, mus, logvars, _ = (tensor.detach() for tensor in _inputs(64, 32, 3, device, torch.float32))
    cases: dict[str, tuple[Tensor, ...]] = {
        "unrelated experts": (mus, logvars),
        "logvar about -20": (mus, logvars - 20),
        "logvar about 100": (mus, logvars + 100),
        "logvar from -20 to 20": (mus, (8 * logvars).clamp(-20, 20)),
    }
    return cases


def keyed_noise_differences(device: str) -> tuple[int, int]:
    """(values that differ, values compared) of noise made by the Triton kernel and by `noise.normal_noise`."""
    rows_B, dim = torch.arange(512, device=device) * 8_000_009, 64
    key = KeyedNoise(2**63 + 7, 2**40 + 5, rows_B)
    zeros_BD, none_MBD = torch.zeros(len(rows_B), dim, device=device), torch.zeros(0, len(rows_B), dim, device=device)
    arguments = (zeros_BD, zeros_BD, none_MBD, none_MBD, key)
    # With mean 0 and variance 1 the sample is the noise.
    from_kernel = gaussian.gaussian_kl_terms(*arguments, kernels="triton")[0]
    return int((from_kernel != reference.gaussian_kl_terms(*arguments)[0]).sum()), from_kernel.numel()

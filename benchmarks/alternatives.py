"""Two ways to make a training step faster that are not taken, each against what is.

    python benchmarks/alternatives.py [--rounds 30] [--threads 1 2] [--out FILE.json]

1. Layers that read the same input as one wider product: the first layers of the joint encoder and of the image's, and
   those of the two decoders, in the sizes of `step.py`. Beside the three products of each: joining the weights, which
   are parameters of their own.
2. The optimizer in a program of torch.compile: AdamW of `step.py`'s parameters, fused (as in training) and compiled.

Before every call the caches are filled with other data, as they are in a step. Calls take turns; medians count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conditions import machine, versions
from torch import Tensor, nn
from workload import make_model

BATCH = 256
_OTHER_DATA_BYTES = 2**27

Work = Callable[[], Any]


def main() -> int:
    """Measure, print tables, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "versions": versions(("torch",)),
        "ms": {},
    }
    for threads in options.threads:
        torch.set_num_threads(threads)
        works = {
            **products("first layers of images", 784, 512),
            **products("first layers of decoders", 64, 512),
            **optimizers(),
        }
        medians = report["ms"][threads] = _medians_ms(works, options.rounds)
        print(f"\n{threads} thread(s)")
        for name, time_ms in medians.items():
            print(f"{name:<60}{time_ms:>8.2f} ms", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def products(name: str, size_in: int, size_out: int) -> dict[str, Work]:
    """Forward, weights' and input's gradients of two layers with one input, each on its own and together."""
    x = torch.randn(BATCH, size_in)
    weights, grads = torch.randn(2, size_out, size_in), torch.randn(2, BATCH, size_out)
    wide_weight, wide_grad = weights.reshape(2 * size_out, size_in), torch.cat([*grads], dim=1)

    def apart(product: Callable[[int], Tensor]) -> Work:
        return lambda: (product(0), product(1))

    return {
        f"{name}: forward, two products": apart(lambda at: x @ weights[at].T),
        f"{name}: forward, one": lambda: x @ wide_weight.T,
        f"{name}: gradients of weights, two products": apart(lambda at: grads[at].T @ x),
        f"{name}: gradients of weights, one": lambda: wide_grad.T @ x,
        f"{name}: gradient of the input, two products": lambda: (grads[0] @ weights[0]).addmm_(grads[1], weights[1]),
        f"{name}: gradient of the input, one": lambda: wide_grad @ wide_weight,
        f"{name}: joining the weights": lambda: torch.cat([weights[0], weights[1]]),
    }


def optimizers() -> dict[str, Work]:
    """AdamW on the parameters of the model."""

    def parameters() -> list[nn.Parameter]:
        copies = [nn.Parameter(parameter.detach().clone()) for parameter in make_model().parameters()]
        for parameter in copies:
            parameter.grad = 1e-3 * torch.randn_like(parameter)
        return copies

    # A learning rate that is a number would be a constant of the program, and every step compile it anew.
    compiled = torch.optim.AdamW(parameters(), lr=torch.tensor(1e-4), foreach=True, capturable=True)
    return {
        "AdamW, fused": torch.optim.AdamW(parameters(), lr=1e-4, fused=True).step,
        "AdamW, compiled": torch.compile(compiled.step),
    }


def _medians_ms(works: dict[str, Work], rounds: int) -> dict[str, float]:
    other_data = torch.zeros(_OTHER_DATA_BYTES // 4)
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 2):
        for name, work in works.items():
            other_data.add_(1.0)
            start_s = time.perf_counter()
            work()
            if turn > 1:  # the first two turns warm up, and compile
                times[name].append((time.perf_counter() - start_s) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    sys.exit(main())

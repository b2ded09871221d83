"""Memory traffic of likelihood sums: what part of a training step it is, and what fused kernels would spare.

    python benchmarks/likelihoods.py [--batch-sizes 128 1024] [--out FILE.json]

Counts the bytes of arguments and results of every torch operator that runs (caches are not modelled), in a step of
the default networks on images of 28 x 28 with labels, and in its likelihood sums alone. A fused kernel reads decoder
output and data in each direction and writes the gradient: five times the data.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jmvae_dist import JMVAE, JMVAEConfig
from jmvae_dist.model.likelihoods import log_prob

SHAPES = {"image": (1, 28, 28), "label": (10,)}


@dataclass
class Result:
    """Bytes, in 10^6, for one likelihood of the images (labels are categorical) and one batch size."""

    likelihood: str
    batch_size: int
    step_mb: float
    likelihoods_mb: float
    fused_mb: float
    spared_fraction_of_step: float


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operators read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        if not function.is_view:
            tensors = [leaf for leaf in tree_leaves((arguments, options, result)) if isinstance(leaf, Tensor)]
            # An expanded tensor is as large as what it is expanded from.
            self.num_bytes += sum(min(t.untyped_storage().nbytes(), t.numel() * t.element_size()) for t in tensors)
        return result


def measure(likelihood: str, batch_size: int) -> Result:
    """Count one step, and its likelihood sums on decoder outputs of the same shapes."""
    config = JMVAEConfig(
        2, latent_dim=64, input_dims=SHAPES, decoders_dist={"image": likelihood, "label": "categorical"}
    )
    model = JMVAE(config, kernels="reference")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    inputs = {"image": torch.rand(batch_size, *SHAPES["image"]).round(), "label": torch.eye(10).repeat(batch_size, 1)}
    inputs["label"] = inputs["label"][:batch_size].contiguous()

    def step() -> None:
        model(inputs, check_inputs=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the optimizer makes its state
    with Traffic() as of_step:
        step()
    decoded = {name: torch.randn_like(x).requires_grad_() for name, x in inputs.items()}
    with Traffic() as of_likelihoods:
        sums = [log_prob(model.likelihoods[name], decoded[name], inputs[name]).sum() for name in inputs]
        torch.stack(sums).sum().backward()
    fused_bytes = 5 * sum(x.nbytes for x in inputs.values())
    return Result(
        likelihood=likelihood,
        batch_size=batch_size,
        step_mb=of_step.num_bytes / 1e6,
        likelihoods_mb=of_likelihoods.num_bytes / 1e6,
        fused_mb=fused_bytes / 1e6,
        spared_fraction_of_step=(of_likelihoods.num_bytes - fused_bytes) / of_step.num_bytes,
    )


def main() -> int:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[128, 1024, 8192])
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    options = parser.parse_args()
    results = []
    print(f"{'likelihood':<12}{'batch':>7}{'step':>11}{'likelihoods':>13}{'fused':>10}{'spared, of step':>17}")
    for likelihood in ("normal", "laplace", "bernoulli"):
        for batch_size in options.batch_sizes:
            result = measure(likelihood, batch_size)
            print(
                f"{likelihood:<12}{batch_size:>7}{result.step_mb:>8.0f} MB{result.likelihoods_mb:>10.1f} MB"
                f"{result.fused_mb:>7.1f} MB{result.spared_fraction_of_step:>17.1%}"
            )
            results.append(result)
    if options.out is not None:
        options.out.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

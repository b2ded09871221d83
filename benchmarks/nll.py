"""CPU time of the importance-sampled joint likelihood, per image: this package, and MultiVae if it is installed.

    python benchmarks/nll.py [--draws 1000] [--images 8] [--repeats 5] [--out FILE.json]

MNIST-like images (28 x 28, Bernoulli) with labels (10 classes), 64 latent dimensions, decoders with one hidden layer
of 512 units, one thread. The packages take turns, so that both see the same machine; the fastest repeat counts. Ours
is measured once with noise that is keyed by sample and draw, as `evaluate` uses it, and once with torch's generator.
Beside them the floor: the decoders' matrix products for as many latents and nothing else, written into tensors that
exist, a cache's worth at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jmvae_dist import JMVAE, JMVAEConfig
from jmvae_dist.kernels.noise import KeyedNoise, Stream
from jmvae_dist.networks_config import NetworksConfig

SHAPES = {"image": (1, 28, 28), "label": (10,)}
LATENT_DIM, HIDDEN = 64, 512
FLOOR_ROWS = 256


def make_inputs(num_images: int) -> dict[str, Tensor]:
    """Binary images and one-hot labels; their values do not matter for the time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(num_images, *SHAPES["image"], generator=generator).round()
    return {"image": images, "label": torch.eye(10)[torch.arange(num_images) % 10]}


def ours(inputs: dict[str, Tensor], num_draws: int, is_keyed: bool) -> Callable[[], Any]:
    """The call to measure."""
    config = JMVAEConfig(2, LATENT_DIM, dict(SHAPES), decoders_dist={"image": "bernoulli", "label": "categorical"})
    model = JMVAE(config, networks=NetworksConfig([HIDDEN, HIDDEN], [HIDDEN], [HIDDEN, HIDDEN])).eval()
    rows = torch.arange(len(inputs["image"]))
    options: dict[str, Any] = {"noise": KeyedNoise(0, 0, rows, Stream.IMPORTANCE)} if is_keyed else {}
    return lambda: model.estimate_nlls(inputs, {"joint": model.modalities}, K=num_draws, **options)


def other(inputs: dict[str, Tensor], num_draws: int) -> Callable[[], Any] | None:
    """The same with MultiVae's default networks of the same sizes; None where it cannot be imported."""
    try:
        import multivae.models
        from multivae.data.datasets.base import MultimodalBaseDataset
    except ImportError as error:
        print(f"MultiVae is left out: {error}", file=sys.stderr)
        return None
    model = multivae.models.JMVAE(
        multivae.models.JMVAEConfig(
            n_modalities=2,
            latent_dim=LATENT_DIM,
            input_dims=dict(SHAPES),
            decoders_dist={"image": "bernoulli", "label": "categorical"},
        )
    ).eval()
    dataset = MultimodalBaseDataset(data=inputs)
    return lambda: model.compute_joint_nll(dataset, K=num_draws, batch_size_K=100)


def floor(num_latents: int) -> Callable[[], Any]:
    """The matrix products of both decoders."""
    layers = [(LATENT_DIM, HIDDEN), (HIDDEN, 784), (LATENT_DIM, HIDDEN), (HIDDEN, 10)]
    products = [
        (torch.randn(FLOOR_ROWS, size_in), torch.randn(size_out, size_in).T, torch.empty(FLOOR_ROWS, size_out))
        for size_in, size_out in layers
    ]

    def multiply() -> None:
        for _ in range(-(-num_latents // FLOOR_ROWS)):
            for left, right, out in products:
                torch.mm(left, right, out=out)

    return multiply


def measure(calls: dict[str, Callable[[], Any]], num_images: int, repeats: int) -> dict[str, float]:
    """CPU milliseconds per image: the fastest of `repeats` turns."""
    fastest = dict.fromkeys(calls, float("inf"))
    with torch.no_grad():
        for repeat in range(repeats + 1):
            for name, call in calls.items():
                start_s = time.process_time()
                call()
                if repeat > 0:  # the first turn warms up
                    fastest[name] = min(fastest[name], (time.process_time() - start_s) * 1e3 / num_images)
    return fastest


def main() -> int:
    """Print a table; write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--draws", type=int, default=1000, metavar="K")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    inputs = make_inputs(options.images)
    calls = {
        "matrix products alone": floor(options.images * options.draws),
        "keyed noise": ours(inputs, options.draws, is_keyed=True),
        "torch's noise": ours(inputs, options.draws, is_keyed=False),
    }
    if (reference := other(inputs, options.draws)) is not None:
        calls["MultiVae"] = reference
    results = measure(calls, options.images, options.repeats)
    print(f"{'joint NLL, K = ' + str(options.draws):<24}{'CPU ms per image':>18}{'images per CPU-second':>24}")
    for name, milliseconds in results.items():
        print(f"{name:<24}{milliseconds:>18.2f}{1e3 / milliseconds:>24.1f}")
    if options.out is not None:
        options.out.write_text(json.dumps({"draws": options.draws, "cpu_ms_per_image": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How close a training step is to the floor of its arithmetic, and how close the whole trainer is to the step.

    python benchmarks/step.py [--rounds 15] [--samples 20000] [--skip-trainers] [--out FILE.json]

One model throughout: images 1 x 28 x 28 and labels of 10 classes, MultiVae's default networks, 64 latent dimensions,
batches of 256, float32.

1. Steps, in this process, with 1 and with 2 threads. Contenders take turns of a few steps; medians count.
   - the floor: for every linear layer the three matrix products (output, gradient of the weights, gradient of the
     input), written into tensors that exist; and torch's fused AdamW on as many numbers. Beside it the products
     without the gradients of the data, which nobody needs;
   - ours: `TrainStep`, with its keyed noise, guard, schedules and metrics, as training runs take it, without and with
     `training.compile: model`;
   - MultiVae's forward, backward and Adam, where that package is installed.
2. Trainers, in processes of their own that take turns with our bare step: `jmvae-dist train` with data from shards, a
   record every 50 steps and a checkpoint every 500, and MultiVae's trainer on the same samples in memory.
3. 1 process with 2 threads against 2 processes with 1 thread, at 256 and 1,024 samples per process and step.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from conditions import machine, versions
from torch import Tensor, nn
from training_steps import training_steps
from workload import LATENT_DIM, SHAPES, make_arrays, make_shards, run_command, run_trainer

from jmvae_dist.model import JMVAE

BATCH = 256
STEPS_PER_TURN = 5
PACKAGES = ("torch", "numpy", "accelerate", "multivae")

Step = Callable[[], Any]


def main() -> int:
    """Measure, print tables, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of every step")
    parser.add_argument("--trainer-rounds", type=int, default=3, help="runs of every trainer")
    parser.add_argument("--trainer-steps", type=int, default=1200)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--skip-trainers", action="store_true", help="steps only")
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    parser.add_argument("--turn", help=argparse.SUPPRESS)  # what a process of its own does
    options = parser.parse_args()
    if options.turn is not None:
        print(json.dumps(_take_turn(**json.loads(options.turn))))
        return 0
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "versions": versions(PACKAGES),
    }
    print(json.dumps({key: report[key] for key in ("machine", "versions")}, indent=1), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        manifest = make_shards(Path(folder), options.samples)
        report["steps"] = [measure_steps(manifest, threads, options.rounds) for threads in options.threads]
        if not options.skip_trainers:
            report["trainers"] = [measure_trainers(manifest, threads, options) for threads in options.threads]
            report["processes"] = [measure_processes(manifest, batch, options) for batch in (256, 1024)]
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


# Steps


def linear_layers(model: JMVAE) -> dict[nn.Linear, bool]:
    """All linear layers, heads included, and whether the gradient of their input is needed: of data it is not."""
    needs_gradient: dict[nn.Linear, bool] = {}

    def note(layer: nn.Module, arguments: tuple[Tensor]) -> None:
        assert isinstance(layer, nn.Linear)
        needs_gradient[layer] = arguments[0].requires_grad

    hooks = [layer.register_forward_pre_hook(note) for layer in model.modules() if isinstance(layer, nn.Linear)]
    model({name: torch.zeros(1, *shape) for name, shape in SHAPES.items()}, check_inputs=False)
    for hook in hooks:
        hook.remove()
    return needs_gradient


class Floor:
    """The matrix products of one step, and nothing else.

    Args:
        model: Whose linear layers.
        batch: Rows.
        is_complete: With the gradients of all inputs; else without those of data, which nobody needs.
    """

    def __init__(self, model: JMVAE, batch: int, is_complete: bool = True) -> None:
        self.products: list[tuple[Tensor, Tensor, Tensor]] = []
        for layer, needs_gradient in linear_layers(model).items():
            size_out, size_in = layer.weight.shape
            x, grad, weight = (
                torch.randn(batch, size_in),
                torch.randn(batch, size_out),
                torch.randn(size_out, size_in),
            )
            self.products += [
                (x, weight.T, torch.empty(batch, size_out)),
                (grad.T, x, torch.empty(size_out, size_in)),
            ]
            if is_complete or needs_gradient:
                self.products.append((grad, weight, torch.empty(batch, size_in)))
        self.flops = sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in self.products)

    def __call__(self) -> None:
        for left, right, out in self.products:
            torch.mm(left, right, out=out)


def fused_adamw(model: nn.Module) -> Step:
    """Torch's fused AdamW on tensors of the model's sizes."""
    parameters = [nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True).step


@contextmanager
def our_steps(manifest: Path, kinds: Sequence[str]) -> Iterator[tuple[dict[str, Step], JMVAE]]:
    """One step of training per call, on batches that have been read before; for values of `training.compile`."""
    with training_steps(manifest, BATCH, [("--training.compile", kind) for kind in kinds]) as (_, steps):
        model = steps[-1][1].model
        assert isinstance(model, JMVAE)
        yield {kind: step for kind, (step, _) in zip(kinds, steps, strict=True)}, model


def multivae_step(num_samples: int = BATCH) -> Step | None:
    """MultiVae's training step; None where the package cannot be imported."""
    model_and_data = _multivae(num_samples)
    if model_and_data is None:
        return None
    model, data = model_and_data
    inputs = data[list(range(num_samples))] if hasattr(data, "__getitem__") else data
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        output = model(inputs, epoch=1, batch_ratio=0.0, dataset_size=num_samples)
        output.loss.backward()
        optimizer.step()

    return step


def _multivae(num_samples: int) -> tuple[Any, Any] | None:
    try:
        import multivae.models
        from multivae.data.datasets.base import MultimodalBaseDataset
    except ImportError as error:
        print(f"MultiVae is left out: {error}", file=sys.stderr)
        return None
    arrays = make_arrays(num_samples)
    labels = torch.nn.functional.one_hot(torch.from_numpy(arrays["label"]), 10).float()
    data = MultimodalBaseDataset({"image": torch.from_numpy(arrays["image"]), "label": labels})
    model = multivae.models.JMVAE(
        multivae.models.JMVAEConfig(n_modalities=2, latent_dim=LATENT_DIM, input_dims=dict(SHAPES))
    )
    return model, data


def measure_steps(manifest: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Medians in milliseconds, of contenders that take turns."""
    torch.set_num_threads(threads)
    with our_steps(manifest, ("off", "model")) as (ours, model):
        floor = Floor(model, BATCH)
        steps: dict[str, Step] = {"matrix products": floor, "those needed": Floor(model, BATCH, is_complete=False)}
        steps["fused AdamW"] = fused_adamw(model)
        steps |= {"ours": ours["off"], "ours, compiled": ours["model"]}
        if (theirs := multivae_step()) is not None:
            steps["MultiVae"] = theirs
        medians = _medians_ms(steps, rounds)
    bound = medians["matrix products"] + medians["fused AdamW"]
    result = {
        "threads": threads,
        "ms": medians,
        "gflop_per_s_of_products": floor.flops / medians["matrix products"] / 1e6,
        "to_floor": {
            name: medians[name] / bound for name in ("ours", "ours, compiled", "MultiVae") if name in medians
        },
    }
    if "MultiVae" in medians:
        result["multivae_to_ours"] = {
            name: medians["MultiVae"] / medians[name] for name in ("ours", "ours, compiled")
        }
    print(json.dumps(result), flush=True)
    return result


def _medians_ms(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start_s = time.perf_counter()
            for _ in range(STEPS_PER_TURN):
                step()
            if turn > 0:  # the first turn warms up
                times[name].append((time.perf_counter() - start_s) * 1e3 / STEPS_PER_TURN)
    return {name: statistics.median(values) for name, values in times.items()}


# Whole trainers, in processes of their own


def measure_trainers(manifest: Path, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """Samples per second of whole trainers that take turns with the bare step."""
    kinds = ["our step", "our trainer"]
    if importlib.util.find_spec("multivae") is not None:
        kinds.append("MultiVae's trainer")
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.trainer_rounds):
        for kind in kinds:
            rates[kind].append(_in_a_process(kind, manifest, threads, BATCH, options))
    medians = {kind: statistics.median(values) for kind, values in rates.items()}
    result: dict[str, Any] = {"threads": threads, "samples_per_s": medians}
    result["trainer_to_step"] = medians["our trainer"] / medians["our step"]
    if "MultiVae's trainer" in medians:
        result["ours_to_multivae"] = medians["our trainer"] / medians["MultiVae's trainer"]
    print(json.dumps(result), flush=True)
    return result


def measure_processes(manifest: Path, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One process with one and with two threads, and two processes with one thread; `batch` per process and step."""
    kinds = {"1 process x 1 thread": (1, 1), "1 process x 2 threads": (1, 2), "2 processes x 1 thread": (2, 1)}
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.trainer_rounds):
        for kind, (processes, threads) in kinds.items():
            rate = run_trainer(manifest, threads, batch * processes, options.trainer_steps * 256 // batch, processes)
            rates[kind].append(rate)
    medians = {kind: statistics.median(values) for kind, values in rates.items()}
    one, _, two = medians.values()
    result = {"batch_per_process": batch, "samples_per_s": medians, "two_processes_to_one": two / one}
    print(json.dumps(result), flush=True)
    return result


def _in_a_process(kind: str, manifest: Path, threads: int, batch: int, options: argparse.Namespace) -> float:
    if kind == "our trainer":
        return run_trainer(manifest, threads, batch, options.trainer_steps, processes=1)
    turn = {"kind": kind, "manifest": str(manifest), "threads": threads, "samples": options.samples}
    output = run_command([sys.executable, __file__, "--turn", json.dumps(turn)], threads)
    return float(output.splitlines()[-1])


def _take_turn(kind: str, manifest: str, threads: int, samples: int) -> float:
    """Samples per second, in this process."""
    torch.set_num_threads(threads)
    if kind == "our step":
        with our_steps(Path(manifest), ("off",)) as (steps, _):
            times_s = []
            for turn in range(60):
                start_s = time.perf_counter()
                for _ in range(STEPS_PER_TURN):
                    steps["off"]()
                if turn > 0:
                    times_s.append((time.perf_counter() - start_s) / STEPS_PER_TURN)
        return BATCH / statistics.median(times_s)
    return _multivae_trainer(samples)


def _multivae_trainer(samples: int, epochs: int = 4) -> float:
    """Samples per second of MultiVae's own trainer; its first epoch warms up."""
    from multivae.trainers import BaseTrainer, BaseTrainerConfig

    found = _multivae(samples)
    assert found is not None
    model, data = found
    epochs_s: list[float] = []

    class Timed(BaseTrainer):
        def train_step(self, epoch: int) -> Any:
            start_s = time.perf_counter()
            result = super().train_step(epoch)
            epochs_s.append(time.perf_counter() - start_s)
            return result

    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        config = BaseTrainerConfig(
            output_dir=folder, num_epochs=epochs, per_device_train_batch_size=BATCH, learning_rate=1e-4, no_cuda=True
        )
        Timed(model, train_dataset=data, training_config=config).train()
    return samples * (epochs - 1) / sum(epochs_s[1:])


if __name__ == "__main__":
    sys.exit(main())

"""What benchmarks of training train (random images and labels, MultiVae's default networks), and how a run starts."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jmvae_dist.checkpoint.multivae import multivae_networks
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.sources.base import ArraySource
from jmvae_dist.data.writer import write_shards
from jmvae_dist.model import JMVAE
from jmvae_dist.model_config import JMVAEConfig

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"image": (1, 28, 28), "label": (10,)}
LATENT_DIM = 64
LOG_EVERY_STEPS = 50


def make_arrays(num_samples: int) -> dict[str, np.ndarray]:
    """Random images and labels; their values do not matter for the time."""
    generator = np.random.default_rng(0)
    return {
        "image": generator.random((num_samples, *SHAPES["image"]), dtype=np.float32),
        "label": generator.integers(0, 10, num_samples),
    }


def make_shards(folder: Path, num_samples: int) -> Path:
    """The same as shards; returns their manifest's path."""
    modalities = (Modality("image", "float32", SHAPES["image"]), Modality.classes("label", 10))
    source = ArraySource("random", "train", modalities, make_arrays(num_samples), np.arange(num_samples), 2000, {})
    write_shards(source, folder / "shards", workers=1)
    return folder / "shards" / "manifest.json"


def settings(manifest: Path, output_dir: Path, steps: int, batch: int) -> list[str]:
    """The run's settings as options of `jmvae-dist train`; later ones win."""
    return [
        *("--data.train_manifest", str(manifest), "--output_dir", str(output_dir)),
        *("--training.steps", str(steps), "--training.global_batch_size", str(batch)),
        *("--training.log_every_steps", str(LOG_EVERY_STEPS), "--checkpoint.every_steps", "500"),
        *("--model.networks", json.dumps(_networks_of_multivae()), "--tracking.wandb.mode", "disabled"),
        *("--training.device", "cpu"),
        *("--model.latent_dim", str(LATENT_DIM), "--schedule.learning_rate.peak", "0.0001"),
    ]


def _networks_of_multivae() -> dict[str, Any]:
    networks = multivae_networks(JMVAEConfig(len(SHAPES), LATENT_DIM, dict(SHAPES)))
    return {name: getattr(networks, name) for name in ("joint_hidden_dims", "modalities", "joint_encoder")}


def make_model() -> JMVAE:
    """The model of the runs."""
    config = JMVAEConfig(len(SHAPES), LATENT_DIM, dict(SHAPES))
    return JMVAE(config, networks=multivae_networks(config))


def train(arguments: list[str], processes: int, threads: int = 1, root: Path = ROOT) -> None:
    """Run `jmvae-dist train` as users do.

    Args:
        arguments: Options of `train`, such as `settings` makes.
        processes: Ranks on this machine; several are started by launch/local.sh.
        threads: Of each rank.
        root: The checkout of the program that is to run.
    """
    launcher = [sys.executable, "-m", "jmvae_dist"]
    if processes > 1:
        launcher = ["bash", str(root / "launch" / "local.sh"), str(processes)]
    run_command([*launcher, "train", *arguments], threads, root)


def run_trainer(manifest: Path, threads: int, batch: int, steps: int, processes: int, *more: str) -> float:
    """Samples per second between the first and the last record, whatever happened between them."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train([*settings(manifest, run, steps, batch), *more], processes, threads)
        records = read_records(run)
    first, last = records[0], records[-1]
    return (last["samples_seen"] - first["samples_seen"]) / (last["time_s"] - first["time_s"])


def read_records(run: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def free_port() -> int:
    """A port that nobody uses at the moment, below those that Linux hands out by itself.

    Of those, a connection of another program may take it before rank 0 listens there, or a rank that tries to reach
    rank 0 is given the very same one and meets itself: the others would wait for the ranks for ever.
    """
    while True:
        port = 12_000 + secrets.randbelow(8_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def run_ranks(command: list[str], processes: int) -> Any:
    """Run a script on several ranks of one thread; returns the JSON that rank 0 printed last.

    Without a launcher: benchmarks of parts have no use for torchrun's start.
    """
    port = free_port()
    ranks = []
    for rank in range(processes):
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        numbers = dict(zip(names, map(str, (rank, rank, processes, processes, port)), strict=True))
        variables = {**_environment(1, ROOT), **numbers, "MASTER_ADDR": "127.0.0.1"}
        output = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=variables, text=True, stdout=output))
    printed, _ = ranks[0].communicate()
    codes = [process.wait() for process in ranks]
    if any(codes):
        raise SystemExit(f"{' '.join(command)} failed")
    return json.loads(printed.splitlines()[-1])


def _environment(threads: int, root: Path) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHON": sys.executable,
        # Before whatever is installed: what is measured is the checkout.
        "PYTHONPATH": str(root),
    }


def run_command(command: list[str], threads: int, root: Path = ROOT) -> str:
    """Run it in `root`, on the package that is there; returns what it printed, and ends this process if it fails."""
    variables = _environment(threads, root)
    result = subprocess.run(command, cwd=root, env=variables, text=True, capture_output=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stdout}\n{result.stderr}")
    return result.stdout

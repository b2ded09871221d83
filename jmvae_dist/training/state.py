"""What a run directory holds besides checkpoints and metrics, and what a checkpoint says about its run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import jmvae_dist
from jmvae_dist.checkpoint.layout import CheckpointManifest
from jmvae_dist.config_io import save_run_config
from jmvae_dist.distributed.runtime import Runtime
from jmvae_dist.errors import LaunchError
from jmvae_dist.files import write_text_atomic
from jmvae_dist.training.setup import ResolvedRun

logger = logging.getLogger(__name__)

# What `training.micro_batch_size: auto` has found.
MICRO_BATCH_NAME = "micro_batch.json"
_SCHEDULE_POINTS = 500
_PACKAGES = ("torch", "accelerate", "deepspeed", "numpy", "safetensors", "webdataset", "wandb")


@contextlib.contextmanager
def locked_run_directory(output_dir: Path, runtime: Runtime, doing: str = "training in") -> Iterator[None]:
    """Hold the run directory: two runs that write the same checkpoints would destroy each other's.

    The operating system releases rank 0's lock when that process ends, however it ends.

    Args:
        output_dir: The run directory.
        runtime: Of all ranks.
        doing: What for, as another process is told that "is `doing` it".

    Raises:
        LaunchError: Another process holds it, or the directory cannot be written; on every rank.
    """
    with contextlib.ExitStack() as stack:
        runtime.collectives.on_main(lambda: _lock(output_dir, stack, doing))
        yield


def _lock(output_dir: Path, stack: contextlib.ExitStack, doing: str) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context((output_dir / ".lock").open("a+"))
    except OSError as error:
        raise LaunchError(f"output_dir {output_dir}: cannot be written ({error.strerror})") from None
    try:
        # Not flock: data workers are forked from this process and would hold on to such a lock after its death.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either for a lock that is held
        file.seek(0)
        holder = file.read().strip() or "another process is using it"
        raise LaunchError(f"output_dir {output_dir}: {holder}; wait for its end, or choose another one") from None
    except OSError as error:
        logger.warning("output_dir %s: this file system has no locks (%s)", output_dir, error.strerror)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} is {doing} it\n")
    file.flush()


def describe_environment(runtime: Runtime) -> dict[str, Any]:
    """Software, hardware and topology, as a flat dictionary of JSON values."""
    accelerator = runtime.accelerator
    device = torch.cuda.get_device_name() if runtime.device.type == "cuda" else platform.processor() or "CPU"
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "device": f"{runtime.device} ({device})",
        "cpu_count": os.cpu_count(),
        "threads_per_process": torch.get_num_threads(),
        "launcher": runtime.process.launcher,
        "world_size": runtime.process.world_size,
        "engine": runtime.engine_name,
        "accelerate_type": str(accelerator.distributed_type.value),
        "backend": dist.get_backend() if dist.is_initialized() else "none",
        "precision": runtime.precision,
        **software_versions(),
    }


def software_versions() -> dict[str, str]:
    """Versions of Python, of this package and of those whose behaviour a run depends on."""
    versions = {"python": platform.python_version(), "jmvae_dist": jmvae_dist.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def write_run_files(run: ResolvedRun, runtime: Runtime) -> None:
    """Write `config.yaml`, `environment.json`, `schedule.json` and `micro_batch.json` into the run directory."""
    save_run_config(run.config, run.output_dir / "config.yaml")
    if run.micro_batch:
        write_json(run.output_dir / MICRO_BATCH_NAME, run.micro_batch)
    else:
        (run.output_dir / MICRO_BATCH_NAME).unlink(missing_ok=True)  # of a start with micro_batch_size: auto
    write_json(run.output_dir / "environment.json", describe_environment(runtime))
    stride = max(1, run.total_steps // _SCHEDULE_POINTS)
    # Numbered as in the record: `global_step` g with the values with which the g-th step is taken.
    steps = sorted({*range(1, run.total_steps, stride), run.total_steps})
    schedule = {
        "global_step": steps,
        "annealing": [run.annealing(step - 1) for step in steps],
        "learning_rate": [run.learning_rate(step - 1) for step in steps],
    }
    write_json(run.output_dir / "schedule.json", schedule)


def describe_checkpoint(
    run: ResolvedRun,
    runtime: Runtime,
    global_step: int,
    *,
    settings: dict[str, Any],
    wandb_run_id: str | None,
    elapsed_s: float,
    guards: dict[str, Any],
    passed_over: list[list[int]],
) -> CheckpointManifest:
    """The manifest of a checkpoint, but for tensors, files and optimizer, which its writer fills in."""
    return CheckpointManifest(
        global_step=global_step,
        engine=run.config.training.engine,
        world_size=runtime.process.world_size,
        versions=software_versions(),
        model=run.describe_model(),
        modalities=run.describe_modalities(),
        config=settings,
        data_state=run.plan.state(global_step, run.train_manifest.fingerprint),
        tracking={"wandb_run_id": wandb_run_id},
        optimizer={},
        guards=guards,
        passed_over=passed_over,
        elapsed_s=elapsed_s,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        micro_batch=run.micro_batch,
    )


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; NaN and infinities become strings, as in `metrics.jsonl`."""
    strict = json.loads(json.dumps(value), parse_constant=str)
    write_text_atomic(path, json.dumps(strict, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Content of a JSON file, or None if there is no readable one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None

"""What an attempt ran: code, command line and environment, without secrets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jmvae_dist
from jmvae_dist.files import write_text_atomic
from jmvae_dist.tracking.wandb_process import redact

_GIT_TIMEOUT_S = 30.0
_MAX_PATCH_BYTES = 4 << 20
# Variables that can change what a run does; everything else stays out, as names do not tell what is private.
_RECORDED = re.compile(
    r"(SLURM|SBATCH|SRUN|NCCL|GLOO|CUDA|NVIDIA|ROCR|HIP|OMP|MKL|KMP|OPENBLAS|PYTHON|TORCH|PYTORCH|TRITON|DS|DEEPSPEED"
    r"|ACCELERATE|JMVAE_DIST|WANDB|UCX|FI|MODULE|CONDA|LD)_\w+|PATH|LOADEDMODULES|VIRTUAL_ENV|HOSTNAME|PYTHONPATH"
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CRED|AUTH|COOKIE|JWT", re.IGNORECASE)


def write_provenance(folder: Path, environment: Mapping[str, str]) -> None:
    """Write `code.json`, `code.patch` (changes that are not committed) and `environment.txt` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    code, patch = describe_code()
    write_text_atomic(folder / "code.json", json.dumps(code, indent=2) + "\n")
    if patch:
        write_text_atomic(folder / "code.patch", re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", patch))
    lines = [f"{name}={value}" for name, value in sorted(public_environment(environment).items())]
    write_text_atomic(folder / "environment.txt", "\n".join(lines) + "\n")


def describe_code() -> tuple[dict[str, Any], str]:
    """Version, git commit and command line; and the difference between commit and files, empty without one."""
    root = Path(jmvae_dist.__file__).resolve().parent.parent
    commit = _git(root, "rev-parse", "HEAD").strip() or None
    patch = _git(root, "diff", "--no-color", "--no-ext-diff", "HEAD") if commit else ""
    untracked = _git(root, "ls-files", "--others", "--exclude-standard").splitlines() if commit else []
    is_cut = len(patch.encode()) > _MAX_PATCH_BYTES
    description: dict[str, Any] = {
        "version": jmvae_dist.__version__,
        "git_commit": commit,
        "is_changed": bool(patch),
        "untracked_files": untracked[:100],
        "root": str(root),
        "python": sys.executable,
        "command": redact(sys.argv),
    }
    return description, "too large to keep\n" if is_cut else patch


def public_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that can change what a run does, without those that may hold a secret."""
    return {
        name: redact(value.replace("\n", "\\n"))
        for name, value in environment.items()
        if _RECORDED.fullmatch(name) and not _SECRET.search(name)
    }


def _git(root: Path, *arguments: str) -> str:
    """Output of git; empty where there is no repository, or no git."""
    command = ["git", "-C", str(root), "-c", "safe.directory=*", *arguments]
    try:
        result = subprocess.run(command, capture_output=True, timeout=_GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.decode("utf-8", "replace") if result.returncode == 0 else ""

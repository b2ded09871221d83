"""The settings of a site, `slurm/site.env`, as the batch scripts read them: by the same lines of bash."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jmvae_dist
from jmvae_dist.cluster.resources import Resources
from jmvae_dist.errors import ConfigError

SITE_VARIABLE = "JMVAE_DIST_SITE"
# Job, sha256 and path of the file whose settings this process was started with: set by slurm/common.sh.
SITE_READ_VARIABLE = "JMVAE_DIST_SITE_READ"
_TIMEOUT_S = 120.0  # modules on a busy file system take their time
_MANY_CPUS = "1000000"


@dataclass(frozen=True)
class Site:
    """What applies to jobs at this site.

    Attributes:
        settings: By name, those of `slurm/site.example.env`, defaults included.
        sbatch: `SBATCH_*` variables that are exported, there or in the user's shell.
        file: The file; None without one.
    """

    settings: dict[str, str]
    sbatch: dict[str, str]
    file: Path | None


def repository() -> Path:
    """Where the batch scripts are.

    Raises:
        ConfigError: The package was installed without them.
    """
    root = Path(jmvae_dist.__file__).resolve().parent.parent
    if not (root / "slurm" / "common.sh").is_file():
        raise ConfigError(
            f"{root}/slurm: no batch scripts; install the package from a clone of the repository, with pip install -e"
        )
    return root


def find_site_file() -> Path | None:
    """The file of the site's settings; None without one.

    Raises:
        ConfigError: The package was installed without the batch scripts, and nothing names a file.
    """
    file = Path(os.environ.get(SITE_VARIABLE) or repository() / "slurm" / "site.env")
    return file.absolute() if file.exists() else None


def find_site_read() -> tuple[Path, bool] | None:
    """The file whose settings the job's batch script started this process with, and whether it is still the same.

    None if there was none: a variable of another job, left over in a shell, says nothing of this process. A file that
    cannot be read here counts as the same.
    """
    job, _, rest = os.environ.get(SITE_READ_VARIABLE, "").partition(" ")
    digest, _, path = rest.partition(" ")
    if not path or job != os.environ.get("SLURM_JOB_ID", ""):
        return None
    file = Path(path).absolute()
    try:
        return file, hashlib.sha256(file.read_bytes()).hexdigest() == digest
    except OSError:
        return file, True


def read_site() -> Site:
    """Read the site's settings.

    Raises:
        ConfigError: The file is not sound, or sets what is not known.
    """
    output = _source("print_site")
    values = dict(item.split("=", 1) for item in output.split("\0") if item)
    return Site(
        settings={name: value for name, value in values.items() if not name.startswith("SBATCH_")},
        sbatch={name: value for name, value in values.items() if name.startswith("SBATCH_")},
        file=find_site_file(),
    )


def count_ranks_per_node(site: Site, resources: Resources) -> int:
    """As the batch scripts will count them, but for CPUs, whose number only the node knows.

    Args:
        site: The site's settings.
        resources: What the job asks for; an unknown number of GPUs counts as none.

    Raises:
        ConfigError: It is not a positive number.
    """
    variables = {
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_ON_NODE": _MANY_CPUS,
        "SLURM_GPUS_ON_NODE": str(resources.gpus_per_node or 0),
        "SITE_RANKS_PER_NODE": site.settings["RANKS_PER_NODE"],
    }
    if resources.ntasks_per_node is not None:
        variables["SLURM_NTASKS_PER_NODE"] = str(resources.ntasks_per_node)
    commands = 'RANKS_PER_NODE=$SITE_RANKS_PER_NODE; plan_ranks; printf "%s" "$ranks_per_node"'
    return int(_source(commands, variables))


def find_python_problem() -> str | None:
    """Why a batch script on this machine would not find a Python with this package; None if it would."""
    try:
        _source("read_site >&2; find_python")
    except ConfigError as error:
        return str(error)
    return None


def _source(commands: str, variables: Mapping[str, str] | None = None) -> str:
    """Output of bash commands that know slurm/common.sh."""
    root = repository()
    script = f'set -uo pipefail; root=$1; source "$root/slurm/common.sh"; {commands}'
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    try:
        result = subprocess.run(
            ["bash", "-c", script, "bash", str(root)],
            env={**kept, **(variables or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"slurm/site.env did not come to its end within {_TIMEOUT_S:g} s") from None
    if result.returncode != 0:
        lines = [line.removeprefix("slurm: ") for line in result.stderr.splitlines() if line.strip()]
        raise ConfigError("; ".join(lines[-3:]) or "slurm/site.env ended the shell that read it; it must not exit")
    return result.stdout

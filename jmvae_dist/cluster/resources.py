"""Nodes, GPUs and time that options of sbatch ask for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from jmvae_dist.cluster.scheduler import count_gpus
from jmvae_dist.cluster.script import Directives
from jmvae_dist.errors import ConfigError


@dataclass(frozen=True)
class Resources:
    """What a job asks for, as far as its options say.

    Attributes:
        min_nodes, max_nodes: None if the options leave it to Slurm.
        ntasks_per_node: None if not given.
        gpus_per_node: 0 without GPUs; None if it depends on what Slurm chooses.
    """

    min_nodes: int | None
    max_nodes: int | None
    ntasks_per_node: int | None
    gpus_per_node: int | None

    @classmethod
    def of(cls, directives: Directives) -> Resources:
        """Read them.

        Raises:
            ConfigError: A number is not one.
        """
        first, last = _nodes(directives)
        return cls(first, last, _number(directives, "ntasks-per-node"), _gpus_per_node(directives, first, last))


def _nodes(directives: Directives) -> tuple[int | None, int | None]:
    text = directives.get("nodes")
    if text is None:
        # Slurm takes as few nodes as the tasks, or GPUs, need.
        known = not any(name in directives for name in ("ntasks", "gpus", "nodelist"))
        return (1, 1) if known else (None, None)
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match or not 1 <= int(match[1]) <= int(match[2] or match[1]):
        raise ConfigError(f"--nodes: {text!r} is not a number of nodes, such as 4, or a range, such as 2-4")
    return int(match[1]), int(match[2] or match[1])


def _gpus_per_node(directives: Directives, first: int | None, last: int | None) -> int | None:
    if (text := directives.get("gpus-per-node")) is not None:
        return _count("gpus-per-node", text)
    if count := count_gpus(directives.get("gres") or ""):
        return count
    if (text := directives.get("gpus")) is not None:
        total = _count("gpus", text)
        return total // first if first is not None and first == last and total % first == 0 else None
    if (text := directives.get("gpus-per-task")) is not None:
        tasks = _number(directives, "ntasks-per-node")
        return None if tasks is None else tasks * _count("gpus-per-task", text)
    return 0


def _count(option: str, text: str) -> int:
    """The number at the end of `4` or `a100:4`."""
    tail = text.rpartition(":")[2]
    if not tail.isdigit():
        raise ConfigError(f"--{option}: {text!r} is not a number of GPUs, such as 4 or a100:4")
    return int(tail)


def _number(directives: Directives, option: str) -> int | None:
    text = directives.get(option)
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*", text):
        raise ConfigError(f"--{option}: {text!r} is not a positive number")
    return int(text)


def parse_duration_s(text: str) -> float | None:
    """Seconds of a duration in Slurm's notation; None if it is unlimited, or not a duration.

    Minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        return None
    first, second, third = (int(match[number] or 0) for number in (2, 3, 4))
    if match[1] is not None:
        return int(match[1]) * 86400.0 + first * 3600 + second * 60 + third
    if match[4] is not None:
        return first * 3600.0 + second * 60 + third
    return first * 60.0 + second

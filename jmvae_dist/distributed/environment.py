"""Who am I: rank and world size as the launcher set them, read before any process group exists."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from itertools import product

from jmvae_dist.errors import LaunchError

# From here on Slurm numbers steps that srun did not start as tasks: batch scripts, interactive shells of salloc.
_FIRST_RESERVED_STEP = 0xFFFFFFF0
# Ports 20000..31999 lie below those that Linux hands out by itself. Two jobs on a node get the same one only if
# their numbers differ by a multiple of _JOBS, two steps of a job only if theirs differ by one of _STEPS.
_FIRST_PORT = 20_000
_JOBS = 375
_STEPS = 32
_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
_NODES = r"(?:[^][,\s]|\[[^][\s]+\])+"  # one item of a node list: names, with ranges in brackets


@dataclass(frozen=True)
class ProcessInfo:
    """This process among those of the run."""

    rank: int
    world_size: int
    local_rank: int
    # "torchrun" (or anything else that sets its variables), "accelerate", "deepspeed", "srun" with one task per rank,
    # or "single".
    launcher: str


def detect_process(environment: Mapping[str, str] | None = None) -> ProcessInfo:
    """Read the launcher's variables.

    Raises:
        LaunchError: Some of the launcher's variables are missing or not numbers, or fewer processes were started
            than were asked for, so that each would train alone.
    """
    variables = os.environ if environment is None else environment
    num_tasks = _tasks_of_step(variables)
    # Many batch scripts export WORLD_SIZE, or even RANK, for all tasks; only srun's own numbers tell them apart.
    is_task = num_tasks > 1 and variables.get("WORLD_SIZE", str(num_tasks)) == str(num_tasks)
    if is_task and not _has_agent(variables):
        rank, local_rank = (_integer(variables, name) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
        return ProcessInfo(rank, num_tasks, local_rank, "srun")
    if "RANK" in variables or "WORLD_SIZE" in variables:
        rank, world_size, local_rank = (_integer(variables, n) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if not 0 <= rank < world_size:
            raise LaunchError(f"RANK={rank} does not lie in 0..WORLD_SIZE-1 with WORLD_SIZE={world_size}")
        return ProcessInfo(rank, world_size, local_rank, _agent(variables))
    _refuse_lost_processes(variables)
    return ProcessInfo(rank=0, world_size=1, local_rank=0, launcher="single")


def join_launch(process: ProcessInfo, environment: MutableMapping[str, str] | None = None) -> None:
    """Make this process part of its launch, before any library looks at the environment.

    Among srun's tasks: set the variables that torchrun would have set. Under an agent (torchrun, accelerate,
    deepspeed): end with it.

    Raises:
        LaunchError: Slurm's variables do not say where rank 0 is, or its port is taken.
    """
    variables = os.environ if environment is None else environment
    if process.launcher == "srun":
        variables.update(_rendezvous(process, variables))
        if process.rank == 0:
            _check_port(int(variables["MASTER_PORT"]))
    elif _has_agent(variables) and sys.platform == "linux":
        # An agent that is killed leaves its ranks behind: they would train on with nobody to stop them, and hold the
        # run directory against the next start. The kernel sends them a request to stop instead.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def expand_node_list(text: str) -> list[str]:
    """The hosts of a Slurm node list, in order: `node[01-03,7],login1` is node01, node02, node03, node7, login1.

    Raises:
        LaunchError: `text` is not a node list.
    """
    if not re.fullmatch(f"{_NODES}(?:,{_NODES})*", text):
        raise LaunchError(f"{text!r} is not a Slurm node list such as node[01-03,7],login1; set MASTER_ADDR")
    hosts = []
    for item in re.findall(_NODES, text):
        # Literal parts at even places, contents of brackets at odd ones; several brackets count like digits.
        parts = re.split(r"\[([^]]*)\]", item)
        choices = [_expand_ranges(part, text) if place % 2 else [part] for place, part in enumerate(parts)]
        hosts += ["".join(choice) for choice in product(*choices)]
    return hosts


def _expand_ranges(ranges: str, text: str) -> list[str]:
    """`01-03,7` is 01, 02, 03, 7: numbers are as wide as the first of their range."""
    numbers = []
    for item in ranges.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", item)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(last) < int(first):
            raise LaunchError(f"{text!r} is not a Slurm node list: [{ranges}] has no numbers; set MASTER_ADDR")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _tasks_of_step(variables: Mapping[str, str]) -> int:
    """Number of tasks that srun started together with this process; 1 if srun did not start it.

    A batch script has SLURM_NTASKS and SLURM_PROCID=0 too, but no step. If it was submitted from within a step, it
    has inherited that step's variables: then the two numbers of tasks tend to differ.
    """
    step_id, num_tasks = variables.get("SLURM_STEP_ID", ""), variables.get("SLURM_STEP_NUM_TASKS", "")
    is_step = step_id.isdigit() and int(step_id) < _FIRST_RESERVED_STEP and num_tasks.isdigit()
    return int(num_tasks) if is_step and variables.get("SLURM_NTASKS", num_tasks) == num_tasks else 1


def _has_agent(variables: Mapping[str, str]) -> bool:
    """Whether a process of torchrun, accelerate launch (which runs torchrun inside) or deepspeed watches this one."""
    return "TORCHELASTIC_RUN_ID" in variables or "CROSS_SIZE" in variables


def _agent(variables: Mapping[str, str]) -> str:
    if "ACCELERATE_DYNAMO_MODE" in variables:
        return "accelerate"
    return "deepspeed" if "CROSS_SIZE" in variables else "torchrun"


def _refuse_lost_processes(variables: Mapping[str, str]) -> None:
    """Without a rank this process would train alone: refuse if several were asked for."""
    # Accelerate announces a meeting point only for several processes, but with --cpu, or without a GPU, starts one.
    if "ACCELERATE_DYNAMO_MODE" in variables and "MASTER_ADDR" in variables:
        raise LaunchError(
            "accelerate launch was asked for several processes but started one, as it does with --cpu, use_cpu, or "
            "without a GPU; give it --config_file launch/accelerate/cpu.yaml instead of --cpu, or use "
            "launch/local.sh (for a run with one process: unset MASTER_ADDR)"
        )
    num_tasks = variables.get("SLURM_NTASKS", "1")
    if num_tasks != "1":
        raise LaunchError(
            f"Slurm has SLURM_NTASKS={num_tasks} tasks, but neither srun nor torchrun started this process, so it "
            "would train alone; put srun before the command (one task per rank), start one torchrun per node, or "
            "unset SLURM_NTASKS for a run with one process"
        )


def _rendezvous(process: ProcessInfo, variables: Mapping[str, str]) -> dict[str, str]:
    """The variables of torchrun for one of srun's tasks; MASTER_ADDR and MASTER_PORT that are set stay."""
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
    return {
        "RANK": str(process.rank),
        "WORLD_SIZE": str(process.world_size),
        "LOCAL_RANK": str(process.local_rank),
        # Accelerate divides a node's cores by it, where OMP_NUM_THREADS is not set.
        "LOCAL_WORLD_SIZE": str(_tasks_of_node(variables, process.world_size)),
        # Rank 0 is on the first node of the step.
        "MASTER_ADDR": variables.get("MASTER_ADDR") or expand_node_list(nodes)[0],
        "MASTER_PORT": variables.get("MASTER_PORT") or str(_port_of_step(variables)),
    }


def _tasks_of_node(variables: Mapping[str, str], world_size: int) -> int:
    """This node's entry in a list such as `4(x2),3`; `world_size` if there is none."""
    items = re.findall(r"(\d+)(?:\(x(\d+)\))?", variables.get("SLURM_STEP_TASKS_PER_NODE", ""))
    counts = [int(count) for count, repeats in items for _ in range(int(repeats or 1))]
    node = variables.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else world_size


def _port_of_step(variables: Mapping[str, str]) -> int:
    """The same port in all tasks of a step, without asking anybody.

    A requeued job keeps its number and takes the next port: ranks of the former attempt that live on, on a node that
    was cut off, cannot meet the new ones.
    """
    job_id, step_id = (_integer(variables, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    attempt = variables.get("SLURM_RESTART_COUNT", "0")
    step = step_id + (int(attempt) if attempt.isdigit() else 0)
    return _FIRST_PORT + job_id % _JOBS * _STEPS + step % _STEPS


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the rendezvous itself does
        try:
            probe.bind(("", port))
        except OSError as error:
            raise LaunchError(
                f"port {port} of {socket.gethostname()}, where the ranks would meet: {error.strerror}; "
                "set MASTER_PORT to a free one"
            ) from None


def _integer(variables: Mapping[str, str], name: str) -> int:
    value = variables.get(name)
    if value is None or not value.isdigit():
        expected = "a Slurm step has it as a number"
        if not name.startswith("SLURM_"):
            expected = (
                "the launcher must set RANK, WORLD_SIZE and LOCAL_RANK to numbers (torchrun, accelerate launch and "
                "deepspeed do); unset them for a run with one process"
            )
        raise LaunchError(f"{name}={value!r}: {expected}")
    return int(value)

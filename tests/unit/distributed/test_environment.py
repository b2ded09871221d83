"""Rank and world size from the launcher's variables."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmvae_dist.distributed.environment import ProcessInfo, detect_process, expand_node_list, join_launch
from jmvae_dist.errors import LaunchError

SINGLE = ProcessInfo(rank=0, world_size=1, local_rank=0, launcher="single")
RANK_3 = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
# What a real Slurm 22.05 set for `#SBATCH --nodes=2 --ntasks=4`: in the batch script, and in a task of its srun.
BATCH = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "3,1",
}
TASK = {
    **BATCH,
    "SLURM_LOCALID": "2",
    "SLURM_PROCID": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "3,1",
}
ACCELERATE = {"ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_MIXED_PRECISION": "no"}


def test_single_process() -> None:
    assert detect_process({}) == SINGLE
    assert detect_process({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == SINGLE
    assert detect_process(ACCELERATE) == SINGLE
    assert detect_process({**TASK, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}) == SINGLE


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({"SLURM_NTASKS": "2"}, "torchrun"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        ({"TORCHELASTIC_RUN_ID": "none", **ACCELERATE}, "accelerate"),
        ({"CROSS_SIZE": "1", "CROSS_RANK": "0", "LOCAL_SIZE": "2"}, "deepspeed"),
        # One torchrun per task of a step, as many ranks as tasks.
        ({**TASK, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        # A script of the user's that starts two ranks in each task.
        (TASK, "torchrun"),
    ],
)
def test_launchers_that_set_ranks(variables: dict[str, str], launcher: str) -> None:
    assert detect_process({**variables, **RANK_3}) == ProcessInfo(3, 8, 1, launcher)


@pytest.mark.parametrize("exported", [{}, {"WORLD_SIZE": "4"}, {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}])
def test_srun_tasks(exported: dict[str, str]) -> None:
    """Also with what a batch script exported for all tasks alike."""
    assert detect_process({**TASK, **exported}) == ProcessInfo(rank=2, world_size=4, local_rank=2, launcher="srun")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, "WORLD_SIZE='two'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2"),
        (BATCH, "would train alone; put srun before the command"),
        # The shell of `salloc`: with and without LaunchParameters=use_interactive_step.
        ({"SLURM_NTASKS": "2"}, "would train alone"),
        ({**TASK, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, "would train alone"),
        # sbatch from within `srun --pty bash`: the batch script inherits that step's variables.
        ({**TASK, "SLURM_STEP_NUM_TASKS": "1"}, "would train alone"),
        ({**TASK, "SLURM_PROCID": "first"}, "SLURM_PROCID='first'"),
        ({**ACCELERATE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "several processes but started one"),
    ],
)
def test_half_set_launchers_are_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        detect_process(variables)


def joined(variables: dict[str, str]) -> dict[str, str]:
    """The variables that `join_launch` adds or changes."""
    after = dict(variables)
    join_launch(detect_process(variables), after)
    return {name: value for name, value in after.items() if variables.get(name) != value}


def test_joining_sruns_tasks() -> None:
    published = joined({**TASK, "RANK": "0"})
    port = published.pop("MASTER_PORT")
    assert published == {
        "RANK": "2",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "node1",
    }
    assert joined({**TASK, "SLURM_PROCID": "3", "SLURM_NODEID": "1"})["LOCAL_WORLD_SIZE"] == "1"
    assert joined({**TASK, "SLURM_PROCID": "3"})["MASTER_PORT"] == port
    set_by_user = joined({**TASK, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4711"})
    assert not {"MASTER_ADDR", "MASTER_PORT"} & set_by_user.keys()
    # After joining, the process is still the same one.
    assert detect_process({**TASK, **published}) == detect_process(TASK)


def test_nothing_is_set_for_other_launchers() -> None:
    for variables in ({}, RANK_3, {**RANK_3, **ACCELERATE}):
        assert joined(variables) == {}


def test_ports_of_neighbouring_jobs_steps_and_attempts_differ() -> None:
    def port(job_id: int, step_id: int, attempt: int) -> int:
        variables = {"SLURM_JOB_ID": str(job_id), "SLURM_STEP_ID": str(step_id), "SLURM_RESTART_COUNT": str(attempt)}
        return int(joined({**TASK, **variables})["MASTER_PORT"])

    ports = {port(job_id, step_id, 0) for job_id in range(900, 1275) for step_id in range(32)}
    assert len(ports) == 375 * 32
    assert (min(ports), max(ports)) == (20_000, 31_999)
    assert len({port(900, 0, attempt) for attempt in range(32)}) == 32


def test_a_taken_port_is_refused_by_rank_0() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} of .* set MASTER_PORT to a free one"):
            joined({**TASK, "SLURM_PROCID": "0", "MASTER_PORT": str(port)})


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login1", ["login1"]),
        ("node[01-03,7],login1", ["node01", "node02", "node03", "node7", "login1"]),
        ("n[8-12]", ["n8", "n9", "n10", "n11", "n12"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("gpu-a-[001-002,010],gpu-b.example.org", ["gpu-a-001", "gpu-a-002", "gpu-a-010", "gpu-b.example.org"]),
        ("rack[0-1]node[1-2]", ["rack0node1", "rack0node2", "rack1node1", "rack1node2"]),
        ("n[1,2]-ib,m", ["n1-ib", "n2-ib", "m"]),
    ],
)
def test_node_lists(text: str, hosts: list[str]) -> None:
    """As `scontrol show hostnames` expands them."""
    assert expand_node_list(text) == hosts


NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,5}[a-z-]", fullmatch=True)
RANGES = st.tuples(st.integers(0, 120), st.integers(0, 12), st.integers(1, 4))


@given(st.lists(st.tuples(NAMES, st.lists(RANGES, max_size=3)), min_size=1, max_size=4))
def test_node_lists_are_expanded_in_order(items: list[tuple[str, list[tuple[int, int, int]]]]) -> None:
    texts, hosts = [], []
    for name, ranges in items:
        written = ",".join(f"{first:0{width}d}-{first + more:0{width}d}" for first, more, width in ranges)
        texts.append(f"{name}[{written}]" if ranges else name)
        hosts += [name] if not ranges else []
        hosts += [
            f"{name}{number:0{width}d}" for first, more, width in ranges for number in range(first, first + more + 1)
        ]
    assert expand_node_list(",".join(texts)) == hosts


@pytest.mark.parametrize(
    "text", ["", ",", "a,", ",a", "n[", "n]", "n[]", "n[1-]", "n[-1]", "n[3-1]", "n[a]", "n[1,]", "n[1[2]]", "a b"]
)
def test_other_text_is_no_node_list(text: str) -> None:
    with pytest.raises(LaunchError, match=r"is not a Slurm node list.*set MASTER_ADDR"):
        expand_node_list(text)

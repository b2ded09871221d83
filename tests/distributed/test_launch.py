"""Every launcher starts the same run: the same losses as one process, in the topology that was asked for."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Run, assert_losses_agree, free_port, launch_environment

BIN = Path(sys.executable).parent
# GELU: ReLU's kink can turn a difference in the last bit into a visible one.
SETTINGS = (
    *("--training.steps", "30", "--training.log_every_steps", "1", "--training.device", "cpu"),
    *("--model.networks.activation", "gelu"),
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Run:
    """The run on one process that all others are compared with."""
    run = Run(tmp_path_factory.mktemp("alone") / "run", digits, list(SETTINGS))
    run.train(1)
    return run


def start(command: list[str], variables: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command with its output in a pipe."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**launch_environment(), **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen[str], expect: int = 0) -> list[str]:
    """Wait for all processes, and return what each printed."""
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [expect] * len(processes), "\n".join(outputs)
    return outputs


def by_local_sh(run: Run) -> None:
    finish(run.start(2))


def by_accelerate(run: Run) -> None:
    config = ROOT / "launch" / "accelerate" / "cpu.yaml"
    command = [str(BIN / "accelerate"), "launch", "--config_file", str(config), "--num_processes", "2"]
    # Port 0: a free one.
    finish(start([*command, "--main_process_port", "0", "-m", "jmvae_dist", "train", *run.arguments()]))


def by_deepspeed(run: Run) -> None:
    """Without --no_local_rank, as somebody starts it who does not know of that option."""
    command = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "--module", "jmvae_dist"]
    finish(start([*command, "train", *run.arguments()], {"DS_ACCELERATOR": "cpu"}))


def by_srun(run: Run) -> None:
    """Two plain processes with the variables of a step that srun started."""
    command = [sys.executable, "-m", "jmvae_dist", "train", *run.arguments()]
    job_id = str(random.SystemRandom().randrange(2**20))  # the port follows from it
    finish(*(start(command, srun_variables(rank, "localhost", job_id)) for rank in range(2)))


def srun_variables(rank: int, nodes: str, job_id: str) -> dict[str, str]:
    """What Slurm sets in task `rank` of `srun -n 2` on one node (printed by a real one)."""
    return {
        "SLURM_JOB_ID": job_id,
        "SLURM_JOB_NODELIST": "other[1-2]",
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }


LAUNCHERS: dict[str, Callable[[Run], None]] = {
    "torchrun": by_local_sh,
    "accelerate": by_accelerate,
    "deepspeed": by_deepspeed,
    "srun": by_srun,
}


# The other pairs are left to `-m slow`.
IN_CI = [(launcher, "ddp") for launcher in LAUNCHERS]
PAIRS = [(launcher, engine) for launcher in LAUNCHERS for engine in ("ddp", "zero0", "zero1", "zero2", "zero3")]


@pytest.mark.parametrize(
    ("launcher", "engine"),
    [pair if pair in IN_CI else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS],
)
def test_losses_do_not_depend_on_the_launcher(
    alone: Run, make_run: Callable[..., Run], launcher: str, engine: str
) -> None:
    run = make_run(launcher, *SETTINGS, "--training.engine", engine)
    LAUNCHERS[launcher](run)
    environment = json.loads((run.output_dir / "environment.json").read_text())
    assert (environment["launcher"], environment["world_size"]) == (launcher, 2)
    assert_losses_agree(alone, run, tolerance=1e-5, num_records=30)


def test_accelerate_that_starts_too_few_processes_is_refused(make_run: Callable[..., Run]) -> None:
    command = [str(BIN / "accelerate"), "launch", "--quiet", "--cpu", "--num_processes", "2", "-m", "jmvae_dist"]
    (output,) = finish(start([*command, "train", *make_run("run", *SETTINGS).arguments()]), expect=1)
    assert "jmvae-dist train: accelerate launch was asked for several processes but started one" in output


def test_mistakes_are_said_once_among_sruns_tasks() -> None:
    """Rank 0 says it; the others, which `srun --kill-on-bad-exit` then ends, leave the exit code to it."""
    command = [sys.executable, "-m", "jmvae_dist", "train", "--training.stps", "3"]
    (output,) = finish(start(command, srun_variables(0, "n1", "1")), expect=2)
    assert "training.stps: unknown key" in output
    other = start(command, srun_variables(1, "n1", "1"))
    # Not before it has found the mistake too: an interpreter that is still starting cannot but die of a TERM.
    while not waits_for_signal(other):
        assert other.poll() is None, other.communicate()[0]
        time.sleep(0.01)
    other.terminate()
    assert finish(other) == [""]


def waits_for_signal(process: subprocess.Popen[str]) -> bool:
    """Whether a process sleeps in `sigtimedwait`, as Linux tells."""
    return "sigtimedwait" in Path(f"/proc/{process.pid}/wchan").read_text()


def test_what_one_process_measures_is_not_started_on_several() -> None:
    (output,) = finish(start(["bash", "launch/local.sh", "2", "bench", "kernels"]), expect=2)
    assert output.startswith("usage: bash launch/local.sh N")
    assert '"bench step"' in output


def test_a_mistake_of_one_node_is_said_there() -> None:
    command = [sys.executable, "-m", "jmvae_dist", "train", "--config", "missing_on_this_node.yaml"]
    (output,) = finish(start(command, srun_variables(1, "n1", "1")), expect=2)
    assert "jmvae-dist[rank 1] train: " in output
    assert "missing_on_this_node.yaml" in output

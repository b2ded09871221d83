"""Jobs on a real Slurm: training over nodes, time limits, preemption, cancelling, lost nodes, arrays, chains."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.conftest import Run, assert_losses_agree
from tests.slurm.cluster import Cluster, SlurmRun, processes_with, wait_until

MakeRun = Callable[..., SlurmRun]
LAYOUT = ("--nodes=2", "--ntasks-per-node=1")


def assert_equals(run: SlurmRun, uninterrupted: SlurmRun) -> None:
    """The run came to the same end by the same steps, and left nothing behind."""
    assert run.records() == uninterrupted.records(), run.tail()
    run.assert_every_sample_once_per_epoch()
    run.assert_nothing_is_left()


def test_two_nodes_train_what_one_process_trains(
    cluster: Cluster, make_slurm_run: MakeRun, uninterrupted: SlurmRun, make_run: Callable[..., Run]
) -> None:
    """Two nodes with two ranks each, two nodes with one each, torchrun and a single process."""
    run = make_slurm_run("four_ranks")
    cluster.finish(run.submit("--nodes=2", "--ntasks-per-node=2", "--time=20"))
    environment = json.loads((run.output_dir / "environment.json").read_text())
    assert (environment["launcher"], environment["world_size"]) == ("srun", 4)
    for rank in range(4):
        log = (run.output_dir / "logs" / f"rank-{rank:05d}.log").read_text()
        assert f"rank {rank} of 4 on node{rank // 2 + 1}" in log
    (attempt,) = run.attempts()
    assert attempt["exit_code"] == 0
    recorded = run.output_dir / "slurm" / f"job-{attempt['job_id']}-0" / "environment.txt"
    assert "SLURM_JOB_ID=" in recorded.read_text()
    run.assert_every_sample_once_per_epoch()
    run.assert_nothing_is_left()
    others: list[Run] = [uninterrupted]
    for name, num_processes in (("alone", 1), ("torchrun", 2)):
        others.append(make_run(name, *run.overrides))
        others[-1].train(num_processes)
    for other in others:
        assert_losses_agree(run, other, tolerance=1e-5, num_records=36)


def test_a_job_that_reaches_its_time_limit_comes_back(
    cluster: Cluster, make_slurm_run: MakeRun, uninterrupted: SlurmRun
) -> None:
    run = make_slurm_run("limited")
    run.environment()
    run.set_pace(2.0)
    job = run.submit(*LAYOUT, "--time=1", "--signal=B:USR1@60")
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", "a requeue")
    run.set_pace(0.0)
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    cluster.finish(job)
    assert [attempt["reason"] for attempt in run.attempts()] == ["stopped before the time limit", "complete"]
    assert_equals(run, uninterrupted)


def test_a_preempted_job_comes_back(cluster: Cluster, make_slurm_run: MakeRun, uninterrupted: SlurmRun) -> None:
    run = make_slurm_run("preempted")
    run.environment()
    run.set_pace(0.5)
    job = run.submit(*LAYOUT, "--time=20")
    run.wait_for_step(3)
    cluster.preempt_all()
    run.set_pace(0.0)
    cluster.finish(job)
    assert [attempt["reason"] for attempt in run.attempts()] == ["preempted", "complete"]
    assert_equals(run, uninterrupted)


def test_a_cancelled_job_stays_cancelled_and_goes_on_when_submitted_again(
    cluster: Cluster, make_slurm_run: MakeRun, uninterrupted: SlurmRun
) -> None:
    run = make_slurm_run("cancelled")
    run.environment()
    run.set_pace(0.3)
    job = run.submit(*LAYOUT, "--time=20")
    run.wait_for_step(3)
    cluster.ask("scancel", job)
    cluster.finish(job, "CANCELLED")
    assert cluster.job(job)["Restarts"] == "0"
    (attempt,) = run.attempts()
    assert attempt["reason"] == "cancelled, with a checkpoint"
    assert attempt["end_step"] >= 3
    run.assert_nothing_is_left()
    run.set_pace(0.0)
    # On fewer nodes: it is the number of ranks that the last bits depend on.
    cluster.finish(run.submit("--nodes=1", "--ntasks-per-node=2", "--time=20"))
    assert len(nodes_of(run)) == 1
    assert_equals(run, uninterrupted)


def test_a_job_that_only_ever_stops_gives_up(cluster: Cluster, make_slurm_run: MakeRun) -> None:
    """Say, because its time limit is too short even for the start."""
    run = make_slurm_run("fruitless", site=["MAX_ATTEMPTS_WITHOUT_PROGRESS=2"])
    job = run.submit("--nodes=1", "--time=20")
    for restarts in ("0", "1"):
        wait_until(lambda restarts=restarts: cluster.job(job)["Restarts"] == restarts, f"attempt {restarts}")
        cluster.wait_for_state(job, "RUNNING")
        cluster.ask("scancel", "--batch", "--signal=USR1", job)
    cluster.finish(job, "FAILED")
    first, second = (attempt["reason"] for attempt in run.attempts())
    assert first == "stopped before the time limit"
    assert second == "stopped before the time limit; not requeued: 2 attempts without a new checkpoint"
    assert not (run.output_dir / "checkpoints" / "LATEST").exists()
    run.assert_nothing_is_left()


def test_a_job_whose_rank_crashes_comes_back_where_it_may(
    cluster: Cluster, make_slurm_run: MakeRun, uninterrupted: SlurmRun
) -> None:
    run = make_slurm_run("killed", site=["REQUEUE_FAILED=yes"])
    run.environment()
    run.set_pace(0.5)
    job = run.submit(*LAYOUT, "--time=20")
    wait_until(run.checkpoint(10).is_dir, "a checkpoint")
    run.kill_rank(1)
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", "a requeue")
    run.set_pace(0.0)
    cluster.finish(job)
    assert [attempt["reason"] for attempt in run.attempts()] == ["failed (exit code 137)", "complete"]
    assert_equals(run, uninterrupted)


def test_a_job_whose_node_crashes_goes_on_without_it(
    cluster: Cluster, make_slurm_run: MakeRun, uninterrupted: SlurmRun
) -> None:
    run = make_slurm_run("crashed", site=["EXCLUDE_FAILED_NODES=yes"])
    run.environment()
    run.set_pace(0.5)
    job = run.submit(*LAYOUT, "--time=20")
    wait_until(run.checkpoint(10).is_dir, "a checkpoint")
    _, second = nodes_of(run)
    cluster.mini_slurm("crash", second)
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", "Slurm's requeue")
    run.set_pace(0.0)
    cluster.finish(job)
    lost, complete = run.attempts()
    assert lost["reason"] == f"Slurm has requeued the job; failed nodes: {second}"
    assert cluster.job(job)["ExcNodeList"] == second
    assert complete["begin_step"] >= 10
    assert second not in complete["nodes"]
    assert_equals(run, uninterrupted)


def test_a_job_whose_node_is_cut_off_goes_on(
    cluster: Cluster, make_slurm_run: MakeRun, uninterrupted: SlurmRun
) -> None:
    run = make_slurm_run("cut")
    run.environment()
    run.set_pace(0.5)
    job = run.submit(*LAYOUT, "--time=20")
    wait_until(run.checkpoint(10).is_dir, "a checkpoint")
    _, second = nodes_of(run)
    cluster.mini_slurm("cut", second)
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", "Slurm's requeue")
    run.set_pace(0.0)
    cluster.finish(job)
    cluster.mini_slurm("mend", second)
    wait_until(lambda: not processes_with(str(run.output_dir)), "Slurm has ended what lived on", 90)
    assert run.attempts()[-1]["reason"] == "complete"
    assert second not in run.attempts()[-1]["nodes"]
    assert_equals(run, uninterrupted)


def nodes_of(run: SlurmRun) -> list[str]:
    """Hosts of the newest attempt."""
    lines = (run.output_dir / "slurm" / "attempts.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["nodes"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["CONTAINER='apptainer exec"], "is not sound"),
        (["PYTHN=/usr/bin/python3"], "unknown setting PYTHN"),
        (["RANKS_PER_NODE=many"], "RANKS_PER_NODE='many' must be a positive number"),
        (["RANKS_PER_NODE=400"], "400 ranks per node on"),
        (["PYTHON=/usr/bin/no-such-python"], "set PYTHON"),
        (["module load no-such-module"], "failed at"),
        (["EXCLUDE_FAILED_NODES=perhaps"], "must be yes or no"),
    ],
    ids=["cut-off", "misspelled", "not-a-number", "too-many-ranks", "no-python", "failing-command", "bad-choice"],
)
def test_a_torn_site_configuration_ends_the_job_at_once(
    cluster: Cluster, make_slurm_run: MakeRun, lines: list[str], expected: str
) -> None:
    run = make_slurm_run("torn", site=lines)
    job = run.submit(*LAYOUT, "--time=20")
    cluster.finish(job, "FAILED")
    assert expected in run.log.read_text()
    assert cluster.job(job)["Restarts"] == "0"
    assert not run.output_dir.exists()

"""Jobs that belong together on a real Slurm: sweeps, evaluations after trainings, and looking before leaping."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable

from tests.conftest import Run
from tests.slurm.cluster import Cluster, SlurmRun, wait_until

MakeRun = Callable[..., SlurmRun]
STEPS = ("--training.steps", "12", "--training.log_every_steps", "1", "--checkpoint.every_steps", "5")


def program(cluster: Cluster, run: SlurmRun, *arguments: str) -> str:
    """Output of `jmvae-dist` with Slurm's commands at hand, which must succeed."""
    result = cluster.command(sys.executable, "-m", "jmvae_dist", *arguments, more=run.environment())
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_sweep_trains_every_row_once(
    cluster: Cluster, make_slurm_run: MakeRun, make_run: Callable[..., Run]
) -> None:
    """Throttled; a row that is preempted comes back alone; what is complete is not done again."""
    sweep = make_slurm_run("sweep", "--training.steps", "24")
    sweep.environment()
    table = sweep.audit_dir / "table.tsv"
    table.write_text("name\tschedule.learning_rate.peak\nslow\t1e-4\nmiddle\t1e-3\nfast\t1e-2\n")
    sweep.set_pace(0.5)
    words = [*sweep.sbatch_arguments()[:1], str(table), *sweep.sbatch_arguments()[1:]]
    options = ("--array=1-3%2", "--nodes=1", "--time=20", f"--output={sweep.audit_dir}/row-%a.out")
    job = sweep.submit(*options, script="sweep.sbatch", arguments=words)
    tasks = [f"{job}_{number}" for number in (1, 2, 3)]
    wait_until(lambda: states(cluster, tasks[:2]) == ["RUNNING", "RUNNING"], "two rows at work")
    assert states(cluster, tasks[2:]) == ["PENDING"]  # although there is a third node
    # The last task carries the number of the whole array: of all tasks it alone must be requeued.
    wait_until(lambda: (sweep.audit_dir / "task-3" / "rank-0.jsonl").exists(), "the last row's first step")
    cluster.ask("scancel", "--batch", "--signal=USR1", tasks[2])
    attempts = sweep.output_dir / "fast" / "slurm" / "attempts.jsonl"
    wait_until(lambda: '"requeued": true' in attempts.read_text(), "its requeue")
    sweep.set_pace(0.0)
    wait_until(lambda: cluster.ask("squeue", "-h", "-j", job) == "", "the end of all rows")
    assert [cluster.job(task)["Restarts"] for task in tasks] == ["0", "0", "1"]
    rows = list(csv.DictReader((sweep.output_dir / "sweep.tsv").open(), delimiter="\t"))
    names = ("slow", "middle", "fast")
    assert [(row["name"], row["state"], row["step"]) for row in rows] == [(name, "complete", "24") for name in names]
    again = sweep.submit(*options, script="sweep.sbatch", arguments=words)
    wait_until(lambda: cluster.ask("squeue", "-h", "-j", again) == "", "the end of nothing to do")
    assert states(cluster, [f"{again}_{number}" for number in (1, 2, 3)]) == ["COMPLETED"] * 3
    for number, (name, peak) in enumerate(zip(names, ("1e-4", "1e-3", "1e-2"), strict=True), start=1):
        alone = make_run(f"{name}-alone", *sweep.overrides, "--schedule.learning_rate.peak", peak)
        alone.train()
        assert Run(sweep.output_dir / name, sweep.digits, []).records() == alone.records()
        sweep.assert_every_sample_once_per_epoch(sweep.audit_dir / f"task-{number}")
    sweep.assert_nothing_is_left()


def states(cluster: Cluster, jobs: list[str]) -> list[str]:
    """What `scontrol show job` calls the states of the jobs."""
    return [cluster.job(job)["JobState"] for job in jobs]


def test_an_evaluation_follows_its_training(cluster: Cluster, make_slurm_run: MakeRun) -> None:
    """It is preempted, and comes back."""
    run = make_slurm_run("trained", *STEPS)
    run.environment()
    pace = run.audit_dir / "evaluation-pace"
    pace.write_text("60")
    manifest = str(run.digits / "test" / "manifest.json")
    options = ("--nodes", "2", "--ntasks-per-node", "2", "--time", "20")
    submitted = program(cluster, run, "slurm", "submit", *options, "--evaluate", manifest, "--", *run.arguments())
    training, evaluation = [line.split()[2].rstrip(",") for line in submitted.splitlines() if "submitted job" in line]
    cluster.finish(training)
    wait_until((run.output_dir / "logs" / "evaluate-rank-00003.log").exists, "the evaluation's ranks")
    pace.write_text("0")
    cluster.preempt_all()
    cluster.finish(evaluation)
    assert cluster.job(evaluation)["Restarts"] == "1"
    (path,) = run.output_dir.glob("evaluation-*.json")
    assert json.loads(path.read_text())["num_samples"] == 359
    status = json.loads(program(cluster, run, "slurm", "status", str(run.output_dir), "--json"))
    assert status["progress"]["step"] == 12
    assert [attempt["job_id"] for attempt in status["attempts"]] == [training]
    assert status["time"]["seconds"]["productive"] > 0
    run.assert_nothing_is_left()


def test_an_evaluation_of_a_training_that_failed_says_why_there_is_nothing(
    cluster: Cluster, make_slurm_run: MakeRun
) -> None:
    run = make_slurm_run("failing", *STEPS, "--data.lanes", "2")
    manifest = str(run.digits / "test" / "manifest.json")
    training = run.submit("--nodes=2", "--ntasks-per-node=2", "--time=20")  # 4 ranks cannot share 2 lanes
    words = [str(run.audit_dir), "--manifest", manifest]
    output = f"--output={run.audit_dir}/evaluation.out"
    only_after_success = run.submit(
        f"--dependency=afterok:{training}", output, script="evaluate.sbatch", arguments=words
    )
    in_any_case = run.submit(f"--dependency=afterany:{training}", output, script="evaluate.sbatch", arguments=words)
    cluster.finish(training, "FAILED")
    assert "2 lanes cannot be shared by 4 processes" in run.log.read_text()
    cluster.finish(in_any_case, "FAILED")
    assert "has no checkpoint yet" in (run.audit_dir / "evaluation.out").read_text()
    cluster.finish(only_after_success, "CANCELLED")


def test_the_doctor_sees_every_rank_of_an_allocation(cluster: Cluster, make_slurm_run: MakeRun) -> None:
    run = make_slurm_run("examined", *STEPS, site=["INTERFACE=eth0"])
    words = [*run.sbatch_arguments(), "--json", f"{run.audit_dir}/doctor.json"]
    options = ("--nodes=2", "--ntasks-per-node=2")
    cluster.finish(run.submit(*options, script="doctor.sbatch", arguments=words))
    said = " ".join(run.log.read_text().split())
    assert "GLOO_SOCKET_IFNAME eth0" in said
    assert "started with the settings of" in said
    examined = json.loads((run.audit_dir / "doctor.json").read_text())
    assert (examined["world_size"], examined["counts"]["fail"]) == (4, 0)

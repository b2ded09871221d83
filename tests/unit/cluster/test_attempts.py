"""When a job goes back to the queue, when it gives up, and what is kept of attempts that were lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from jmvae_dist.cluster.attempts import Attempt, begin_attempt, current_job_id, end_attempt, read_attempts
from jmvae_dist.errors import LaunchError
from tests.unit.checkpoint.test_fragments import make_manifest

NODES = (
    "NodeName=node1 State=IDLE SlurmdStartTime=2020-01-01T00:00:00\n"
    "NodeName=node2 State=DOWN* SlurmdStartTime=2020-01-01T00:00:00\n"
    "NodeName=node3 State=IDLE SlurmdStartTime=2100-01-01T00:00:00\n"
)


@pytest.fixture(autouse=True)
def _no_real_slurm(fake_command: Callable[..., Path]) -> None:
    fake_command("scontrol")


def begin(run_dir: Path, job_id: str = "7", restart: int = 0, max_attempts: int = 3) -> Attempt:
    variables = {"SLURM_JOB_ID": job_id, "SLURM_JOB_NODELIST": "node[1-3]"}
    if restart:
        variables["SLURM_RESTART_COUNT"] = str(restart)
    return begin_attempt(run_dir, max_attempts=max_attempts, environment=variables)


def end(
    run_dir: Path,
    exit_code: int,
    *,
    usr1: bool = False,
    term: bool = False,
    max_attempts: int = 3,
    requeues_failures: bool = False,
    job_id: str = "7",
    **state: str,
) -> Attempt:
    restarts = [attempt.restart for attempt in read_attempts(run_dir) if attempt.job_id == job_id]
    return end_attempt(
        run_dir,
        exit_code=exit_code,
        max_attempts=max_attempts,
        got_usr1=usr1,
        got_term=term,
        job_state=state,
        requeues_failures=requeues_failures,
        environment={"SLURM_JOB_ID": job_id, "SLURM_RESTART_COUNT": str(restarts[-1]) if restarts else ""},
    )


def checkpoint(run_dir: Path, step: int, rewinds: int = 0) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    manifest = make_manifest(global_step=step, passed_over=[[70, 80]] * rewinds)
    (folder / "manifest.json").write_text(manifest.to_json())


@pytest.mark.parametrize(
    ("exit_code", "signals", "state", "requeued", "reason"),
    [
        (75, {"usr1": True}, {}, True, "stopped before the time limit"),
        (75, {"usr1": True, "term": True}, {}, True, "stopped before the time limit"),
        (75, {"usr1": True}, {"PreemptTime": "None"}, True, "stopped before the time limit"),
        (75, {"term": True}, {"PreemptTime": "2026-01-01T00:00:00"}, True, "preempted"),
        (75, {}, {"PreemptTime": "2026-01-01T00:00:00"}, True, "preempted"),
        (75, {"usr1": True, "term": True}, {"JobState": "COMPLETING", "Reason": "None"}, False, "cancelled"),
        (75, {"usr1": True, "term": True}, {"JobState": "COMPLETING", "Reason": "TimeLimit"}, True, "stopped before"),
        (75, {"usr1": True, "term": True}, {"JobState": "COMPLETING", "Restarts": "1"}, False, "Slurm has requeued"),
        (75, {"term": True}, {}, False, "cancelled, without a new checkpoint"),
        (138, {"usr1": True}, {}, True, "stopped before the time limit, while the ranks still started"),
        (138, {}, {}, False, "failed (exit code 138)"),
        (143, {}, {"PreemptTime": "2026-01-01T00:00:00"}, True, "preempted, while the ranks still started"),
        (137, {}, {}, False, "failed (exit code 137)"),
        (75, {}, {}, False, "stopped on request"),
        (0, {"usr1": True}, {}, False, "complete"),
        (0, {}, {}, False, "complete"),
        (1, {"usr1": True}, {}, False, "failed (exit code 1)"),
        (1, {"usr1": True}, {"PreemptTime": "2026-01-01T00:00:00"}, False, "failed (exit code 1)"),
        (2, {}, {}, False, "failed (exit code 2)"),
        (143, {"term": True}, {}, False, "ended by Slurm"),
        (143, {}, {"JobState": "PENDING", "Restarts": "1"}, False, "Slurm has requeued the job"),
    ],
)
def test_which_end_brings_the_job_back(
    tmp_path: Path,
    exit_code: int,
    signals: dict[str, bool],
    state: dict[str, str],
    requeued: bool,
    reason: str,
) -> None:
    """Only a stop that Slurm asked for, and that left exit code 75; `scancel` sends TERM and stays final."""
    begin(tmp_path)
    ended = end(tmp_path, exit_code, **signals, **state)
    assert ended.requeued is requeued
    assert ended.reason.startswith(reason)
    assert read_attempts(tmp_path) == [ended]


@pytest.mark.parametrize(
    ("exit_code", "signals", "state", "requeued"),
    [
        (1, {}, {}, True),
        (137, {}, {"JobState": "RUNNING"}, True),
        (1, {"usr1": True}, {}, True),
        (1, {"usr1": True}, {"PreemptTime": "2026-01-01T00:00:00"}, True),
        (2, {}, {}, False),
        (0, {}, {}, False),
        (75, {}, {}, False),
        (1, {"term": True}, {}, False),
        (1, {}, {"JobState": "CANCELLED"}, False),
        (1, {}, {"JobState": "PENDING", "Restarts": "1"}, False),
    ],
)
def test_which_failures_bring_the_job_back_where_they_may(
    tmp_path: Path, exit_code: int, signals: dict[str, bool], state: dict[str, str], requeued: bool
) -> None:
    begin(tmp_path)
    assert end(tmp_path, exit_code, requeues_failures=True, **signals, **state).requeued is requeued


def test_a_job_that_slurm_may_not_requeue_is_not_said_to_come_back(tmp_path: Path) -> None:
    begin(tmp_path)
    ended = end(tmp_path, 75, usr1=True, Requeue="0")
    assert (ended.requeued, ended.reason) == (
        False,
        "stopped before the time limit; not requeued: Slurm may not (Requeue=0)",
    )
    begin(tmp_path, restart=1)
    assert end(tmp_path, 75, usr1=True, Requeue="1").requeued


def test_failures_without_a_new_checkpoint_are_counted(tmp_path: Path) -> None:
    for restart, (step, requeued) in enumerate([(4, True), (4, True), (8, True), (8, True), (8, False)]):
        begin(tmp_path, restart=restart, max_attempts=2)
        checkpoint(tmp_path, step)
        ended = end(tmp_path, 1, max_attempts=2, requeues_failures=True)
        assert (ended.requeued, ended.begin_step < ended.end_step) == (requeued, restart in (0, 2))
    assert ended.reason == "failed (exit code 1); not requeued: 2 attempts without a new checkpoint"


def test_attempts_without_a_new_checkpoint_are_counted(tmp_path: Path) -> None:
    """The last one that is allowed is not requeued, and the job may not begin again; another one may."""
    for restart in range(3):
        begin(tmp_path, restart=restart)
        ended = end(tmp_path, 75, usr1=True)
        assert ended.requeued is (restart < 2)
    assert "not requeued: 3 attempts" in ended.reason
    with pytest.raises(LaunchError, match="3 attempts of job 7 in a row have left no checkpoint after the beginning"):
        begin(tmp_path, restart=3)
    assert len(read_attempts(tmp_path)) == 3
    begin(tmp_path, job_id="8")
    assert end(tmp_path, 75, usr1=True, job_id="8").requeued


def test_an_old_number_is_another_job(tmp_path: Path) -> None:
    """Slurm counts jobs anew when its state is lost; what is left of a former job 7 must not end this one."""
    for restart in range(3):
        begin(tmp_path, restart=restart)
        end(tmp_path, 75, usr1=True)
    begin(tmp_path)
    assert end(tmp_path, 75, usr1=True).requeued


def test_a_second_job_leaves_the_first_alone(tmp_path: Path, fake_command: Callable[..., Path]) -> None:
    """It is refused, and the first one still goes back to the queue."""
    first = begin(tmp_path)
    fake_command("scontrol", prints="JobId=7 JobState=RUNNING StartTime=2020-01-01T00:00:00")
    with pytest.raises(LaunchError, match=r"job 7 is training in it on node1.*afterany:7"):
        begin(tmp_path, job_id="8")
    assert read_attempts(tmp_path) == [first]
    with pytest.raises(LaunchError, match="no attempt of job 8 has begun"):
        end(tmp_path, 1, job_id="8")
    assert end(tmp_path, 75, usr1=True).requeued


def test_a_job_that_began_anew_elsewhere_has_lost_its_attempt(
    tmp_path: Path, fake_command: Callable[..., Path]
) -> None:
    begin(tmp_path)
    fake_command("scontrol", prints="JobId=7 JobState=RUNNING StartTime=2100-01-01T00:00:00")
    begin(tmp_path, job_id="8")
    assert [attempt.reason for attempt in read_attempts(tmp_path)] == ["lost, killed or its first node failed", ""]


def test_an_attempt_taken_for_lost_still_has_its_end(tmp_path: Path) -> None:
    """The scheduler could not say that the first job was running when another one began."""
    begin(tmp_path)
    begin(tmp_path, job_id="8")
    assert [attempt.has_ended for attempt in read_attempts(tmp_path)] == [True, False]
    assert end(tmp_path, 75, usr1=True).requeued
    end(tmp_path, 0, job_id="8")
    assert [(attempt.job_id, attempt.exit_code) for attempt in read_attempts(tmp_path)] == [("7", 75), ("8", 0)]


def test_a_new_checkpoint_starts_the_count_anew(tmp_path: Path) -> None:
    for restart in range(6):
        begin(tmp_path, restart=restart, max_attempts=2)
        checkpoint(tmp_path, 10 * (restart // 2 + 1))  # by every other attempt
        assert end(tmp_path, 75, usr1=True, max_attempts=2).requeued
    steps = [(attempt.begin_step, attempt.end_step) for attempt in read_attempts(tmp_path)]
    assert steps == [(-1, 10), (10, 10), (10, 20), (20, 20), (20, 30), (30, 30)]


def test_a_checkpoint_after_a_rewind_is_progress_at_a_lower_step(tmp_path: Path) -> None:
    """Whether the attempt that went back noted its own end, or was lost."""
    cases = [(60, 0, False), (50, 1, False), (40, 2, True), (30, 3, False)]
    for restart, (step, rewinds, is_lost) in enumerate(cases):
        begin(tmp_path, restart=restart, max_attempts=1)
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        checkpoint(tmp_path, step, rewinds)
        if not is_lost:
            assert end(tmp_path, 75, usr1=True, max_attempts=1).requeued
    begin(tmp_path, restart=4, max_attempts=1)
    assert not end(tmp_path, 75, usr1=True, max_attempts=1).requeued


# How far each attempt of a job left the run, as (rewinds, step), and how many may be without progress: 3.
HISTORIES = {
    "always further": ([(0, 10), (0, 20), (0, 30), (0, 40), (0, 50)], None),
    "a step written again after a rewind": ([(0, 20), (0, 10), (0, 20), (0, 10), (0, 20)], 3),
    "a rewind made again": ([(0, 20), (1, 10), (0, 20), (1, 10), (0, 20)], 4),
    "always another rewind": ([(0, 20), (1, 10), (2, 10), (3, 10), (4, 10)], None),
    "one step further each third time": ([(0, 20), (0, 10), (0, 20), (0, 21), (0, 10), (0, 21), (0, 22)], None),
    "none": ([(0, -1), (0, -1), (0, -1)], 2),
}


@pytest.mark.parametrize("history", HISTORIES)
def test_progress_is_what_is_beyond_all_earlier_attempts(tmp_path: Path, history: str) -> None:
    """Each begins where the former one ended: compared with that alone, every second one would be further."""
    ends, last = HISTORIES[history]
    for restart, (rewinds, step) in enumerate(ends):
        begin(tmp_path, restart=restart)
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        if step >= 0:
            checkpoint(tmp_path, step, rewinds)
        assert end(tmp_path, 75, usr1=True).requeued is (restart != last)
        if restart == last:
            break
    if last is not None:
        after = "the beginning" if ends[0][1] < 0 else f"step {max(ends[: last + 1])[1]}"
        with pytest.raises(LaunchError, match=f"3 attempts of job 7 in a row have left no checkpoint after {after}"):
            begin(tmp_path, restart=last + 1)
    begin(tmp_path, job_id="8")  # counts anew, from the checkpoint that it finds
    assert end(tmp_path, 75, usr1=True, job_id="8").requeued


def test_a_lost_attempt_is_closed_by_the_next(tmp_path: Path, fake_command: Callable[..., Path]) -> None:
    """Its nodes are looked at: one that is down, or has started anew since, has failed it."""
    begin(tmp_path)
    checkpoint(tmp_path, 40)
    fake_command("scontrol", prints=NODES)
    begin(tmp_path, restart=1)
    lost, running = read_attempts(tmp_path)
    assert lost.has_ended
    assert (lost.begin_step, lost.end_step, lost.exit_code) == (-1, 40, None)
    assert lost.failed_nodes == ("node2", "node3")
    assert lost.reason == "lost; failed nodes: node2, node3"
    assert not running.has_ended
    assert (running.restart, running.begin_step, running.nodes) == (1, 40, ["node1", "node2", "node3"])


def test_failed_nodes_are_named_at_the_end(tmp_path: Path, fake_command: Callable[..., Path]) -> None:
    begin(tmp_path)
    fake_command("scontrol", prints=NODES)
    ended = end(tmp_path, 1)
    assert ended.failed_nodes == ("node2", "node3")
    assert ended.reason == "failed (exit code 1); failed nodes: node2, node3"


def test_nothing_has_failed_an_attempt_that_ended_well(tmp_path: Path, fake_command: Callable[..., Path]) -> None:
    """A node's service is started anew for many reasons; only with a failure does it tell something."""
    begin(tmp_path)
    fake_command("scontrol", prints=NODES)
    assert end(tmp_path, 0).failed_nodes == ()


def test_lost_attempts_count_too(tmp_path: Path) -> None:
    """A job that kills its node, and is requeued by Slurm, must not do so for ever."""
    for restart in range(3):
        begin(tmp_path, restart=restart)
    with pytest.raises(LaunchError, match="giving up"):
        begin(tmp_path, restart=3)
    assert [attempt.has_ended for attempt in read_attempts(tmp_path)] == [True] * 3


def test_a_scheduler_that_does_not_answer_ends_nothing(tmp_path: Path, fake_command: Callable[..., Path]) -> None:
    fake_command("scontrol", exit_code=1)
    begin(tmp_path)
    assert end(tmp_path, 75, usr1=True).requeued


def test_a_torn_line_costs_nothing_but_itself(tmp_path: Path) -> None:
    begin(tmp_path)
    end(tmp_path, 75, usr1=True)
    path = tmp_path / "slurm" / "attempts.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 3])  # killed while it wrote
    begin(tmp_path, restart=1)
    end(tmp_path, 0)
    attempts = read_attempts(tmp_path)
    assert [attempt.restart for attempt in attempts] == [0, 1]
    assert [attempt.exit_code for attempt in attempts] == [75, 0]


@pytest.mark.parametrize("line", ["[]", "null", "{}", '{"event": "end"}', '{"event": "end", "failed_nodes": 3}', "x"])
def test_lines_that_are_not_ours_are_left_out(tmp_path: Path, line: str) -> None:
    begin(tmp_path)
    path = tmp_path / "slurm" / "attempts.jsonl"
    path.write_text(line + "\n" + path.read_text())
    assert len(read_attempts(tmp_path)) == 1


def test_fields_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    begin(tmp_path)
    ended = end(tmp_path, 75, usr1=True)
    path = tmp_path / "slurm" / "attempts.jsonl"
    lines = [json.loads(line) | {"begin_weather": "fair"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_attempts(tmp_path) == [ended]


def test_an_end_needs_a_beginning(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="no attempt of job 7 has begun"):
        end(tmp_path, 0)
    begin(tmp_path)
    end(tmp_path, 0)
    with pytest.raises(LaunchError, match="no attempt of job 7 has begun"):
        end(tmp_path, 0)


@pytest.mark.parametrize(
    ("variables", "job_id"),
    [
        ({"SLURM_JOB_ID": "9"}, "9"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "12"}, "9_12"),
        ({"SLURM_JOB_ID": "11", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "2"}, "9_2"),
    ],
)
def test_a_task_of_an_array_is_named_by_array_and_number(variables: dict[str, str], job_id: str) -> None:
    """The last task has the array's own number: `scontrol requeue 9` would mean all of them."""
    assert current_job_id(variables) == job_id


def test_outside_a_job_is_said(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="SLURM_JOB_ID is not set"):
        begin_attempt(tmp_path, max_attempts=3, environment={})
    assert not (tmp_path / "slurm").exists()


def test_a_damaged_checkpoint_is_no_progress(tmp_path: Path) -> None:
    """Whoever goes on from there goes on from the one before it."""
    checkpoint(tmp_path, 20)
    begin(tmp_path)
    checkpoint(tmp_path, 30)
    (tmp_path / "checkpoints" / "step-00000030" / "manifest.json").write_text("{")
    ended = end(tmp_path, 75, usr1=True)
    assert (ended.begin_progress, ended.end_progress) == ((0, 20), (0, 20))

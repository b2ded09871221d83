"""`jmvae-dist slurm render|submit|status` with stand-ins for Slurm's commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jmvae_dist.cluster.scheduler import gpus_of_partition
from jmvae_dist.cluster.script import read_directives
from jmvae_dist.cluster.submission import Request, evaluation_after, make_job
from jmvae_dist.commands.slurm import main
from jmvae_dist.errors import ConfigError, LaunchError
from tests.conftest import ROOT

Fake = Callable[..., Path]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty site.env, in place of one that the repository may have."""
    path = tmp_path / "site.env"
    path.touch()
    monkeypatch.setenv("JMVAE_DIST_SITE", str(path))
    for name in ("SBATCH_PARTITION", "SBATCH_TIMELIMIT"):
        monkeypatch.delenv(name, raising=False)
    return path


@pytest.fixture
def training(tmp_path: Path, digits: Path) -> list[str]:
    """What comes after `--`."""
    return [
        *("--", str(ROOT / "configs" / "digits.yaml")),
        *("--output_dir", str(tmp_path / "runs" / "x")),
        *("--data.train_manifest", str(digits / "train" / "manifest.json"), "--data.eval_manifest", "null"),
    ]


@pytest.fixture
def slurm(fake_command: Fake, site: Path) -> Path:
    """Commands of an idle cluster; returns the file with the calls of sbatch."""
    fake_command("squeue")
    fake_command("scontrol")
    fake_command("sinfo", prints="main*|(null)\n")
    return fake_command("sbatch", prints="41")


def rendered(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]) -> tuple[dict, str, str]:
    """Options of the header, the script, and what was said about it."""
    assert main(["render", *arguments]) == 0
    output = capsys.readouterr()
    (tmp_path / "script").write_text(output.out)
    return read_directives(tmp_path / "script"), output.out, " ".join(output.err.split())


def test_render(slurm: Path, training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, script, said = rendered(
        capsys, tmp_path, ["--nodes=2", "--ntasks-per-node", "4", "--lead=60", *training]
    )
    run = tmp_path / "runs" / "x"
    assert (options["nodes"], options["ntasks-per-node"], options["signal"]) == ("2", "4", "B:USR1@60")
    assert (options["job-name"], options["output"]) == ("x", f"{run}/slurm/%j.out")
    assert (run / "slurm").is_dir(), "Slurm makes no directories for its logs"
    assert f"export JMVAE_DIST_ROOT={ROOT}\n" in script
    assert f"set -- --config {ROOT}/configs/digits.yaml --output_dir {run} " in script
    assert "2 node(s) x 4 = 8 process(es), 64 lanes" in said
    assert slurm.read_text().startswith("--test-only "), "nothing is submitted"


def test_settings_of_the_site(
    slurm: Path, site: Path, training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They complete the header, and the command line goes before them."""
    site.write_text("export SBATCH_PARTITION=gpu SBATCH_TIMELIMIT=60\nRANKS_PER_NODE=2\necho noise\n")
    options, script, said = rendered(capsys, tmp_path, ["--nodes=2", "--time=30", *training])
    assert (options["partition"], options["time"]) == ("gpu", "30")
    assert f"export JMVAE_DIST_SITE={site}\n" in script
    assert "2 node(s) x 2 = 4 process(es)" in said


@pytest.mark.parametrize(
    ("partition", "count"),
    [(None, 4), ("big", 8), ("mixed", None), ("none", 0), ("unknown", None), ("big,main", None)],
)
def test_gpus_of_a_partition(fake_command: Fake, partition: str | None, count: int | None) -> None:
    fake_command("sinfo", prints="main*|gpu:4\nbig|gpu:8\nmixed|gpu:4\nmixed|(null)\nnone|(null)\n")
    assert gpus_of_partition(partition) == count


def test_whole_nodes_come_with_all_their_gpus(
    slurm: Path, fake_command: Fake, training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_command("sinfo", prints="main*|gpu:4\n")
    _, _, said = rendered(capsys, tmp_path, ["--nodes=2", *training])
    assert "2 node(s) x 4 = 8 process(es)" in said
    _, _, said = rendered(capsys, tmp_path, ["--nodes=2", "--oversubscribe", "--gres=gpu:2", *training])
    assert "2 node(s) x 2 = 4 process(es)" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("if then\n", "not sound"),
        ("RANKS_PERNODE=2\n", "unknown setting RANKS_PERNODE"),
        ("false\n", "failed at: false"),
        ("MAX_ATTEMPTS_WITHOUT_PROGRESS=0\n", "must be a positive number"),
        ("RANKS_PER_NODE=two\n", "RANKS_PER_NODE='two' must be a positive number"),
        ("exit 3\n", "must not exit"),
    ],
)
def test_a_site_that_is_not_sound(slurm: Path, site: Path, training: list[str], text: str, message: str) -> None:
    site.write_text(text)
    with pytest.raises(ConfigError, match=message):
        main(["render", *training])


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        (["--nodes=65"], [], "64 lanes cannot be shared by 65 processes"),
        ([], ["--data.train_manifest", "/nowhere/manifest.json"], "data.train_manifest: "),
        ([], ["--training.stps", "3"], "unknown key"),
        (["--signal=USR1@60"], [], "the script needs B:USR1@SECONDS"),
        (["--signal=B:USR1@60", "--lead", "60"], [], "give one of them"),
        (["--array=1-3"], [], "only for sweeps"),
        (["--lead=0"], [], "must be at least 1"),
        (["digits.yaml"], [], "is not an option of sbatch"),
    ],
)
def test_mistakes_are_found_before_the_job(
    slurm: Path, training: list[str], options: list[str], more: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["submit", *options, *training, *more])
    assert not slurm.exists() or "--parsable" not in slurm.read_text()


def test_submit_and_evaluate(
    slurm: Path, training: list[str], tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = digits / "test" / "manifest.json"
    assert main(["submit", "--nodes=2", "--time=30", "--evaluate", str(manifest), *training]) == 0
    assert "submitted job 41" in capsys.readouterr().out
    folder = tmp_path / "runs" / "x" / "slurm"
    assert sorted(path.name for path in folder.iterdir()) == ["41-evaluate.sbatch", "41.sbatch"]
    assert read_directives(folder / "41.sbatch")["signal"] == "B:USR1@300"
    options = read_directives(folder / "41-evaluate.sbatch")
    expected = {"dependency": "afterok:41", "kill-on-invalid-dep": "yes", "nodes": "2", "time": "30"}
    assert expected.items() <= options.items()
    assert "signal" not in options
    assert f"set -- {folder.parent} --manifest {manifest}\n" in (folder / "41-evaluate.sbatch").read_text()


def test_an_evaluation_of_shards_at_a_url(slurm: Path, training: list[str]) -> None:
    url = "https://host/test/manifest.json"
    job = make_job(Request(options={}, training=training[1:]))
    assert evaluation_after(job, "41", url).arguments[-1] == url


def test_what_sbatch_says_is_said(slurm: Path, training: list[str], fake_command: Fake) -> None:
    fake_command("sbatch", exit_code=1)
    with pytest.raises(LaunchError, match="sbatch refuses the job"):
        main(["submit", *training])


def test_without_sbatch(
    fake_command: Fake, site: Path, training: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["render", *training]) == 0
    assert "not on PATH: its options were not checked" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(LaunchError, match="sbatch is not on PATH"):
        main(["submit", *training])


def test_one_job_at_a_time(slurm: Path, training: list[str], fake_command: Fake, tmp_path: Path) -> None:
    main(["submit", *training])
    fake_command("squeue", prints="41|PENDING|0:00|30:00|30:00|1||N/A|Priority\n")
    with pytest.raises(LaunchError, match=r"job 41 .* is PENDING; two jobs cannot train in one directory"):
        main(["submit", *training])
    assert main(["submit", "--dependency=afterany:41", *training]) == 0


def write_past(run: Path, *, failed: tuple[str, ...] = (), save_s: float = 100.0, requeued: bool = False) -> None:
    """A run directory whose only attempt took 10 of 1000 steps."""
    attempt = {
        "job_id": "7",
        "restart": 0,
        "begin_s": 1.7e9,
        "nodes": ["node1", "node2"],
        "begin_step": -1,
        "end_s": 1.7e9 + 60,
        "end_step": 10,
        "exit_code": 75,
        "requeued": requeued,
        "reason": "stopped before the time limit",
        "failed_nodes": failed,
    }
    (run / "slurm").mkdir(parents=True)
    (run / "slurm" / "attempts.jsonl").write_text(json.dumps({"event": "end", **attempt}) + "\n")
    record = {"global_step": 10, "samples_seen": 640, "speed/samples_per_s": 6.4, "loss/total": 2.5}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (run / "schedule.json").write_text('{"global_step": [1, 1000]}')
    (run / "environment.json").write_text('{"world_size": 2}')
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    (run / "checkpoints" / "step-00000010" / "manifest.json").touch()
    seconds = {"productive": 30.0, "data_wait": 0.0, "checkpoint": 10.0, "evaluation": 0.0, "startup": 15.0}
    ledger = {
        "format": 1,
        "number": 1,
        "started_s": 1.7e9 + 2,
        "updated_s": 1.7e9 + 57,
        "outcome": "stopped",
        "launcher": "srun",
        "engine": "ddp",
        "world_size": 2,
        "hosts": ["node1", "node2"],
        "slurm": {"job_id": "7", "restart_count": "0"},
        "last_step": 10,
        "highest_step": 10,
        "steps": 10,
        "recomputed_steps": 0,
        "checkpoint_step": 10,
        "checkpoint_save_s": save_s,
        "seconds": {**seconds, "recomputed": 0.0, "other": 0.0},
    }
    (run / "attempts").mkdir()
    (run / "attempts" / "attempt-0001.json").write_text(json.dumps(ledger))


def test_time_and_lead_are_compared_with_the_past(
    slurm: Path, training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """990 steps of 64 samples at 6.4 samples/s are 9900 s: three and a bit of 60 minutes but the lead."""
    write_past(tmp_path / "runs" / "x")
    steps = ["--training.epochs", "null", "--training.steps", "1000"]
    _, _, said = rendered(capsys, tmp_path, ["--time=60", "--lead=120", *training, *steps])
    assert "990 steps take about 2 h 45 min" in said
    assert "about 3 attempts" in said
    assert "--lead 260: twice that" in said
    _, _, said = rendered(capsys, tmp_path, ["--time=1-0", "--lead=300", *training, *steps])
    assert "attempts, requeued" not in said
    assert "twice that" not in said


def test_a_former_run_tells_the_speed(
    slurm: Path, training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_past(tmp_path / "former")
    steps = ["--training.epochs", "null", "--training.steps", "10"]
    _, _, said = rendered(capsys, tmp_path, [*training, *steps])
    assert "is not known yet" in said
    _, _, said = rendered(capsys, tmp_path, ["--like", str(tmp_path / "former"), *training, *steps])
    assert "10 steps take about 1 min 40 s at the speed of " in said


def test_nodes_that_failed_can_be_avoided(
    slurm: Path, training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_past(tmp_path / "runs" / "x", failed=("node2",))
    options, _, _ = rendered(capsys, tmp_path, training)
    assert "exclude" not in options
    options, _, said = rendered(capsys, tmp_path, ["--exclude-failed", "--exclude=node9", *training])
    assert options["exclude"] == "node9,node2"
    assert "avoids node2" in said


# Status


def test_status_of_a_run(slurm: Path, fake_command: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    write_past(run, failed=("node2",), requeued=True)
    (run / "slurm" / "9-evaluate.sbatch").touch()
    running = "7|RUNNING|1:00|10:00|9:00|2|node[1-2]|x|None\n"
    running += "8|RUNNING|1:00|1|1|1|n|x|None\n9|PENDING|0:00|1|1|1||N/A|Dependency\n"
    fake_command("squeue", prints=running)
    assert main(["status", str(run)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "state job 7 is RUNNING" in text
    assert "job 7 RUNNING on node[1-2] for 1:00 of 10:00" in text
    assert "evaluation: job 9 waits for 1 node(s): Dependency" in text
    assert "step 10 of 1,000 (1.0%); newest checkpoint: step 10, which took 1 min 40 s" in text
    assert "but only 9:00 of the time limit: about 16 more attempt(s)" in text
    assert "failed node2" in text
    assert "1 7 0 node1,node2" in text
    assert "1 min 00 s 0-10 75 stopped before the time limit; requeued" in text
    assert main(["status", "--json", str(run)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [job["job_id"] for job in values["jobs"]] == ["7"]
    assert len(values["attempts"]) == 1, "the two records of one attempt are one"
    assert sum(values["time"]["seconds"].values()) == pytest.approx(values["time"]["wall_s"])


def test_a_queue_that_does_not_answer_is_not_an_empty_one(
    slurm: Path, fake_command: Fake, training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the controller restarts, a requeued job is not gone, and nobody knows whether there is another one."""
    write_past(tmp_path / "runs" / "x", requeued=True)
    fake_command("squeue", exit_code=1)
    assert main(["status", str(tmp_path / "runs" / "x")]) == 0
    text = capsys.readouterr().out
    assert "unknown: squeue is not here, or does not answer" in text
    assert "is not in the queue any more" not in text
    _, _, said = rendered(capsys, tmp_path, training)
    assert "is in the queue is not known" in said


def test_a_requeued_job_that_is_gone(slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_past(tmp_path / "run", requeued=True)
    main(["status", str(tmp_path / "run")])
    assert "requeued, but its job is not in the queue any more" in capsys.readouterr().out


def test_status_without_slurm(fake_command: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of a run that was never under it."""
    run = tmp_path / "run"
    write_past(run)
    (run / "slurm" / "attempts.jsonl").unlink()
    ledger = run / "attempts" / "attempt-0001.json"
    ledger.write_text(json.dumps({**json.loads(ledger.read_text()), "slurm": {}}))
    assert main(["status", str(run)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "unknown: squeue is not here, or does not answer" in text
    assert "1 - - node1,node2" in text
    assert "0-10 75 stopped" in text


def test_status_of_what_is_no_run(fake_command: Fake, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="not a run directory"):
            main(["status", str(folder)])

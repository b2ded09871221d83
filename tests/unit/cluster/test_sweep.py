"""Sweeps: tables, the runs that their rows are, and the summary."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from jmvae_dist.cluster.sweep import check_row, check_rows, read_sweep, write_summary
from jmvae_dist.commands.slurm import main
from jmvae_dist.errors import ConfigError
from tests.conftest import ROOT


@pytest.fixture
def training(tmp_path: Path, digits: Path) -> list[str]:
    """Arguments that all rows have in common."""
    return [
        *("--config", str(ROOT / "configs" / "digits.yaml"), "--output_dir", str(tmp_path / "sweep")),
        *("--data.train_manifest", str(digits / "train" / "manifest.json"), "--data.eval_manifest", "null"),
        *("--training.epochs", "null", "--training.steps", "20"),
    ]


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def finish(run_dir: Path, config: str, *, step: int, exit_code: int = 0) -> None:
    """What a training of `step` steps leaves."""
    (run_dir / "slurm").mkdir(parents=True)
    checkpoint = run_dir / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    (run_dir / "config.yaml").write_text(config)
    values = {"job_id": "7_1", "restart": 0, "begin_s": 1.0, "nodes": [], "begin_step": -1, "end_s": 2.0}
    values |= {"end_step": step, "exit_code": exit_code, "requeued": False, "reason": "x", "failed_nodes": []}
    (run_dir / "slurm" / "attempts.jsonl").write_text(json.dumps({"event": "end", **values}) + "\n")
    records = [
        {"global_step": step, "loss/total": 3.0 + step, "eval/elbo": "NaN", "speed/x": 1},
        {"global_step": step, "eval/joint_nll": 5.0},
        # Of a checkpoint before, evaluated afterwards.
        {"global_step": 5, "eval/joint_nll": 9.0, "eval/samples": 2},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_rows(tmp_path: Path, training: list[str]) -> None:
    table = write(tmp_path / "t.tsv", "name\tmodel.latent_dim\toptimizer.weight_decay", "a\t4\t", "\t8\t1e-2", "")
    first, second = read_sweep(table, training)
    assert (first.number, first.name, first.settings) == (1, "a", {"model.latent_dim": "4"})
    assert (second.name, second.run_dir) == ("row-0002", tmp_path / "sweep" / "row-0002")
    config = check_row(table, second)
    assert (config.model.latent_dim, config.optimizer.weight_decay) == (8, 0.01)
    assert config.output_dir == str(second.run_dir)


def test_values_with_commas_in_a_csv_file(tmp_path: Path, training: list[str]) -> None:
    table = write(tmp_path / "t.csv", "model.networks.encoder_hidden_dims,model.latent_dim", '"[8, 4]",5')
    config = check_row(table, read_sweep(table, training)[0])
    assert (config.model.networks.encoder_hidden_dims, config.model.latent_dim) == ([8, 4], 5)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["model.latent_dim"], "at least one row"),
        (["model.latent_dim\tmodel.latent_dim", "1\t2"], "different configuration keys"),
        (["model.latent_dim,training.seed", "1,2"], "separated by tabs"),
        (["output_dir", "x"], "different configuration keys"),
        (["model.latent_dim\ttraining.seed", "1"], "row 1: 1 cells instead of 2"),
        (["name\ttraining.seed", "a\t1", "a\t2"], r"rows \[1, 2\] have the same name"),
        (["name\ttraining.seed", "../x\t1"], "name '../x' is not allowed"),
    ],
)
def test_what_is_no_table(tmp_path: Path, training: list[str], lines: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_sweep(write(tmp_path / "t.tsv", *lines), training)


def test_all_wrong_rows_are_named_at_once(tmp_path: Path, training: list[str]) -> None:
    table = write(tmp_path / "t.tsv", "model.latent_dim\tdata.lanes", "x\t", "4\t", "0\t", "4\t5")
    with pytest.raises(ConfigError) as caught:
        check_rows(table, read_sweep(table, training), 1)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{table}, row {number}" for number in (1, 3, 4)]


def test_a_row_that_moved_does_not_continue_another(tmp_path: Path, training: list[str]) -> None:
    """Its unnamed run directory has the weights of other settings; a longer training is no such change."""
    table = write(tmp_path / "t.tsv", "model.beta\ttraining.steps", "2\t20")
    finish(tmp_path / "sweep" / "row-0001", "model: {beta: 2.0}\ntraining: {steps: 10}\n", step=10)
    check_row(table, read_sweep(table, training)[0])
    write(table, "model.beta\ttraining.steps", "1\t20", "2\t20")
    with pytest.raises(ConfigError, match=r"row 1: .*row-0001 was trained with model.beta 2.0, the table says 1.0"):
        check_row(table, read_sweep(table, training)[0])


def test_only_complete_rows_are_passed_over(
    tmp_path: Path, training: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    table = write(tmp_path / "t.tsv", "name\tmodel.beta", "done\t1", "stopped\t1", "short\t1", "new\t1")
    finish(tmp_path / "sweep" / "done", "model: {beta: 1.0}", step=20)
    finish(tmp_path / "sweep" / "stopped", "model: {beta: 1.0}", step=20, exit_code=75)  # in its last evaluation
    finish(tmp_path / "sweep" / "short", "model: {beta: 1.0}", step=10)  # of former, fewer steps
    arguments = []
    for number in ("1", "2", "3", "4"):
        assert main(["sweep", "row", str(table), number, "--", *training]) == 0
        arguments.append(capsys.readouterr().out.split("\0")[:-1])
    assert arguments[0] == []
    for name, given in zip(("stopped", "short", "new"), arguments[1:], strict=True):
        assert given == [*training, "--model.beta=1", "--output_dir", str(tmp_path / "sweep" / name)]
    with pytest.raises(ConfigError, match="there is no row 5"):
        main(["sweep", "row", str(table), "5", "--", *training])


def test_summary(tmp_path: Path, training: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    table = write(tmp_path / "t.tsv", "name\tmodel.beta", "good\t1", "bad\t2", "new\t3")
    finish(tmp_path / "sweep" / "good", "", step=20)
    finish(tmp_path / "sweep" / "bad", "", step=30, exit_code=1)
    path, _ = write_summary(read_sweep(table, training))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [(row["name"], row["model.beta"], row["state"], row["step"]) for row in rows] == [
        ("good", "1", "complete", "20"),
        ("bad", "2", "failed", "30"),
        ("new", "3", "-", "0"),
    ]
    assert [row["loss/total"] for row in rows] == ["23", "33", ""]
    assert [row["eval/joint_nll"] for row in rows] == ["5", "5", ""]
    assert not list((tmp_path / "sweep").glob(".*.tmp"))
    main(["sweep", "summary", "--if-done", str(table), "--", *training])
    assert capsys.readouterr().out == f"2 of 3 rows have ended; all values: {path}\n"
    main(["sweep", "summary", str(table), "--", *training])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["good", "1", "complete", "20", "23*", "5*"]

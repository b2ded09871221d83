"""Batch scripts that are ready to submit, and what options of sbatch mean."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmvae_dist.cluster.resources import Resources, parse_duration_s
from jmvae_dist.cluster.scheduler import count_gpus
from jmvae_dist.cluster.script import (
    BatchScript,
    directives_of_variables,
    format_directive,
    parse_sbatch_options,
    read_directives,
)
from jmvae_dist.errors import ConfigError
from tests.conftest import ROOT

TRAIN = ROOT / "slurm" / "train.sbatch"


def test_header_is_completed_and_the_rest_kept() -> None:
    own = {"time": "1:00", "signal": "B:USR1@60", "nodes": "2", "job-name": "a b"}
    script = BatchScript(TRAIN, dict(own), ["--config", "my config.yaml"], {"JMVAE_DIST_ROOT": "/my root"})
    text = script.render()
    template = TRAIN.read_text()
    assert text.endswith(template[template.index("set -uo pipefail") :])
    lines = text.splitlines()
    assert lines[0] == template.splitlines()[0]
    # sbatch reads options up to the first command.
    header = lines[: next(place for place, line in enumerate(lines) if not line.startswith("#"))]
    assert [line for line in header if line.startswith("#SBATCH --signal")] == ["#SBATCH --signal=B:USR1@60"]
    assert '#SBATCH --job-name="a b"' in header
    assert {"#SBATCH --time=1:00", "#SBATCH --nodes=2", "#SBATCH --requeue", "#SBATCH --exclusive"} <= set(header)
    assert lines[len(header)] == "export JMVAE_DIST_ROOT='/my root'"


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_arguments_arrive_as_they_were_given(arguments: list[str]) -> None:
    script = BatchScript(TRAIN, {}, arguments).render()
    line = script[script.index("\nset -- ") + len("\nset -- ") : script.index("\nset -uo pipefail")]
    assert shlex.split(line) == arguments


def test_the_scripts_are_sound(tmp_path: Path) -> None:
    for name in ("train", "sweep", "evaluate"):
        path = tmp_path / f"{name}.sbatch"
        path.write_text(BatchScript(ROOT / "slurm" / f"{name}.sbatch", {}, ["x"]).render())
        subprocess.run(["bash", "-n", str(path)], check=True)
        assert {"exclusive": None, "requeue": None}.items() <= read_directives(path).items()


def write_command(folder: Path, name: str, *lines: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    (folder / name).chmod(0o755)


def run_bash(folder: Path, *lines: str) -> str:
    """Output of bash commands that find the stand-ins in `folder`/bin first."""
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    command = ["bash", "-c", "\n".join(lines)]
    result = subprocess.run(
        command, cwd=folder, env={"PATH": path}, capture_output=True, text=True, timeout=60, check=True
    )
    return result.stdout


def test_usr1_before_srun_does_not_end_the_ranks(tmp_path: Path) -> None:
    """It comes while the ranks' subshell asks scontrol, which may take its time: nothing heeds it there yet."""
    write_command(tmp_path / "bin", "scontrol", ">asked", "until [ -e go ]; do sleep 0.02; done")
    write_command(tmp_path / "bin", "srun", "exit 75")
    said = run_bash(
        tmp_path,
        f"set -u; root={shlex.quote(str(ROOT))}; source $root/slurm/common.sh",
        "num_ranks=1 ranks_per_node=1 run_dir=here SLURM_CPUS_ON_NODE=1",
        "trap : USR1",
        "start_ranks train & step=$!",
        "until [ -e asked ]; do sleep 0.02; done",
        "kill -USR1 $step; >go; wait_for $step; echo $?",
    )
    assert said == "75\n"


def test_ranks_are_told_which_settings_they_start_with(tmp_path: Path) -> None:
    """For the preflight, which shall know ranks that srun alone has started."""
    write_command(tmp_path / "bin", "scontrol")
    write_command(tmp_path / "bin", "srun", 'printf "%s\\n" "${JMVAE_DIST_SITE_READ:-none}"')
    (tmp_path / "site.env").write_text("INTERFACE=ib0\n")
    digest = hashlib.sha256(b"INTERFACE=ib0\n").hexdigest()
    said = run_bash(
        tmp_path,
        f"set -u; root={shlex.quote(str(ROOT))}; source $root/slurm/common.sh",
        "num_ranks=1 ranks_per_node=1 SLURM_CPUS_ON_NODE=1",
        "export JMVAE_DIST_SITE_READ='6 0123 left.over'",
        "(start_ranks doctor)",
        "unset JMVAE_DIST_SITE_READ; SLURM_JOB_ID=7 JMVAE_DIST_SITE=site.env; read_site; (start_ranks doctor)",
        "srun doctor",  # alone
    )
    assert said == f"none\n7 {digest} site.env\nnone\n"


def test_signals_are_heeded_from_the_first_line(tmp_path: Path) -> None:
    """They come while the script asks where the repository is; it goes on, here to say that it was not told."""
    script = "$(sed -n 's/^PPid:\\t//p' /proc/$PPID/status)"  # the parent is its command substitution
    write_command(tmp_path / "bin", "scontrol", f"script={script}; kill -USR1 $script; kill -TERM $script")
    for name in ("train", "sweep"):
        said = run_bash(
            tmp_path,
            f"SLURM_JOB_ID=1 bash {shlex.quote(str(ROOT))}/slurm/{name}.sbatch x 2>&1; echo $?",
        )
        assert "is not the repository" in said
        assert said.endswith("\n2\n")


def test_a_preempted_evaluation_goes_back_to_the_queue(tmp_path: Path) -> None:
    """A job that ends by itself is not requeued by Slurm; one that failed for another reason stays."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    write_command(tmp_path / "bin", "python", "exit 0")
    write_command(tmp_path / "bin", "srun", "exit 143")
    (tmp_path / "site.env").write_text("PYTHON=python\n")
    variables = f"SLURM_JOB_ID=1 SLURM_CPUS_ON_NODE=1 SLURM_JOB_NUM_NODES=1 JMVAE_DIST_SITE={tmp_path}/site.env"
    command = f"{variables} JMVAE_DIST_ROOT={ROOT} bash {ROOT}/slurm/evaluate.sbatch run; echo $?"
    for moment, requeues in (("None", False), ("2026-01-01T00:00:00", True)):
        write_command(tmp_path / "bin", "scontrol", f'echo "$@" >>calls-{requeues}; echo PreemptTime={moment}')
        assert run_bash(tmp_path, command).endswith("143\n")
        assert ("requeue 1" in (tmp_path / f"calls-{requeues}").read_text().splitlines()) is requeues


def test_a_crashed_training_goes_back_to_the_queue_where_it_may(tmp_path: Path) -> None:
    """Also as a row of a sweep; not where the check at its beginning refuses it: nobody counts those attempts."""
    answers = ("*begin*) [ ! -e refused ] && echo run;;", "*end*--requeue-failed*) echo requeue;;")
    row = "*sweep\\ row*) printf 'x\\0';;"
    write_command(tmp_path / "bin", "python", f'case "$*" in {" ".join(answers)} {row} esac')
    write_command(tmp_path / "bin", "srun", "exit 137")
    write_command(tmp_path / "bin", "scontrol", 'echo "$@" >>calls')
    (tmp_path / "table.tsv").touch()
    job = f"SLURM_JOB_ID=1 SLURM_CPUS_ON_NODE=1 SLURM_JOB_NUM_NODES=1 JMVAE_DIST_ROOT={ROOT}"
    train = f"{job} JMVAE_DIST_SITE={tmp_path}/site.env bash {ROOT}/slurm/train.sbatch x"
    sweep = f"SLURM_ARRAY_JOB_ID=1 SLURM_ARRAY_TASK_ID=2 {train.replace('train.sbatch', 'sweep.sbatch')} table.tsv"
    for setting, command, code, requeued in (
        ("no", train, 137, []),
        ("yes", train, 137, ["requeue 1"]),
        ("yes", sweep, 137, ["requeue 1_2"]),
        ("yes", f">refused; {train}", 1, []),
    ):
        (tmp_path / "site.env").write_text(f"PYTHON=python\nREQUEUE_FAILED={setting}\n")
        assert run_bash(tmp_path, f">calls; {command}; echo $?") == f"{code}\n"
        calls = (tmp_path / "calls").read_text().splitlines()
        assert [call for call in calls if call.startswith("requeue")] == requeued


@pytest.mark.parametrize(
    ("arguments", "directives"),
    [
        (["--nodes", "4", "--exclusive", "--time=1:00"], {"nodes": "4", "exclusive": None, "time": "1:00"}),
        (["-N4", "-t", "5", "-p=gpu"], {"nodes": "4", "time": "5", "partition": "gpu"}),
        (["--gres=gpu:a100:2", "--comment=a=b c"], {"gres": "gpu:a100:2", "comment": "a=b c"}),
        (["--nice=-5", "--no-requeue"], {"nice": "-5", "no-requeue": None}),
        ([], {}),
    ],
)
def test_options_of_sbatch(arguments: list[str], directives: dict[str, str | None]) -> None:
    assert parse_sbatch_options(arguments) == directives


@pytest.mark.parametrize("arguments", [["4"], ["--nodes", "4", "x"], ["-Z", "1"], ["--", "x"], ["--nodes=1", "-N2"]])
def test_what_is_no_option_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse_sbatch_options(arguments)


def test_a_line_break_cannot_add_an_option() -> None:
    with pytest.raises(ConfigError, match="line break"):
        format_directive("comment", "x\n#SBATCH --time=9")


def test_variables_of_a_site_become_options() -> None:
    variables = {
        "SBATCH_TIMELIMIT": "2:00:00",
        "SBATCH_MEM_PER_NODE": "4G",
        "SBATCH_GPUS_PER_NODE": "8",
        "SBATCH_REQUEUE": "1",
        "SBATCH_DEBUG": "1",
        "SBATCH_TIME": "1",
    }
    directives, unknown = directives_of_variables(variables)
    assert directives == {"time": "2:00:00", "mem": "4G", "gpus-per-node": "8", "requeue": None}
    assert unknown == ["SBATCH_TIME"]


@pytest.mark.parametrize(
    ("directives", "resources"),
    [
        ({}, Resources(1, 1, None, 0)),
        ({"nodes": "2-4", "ntasks-per-node": "3"}, Resources(2, 4, 3, 0)),
        ({"nodes": "2", "gpus-per-node": "a100:8"}, Resources(2, 2, None, 8)),
        ({"nodes": "2", "gres": "tmp:5,gpu:a100:4"}, Resources(2, 2, None, 4)),
        ({"nodes": "2", "gres": "gpu"}, Resources(2, 2, None, 1)),
        ({"nodes": "2", "gpus": "16"}, Resources(2, 2, None, 8)),
        ({"nodes": "2", "gpus": "15"}, Resources(2, 2, None, None)),
        ({"gpus": "16"}, Resources(None, None, None, None)),
        ({"ntasks": "16"}, Resources(None, None, None, 0)),
        ({"ntasks-per-node": "4", "gpus-per-task": "1"}, Resources(1, 1, 4, 4)),
    ],
)
def test_resources(directives: dict[str, str | None], resources: Resources) -> None:
    assert Resources.of(directives) == resources


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("gpu:2", 2),
        ("gpu", 1),
        ("gpu:a100", 1),
        ("gpu:a100:8(S:0-1)", 8),
        ("gpu:2g.20gb:4,gpu:a100:2,tmp:5", 6),
        ("tmp:5", 0),
        ("(null)", 0),
        ("", 0),
    ],
)
def test_gpus_among_generic_resources(text: str, count: int) -> None:
    assert count_gpus(text) == count


@pytest.mark.parametrize("directives", [{"nodes": "x"}, {"nodes": "0"}, {"nodes": "4-2"}, {"gpus-per-node": "many"}])
def test_numbers_that_are_none_are_refused(directives: dict[str, str | None]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(directives))}: "):
        Resources.of(directives)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("2:00:01", 7201),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-00:00:05", 86405),
        ("UNLIMITED", None),
        ("infinite", None),
        ("", None),
    ],
)
def test_durations_of_slurm(text: str, seconds: float | None) -> None:
    assert parse_duration_s(text) == seconds

"""What saves memory changes no number: activation checkpointing, and the micro-batch that `auto` finds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jmvae_dist.checkpoint.layout import read_manifest
from tests.conftest import Run, assert_same_tensors, rank_environments

STEPS = 6
NETWORKS = "{image: {kind: conv, channels: [8, 16], hidden_dims: [16]}, label: {kind: mlp}}"
SETTINGS = (
    *("--training.steps", str(STEPS), "--checkpoint.every_steps", "3", "--training.log_every_steps", "1"),
    *("--data.lanes", "16", "--training.gradient_clip_norm", "1.0", "--model.networks.modalities", NETWORKS),
)
# Networks whose activations take more than the gradients that DDP holds twice when it accumulates.
AUTO = (
    *SETTINGS[:-2],
    *("--training.micro_batch_size", "auto"),
    *(f"--model.networks.{part}_hidden_dims=[8]" for part in ("encoder", "decoder", "joint")),
)
MakeRun = Callable[..., Run]


def slow(*values: Any) -> Any:
    """A cell of the table that is left to `-m slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        ("ddp", ()),
        slow("zero3", ("--training.precision", "bf16", "--training.micro_batch_size", "9")),
        slow("ddp", ("--training.precision", "bf16", "--training.micro_batch_size", "9")),
        *(slow(f"zero{stage}", ()) for stage in range(4)),
    ],
)
def test_recomputing_changes_no_number(make_run: MakeRun, engine: str, settings: tuple[str, ...]) -> None:
    runs = []
    for recomputes in ("false", "true"):
        more = ("--training.engine", engine, "--training.activation_checkpointing", recomputes)
        runs.append(make_run(recomputes, *SETTINGS, *settings, *more))
        runs[-1].train(2)
    assert_same_tensors(*(run.tensors(STEPS) for run in runs))
    assert runs[0].records() == runs[1].records()


POOR_RANK = """
import sys
from jmvae_dist.__main__ import main
from jmvae_dist.distributed.environment import detect_process
from jmvae_dist.training import micro_batches

BUDGETS = [{budgets}]
micro_batches.memory_budget = lambda config, num_local_ranks: (BUDGETS[detect_process().rank], "what there is")
sys.exit(main(sys.argv[1:]))
"""


def _train_with_budgets(run: Run, folder: Path, *budgets: int) -> list[tuple[int, str]]:
    """Exit code and errors of two ranks that have so many bytes."""
    script = folder / "poor_rank.py"
    script.write_text(POOR_RANK.format(budgets=", ".join(map(str, budgets))))
    command = [sys.executable, str(script), "train", *run.arguments()]
    ranks = [
        subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for variables in rank_environments(len(budgets))
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    return [(rank.returncode, error) for rank, error in zip(ranks, errors, strict=True)]


def test_ranks_agree_on_what_fits_and_keep_to_it(make_run: MakeRun, tmp_path: Path) -> None:
    """Of 32 samples 16 fit on one rank, and 8 on the other; a resume with more memory still takes 8."""
    run = make_run("run", *AUTO)
    for code, error in _train_with_budgets(run, tmp_path, 889_566, 868_066):
        assert code == 0, error
    record = json.loads((run.output_dir / "micro_batch.json").read_text())
    assert record["micro_batch_size"] == 8
    assert read_manifest(run.checkpoint(3)).micro_batch == record

    resumed = make_run("resumed", *AUTO)
    shutil.copytree(run.checkpoint(3), resumed.checkpoint(3))
    assert "micro-batches of at most 8 samples, as recorded" in resumed.train(2)
    assert_same_tensors(run.tensors(STEPS), resumed.tensors(STEPS))


@pytest.mark.slow
def test_no_rank_is_left_alone_when_nothing_fits_on_another(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("run", *AUTO)
    # What all ranks know, rank 0 says, and the others end with 0 so that no launcher ends it before.
    (code, error), other = _train_with_budgets(run, tmp_path, 889_566, 50_000)
    assert code == 2
    assert "rank 1: training.micro_batch_size: auto: not even one sample fits" in error
    assert other == (0, "")
    assert not (run.output_dir / "micro_batch.json").exists()

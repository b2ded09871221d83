"""Every engine trains to the same bits, and every engine and world size resumes what every other one wrote.

The whole table: `bash tests/run.sh -m "slow or not slow" tests/distributed/test_engines.py`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import jmvae_dist
from jmvae_dist.checkpoint.export import export_model
from jmvae_dist.checkpoint.layout import list_checkpoints
from tests.conftest import Run, assert_same_tensors, launch_environment

ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3")
ZERO = ENGINES[1:]
STEPS, RESUME_STEP = 40, 10
# Two weight decays, clipping that bites at every step, and a share of the batch that is not the same on 3 ranks.
SETTINGS = (
    *("--training.steps", str(STEPS), "--checkpoint.every_steps", str(RESUME_STEP)),
    *("--checkpoint.keep_last", "4", "--training.log_every_steps", "1", "--data.lanes", "16"),
    *("--optimizer.weight_decay", "0.1", "--training.gradient_clip_norm", "1.0"),
)
MakeRun = Callable[..., Run]


def slow(*values: Any) -> Any:
    """A cell of the table that is left to `-m slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Callable[..., Run]:
    """Makes, once each, the uninterrupted run of an engine on so many processes, perhaps with other settings."""
    folder, made = tmp_path_factory.mktemp("sources"), {}

    def source(engine: str, num_processes: int, *settings: str) -> Run:
        key = (engine, num_processes, *settings)
        if key not in made:
            run = Run(folder / str(len(made)), digits, [*SETTINGS, *settings, "--training.engine", engine])
            output = run.train(num_processes)
            assert f"engine {engine}, " in output
            made[key] = run
        return made[key]

    return source


def copy_up_to_the_middle(source: Run, folder: Path) -> None:
    """A copy of a complete run without what came after RESUME_STEP."""
    shutil.copytree(source.output_dir, folder)
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        if checkpoint.name != f"step-{RESUME_STEP:08d}":
            shutil.rmtree(checkpoint)


def resume(source: Run, folder: Path, engine: str, num_processes: int, *settings: str) -> Run:
    """Continue a copy of a run from the middle, with another engine or on another number of processes."""
    copy_up_to_the_middle(source, folder)
    run = Run(folder, source.digits, [*SETTINGS, *settings, "--training.engine", engine])
    assert f"resumed from the checkpoint at step {RESUME_STEP} of {STEPS}" in run.train(num_processes)
    return run


def assert_same_run(first: Run, second: Run) -> None:
    """Weights, moments, losses and gradient norms, bit for bit."""
    assert_same_tensors(first.tensors(STEPS), second.tensors(STEPS))
    assert first.records() == second.records()


def assert_close_losses(first: Run, second: Run, relative: float) -> None:
    assert len(first.records()) == len(second.records()) > 0
    for record, other in zip(first.records(), second.records(), strict=True):
        assert other["loss/total"] == pytest.approx(record["loss/total"], rel=relative), record["global_step"]


@pytest.mark.parametrize("engine", [slow("zero0"), "zero1", "zero2", "zero3"])
@pytest.mark.parametrize(
    ("num_processes", "settings"),
    [
        (2, ()),
        slow(1, ()),
        slow(2, ("--training.precision", "bf16")),
        slow(2, ("--training.precision", "fp16")),
        slow(2, ("--training.gradient_clip_norm", "null")),
    ],
)
def test_engines_agree_bit_for_bit(
    sources: Callable[..., Run], engine: str, num_processes: int, settings: tuple[str, ...]
) -> None:
    assert_same_run(sources("ddp", num_processes, *settings), sources(engine, num_processes, *settings))


@pytest.mark.parametrize("engine", [slow("zero1"), slow("zero2"), "zero3"])
def test_offload_changes_nothing(sources: Callable[..., Run], engine: str) -> None:
    offload = ["--training.deepspeed.offload_optimizer", "cpu"]
    if engine == "zero3":
        offload += ["--training.deepspeed.offload_parameters", "cpu"]
    assert_same_run(sources("ddp", 2), sources(engine, 2, *offload))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ZERO)
def test_accumulated_gradients(sources: Callable[..., Run], engine: str) -> None:
    """ZeRO 2 and 3 reduce after every micro-batch, the others once: each of the two groups agrees bit for bit."""
    micro = ("--training.micro_batch_size", "11")
    assert_close_losses(sources("ddp", 2), sources(engine, 2, *micro), 1e-5)
    twin = "zero3" if engine in ("zero2", "zero3") else "ddp"
    assert_same_run(sources(twin, 2, *micro), sources(engine, 2, *micro))


IN_CI = {
    *(("ddp", 2, "zero1", 2), ("zero2", 2, "zero3", 2), ("zero3", 2, "ddp", 1), ("ddp", 1, "zero2", 2)),
}
TABLE = [
    (source, source_processes, target, target_processes)
    for source, source_processes in [("ddp", 1), *((engine, 2) for engine in ENGINES), ("zero1", 1), ("zero3", 1)]
    for target, target_processes in [("ddp", 1), *((engine, 2) for engine in ENGINES), ("zero1", 1), ("zero3", 3)]
]


@pytest.mark.parametrize(
    ("source", "source_processes", "target", "target_processes"),
    [cell if cell in IN_CI else slow(*cell) for cell in TABLE],
)
def test_any_engine_resumes_any_other(
    sources: Callable[..., Run],
    tmp_path: Path,
    source: str,
    source_processes: int,
    target: str,
    target_processes: int,
) -> None:
    origin = sources(source, source_processes)
    resumed = resume(origin, tmp_path / "resumed", target, target_processes)
    if source_processes == target_processes:
        assert_same_run(origin, resumed)
    else:
        assert_close_losses(origin, resumed, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("target", ENGINES)
def test_resume_in_16_bit(sources: Callable[..., Run], tmp_path: Path, precision: str, target: str) -> None:
    settings = ("--training.precision", precision)
    origin = sources("zero2", 2, *settings)
    assert_same_run(origin, resume(origin, tmp_path / "resumed", target, 2, *settings))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_resume_with_offload_and_accumulation(sources: Callable[..., Run], tmp_path: Path, engine: str) -> None:
    settings = ("--training.deepspeed.offload_optimizer", "cpu", "--training.micro_batch_size", "11")
    origin = sources(engine, 2, *settings)
    assert_same_run(origin, resume(origin, tmp_path / "resumed", engine, 2, *settings))
    without_offload = resume(origin, tmp_path / "without", engine, 2, *settings[2:])
    assert_same_run(origin, without_offload)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("num_processes", [3, 4])
def test_more_processes_resume_exactly(
    sources: Callable[..., Run], tmp_path: Path, engine: str, num_processes: int
) -> None:
    origin = sources(engine, num_processes)
    assert_same_run(origin, resume(origin, tmp_path / "resumed", engine, num_processes))
    assert_close_losses(sources("ddp", 2), origin, 1e-5)


@pytest.mark.slow
def test_more_processes_resume_exactly_over_gloo(sources: Callable[..., Run], tmp_path: Path) -> None:
    """As ranks on several machines do; sums are in another order until DDP has laid out its buckets anew."""
    over_gloo = ("--training.gradient_reduction", "process_group")
    origin = sources("ddp", 3, *over_gloo)
    assert_same_run(origin, resume(origin, tmp_path / "resumed", "ddp", 3, *over_gloo))


FROZEN = """
import os, sys
import torch
from jmvae_dist.__main__ import main
from jmvae_dist.training import assembly

class PartlyFrozen(assembly.JMVAE):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        offset = float(os.environ["OFFSET"])
        self.register_buffer("constants", torch.arange(5.0) + offset)
        for frozen in (self.encoders["image"].hidden[0], self.joint_encoder.heads):
            frozen.requires_grad_(False)
            frozen.weight += offset

assembly.JMVAE = PartlyFrozen
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target"), [("zero2", "zero3"), ("ddp", "zero1"), ("zero3", "ddp"), ("zero1", "zero2")]
)
def test_frozen_parameters_and_buffers(make_run: MakeRun, tmp_path: Path, source: str, target: str) -> None:
    """They are restored although no optimizer knows them; the resuming run begins with other values."""
    script = tmp_path / "frozen.py"
    script.write_text(FROZEN)

    def train(run: Run, offset: float) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*torchrun, str(script), "train", *run.arguments()]
        subprocess.run(command, env={**launch_environment(), "OFFSET": str(offset)}, check=True, capture_output=True)

    straight = make_run("straight", *SETTINGS, "--training.engine", source)
    train(straight, offset=0.0)
    resumed = make_run("resumed", *SETTINGS, "--training.engine", target)
    copy_up_to_the_middle(straight, resumed.output_dir)
    train(resumed, offset=1.0)
    assert_same_run(straight, resumed)
    tensors = resumed.tensors(STEPS)
    assert tensors["buffer/constants"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert "exp_avg/encoders.image.hidden.0.weight" not in tensors


def test_models_come_from_any_engines_checkpoint(sources: Callable[..., Run], tmp_path: Path) -> None:
    expected = jmvae_dist.load_model(sources("ddp", 2).output_dir).state_dict()
    partitioned = sources("zero3", 2).output_dir
    exported = export_model(partitioned, tmp_path / "export")
    for path in (partitioned, exported):
        found = jmvae_dist.load_model(path).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_each_rank_writes_its_share(sources: Callable[..., Run]) -> None:
    """No rank writes, or has to hold, everything."""
    for engine in ("ddp", "zero1", "zero3"):
        checkpoint = sources(engine, 2).checkpoint(STEPS)
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
        sizes = [record["num_bytes"] for record in files.values()]
        assert len(sizes) == 2
        assert min(sizes) > 0.9 * max(sizes), (engine, sizes)


def test_evaluation_and_figures_with_partitioned_weights(
    make_run: MakeRun, digits: Path, sources: Callable[..., Run]
) -> None:
    evaluation = (
        *("--data.eval_manifest", str(digits / "test" / "manifest.json"), "--evaluation.every_steps", "25"),
        *("--evaluation.joint_nll_samples", "3", "--evaluation.figure_samples", "2"),
    )
    run = make_run("run", *SETTINGS, "--training.engine", "zero3", *evaluation)
    run.train(2)
    reference = make_run("reference", *SETTINGS, *evaluation)
    reference.train(2)
    assert_same_run(reference, run)
    assert (run.output_dir / "figures" / "reconstruction.png").is_file()

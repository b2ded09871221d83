"""`training.micro_batch_size: auto`: what is found, from what, and what is kept."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jmvae_dist.checkpoint.layout import MANIFEST_NAME, step_name
from jmvae_dist.config_io import parse_run_config
from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.distributed.environment import detect_process
from jmvae_dist.errors import ConfigError
from jmvae_dist.model import JMVAE
from jmvae_dist.training import memory, micro_batches
from jmvae_dist.training.dry_run import estimate_run, render
from jmvae_dist.training.memory import PassTheory, engine_memory
from jmvae_dist.training.micro_batches import (
    PassTrial,
    RankNeeds,
    even_size,
    largest_by_theory,
    largest_that_fits,
    rank_needs,
    reserved_bytes,
    settle_micro_batch,
)
from jmvae_dist.training.setup import make_deepspeed_config, num_micro_batches, resolve_run, summarize
from jmvae_dist.training.state import MICRO_BATCH_NAME, write_json
from jmvae_dist.training_config import TrainingSection
from tests.conftest import ROOT
from tests.unit.checkpoint.test_fragments import make_manifest
from tests.unit.training.test_dry_run import SHAPES, make_config


@pytest.mark.parametrize("most", [1, 2, 7, 64])
def test_the_largest_that_fits_is_found_with_few_trials(most: int) -> None:
    for limit in range(most + 3):
        tried: list[int] = []

        def fits(size: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(size)
            return size <= limit

        assert largest_that_fits(most, fits) == min(limit, most)
        assert len(tried) <= 1 + most.bit_length()


def test_shares_are_split_evenly() -> None:
    assert [even_size(64, size) for size in (64, 63, 32, 31, 22, 1)] == [64, 32, 32, 22, 22, 1]


def test_theory_decides_within_the_budget() -> None:
    config = make_config({}, micro_batch_size="auto")
    shapes = config.model.resolve(dict(SHAPES))
    needs = rank_needs(config, shapes, 100, 1, share=6, deepspeed_config=None)
    batch_bytes = 6 * 4 * (sum(map(math.prod, SHAPES.values())) + shapes.latent_dim)
    theory = PassTheory(config, shapes)
    # Of the next two steps, and of those that are read together, twice; the theory of the pass has this one.
    assert needs.data_bytes(6) == (2 + 2 * (1024 // 6)) * batch_bytes
    needed = needs.state(6).peak(theory(6)) + needs.data_bytes(6)
    assert largest_by_theory(needs, shapes, (needed, "here")) == 6
    assert largest_by_theory(needs, shapes, (needed - 1, "here")) == 3  # two passes, not of 5 and 1
    with pytest.raises(ConfigError, match=r"not even one sample fits .* 1000 B \(here\); set training\.activation_"):
        largest_by_theory(needs, shapes, (1000, "here"))


def test_the_dry_run_says_what_auto_would_do() -> None:
    config = make_config({}, micro_batch_size="auto", memory_budget_bytes=10**12)
    assert "auto would take 24 samples for 931.3 GiB per rank" in render(estimate_run(config, 1), config)
    config = make_config({}, micro_batch_size="auto", memory_budget_bytes=10**5)
    estimate = estimate_run(config, 1)
    assert "auto: not even one sample fits" in render(estimate, config)
    assert estimate.micro_batch_size == 1


def test_recomputing_lowers_the_estimate() -> None:
    estimates = []
    for recomputes in (False, True):
        config = make_config({}, activation_checkpointing=recomputes)
        config.model.networks.activation = "gelu"
        config.model.networks.encoder_hidden_dims = [256, 256, 256]
        shapes = config.model.resolve(dict(SHAPES))
        estimates.append(PassTheory(config, shapes)(64))
    assert estimates[1] < 0.7 * estimates[0]


def test_a_run_knows_what_was_found(digits: Path) -> None:
    arguments = ["--config", str(ROOT / "configs" / "digits.yaml"), "--data.eval_manifest", "null"]
    manifest = str(digits / "train" / "manifest.json")
    config = parse_run_config([*arguments, "--data.train_manifest", manifest, "--training.micro_batch_size", "auto"])
    run = resolve_run(config, 2)
    assert "2 process(es) x auto micro-batch(es)" in summarize(run, 2)
    assert num_micro_batches(dataclasses.replace(run, micro_batch={"micro_batch_size": 10}), 2) == 4


class _Starts:
    """Starts of a run on one process, up to the choice of its micro-batch."""

    def __init__(self, digits: Path, output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.output_dir = output_dir
        self._patch = monkeypatch
        self._arguments = ["--config", str(ROOT / "configs" / "digits.yaml"), "--data.eval_manifest", "null"]
        self._arguments += ["--data.train_manifest", str(digits / "train" / "manifest.json")]
        self._runtime: Any = SimpleNamespace(
            process=detect_process({}), collectives=Collectives(), device=torch.device("cpu"), is_main=True
        )

    def choose(self, budget_bytes: int, *settings: str, device_bytes: int = 0) -> dict[str, Any]:
        self._patch.setattr(micro_batches, "memory_budget", lambda config, num_local_ranks: (budget_bytes, "here"))
        self._patch.setattr(micro_batches, "_device_bytes", lambda device: device_bytes)
        arguments = [*self._arguments, "--output_dir", str(self.output_dir), "--training.micro_batch_size", "auto"]
        run = resolve_run(parse_run_config([*arguments, *settings]), 1)
        return settle_micro_batch(run, self._runtime).micro_batch

    def write_checkpoint(self, global_step: int, micro_batch: dict[str, Any]) -> Path:
        checkpoint = self.output_dir / "checkpoints" / step_name(global_step)
        checkpoint.mkdir(parents=True)
        manifest = make_manifest(global_step=global_step, micro_batch=micro_batch)
        (checkpoint / MANIFEST_NAME).write_text(manifest.to_json())
        return checkpoint


@pytest.fixture
def starts(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Starts:
    return _Starts(digits, tmp_path, monkeypatch)


COMPILED = ("--training.compile", "model")


def test_what_is_recorded_counts_under_the_same_circumstances(
    starts: _Starts, caplog: pytest.LogCaptureFixture
) -> None:
    """A resume equals the uninterrupted run bit for bit only if it splits its batches alike."""
    first = starts.choose(7_901_687, device_bytes=1000)
    assert first["micro_batch_size"] == 8
    write_json(starts.output_dir / MICRO_BATCH_NAME, first)
    for device_bytes in (1000, 1001):
        assert starts.choose(10**9, device_bytes=device_bytes) == first
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    for settings in (COMPILED, ("--training.engine", "zero2")):
        assert starts.choose(10**9, *settings, device_bytes=1000)["micro_batch_size"] == 64
        assert "micro-batches of at most 8 samples were used for" in caplog.text
        caplog.clear()
    assert starts.choose(10**9, device_bytes=999)["micro_batch_size"] == 64  # on a smaller GPU
    assert "searched anew" in caplog.text


def test_where_a_record_is_looked_for(starts: _Starts) -> None:
    """In the run directory, and then in all checkpoints."""
    first, other = starts.choose(7_901_687), starts.choose(7_901_687, *COMPILED)
    starts.write_checkpoint(1, {})  # of a start with a number; then one with auto crashed before its first checkpoint
    write_json(starts.output_dir / MICRO_BATCH_NAME, first)
    assert starts.choose(10**9) == first
    write_json(starts.output_dir / MICRO_BATCH_NAME, other)
    starts.write_checkpoint(2, first)
    starts.write_checkpoint(3, other)
    (starts.write_checkpoint(4, first) / MANIFEST_NAME).write_text("damaged")
    assert starts.choose(10**9) == first
    assert starts.choose(10**9, *COMPILED) == other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"micro_batch_size": "all"}, r"training\.micro_batch_size: 'all'"),
        ({"micro_batch_size": 0}, r"training\.micro_batch_size: 0"),
        ({"micro_batch_size": 8, "memory_budget_bytes": 10**9}, r"training\.memory_budget_bytes: 1000000000 .* auto"),
        ({"micro_batch_size": "auto", "memory_budget_bytes": 0}, r"training\.memory_budget_bytes: 0"),
    ],
)
def test_mistakes(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingSection(global_batch_size=8, steps=1, **settings)  # type: ignore[arg-type]


def test_passes_are_tried_until_one_fits(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; here, where there is none, the model says that it is out of memory."""
    arguments = ["--config", str(ROOT / "configs" / "digits.yaml"), "--data.eval_manifest", "null"]
    manifest = str(digits / "train" / "manifest.json")
    run = resolve_run(parse_run_config([*arguments, "--data.train_manifest", manifest]), 1)
    forward = JMVAE.forward

    def with_little_memory(self: JMVAE, inputs: dict[str, torch.Tensor], **options: object) -> object:
        if len(inputs["image"]) > 40:
            raise torch.cuda.OutOfMemoryError("tried to allocate 20 MiB")
        if len(inputs["image"]) > 19:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return forward(self, inputs, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(JMVAE, "forward", with_little_memory)
    assert largest_that_fits(64, PassTrial(run, torch.device("cpu"), 64, lambda size: 1000)) == 19


def test_limits_of_control_groups(tmp_path: Path) -> None:
    """The tightest one above the process counts, and files that the kernel can drop are free."""

    def group(path: str, **files: object) -> None:
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / path / name.replace("_in_", "@").replace("_", ".").replace("@", "_in_")).write_text(
                f"{text}\n"
            )

    group("job", memory_max=1000, memory_current=700, memory_stat="anon 500\ninactive_file 50")
    group("job/step", memory_max="max", memory_current=600, memory_stat="inactive_file 0")
    membership = tmp_path / "membership"
    membership.write_text("0::/job/step/task\n")
    assert memory._free_in_control_groups(membership, tmp_path) == [350]
    membership.write_text("5:cpu,cpuacct:/job\n")
    assert memory._free_in_control_groups(membership, tmp_path) == []
    assert 0 < memory.available_bytes() < 2**60


def test_every_engine_has_a_theory() -> None:
    peaks = [engine_memory(engine, 10**9, 64).peak() for engine in ("zero0", "ddp", "zero1", "zero2")]
    assert peaks == sorted(peaks, reverse=True)


def test_what_the_theory_depends_on() -> None:
    """Bytes per parameter, of a million on ten ranks."""

    def per_parameter(engine: str, **options: Any) -> float:
        return engine_memory(engine, 10**6, 10, **options).peak() / 10**6

    def zero(**options: Any) -> dict[str, Any]:
        return {"deepspeed_config": {"zero_optimization": options}}

    assert per_parameter("ddp") == 16
    assert per_parameter("ddp", num_micro_batches=2) == 20
    in_passes = [engine_memory("zero2", 10**6, 10, num_micro_batches=number).gradients for number in (1, 2)]
    assert in_passes == [400_000, 800_000]
    small = zero(reduce_bucket_size=10**5)
    for engine in ("zero1", "zero2", "zero3"):
        assert per_parameter(engine, **small) < per_parameter(engine) - 3
        assert per_parameter(engine, device_type="cuda") > 200  # whole buckets of 50 million numbers
    assert per_parameter("zero3", **zero(stage3_max_live_parameters=10**5)) == per_parameter("zero3") - 3.6
    assert per_parameter("zero2", **zero(overlap_comm=True)) == per_parameter("zero2") + 4


def test_the_reserve_on_a_device() -> None:
    """A trial has all weights: what zero3 gathers is in them; what is offloaded is on the host."""
    config = make_config({}, micro_batch_size="auto", engine="zero3")
    shapes = config.model.resolve(dict(SHAPES))

    def needs_now() -> RankNeeds:
        return rank_needs(config, shapes, 10**9, 8, 6, make_deepspeed_config("zero3", config), device_type="cuda")

    needs = needs_now()
    state = needs.state(6)
    assert reserved_bytes(needs, 6) == state.peak() - 4 * 10**9 > state.moments + state.gradients
    config.training.deepspeed.offload_optimizer = "cpu"
    offloading = needs_now()
    assert reserved_bytes(needs, 6) - reserved_bytes(offloading, 6) == 4 * 4 * 10**9 // 8

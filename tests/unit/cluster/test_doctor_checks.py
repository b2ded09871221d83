"""What the preflight's checks find on a real machine, and how they are kept from crashing or hanging it."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jmvae_dist.cluster.doctor import job, machine
from jmvae_dist.cluster.doctor.check import Check, Context, Results, judge_check, run_checks
from jmvae_dist.cluster.doctor.layout import Layout, Place
from jmvae_dist.cluster.doctor.meeting import Meeting
from jmvae_dist.cluster.doctor.shard_cache import SHARD_CACHE, file_system_of
from jmvae_dist.commands.doctor import main
from jmvae_dist.config_io import parse_run_config
from jmvae_dist.distributed.environment import ProcessInfo
from jmvae_dist.errors import ConfigError, LaunchError
from jmvae_dist.model import JMVAE
from tests.conftest import ROOT
from tests.faulty_server import Fault, serving

SINGLE = ProcessInfo(rank=0, world_size=1, local_rank=0, launcher="single")


@pytest.fixture
def make_context(tmp_path: Path, digits: Path) -> Callable[..., Context]:
    """Makes the context of one process, with the configuration of the digits and some overrides."""

    def make(*overrides: str) -> Context:
        arguments = [
            *("--config", str(ROOT / "configs" / "digits.yaml"), "--output_dir", str(tmp_path / "runs" / "x")),
            *("--data.train_manifest", str(digits / "train" / "manifest.json"), "--data.eval_manifest", "null"),
        ]
        return Context(Meeting(SINGLE, timeout_s=5), 5, parse_run_config([*arguments, *overrides]))

    return make


def gather(context: Context, *names: str) -> Results:
    """Results of the named checks, after that of the configuration."""
    checks = (*machine.CHECKS, *machine.LIMITS, *job.CHECKS, SHARD_CACHE)
    chosen = [job.CONFIGURATION, *(check for check in checks if check.name in names)]
    results, hangs = run_checks(chosen, context, timeout_s=60)
    assert not hangs
    return results


def test_failing_and_hanging_checks_end(make_context: Callable[..., Context]) -> None:
    release = threading.Event()

    def fail(context: Context) -> None:
        raise KeyError("gone")

    def hang(context: Context) -> None:
        release.wait(30)

    checks = [
        Check(name, "rank", "nothing", work, lambda gathered: [], "wait")
        for name, work in (("first", fail), ("second", lambda context: 2), ("third", hang), ("fourth", fail))
    ]
    try:
        results, hangs = run_checks(checks, make_context(), timeout_s=0.5)
    finally:
        release.set()
    assert hangs
    assert results.keys() == {"first", "second", "third"}
    assert results["first"] == {"error": "KeyError: 'gone'"}
    assert results["second"] == {"facts": 2}
    assert results["third"]["hangs"]
    assert results["third"]["error"].startswith("did not end within 0.5 s")


def test_shards_that_are_missing_or_truncated_are_found(
    make_context: Callable[..., Context], digits: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(digits / "train", folder)
    context = make_context("--data.train_manifest", str(folder / "manifest.json"))
    results = gather(context, "shards", "read speed")
    assert context.run is not None
    assert results["shards"]["facts"]["data.train_manifest"]["num_problems"] == 0
    assert results["read speed"]["facts"]["samples"] == 23 * 64  # one epoch of 1,438, in whole batches
    shard, *_ = sorted(folder.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    (folder / context.run.train_manifest.shards[0].index.url).unlink()
    results = gather(make_context("--data.train_manifest", str(folder / "manifest.json")), "shards", "read speed")
    problems = results["shards"]["facts"]["data.train_manifest"]["problems"]
    assert any(str(shard) in problem and "the manifest says" in problem for problem in problems)
    assert any("No such file" in problem for problem in problems)
    assert "truncated" in results["read speed"]["error"]


def test_shards_at_urls_are_looked_at(make_context: Callable[..., Context], digits: Path) -> None:
    with serving(digits) as server:
        settings = ["--data.train_manifest", f"{server.url}/train/manifest.json"]
        results = gather(make_context(*settings), "shards", "read speed")
        assert results["shards"]["facts"]["data.train_manifest"]["num_problems"] == 0
        assert results["read speed"]["facts"]["samples"] > 0
        server.always["/train/shard-000001.tar"] = Fault(404)
        server.always["/train/shard-000000.tar.index"] = Fault(content=b"short")
        facts = gather(make_context(*settings), "shards")["shards"]["facts"]["data.train_manifest"]
    assert facts["num_problems"] == 2
    assert "5 bytes, the manifest says" in facts["problems"][0]
    assert "answered 404" in facts["problems"][1]


def test_the_cache_of_shards_at_urls(make_context: Callable[..., Context], digits: Path, tmp_path: Path) -> None:
    assert gather(make_context(), "shard cache")["shard cache"]["facts"] == {"is_needed": False}
    with serving(digits) as server:
        settings = ["--data.train_manifest", f"{server.url}/train/manifest.json"]
        assert gather(make_context(*settings), "shard cache")["shard cache"]["facts"]["path"] is None
        folder = tmp_path / "cache"
        settings += ["--data.cache.dir", str(folder), "--data.cache.max_bytes", "10000000"]
        facts = gather(make_context(*settings), "shard cache")["shard cache"]["facts"]
        assert (facts["path"], facts["room_bytes"]) == (str(folder), 10_000_000)
        assert 0 < facts["largest_bytes"] < facts["in_use_bytes"] < 10_000_000
        settings[3] = str(tmp_path / "file" / "cache")
        (tmp_path / "file").touch()
        assert "cannot be used" in gather(make_context(*settings), "shard cache")["shard cache"]["error"]


def test_the_file_system_of_a_path() -> None:
    assert file_system_of(Path("/proc/self/status")) == "proc"
    assert file_system_of(Path("/")) != ""


def test_space_is_that_of_the_checkpoints_and_nothing_is_left_behind(
    make_context: Callable[..., Context], tmp_path: Path
) -> None:
    context = make_context("--checkpoint.keep_last", "2", "--checkpoint.keep_every_steps", "1000")
    facts = gather(context, "disk space")["disk space"]["facts"]
    assert context.run is not None
    model = JMVAE(context.run.model_config, networks=context.run.config.model.networks)
    assert facts["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["num_checkpoints"] == 2 + 1 + context.run.total_steps // 1000
    assert Path(facts["probe"]).parent == tmp_path / "runs" / "x"
    for clean_up in context.on_exit:
        clean_up()
    assert not (tmp_path / "runs").exists()


def test_a_run_directory_that_cannot_be_made(make_context: Callable[..., Context], tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    error = gather(make_context(), "disk space")["disk space"]["error"]
    assert error.startswith(f"output_dir: {tmp_path}/runs/x cannot be written")


def test_too_many_ranks_for_the_lanes_leave_the_other_checks_alone(make_context: Callable[..., Context]) -> None:
    context = make_context("--data.lanes", "2", "--data.workers", "1")
    context.meeting.process = ProcessInfo(rank=5, world_size=6, local_rank=5, launcher="torchrun")
    context.run = None
    results, _ = run_checks([job.CONFIGURATION, machine.LIMITS[0]], context, timeout_s=60)
    assert "facts" in results["configuration"]
    assert "facts" in results["open files"]


def test_shared_memory_counts_the_batches_of_all_workers(make_context: Callable[..., Context]) -> None:
    context = make_context("--data.workers", "3")
    facts = gather(context, "/dev/shm")["/dev/shm"]["facts"]
    assert facts["reader_bytes"] == (3 * 2 + 1) * 64 * (64 + 10) * 4
    facts = gather(make_context(), "/dev/shm")["/dev/shm"]["facts"]
    assert (facts["reader_bytes"], facts["gradient_bytes"]) == (0, 0)


@pytest.mark.parametrize(
    ("hosts", "settings", "num_shared"),
    [
        (("a", "a", "a"), (), 3),
        (("a", "a", "a"), ("--training.gradient_reduction", "process_group"), 0),
        (("a", "a", "a"), ("--training.engine", "zero2"), 0),
        (("a", "a", "b"), (), 0),
        (("a", "a", "b"), ("--training.gradient_reduction", "shared_memory"), 2),
    ],
)
def test_shared_memory_counts_the_gradients_of_the_ranks_of_the_node(
    make_context: Callable[..., Context], hosts: tuple[str, ...], settings: tuple[str, ...], num_shared: int
) -> None:
    context = make_context("--training.device", "cpu", *settings)
    context.meeting.process = ProcessInfo(rank=0, world_size=3, local_rank=0, launcher="torchrun")
    places = {rank: Place(rank, rank, 3, "torchrun", host) for rank, host in enumerate(hosts)}
    context.meeting.layout = Layout(3, places)
    facts = gather(context, "/dev/shm")["/dev/shm"]["facts"]
    assert context.run is not None
    model = JMVAE(context.run.model_config, networks=context.run.config.model.networks)
    assert facts["gradient_bytes"] == num_shared * sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize(
    ("device", "setting", "has_gpu", "num_shared"),
    [
        ("auto", "auto", False, 2),
        ("auto", "auto", True, 0),
        ("cpu", "auto", True, 2),
        ("auto", "shared_memory", False, 2),
        ("cpu", "shared_memory", True, 2),
    ],
)
def test_gradients_share_memory_only_where_training_takes_no_gpu(
    make_context: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    setting: str,
    has_gpu: bool,
    num_shared: int,
) -> None:
    """The machine's GPUs are said to be there or not: nothing is computed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    context = make_context("--training.device", device, "--training.gradient_reduction", setting)
    context.meeting.process = ProcessInfo(rank=0, world_size=2, local_rank=0, launcher="torchrun")
    layout = Layout(2, {rank: Place(rank, rank, 2, "torchrun", "a") for rank in range(2)})
    context.meeting.layout = layout
    results = gather(context, "/dev/shm")
    assert context.run is not None
    model = JMVAE(context.run.model_config, networks=context.run.config.model.networks)
    facts = results["/dev/shm"]["facts"]
    assert facts["gradient_bytes"] == num_shared * sum(parameter.nbytes for parameter in model.parameters())
    check = next(check for check in machine.LIMITS if check.name == "/dev/shm")
    roomy = {0: {"/dev/shm": {"facts": {**facts, "size_bytes": 2**30, "free_bytes": 2**30}}}}
    (row,) = judge_check(check, roomy, layout)
    assert row.status == "pass"
    assert ("for gradients" in row.found) == (num_shared > 0)


def test_wandb_server_is_reached_or_not(
    make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "HTTP_PROXY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("WANDB_BASE_URL", f"http://user:secret@127.0.0.1:{port}")
        facts = gather(make_context("--tracking.wandb.mode", "online"), "W&B")["W&B"]["facts"]
    assert facts == {
        "mode": "online",
        "asked": "online",
        "messages": [],
        "server": f"127.0.0.1:{port}",
        "problem": None,
    }
    facts = gather(make_context("--tracking.wandb.mode", "online"), "W&B")["W&B"]["facts"]
    assert "refused" in facts["problem"]


def test_without_rank_0_the_wait_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(port))
    process = ProcessInfo(rank=1, world_size=2, local_rank=0, launcher="torchrun")
    with pytest.raises(LaunchError, match=f"rank 0 did not come: nobody answered at localhost:{port} within 0.3 s"):
        Meeting(process, timeout_s=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timeout-s", "0"], "--timeout-s"),
        (["--timeout-s", "nan"], "--timeout-s"),
        (["--training.stps", "3"], "training.stps: unknown key"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--json", "/nowhere/table.json"], "--json"),
        (["everything"], "everything"),
    ],
)
def test_usage(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(arguments)

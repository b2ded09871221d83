"""Gradients through shared memory: the numbers of gloo, and no rank left waiting, killed or with a file behind."""

from __future__ import annotations

import copy
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.distributed.shared_memory import SharedMemoryMean, _prove_shared, map_together, share_gradients
from jmvae_dist.errors import ConfigError, LaunchError, is_on_all_ranks
from tests import warm
from tests.conftest import Run, assert_same_tensors, run_verb

DEADLINE_S = 60
SETTINGS = ("--training.steps", "12", "--training.log_every_steps", "1", "--checkpoint.every_steps", "6")
MakeRun = Callable[..., Run]
OnRank = Callable[[Collectives, Path], Any]


class Ranks:
    """Processes of a gloo group, each of which calls a function.

    Args:
        function: Gets the collectives and an empty folder; what it returns is kept by `results`.
        num_ranks: Number of processes.
        folder: Of the test.
    """

    def __init__(self, function: OnRank, num_ranks: int, folder: Path) -> None:
        self.folder = folder / "files"
        self.folder.mkdir()
        self._results = folder
        self.processes = [
            warm.start_function(_be_rank, function, rank, num_ranks, folder) for rank in range(num_ranks)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def wait(self, rank: int) -> int | None:
        """The exit code of a rank, which has to end by itself."""
        self.processes[rank].join(DEADLINE_S)
        return self.processes[rank].exitcode

    def results(self) -> list[Any]:
        """What every rank returned."""
        assert [self.wait(rank) for rank in range(len(self.processes))] == [0] * len(self.processes)
        return [torch.load(self._results / f"result-{rank}") for rank in range(len(self.processes))]


def _be_rank(function: OnRank, rank: int, num_ranks: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=30))
    collectives = Collectives(rank, num_ranks, dist.new_group(backend="gloo"))
    torch.save(function(collectives, folder / "files"), folder / f"result-{rank}")
    dist.destroy_process_group()


@pytest.fixture
def call_on_ranks(tmp_path: Path) -> Callable[[OnRank, int], list[Any]]:
    """Calls a function on so many ranks, and returns what each returned."""

    def call(function: OnRank, num_ranks: int) -> list[Any]:
        with Ranks(function, num_ranks, tmp_path) as ranks:
            return ranks.results()

    return call


# Numbers


def gradients_of_steps(collectives: Collectives, folder: Path) -> dict[str, list[Tensor]]:
    """Of three steps with two micro-batches: by gloo, and in shared memory with small and with large buckets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 61), nn.ReLU(), nn.Linear(61, 40), nn.ReLU(), nn.Linear(40, 3))
    sizes = [parameter.nbytes for parameter in model.parameters()]
    found = {}
    for name, bucket_mb in (("gloo", 25.0), ("small", 0.001), ("large", 25.0)):
        wrapped = DistributedDataParallel(copy.deepcopy(model), bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True)
        if name != "gloo":
            wrapped.register_comm_hook(None, SharedMemoryMean(collectives, sizes, folder).hook)
        found[name] = [gradient for step in range(3) for gradient in _take_step(wrapped, step, collectives.rank)]
    found["own"] = [gradient for step in range(3) for gradient in _take_step(model, step, collectives.rank)]
    assert not list(folder.iterdir())
    return found


def _take_step(model: nn.Module, step: int, rank: int) -> list[Tensor]:
    torch.manual_seed(100 * step + rank)
    for is_last in (False, True):
        without: AbstractContextManager[None] = nullcontext()
        if not is_last and isinstance(model, DistributedDataParallel):
            without = model.no_sync()
        with without:
            model(torch.randn(8, 40)).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return gradients


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_gradients_are_added_in_the_order_of_ranks(
    call_on_ranks: Callable[[OnRank, int], list[Any]], num_ranks: int
) -> None:
    results = call_on_ranks(gradients_of_steps, num_ranks)
    expected = []
    for of_ranks in zip(*(result["own"] for result in results), strict=True):
        total = of_ranks[0] * (1 / num_ranks)
        for gradient in of_ranks[1:]:
            total += gradient * (1 / num_ranks)
        expected.append(total)
    for result in results:
        for name in ("small", "large"):
            assert all(torch.equal(*pair) for pair in zip(result[name], expected, strict=True)), name
        # Two numbers have only one sum.
        for mine, others in zip(result["gloo"], expected, strict=True):
            assert torch.equal(mine, others) if num_ranks == 2 else torch.allclose(mine, others, atol=1e-5)


_TENSORS = [(1, torch.float32), (1000, torch.float64), (2, torch.float64), (333, torch.float32)]


def average_many_tensors(collectives: Collectives, folder: Path) -> None:
    """Also of fewer elements than ranks, and of another dtype."""
    tensors = [torch.arange(size, dtype=dtype) + 1 for size, dtype in _TENSORS]
    mean = SharedMemoryMean(collectives, [tensor.nbytes for tensor in tensors], folder)
    for number in range(50):
        values = [tensor * (collectives.rank + 1) * (number + 1) for tensor in tensors]
        mean.average(values)
        for value, tensor in zip(values, tensors, strict=True):
            torch.testing.assert_close(value, tensor * 2 * (number + 1))  # the mean of 1, 2 and 3


def test_the_same_memory_serves_one_mean_after_the_other(
    call_on_ranks: Callable[[OnRank, int], list[Any]],
) -> None:
    call_on_ranks(average_many_tensors, 3)


@pytest.mark.parametrize("micro_batches", ["null", "11"])
def test_training_has_the_same_bits_by_either_way(make_run: MakeRun, micro_batches: str) -> None:
    runs = {}
    for way in ("auto", "process_group"):
        settings = (*SETTINGS, "--training.micro_batch_size", micro_batches, "--training.gradient_reduction", way)
        runs[way] = make_run(way, *settings)
        is_shared = "gloo (gradients in shared memory)" in runs[way].train(2)
        assert is_shared == (way == "auto")
    assert_same_tensors(*(run.tensors(12) for run in runs.values()))
    assert runs["auto"].records() == runs["process_group"].records()


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", ["null", "11"])
def test_a_compiled_model_has_the_same_bits_by_either_way(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batches: str
) -> None:
    """A compiled backward pass hands gradients to DDP's buckets in another order and at other times.

    Alone: `bash tests/run.sh -m slow tests/distributed/test_shared_memory.py -k compiled`
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    small = [f"--model.networks.{part}_hidden_dims=[16]" for part in ("encoder", "decoder", "joint")]
    settings = (*SETTINGS, *small, "--training.micro_batch_size", micro_batches)
    eager = make_run("eager", *settings)
    eager.train(2)
    runs = {}
    for way in ("shared_memory", "process_group"):
        compiled = ("--training.compile", "model", "--training.gradient_reduction", way)
        runs[way] = make_run(way, *settings, *compiled)
        is_shared = "gloo (gradients in shared memory)" in runs[way].train(2)
        assert is_shared == (way == "shared_memory")
        assert runs[way].records() != eager.records()  # equal bits would mean that nothing was compiled
    for global_step in (6, 12):
        assert_same_tensors(*(run.tensors(global_step) for run in runs.values()))
    assert runs["shared_memory"].records() == runs["process_group"].records()


# What can go wrong


def ask_for_too_much(collectives: Collectives, folder: Path) -> None:
    """Rank 1 may not write such large files."""
    if collectives.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
    with pytest.raises(LaunchError, match=r"has no room for 2\.0 MiB \(File too large\); .*--shm-size") as no_room:
        map_together(collectives, 2**20, folder)
    with pytest.raises(ConfigError, match=r"training\.gradient_reduction: shared_memory cannot be had: ") as refused:
        share_gradients("shared_memory", collectives, torch.device("cpu"), [2**20])
    assert is_on_all_ranks(no_room.value)
    assert is_on_all_ranks(refused.value)
    assert share_gradients("auto", collectives, torch.device("cpu"), [2**20]) is None
    with pytest.raises(LaunchError, match=r"would be more than half of .*--shm-size"):
        map_together(collectives, shutil.disk_usage(folder).free // 3, folder)
    map_together(collectives, 2**12, folder)
    assert not list(folder.iterdir())


def test_no_rank_has_what_one_has_no_room_for(call_on_ranks: Callable[[OnRank, int], list[Any]]) -> None:
    call_on_ranks(ask_for_too_much, 2)


def see_nothing_of_each_other(collectives: Collectives, folder: Path) -> None:
    with pytest.raises(LaunchError, match="do not see each other's memory") as caught:
        _prove_shared(collectives, torch.zeros(collectives.world_size, 4096, dtype=torch.uint8))
    assert is_on_all_ranks(caught.value)
    with pytest.raises(LaunchError, match="takes no file: No such file or directory"):
        map_together(collectives, 1, folder / "nowhere")


def test_memory_that_is_not_shared_is_noticed(call_on_ranks: Callable[[OnRank, int], list[Any]]) -> None:
    call_on_ranks(see_nothing_of_each_other, 2)


def average_forever(collectives: Collectives, folder: Path) -> None:
    mean = SharedMemoryMean(collectives, [4000], folder)
    while True:
        mean.average([torch.ones(1000)])
        (folder.parent / f"averaged-{collectives.rank}").touch()


def test_a_rank_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    with Ranks(average_forever, 2, tmp_path) as ranks:
        deadline_s = time.monotonic() + DEADLINE_S
        while not all((tmp_path / f"averaged-{rank}").exists() for rank in range(2)):
            assert time.monotonic() < deadline_s, "no rank has averaged anything"
            time.sleep(0.02)
        assert not list(ranks.folder.iterdir())
        ranks.processes[1].kill()
        assert ranks.wait(0) not in (0, None)


LITTLE_ROOM = """
import resource
from jmvae_dist.distributed import runtime

share = runtime.share_gradients

def share_in_little_room(*arguments):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        return share(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

runtime.share_gradients = share_in_little_room
"""


@pytest.mark.slow
def test_three_ranks_that_resume_without_room_say_that_sums_change(make_run: MakeRun) -> None:
    run = make_run("run", "--training.steps", "3")
    run.train(3)
    output = run_verb("train", *run.arguments(), "--training.steps", "4", num_processes=3, patch=LITTLE_ROOM)
    assert "training.gradient_reduction shared_memory -> process_group" in output


def test_a_run_without_room_says_so_and_goes_on_over_gloo(make_run: MakeRun) -> None:
    run = make_run("run", "--training.steps", "3")
    output = run_verb("train", *run.arguments(), num_processes=2, patch=LITTLE_ROOM)
    said = [line for line in output.splitlines() if "training.gradient_reduction" in line]
    assert len(said) == 1, output
    assert "/dev/shm has no room for" in said[0]
    assert "gradients in shared memory" not in output
    assert "gradients in shared memory" in run.train(2, "--training.steps", "4")

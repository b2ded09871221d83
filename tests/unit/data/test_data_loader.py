"""Loaders: the same batches whatever the topology and the number of workers, clean ends, clear errors."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_examples import npy_bytes

from jmvae_dist.data import loader
from jmvae_dist.data.loader import Batch, EvaluationLoader, OnBadSample, TrainLoader, steps_at_once
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.plan import SamplePlan
from jmvae_dist.data.reader import ShardReader
from jmvae_dist.data.shard_bytes import ShardBytes
from jmvae_dist.data.shard_set import ShardSet
from jmvae_dist.data.store import Verify
from jmvae_dist.data.views import SampleKeys, View, make_views
from jmvae_dist.errors import ConfigError, DataError

MakeManifest = Callable[..., Manifest]


@pytest.fixture(autouse=True)
def no_process_left_behind() -> Iterator[None]:
    yield
    deadline_s = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not multiprocessing.active_children()


def train_loader(manifest: Manifest, rank: int = 0, world_size: int = 1, workers: int = 0) -> TrainLoader:
    plan = SamplePlan(manifest.shard_sizes, 12, 4, 8, seed=5)
    return TrainLoader(manifest, plan, rank=rank, world_size=world_size, workers=workers)


def numbers_of(batch: Batch) -> list[int]:
    """Which samples of `example_source` a batch holds, told from the images and confirmed by the labels."""
    numbers = (batch.inputs["image"][:, 0, 0] / 100).to(torch.int64)
    assert torch.equal(batch.inputs["label"].argmax(dim=1), numbers % 12)
    return numbers.tolist()


def same(left: Batch, right: Batch) -> bool:
    return (
        left.global_step == right.global_step
        and torch.equal(left.rows, right.rows)
        and left.inputs.keys() == right.inputs.keys()
        and all(torch.equal(values, right.inputs[name]) for name, values in left.inputs.items())
    )


def test_batches_follow_the_plan(example_manifest: MakeManifest) -> None:
    manifest = example_manifest(47)
    seen: Counter[int] = Counter()
    for step, batch in enumerate(train_loader(manifest).iterate(0, 47)):
        assert batch.global_step == step
        assert batch.rows.tolist() == list(range(12))
        assert batch.inputs["image"].shape == (12, 2, 3)
        assert batch.inputs["label"].shape == (12, 12)
        assert batch.inputs["image"].dtype == batch.inputs["label"].dtype == torch.float32
        seen.update(numbers_of(batch))
    assert seen == Counter(dict.fromkeys(range(47), 12))  # 47 steps of 12 are 12 epochs of 47


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_batches(example_manifest: MakeManifest, workers: int) -> None:
    manifest = example_manifest(47)
    alone = list(train_loader(manifest).iterate(3, 20))
    state = torch.get_rng_state()
    shared = list(train_loader(manifest, workers=workers).iterate(3, 20))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(alone) == len(shared) == 17
    assert all(same(left, right) for left, right in zip(alone, shared, strict=True))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_global_batch(example_manifest: MakeManifest, world_size: int) -> None:
    manifest = example_manifest(47)
    whole = list(train_loader(manifest).iterate(0, 10))
    shares = [list(train_loader(manifest, rank, world_size).iterate(0, 10)) for rank in range(world_size)]
    for step in range(10):
        rows = torch.cat([share[step].rows for share in shares])
        assert rows.tolist() == list(range(12))
        for name, values in whole[step].inputs.items():
            assert torch.equal(torch.cat([share[step].inputs[name] for share in shares]), values)


def test_starting_in_the_middle(example_manifest: MakeManifest) -> None:
    manifest = example_manifest(47)
    whole = list(train_loader(manifest).iterate(0, 12))
    assert all(same(*pair) for pair in zip(whole[7:], train_loader(manifest).iterate(7, 12), strict=True))
    assert list(train_loader(manifest, workers=1).iterate(5, 5)) == []


def test_modalities_are_selected_in_the_given_order(example_manifest: MakeManifest) -> None:
    manifest = example_manifest()
    plan = SamplePlan(manifest.shard_sizes, 12, 4, 8, seed=5)
    loader = TrainLoader(manifest, plan, rank=0, world_size=1, views=make_views(manifest.select(["label"])))
    assert list(next(loader.iterate(0, 1)).inputs) == ["label"]
    with pytest.raises(ConfigError, match="no modality 'labels'"):
        manifest.select(["labels"])


def count_open_files() -> int:
    gc.collect()  # torch's queues refer to each other
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_early_ends_the_workers(example_manifest: MakeManifest, workers: int) -> None:
    loader = train_loader(example_manifest(), workers=workers)
    open_files = []
    for _ in range(4):
        batches = loader.iterate(0, 10**6)
        next(batches)
        assert len(multiprocessing.active_children()) == workers
        batches.close()
        assert not multiprocessing.active_children()
        del batches
        open_files.append(count_open_files())
    # torch's queues close their ends from threads of their own.
    deadline_s = time.monotonic() + 10
    while count_open_files() > open_files[0] and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert count_open_files() <= open_files[0]


def test_an_iterator_that_is_still_there_at_exit_keeps_no_process(example_manifest: MakeManifest) -> None:
    script = """
import sys
from jmvae_dist.data.loader import EvaluationLoader
from jmvae_dist.data.manifest import Manifest

batches = iter(EvaluationLoader(Manifest.load(sys.argv[1]), rank=0, world_size=1, batch_size=1, workers=2))
next(batches)
print("leaving")
"""
    command = [sys.executable, "-c", script, str(example_manifest().path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert (result.stdout, result.stderr) == ("leaving\n", "")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_stops_with_its_own_message(foreign_manifest: MakeManifest, workers: int) -> None:
    modality = Modality("x", "float32", (2,))
    samples = [{"x.npy": npy_bytes(torch.ones(2).numpy() * number)} for number in range(8)]
    samples[5] = {"x.npy": npy_bytes(torch.tensor([1.0, float("nan")]).numpy())}
    manifest = foreign_manifest([modality], samples)
    plan = SamplePlan(manifest.shard_sizes, 2, 1, 1, seed=0)
    loader = TrainLoader(manifest, plan, rank=0, world_size=1, workers=workers)
    batches = loader.iterate(0, 4)
    assert [next(batches).global_step for _ in range(2)] == [0, 1]
    with pytest.raises(DataError) as caught:
        next(batches)
    assert str(caught.value) == (
        f"{manifest.shard_path(0)}: sample 5 (key 'foreign-005'), modality 'x': value is not finite (NaN or infinite)"
    )


@pytest.mark.parametrize("on_bad_sample", ["stop", "mask"])
def test_a_bad_sample_of_steps_that_are_read_together_is_the_matter_of_its_own_step(
    foreign_manifest: MakeManifest, on_bad_sample: OnBadSample
) -> None:
    plan, bad_step = SamplePlan([48], 4, 4, 8, seed=5), 2
    bad = int(plan.batch(bad_step)[1][1])
    samples = [{"x.npy": npy_bytes(np.full((2,), number, np.float32))} for number in range(48)]
    samples[bad] = {"x.npy": npy_bytes(np.array([0, np.nan], np.float32))}
    manifest = foreign_manifest([Modality("x", "float32", (2,))], samples)
    loader = TrainLoader(manifest, plan, rank=0, world_size=1, on_bad_sample=on_bad_sample)
    batches = loader.iterate(0, 12)
    for step in range(bad_step):
        assert next(batches).inputs["x"][:, 0].tolist() == plan.batch(step)[1].tolist()
    if on_bad_sample == "stop":
        with pytest.raises(DataError, match=rf"sample {bad} .*not finite"):
            next(batches)
        return
    assert [len(batch) for batch in batches] == [3] + [4] * (11 - bad_step)


def test_a_bad_sample_costs_the_steps_with_it_one_more_try(
    foreign_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [{"x.npy": npy_bytes(np.full((2,), number, np.float32))} for number in range(64)]
    samples[40] = {"x.npy": npy_bytes(np.array([0, np.nan], np.float32))}
    manifest = foreign_manifest([Modality("x", "float32", (2,))], samples)
    monkeypatch.setattr(loader, "_SAMPLES_AT_ONCE", 32)
    gathered: list[int] = []
    gather = ShardSet.gather

    def counted(shards: ShardSet, shard_B: np.ndarray, *arguments: Any) -> dict[str, np.ndarray]:
        gathered.append(len(shard_B))
        return gather(shards, shard_B, *arguments)

    monkeypatch.setattr(ShardSet, "gather", counted)
    plan = SamplePlan(manifest.shard_sizes, 4, 1, 64, seed=5)
    bad_step = next(step for step in range(16) if 40 in plan.batch(step)[1])
    batches = TrainLoader(manifest, plan, rank=0, world_size=1).iterate(0, 16)
    for _ in range(bad_step):
        next(batches)
    with pytest.raises(DataError, match="sample 40 "):
        next(batches)
    together = [size for size in gathered if size > 4]
    assert together == [32] * (1 + bad_step // 8)
    assert len(gathered) == len(together) + bad_step % 8 + 1


def test_few_samples_and_bytes_are_read_together() -> None:
    assert steps_at_once(256, bytes_per_sample=72) == 4
    assert steps_at_once(2048, bytes_per_sample=72) == 1
    assert steps_at_once(1, bytes_per_sample=4 * 10**6) == 2


def test_workers_survive_the_signals_of_a_scheduler(example_manifest: MakeManifest) -> None:
    batches = train_loader(example_manifest(), workers=2).iterate(0, 60)
    received = [next(batches)]
    for process in multiprocessing.active_children():
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
            assert process.pid is not None
            os.kill(process.pid, number)
    received += batches
    assert [batch.global_step for batch in received] == list(range(60))


def test_shards_stay_open_while_lanes_read_them(
    example_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of 25 samples spread each of 4 lanes over up to 4 shards of 10 at a time."""
    manifest = example_manifest(480)
    opened: list[int] = []

    class CountedReader(ShardReader):
        def __init__(self, manifest: Manifest, shard_number: int, verify: Verify, content: ShardBytes) -> None:
            opened.append(shard_number)
            super().__init__(manifest, shard_number, verify, content)

    monkeypatch.setattr("jmvae_dist.data.shard_set.ShardReader", CountedReader)
    plan = SamplePlan(manifest.shard_sizes, 12, 4, 25, seed=5)
    one_epoch = TrainLoader(manifest, plan, rank=0, world_size=1).iterate(0, 40)
    assert len(list(one_epoch)) == 40
    assert set(opened) == set(range(48))
    assert len(opened) <= 56, "shards are closed while a window still needs them"


def test_a_killed_worker_is_reported(example_manifest: MakeManifest) -> None:
    batches = train_loader(example_manifest(), workers=2).iterate(0, 10**6)
    next(batches)
    victim = multiprocessing.active_children()[0]
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"data worker process died .* lower data\.workers"):
        for _ in batches:
            pass


def test_an_error_of_the_users_code_in_a_worker_is_not_taken_for_its_death(example_manifest: MakeManifest) -> None:
    class Reading(View):
        def to_model(self, stored: np.ndarray, keys: SampleKeys) -> np.ndarray:
            raise FileNotFoundError("no file of means")

    manifest = example_manifest(20)
    plan = SamplePlan(manifest.shard_sizes, 12, 4, 8, seed=5)
    views = [Reading(modality) for modality in manifest.modalities]
    with pytest.raises(FileNotFoundError, match="no file of means"):
        next(TrainLoader(manifest, plan, rank=0, world_size=1, workers=1, views=views).iterate(0, 1))


def test_impossible_settings(example_manifest: MakeManifest) -> None:
    manifest = example_manifest()
    with pytest.raises(ConfigError, match="5 ranks but only 4 lanes"):
        train_loader(manifest, rank=0, world_size=5)
    with pytest.raises(ConfigError, match=r"data\.workers must be at least 0"):
        train_loader(manifest, workers=-1)
    with pytest.raises(ConfigError, match="batch size"):
        EvaluationLoader(manifest, rank=0, world_size=1, batch_size=0)


@pytest.mark.parametrize(
    ("num_samples", "world_size", "batch_size", "workers"),
    [(47, 1, 10, 0), (47, 3, 10, 2), (47, 5, 1, 0), (3, 5, 4, 0), (1, 2, 4, 1), (20, 2, 100, 0)],
)
def test_evaluation_reads_every_sample_once(
    example_manifest: MakeManifest, num_samples: int, world_size: int, batch_size: int, workers: int
) -> None:
    manifest = example_manifest(num_samples)
    rows: list[int] = []
    numbers: list[int] = []
    for rank in range(world_size):
        loader = EvaluationLoader(manifest, rank=rank, world_size=world_size, batch_size=batch_size, workers=workers)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        assert [batch.global_step for batch in batches] == list(range(len(batches)))
        for batch in batches:
            rows += batch.rows.tolist()
            numbers += numbers_of(batch)
    assert rows == list(range(num_samples))
    assert Counter(numbers) == Counter(range(num_samples))


def test_evaluation_can_be_repeated(example_manifest: MakeManifest) -> None:
    loader = EvaluationLoader(example_manifest(20), rank=0, world_size=1, batch_size=7)
    assert all(same(*pair) for pair in zip(loader, loader, strict=True))


def test_reading_goes_on_while_the_folder_is_replaced(example_manifest: MakeManifest, tmp_path: Path) -> None:
    """The writer moves folders and never writes into them, so an open shard keeps its content."""
    manifest = example_manifest(10)
    expected = list(train_loader(manifest).iterate(0, 4))
    batches = train_loader(manifest).iterate(0, 4)
    received = [next(batches)]
    (tmp_path / "shards").rename(tmp_path / "old")
    received += batches
    assert all(same(*pair) for pair in zip(expected, received, strict=True))

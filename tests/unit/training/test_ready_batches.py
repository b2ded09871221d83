"""Batches that a thread makes ready ahead of the loop are those that the loop would have made itself."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch

from jmvae_dist.data.loader import Batch, TrainLoader
from jmvae_dist.errors import DataError
from jmvae_dist.kernels.noise import KeyedNoise
from jmvae_dist.model.likelihoods import build_likelihood
from jmvae_dist.training import ready_batches
from jmvae_dist.training.batches import CheckedBatches
from jmvae_dist.training.ready_batches import Preparation, ReadyBatch, ReadyBatches
from jmvae_dist.training.setup import ResolvedRun
from tests.faulty_server import Fault, FaultyServer, serving
from tests.unit.training.test_setup import resolve

LIKELIHOODS = {
    "image": build_likelihood("bernoulli", {"soft_targets": True}),
    "label": build_likelihood("categorical", {}),
}
Interrupt = Callable[[], None]
WAYS = pytest.mark.parametrize("interrupt", [lambda: None, None], ids=["thread", "no-thread"])


@pytest.fixture(autouse=True)
def busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready_batches, "_STOP_S", 30.0)


def loader_of(run: ResolvedRun) -> TrainLoader:
    return TrainLoader(run.train_manifest, run.plan, rank=0, world_size=1, views=run.views, access=run.remote_access)


def make_ready(run: ResolvedRun, batches: Generator[Batch, None, None], interrupt: Interrupt | None) -> ReadyBatches:
    checked = CheckedBatches(batches, run, LIKELIHOODS, range(64))
    return ReadyBatches(checked, Preparation(run), interrupt)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "jmvae-batches"]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


@WAYS
def test_batches_and_noise_are_those_of_the_step(digits: Path, interrupt: Interrupt | None) -> None:
    run = resolve(digits)
    loader = loader_of(run)
    plain = list(loader.iterate(3, 12))
    with contextlib.closing(make_ready(run, loader.iterate(3, 12), interrupt)) as batches:
        assert len(threads()) == (interrupt is not None)
        for batch, expected in zip(batches, plain, strict=True):
            assert batch.global_step == expected.global_step
            assert torch.equal(batch.rows, expected.rows)
            assert batch.inputs.keys() == expected.inputs.keys()
            assert all(torch.equal(batch.inputs[name], expected.inputs[name]) for name in batch.inputs)
            assert batch.noise is not None
            for part in (slice(0, 64), slice(0, 21), slice(21, 42), slice(42, 64)):  # as micro-batches take it
                key = KeyedNoise(run.config.training.seed, batch.global_step, expected.rows[part])
                assert torch.equal(batch.noise[part], key.draw(run.model_config.latent_dim))
    assert batches.failure is None
    assert threads() == []


@WAYS
@pytest.mark.parametrize("bad_step", [1, 2, 3, 7])
def test_a_failure_is_announced_at_the_same_step(digits: Path, bad_step: int, interrupt: Interrupt | None) -> None:
    run = resolve(digits)
    loader = loader_of(run)

    def spoiled() -> Generator[Batch, None, None]:
        for batch in loader.iterate(0, 10):
            if batch.global_step == bad_step:
                batch.inputs["image"][5, 0, 3, 3] = 1.5
            yield batch

    with contextlib.closing(make_ready(run, spoiled(), interrupt)) as batches:
        knows = []
        for batch in batches:
            if interrupt is not None:
                wait_until(lambda: batches._outcomes.qsize() == 1)  # what the thread knows is not yet what is said
            knows.append((batch.global_step, batches.failure is not None))
        assert knows == [(step, step >= bad_step - 2) for step in range(bad_step)]
        with pytest.raises(DataError, match=r"modality 'image': inputs\.image: .* the value 1\.5"):
            batches.raise_failure()


@WAYS
def test_masked_samples_are_told_of(digits: Path, interrupt: Interrupt | None) -> None:
    run = resolve(digits, "--data.on_bad_sample", "mask")
    loader = loader_of(run)

    def spoiled() -> Generator[Batch, None, None]:
        for batch in loader.iterate(0, 4):
            if batch.global_step == 1:
                batch.inputs["image"][5, 0, 3, 3] = 1.5
            if batch.global_step == 2:
                batch.inputs["image"][:] = -1.0
            yield batch

    with contextlib.closing(make_ready(run, spoiled(), interrupt)) as batches:
        ready = list(batches)
    assert [len(batch) for batch in ready] == [64, 63, 0, 64]
    assert [len(batch.noise) for batch in ready if batch.noise is not None] == [64, 63, 0, 64]
    assert batches.last_problem is not None
    assert "the value -1" in batches.last_problem


@WAYS
def test_any_error_comes_out_where_its_batch_was_wanted(digits: Path, interrupt: Interrupt | None) -> None:
    run = resolve(digits)
    loader = loader_of(run)

    def breaking() -> Generator[Batch, None, None]:
        yield from loader.iterate(0, 4)
        raise ZeroDivisionError("in a transform")

    with contextlib.closing(make_ready(run, breaking(), interrupt)) as batches:
        arriving = iter(batches)
        # Then reading, two steps ahead, has come to the fifth.
        assert [next(arriving).global_step for _ in range(2)] == [0, 1]
        with pytest.raises(ZeroDivisionError, match="in a transform") as caught:
            next(arriving)
        assert "breaking" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert threads() == []


@pytest.mark.parametrize("has_cache", [True, False], ids=["cache", "ranges"])
def test_a_slow_download_is_interrupted(digits: Path, tmp_path: Path, has_cache: bool) -> None:
    """At this pace, the shard takes half an hour."""

    def is_sending(server: FaultyServer) -> bool:
        return any(path.endswith(".tar") for path, _ in server.requests)

    with serving(digits) as server:
        manifest = f"--data.train_manifest={server.url}/train/manifest.json"
        cache = ("--data.cache.dir", str(tmp_path)) if has_cache else ()
        run = resolve(digits, manifest, "--data.cache.prefetch_shards", "0", *cache)
        for shard in run.train_manifest.shards:
            server.always[f"/train/{shard.url}"] = Fault(piece_bytes=16)
        loader = loader_of(run)
        with contextlib.closing(make_ready(run, loader.iterate(0, 10), loader.cancel)):
            wait_until(lambda: is_sending(server))
        assert threads() == []


def test_what_cannot_be_interrupted_is_left_behind(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready_batches, "_STOP_S", 0.01)
    run = resolve(digits)
    answer, closed = threading.Event(), []

    def silent() -> Generator[Batch, None, None]:
        try:
            answer.wait()
            yield from loader_of(run).iterate(0, 10)
        finally:
            closed.append(threading.current_thread().name)

    with contextlib.closing(make_ready(run, silent(), lambda: None)):
        pass
    (thread,) = threads()
    assert thread.daemon
    answer.set()
    thread.join(30.0)
    assert not thread.is_alive()
    assert closed == ["jmvae-batches"]


def test_a_loop_that_ends_early_ends_the_thread(digits: Path) -> None:
    run = resolve(digits)
    loader = loader_of(run)
    with contextlib.closing(make_ready(run, loader.iterate(0, 20), loader.cancel)) as batches:
        next(iter(batches))
    assert threads() == []


def test_the_thread_computes_by_itself_and_leaves_other_threads_as_they_were(digits: Path) -> None:
    """Beside a second team of threads, a step takes twice as long."""
    run = resolve(digits)
    numbers: list[int] = []

    class Noting(Preparation):
        def __call__(self, batch: Batch) -> ReadyBatch:
            numbers.append(torch.get_num_threads())
            return super().__call__(batch)

    def threads_of_a_new_thread() -> int:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found[0]

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        checked = CheckedBatches(loader_of(run).iterate(0, 2), run, LIKELIHOODS, range(64))
        with contextlib.closing(ReadyBatches(checked, Noting(run), lambda: None)) as batches:
            assert len(list(batches)) == 2
            assert (torch.get_num_threads(), threads_of_a_new_thread()) == (3, 3)
    finally:
        torch.set_num_threads(before)
    assert numbers == [1, 1]

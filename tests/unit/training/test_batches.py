"""A rank that cannot read a batch knows it two steps before the others would wait for it."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from jmvae_dist.data.loader import Batch, TrainLoader
from jmvae_dist.errors import DataError
from jmvae_dist.model.likelihoods import build_likelihood
from jmvae_dist.training.batches import CheckedBatches
from tests.unit.training.test_setup import resolve

LIKELIHOODS = {
    "image": build_likelihood("bernoulli", {"soft_targets": True}),
    "label": build_likelihood("categorical", {}),
}


@pytest.mark.parametrize("bad_step", [0, 1, 2, 3, 7])
def test_failures_are_known_two_steps_ahead(digits: Path, bad_step: int) -> None:
    run = resolve(digits)
    loader = TrainLoader(run.train_manifest, run.plan, rank=0, world_size=1, views=run.views)

    def spoiled() -> Generator[Batch, None, None]:
        for batch in loader.iterate(0, 10):
            if batch.global_step == bad_step:
                batch.inputs["image"][5, 0, 3, 3] = 1.5
            yield batch

    batches = CheckedBatches(spoiled(), run, LIKELIHOODS, range(64))
    known_at = None
    steps = []
    for batch in batches:
        steps.append(batch.global_step)
        if known_at is None and batches.failure is not None:
            known_at = batch.global_step
    assert steps == list(range(bad_step))
    if bad_step > 0:
        assert known_at == max(0, bad_step - 2)
    shard, index = run.plan.batch(bad_step)
    place = rf"{run.train_manifest.shards[shard[5]].url}: sample {index[5]} \(key 'digits-train-\d+'\), "
    place += r"modality 'image': inputs\.image: .* the value 1\.5"
    with pytest.raises(DataError, match=place):
        batches.raise_failure()


def test_all_batches_arrive_in_order(digits: Path) -> None:
    run = resolve(digits)
    loader = TrainLoader(run.train_manifest, run.plan, rank=0, world_size=1, views=run.views)
    batches = CheckedBatches(loader.iterate(3, 12), run, LIKELIHOODS, range(64))
    plain = list(loader.iterate(3, 12))
    for batch, expected in zip(batches, plain, strict=True):
        assert batch.global_step == expected.global_step
        assert torch.equal(batch.inputs["image"], expected.inputs["image"])
    assert batches.failure is None


def test_what_no_likelihood_explains_is_masked(digits: Path) -> None:
    run = resolve(digits, "--data.on_bad_sample", "mask")
    loader = TrainLoader(run.train_manifest, run.plan, rank=0, world_size=1, views=run.views)

    def spoiled() -> Generator[Batch, None, None]:
        for batch in loader.iterate(0, 3):
            if batch.global_step == 1:
                batch.inputs["image"][5, 0, 3, 3] = 1.5
                batch.inputs["label"][9] = 0.5
            yield batch

    batches = list(CheckedBatches(spoiled(), run, LIKELIHOODS, range(64)))
    assert [len(batch) for batch in batches] == [64, 62, 64]
    assert batches[1].rows.tolist() == [row for row in range(64) if row not in (5, 9)]
    for problem, name in zip(batches[1].problems, ("image", "label"), strict=True):
        assert f"modality '{name}': inputs.{name}: " in problem
        assert "key 'digits-train-" in problem

"""Steps that are read together: wherever reading begins, each has the rows that it has when it is read alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jmvae_dist.data import loader
from jmvae_dist.data.loader import Batch, TrainLoader
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.plan import SamplePlan
from jmvae_dist.data.shard_set import ShardSet
from jmvae_dist.data.sources.base import ArraySource
from jmvae_dist.data.views import make_views
from jmvae_dist.data.writer import write_shards

NUM_SAMPLES = 53
# Bytes of members and of what the model sees of them that are no multiple of a word or a cache line.
ODD = {
    "bytes": (Modality("bytes", "uint8", (7,)), Modality("other", "float32", (3, 5))),
    "pictures": (Modality("picture", "uint8", (3, 5)), Modality.classes("label", 11)),
    "one-value": (Modality("value", "float64", (1,)), Modality("half", "float16", (13,))),
}
# Drawn for each sample by its position in the run, which must be that of its own step.
DRAWN = {"picture": [{"name": "scale", "scale": 1 / 255}, {"name": "binarize", "keyed": True}]}


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """By name: shards of `ODD` whose values differ from sample to sample."""
    return {name: _write(tmp_path_factory.mktemp(name) / "shards", modalities) for name, modalities in ODD.items()}


def _write(folder: Path, modalities: tuple[Modality, ...]) -> Manifest:
    generator = np.random.Generator(np.random.Philox(5))
    arrays = {
        modality.name: generator.integers(0, 11, NUM_SAMPLES)
        if modality.encoding == "cls"
        else generator.integers(0, 256, (NUM_SAMPLES, *modality.shape)).astype(modality.dtype)
        for modality in modalities
    }
    source = ArraySource("odd", "train", modalities, arrays, np.arange(NUM_SAMPLES), 10, {})
    write_shards(source, folder, samples_per_shard=9)
    return Manifest.load(folder / "manifest.json")


@contextmanager
def reading_at_once(samples: int) -> Iterator[mock.Mock]:
    """Loaders that are made inside read so many samples together; gives what counts how often they read."""
    gather = mock.patch.object(ShardSet, "gather", autospec=True, side_effect=ShardSet.gather)
    with mock.patch.object(loader, "_SAMPLES_AT_ONCE", samples), gather as counter:
        yield counter


def read(manifest: Manifest, plan: SamplePlan, begin: int, stop: int, **place: Any) -> list[Batch]:
    """The batches of a rank from a step on."""
    drawn = {modality.name: DRAWN[modality.name] for modality in manifest.modalities if modality.name in DRAWN}
    views = make_views(manifest.modalities, drawn, seed=3)
    return list(TrainLoader(manifest, plan, views=views, **place).iterate(begin, stop))


@settings(max_examples=60)
@given(data=st.data())
def test_rows_are_those_of_steps_that_are_read_alone(manifests: dict[str, Manifest], data: st.DataObject) -> None:
    manifest = manifests[data.draw(st.sampled_from(list(ODD)))]
    lanes, samples_per_lane = data.draw(st.sampled_from([1, 3, 5])), data.draw(st.sampled_from([1, 3, 5, 7]))
    plan = SamplePlan(manifest.shard_sizes, lanes * samples_per_lane, lanes, data.draw(st.integers(1, 30)), seed=5)
    world_size = data.draw(st.integers(1, lanes))
    place = {"rank": data.draw(st.integers(0, world_size - 1)), "world_size": world_size}
    begin = data.draw(st.integers(0, 30))
    stop = begin + data.draw(st.integers(1, 12))
    with reading_at_once(1) as reads:
        alone = read(manifest, plan, begin, stop, **place)
        assert reads.call_count == stop - begin
    rows_per_step = len(alone[0])
    steps = data.draw(st.integers(2, 9))
    # A step more would be too much.
    with reading_at_once((steps + 1) * rows_per_step - 1) as reads:
        together = read(manifest, plan, begin, stop, **place)
        assert reads.call_count == math.ceil((stop - begin) / steps)
    assert [batch.global_step for batch in alone] == list(range(begin, stop))
    for one, other in zip(alone, together, strict=True):
        assert one.global_step == other.global_step
        assert torch.equal(one.rows, other.rows)
        assert list(one.inputs) == list(other.inputs) == [modality.name for modality in manifest.modalities]
        assert all(torch.equal(values, other.inputs[name]) for name, values in one.inputs.items())

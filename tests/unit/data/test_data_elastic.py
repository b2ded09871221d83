"""Simulated ranks: whatever the topologies of a run's attempts, its global batches are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jmvae_dist.data.loader import Batch, TrainLoader
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.plan import SamplePlan
from jmvae_dist.data.views import make_views

MakeManifest = Callable[..., Manifest]
BATCH, STEPS = 24, 12
TRANSFORMS = {"image": [{"name": "scale", "scale": 1 / 4700}, {"name": "binarize", "keyed": True}]}


def batches(manifest: Manifest, lanes: int, world_size: int, start: int, stop: int) -> list[list[Batch]]:
    """The batches of all ranks, by rank."""
    plan = SamplePlan(manifest.shard_sizes, BATCH, lanes, 7, seed=5)
    views = make_views(manifest.modalities, TRANSFORMS, seed=5)
    return [
        list(
            TrainLoader(manifest, plan, rank=rank, world_size=world_size, views=views, on_bad_sample="mask").iterate(
                start, stop
            )
        )
        for rank in range(world_size)
    ]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_attempts_of_any_topology_make_the_same_run(
    example_manifest: MakeManifest, tmp_path: Path, data: st.DataObject
) -> None:
    if not (tmp_path / "shards").exists():
        damaged = example_manifest(47)
        damaged.shard_path(2).write_bytes(b"")  # to be masked at the same places by everybody
    manifest = Manifest.load(tmp_path / "shards" / "manifest.json")
    lanes = data.draw(st.sampled_from([4, 6, 12, 24]))
    (expected,) = batches(manifest, lanes, 1, 0, STEPS)
    assert sum(len(batch.problems) for batch in expected) > 0
    step = 0
    while step < STEPS:
        stop = data.draw(st.integers(step + 1, STEPS))
        world_size = data.draw(st.integers(1, lanes))
        for number, shares in enumerate(zip(*batches(manifest, lanes, world_size, step, stop), strict=True)):
            whole = expected[step + number]
            assert {share.global_step for share in shares} == {whole.global_step}
            assert torch.equal(torch.cat([share.rows for share in shares]), whole.rows)
            assert sum(len(share.problems) for share in shares) == len(whole.problems)
            for name, values in whole.inputs.items():
                assert torch.equal(torch.cat([share.inputs[name] for share in shares]), values)
        step = stop

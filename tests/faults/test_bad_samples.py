"""Bad samples in real runs: one error on all ranks, or left out of the loss at their own position and counted."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jmvae_dist import load_model
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.plan import SamplePlan
from jmvae_dist.data.reader import ShardReader
from jmvae_dist.data.views import make_views
from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.errors import DataError
from jmvae_dist.evaluation.runner import evaluate_together, save_figures
from tests.conftest import Run, assert_losses_agree, assert_same_tensors

STEPS = 24  # one epoch has 22.5
BAD_SHARD, BAD_INDEX = 2, 17
SETTINGS = [
    *("--training.steps", str(STEPS), "--training.log_every_steps", "1", "--checkpoint.every_steps", "8"),
    *("--data.verify", "never", "--schedule.learning_rate.shape", "constant"),
]


@pytest.fixture
def spoiled(digits: Path, tmp_path: Path) -> Path:
    """The digits, with a label that is no number; only its decoder can tell, for no checksum is compared."""
    for split, shard, index in (("train", BAD_SHARD, BAD_INDEX), ("test", 0, 1)):
        shutil.copytree(digits / split, tmp_path / "data" / split)
        manifest = Manifest.load(tmp_path / "data" / split / "manifest.json")
        reader = ShardReader(manifest, shard)
        offset, _ = reader.location(index, "label")
        reader.close()
        with open(manifest.shard_path(shard), "r+b") as file:
            file.seek(offset)
            file.write(b"x")
    return tmp_path / "data"


def bad_steps(folder: Path) -> list[int]:
    """Steps, counted from 1, whose batch has the bad sample."""
    plan = SamplePlan(Manifest.load(folder / "train" / "manifest.json").shard_sizes, 64, 64, 8192, seed=0)
    found = []
    for step in range(STEPS):
        shard_B, index_B = plan.batch(step)
        if ((shard_B == BAD_SHARD) & (index_B == BAD_INDEX)).any():
            found.append(step + 1)
    return found


def test_a_bad_sample_stops_all_ranks_with_one_error(spoiled: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", spoiled, SETTINGS)
    output = run.train(2, expect=1)
    assert f"shard-{BAD_SHARD:06d}.tar: sample {BAD_INDEX} (key 'digits-train-" in output
    assert "modality 'label': 'x' is not a class index" in output
    saved = max(int(path.name.removeprefix("step-")) for path in (run.output_dir / "checkpoints").glob("step-*"))
    assert saved == bad_steps(spoiled)[0] - 1


def test_masked_samples_are_left_out_counted_and_tolerated_so_far(spoiled: Path, tmp_path: Path) -> None:
    mask = ("--data.on_bad_sample", "mask", "--data.bad_sample_tolerance", "0")
    alone = Run(tmp_path / "alone", spoiled, [*SETTINGS, *mask])
    assert "masked sample 1 of this rank" in alone.train(1)
    masked = [record["data/masked_samples"] for record in alone.records()]
    assert masked == [sum(bad <= step for bad in bad_steps(spoiled)) for step in range(1, STEPS + 1)]
    assert masked[-1] >= 1
    check_evaluation_masks_too(alone, Manifest.load(spoiled / "test" / "manifest.json"), tmp_path)

    first = bad_steps(spoiled)[0]
    elastic = Run(tmp_path / "elastic", spoiled, [*SETTINGS, *mask])
    output = elastic.train(2, "--data.bad_sample_burst", "0", expect=1)
    assert f"step {first}: 1 samples of the run were bad and masked" in output
    assert "'x' is not a class index" in output
    assert elastic.checkpoint(first).is_dir()
    elastic.train(1, "--data.workers", "1", "--training.micro_batch_size", "24")
    # Sums in another order, but the same samples and the same divisor: 63 valid ones of 64 weigh more each.
    assert_losses_agree(alone, elastic, 2e-5, STEPS)
    assert [record["data/masked_samples"] for record in elastic.records()] == masked

    held_out = ("--data.eval_manifest", str(spoiled / "test" / "manifest.json"))
    alone.train(1, *held_out, "--evaluation.joint_nll_samples", "0")
    assert json.loads((alone.output_dir / "evaluation.json").read_text())["num_samples"] == 358


def check_evaluation_masks_too(run: Run, manifest: Manifest, folder: Path) -> None:
    """Neither metrics nor figures of a run that masks end with a bad sample among the held-out ones."""
    model, views = load_model(run.output_dir), make_views(manifest.modalities)
    options: dict[str, Any] = {"seed": 0, "verify": "never", "on_bad_sample": "mask"}
    evaluate = partial(evaluate_together, batch_size=64, joint_nll_samples=0, **options)
    assert evaluate(model, manifest, views, Collectives())["eval/masked_samples"] == 1
    paths = save_figures(model, manifest, views, folder, num_samples=4, **options)
    assert paths["reconstruction"].exists()
    # The likelihood of the label can explain none of these: neither 0 nor 1.
    strange = make_views(manifest.modalities, {"label": [{"name": "scale", "scale": 2.0}]})
    with pytest.raises(DataError, match="no samples to evaluate"):
        evaluate(model, manifest, strange, Collectives())
    with pytest.raises(DataError, match="no sound sample to draw"):
        save_figures(model, manifest, strange, folder, num_samples=4, **options)


def test_to_mask_changes_no_bit_of_a_run_without_bad_samples(digits: Path, tmp_path: Path) -> None:
    runs = [
        Run(tmp_path / policy, digits, [*SETTINGS, "--data.on_bad_sample", policy, "--training.steps", "6"])
        for policy in ("stop", "mask")
    ]
    for run in runs:
        run.train(1)
    assert_same_tensors(runs[0].tensors(6), runs[1].tensors(6))

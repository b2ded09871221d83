"""A run whose processes, workers and micro-batches change at every resume, with transforms of its data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jmvae_dist.commands.evaluate import main as evaluate
from jmvae_dist.commands.sample import main as sample
from jmvae_dist.errors import ConfigError
from tests.conftest import Run, assert_losses_agree

STEPS = 12
TRANSFORMS = (
    "{image: [{class_path: tests.user_code.Crop, init_args: {pixels: 2}}, {name: binarize, keyed: true}], label: []}"
)
SETTINGS = [
    *("--training.steps", str(STEPS), "--training.log_every_steps", "1", "--checkpoint.every_steps", "4"),
    *("--schedule.learning_rate.shape", "constant", "--data.transforms", TRANSFORMS),
]
TRUST = ("--trust-class", "tests.user_code.Crop")


@pytest.fixture(scope="module")
def steady(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process, from the beginning to the end."""
    run = Run(tmp_path_factory.mktemp("steady") / "run", digits, SETTINGS)
    run.train(1)
    return run


def test_processes_workers_and_micro_batches_may_change_at_every_resume(
    steady: Run, digits: Path, tmp_path: Path
) -> None:
    elastic = Run(tmp_path / "run", digits, SETTINGS)
    elastic.train(1, "--training.steps", "4")
    elastic.train(2, "--training.steps", "8", "--data.workers", "1", "--training.micro_batch_size", "24")
    elastic.train(1, "--data.workers", "2", "--training.micro_batch_size", "40")
    # Order, noise and binarisation would each show in the losses; rounding is all that may differ.
    assert_losses_agree(steady, elastic, 2e-5, STEPS)


def test_others_see_the_data_as_the_run_did(steady: Run, digits: Path, tmp_path: Path) -> None:
    manifest = str(digits / "test" / "manifest.json")
    options = [str(steady.output_dir), "--manifest", manifest]
    out = tmp_path / "evaluation.json"
    with pytest.raises(ConfigError, match=r"add --trust-class tests\.user_code\.Crop"):
        evaluate([*options, "--metrics", "elbo"])
    assert evaluate([*options, "--metrics", "elbo", "--out", str(out), *TRUST]) == 0
    assert json.loads(out.read_text())["metrics"]["eval/samples"] == 359
    assert sample([*options, "--out", str(tmp_path / "samples"), "--given", "image", "--n", "4", *TRUST]) == 0


def test_other_transforms_are_refused(steady: Run) -> None:
    output = steady.train(1, "--data.transforms", TRANSFORMS.replace("keyed: true", "threshold: 0.5"), expect=2)
    assert "the checkpoint's model saw its data otherwise: data.transforms.image was [" in output
    assert "allow_order_change" in output

"""What a user does with a finished run: evaluate on any number of processes, sample, export, report."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import jmvae_dist
from jmvae_dist.tracking.report import write_report
from tests.conftest import Run, free_port, launch_environment, run_verb


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Run:
    """A short run on 2 processes, with evaluation, figures and report."""
    run = Run(
        tmp_path_factory.mktemp("runs") / "finished",
        digits,
        [
            *("--data.eval_manifest", str(digits / "test" / "manifest.json")),
            *("--training.steps", "400", "--evaluation.every_steps", "300", "--evaluation.joint_nll_samples", "20"),
        ],
    )
    run.train(2)
    return run


@pytest.mark.parametrize(
    ("more_processes", "other_batch_size"), [(2, 50), pytest.param(3, 7, marks=pytest.mark.slow)]
)
def test_evaluation_does_not_depend_on_the_number_of_processes(
    finished: Run, tmp_path: Path, more_processes: int, other_batch_size: int
) -> None:
    results = []
    record = (finished.output_dir / "metrics.jsonl").read_bytes()
    for num_processes, batch_size in ((1, 256), (more_processes, other_batch_size)):
        out = tmp_path / f"{num_processes}.json"
        # All train the classifier anew.
        shutil.rmtree(finished.output_dir / "evaluation", ignore_errors=True)
        manifest = str(finished.digits / "test" / "manifest.json")
        run_verb(
            *("evaluate", str(finished.output_dir), "--manifest", manifest, "--out", str(out)),
            *("--joint-nll-samples", "20", "--batch-size", str(batch_size), "--metrics", "all", "--no-log"),
            *("--classifier-steps", "60", "--prior-samples", "200", "--probe-samples", "500"),
            num_processes=num_processes,
        )
        results.append(json.loads(out.read_text()))
    assert results[0]["num_samples"] == results[0]["metrics"]["eval/samples"] == 359
    assert results[1]["metrics"].keys() == results[0]["metrics"].keys()
    for key, value in results[0]["metrics"].items():
        # Roots of covariances that are close to singular lose digits.
        tolerance = 1e-3 if "frechet" in key else 1e-5
        assert results[1]["metrics"][key] == pytest.approx(value, rel=tolerance, abs=1e-6), key
    assert results[0]["skipped"] == {}
    quantities = {key.split("/")[1] for key in results[0]["metrics"]}
    assert quantities >= {"coherence", "probe", "frechet", "reconstruction", "latent", "conditional_nll"}
    assert quantities >= {"joint_nll", "joint_nll_monte_carlo_stderr", "marginal_nll", "marginal_nll_unimodal"}
    assert (finished.output_dir / "metrics.jsonl").read_bytes() == record
    # The evaluation at the end of the training is the same computation.
    final = json.loads((finished.output_dir / "evaluation.json").read_text())["metrics"]
    assert final == pytest.approx({key: results[0]["metrics"][key] for key in final}, rel=1e-5)


def test_an_evaluation_is_logged_to_its_run(finished: Run, tmp_path: Path) -> None:
    run, manifest = str(finished.output_dir), str(finished.digits / "test" / "manifest.json")
    before = finished.records()
    printed = run_verb("evaluate", run, "--manifest", manifest, "--metrics", "latents", "--figures")
    assert "active_units" in printed
    assert finished.records()[:-1] == before
    last = finished.records()[-1]
    assert last["global_step"] == 400
    assert 0 < last["eval/latent/active_units"] <= 16
    assert (finished.output_dir / "figures" / "learning_curves.png").is_file()
    assert "latent/active_units/image" in write_report(finished.output_dir).read_text()
    # Data that is not the run's own held-out data is measured, but does not become part of the record.
    other = str(finished.digits / "train" / "manifest.json")
    run_verb("evaluate", run, "--manifest", other, "--metrics", "latents")
    assert finished.records()[-1] == last
    # Nor do figures that cannot be drawn cost the results.
    (tmp_path / "file").touch()
    options = ["--metrics", "accuracy", "--figures", str(tmp_path / "file" / "figures")]
    with pytest.raises(AssertionError, match="Not a directory"):
        run_verb("evaluate", run, "--manifest", manifest, *options)
    assert "eval/accuracy/label/from_image" in finished.records()[-1]
    assert len(finished.records()) == len(before) + 2


def test_ranks_that_see_other_disks_do_as_rank_0_says(
    make_run: Callable[..., Run], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 does not see the training shards, rank 1 not the run directory around the checkpoint."""
    monkeypatch.setenv("HOME", str(digits))
    manifest = str(digits / "test" / "manifest.json")
    data = ("--data.train_manifest", "~/train/manifest.json", "--data.eval_manifest", manifest)
    run = make_run("run", "--training.steps", "2", *data)
    run.train(1, "--evaluation.joint_nll_samples", "0")
    away = shutil.copytree(run.checkpoint(2), tmp_path / "away" / run.checkpoint(2).name)
    options = ["--manifest", manifest, "--metrics", "all", "--joint-nll-samples", "2", "--prior-samples", "8"]
    options += ["--classifier-steps", "20", "--probe-samples", "100"]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank, (path, home) in enumerate([(run.output_dir, tmp_path), (away, digits)]):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "HOME": str(home), **meeting}
        process = subprocess.Popen(
            [sys.executable, "-m", "jmvae_dist", "evaluate", str(path), *options],
            env=launch_environment() | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        ranks.append(process)
    try:
        outputs = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert "left out: coherence needs the training shards" in outputs[0]
    assert outputs[1] == ""
    assert run.records()[-1]["eval/joint_nll_samples"] == 2


def test_chosen_metrics_only(finished: Run, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    manifest = str(finished.digits / "test" / "manifest.json")
    run_verb(
        "evaluate",
        str(finished.output_dir),
        "--manifest",
        manifest,
        "--metrics",
        "accuracy",
        "--no-log",
        *("--out", str(out)),
    )
    assert list(json.loads(out.read_text())["metrics"]) == [
        "eval/samples",
        "eval/accuracy/label/from_image",
    ]


def test_samples(finished: Run, tmp_path: Path) -> None:
    run, manifest = str(finished.output_dir), str(finished.digits / "test" / "manifest.json")
    run_verb("sample", run, "--out", str(tmp_path / "prior"), "--n", "7")
    run_verb("sample", run, "--out", str(tmp_path / "again"), "--n", "7")
    run_verb("sample", run, "--out", str(tmp_path / "given"), "--given", "label", "--manifest", manifest, "--n", "12")
    exported = str(tmp_path / "exported")
    run_verb("checkpoint", "export", run, "--out", exported)
    run_verb(
        "sample", exported, "--out", str(tmp_path / "all"), "--given", "label", "--manifest", manifest, "--n", "999"
    )
    prior = np.load(tmp_path / "prior" / "samples.npz", allow_pickle=False)
    assert {name: prior[name].shape for name in prior} == {
        "latent.z": (7, 16),
        "generated.image": (7, 1, 8, 8),
        "generated.label": (7, 10),
    }
    assert np.allclose(prior["generated.label"].sum(-1), 1, atol=1e-5)
    again = np.load(tmp_path / "again" / "samples.npz", allow_pickle=False)
    assert all(np.array_equal(prior[name], again[name]) for name in prior)
    given = np.load(tmp_path / "given" / "samples.npz", allow_pickle=False)
    assert given["generated.image"].shape == (12, 1, 8, 8)
    assert given["data.label"].shape == (12, 10)
    everything = np.load(tmp_path / "all" / "samples.npz", allow_pickle=False)
    assert set(everything) == {
        "latent.z",
        *(f"{kind}.{m}" for kind in ("generated", "data") for m in ("image", "label")),
    }
    assert everything["latent.z"].shape == (359, 16)
    assert np.allclose(everything["latent.z"][:12], given["latent.z"], atol=1e-5)
    for folder in ("prior", "given", "all"):
        assert (tmp_path / folder / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_export_and_checkpoint_give_the_same_model(finished: Run, tmp_path: Path) -> None:
    run_verb("checkpoint", "export", str(finished.output_dir), "--out", str(tmp_path / "exported"))
    models = [
        jmvae_dist.load_model(path) for path in (finished.output_dir, finished.checkpoint(400), tmp_path / "exported")
    ]
    weights = finished.tensors(400)
    for model in models:
        assert not model.training
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.reshape(-1), weights[f"weight/{name}"])
    image = torch.rand(3, 1, 8, 8)
    predictions = [model.predict({"image": image}, cond_mod="image", gen_mod="label") for model in models]
    assert len(predictions) == 3
    (tmp_path / "exported" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(jmvae_dist.errors.CheckpointError, match="sha256"):
        jmvae_dist.load_model(tmp_path / "exported")


def test_an_export_that_cannot_be_written_says_so(finished: Run, tmp_path: Path) -> None:
    result = subprocess.run(
        [*finished.command()[:3], "checkpoint", "export", str(finished.output_dir), "--out", str(tmp_path / "out")],
        env=launch_environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert result.returncode == 1
    assert "model.safetensors: cannot be written" in result.stderr
    assert "Traceback" not in result.stderr


def test_run_directory_holds_what_the_design_says(finished: Run) -> None:
    for name in ("config.yaml", "metrics.jsonl", "report.html", "evaluation.json", "checkpoints/LATEST"):
        assert (finished.output_dir / name).is_file(), name
    figures = sorted(path.name for path in (finished.output_dir / "figures").iterdir())
    drawn = {"given_image", "given_label", "prior_samples", "reconstruction", "cross_modal_matrix"}
    assert {name.removesuffix(".png") for name in figures} >= drawn | {"interpolation", "projection"}
    steps = [record["global_step"] for record in finished.records() if "eval/elbo" in record]
    assert steps == [300, 400]
    training = next(record for record in finished.records() if "loss/total" in record)
    expected = {
        *("global_step", "samples_seen", "epoch", "elbo", "grad_norm", "loss/total", "loss/reconstruction"),
        *("loss/reconstruction/image", "loss/reconstruction/label", "loss/kl_prior", "loss/kl_unimodal"),
        *("loss/kl_unimodal/image", "loss/kl_unimodal/label", "schedule/annealing", "schedule/learning_rate"),
        "guards/skipped_steps",
    }
    assert set(training) == expected
    parts = [training[f"loss/reconstruction/{name}"] for name in ("image", "label")]
    assert sum(parts) == pytest.approx(training["loss/reconstruction"], rel=1e-6)


def test_saved_configuration_repeats_the_run(finished: Run, make_run: Callable[..., Run]) -> None:
    again = make_run("again")
    run_verb(
        *("train", "--config", str(finished.output_dir / "config.yaml")),
        *("--output_dir", str(again.output_dir), "--data.eval_manifest", "null"),
        num_processes=2,
    )
    records = [[record for record in run.records() if "loss/total" in record] for run in (finished, again)]
    assert records[0] == records[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["evaluate", "RUN", "--manifest", "nowhere.json"], 2, "no manifest at nowhere.json"),
        (
            ["evaluate", "RUN", "--manifest", "TEST", "--metrics", "fid"],
            2,
            "choose from default,all,elbo,accuracy,joint_nll",
        ),
        (["evaluate", "nowhere", "--manifest", "TEST"], 2, "no such directory"),
        (["evaluate", "RUN", "--manifest", "TRAIN", "--metrics", "probe"], 2, "is one of them, and so not held-out"),
        (["evaluate", "RUN", "--manifest", "TEST", "--figures", "--no-log"], 2, "give a directory for the figures"),
        (["sample", "RUN", "--out", "/tmp/x", "--given", "label"], 2, "belong together"),
        (["sample", "RUN", "--out", "/tmp/x", "--given", "sound", "--manifest", "TEST"], 2, "image, label"),
        (["checkpoint", "verify", "nowhere"], 2, "no such directory"),
        (["checkpoint", "verify", "TEST_FOLDER"], 1, "not a checkpoint manifest"),
        (["report", "TEST_FOLDER"], 2, "not a run directory"),
        (["frobnicate"], 2, "the verbs are"),
    ],
)
def test_mistakes(finished: Run, arguments: list[str], code: int, message: str) -> None:
    test_folder = finished.digits / "test"
    places = {"RUN": finished.output_dir, "TEST": test_folder / "manifest.json", "TEST_FOLDER": test_folder}
    places["TRAIN"] = finished.digits / "train" / "manifest.json"
    command = [str(places.get(argument, argument)) for argument in arguments]
    printed = run_verb(*command, expect=code)
    assert message in printed
    assert "Traceback" not in printed

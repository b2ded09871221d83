"""What a run is, before it starts: shares of the batch, and what a checkpoint may be continued as."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jmvae_dist.__main__ import main
from jmvae_dist.config_io import parse_run_config
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.errors import ConfigError
from jmvae_dist.training.setup import (
    ResolvedRun,
    check_machine,
    check_output_dir,
    check_same_model,
    check_same_transforms,
    describe_changes,
    evaluation_views,
    num_micro_batches,
    resolve_run,
    summarize,
)
from tests.conftest import ROOT, Run


def resolve(digits: Path, *arguments: str, world_size: int = 1) -> ResolvedRun:
    manifests = [
        f"--data.train_manifest={digits / 'train' / 'manifest.json'}",
        f"--data.eval_manifest={digits / 'test' / 'manifest.json'}",
    ]
    config = ["--config", str(ROOT / "configs" / "digits.yaml")]
    return resolve_run(parse_run_config([*config, *manifests, *arguments]), world_size)


def test_what_depends_on_the_data_is_filled_in(digits: Path) -> None:
    run = resolve(digits, "--training.epochs", "3")
    assert run.total_steps == 68  # 3 epochs of 1,438 samples in batches of 64
    assert run.model_config.input_dims == {"image": (1, 8, 8), "label": (10,)}
    assert run.model_config.n_modalities == 2
    assert run.annealing.warmup_steps == 225  # 10 epochs
    summary = summarize(run, world_size=1)
    assert "1,438 samples of image, label; 68 steps" in summary
    assert "note:" not in summary


def test_a_batch_larger_than_the_data_is_noted(digits: Path) -> None:
    run = resolve(digits, "--training.global_batch_size", "2876")
    assert summarize(run, world_size=1).endswith(
        "training.global_batch_size is larger than the data: every step takes a sample 2.0 times on average"
    )


def test_the_order_of_input_dims_is_that_of_the_modalities(digits: Path) -> None:
    run = resolve(digits, "--model.input_dims", "{label: [10], image: [1, 8, 8]}")
    assert list(run.modalities) == list(run.model_config.input_dims or {}) == ["label", "image"]


@pytest.mark.parametrize(
    ("micro_batch_size", "world_size", "expected"),
    [(None, 1, 1), (64, 1, 1), (63, 1, 2), (1, 2, 32), (10, 2, 4), (8, 3, 3)],
)
def test_micro_batches_are_as_many_on_every_rank(
    digits: Path, micro_batch_size: int | None, world_size: int, expected: int
) -> None:
    size = "null" if micro_batch_size is None else str(micro_batch_size)
    run = resolve(digits, "--training.micro_batch_size", size, world_size=world_size)
    assert num_micro_batches(run, world_size) == expected


def test_gradients_are_not_shared_where_a_gpu_is_taken(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine is only said to have one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    shared = ("--training.gradient_reduction", "shared_memory")
    check_machine(resolve(digits, *shared, "--training.device", "cpu").config)
    with pytest.raises(ConfigError, match=r"shared_memory is for CPUs, and training\.device auto takes a GPU"):
        check_machine(resolve(digits, *shared).config)


def test_a_run_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """Also by root, who may write wherever there is something to write to."""
    (tmp_path / "file").touch()
    refused = {
        Path("/proc/x"): "made in /proc (No such file or directory)",
        tmp_path / "file" / "runs" / "x": f"made in {tmp_path / 'file'} (Not a directory)",
        tmp_path / "file": "written (Not a directory)",
    }
    for folder, reason in refused.items():
        with pytest.raises(ConfigError, match=re.escape(f"output_dir: {folder} cannot be {reason}")):
            check_output_dir(folder)
    for folder in (tmp_path, tmp_path / "runs" / "x"):
        check_output_dir(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_train_refuses_such_a_run_directory_before_it_starts(
    digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(Path("/proc/x"), digits, ["--training.steps", "5"])
    for arguments in (run.arguments("--check"), run.arguments()):
        assert main(["train", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("jmvae-dist train: output_dir: /proc/x cannot be made in /proc (")


def test_training_data_is_not_held_out(digits: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.eval_manifest: shard .* is also one of data\.train_manifest"):
        resolve(digits, "--data.eval_manifest", str(digits / "train" / "manifest.json"))


def test_another_model_is_named(digits: Path) -> None:
    run = resolve(digits)
    saved = run.describe_model()
    check_same_model(saved, resolve(digits, "--model.alpha", "3").describe_model())
    for setting, value in (("networks.activation", "tanh"), ("latent_dim", "3")):
        with pytest.raises(ConfigError, match=rf"model\.{setting} was .*, is now {value}"):
            check_same_model(saved, resolve(digits, f"--model.{setting}", value).describe_model())


def test_changes_are_described_by_key() -> None:
    before = {"a": 1, "b": {"c": [1, 2], "d": None}}
    assert describe_changes(before, {"a": 1, "b": {"c": [1, 2], "d": None}}) == []
    assert describe_changes(before, {"a": 2, "b": {"c": [1], "d": None}, "e": 5}) == [
        "a 1 -> 2",
        "b.c [1, 2] -> [1]",
        "e None -> 5",
    ]


def test_the_model_sees_the_transformed_shape(digits: Path) -> None:
    one_hot = "{label: [{class_path: tests.unit.training.test_setup.Halve}], image: [{name: binarize, keyed: true}]}"
    run = resolve(digits, "--data.transforms", one_hot, "--training.seed", "5")
    assert run.model_config.input_dims == {"image": (1, 8, 8), "label": (5,)}
    described = run.describe_modalities()
    assert described["image"]["transforms"] == [{"name": "binarize", "keyed": True}]
    assert described["image"]["transforms_seed"] == 5
    # As another process would, from a checkpoint: the same views, but no code that the user does not name.
    with pytest.raises(ConfigError, match=r"--trust-class tests\.unit\.training\.test_setup\.Halve"):
        evaluation_views(described, run.train_manifest, "--manifest", trusted=[])
    trusted = ["tests.unit.training.test_setup.Halve"]
    views = evaluation_views(described, run.train_manifest, "--manifest", trusted=trusted)
    assert [view.to_json() for view in views] == list(described.values())


@pytest.mark.parametrize(
    "damage",
    [
        {"transforms": "resize"},
        {"transforms": [3]},
        {"transforms": [{"name": "one_hot"}]},
        {"transforms": [{"name": "resize", "size": [10**9, 10**9]}]},
        {"transforms": [{"class_path": 5}]},
        {"run_tokenizer": []},
        {"transforms_seed": -1},
    ],
    ids=str,
)
def test_a_checkpoint_from_anywhere_is_checked(digits: Path, damage: dict[str, Any]) -> None:
    run = resolve(digits)
    described = run.describe_modalities()
    described["image"] |= damage
    with pytest.raises(ConfigError, match="image"):
        evaluation_views(described, run.train_manifest, "--manifest", trusted=[])


def named(manifest: Manifest, *names: str) -> Manifest:
    return dataclasses.replace(manifest, source={"class_names": {"label": list(names)}})


def test_names_of_classes_come_with_the_modalities_and_change_nothing_else(digits: Path) -> None:
    run = resolve(digits)
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    with_names = dataclasses.replace(run, train_manifest=named(run.train_manifest, *words))
    plain, described = run.describe_modalities(), with_names.describe_modalities()
    assert "class_names" not in plain["label"]
    assert described["label"] == {**plain["label"], "class_names": words}
    assert described["image"] == plain["image"]
    # A resume, and other data, may have other names or none.
    check_same_transforms(plain, described)
    check_same_transforms(described, plain)
    for expected in (plain, described):
        for data in (run.train_manifest, with_names.train_manifest, named(run.train_manifest, *"abcdefghij")):
            assert [view.name for view in evaluation_views(expected, data, "--manifest")] == ["image", "label"]
    swapped = named(run.train_manifest, "one", "zero", *words[2:])
    with pytest.raises(ConfigError, match=r"'one' is class 0 of 'label', and class 1 in the training data"):
        evaluation_views(described, swapped, "--manifest")


def test_held_out_classes_have_the_numbers_of_the_training_data(digits: Path, tmp_path: Path) -> None:
    """Else every accuracy would be that of other classes."""
    names = [str(number) for number in range(10)]
    for split, listed in (("train", names), ("test", [*names[5:], *names[:5]])):
        shutil.copytree(digits / split, tmp_path / split)
        manifest = Manifest.load(digits / split / "manifest.json")
        named(manifest, *listed).save(tmp_path / split / "manifest.json")
    with pytest.raises(ConfigError, match=r"data\.eval_manifest: '5' is class 0 of 'label', and class 5 in the"):
        resolve(tmp_path)


def test_data_standardised_otherwise_is_refused_without_its_numbers(digits: Path) -> None:
    shards = resolve(digits).train_manifest.shards
    rna = Modality("rna", "float32", (20_000,), offset=[0.5] * 20_000, scale=[2.0] * 20_000)
    described = {"rna": rna.to_json()}
    for other in (Modality("rna", "float32", (20_000,)), dataclasses.replace(rna, scale=[3.0] * 20_000)):
        with pytest.raises(
            ConfigError, match=r"'rna' is not standardised by the numbers of the .* --standardize-like"
        ) as caught:
            evaluation_views(described, Manifest.create([other], shards, {}), "--manifest", trusted=[])
        assert len(str(caught.value)) < 300
    assert evaluation_views(described, Manifest.create([rna], shards, {}), "--manifest", trusted=[])
    scaled = dataclasses.replace(rna, offset=0.0, scale=2.0)
    with pytest.raises(ConfigError, match=r"'rna' has scale 1\.0, but the training data has 2\.0"):
        evaluation_views(
            {"rna": scaled.to_json()}, Manifest.create([dataclasses.replace(scaled, scale=1.0)], shards, {}), ""
        )


def test_images_of_any_size_need_a_model_that_resizes(digits: Path) -> None:
    shards = resolve(digits).train_manifest.shards
    other = Manifest.create([Modality.image("photo", (1, None, None))], shards, {})
    described = {"photo": Modality.image("photo", (1, 24, 32)).to_json()}
    with pytest.raises(ConfigError) as caught:
        evaluation_views(described, other, "--manifest", trusted=[])
    message = str(caught.value)
    assert message.startswith("--manifest: the images of 'photo' differ in size")
    # Setting it is for a training, and `evaluate` has no such option.
    assert "bring them to this size before" in message
    assert "or train with data.transforms: {photo: [{name: resize, size: [24, 32]}]}" in message
    described["photo"]["transforms"] = [{"name": "resize", "size": [24, 32]}]
    (view,) = evaluation_views(described, other, "--manifest", trusted=[])
    assert view.shape == (1, 24, 32)


def test_other_transforms_are_another_run(digits: Path) -> None:
    plain = resolve(digits).describe_modalities()
    binary = resolve(digits, "--data.transforms", "{image: [{name: binarize}]}").describe_modalities()
    check_same_transforms(plain, plain)
    with pytest.raises(ConfigError, match=r"data\.transforms\.image was None, is now \[\{'name': 'binarize'\}\]"):
        check_same_transforms(plain, binary)


class Halve:
    """Keeps every second value."""

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] // 2)

    def __call__(self, values: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return values[..., ::2]

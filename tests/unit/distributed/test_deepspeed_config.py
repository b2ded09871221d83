"""The user's DeepSpeed options: passed on, or refused where the run's configuration decides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jmvae_dist.distributed.deepspeed import make_plugin, prepare_process
from jmvae_dist.distributed.deepspeed_config import build_config
from jmvae_dist.errors import ConfigError
from jmvae_dist.training_config import DeepSpeedSection


def options_in(folder: Path, options: object) -> DeepSpeedSection:
    path = folder / "options.json"
    path.write_text(json.dumps(options))
    return DeepSpeedSection(config_file=str(path))


def test_options_are_passed_on(tmp_path: Path) -> None:
    section = options_in(tmp_path, {"zero_optimization": {"reduce_bucket_size": 7}, "steps_per_print": 9})
    config = build_config("zero2", section)
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["steps_per_print"] == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_batch_size": 8}, "set training.global_batch_size instead"),
        ({"fp16": {"enabled": True}}, "set training.precision instead"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "set training.precision instead"),
        ({"zero_optimization": {"stage": 1}}, "set training.engine instead"),
        ({"zero_optimization": {"cpu_offload": True}}, "set training.deepspeed.offload_optimizer instead"),
        ({"zero_optimization": 2}, "must hold an object"),
        ([], "must hold an object"),
    ],
)
def test_what_the_run_decides_is_refused(tmp_path: Path, options: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config("zero2", options_in(tmp_path, options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_optimization": {"reduce_bucket_sice": 7}}, "reduce_bucket_sice Extra inputs are not permitted"),
        (
            {"zero_optimization": {"reduce_bucket_size": "large"}},
            "reduce_bucket_size Input should be a valid",
        ),
        ({"elasticity": {"enabled": True}}, "no longer supported"),
    ],
)
def test_what_deepspeed_does_not_accept_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: object, message: str
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # `prepare_process` sets it for good
    prepare_process(on_cpu=True)
    with pytest.raises(ConfigError, match=message) as caught:
        make_plugin(build_config("zero2", options_in(tmp_path, options)))
    assert str(caught.value).startswith("training.deepspeed.config_file: DeepSpeed does not accept it (")
    assert "\n" not in str(caught.value)

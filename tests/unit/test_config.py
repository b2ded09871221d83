"""Configuration: every mistake is one line that names the key and what is allowed; printing reproduces."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jmvae_dist.config import RunConfig
from jmvae_dist.config_io import dump_run_config, parse_run_config, save_run_config
from jmvae_dist.errors import ConfigError
from jmvae_dist.training.setup import resolve_run
from tests.conftest import ROOT, launch_environment

DIGITS = str(ROOT / "configs" / "digits.yaml")


def parse(*arguments: str) -> RunConfig:
    return parse_run_config(["--config", DIGITS, *arguments])


# (arguments, what the message must contain: the key, and what is allowed or close)
MISTAKES = [
    (["--training.stps", "3"], ["training.stps", "did you mean steps"]),
    (["--trainning.steps", "3"], ["trainning", "did you mean training"]),
    (["--schedule.annealing.shap", "linear"], ["schedule.annealing.shap", "did you mean shape"]),
    (["--model.foo", "3"], ["model.foo", "unknown key"]),
    (["training.steps=3"], ["unexpected argument", "--section.key value"]),
    (["--training.epochs", "many"], ["training.epochs", "many", "float or null"]),
    (["--tracking.wandb.name", "~"], ["tracking.wandb.name", "write null, or '~' in a --config file"]),
    (["--data.cache.dir=NULL"], ["data.cache.dir", "write null"]),
    (["--data.tokenizers.text", "{dir: '~'}"], ["data.tokenizers.text", "a section with a class_path"]),
    (["--tracking.wandb.tags", "{name: '#1'}"], ["tracking.wandb.tags", "{'name': '#1'} is not allowed"]),
    (["--checkpoint.every_steps", "1.5"], ["checkpoint.every_steps", "1.5", "int or null"]),
    (["--training.precision", "fp7"], ["training.precision", "fp7", "'fp32', 'bf16'"]),
    (["--training.compile", "model", "--training.engine", "zero3"], ["training.compile", "zero3"]),
    (["--training.gradient_reduction", "mpi"], ["training.gradient_reduction", "mpi", "'shared_memory'"]),
    (
        ["--training.gradient_reduction", "shared_memory", "--training.engine", "zero1"],
        ["training.gradient_reduction: shared_memory", "engine zero1", "use auto"],
    ),
    (
        ["--training.gradient_reduction", "shared_memory", "--training.device", "cuda"],
        ["training.gradient_reduction: shared_memory", "device cuda", "use auto"],
    ),
    (["--training.engine", "horovod"], ["training.engine", "horovod", "ddp"]),
    (["--optimizer.betas", "[0.9]"], ["optimizer.betas", "tuple[float, float]"]),
    (["--optimizer.betas", "[0.9, 1.0]"], ["optimizer.betas", "below 1"]),
    (["--optimizer.eps", "0"], ["optimizer.eps", "greater than 0"]),
    (["--training.steps", "10"], ["exactly one of training.steps and training.epochs"]),
    (["--training.global_batch_size", "0"], ["training.global_batch_size", "greater than 0"]),
    (["--data.lanes", "7"], ["data.lanes", "7", "divide training.global_batch_size (64)"]),
    (["--data.shuffle_window", "0"], ["data.shuffle_window", "at least 1"]),
    (["--data.cache.max_bytes", "10"], ["data.cache.max_bytes", "null without data.cache.dir"]),
    (["--data.cache.dir", " "], ["data.cache.dir", "the path of a directory"]),
    (["--data.cache.prefetch_shards", "-1"], ["data.cache.prefetch_shards", "between 0 and 1000"]),
    (["--data.remote.attempts", "0"], ["data.remote.attempts", "between 1 and 100"]),
    (["--data.remote.stall_timeout_s", "0"], ["data.remote.stall_timeout_s", "greater than 0"]),
    (["--data.modalities", "[image]"], ["data.modalities", "at least two"]),
    (["--data.transforms", "{image: [{nam: scale}]}"], ["data.transforms.image[0]", "a name (scale, resize,"]),
    (["--data.transforms", "{image: [{name: blur}]}"], ["data.transforms.image[0].name", "'blur'", "'binarize'"]),
    (["--data.transforms", "{image: [{name: resize}]}"], ["data.transforms.image[0]: resize needs size"]),
    (["--data.transforms", "{image: [{name: resize, size: [0, 3]}]}"], ["image[0].size", "[height, width]"]),
    (["--data.transforms", "{image: [{name: scale, factor: 2}]}"], ["no parameter 'factor'", "offset, scale"]),
    (["--data.transforms", "{image: [{name: binarize, keyed: true, threshold: 1}]}"], ["not both"]),
    (["--data.transforms", "{image: [{class_path: os}]}"], ["image[0].class_path", "module.Class"]),
    (["--data.tokenizers", "{text: {class_path: a.B, length: 0}}"], ["data.tokenizers.text.length", "at least 1"]),
    (["--data.tokenizers", "{text: {class_path: a.B, size: 1}}"], ["data.tokenizers.text", "unknown key 'size'"]),
    (["--data.on_bad_sample", "skip"], ["data.on_bad_sample", "'stop', 'mask'"]),
    (["--data.bad_sample_tolerance", "1"], ["data.bad_sample_tolerance", "below 1"]),
    (["--data.bad_sample_burst", "-1"], ["data.bad_sample_burst", "at least 0"]),
    (["--data.decode_threads", "0"], ["data.decode_threads", "1 to 256"]),
    (["--model.alpha", "-1"], ["model.alpha", "at least 0"]),
    (["--model.beta", "nan"], ["model.beta", "nan is not allowed"]),
    (["--model.latent_dim", "0"], ["model.latent_dim", "at least 1"]),
    (["--model.decoders_dist", "{image: poisson, label: categorical}"], ["model.decoders_dist", "poisson", "normal"]),
    (["--model.decoder_dist_params", "{image: {scale: 1}}"], ["image.scale", "soft_targets", "bernoulli"]),
    (["--model.networks.encoder_hidden_dims", "[]"], ["model.networks.encoder_hidden_dims", "non-empty"]),
    (
        ["--tracking.wandb.name.b", "3"],
        ["tracking.wandb.name has no keys of its own", "must be str or null"],
    ),
    (
        ["--training.steps.x=3"],
        ["training.steps.x: training.steps has no keys of its own; write --training.steps"],
    ),
    (["--data.transforms.image.name", "binarize"], ["data.transforms.image has no keys of its own", "be list["]),
    (
        ["--model.decoder_dist_params.image.soft_targets.x", "1"],
        ["image.soft_targets.x: ", "soft_targets is True, which has no"],
    ),
    (
        ["--model.decoders_dist.image", "a.b", "--model.decoders_dist.image.x.y", "1"],
        ["model.decoders_dist.image.x.y: model.decoders_dist.image is 'a.b', which has no keys of its own"],
    ),
    (
        ["--model.decoder_dist_params", "{image.scale: 3}"],
        ["model.decoder_dist_params.image.scale: names below", "not joined by dots; write image: {scale: ...} in it"],
    ),
    (["--modle.networks.joint_encoder.init_args.size", "3"], ["modle", "did you mean model"]),
    (["--model.networks.joint_encoder.init_args", "{size: 3}"], ["model.networks.joint_encoder.kind", "'fusion'"]),
    (["--training.seed"], ["training.seed: a value must follow --training.seed"]),
    (["--training.sed", "--check"], ["training.sed", "did you mean seed"]),
    (["--model.alpha", "-1e-3"], ["model.alpha", "at least 0"]),
    (["--tracking.wandb", "null"], ["tracking.wandb: the section is empty"]),
    (["--tracking.wandb", "{name: 3}"], ["tracking.wandb.name: 3 is not allowed", "str or null"]),
    (["--evaluation", "a.Class"], ["evaluation: 'a.Class' is not allowed", "a section with some of every_steps"]),
    (["--model..alpha", "3"], ["model.: unknown key"]),
    (["--training.seed+", "3"], ["training.seed+: unknown key (did you mean seed?)"]),
    (["--schedule.learning_rate.peak", "0"], ["schedule.learning_rate.peak", "greater than 0"]),
    (["--schedule.learning_rate.warmup_steps", "3"], ["schedule.learning_rate", "at most one"]),
    (["--checkpoint.keep_last", "1"], ["checkpoint.keep_last", "at least 2"]),
    (["--evaluation.joint_nll_samples", "-1"], ["evaluation.joint_nll_samples", "at least 0"]),
    (["--config", "nowhere.yaml"], ["config", "nowhere.yaml", "does not exist"]),
    (["--tracking", "offline"], ["tracking", "offline", "a section", "wandb"]),
    (["--schedule.learning_rate", "0.1"], ["schedule.learning_rate", "0.1", "a section", "peak"]),
    (["--training.global_batch_size", "9" * 400], ["training.global_batch_size", "finite"]),
    (["--model.alpha", "9" * 400], ["too large"]),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES, ids=[" ".join(case[0]) for case in MISTAKES])
def test_mistakes_are_one_clear_line(arguments: list[str], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("training: {stps: 3}", "training.stps: unknown key"),
        ("training: [1", "Problems parsing config"),
        ("- a\n- b\n", "bad.yaml: - a - b is not allowed; a file has the sections output_dir"),
        ("trainin: {steps: 3}", "trainin: unknown key"),
        ("model: !!python/object/apply:os.system ['touch /tmp/never']", "Problems parsing config"),
        ("training: {seed: 1}\nmodel: {alpha: 1}\ntraining: {log_every_steps: 5}\n", "'training' is given twice"),
        ("training: {seed: 1, log_every_steps: 5, seed: 2}", "'seed' is given twice"),
        ("data: {x.init_args: {a: 1}}", "bad.yaml: data.x: unknown key; allowed in data: train_manifest"),
        ("init_args.foo: 3", "bad.yaml: init_args: unknown key; allowed in the configuration: output_dir"),
        (
            "tracking: {wandb: {name.b: 3}}",
            "tracking.wandb.name.b: tracking.wandb.name has no keys of its own",
        ),
        ("model.decoder_dist_params.image.scale: 3", "nested, not joined by dots; write image: {scale: ...} in it"),
        (
            "model: {decoder_dist_params: {image.scale: 3}}",
            "model.decoder_dist_params.image.scale: names below",
        ),
        (
            "model: {networks: {joint_encoder: {class_path: a.B, init_args.size: 3}}}",
            "names below model.networks.joint_encoder are nested, not joined by dots; write init_args: {size: ...}",
        ),
        (
            "data: {transforms: {image: [{class_path: a.B, init_args.x: 3}]}}",
            "data.transforms.image[0].init_args.x: names below data.transforms.image[0] are nested",
        ),
        ("optimizer:\nmodel: {alpha: 1}\n", "optimizer: the section is empty"),
        ("tracking:\nmodel: {alpha: 1}\n", "tracking: the section is empty"),
        ("tracking: {wandb: }\n", "tracking.wandb: the section is empty"),
        ("model: &m {networks: *m}\n", "refers to itself"),
        ("[" * 3000, "or 100 levels"),
        pytest.param("- " * 100_000, "or 100 levels", id="deep enough to end the interpreter"),
        pytest.param(f"? [{'[' * 200}", "or 100 levels", id="deep key"),
        pytest.param("- \n" * 300_000, "more than 100000 values", id="many values"),
        ("0:", "bad.yaml: Problems parsing config: keys must be text"),
        pytest.param("9" * 5000, "bad.yaml: Problems parsing config: Exceeds the limit", id="digits"),
        ("", "bad.yaml: an empty file is not allowed"),
        ("x" * 10_000, f"bad.yaml: {'x' * 60}... is not allowed"),
        ("training: {seed: null}", "bad.yaml: training.seed: null is not allowed; it must be int"),
        ("data: {transforms: null}", "bad.yaml: data.transforms: null is not allowed; it must be dict["),
        ("training: {epochs: many}", "bad.yaml: training.epochs: many is not allowed; it must be float or null"),
        ("tracking: 3", "bad.yaml: tracking: 3 is not allowed; it must be a section with some of wandb"),
        ("tracking: [a]", "bad.yaml: tracking: ['a'] is not allowed; it must be a section"),
        pytest.param(f"tracking: ~{'x' * 5000}", "must be a section with some of wandb", id="no file name"),
        ("tracking: nowhere.yaml", "bad.yaml: tracking: 'nowhere.yaml' is not allowed; it must be a section"),
        ("training..seed: 3", "bad.yaml: training.: unknown key"),
        ("training: {'': 3}", "bad.yaml: training.: unknown key"),
        pytest.param(f"model: {{input_dims: {{a: {'[' * 200}{']' * 200}}}}}", "or 100 levels", id="deep"),
        pytest.param(
            f"a: [&a0 [1, 2]{''.join(f', &a{n} [*a{n - 1}, *a{n - 1}]' for n in range(1, 40))}]",
            "more than 100000 values, aliases counted",
            id="aliases",
        ),
        pytest.param(
            f"a: [&a0 [1]{''.join(f', &a{n} [*a{n - 1}]' for n in range(1, 200))}]",
            "or 100 levels",
            id="deep aliases",
        ),
    ],
)
def test_mistakes_in_files(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        parse("--config", str(path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_value_is_not_said_to_be_from_a_file_that_an_option_overrides(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text("training: {epochs: 3}\nmodel: {decoder_dist_params: {image: {}}}")
    for option in ("--training.epochs", "--model.decoder_dist_params.image"):
        with pytest.raises(ConfigError, match=f"^{option.removeprefix('--')[:13]}"):
            parse("--config", str(tmp_path / "first.yaml"), option, "many")


def test_missing_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"output_dir, data\.train_manifest, training\.global_batch_size"):
        parse_run_config([])


# Mistakes that only the data can show: made against real digits shards.
DATA_MISTAKES = [
    (["--data.train_manifest", "nowhere/manifest.json"], ["data.train_manifest", "nowhere/manifest.json"]),
    (["--data.train_manifest", str(ROOT)], [f"data.train_manifest: no manifest at {ROOT}/manifest.json"]),
    (["--data.eval_manifest", "nowhere/manifest.json"], ["data.eval_manifest", "nowhere/manifest.json"]),
    (["--data.modalities", "[image, sound]"], ["data.modalities", "sound", "image, label"]),
    (["--data.transforms", "{sound: []}"], ["data.transforms.sound", "the run uses image, label"]),
    (["--data.transforms", "{image: [{name: resize, size: [4, 4]}]}"], ["image[0]: resize is for encoding 'image'"]),
    (["--data.transforms", "{image: [{class_path: nowhere_to_be_found.X}]}"], ["image[0]", "cannot be imported"]),
    (
        ["--model.decoders_dist", "{picture: normal, label: categorical}"],
        ["model.decoders_dist: must name all modalities, but ['picture', 'label'] lack 'image', which"],
    ),
    (
        ["--model.decoder_dist_params", "{picture: {scale: 1}}"],
        ["model.decoders_dist: must", "lack 'picture', which"],
    ),
    (["--model.decoders_dist", "{image: bernoulli}"], ["model.decoders_dist", "label"]),
    (["--model.input_dims", "{image: [1, 28, 28], label: [10]}"], ["model.input_dims.image", "[1, 8, 8]"]),
    (["--model.input_dims", "{picture: [1, 8, 8], label: [10]}"], ["'image'", "['picture', 'label']"]),
    (["--model.n_modalities", "3"], ["model.n_modalities", "2"]),
    (["--model.rescale_factors", "{image: 1}"], ["model.rescale_factors", "or none (those of the data; select some"]),
]


@pytest.mark.parametrize(("arguments", "expected"), DATA_MISTAKES, ids=[" ".join(c[0]) for c in DATA_MISTAKES])
def test_mistakes_against_the_data(digits: Path, arguments: list[str], expected: list[str]) -> None:
    manifests = [
        f"--data.train_manifest={digits / 'train' / 'manifest.json'}",
        f"--data.eval_manifest={digits / 'test' / 'manifest.json'}",
    ]
    with pytest.raises(ConfigError) as caught:
        resolve_run(parse(*manifests, *arguments), world_size=1)
    for part in expected:
        assert part in str(caught.value)


def test_more_processes_than_lanes(digits: Path) -> None:
    manifest = str(digits / "train" / "manifest.json")
    config = parse("--data.train_manifest", manifest, "--data.eval_manifest", "null", "--data.lanes", "4")
    with pytest.raises(ConfigError, match=r"data\.lanes: 4 lanes .* 8 processes.*\[8, 16, 32, 64\]"):
        resolve_run(config, world_size=8)


def test_exit_code_and_stderr_of_the_command(digits: Path) -> None:
    """One line on standard error, nothing else, exit code 2; also through the launcher with 2 processes."""
    arguments = ["train", "--config", DIGITS, "--data.train_manifest", "nowhere.json"]
    for launcher in (
        [sys.executable, "-m", "jmvae_dist"],
        ["bash", str(ROOT / "launch" / "local.sh"), "2"],
    ):
        result = subprocess.run(
            [*launcher, *arguments], capture_output=True, text=True, env=launch_environment(), check=False
        )
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.startswith("jmvae-dist train: data.train_manifest: no manifest at nowhere.json")
        assert result.stderr.count("\n") == 1


def test_printed_configuration_reproduces_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--checkpoint.every_s", "null", "--training.seed", "7", "--model.alpha", "0.25"]
    with pytest.raises(SystemExit) as caught:
        parse(*overrides, "--print_config")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    assert parse_run_config(["--config", str(path)]) == parse(*overrides)
    # Nulls are written out: a null that overrides a default must not be lost.
    assert yaml.safe_load(printed)["checkpoint"]["every_s"] is None


# In YAML 1.1, which PyYAML writes, 1e3 is text; to jsonargparse, which reads it, it is a number. It reads text twice,
# and what is null the second time must still be text.
TEXTS = st.sampled_from(
    ["1e3", "12e5678", "1.5E3", "+1_0e-2", "null", "Null", "~", "#5", "&a", "---", "!!null", "0:", "\ue000#"]
)
TEXTS |= st.text("0123456789eE+-._:#~{&nylor ")


@settings(max_examples=40)
@given(text=TEXTS)
def test_any_text_is_printed_so_that_it_is_read_back_as_that_text(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    config = parse()
    config.tracking.wandb.project = text
    config.tracking.wandb.name = text
    config.tracking.wandb.tags = [text]
    config.model.decoders_dist = {"image": "my_code.log_density", "label": "categorical"}
    config.model.decoder_dist_params = {"image": {"text": text, "texts": [text, {"text": text}], "nothing": None}}
    config.model.networks.joint_encoder = {"class_path": "a.B", "init_args": {"text": text, "texts": [text]}}
    path = tmp_path_factory.mktemp("printed") / "config.yaml"
    save_run_config(config, path)
    assert parse_run_config(["--config", str(path)]) == config


@settings(max_examples=40)
@given(text=TEXTS.filter(lambda text: text.strip() not in ("null", "Null", "NULL", "~")))
def test_any_text_but_null_is_text_on_the_command_line(text: str) -> None:
    assert parse(f"--tracking.wandb.name={text}").tracking.wandb.name == text


def test_null_is_null_where_a_key_takes_text(tmp_path: Path) -> None:
    named = ["--tracking.wandb.name", "#5", "--tracking.wandb.group", "&b"]
    assert parse(*named).tracking.wandb.name == "#5"
    assert parse(*named, "--tracking.wandb.name", "null").tracking.wandb.name is None
    for content in ("tracking: {wandb: {name: null, group: 'null'}}", "tracking.wandb: {name: ~, group: 'null'}"):
        path = tmp_path / "named.yaml"
        path.write_text(content)
        config = parse(*named, "--config", str(path))
        assert (config.tracking.wandb.name, config.tracking.wandb.group) == (None, "null")
    assert parse("--tracking.wandb", "{group: 'null'}").tracking.wandb.group == "null"


def test_arguments_of_a_users_class_may_have_names_of_keys_that_take_text() -> None:
    key = "--model.networks.joint_encoder"
    config = parse(key, "{class_path: my.Encoder}", f"{key}.init_args", "{name: '#5', dir: '~'}")
    assert config.model.networks.joint_encoder["init_args"] == {"name": "#5", "dir": "~"}


CLASS = "{class_path: nowhere.First, init_args: {size: 1, inner: [{class_path: nowhere.Inner}]}}"
ANOTHER = "{class_path: nowhere.Second, init_args: {depth: 2}}"
JOINT = "--model.networks.joint_encoder"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([JOINT, ANOTHER], ANOTHER),
        ([f"{JOINT}.init_args", "{depth: 2}"], "{class_path: nowhere.First, init_args: {depth: 2}}"),
        ([f"{JOINT}.class_path=nowhere.Second", f"{JOINT}.init_args={{depth: 2}}"], ANOTHER),
        (["--model.networks", f"{{joint_encoder: {ANOTHER}}}"], ANOTHER),
        (["--config", f"model: {{networks: {{joint_encoder: {ANOTHER}}}}}"], ANOTHER),
        (["--config", f"model.networks.joint_encoder: {ANOTHER}"], ANOTHER),
        (["--config", "model: {networks: {joint_encoder: {kind: fusion}}}"], "{kind: fusion}"),
        ([], CLASS),
    ],
    ids=["section", "arguments", "parts", "networks", "file", "dotted", "kind", "nothing"],
)
@pytest.mark.parametrize("first", ["file", "command line"])
def test_a_later_class_of_the_users_wins_before_any_is_imported(
    tmp_path: Path, first: str, arguments: list[str], expected: str
) -> None:
    """Nothing here can be imported, and the arguments of one class are not those of the other."""
    (tmp_path / "first.yaml").write_text(f"model: {{networks: {{joint_encoder: {CLASS}}}}}")
    later = list(arguments)
    if later[:1] == ["--config"]:
        (tmp_path / "later.yaml").write_text(later[1])
        later[1] = str(tmp_path / "later.yaml")
    config = parse(*(["--config", str(tmp_path / "first.yaml")] if first == "file" else [JOINT, CLASS]), *later)
    assert config.model.networks.joint_encoder == yaml.safe_load(expected)
    save_run_config(config, tmp_path / "printed.yaml")
    assert parse_run_config(["--config", str(tmp_path / "printed.yaml")]) == config


NETWORKS = """
model:
  networks:
    modalities:
      image: &image {kind: conv, channels: [8, 16]}
      sound: *image
    joint_encoder: {class_path: a.B, init_args: {size: 1, sizes: {a.b: 1}}}
"""
IMAGE = "--model.networks.modalities.image"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([f"{IMAGE}.channels", "[4]"], {"kind": "conv", "channels": [4]}),
        (
            [f"{IMAGE}.channels=[4]", f"{IMAGE}.hidden_dims=[9]"],
            {"kind": "conv", "channels": [4], "hidden_dims": [9]},
        ),
        ([f"{IMAGE}.channels=[4]", f"{IMAGE}.channels=[5]"], {"kind": "conv", "channels": [5]}),
        ([f"{IMAGE}.channels=[4]", f"{IMAGE}={{kind: vector}}"], {"kind": "vector"}),
        ([f"{IMAGE}={{kind: conv}}", f"{IMAGE}.channels=[4]"], {"kind": "conv", "channels": [4]}),
        ([f"{IMAGE}.channels=[4]", "--model.networks.modalities={image: {kind: mlp}}"], {"kind": "mlp"}),
        ([f"{IMAGE}.channels=[4]", "--model.networks={default: auto}"], {"kind": "conv", "channels": [4]}),
        (
            [f"{IMAGE}={{}}", f"{IMAGE}.encoder.class_path=a.B", f"{IMAGE}.encoder.init_args.file=#1"],
            {"encoder": {"class_path": "a.B", "init_args": {"file": "#1"}}},
        ),
    ],
    ids=["one", "two", "again", "replaced", "after", "mapping", "section", "class"],
)
def test_what_is_set_below_a_name_of_the_users_leaves_the_rest(
    tmp_path: Path, arguments: list[str], expected: dict
) -> None:
    (tmp_path / "networks.yaml").write_text(NETWORKS)
    networks = parse("--config", str(tmp_path / "networks.yaml"), *arguments).model.networks
    assert networks.modalities["image"] == expected
    assert networks.modalities.get("sound") in (None, {"kind": "conv", "channels": [8, 16]})


def test_one_argument_of_a_class_can_be_set(tmp_path: Path) -> None:
    (tmp_path / "networks.yaml").write_text(NETWORKS)
    joint = parse("--config", str(tmp_path / "networks.yaml"), f"{JOINT}.init_args.size", "3").model.networks
    assert joint.joint_encoder == {"class_path": "a.B", "init_args": {"size": 3, "sizes": {"a.b": 1}}}


def test_a_parameter_of_a_likelihood_can_be_set_alone() -> None:
    config = parse("--model.decoder_dist_params.image.soft_targets", "false", "--model.decoder_dist_params.label={}")
    assert config.model.decoder_dist_params == {"image": {"soft_targets": False}, "label": {}}
    with pytest.raises(ConfigError, match=r"image\.scale: unknown parameter 'scale'"):
        parse("--model.decoder_dist_params.image.scale", "2")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *(("~", None), ("null", None), ("'~'", "~"), ("'null'", "null"), ("#1", "#1"), ("", ""), ("&b", "&b")),
        *(
            ("1e-3", 1e-3),
            ("'1e-3'", "1e-3"),
            ("3", 3),
            ("'3'", "3"),
            ("[~, '~', '#1', 1e3]", [None, "~", "#1", 1e3]),
        ),
    ],
)
def test_below_a_name_of_the_users_only_what_yaml_means_is_null_or_a_number(
    tmp_path: Path, value: str, expected: object
) -> None:
    own = ["--model.decoders_dist.image", "my_code.log_density", JOINT, "{class_path: a.B}"]
    config = parse(*own, f"--model.decoder_dist_params.image.p={value}", f"{JOINT}.init_args.p={value}")
    assert config.model.decoder_dist_params == {"image": {"soft_targets": True, "p": expected}}
    assert config.model.networks.joint_encoder["init_args"] == {"p": expected}
    if not value or value[0] in "#&":
        return  # in a file these are nothing, a comment and an anchor
    (tmp_path / "own.yaml").write_text(f"model: {{decoder_dist_params: {{image: {{p: {value}}}}}}}")
    config = parse(*own, "--config", str(tmp_path / "own.yaml"))
    assert config.model.decoder_dist_params == {"image": {"p": expected}}


SPITEFUL = "{class_path: spiteful.Class, init_args: {size: 2}}"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--data.tokenizers", f"{{text: {SPITEFUL}}}"),
        ("--data.tokenizers", f"{{text: {{class_path: {SPITEFUL}}}}}"),
        ("--data.transforms", f"{{image: [{SPITEFUL}]}}"),
        ("--data.transforms", f"{{image: [{{name: {SPITEFUL}}}]}}"),
        ("--model.networks.joint_encoder", f"{{class_path: a.B, init_args: {{x: {SPITEFUL}}}}}"),
        ("--model.decoder_dist_params", f"{{image: {{scale: {SPITEFUL}}}}}"),
        ("--model.decoders_dist", f"{{image: {SPITEFUL}}}"),
        ("--model.decoders_dist", "{image: spiteful.Class}"),
        ("--evaluation", SPITEFUL),
    ],
)
@pytest.mark.parametrize("is_in_a_file", [False, True], ids=["argument", "file"])
def test_reading_a_configuration_imports_nothing_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str, is_in_a_file: bool
) -> None:
    """Also files of others are read: what they name runs when the configuration is used, and not before."""
    (tmp_path / "spiteful.py").write_text("class Class:\n    def __init__(self, size: int = 1) -> None: ...\n")
    (tmp_path / "later.yaml").write_text(f"{option.removeprefix('--')}: {value}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "spiteful", raising=False)
    with contextlib.suppress(ConfigError):
        parse(*(["--config", str(tmp_path / "later.yaml")] if is_in_a_file else [option, value]))
    assert "spiteful" not in sys.modules


CLASS_OPTIONS = st.tuples(
    st.sampled_from([JOINT, "--model.networks.modalities", "--data.tokenizers", "--data.transforms"]),
    st.sampled_from(["", ".image", ".image.encoder", ".class_path", ".init_args", ".init_args.a", ".a", ".a.b", "+"]),
    st.sampled_from(["", "3", "null", "a.B", "[]", "{}", CLASS, f"[{CLASS}]", f"{{image: {CLASS}}}"]),
)


@settings(max_examples=30, deadline=None)
@given(options=st.lists(CLASS_OPTIONS, min_size=1, max_size=3))
def test_whatever_is_given_for_a_class_is_read_or_refused_in_one_line(options: list[tuple[str, str, str]]) -> None:
    said = ""
    try:
        said = repr(parse(*(part for section, suffix, value in options for part in (section + suffix, value))))
    except ConfigError as error:
        said = str(error)
    assert "\n" not in said


def test_saved_configuration_reproduces_itself(tmp_path: Path) -> None:
    config = parse("--model.input_dims", "{label: [10], image: [1, 8, 8]}")
    save_run_config(config, tmp_path / "config.yaml")
    loaded = parse_run_config(["--config", str(tmp_path / "config.yaml")])
    assert loaded == config
    assert list(loaded.model.input_dims or {}) == ["label", "image"]  # the order is the model's
    assert dump_run_config(loaded) == dump_run_config(config)


def test_later_sources_win(tmp_path: Path) -> None:
    later = tmp_path / "later.yaml"
    later.write_text("training: {seed: 5}\nmodel: {alpha: 0.9}\n")
    config = parse("--config", str(later), "--model.alpha", "0.7")
    assert (config.training.seed, config.model.alpha) == (5, 0.7)
    assert config.model.latent_dim == parse().model.latent_dim  # untouched keys of the section stay


def test_one_section_can_stand_in_joined_and_in_nested_keys_or_in_a_file_beside(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("tracking.wandb: {project: a}\ntracking: {wandb: {group: b}}\nmodel: own.yaml")
    (tmp_path / "own.yaml").write_text("{alpha: 0.5, bata: 2}")
    with pytest.raises(ConfigError, match=r"own\.yaml: model\.bata: unknown key \(did you mean beta\?\)"):
        parse("--config", str(tmp_path / "run.yaml"))
    (tmp_path / "own.yaml").write_text("{alpha: 0.5}")
    config = parse("--config", str(tmp_path / "run.yaml"), "--training", "{seed: 3}")
    assert (config.tracking.wandb.project, config.tracking.wandb.group) == ("a", "b")
    assert (config.model.alpha, config.training.seed) == (0.5, 3)
    assert parse(f"--model={tmp_path / 'own.yaml'}").model.alpha == 0.5


@pytest.mark.parametrize("content", ["own.yaml", "{wandb: own.yaml}", "{wandb: beside.yaml}"])
def test_a_file_that_names_itself_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "own.yaml").write_text(content)
    (tmp_path / "beside.yaml").write_text("beside.yaml")
    with pytest.raises(ConfigError, match=r"(own|beside)\.yaml: it is being read already"):
        parse("--tracking", str(tmp_path / "own.yaml"))
    (tmp_path / "beside.yaml").write_text("{project: a}")
    (tmp_path / "own.yaml").write_text("{wandb: beside.yaml}")
    twice = ["--tracking", str(tmp_path / "own.yaml")] * 2
    assert parse(*twice).tracking.wandb.project == "a"


def test_a_large_file_is_no_configuration(tmp_path: Path) -> None:
    with open(tmp_path / "shard.tar", "wb") as file:
        file.truncate(10_000_001)
    with pytest.raises(ConfigError, match=r"shard\.tar has more than 10,000,000 characters"):
        parse("--model", str(tmp_path / "shard.tar"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tracking.wandb.tags+", "a", "--tracking.wandb.tags+=[b, 'null']"], ["a", "b", "null"]),
        (["--tracking.wandb", "{tags: [a]}", "--tracking.wandb.tags+", "1"], ["a", "1"]),
        (["--tracking.wandb.tags+", "a", "--tracking.wandb.tags", "[b]"], ["b"]),
    ],
    ids=["twice", "section", "replaced"],
)
def test_a_plus_adds_to_a_list(arguments: list[str], expected: list[str]) -> None:
    config = parse(*arguments, "--model.networks.encoder_hidden_dims+", "3")
    assert config.tracking.wandb.tags == expected
    assert config.model.networks.encoder_hidden_dims == [*parse().model.networks.encoder_hidden_dims, 3]


def test_help_explains_settings_also_when_others_are_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--training.seed", "x", "--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for part in (
        "--config CONFIG",
        "--data.cache.dir DIR",
        "--model.networks.joint_encoder",
        "--check:",
        "default: 1.0",
    ):
        assert part in shown


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_shipped_configurations_are_valid(name: str) -> None:
    parse_run_config(["--config", str(ROOT / "configs" / name)])

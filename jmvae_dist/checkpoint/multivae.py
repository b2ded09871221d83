"""Models to and from MultiVae (PyPI `multivae`), the reference implementation.

Its folders hold `model_config.json`, `environment.json` and `model.pt`, a state dictionary, for models of its default
networks; networks of the user's it pickles, and those files are never read here. Its default networks are

    encoder        in-512-512, ReLU; two heads
    decoder        D-512-out, ReLU; a sigmoid at the end, whatever the likelihood
    joint encoder  a copy of each encoder, of which only the mean is used; 512-512 on all means; two heads

which is what `multivae_networks` describes in the terms of `model.networks`. A model of other networks is given to
MultiVae in memory, by `to_multivae`.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jmvae_dist.checkpoint.export import check_empty, load_described, write_export
from jmvae_dist.errors import CheckpointError, ConfigError
from jmvae_dist.files import write_text_atomic
from jmvae_dist.model_config import LIKELIHOOD_PARAMETERS, JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig

if TYPE_CHECKING:
    from jmvae_dist.model import JMVAE

_CONFIG_NAME = "model_config.json"
_ENVIRONMENT_NAME = "environment.json"
_WEIGHTS_NAME = "model.pt"
_STATE_KEY = "model_state_dict"
_HIDDEN_DIM = 512
_FIELDS = (
    "n_modalities",
    "latent_dim",
    "input_dims",
    "uses_likelihood_rescaling",
    "rescale_factors",
    "decoders_dist",
    "decoder_dist_params",
    "alpha",
    "warmup",
    "beta",
)


def multivae_networks(config: JMVAEConfig) -> NetworksConfig:
    """MultiVae's default networks for a model: train with these to export it as a MultiVae folder."""
    assert config.input_dims is not None
    entry: dict[str, Any] = {
        "kind": "mlp",
        "encoder_hidden_dims": [_HIDDEN_DIM] * 2,
        "decoder_hidden_dims": [_HIDDEN_DIM],
        "output": "sigmoid",
    }
    return NetworksConfig(
        joint_hidden_dims=[_HIDDEN_DIM] * 2,
        modalities={name: dict(entry) for name in config.input_dims},
        joint_encoder={"kind": "fusion", "branch_output_dim": config.latent_dim},
    )


def export_multivae(source: Path, out: Path, *, trusted: Collection[str] = ()) -> Path:
    """Write a MultiVae folder for a run (its newest intact checkpoint), a checkpoint, or an export.

    Raises:
        CheckpointError: The source is not intact, or `out` exists and is not empty.
        ConfigError: The model has other networks than MultiVae's default ones, or a likelihood it does not know.
    """
    check_empty(out)
    model, _ = load_described(source, trusted=trusted)
    config = model.config
    if config.input_dims is None or not _has_default_networks(model):
        raise ConfigError(
            "--format multivae: the model has other networks than MultiVae's default ones, which are all that its "
            "folders can hold without pickles; in Python, jmvae_dist.checkpoint.multivae.to_multivae(model) gives "
            "MultiVae any model (docs/model.md shows the settings of the default ones)"
        )
    options = _their_options(config)
    out.mkdir(parents=True, exist_ok=True)
    torch.save({_STATE_KEY: _to_their_weights(model)}, out / _WEIGHTS_NAME)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    environment = {"name": "EnvironmentConfig", "python_version": version}
    write_text_atomic(out / _ENVIRONMENT_NAME, json.dumps(environment))
    description = {"name": "JMVAEConfig", **options, "custom_architectures": []}
    write_text_atomic(out / _CONFIG_NAME, json.dumps(description))
    return out


def import_multivae(folder: Path, out: Path) -> Path:
    """Write an export of this package for a MultiVae folder; see `load_multivae`."""
    check_empty(out)
    model = load_multivae(folder)
    networks = json.loads(json.dumps(asdict(_resolved_networks(model.config))))
    description = {"config": model.config.to_json(), "networks": networks}
    return write_export(out, model, {"model": description, "modalities": {}})


def load_multivae(folder: str | Path) -> JMVAE:
    """The model of a MultiVae folder with default networks, on the CPU, in evaluation mode.

    Args:
        folder: With `model_config.json` and `model.pt`; only JSON and tensors are read.

    Raises:
        CheckpointError: The folder is not intact, or the model is not a JMVAE of default networks.
    """
    from jmvae_dist.model import JMVAE

    folder = Path(folder)
    config = _read_config(folder / _CONFIG_NAME)
    # Without weights of its own: a configuration may ask for any size, which only the weights justify.
    with torch.device("meta"):
        model = JMVAE(config, networks=multivae_networks(config))
    weights = _read_weights(folder / _WEIGHTS_NAME)
    expected = _to_their_weights(model)
    wrong = [name for name in (*expected, *weights) if _shape(expected, name) != _shape(weights, name)]
    if wrong:
        found, wanted = _shape(weights, wrong[0]), _shape(expected, wrong[0])
        raise CheckpointError(
            f"{folder / _WEIGHTS_NAME}: the networks are not MultiVae's default ones: {wrong[0]} has the shape "
            f"{found}, expected {wanted}"
        )
    model.load_state_dict(_to_our_weights(weights, model.modalities), assign=True)
    return model.eval()


def to_multivae(model: JMVAE) -> Any:
    """A `multivae.models.JMVAE` that computes with `model`'s own networks, for MultiVae's metrics and samplers.

    Raises:
        ConfigError: MultiVae is not installed, or does not know a likelihood of the model.
    """
    try:
        from multivae import models
        from multivae.models.nn import BaseJointEncoder
        from pythae.models.base.base_utils import ModelOutput
        from pythae.models.nn import BaseDecoder, BaseEncoder
    except ImportError as error:
        raise ConfigError(f"to_multivae: MultiVae cannot be imported ({error}); pip install multivae") from None

    def posterior(inputs: dict[str, Tensor], given: str) -> ModelOutput:
        latent = model.encode(inputs, given, return_mean=True, check_inputs=False, with_gradient=True)
        return ModelOutput(embedding=latent.mu, log_covariance=latent.logvar)

    class Encoder(BaseEncoder):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.network, self.latent_dim = name, model.encoders[name], model.latent_dim

        def forward(self, x: Tensor) -> ModelOutput:
            return posterior({self.name: x}, self.name)

    class Decoder(BaseDecoder):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.network = name, model.decoders[name]

        def forward(self, z: Tensor) -> ModelOutput:
            decoded = model.decode(z, self.name, with_gradient=True)
            return ModelOutput(reconstruction=decoded[self.name])

    class JointEncoder(BaseJointEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.latent_dim = model.joint_encoder, model.latent_dim

        def forward(self, x: dict[str, Tensor]) -> ModelOutput:
            return posterior(x, "all")

    theirs = models.JMVAE(
        models.JMVAEConfig(**_their_options(model.config)),
        encoders={name: Encoder(name) for name in model.modalities},
        decoders={name: Decoder(name) for name in model.modalities},
        joint_encoder=JointEncoder(),
    )
    return theirs.train(model.training)


def _resolved_networks(config: JMVAEConfig) -> NetworksConfig:
    assert config.input_dims is not None
    return multivae_networks(config).resolve(config.input_dims, {})


def _has_default_networks(model: JMVAE) -> bool:
    """Whether the model is built like MultiVae's default one: the same modules, sizes and functions."""
    from jmvae_dist.model import JMVAE

    with torch.device("meta"):
        reference = JMVAE(model.config, networks=multivae_networks(model.config))
    return repr(model) == repr(reference)


def _their_options(config: JMVAEConfig) -> dict[str, Any]:
    """`config` in the terms of MultiVae, as JSON values."""
    unknown = [name for name in (config.decoders_dist or {}).values() if name not in LIKELIHOOD_PARAMETERS]
    if unknown:
        raise ConfigError(f"--format multivae: MultiVae does not know the likelihood {unknown[0]!r}")
    if int(config.warmup) != config.warmup:
        raise ConfigError(
            f"--format multivae: MultiVae's warm-up has whole epochs, and model.warmup is {config.warmup}"
        )
    options = {name: value for name, value in config.to_json().items() if name in _FIELDS}
    parameters = {
        name: {key: value for key, value in given.items() if key == "scale"}
        for name, given in (config.decoder_dist_params or {}).items()
    }
    return {**options, "warmup": int(config.warmup), "decoder_dist_params": parameters or None}


def _read_config(path: Path) -> JMVAEConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind, custom = values["name"], values["custom_architectures"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: not a model configuration of MultiVae ({problem})") from None
    if kind != "JMVAEConfig":
        raise CheckpointError(f"{path}: {kind!r} is not JMVAEConfig; only JMVAE models can be imported")
    if custom:
        raise CheckpointError(
            f"{path}: the model has networks of its own, {custom}, which are pickled, and reading pickles can run "
            "any code; load it with MultiVae and give its networks to JMVAE(...)"
        )
    try:
        config = JMVAEConfig(**{name: values[name] for name in _FIELDS if name in values})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if config.input_dims is None or config.function_paths():
        raise CheckpointError(f"{path}: needs input_dims, and likelihoods from {list(LIKELIHOOD_PARAMETERS)}")
    return config


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        # Without weights_only a file could run any code.
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights = dict(content[_STATE_KEY])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as tensors alone ({first_line})") from None
    if not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path}: {_STATE_KEY} holds something else than tensors")
    return weights


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(weights[name].shape) if name in weights else None


def _single_layers(modalities: list[str]) -> dict[str, str]:
    """Linear layers that both have, by our name."""
    layers = {"joint_encoder.hidden.0": "joint_encoder.enc.0.0", "joint_encoder.hidden.2": "joint_encoder.enc.1.0"}
    for name in modalities:
        for ours, theirs in (("0", "layers.0.0"), ("2", "layers.1.0")):
            layers[f"encoders.{name}.hidden.{ours}"] = f"encoders.{name}.{theirs}"
            layers[f"joint_encoder.branches.{name}.trunk.{ours}"] = f"joint_encoder.encoders.{name}.{theirs}"
        layers[f"joint_encoder.branches.{name}.output"] = f"joint_encoder.encoders.{name}.embedding"
        layers[f"decoders.{name}.hidden.0"] = f"decoders.{name}.layers.0.0"
        layers[f"decoders.{name}.output"] = f"decoders.{name}.layers.1.0"
    return layers


def _split_heads(modalities: list[str]) -> dict[str, tuple[str, str]]:
    """Our heads, which are one layer, and their two."""
    heads = {
        f"encoders.{name}.heads": (f"encoders.{name}.embedding", f"encoders.{name}.log_var") for name in modalities
    }
    return {**heads, "joint_encoder.heads": ("joint_encoder.fc1", "joint_encoder.fc2")}


def _to_their_weights(model: JMVAE) -> dict[str, Tensor]:
    ours = model.state_dict()
    theirs = {}
    for part in ("weight", "bias"):
        for our_name, their_name in _single_layers(model.modalities).items():
            theirs[f"{their_name}.{part}"] = ours[f"{our_name}.{part}"].clone()
        for our_name, their_names in _split_heads(model.modalities).items():
            halves = ours[f"{our_name}.{part}"].chunk(2)
            theirs |= {f"{name}.{part}": half.clone() for name, half in zip(their_names, halves, strict=True)}
        for name in model.modalities:
            # The copies' log-variances are not used by anything.
            unused = theirs[f"joint_encoder.encoders.{name}.embedding.{part}"]
            theirs[f"joint_encoder.encoders.{name}.log_var.{part}"] = torch.zeros_like(unused)
    return theirs


def _to_our_weights(theirs: Mapping[str, Tensor], modalities: list[str]) -> dict[str, Tensor]:
    ours = {}
    for part in ("weight", "bias"):
        for our_name, their_name in _single_layers(modalities).items():
            ours[f"{our_name}.{part}"] = theirs[f"{their_name}.{part}"]
        for our_name, their_names in _split_heads(modalities).items():
            ours[f"{our_name}.{part}"] = torch.cat([theirs[f"{name}.{part}"] for name in their_names])
    return {name: value.float() for name, value in ours.items()}

"""Which networks a model has: the section `model.networks`, its checks, and the defaults that follow from shapes.

Nothing here needs torch, so that a size that does not fit a shape is reported before anything starts.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from jmvae_dist.checks import check_user_class, is_integer, is_sizes, require
from jmvae_dist.errors import ConfigError

Shape = tuple[int, ...]
# Not `Any`: jsonargparse would take a section with a class_path in its place for a class to be built at once.
Setting = None | bool | int | float | str | list | dict

_KEY = "model.networks"
# Parameters of each kind of network, with what they must be.
_CONVOLUTIONS = {
    "channels": "sizes",
    "residual_blocks": "count",
    "normalization": "normalization",
    "hidden_dims": "sizes",
}
_PARAMETERS: dict[str, dict[str, str]] = {
    "mlp": {"encoder_hidden_dims": "sizes", "decoder_hidden_dims": "sizes", "output": "output"},
    "vector": {"encoder_hidden_dims": "sizes", "decoder_hidden_dims": "sizes"},
    "conv": _CONVOLUTIONS,
    "text": {"embedding_dim": "size", **_CONVOLUTIONS},
    "transformer": {"embedding_dim": "size", "layers": "size", "heads": "size"},
}
_JOINT_PARAMETERS: dict[str, dict[str, str]] = {
    "concat": {},
    "fusion": {"branch_hidden_dims": "sizes or null", "branch_output_dim": "size or null"},
}
_CLASS_SECTIONS = ("encoder", "decoder")
# `auto` takes arrays for pictures if they have at most so many channels and at least such sides.
_MAX_PICTURE_CHANNELS = 16
_MIN_PICTURE_SIDE = 16
# By default pictures and texts are halved until their shortest side is at most this.
_SMALLEST_DEFAULT_SIDE = {"conv": 4, "text": 8}
_FIRST_DEFAULT_CHANNELS = {"conv": 32, "text": 128}
_MOST_DEFAULT_CHANNELS = 512


@dataclass
class NetworksConfig:
    """Kinds and sizes of the networks; docs/model.md draws them.

    Args:
        encoder_hidden_dims: Hidden layers of every unimodal encoder of kind mlp.
        decoder_hidden_dims: Hidden layers of every decoder of kind mlp.
        joint_hidden_dims: Hidden layers of the joint encoder, on top of all modalities.
        activation: Non-linearity between layers.
        default: Kind of the modalities that `modalities` does not name: mlp, or auto, which chooses by shape and
            likelihood.
        modalities: By modality, `{kind: K, ...}` with the kind's parameters: mlp (`encoder_hidden_dims`,
            `decoder_hidden_dims`, `output: linear|sigmoid`), vector (`encoder_hidden_dims`, `decoder_hidden_dims`),
            conv (`channels`, `residual_blocks`, `normalization: group|none`, `hidden_dims`), text (the same and
            `embedding_dim`), transformer (`embedding_dim`, `layers`, `heads`) or auto. `encoder` and `decoder`, each
            `{class_path: module.Class, init_args: {...}}`, put classes of your own in their place.
        joint_encoder: `{kind: concat}`, an mlp on all modalities flattened; `{kind: fusion}`, an mlp on the features
            that copies of the unimodal encoders find (`branch_hidden_dims` gives those of kind mlp and vector other
            sizes, `branch_output_dim` ends each in a linear layer); or `{class_path: ..., init_args: ...}`. Default:
            concat if all modalities are of kind mlp, else fusion.
        sigma: How encoders state the standard deviation: exp(h / 2), so that h is the log-variance, or softplus(h).
    """

    encoder_hidden_dims: list[int] = field(default_factory=lambda: [512, 512])
    decoder_hidden_dims: list[int] = field(default_factory=lambda: [512, 512])
    joint_hidden_dims: list[int] = field(default_factory=lambda: [512, 512])
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    default: Literal["mlp", "auto"] = "mlp"
    modalities: dict[str, dict[str, Setting]] = field(default_factory=dict)
    joint_encoder: dict[str, Setting] = field(default_factory=dict)
    sigma: Literal["exp", "softplus"] = "exp"

    def __post_init__(self) -> None:
        for name in ("encoder_hidden_dims", "decoder_hidden_dims", "joint_hidden_dims"):
            sizes = getattr(self, name)
            require(is_sizes(sizes), f"{_KEY}.{name}", sizes, "a non-empty list of positive integers")
        for name in ("activation", "default", "sigma"):
            known = get_args(get_type_hints(type(self))[name])
            require(getattr(self, name) in known, f"{_KEY}.{name}", getattr(self, name), f"one of {list(known)}")
        allowed = "a section with modalities as keys"
        require(isinstance(self.modalities, dict), f"{_KEY}.modalities", self.modalities, allowed)
        for name, entry in self.modalities.items():
            self._check_modality(f"{_KEY}.modalities.{name}", entry)
        self._check_joint_encoder(f"{_KEY}.joint_encoder", self.joint_encoder)

    def _check_modality(self, key: str, entry: Any) -> None:
        known = [*_PARAMETERS, "auto"]
        require(isinstance(entry, dict), key, entry, f"a section with a kind, one of {known}")
        sections = [section for section in _CLASS_SECTIONS if section in entry]
        for section in sections:
            check_user_class(f"{key}.{section}", entry[section])
        settings = {name: value for name, value in entry.items() if name not in sections}
        if len(sections) == len(_CLASS_SECTIONS):
            if settings:
                raise ConfigError(f"{key}: {next(iter(settings))!r} has no use beside both encoder and decoder")
            return
        kind = settings.pop("kind", self.default)
        require(kind in known, f"{key}.kind", kind, f"one of {known}")
        if kind == "auto" and settings:
            raise ConfigError(f"{key}: kind auto chooses all sizes; for {next(iter(settings))!r} name the kind")
        _check_parameters(key, kind, settings, _PARAMETERS.get(kind, {}))

    def _check_joint_encoder(self, key: str, entry: Any) -> None:
        known = list(_JOINT_PARAMETERS)
        require(isinstance(entry, dict), key, entry, f"a section with a kind, one of {known}, or a class_path")
        if "class_path" in entry:
            check_user_class(key, entry)
        elif entry:
            require(entry.get("kind") in known, f"{key}.kind", entry.get("kind"), f"one of {known}")
            settings = {name: value for name, value in entry.items() if name != "kind"}
            _check_parameters(key, entry["kind"], settings, _JOINT_PARAMETERS[entry["kind"]])

    def class_sections(self) -> dict[str, dict[str, Any]]:
        """The classes of the user's, `{class_path, init_args}` by the setting."""
        sections: dict[str, Any] = {
            f"{_KEY}.modalities.{name}.{section}": entry[section]
            for name, entry in self.modalities.items()
            for section in _CLASS_SECTIONS
            if section in entry
        }
        if "class_path" in self.joint_encoder:
            sections[f"{_KEY}.joint_encoder"] = self.joint_encoder
        return sections

    def resolve(self, shapes: Mapping[str, Shape], distributions: Mapping[str, Any]) -> "NetworksConfig":
        """The same networks with every choice and size written out, except where all of it is this section's.

        Args:
            shapes: Shape of one sample per modality, in the model's order.
            distributions: Likelihood per modality, by which auto tells tokens from other matrices.

        Raises:
            ConfigError: An unknown modality is named, or a size does not fit a shape.
        """
        unknown = [name for name in self.modalities if name not in shapes]
        if unknown:
            raise ConfigError(
                f"{_KEY}.modalities: unknown modality {unknown[0]!r}; the modalities are {list(shapes)}"
            )
        modalities = {}
        for name, shape in shapes.items():
            entry = self._resolve_modality(name, shape, distributions.get(name))
            if name in self.modalities or entry.get("kind") != "mlp":
                modalities[name] = entry
        joint = dict(self.joint_encoder)
        is_plain = all(entry.get("kind") == "mlp" and "encoder" not in entry for entry in modalities.values())
        if not joint and not is_plain:
            joint = {"kind": "fusion"}
        return dataclasses.replace(self, default="mlp", modalities=modalities, joint_encoder=joint)

    def _resolve_modality(self, name: str, shape: Shape, distribution: Any) -> dict[str, Any]:
        entry: dict[str, Any] = dict(self.modalities.get(name, {}))
        if all(section in entry for section in _CLASS_SECTIONS):
            return entry
        kind = entry.pop("kind", self.default)
        if kind == "auto":
            kind = _choose_kind(shape, distribution)
        key = f"{_KEY}.modalities.{name}"
        _check_shape(key, kind, shape)
        entry = {"kind": kind, **self._default_sizes(kind, shape), **entry}
        _check_fit(key, entry, shape)
        return entry

    def _default_sizes(self, kind: str, shape: Shape) -> dict[str, Any]:
        if kind in ("mlp", "vector"):
            sizes: dict[str, Any] = {
                "encoder_hidden_dims": self.encoder_hidden_dims,
                "decoder_hidden_dims": self.decoder_hidden_dims,
            }
            return {**sizes, "output": "linear"} if kind == "mlp" else sizes
        if kind == "transformer":
            return {"embedding_dim": 256, "layers": 4, "heads": 4}
        sizes = {
            "channels": _default_channels(kind, min(_spatial(kind, shape))),
            "residual_blocks": 1,
            "normalization": "group",
            "hidden_dims": [512],
        }
        return {"embedding_dim": 128, **sizes} if kind == "text" else sizes


def most_halvings(side: int) -> int:
    """How often a side can be halved, rounding up, until it is 1: 5 times for 28 (14, 7, 4, 2, 1)."""
    return (side - 1).bit_length()


def _check_parameters(key: str, kind: str, settings: Mapping[str, Any], parameters: Mapping[str, str]) -> None:
    checks: dict[str, tuple[Any, str]] = {
        "sizes": (is_sizes, "a non-empty list of positive integers"),
        "size": (lambda value: is_integer(value) and value >= 1, "an integer and at least 1"),
        "count": (lambda value: is_integer(value) and value >= 0, "an integer and at least 0"),
        "output": (lambda value: value in ("linear", "sigmoid"), "linear or sigmoid"),
        "normalization": (lambda value: value in ("group", "none"), "group or none"),
    }
    for name, value in settings.items():
        if name not in parameters:
            takes = ", ".join(parameters) or "no parameters"
            raise ConfigError(f"{key}: {kind} has no parameter {name!r}; it takes {takes}")
        condition, _, may_be_null = parameters[name].partition(" or ")
        is_valid, allowed = checks[condition]
        if may_be_null:
            allowed += ", or null"
        require(is_valid(value) or (bool(may_be_null) and value is None), f"{key}.{name}", value, allowed)


def _choose_kind(shape: Shape, distribution: Any) -> str:
    if len(shape) == 3 and shape[0] <= _MAX_PICTURE_CHANNELS and min(shape[1:]) >= _MIN_PICTURE_SIDE:
        return "conv"
    if len(shape) == 2 and distribution == "categorical" and shape[0] > 1:
        return "text"
    if len(shape) == 1 and distribution != "categorical":
        return "vector"
    return "mlp"


def _spatial(kind: str, shape: Shape) -> Shape:
    """The sides along which convolutions run."""
    return shape[:1] if kind == "text" else shape[1:]


def _check_shape(key: str, kind: str, shape: Shape) -> None:
    wanted = {"conv": "[channels, height, width] or [channels, length]"}
    wanted |= dict.fromkeys(("text", "transformer"), "[length, vocabulary]")
    fits = {"conv": len(shape) in (2, 3), "text": len(shape) == 2, "transformer": len(shape) == 2}
    if not fits.get(kind, True):
        raise ConfigError(f"{key}: {kind} is for shapes {wanted[kind]}, not {list(shape)}; use kind mlp or vector")
    if kind in ("conv", "text") and min(_spatial(kind, shape)) < 2:
        raise ConfigError(f"{key}: {kind} needs sides of at least 2, and the shape is {list(shape)}; use kind mlp")


def _check_fit(key: str, entry: Mapping[str, Any], shape: Shape) -> None:
    if "channels" in entry:
        shortest = min(_spatial(entry["kind"], shape))
        most = most_halvings(shortest)
        if len(entry["channels"]) > most:
            raise ConfigError(
                f"{key}.channels: {entry['channels']} halves {len(entry['channels'])} times, and a side of "
                f"{shortest} (shape {list(shape)}) can be halved {most} times at most"
            )
    if "heads" in entry and entry["embedding_dim"] % entry["heads"]:
        raise ConfigError(f"{key}.heads: {entry['heads']} does not divide embedding_dim ({entry['embedding_dim']})")


def _default_channels(kind: str, side: int) -> list[int]:
    halvings = 1
    while -(-side // 2**halvings) > _SMALLEST_DEFAULT_SIDE[kind]:
        halvings += 1
    return [min(_FIRST_DEFAULT_CHANNELS[kind] * 2**number, _MOST_DEFAULT_CHANNELS) for number in range(halvings)]

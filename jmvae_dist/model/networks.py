"""The networks of a model, built from its configuration, from classes of the user's, or given as modules.

Weights have torch's initial distributions, but for embeddings and positions (`sequences`), and are drawn from torch's
generator in the order encoders, decoders, joint encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from jmvae_dist.errors import ConfigError
from jmvae_dist.model.convolutional import ConvDecoder, ConvTrunk
from jmvae_dist.model.joint import ConcatJointEncoder, EncoderBranch, FusionJointEncoder, LinearBranch
from jmvae_dist.model.modules import Encoder, GaussianParams, MLPDecoder, MLPTrunk
from jmvae_dist.model.sequences import TextDecoder, TextTrunk, TransformerDecoder, TransformerTrunk
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig
from jmvae_dist.user_code import construct

__all__ = ["GaussianParams", "Networks", "build_networks"]

Shape = tuple[int, ...]
Settings = dict[str, Any]


class Networks(NamedTuple):
    """The networks of a JMVAE; the dictionaries are keyed by modality, in the order of the modalities."""

    encoders: dict[str, nn.Module]
    decoders: dict[str, nn.Module]
    joint_encoder: nn.Module


def build_networks(
    config: JMVAEConfig,
    networks: NetworksConfig | None = None,
    *,
    encoders: dict[str, nn.Module] | None = None,
    decoders: dict[str, nn.Module] | None = None,
    joint_encoder: nn.Module | None = None,
) -> Networks:
    """Networks for `config`: those given, and for the others what `networks` says (its defaults if None).

    A joint encoder that `networks` leaves open is built from copies of the encoders where these are given.

    Raises:
        ConfigError: `config.input_dims` is missing where a network must be built, a size does not fit a shape, or a
            class of the user's cannot be built.
    """
    if encoders is not None and decoders is not None and joint_encoder is not None:
        return Networks(encoders, decoders, joint_encoder)
    shapes = config.input_dims
    if shapes is None:
        raise ConfigError("input_dims: missing; the default networks need the shape of every modality")
    resolved = (networks or NetworksConfig()).resolve(shapes, config.decoders_dist or {})
    builder = _Builder(config.latent_dim, shapes, resolved)
    given = encoders
    if encoders is None:
        encoders = {name: builder.encoder(name) for name in shapes}
    if decoders is None:
        decoders = {name: builder.decoder(name) for name in shapes}
    if joint_encoder is None:
        joint_encoder = builder.joint_encoder(encoders, are_given=given is not None)
    return Networks(encoders, decoders, joint_encoder)


def _convolution_settings(settings: Settings) -> Settings:
    return {name: settings[name] for name in ("channels", "residual_blocks", "normalization", "hidden_dims")}


def _transformer_settings(settings: Settings) -> Settings:
    return {name: settings[name] for name in ("embedding_dim", "layers", "heads")}


class _Builder:
    """Builds single networks.

    Args:
        latent_dim: D.
        shapes: Shape of one sample per modality.
        networks: Resolved for these shapes.
    """

    def __init__(self, latent_dim: int, shapes: dict[str, Shape], networks: NetworksConfig) -> None:
        self._latent_dim = latent_dim
        self._shapes = shapes
        self._networks = networks

    def encoder(self, name: str) -> nn.Module:
        settings = self._settings(name)
        if "encoder" in settings:
            return self._own(f"modalities.{name}.encoder", settings["encoder"], shape=self._shapes[name])
        return Encoder(self._trunk(name, settings), self._latent_dim, self._networks.sigma)

    def decoder(self, name: str) -> nn.Module:
        settings, shape, activation = self._settings(name), self._shapes[name], self._networks.activation
        if "decoder" in settings:
            return self._own(f"modalities.{name}.decoder", settings["decoder"], shape=shape)
        build: dict[str, Callable[[], nn.Module]] = {
            "mlp": lambda: MLPDecoder(
                self._latent_dim, settings["decoder_hidden_dims"], shape, activation, output=settings["output"]
            ),
            "vector": lambda: MLPDecoder(
                self._latent_dim, settings["decoder_hidden_dims"], shape, activation, layer_norm=True
            ),
            "conv": lambda: ConvDecoder(
                self._latent_dim, shape, activation=activation, **_convolution_settings(settings)
            ),
            "text": lambda: TextDecoder(
                self._latent_dim, shape, settings["embedding_dim"], activation, **_convolution_settings(settings)
            ),
            "transformer": lambda: TransformerDecoder(self._latent_dim, shape, **_transformer_settings(settings)),
        }
        return build[settings["kind"]]()

    def joint_encoder(self, encoders: dict[str, nn.Module], are_given: bool) -> nn.Module:
        """The configured joint encoder; copies stand for `encoders` that were given or are classes of the user's."""
        networks = self._networks
        settings: Settings = networks.joint_encoder
        if "class_path" in settings:
            return self._own("joint_encoder", settings, shapes=self._shapes)
        kind = settings.get("kind", "fusion" if are_given else "concat")
        sizes = (networks.joint_hidden_dims, self._latent_dim, networks.activation, networks.sigma)
        if kind == "concat":
            return ConcatJointEncoder(self._shapes, *sizes)
        branches: dict[str, nn.Module] = {}
        for name in self._shapes:
            own = self._settings(name)
            if are_given or "encoder" in own:
                branches[name] = EncoderBranch(encoders[name], self._latent_dim)
                continue
            branch = self._trunk(name, own, settings.get("branch_hidden_dims"))
            output_dim = settings.get("branch_output_dim")
            branches[name] = branch if output_dim is None else LinearBranch(branch, output_dim)
        return FusionJointEncoder(branches, *sizes)

    def _settings(self, name: str) -> Settings:
        networks = self._networks
        default = {
            "kind": "mlp",
            "encoder_hidden_dims": networks.encoder_hidden_dims,
            "decoder_hidden_dims": networks.decoder_hidden_dims,
            "output": "linear",
        }
        return networks.modalities.get(name, default)

    def _trunk(self, name: str, settings: Settings, hidden_dims: list[int] | None = None) -> nn.Module:
        """The trunk of a modality's encoder; `hidden_dims` replaces the sizes of kind mlp and vector."""
        shape, activation = self._shapes[name], self._networks.activation
        kind = settings["kind"]
        if kind in ("mlp", "vector"):
            sizes = hidden_dims or settings["encoder_hidden_dims"]
            return MLPTrunk(math.prod(shape), sizes, activation, layer_norm=kind == "vector")
        if kind == "conv":
            return ConvTrunk(shape, activation=activation, **_convolution_settings(settings))
        if kind == "text":
            return TextTrunk(shape, settings["embedding_dim"], activation, **_convolution_settings(settings))
        assert kind == "transformer", kind
        return TransformerTrunk(shape, **_transformer_settings(settings))

    def _own(self, key: str, settings: Settings, **offered: Any) -> nn.Module:
        """A module of the user's; the class may have parameters `latent_dim` and `shape` or `shapes`."""
        module = construct(f"model.networks.{key}", settings, {"latent_dim": self._latent_dim, **offered})
        if not isinstance(module, nn.Module):
            raise ConfigError(f"model.networks.{key}: {settings['class_path']} is not a torch.nn.Module")
        return module

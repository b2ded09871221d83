"""Classifiers and feature extractors of the user's own, named on the command line."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from jmvae_dist.errors import ConfigError
from jmvae_dist.user_code import construct


@dataclass(frozen=True)
class UserNetwork:
    """`MODALITY=MODULE.CLASS` or `MODALITY=MODULE.CLASS:{"argument": value}`, taken apart."""

    modality: str
    class_path: str
    arguments: dict[str, Any]


def parse_user_networks(
    option: str, entries: Sequence[str], modalities: Collection[str], trusted: Collection[str]
) -> list[UserNetwork]:
    """Take command-line values apart and check them, before anything is imported.

    Args:
        option: What to call them in messages.
        entries: As typed.
        modalities: Those of the model.
        trusted: Class paths that may be imported.

    Raises:
        ConfigError: An entry is malformed, names no modality or one twice, or a class that is not trusted.
    """
    networks: list[UserNetwork] = []
    for entry in entries:
        modality, equals, rest = entry.partition("=")
        class_path, colon, text = rest.partition(":")
        if not equals or "." not in class_path:
            raise ConfigError(f"{option}: {entry!r} is not MODALITY=MODULE.CLASS")
        try:
            arguments = json.loads(text) if colon else {}
        except ValueError as error:
            raise ConfigError(f"{option}: the arguments of {class_path} are not JSON ({error})") from None
        if not isinstance(arguments, dict):
            raise ConfigError(f"{option}: the arguments of {class_path} must be a JSON object, not {text}")
        if modality not in modalities:
            raise ConfigError(f"{option}: unknown modality {modality!r}; the model has {', '.join(modalities)}")
        if any(other.modality == modality for other in networks):
            raise ConfigError(f"{option}: given twice for {modality}")
        if class_path not in trusted:
            raise ConfigError(f"{option}: {class_path} is code; to run it, add --trust-class {class_path}")
        networks.append(UserNetwork(modality, class_path, arguments))
    return networks


def build_user_network(option: str, network: UserNetwork) -> nn.Module:
    """Import and build it; in evaluation mode.

    Raises:
        ConfigError: It cannot be imported or built, or is not a torch.nn.Module.
    """
    built = construct(option, {"class_path": network.class_path, "init_args": network.arguments})
    if not isinstance(built, nn.Module):
        raise ConfigError(f"{option}: {network.class_path} makes a {type(built).__name__}, not a torch.nn.Module")
    return built.eval()

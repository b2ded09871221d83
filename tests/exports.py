"""Exports of untrained models, for tests of what reads them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jmvae_dist.checkpoint.export import write_export
from jmvae_dist.model import JMVAE
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig


def export_untrained(folder: Path, config: JMVAEConfig, modalities: dict[str, Any]) -> Path:
    """The export of a small model of `config` with any weights; `modalities` says how its data are stored."""
    networks = NetworksConfig([8], [8], [8])
    model = {"config": dataclasses.asdict(config), "networks": dataclasses.asdict(networks)}
    return write_export(folder, JMVAE(config, networks=networks), {"model": model, "modalities": modalities})

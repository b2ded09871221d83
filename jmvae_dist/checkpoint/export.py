"""Models from checkpoints: rebuild one in memory, or export it as one safetensors file with its configuration."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from jmvae_dist.checkpoint.fragments import check_same_entries, read_fragments
from jmvae_dist.checkpoint.layout import CheckpointManifest, find_intact
from jmvae_dist.checkpoint.live_state import MOMENTS, weights_and_buffers
from jmvae_dist.errors import CheckpointError, ConfigError
from jmvae_dist.files import sha256_of, write_text_atomic
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig
from jmvae_dist.user_code import check_trusted

if TYPE_CHECKING:
    from jmvae_dist.model import JMVAE

EXPORT_FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def load_model(path: str | Path, *, trusted: Collection[str] = (), **networks: Any) -> JMVAE:
    """Rebuild a trained model, on the CPU, in evaluation mode.

    Args:
        path: A run directory (its newest intact checkpoint), a checkpoint, or an export.
        trusted: Classes and functions of yours, `module.name`, that the model was trained with and that may be
            imported: a checkpoint may name them, but not decide that their code runs.
        networks: `encoders`, `decoders`, `joint_encoder` as modules, in place of what the checkpoint names.

    Raises:
        CheckpointError: Nothing intact is there, or the networks do not fit.
        ConfigError: The model needs code that is not trusted.
    """
    return load_described(Path(path), trusted=trusted, **networks)[0]


def load_described(path: Path, *, trusted: Collection[str] = (), **networks: Any) -> tuple[JMVAE, dict[str, Any]]:
    """Like `load_model`, with the training data's modalities: the manifest's entries by name."""
    if (path / CONFIG_NAME).is_file():
        return _load_export(path, trusted, networks)
    checkpoint, manifest = find_intact(path)
    return model_from_checkpoint(checkpoint, manifest, trusted=trusted, **networks), manifest.modalities


def model_from_checkpoint(
    checkpoint: Path, manifest: CheckpointManifest, *, trusted: Collection[str] = (), **networks: Any
) -> JMVAE:
    """Rebuild the model of a checkpoint whose files were verified."""
    model = _build(manifest.model, trusted, networks)
    state = weights_and_buffers(model)
    weights = {name: record for name, record in manifest.tensors.items() if not name.startswith(MOMENTS)}
    reduced = CheckpointManifest(**{**vars(manifest), "tensors": weights})
    check_same_entries(state.specs, reduced, checkpoint)
    read_fragments(checkpoint, reduced, state.fragments)
    return model.eval()


def export_model(source: Path, out: Path, *, trusted: Collection[str] = ()) -> Path:
    """Write `model.safetensors` and `config.json` for a checkpoint or the newest intact one of a run.

    Raises:
        CheckpointError: The source is not intact, `out` exists and is not empty, or it cannot be written.
        ConfigError: The model needs code that is not trusted; see `load_model`.
    """
    check_empty(out)
    checkpoint, manifest = find_intact(source)
    model = model_from_checkpoint(checkpoint, manifest, trusted=trusted)
    origin = {"global_step": manifest.global_step, "versions": manifest.versions}
    return write_export(out, model, {"model": manifest.model, "modalities": manifest.modalities, **origin})


def check_empty(out: Path) -> None:
    """Refuse to write over something.

    Raises:
        CheckpointError: `out` exists and is not an empty directory.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out}: exists and is not an empty directory; choose another --out")


def write_export(out: Path, model: nn.Module, description: dict[str, Any]) -> Path:
    """Write a model and what it is.

    Args:
        out: An empty directory, or the place of one.
        model: With all its weights.
        description: `model` (`ResolvedRun.describe_model`), `modalities`, and whatever else is worth keeping.

    Raises:
        CheckpointError: The weights cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, out / WEIGHTS_NAME)
    except SafetensorError as error:
        raise CheckpointError(f"{out / WEIGHTS_NAME}: cannot be written ({error})") from error
    weights = {"weights_sha256": sha256_of(out / WEIGHTS_NAME)}
    # Written last: a directory without it is not an export.
    text = json.dumps({"format_version": EXPORT_FORMAT_VERSION, **description, **weights}, indent=2)
    write_text_atomic(out / CONFIG_NAME, text + "\n")
    return out


def _load_export(path: Path, trusted: Collection[str], networks: dict[str, Any]) -> tuple[JMVAE, dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        description = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
        version = description["format_version"]
        if version != EXPORT_FORMAT_VERSION:
            raise CheckpointError(f"{path}: export format {version!r}; this version reads {EXPORT_FORMAT_VERSION}")
        if sha256_of(path / WEIGHTS_NAME) != description["weights_sha256"]:
            raise CheckpointError(f"{path / WEIGHTS_NAME}: sha256 differs from {CONFIG_NAME}'s")
        model = _build(description["model"], trusted, networks)
        model.load_state_dict(load_file(path / WEIGHTS_NAME))
        modalities = dict(description["modalities"])
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, (CheckpointError, ConfigError)):
            raise
        raise CheckpointError(f"{path}: not an intact export ({type(error).__name__}: {error})") from None
    return model.eval(), modalities


def _build(description: dict[str, Any], trusted: Collection[str], networks: dict[str, Any]) -> JMVAE:
    from jmvae_dist.model import JMVAE

    try:
        config = JMVAEConfig(**description["config"])
        sizes = NetworksConfig(**description["networks"])
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's model configuration is not valid: {error}") from None
    # What is given as modules is not imported.
    given = tuple({"encoders": ".encoder", "decoders": ".decoder"}.get(key, f".{key}") for key in networks)
    classes = {key: section["class_path"] for key, section in sizes.class_sections().items()}
    named = {key: path for key, path in classes.items() if not key.endswith(given)} | config.function_paths()
    check_trusted(named, trusted)
    model: nn.Module = JMVAE(config, networks=sizes, **networks)
    assert isinstance(model, JMVAE)
    return model

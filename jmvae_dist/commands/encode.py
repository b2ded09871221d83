"""`jmvae-dist encode`: the posterior of every sample of a data set, as a table to work on."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jmvae_dist.commands.cli import (
    add_cache_option,
    add_device_option,
    add_trust_option,
    check_writable,
    find_device,
    make_described_views,
    make_parser,
    parse_given,
    remote_access,
)
from jmvae_dist.errors import ConfigError

if TYPE_CHECKING:
    from jmvae_dist.data.loader import EvaluationLoader
    from jmvae_dist.data.manifest import Manifest
    from jmvae_dist.data.store import RemoteAccess
    from jmvae_dist.data.views import View
    from jmvae_dist.model import JMVAE

_FORMATS = (".npz", ".csv")


def main(arguments: list[str]) -> int:
    """Write means and log-variances, keys and classes of all samples of a manifest."""
    options = _parse(arguments)
    from jmvae_dist.checkpoint.export import load_described
    from jmvae_dist.data.class_names import class_names
    from jmvae_dist.data.loader import EvaluationLoader
    from jmvae_dist.data.manifest import Manifest
    from jmvae_dist.data.views import make_views
    from jmvae_dist.files import writing_atomic

    model, described = load_described(options.path, trusted=options.trust_class)
    given = model.modalities if options.given is None else parse_given(options.given, model.modalities)
    manifest = Manifest.load(options.manifest)
    views = make_described_views(options, described, given, manifest)
    # Classes are told whether or not the posterior knows them.
    labels = make_views([modality for modality in manifest.modalities if modality.encoding == "cls"])
    # Those of the model, where the data has none, fit what is given; other classes may be other ones.
    known = class_names(described, manifest)
    names = {
        label.name: known[label.name]
        for label in labels
        if len(known.get(label.name, ())) == label.modality.num_classes
    }
    access = remote_access(options)
    loader = EvaluationLoader(
        manifest,
        rank=0,
        world_size=1,
        batch_size=options.batch_size,
        views=[*views, *(label for label in labels if label.name not in given)],
        access=access,
    )
    arrays = {
        "key": np.array(find_keys(manifest, access)),
        **_posteriors(model.to(find_device(options.device)), loader, given, labels, manifest.num_samples),
        **{f"class_names.{name}": np.array(found) for name, found in names.items()},
    }
    with writing_atomic(options.out) as file:
        if options.out.suffix == ".npz":
            np.savez_compressed(file, **arrays)
        else:
            file.write(_csv(arrays).encode())
    print(f"{manifest.num_samples:,} samples given {', '.join(given)}: {options.out}")
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = make_parser("jmvae-dist encode", "Posterior means of all samples, with their keys and classes.")
    parser.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT", help="or an export of one")
    parser.add_argument("--manifest", required=True, metavar="M", help="shards: path or URL of a manifest.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="FILE.npz or FILE.csv")
    parser.add_argument("--given", metavar="MODALITIES", help="comma-separated; default: all of the model")
    parser.add_argument("--batch-size", type=int, default=256, help="samples per forward pass (default: 256)")
    add_device_option(parser)
    add_cache_option(parser)
    add_trust_option(parser)
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size: {options.batch_size} must be at least 1")
    if options.out.suffix not in _FORMATS:
        raise ConfigError(f"--out: {options.out} must end in {' or '.join(_FORMATS)}")
    check_writable("--out", options.out)
    if not options.path.is_dir():
        raise ConfigError(f"{options.path}: no such directory; give a run directory, a checkpoint or an export")
    return options


def _posteriors(
    model: JMVAE, loader: EvaluationLoader, given: Sequence[str], labels: Sequence[View], num_samples: int
) -> dict[str, Any]:
    """`mu` and `logvar`, float32 (N, latent_dim), and `class.<modality>`, int64 (N,), in stored order."""
    from jmvae_dist.progress import progress

    model.eval()
    device = next(model.parameters()).device
    names = ["mu", "logvar", *(f"class.{label.name}" for label in labels)]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    with progress(num_samples, "encoding") as advance:
        for batch in loader:
            inputs = {name: batch.inputs[name].to(device) for name in given}
            posterior = model.encode(inputs, list(given), return_mean=True)
            parts["mu"].append(posterior.mu.cpu().numpy())
            parts["logvar"].append(posterior.logvar.cpu().numpy())
            for label in labels:
                parts[f"class.{label.name}"].append(batch.inputs[label.name].argmax(-1).numpy())
            advance(len(batch.rows))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def find_keys(manifest: Manifest, access: RemoteAccess) -> list[str]:
    """Keys of all samples in stored order, without control characters: tars of others may have any.

    Raises:
        DataError: One cannot be read.
    """
    from jmvae_dist.data.shard_set import ShardSet
    from jmvae_dist.data.untrusted import printable

    modality = manifest.modalities[0].name
    keys = []
    with contextlib.closing(ShardSet(manifest, "never", max_open=1, access=access)) as shards:
        for number, shard in enumerate(manifest.shards):
            reader = shards.reader(number)
            keys += [printable(reader.stated_key(index, modality)) for index in range(shard.num_samples)]
    return keys


def _csv(arrays: dict[str, Any]) -> str:
    """A line per sample: key, classes (by name where they have names), and means."""
    classes = {}
    for column, indices in arrays.items():
        if column.startswith("class."):
            names = arrays.get(f"class_names.{column.removeprefix('class.')}")
            classes[column] = indices if names is None else names[indices]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", *classes, *(f"mu.{number}" for number in range(arrays["mu"].shape[1]))])
    for key, *row_classes, mu_D in zip(arrays["key"], *classes.values(), arrays["mu"], strict=True):
        writer.writerow([key, *row_classes, *mu_D])
    return text.getvalue()

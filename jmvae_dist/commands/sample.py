"""`jmvae-dist sample`: generate from the prior, or given some modalities of held-out samples."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jmvae_dist.commands.cli import (
    add_cache_option,
    add_trust_option,
    make_described_views,
    make_parser,
    parse_given,
    remote_access,
)
from jmvae_dist.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from jmvae_dist.data.manifest import Manifest
    from jmvae_dist.evaluation.figures import ClassNames
    from jmvae_dist.model import JMVAE

# The picture shows at most this many of the samples; the arrays hold all of them.
_MAX_PICTURED = 20


def main(arguments: list[str]) -> int:
    """Write `samples.npz` (arrays) and `samples.png` (a grid)."""
    options = _parse(arguments)
    _make_folder(options.out)
    import numpy as np

    from jmvae_dist.checkpoint.export import load_described
    from jmvae_dist.data.class_names import class_names
    from jmvae_dist.data.manifest import Manifest
    from jmvae_dist.evaluation.figures import save_png
    from jmvae_dist.files import writing_atomic

    model, described = load_described(options.path, trusted=options.trust_class)
    given = [] if options.given is None else parse_given(options.given, model.modalities)
    manifest = None if options.manifest is None else Manifest.load(options.manifest)
    names = {name: found for name, found in class_names(described, manifest).items() if name in model.modalities}
    if manifest is None:
        tensors, figure = _sample_prior(options, model, names)
    else:
        tensors, figure = _sample_given(options, model, described, given, manifest, names)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    arrays |= _texts(model, arrays)
    arrays |= {f"class_names.{name}": np.array(found) for name, found in names.items()}
    with writing_atomic(options.out / "samples.npz") as file:
        np.savez_compressed(file, **arrays)
    save_png(figure, options.out / "samples.png")
    origin = f"given {', '.join(given)}" if given else "from the prior"
    print(f"{len(arrays['latent.z'])} samples {origin}: {options.out / 'samples.npz'}, {options.out / 'samples.png'}")
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = make_parser("jmvae-dist sample", "Generate from the prior, or given some modalities.")
    parser.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT", help="or an export of one")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--given", metavar="MODALITIES", help="comma-separated; default: sample the prior")
    parser.add_argument("--manifest", metavar="M", help="shards that hold the given modalities: path or URL")
    add_cache_option(parser)
    parser.add_argument("--n", type=int, default=40, metavar="N", help="number of samples (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the latent noise (default: 0)")
    add_trust_option(parser)
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed: {options.seed} must be between 0 and 2^63 - 1")
    if options.n < 1:
        raise ConfigError(f"--n: {options.n} must be at least 1")
    if (options.given is None) != (options.manifest is None):
        raise ConfigError("--given and --manifest belong together: the manifest's samples are what is given")
    if not options.path.is_dir():
        raise ConfigError(f"{options.path}: no such directory; give a run directory, a checkpoint or an export")
    return options


def _make_folder(folder: Path) -> None:
    """Create the output directory and try to write to it, before the time is spent on what goes there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"--out: {folder} cannot be written ({error.strerror}); choose another directory") from None


def _sample_prior(options: argparse.Namespace, model: JMVAE, names: ClassNames) -> tuple[dict[str, Tensor], Figure]:
    import torch

    from jmvae_dist.evaluation.figures import prior_samples_figure
    from jmvae_dist.kernels.noise import Stream, normal_noise

    noise = normal_noise(options.seed, 0, torch.arange(options.n), model.latent_dim, Stream.PRIOR)
    z = model.generate_from_prior(options.n, noise=noise).z
    columns = min(options.n, 10)
    lines = max(1, min(options.n, 2 * _MAX_PICTURED) // columns)
    figure = prior_samples_figure(model, num_samples=columns, num_lines=lines, seed=options.seed, class_names=names)
    return {"latent.z": z, **_expectations(model, z)}, figure


def _sample_given(
    options: argparse.Namespace,
    model: JMVAE,
    described: dict[str, Any],
    given: list[str],
    manifest: Manifest,
    names: ClassNames,
) -> tuple[dict[str, Tensor], Figure]:
    from jmvae_dist.data.loader import EvaluationLoader
    from jmvae_dist.evaluation.figures import cross_modal_figure, reconstruction_figure
    from jmvae_dist.kernels.noise import Stream, normal_noise

    # Modalities that are not given are shown beside the generated ones where the manifest has them.
    available = {modality.name for modality in manifest.modalities}
    wanted = [name for name in model.modalities if name in given or name in available]
    views = make_described_views(options, described, wanted, manifest)
    access = remote_access(options)
    loader = EvaluationLoader(manifest, rank=0, world_size=1, batch_size=options.n, views=views, access=access)
    batch = next(iter(loader))
    if manifest.num_samples < options.n:
        print(f"--n: {options.manifest} has {manifest.num_samples} samples; all of them are used", file=sys.stderr)
    noise = normal_noise(options.seed, 0, batch.rows, model.latent_dim, Stream.CONDITIONAL)
    z = model.encode(batch.inputs, given, noise=noise[None], flatten=True).z
    tensors = {"latent.z": z, **_expectations(model, z)}
    tensors.update({f"data.{name}": values for name, values in batch.inputs.items()})
    if set(given) == set(model.modalities):
        figure = reconstruction_figure(model, batch.inputs, max_samples=_MAX_PICTURED, class_names=names)
    else:
        figure = cross_modal_figure(
            model, batch.inputs, given, max_samples=_MAX_PICTURED, seed=options.seed, class_names=names
        )
    return tensors, figure


def _texts(model: JMVAE, arrays: dict[str, Any]) -> dict[str, Any]:
    """`text.generated.<modality>` and `text.data.<modality>`, str (n,), of texts of bytes."""
    import numpy as np

    from jmvae_dist.evaluation.texts import is_byte_text, most_probable_text

    return {
        f"text.{name}": np.array([most_probable_text(value) for value in values], dtype=str)
        for name, values in arrays.items()
        if (modality := name.partition(".")[2]) in model.likelihoods and name != "latent.z"
        if is_byte_text(model.likelihoods[modality], values.shape[1:])
    }


def _expectations(model: JMVAE, z: Tensor) -> dict[str, Tensor]:
    """Decoded expected values (probabilities for bernoulli and categorical), `generated.<modality>`."""
    decoded = model.decode(z)
    return {f"generated.{name}": model.likelihoods[name].mean(values) for name, values in decoded.items()}

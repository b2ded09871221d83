"""`jmvae-dist checkpoint list|verify|export|import`."""

from __future__ import annotations

import argparse
from pathlib import Path

from jmvae_dist.commands.cli import add_trust_option, make_parser
from jmvae_dist.errors import CheckpointError, ConfigError


def main(arguments: list[str]) -> int:
    """List, verify, export or import models; `verify` returns 1 if anything is damaged."""
    parser = make_parser("jmvae-dist checkpoint", "List, verify and export checkpoints; import models of MultiVae.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="list|verify|export|import")
    for verb, summary in (
        ("list", "steps, sizes and origin"),
        ("verify", "check every file's sha256"),
        ("export", "write model.safetensors and config.json, or a folder of MultiVae"),
        ("import", "make an export of a folder of MultiVae"),
    ):
        subparser = verbs.add_parser(verb, help=summary)
        subparser.add_argument("path", type=Path, metavar="FOLDER" if verb == "import" else "RUN_OR_CHECKPOINT")
        if verb in ("export", "import"):
            subparser.add_argument("--out", type=Path, required=True, metavar="DIR")
        if verb == "export":
            subparser.add_argument("--format", choices=("safetensors", "multivae"), default="safetensors")
            add_trust_option(subparser)
    options = parser.parse_args(arguments)
    if not options.path.is_dir():
        raise ConfigError(f"{options.path}: no such directory; give a run directory or a checkpoint")
    if options.verb in ("export", "import"):
        return _export(options) if options.verb == "export" else _import(options)
    checkpoints = _checkpoints_at(options.path)
    return _list(checkpoints) if options.verb == "list" else _verify(checkpoints)


def _checkpoints_at(path: Path) -> list[Path]:
    from jmvae_dist.checkpoint.layout import MANIFEST_NAME, list_step_directories

    if (path / MANIFEST_NAME).is_file():
        return [path]
    # Also those without a manifest: they are not resumed from, and whoever looks should learn why.
    checkpoints = list_step_directories(path / "checkpoints")
    if not checkpoints:
        raise CheckpointError(f"{path}: neither a checkpoint nor a run directory with checkpoints")
    return checkpoints


def _list(checkpoints: list[Path]) -> int:
    from jmvae_dist.checkpoint.layout import NewerFormatError, read_manifest

    print(f"{'step':>10}  {'size':>9}  {'engine':<6}  {'ranks':>5}  {'written':<25}  path")
    for checkpoint in checkpoints:
        try:
            manifest = read_manifest(checkpoint)
        except CheckpointError as error:
            what = "newer" if isinstance(error, NewerFormatError) else "damaged"
            print(f"{what:>10}  {error}")
            continue
        size_mb = sum(record.num_bytes for record in manifest.files.values()) / 1e6
        print(
            f"{manifest.global_step:>10}  {size_mb:>6.1f} MB  {manifest.engine:<6}  {manifest.world_size:>5}  "
            f"{manifest.created:<25}  {checkpoint}"
        )
    return 0


def _verify(checkpoints: list[Path]) -> int:
    from jmvae_dist.checkpoint.layout import find_damage, read_manifest

    damaged = 0
    for checkpoint in checkpoints:
        try:
            problem = find_damage(checkpoint, read_manifest(checkpoint))
        except CheckpointError as error:
            problem = str(error)
        damaged += problem is not None
        print(f"{'intact ' if problem is None else 'DAMAGED'}  {problem or checkpoint}")
    print(f"{len(checkpoints) - damaged} of {len(checkpoints)} checkpoints are intact")
    return 1 if damaged else 0


def _export(options: argparse.Namespace) -> int:
    if options.format == "multivae":
        from jmvae_dist.checkpoint.multivae import export_multivae

        out = export_multivae(options.path, options.out, trusted=options.trust_class)
        print(f"exported to {out}; load it with multivae.models.AutoModel.load_from_folder({str(out)!r})")
        return 0
    from jmvae_dist.checkpoint.export import export_model

    out = export_model(options.path, options.out, trusted=options.trust_class)
    print(f"exported to {out}; load it with jmvae_dist.load_model({str(out)!r})")
    return 0


def _import(options: argparse.Namespace) -> int:
    from jmvae_dist.checkpoint.multivae import import_multivae

    out = import_multivae(options.path, options.out)
    print(f"imported to {out}; load it with jmvae_dist.load_model({str(out)!r})")
    return 0

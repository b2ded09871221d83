"""`jmvae-dist shards`: write, inspect and verify sharded data."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jmvae_dist.commands.cli import add_cache_option, make_parser, remote_access
from jmvae_dist.commands.options import named_number, num_bytes, positive
from jmvae_dist.commands.shards_files import add_csv_parser, add_folder_parser, print_notes
from jmvae_dist.commands.shards_index import add_index_parser, requests_of
from jmvae_dist.commands.split_options import (
    add_label_options,
    add_split_options,
    add_standardize_options,
    split_choice,
    standardization,
)
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.sources.base import SPLITS, Source
from jmvae_dist.data.untrusted import printable
from jmvae_dist.data.urls import shown
from jmvae_dist.progress import format_bytes

SUMMARY = "write, inspect and verify sharded data"

_DEFAULT_TEST_FRACTION = 0.2
_MAX_SOURCE_LINES = 50
_MAX_SOURCE_CHARACTERS = 1000


def main(argv: list[str]) -> int:
    """Run `jmvae-dist shards ARGV...`; returns the exit code.

    Raises:
        ConfigError, DataError: printed as one line by the top-level command.
    """
    arguments = _parser().parse_args(argv)
    exit_code: int = arguments.run(arguments)
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("jmvae-dist shards", SUMMARY)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    write = verbs.add_parser("write", help="write a source as tar shards with indexes and a manifest")
    _add_sources(write)
    add_index_parser(verbs, _index)
    show = verbs.add_parser("show", help="print what a manifest describes")
    show.add_argument("manifest", help="path or URL of a manifest.json, or its folder")
    show.set_defaults(run=_show)
    verify = verbs.add_parser("verify", help="check every byte and every sample; exit code 1 if anything is wrong")
    verify.add_argument("manifest", help="path or URL of a manifest.json, or its folder")
    add_cache_option(verify)
    verify.add_argument("--workers", type=positive, help="processes (default: the available CPUs)")
    verify.set_defaults(run=_verify)
    return parser


def _add_sources(write: argparse.ArgumentParser) -> None:
    sources = write.add_subparsers(title="sources", metavar="SOURCE", required=True)

    digits = sources.add_parser("digits", help="scikit-learn's 8x8 digits: 1,797 images with labels")
    add_split_options(digits, _DEFAULT_TEST_FRACTION)
    digits.set_defaults(source=_digits)

    mnist = sources.add_parser("mnist", help="MNIST-like IDX files, plain or gzip; the files are the split")
    mnist.add_argument("--images", type=Path, required=True, metavar="FILE")
    mnist.add_argument("--labels", type=Path, required=True, metavar="FILE")
    mnist.set_defaults(source=_mnist)

    mfeat = sources.add_parser("mfeat", help="UCI Multiple Features: six views of 2,000 digits, standardised")
    mfeat.add_argument("--folder", type=Path, required=True, help="holds mfeat-<view>.csv or .csv.gz")
    mfeat.add_argument(
        "--with-label",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="store the label as a seventh modality; data.modalities selects what a run uses",
    )
    add_split_options(mfeat, _DEFAULT_TEST_FRACTION)
    mfeat.set_defaults(source=_mfeat)

    npz = sources.add_parser("npz", help="an .npz file: one array per modality, samples first")
    npz.add_argument("--file", type=Path, required=True)
    npz.add_argument(
        "--class-modalities",
        type=_class_modalities,
        default={},
        metavar="NAME[=K],...",
        help="integer arrays to store as class indices of K classes (the model sees one-hot vectors); default K: "
        "the largest index of the file + 1, so give K if another file lacks the last class",
    )
    npz.add_argument("--offset", type=named_number, action="append", default=[], metavar="NAME=NUMBER")
    npz.add_argument(
        "--scale",
        type=named_number,
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="the model sees (value - offset) * scale, for example --scale image=1/255",
    )
    npz.add_argument("--file-is-split", action="store_true", help="the file holds the samples of --split only")
    add_split_options(npz, None)
    add_label_options(npz, "NAME")
    add_standardize_options(npz)
    npz.set_defaults(source=_npz)

    folder, table = add_folder_parser(sources), add_csv_parser(sources)
    for source in (digits, mnist, mfeat, npz, folder, table):
        _add_output_options(source)
        source.set_defaults(run=_write)
    # A default would let all samples become the test split as well as the train split.
    for source in (npz, folder, table):
        source.set_defaults(split=None)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--split", choices=SPLITS, default="train", help="default train; none for npz, folder and csv"
    )
    parser.add_argument("--samples-per-shard", type=positive, help="at most; the default depends on the source")
    parser.add_argument("--bytes-per-shard", type=num_bytes, metavar="SIZE", help="about, such as 200MB or 1GiB")
    parser.add_argument("--shuffle-seed", type=int, default=0, help="permutes samples before packing; default 0")
    parser.add_argument("--workers", type=positive, help="processes (default: the available CPUs, 1 if faster)")
    parser.add_argument("--overwrite", action="store_true", help="replace shards of other content in DIR")


def _class_modalities(text: str) -> dict[str, int | None]:
    classes: dict[str, int | None] = {}
    for entry in text.split(","):
        name, separator, number = entry.partition("=")
        if not name or name in classes:
            raise argparse.ArgumentTypeError(f"{text!r} must name each array once, as NAME or NAME=K")
        classes[name] = positive(number) if separator else None
    return classes


def _digits(arguments: argparse.Namespace) -> Source:
    from jmvae_dist.data.sources.digits import load_digits_source

    return load_digits_source(arguments.split, arguments.test_fraction, arguments.split_seed)


def _mnist(arguments: argparse.Namespace) -> Source:
    from jmvae_dist.data.sources.mnist import load_mnist_source

    return load_mnist_source(arguments.images, arguments.labels, arguments.split)


def _mfeat(arguments: argparse.Namespace) -> Source:
    from jmvae_dist.data.sources.mfeat import load_mfeat_source

    return load_mfeat_source(
        arguments.folder, arguments.split, arguments.test_fraction, arguments.split_seed, arguments.with_label
    )


def _npz(arguments: argparse.Namespace) -> Source:
    from jmvae_dist.data.sources.npz import load_npz_source

    choice = split_choice(arguments, "--file-is-split", arguments.file_is_split)
    source, notes = load_npz_source(
        arguments.file,
        choice,
        arguments.class_modalities,
        dict(arguments.offset),
        dict(arguments.scale),
        standardization(arguments, choice),
    )
    print_notes(notes)
    return source


def _write(arguments: argparse.Namespace) -> int:
    from jmvae_dist.data.writer import write_shards

    source = arguments.source(arguments)
    manifest, written = write_shards(
        source,
        arguments.out,
        samples_per_shard=arguments.samples_per_shard,
        bytes_per_shard=arguments.bytes_per_shard,
        shuffle_seed=arguments.shuffle_seed,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    what = "wrote" if written else "already there, unchanged:"
    print(f"{what} {_counts(manifest)} ({format_bytes(manifest.num_bytes)}): {manifest.path}")
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from jmvae_dist.data.indexing.build import index_shards, infer_from
    from jmvae_dist.data.indexing.shard_lists import expand_shards

    shards = expand_shards(arguments.shards)
    result = index_shards(
        shards,
        arguments.out,
        requests_of(arguments, lambda: infer_from(shards[0])),
        incomplete=arguments.incomplete,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    manifest = result.manifest
    what = "indexed" if result.written else "already there, unchanged:"
    print(f"{what} {_counts(manifest)} ({format_bytes(manifest.num_bytes)}): {manifest.path}")
    print()
    _print_modalities(manifest)
    if result.notes:
        print()
    for note in result.notes:
        print(f"note: {printable(note)}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    manifest = Manifest.load(arguments.manifest)
    sizes = manifest.shard_sizes
    per_shard = f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
    facts = {
        "manifest": shown(manifest.path),
        "samples": f"{manifest.num_samples:,}",
        "shards": f"{len(manifest.shards):,} of {per_shard} samples",
        "size": f"{format_bytes(manifest.num_bytes)} ({manifest.num_bytes:,} bytes)",
        "fingerprint": manifest.fingerprint,
    }
    for name, value in facts.items():
        print(f"{name:<12} {value}")
    _print_source(manifest)
    print()
    _print_modalities(manifest)
    return 0


def _print_source(manifest: Manifest) -> None:
    """How the data was made, as far as a screen or two hold it: it can be anything, of any length."""
    entries = [
        (key, entry)
        for key, value in manifest.source.items()
        for entry in (value if isinstance(value, list) else [value])
    ]
    for key, entry in entries[:_MAX_SOURCE_LINES]:
        text = f"{key}: {entry if isinstance(entry, str) else json.dumps(entry)}"
        cut = "..." if len(text) > _MAX_SOURCE_CHARACTERS else ""
        print(f"{'source':<12} {printable(text[:_MAX_SOURCE_CHARACTERS])}{cut}")
    if len(entries) > _MAX_SOURCE_LINES:
        print(f"{'source':<12} and {len(entries) - _MAX_SOURCE_LINES:,} more entries")


def _counts(manifest: Manifest) -> str:
    return f"{_counted(manifest.num_samples, 'sample')} in {_counted(len(manifest.shards), 'shard')}"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _print_modalities(manifest: Manifest) -> None:
    _print_table(
        ("modality", "member", "encoding", "dtype", "shape", "model sees"),
        [_modality_row(modality) for modality in manifest.modalities],
    )


def _modality_row(modality: Modality) -> tuple[str, ...]:
    shape = "x".join("?" if size is None else str(size) for size in modality.shape) or "scalar"
    member = "|".join(modality.extensions) + (f": {modality.field}" if modality.field is not None else "")
    return modality.name, member, modality.encoding, modality.dtype, shape, _transform(modality)


def _transform(modality: Modality) -> str:
    if modality.encoding == "cls":
        return f"one-hot of {modality.num_classes} classes"
    if modality.encoding == "text":
        return f"one-hot of {modality.length} tokens ({modality.tokenizer})"
    offset = "offset per element" if isinstance(modality.offset, list) else f"{modality.offset:g}"
    scale = "scale per element" if isinstance(modality.scale, list) else f"{modality.scale:g}"
    if (offset, scale) == ("0", "1"):
        return "float32 value"
    return f"(value - {offset}) * {scale}"


def _print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, tuple("-" * width for width in widths), *rows]:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _verify(arguments: argparse.Namespace) -> int:
    from jmvae_dist.data.verify import verify_shards

    manifest = Manifest.load(arguments.manifest)
    problems = verify_shards(manifest, arguments.workers, remote_access(arguments))
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"{shown(manifest.path)}: {_counted(len(problems), 'problem')}", file=sys.stderr)
        return 1
    print(f"{shown(manifest.path)}: {_counts(manifest)} are sound")
    return 0

"""Options of `shards write` that say which samples are the split, and what is computed from the train split."""

from __future__ import annotations

import argparse

from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.sources.splits import SplitChoice
from jmvae_dist.data.sources.standardization import Standardization
from jmvae_dist.errors import ConfigError


def add_split_options(parser: argparse.ArgumentParser, test_fraction: float | None) -> None:
    """Add the options of a random split."""
    default = "" if test_fraction is None else f" (default {test_fraction})"
    parser.add_argument(
        "--test-fraction", type=float, default=test_fraction, help=f"share of the test split{default}"
    )
    parser.add_argument("--split-seed", type=int, default=0, help="default 0")


def add_label_options(parser: argparse.ArgumentParser, metavar: str) -> None:
    """Add the options that name what else decides the split."""
    parser.add_argument(
        "--group",
        metavar=metavar,
        help="samples with the same value, such as those of one patient, are all in the same split",
    )
    parser.add_argument("--stratify", metavar=metavar, help="classes of which both splits have the same share")


def add_standardize_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `standardization` reads."""
    parser.add_argument(
        "--standardize",
        action="append",
        default=[],
        metavar="NAME",
        help="the model sees every element with mean 0 and standard deviation 1 in the train split",
    )
    parser.add_argument(
        "--standardize-like",
        metavar="MANIFEST",
        help="take mean and standard deviation from these shards, for example of the train split",
    )


def split_choice(arguments: argparse.Namespace, option: str, is_split: bool) -> SplitChoice:
    """Nobody shall evaluate on training data by accident: the user says which samples the split has.

    Args:
        arguments: with the options of this module, as far as the source has them.
        option: the one that says that all samples are the split.
        is_split: whether it is given.

    Raises:
        ConfigError: the options do not say it, or say it twice.
    """
    choice = {key: getattr(arguments, key, None) for key in ("group", "stratify", "split_column")}
    column = choice.pop("split_column")
    ways = [arguments.test_fraction is not None, is_split, column is not None]
    if arguments.split is None or ways.count(True) != 1:
        what = option.removeprefix("--").partition("-")[0]
        by_column = " or --split-column COLUMN (which says train or test)" if "split_column" in arguments else ""
        raise ConfigError(
            f"name the split to write, --split train|test, and either --test-fraction F (F of the {what} are the "
            f"test split){by_column} or {option} (the {what} holds the samples of that split only)"
        )
    return SplitChoice(arguments.split, arguments.test_fraction, arguments.split_seed, column=column, **choice)


def standardization(arguments: argparse.Namespace, choice: SplitChoice) -> Standardization:
    """What the options of `add_standardize_options` say.

    Raises:
        ConfigError: they contradict others, or there is no train split to compute the numbers from.
    """
    names, like = tuple(arguments.standardize), arguments.standardize_like
    if len(set(names)) < len(names):
        raise ConfigError("--standardize names a modality twice")
    for name in names:
        if name in dict(arguments.offset) or name in dict(arguments.scale):
            raise ConfigError(f"--standardize {name} sets offset and scale; leave out its --offset and --scale")
    if like is not None and not names:
        raise ConfigError("--standardize-like needs --standardize NAME for each modality to standardise")
    if names and like is None and choice.is_whole and choice.split == "test":
        raise ConfigError(
            f"--standardize {names[0]}: mean and standard deviation are those of the train split, which is not "
            "in this file; write that first, and add --standardize-like MANIFEST with its manifest"
        )
    return Standardization(names, None if like is None else Manifest.load(like))

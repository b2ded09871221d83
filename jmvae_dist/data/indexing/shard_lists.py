"""Which shards the arguments of a command mean: files, folders, globs and `shard-{0000..0099}.tar`."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from jmvae_dist.data.urls import is_remote, shown
from jmvae_dist.errors import ConfigError

MAX_SHARDS = 1_000_000

_RANGE = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.(-?\d{1,18}))?\}")


def expand_shards(arguments: Sequence[str]) -> list[str]:
    """Paths and URLs of the shards, in the order of the arguments.

    A folder stands for the `*.tar` files in it, a glob for the files that match; both are sorted with numbers in
    names compared as numbers, so that `shard-10.tar` follows `shard-9.tar`. Braces expand in their own order, like
    in a shell. What exists under its literal name is not expanded.

    Raises:
        ConfigError: nothing matches, a shard is named twice, or there are too many.
    """
    shards: list[str] = []
    for argument in arguments:
        shards += _expand(argument)
        if len(shards) > MAX_SHARDS:
            raise _too_many(argument)
    if not shards:
        raise ConfigError("no shards given; name tars, folders of tars, or patterns such as shard-{0000..0099}.tar")
    seen: set[str] = set()
    for shard in shards:
        place = shard if is_remote(shard) else os.path.realpath(shard)
        if place in seen:
            raise ConfigError(f"{shown(shard)} is given twice: its samples would be seen twice per epoch")
        seen.add(place)
    return shards


def natural_key(path: str) -> list[tuple[int, str]]:
    """Sorts names like a person would: numbers in them by value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)]


def _expand(argument: str) -> list[str]:
    if not is_remote(argument) and Path(argument).is_dir():
        shards = sorted((str(path) for path in Path(argument).glob("*.tar")), key=natural_key)
        if not shards:
            raise ConfigError(f"no *.tar file in folder {argument}")
        return shards
    if not is_remote(argument) and Path(argument).exists():
        return [argument]
    return [shard for pattern in expand_braces(argument) for shard in _expand_glob(pattern)]


def expand_braces(argument: str) -> list[str]:
    """What `{a,b}` and `{00..99}` in a text stand for, in order; raises ConfigError if that is too much."""
    if "{" not in argument:
        return [argument]
    from braceexpand import braceexpand

    # Before it expands anything: it holds every range as a list of strings.
    if math.prod(_range_size(*match.groups()) for match in _RANGE.finditer(argument)) > MAX_SHARDS:
        raise _too_many(argument)
    try:
        shards = list(islice(braceexpand(argument), MAX_SHARDS + 1))
    except ValueError as error:
        raise ConfigError(f"{argument}: {error}") from None
    if len(shards) > MAX_SHARDS:
        raise _too_many(argument)
    return shards


def _range_size(start: str, stop: str, step: str | None) -> int:
    return abs(int(stop) - int(start)) // max(1, abs(int(step or 1))) + 1


def _expand_glob(pattern: str) -> list[str]:
    if is_remote(pattern) or not glob.has_magic(pattern):
        return [pattern]
    shards = sorted(islice(glob.iglob(pattern), MAX_SHARDS + 1), key=natural_key)
    if not shards:
        raise ConfigError(f"no file matches {pattern}")
    return shards


def _too_many(argument: str) -> ConfigError:
    return ConfigError(f"{argument} stands for more than {MAX_SHARDS:,} shards; pack the samples into larger ones")

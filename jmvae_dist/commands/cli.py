"""Argument parsing shared by the verbs: mistakes become a `ConfigError`, which is shown as one line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jmvae_dist.data_config import CacheSection
from jmvae_dist.errors import ConfigError

if TYPE_CHECKING:
    from jmvae_dist.data.manifest import Manifest
    from jmvae_dist.data.store import RemoteAccess
    from jmvae_dist.data.views import View


class _Parser(argparse.ArgumentParser):
    """Abbreviations are refused, also by subparsers: `--over` must not silently become `--overwrite`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """`--trust-class`: a checkpoint may name code of the user's, but not decide that it runs."""
    parser.add_argument(
        "--trust-class",
        action="append",
        default=[],
        metavar="MODULE.CLASS",
        help="a class or function of yours that the run was trained with and that may be imported; repeatable",
    )


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """An `argparse` parser whose errors are `ConfigError`s; its subparsers behave alike."""
    return _Parser(prog=prog, description=description)


def check_writable(option: str, path: Path) -> None:
    """Find out before the work, not after it, that its result has no place.

    Raises:
        ConfigError: No file can be written at `path`, which was given as `option`.
    """
    folder = path.resolve().parent
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{option}: {path} cannot be written; {folder} must be a writable directory")


def add_cache_option(parser: argparse.ArgumentParser) -> None:
    """Add `--cache-dir`, for manifests whose shards are at URLs."""
    parser.add_argument("--cache-dir", metavar="DIR", help="keep copies of remote shards there (data.cache.dir)")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, which `find_device` understands."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def find_device(name: str) -> str:
    """`cpu` or `cuda`: where `--device NAME` computes on this machine.

    Raises:
        ConfigError: It is cuda, and torch sees none.
    """
    from jmvae_dist.distributed.runtime import takes_gpu

    is_on_gpu = takes_gpu(name)
    if name == "cuda" and not is_on_gpu:
        raise ConfigError("--device: cuda is not available to torch on this machine; use auto or cpu")
    return "cuda" if is_on_gpu else "cpu"


def parse_given(text: str, modalities: Sequence[str]) -> list[str]:
    """The modalities that `--given` names, in its order.

    Raises:
        ConfigError: It names none, or one that the model does not have.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in modalities]
    if unknown or not names:
        raise ConfigError(f"--given: {unknown or 'nothing'} is not allowed; the model has {', '.join(modalities)}")
    return names


def make_described_views(
    options: argparse.Namespace, described: Mapping[str, Any], names: Sequence[str], manifest: Manifest
) -> tuple[View, ...]:
    """How the model of `options.path` sees modalities of `--manifest`.

    Args:
        options: Of a verb with the options `path` and `--trust-class`.
        described: What the model's description says of its modalities, by name.
        names: Those that are read.
        manifest: The data.

    Raises:
        ConfigError: The description lacks one, or the manifest's are others.
    """
    from jmvae_dist.training.setup import evaluation_views

    unknown = [name for name in names if name not in described]
    if unknown:
        raise ConfigError(
            f"{options.path} does not say how {unknown[0]!r} is stored, as its model comes from elsewhere; "
            "give it tensors in Python, with jmvae_dist.load_model"
        )
    expected = {name: described[name] for name in names}
    return evaluation_views(expected, manifest, "--manifest", trusted=options.trust_class)


def remote_access(options: argparse.Namespace) -> RemoteAccess:
    """What `--cache-dir` says."""
    from jmvae_dist.data.store import RemoteAccess

    return RemoteAccess(CacheSection(dir=options.cache_dir))

"""Argument parsing shared by the verbs: mistakes become a `ConfigError`, which is shown as one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from jmvae_dist.errors import ConfigError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """An `argparse` parser whose errors are `ConfigError`s; its subparsers behave alike."""
    return _Parser(prog=prog, description=description, allow_abbrev=False)

"""Errors meant for users: each message says what is wrong, where, and which setting changes it.

The command line prints them as one line, without a traceback. Violations of the project's own invariants
are `assert`s instead and do show a traceback.
"""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another (exit code 2)."""


class DataError(ValueError):
    """A shard, index, manifest or batch is not what it claims to be (exit code 1)."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, verified or resumed from (exit code 1)."""


class LaunchError(RuntimeError):
    """The processes that were started do not form the run that was asked for (exit code 1)."""


class TrainingError(RuntimeError):
    """Training cannot go on, for example because the loss is not finite (exit code 1)."""

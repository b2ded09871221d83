"""Errors meant for users, and exit codes.

Each message says what is wrong, where, and which setting changes it. The command line prints it as one line,
without a traceback. Violations of the project's own invariants are `assert`s instead and do show a traceback.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another (exit code 2)."""


class DataError(ValueError):
    """A shard, index, manifest or batch is not what it claims to be (exit code 1)."""


class UnreachableError(DataError):
    """Data cannot be had here and now, which says nothing against the data (exit code 1)."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, verified or resumed from (exit code 1)."""


class LaunchError(RuntimeError):
    """The processes that were started do not form the run that was asked for (exit code 1)."""


class TrainingError(RuntimeError):
    """Training cannot go on, for example because the loss is not finite (exit code 1)."""


class PeerError(RuntimeError):
    """Another rank failed; its own message says why (exit code 1)."""


class StopRequested(Exception):  # noqa: N818  # a request, not an error
    """A stop was asked for while something other than training steps was going on."""


def is_on_all_ranks(error: BaseException) -> bool:
    """Whether every rank raises this error, so that none waits for another."""
    return getattr(error, "_is_on_all_ranks", False)


def mark_on_all_ranks(error: Exception) -> Exception:
    """Note that every rank raises this error; returns it."""
    error._is_on_all_ranks = True  # type: ignore[attr-defined]
    return error

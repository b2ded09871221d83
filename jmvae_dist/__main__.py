"""``python -m jmvae_dist`` and ``jmvae-dist``: find the verb, run it, turn errors into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys

from jmvae_dist.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EXIT_USAGE,
    CheckpointError,
    ConfigError,
    DataError,
    LaunchError,
    PeerError,
    TrainingError,
    is_on_all_ranks,
)

# Verb -> one line of help; the verb's module in `commands` is imported only when it is used.
VERBS = {
    "shards": "write, inspect and verify sharded data",
    "train": "train a model, or resume a run",
    "evaluate": "metrics of a run or checkpoint on held-out shards",
    "sample": "generate from the prior or from given modalities",
    "checkpoint": "list, verify and export checkpoints",
    "report": "write a run's self-contained HTML report",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 done, 1 failure, 2 usage, 75 stopped with a checkpoint written."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_help()
        return 0 if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        from jmvae_dist import __version__

        print(f"jmvae-dist {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        return _complain(f"unknown verb {verb!r}; the verbs are {', '.join(VERBS)}", EXIT_USAGE)
    try:
        exit_code = importlib.import_module(f"jmvae_dist.commands.{verb}").main(rest)
        return _tell_launcher(exit_code) if exit_code == EXIT_STOPPED else exit_code
    except ConfigError as error:
        # The same on every rank: all of them read the same arguments and files.
        return _tell_launcher(_complain(f"{verb}: {error}", EXIT_USAGE))
    except BrokenPipeError:
        # `jmvae-dist shards show M | head` is not an error; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except (DataError, CheckpointError, LaunchError, TrainingError, PeerError, OSError) as error:
        everywhere = is_on_all_ranks(error)
        exit_code = _complain(f"{verb}: {error}", EXIT_FAILURE, is_shared=everywhere)
        return _tell_launcher(exit_code) if everywhere else exit_code
    except KeyboardInterrupt:
        return _complain(f"{verb}: interrupted", EXIT_INTERRUPTED)


def _print_help() -> None:
    print("usage: jmvae-dist VERB [options]   (jmvae-dist VERB --help explains a verb)\n")
    for verb, summary in VERBS.items():
        print(f"  {verb:<12}{summary}")


def _tell_launcher(exit_code: int) -> int:
    """Leave an exit code that all ranks share in the file that `launch/local.sh` reads.

    Torchrun would turn it into 1, behind a page about failed processes.
    """
    path = os.environ.get("JMVAE_DIST_EXIT_CODE_FILE")
    if path is None:
        return exit_code
    if _rank() == 0:
        with open(path, "w", encoding="utf-8") as file:
            file.write(str(exit_code))
    return 0


def _rank() -> int:
    value = os.environ.get("RANK", "0")
    return int(value) if value.isdigit() else 0


def _complain(message: str, exit_code: int, is_shared: bool = False) -> int:
    """Print an error; one that all ranks share only from rank 0."""
    if (is_shared or exit_code == EXIT_USAGE) and _rank() != 0:
        return exit_code
    is_own = "RANK" in os.environ and not is_shared and exit_code != EXIT_USAGE
    print(f"jmvae-dist{f'[rank {_rank()}]' if is_own else ''} {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())

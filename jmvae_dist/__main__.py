"""``python -m jmvae_dist`` and ``jmvae-dist``: find the verb, run it, turn errors into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys

from jmvae_dist.errors import CheckpointError, ConfigError, DataError, LaunchError, TrainingError

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130

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
        return _tell_launcher(importlib.import_module(f"jmvae_dist.commands.{verb}").main(rest))
    except ConfigError as error:
        return _complain(f"{verb}: {error}", EXIT_USAGE)
    except (DataError, CheckpointError, LaunchError, TrainingError) as error:
        return _complain(f"{verb}: {error}", EXIT_FAILURE)
    except KeyboardInterrupt:
        return _complain(f"{verb}: interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # `jmvae-dist shards show M | head` is not an error; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE


def _print_help() -> None:
    print("usage: jmvae-dist VERB [options]   (jmvae-dist VERB --help explains a verb)\n")
    for verb, summary in VERBS.items():
        print(f"  {verb:<12}{summary}")


def _tell_launcher(exit_code: int) -> int:
    """Leave 75 in the file that `launch/local.sh` reads: torchrun turns every non-zero code into a failure."""
    path = os.environ.get("JMVAE_DIST_EXIT_CODE_FILE")
    if exit_code != EXIT_STOPPED or path is None:
        return exit_code
    if os.environ.get("RANK") == "0":
        with open(path, "w", encoding="utf-8") as file:
            file.write(str(exit_code))
    return 0


def _complain(message: str, exit_code: int) -> int:
    # Configuration errors are the same on every rank: one of them says it. Others name their own rank.
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) or 0)
    if exit_code == EXIT_USAGE and rank != 0:
        return exit_code
    prefix = "jmvae-dist" if exit_code == EXIT_USAGE or "RANK" not in os.environ else f"jmvae-dist[rank {rank}]"
    print(f"{prefix} {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())

"""``python -m jmvae_dist`` and ``jmvae-dist``: find the verb, run it, turn errors into one line and an exit code."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from jmvae_dist.distributed.environment import ProcessInfo

# Verb -> one line of help; the verb's module in `commands` is imported only when it is used.
VERBS = {
    "shards": "write, inspect and verify sharded data",
    "train": "train a model, or resume a run",
    "evaluate": "metrics of a run or checkpoint on held-out shards",
    "sample": "generate from the prior or from given modalities",
    "encode": "posterior means of all samples, with their keys and classes",
    "checkpoint": "list, verify and export checkpoints",
    "report": "write a run's self-contained HTML report",
    "slurm": "check, submit and follow batch jobs",
    "doctor": "check ranks, nodes, network, data and disks before a run",
    "bench": "measure training steps and kernels on this machine",
}

# Where launch/local.sh expects an exit code that all ranks share.
_EXIT_CODE_FILE = "JMVAE_DIST_EXIT_CODE_FILE"
_WAIT_FOR_RANK_0_S = 5.0
_MAX_MESSAGE_CHARACTERS = 10_000


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 done, 1 failure, 2 usage, 75 stopped with a checkpoint written."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr does: an encoding without a sign of a table, or of a name of the user's, must not end the verb.
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = _without_local_rank(sys.argv[1:] if arguments is None else arguments)
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
        everywhere = is_on_all_ranks(error) or _is_said_by_rank_0()
        exit_code = _complain(f"{verb}: {error}", EXIT_USAGE, is_shared=everywhere)
        return _tell_launcher(exit_code) if everywhere else exit_code
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


def _without_local_rank(arguments: list[str]) -> list[str]:
    """Without what the deepspeed launcher puts before the verb unless it has `--no_local_rank`."""
    launchers = f"--local_rank={os.environ.get('LOCAL_RANK')}"
    return arguments[1:] if "CROSS_SIZE" in os.environ and arguments[:1] == [launchers] else arguments


def _is_said_by_rank_0() -> bool:
    """Whether rank 0 complains of the same mistake; nearly always, since all ranks read the same arguments and files.

    Rank 0 exits first, and most launchers then send SIGTERM to the others. Without one it is the mistake of this
    node, such as a manifest that is missing on it: unsaid, it would leave rank 0 waiting without a reason.
    """
    if _process().rank == 0 or _EXIT_CODE_FILE in os.environ:
        return True
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    return signal.sigtimedwait({signal.SIGTERM}, _WAIT_FOR_RANK_0_S) is not None


def _tell_launcher(exit_code: int) -> int:
    """Bring an exit code that all ranks share to the launcher; returns the one for this process.

    `launch/local.sh` reads it from a file: torchrun would turn it into 1, as the failure of one rank.
    Elsewhere it is rank 0's alone: the first rank that exits with another code than 0 makes the launcher end the
    others, perhaps before rank 0 has said why.
    """
    path = os.environ.get(_EXIT_CODE_FILE)
    process = _process()
    if path is None:
        if process.launcher != "single":
            # All that is left is to exit; ended by the launcher, this rank's 143 would hide the shared code.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return exit_code if process.rank == 0 else 0
    if process.rank == 0:
        with open(path, "w", encoding="utf-8") as file:
            file.write(str(exit_code))
    return 0


def _process() -> ProcessInfo:
    """This process among those of the run; that of a single one if the launcher's variables make no sense."""
    from jmvae_dist.distributed.environment import ProcessInfo, detect_process

    try:
        return detect_process()
    except LaunchError:
        return ProcessInfo(rank=0, world_size=1, local_rank=0, launcher="single")


def _complain(message: str, exit_code: int, is_shared: bool = False) -> int:
    """Print an error; one that all ranks share only from rank 0."""
    from jmvae_dist.data.untrusted import printable

    # Names and values of files are in it, which may be those of others.
    message = "\n".join(map(printable, message[:_MAX_MESSAGE_CHARACTERS].split("\n")))
    process = _process()
    if not is_shared or process.rank == 0:
        is_own = process.launcher != "single" and not is_shared
        print(f"jmvae-dist{f'[rank {process.rank}]' if is_own else ''} {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())

"""torchrun as `launch/local.sh` starts it: one line about the ranks that failed, in place of a page about torchrun.

    python -m jmvae_dist.distributed.torchrun [torchrun's options] -m jmvae_dist train ...

What ranks print goes to the terminal past this process, so that nothing of theirs can be lost here. Every other
failure of torchrun itself, such as a rendezvous, keeps its traceback.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jmvae_dist.errors import EXIT_FAILURE

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

# How torchrun's own messages begin that the line about the ranks makes superfluous. In another version of torch they
# may read otherwise, and are then shown.
_SUPERFLUOUS = ("Sending process", "failed (exitcode")
_MAX_RANKS_NAMED = 3


def main(arguments: Sequence[str]) -> int:
    """Run torchrun; returns 0, or 1 after a rank has failed."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run_torchrun

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(
        lambda record: not str(record.msg).startswith(_SUPERFLUOUS)
    )
    try:
        run_torchrun(list(arguments))
    except ChildFailedError as error:
        print(f"launch/local.sh: {describe_failures(error)}", file=sys.stderr, flush=True)
        return EXIT_FAILURE
    return 0


def describe_failures(error: ChildFailedError) -> str:
    """Which rank failed first, how, and which ones after it: in most cases because of it."""
    first, failure = error.get_first_failure()
    text = f"rank {first} (process {failure.pid}) {_how(failure)}"
    if failure.exitcode == -signal.SIGKILL:
        text += ", by hand or, where memory ran out, by the kernel (`dmesg` then names the process)"
    others = [f"rank {rank} {_how(other)}" for rank, other in sorted(error.failures.items()) if rank != first]
    if len(others) > _MAX_RANKS_NAMED:
        others = [f"{len(others)} other ranks ended"]
    return f"{text}; {''.join(f'then {other}; ' for other in others)}what ranks have said is above"


def _how(failure: ProcessFailure) -> str:
    if failure.exitcode >= 0:
        return f"ended with exit code {failure.exitcode}"
    try:
        return f"was ended by {signal.Signals(-failure.exitcode).name}"
    except ValueError:
        return f"was ended by signal {-failure.exitcode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

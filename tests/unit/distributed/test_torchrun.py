"""What is said about ranks that failed."""

from __future__ import annotations

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from jmvae_dist.distributed.torchrun import describe_failures


@pytest.mark.parametrize(
    ("exit_codes", "said"),
    [
        (
            {1: -9, 0: 1},
            "rank 1 (process 101) was ended by SIGKILL, by hand or, where memory ran out, by the kernel (`dmesg` "
            "then names the process); then rank 0 ended with exit code 1; what ranks have said is above",
        ),
        ({0: 1}, "rank 0 (process 100) ended with exit code 1; what ranks have said is above"),
        (
            {2: -11, 0: -15, 1: -64},
            "rank 2 (process 102) was ended by SIGSEGV; then rank 0 was ended by SIGTERM; then rank 1 was ended by "
            "SIGRTMAX; what ranks have said is above",
        ),
        (
            {3: -6, 0: 1, 1: 1, 2: 1, 4: 1},
            "rank 3 (process 103) was ended by SIGABRT; then 4 other ranks ended; what ranks have said is above",
        ),
        ({0: -99}, "rank 0 (process 100) was ended by signal 99; what ranks have said is above"),
    ],
)
def test_the_first_rank_that_failed_is_named_first(exit_codes: dict[int, int], said: str) -> None:
    failures = {
        rank: ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=code, error_file="")
        for rank, code in exit_codes.items()
    }
    for failure in failures.values():
        failure.timestamp = 1_000
    assert describe_failures(ChildFailedError("jmvae_dist", failures)) == said

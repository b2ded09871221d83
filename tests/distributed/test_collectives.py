"""Agreement between real gloo processes: values, and errors that must not leave anyone waiting."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.errors import CheckpointError, DataError, StopRequested, UnreachableError, is_on_all_ranks

WORLD_SIZE = 3


def run_on_ranks(function: Callable[[Collectives], Any], folder: Path) -> list[Any]:
    """Call `function` on every rank of a gloo group of real processes; returns what each returned."""
    context = multiprocessing.spawn(_enter, (function, str(folder)), nprocs=WORLD_SIZE, join=False)
    deadline_s = time.monotonic() + 60
    while not context.join(timeout=1):
        assert time.monotonic() < deadline_s, "some rank is still waiting"
    return [torch.load(folder / f"result-{rank}", weights_only=True) for rank in range(WORLD_SIZE)]


def _enter(rank: int, function: Callable[[Collectives], Any], folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    store = dist.FileStore(f"{folder}/store", WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=30))
    result = function(Collectives(rank, WORLD_SIZE, dist.new_group(backend="gloo")))
    torch.save(result, f"{folder}/result-{rank}")
    dist.destroy_process_group()


def exchange(collectives: Collectives) -> Any:
    rank = collectives.rank
    flags = torch.tensor([rank == 1, False]).int()
    work = collectives.start_maximum(flags)
    assert work is not None
    work.wait()
    return {
        "gather": collectives.gather({"rank": rank, "text": "é" * rank}),
        "broadcast": collectives.broadcast([rank, "from"] if rank == 0 else None),
        "on_main": collectives.on_main(lambda: {"decided_by": rank}),
        "sum": collectives.sum(torch.tensor([1.0, rank], dtype=torch.float64)).tolist(),
        "maximum": flags.tolist(),
    }


def test_values(tmp_path: Path) -> None:
    results = run_on_ranks(exchange, tmp_path)
    assert results[0] == results[1] == results[2]
    assert results[0] == {
        "gather": [{"rank": rank, "text": "é" * rank} for rank in range(WORLD_SIZE)],
        "broadcast": [0, "from"],
        "on_main": {"decided_by": 0},
        "sum": [3.0, 3.0],
        "maximum": [1, 0],
    }


def fail_in_turn(collectives: Collectives) -> list[str]:
    """One rank fails after another; every rank must see every failure and still be able to go on."""
    seen = []
    for failing in range(WORLD_SIZE):
        error = CheckpointError if failing < 2 else ZeroDivisionError
        try:
            with collectives.together():
                if collectives.rank == failing:
                    raise error(f"disk {failing}")
        except (CheckpointError, RuntimeError, ZeroDivisionError) as caught:
            seen.append(f"{type(caught).__name__}: {caught}")
    try:
        collectives.on_main(lambda: 1 // 0)
    except (RuntimeError, ZeroDivisionError) as caught:
        seen.append(type(caught).__name__)
    own = [None, StopRequested("asked"), _FullDiskError("full")][collectives.rank]
    try:
        with collectives.together():
            if own is not None:
                raise own
    except (StopRequested, _FullDiskError) as caught:
        # The same on all ranks, however each of them failed.
        seen.append(f"{type(caught).__name__}, {is_on_all_ranks(caught)}, {caught.__cause__!r}")
    try:
        with collectives.together():
            if collectives.rank == 1:
                raise _FullDiskError("full")
    except UnreachableError as caught:
        seen.append(f"{type(caught).__name__}: {caught}")
    collectives.require_equal("m.json", "fingerprint 1")
    try:
        collectives.require_equal("m.json", f"fingerprint {int(collectives.rank == 2)}")
    except DataError as caught:
        seen.append(str(caught))
    with collectives.together():
        pass
    return seen


class _FullDiskError(UnreachableError):
    """Of a kind that the other ranks know by its base class only."""


def test_errors_reach_every_rank(tmp_path: Path) -> None:
    results = run_on_ranks(fail_in_turn, tmp_path)
    for rank, seen in enumerate(results):
        for failing in range(WORLD_SIZE):
            kind = "CheckpointError" if failing < 2 else "ZeroDivisionError" if rank == 2 else "PeerError"
            prefix = "" if rank == failing else f"rank {failing}: "
            assert seen[failing] == f"{kind}: {prefix}disk {failing}"
        assert seen[3] == ("ZeroDivisionError" if rank == 0 else "PeerError")
        assert seen[4] == f"StopRequested, True, {'_FullDiskError(' + repr('full') + ')' if rank == 2 else None}"
        assert "m.json: rank 2 has read fingerprint 1, rank 0 has read fingerprint 0" in seen[6]
        assert seen[5] == ("_FullDiskError: full" if rank == 1 else "UnreachableError: rank 1: full")


def test_one_process_needs_no_group() -> None:
    alone = Collectives()
    assert alone.gather(1) == [1]
    assert alone.broadcast("x") == "x"
    assert alone.sum(torch.ones(2)).tolist() == [1.0, 1.0]
    assert alone.start_maximum(torch.ones(1)) is None
    with pytest.raises(DataError, match="bad"), alone.together():
        raise DataError("bad")

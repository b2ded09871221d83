"""The preflight from meeting to table: two stages of checks on every rank, judged on rank 0."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from jmvae_dist.cluster.doctor import job, machine, network
from jmvae_dist.cluster.doctor.check import Check, Context, Results, judge_check, run_checks
from jmvae_dist.cluster.doctor.layout import Layout, format_ranks
from jmvae_dist.cluster.doctor.meeting import Meeting, describe_missing
from jmvae_dist.cluster.doctor.shard_cache import SHARD_CACHE
from jmvae_dist.cluster.doctor.table import Row, count_by_status
from jmvae_dist.config import RunConfig
from jmvae_dist.distributed.environment import ProcessInfo

FORMAT_VERSION = 1
_GRACE_S = 10.0
# Each rank by itself. The configuration comes first: others use the run that it describes.
_ALONE: tuple[Check, ...] = (
    job.CONFIGURATION,
    *machine.CHECKS,
    *machine.LIMITS,
    network.INTERFACE,
    *job.CHECKS,
    SHARD_CACHE,
)
# All ranks at once, as far as rank 0 announces it.
_TOGETHER: tuple[Check, ...] = (job.SHARED_DIRECTORY, network.CLOCKS, network.PROCESS_GROUP)
# Order of the table.
_ORDER = (
    *("ranks", "site", "versions", "code", "device", "threads", "open files", "/dev/shm"),
    *("network", "clock", "collectives"),
    *("configuration", "world size", "engine", "shards", "shard cache", "read speed"),
    *("output_dir", "disk space", "checkpoints", "W&B"),
)


@dataclass(frozen=True)
class Diagnosis:
    """What rank 0 found.

    Attributes:
        rows: The table.
        layout: The ranks that came.
        silent: Ranks that came, but delivered nothing from one stage or both.
        facts: What the rows were judged from: by rank and check.
    """

    rows: list[Row]
    layout: Layout
    silent: list[int]
    facts: dict[int, Results]

    @property
    def is_complete(self) -> bool:
        """Whether all ranks are there at the end, so that they can leave in order."""
        return not self.layout.missing and not self.silent

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed, each once."""
        return list(dict.fromkeys(row.check for row in self.rows if row.status == "fail"))

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "status": next(status for status in ("fail", "warn", "pass") if count_by_status(self.rows)[status]),
            "counts": count_by_status(self.rows),
            "world_size": self.layout.world_size,
            "ranks": [asdict(place) for place in self.layout.places.values()],
            "rows": [row.to_json() for row in self.rows],
            "facts": {str(rank): results for rank, results in self.facts.items()},
        }


class Doctor:
    """The preflight on one rank; every rank of the launch makes one.

    Args:
        process: Rank and world size from the launcher.
        config: What is to be run; None leaves out what depends on it.
        timeout_s: Longest wait for a rank to come, and for the checks of each stage.

    Attributes:
        hangs: Whether a check of this rank has not ended.

    Raises:
        LaunchError: Rank 0 did not come, or this rank came too late.
    """

    def __init__(self, process: ProcessInfo, config: RunConfig | None, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.meeting = Meeting(process, timeout_s)
        self.context = Context(self.meeting, timeout_s, config)
        self.hangs = False

    @property
    def layout(self) -> Layout:
        """The ranks that came."""
        return self.meeting.layout

    @contextlib.contextmanager
    def examine(self) -> Iterator[Diagnosis | None]:
        """Run all checks; gives the diagnosis on rank 0 and None elsewhere, and cleans up at the end."""
        try:
            alone = self._run_stage("alone", _ALONE, self.timeout_s, self.layout.places)
            self.context.plan = self._agree_on_plan(alone)
            chosen = tuple(check for check in _TOGETHER if check.name in self.context.plan["checks"])
            # Its waits are for other ranks, and bounded one by one.
            together = self._run_stage("together", chosen, 2 * self.timeout_s + _GRACE_S, alone)
            yield self._judge(alone, together) if self.context.rank == 0 else None
        finally:
            for clean_up in self.context.on_exit:
                clean_up()

    def _run_stage(
        self, stage: str, checks: tuple[Check, ...], timeout_s: float, ranks: Iterable[int]
    ) -> dict[int, Results]:
        """Run checks here, and on rank 0 collect what `ranks` found (elsewhere nothing)."""
        results, hangs = run_checks(checks, self.context, timeout_s)
        self.hangs = self.hangs or hangs
        self.meeting.put(stage, results)
        if self.context.rank != 0:
            return {}
        return self.meeting.collect(stage, ranks, timeout_s + _GRACE_S)

    def _agree_on_plan(self, alone: dict[int, Results]) -> dict[str, Any]:
        """What is to be done together, as rank 0 sees it after what every rank found alone."""
        if self.context.rank == 0:
            self.meeting.announce("plan", plan_together(alone, self.layout, self.context.config, self.hangs))
        return self.meeting.hear("plan", self.timeout_s + 2 * _GRACE_S)

    def _judge(self, alone: dict[int, Results], together: dict[int, Results]) -> Diagnosis:
        facts = {rank: {**alone.get(rank, {}), **together.get(rank, {})} for rank in self.layout.places}
        rows = [row for check in (*_ALONE, *_TOGETHER) for row in judge_check(check, facts, self.layout)]
        silent = [rank for rank in self.layout.places if rank not in alone or rank not in together]
        rows += _judge_presence(self.layout, silent, self.context.plan)
        rows.sort(key=lambda row: _ORDER.index(row.check))
        return Diagnosis(rows, self.layout, silent, facts)


def plan_together(
    alone: dict[int, Results], layout: Layout, config: RunConfig | None, main_hangs: bool
) -> dict[str, Any]:
    """Which checks of the second stage can be made, with what they need to know.

    Args:
        alone: Results of the first stage.
        layout: The ranks that came.
        config: The configuration, if there is one.
        main_hangs: Whether rank 0 hangs in a check of the first stage.
    """
    # A rank that delivered nothing, or hangs, would make the others wait.
    able = [rank for rank in layout.places if rank in alone and not _hangs(alone[rank])]
    leaders = [rank for rank in layout.leaders if rank in able]
    checks = []
    space = alone.get(0, {}).get("disk space", {})
    probe = space["facts"]["probe"] if "facts" in space else None
    if probe is not None:
        checks.append(job.SHARED_DIRECTORY.name)
    if not main_hangs and 0 in able and len(leaders) > 1:
        checks.append(network.CLOCKS.name)
    everybody = len(able) == layout.world_size and not layout.repeated
    if everybody:
        checks.append(network.PROCESS_GROUP.name)
    sound = all("facts" in alone[rank].get("engine", {}) and "facts" in alone[rank]["configuration"] for rank in able)
    engine = config.training.engine if config is not None and everybody and sound else "ddp"
    return {"checks": checks, "leaders": leaders, "probe": probe, "engine": engine}


def _hangs(results: Results) -> bool:
    return any(result.get("hangs", False) for result in results.values())


def _judge_presence(layout: Layout, silent: list[int], plan: dict[str, Any]) -> list[Row]:
    """Rows for ranks that did not come, or fell silent, and for what was left out because of them."""
    rows = []
    if layout.missing:
        advice = "look for their errors and at their nodes; all ranks must start within --timeout-s"
        where = f"rank{'s' if len(layout.missing) > 1 else ''} {format_ranks(layout.missing)}"
        rows.append(Row("ranks", where, "fail", describe_missing(layout), advice))
    if silent:
        found = "came, but fell silent during the checks: dead, or cut off"
        rows.append(Row("ranks", layout.name(silent), "fail", found, "look at their output and at their nodes"))
    if network.PROCESS_GROUP.name not in plan["checks"]:
        found = "not measured: not all ranks could take part"
        rows.append(Row("collectives", "all", "warn", found, "see the rows above about ranks, and those that hang"))
    return rows

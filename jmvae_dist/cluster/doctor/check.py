"""What a check is, and how checks run without being able to crash or hang the preflight."""

from __future__ import annotations

import re
import statistics
import threading
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from jmvae_dist.cluster.doctor.layout import Layout
from jmvae_dist.cluster.doctor.meeting import Meeting
from jmvae_dist.cluster.doctor.table import Row, Status
from jmvae_dist.config import RunConfig
from jmvae_dist.errors import CheckpointError, ConfigError, DataError, LaunchError, TrainingError
from jmvae_dist.training.setup import ResolvedRun

Key = TypeVar("Key", bound=Hashable)

# Runs on every rank, on the first of each node (which speaks for the node), or on rank 0.
Who = Literal["rank", "node", "main"]
_DIGITS = re.compile(r"[0-9]+")
# Their messages are sentences for users; others get the class's name before them.
_USER_ERRORS = (CheckpointError, ConfigError, DataError, LaunchError, TrainingError)


@dataclass
class Context:
    """What the checks of one rank have at hand.

    Attributes:
        meeting: The ranks, and the store to talk to them.
        timeout_s: Longest wait for another rank.
        config: What the user gave; None without --config.
        run: What it means here; None until the check of the configuration has passed.
        plan: What rank 0 announced for the second stage.
        on_exit: Called on this rank at the end, whatever has happened.
    """

    meeting: Meeting
    timeout_s: float
    config: RunConfig | None = None
    run: ResolvedRun | None = None
    plan: dict[str, Any] = field(default_factory=dict)
    on_exit: list[Callable[[], None]] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return self.meeting.process.rank

    @property
    def layout(self) -> Layout:
        return self.meeting.layout

    @property
    def local_ranks(self) -> list[int]:
        """The ranks on this rank's node."""
        return self.layout.nodes[self.layout.host(self.rank)]

    def legal_place(self, rank: int) -> tuple[int, int]:
        """A rank and the world size, lowered to what the run's lanes allow: too many ranks are a row of their own."""
        assert self.run is not None
        lanes = self.run.plan.lanes
        return min(rank, lanes - 1), min(self.meeting.process.world_size, lanes)


# Status, what was found, and advice.
Judgement = tuple[Status, str, str]


@dataclass(frozen=True)
class Gathered:
    """The facts of one check, from the ranks that delivered them (at least one); makes its rows."""

    check: str
    who: Who
    facts: dict[int, Any]
    layout: Layout

    def passed(self, found: str, ranks: Collection[int] | None = None) -> Row:
        return self._row("pass", found, "", ranks)

    def warn(self, found: str, advice: str, ranks: Collection[int] | None = None) -> Row:
        return self._row("warn", found, advice, ranks)

    def fail(self, found: str, advice: str, ranks: Collection[int] | None = None) -> Row:
        return self._row("fail", found, advice, ranks)

    def merge(self, judgements: Mapping[int, Judgement]) -> list[Row]:
        """One row for all ranks of which the same is to be said."""
        groups = group_by_value(judgements)
        return [self._row(status, found, advice, ranks) for (status, found, advice), ranks in groups]

    def _row(self, status: Status, found: str, advice: str, ranks: Collection[int] | None) -> Row:
        """`ranks` are those that the row speaks of: by default all that delivered."""
        chosen = set(self.facts if ranks is None else ranks)
        where = self.layout.name_nodes(chosen) if self.who == "node" else self.layout.name(chosen)
        return Row(self.check, where, status, found, advice)


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: Shown in the first column.
        who: The ranks it runs on.
        needs: Nothing, a configuration, or one that fits data and machine; without it the check is left out.
        gather: Facts of this rank, as a JSON value; an exception becomes a row with status fail.
        judge: Rows for the facts of all ranks; pure.
        remedy: What to do when `gather` fails.
    """

    name: str
    who: Who
    needs: Literal["nothing", "config", "run"]
    gather: Callable[[Context], Any]
    judge: Callable[[Gathered], list[Row]]
    remedy: str

    def applies(self, context: Context) -> bool:
        """Whether this rank is to gather facts."""
        if self.needs == "config" and context.config is None:
            return False
        if self.needs == "run" and context.run is None:
            return False
        if self.who == "node":
            return context.rank in context.layout.leaders
        return self.who == "rank" or context.rank == 0


# By check: {"facts": ...}, or {"error": message}, with "hangs": True if the check is still at it.
Results = dict[str, dict[str, Any]]


def run_checks(checks: Sequence[Check], context: Context, timeout_s: float) -> tuple[Results, bool]:
    """Gather this rank's facts; returns them, and whether something still hangs.

    What touches a file system or a driver can hang for good, out of reach of any exception: hence the thread.
    """
    results: Results = {}
    current: list[str] = []

    def work() -> None:
        for check in checks:
            if check.applies(context):
                current[:] = [check.name]
                results[check.name] = _gather(check, context)

    thread = threading.Thread(target=work, name="doctor", daemon=True)
    thread.start()
    thread.join(timeout_s)
    hangs = thread.is_alive()
    finished = dict(results)
    if hangs and current and current[0] not in finished:
        message = f"did not end within {timeout_s:g} s (see --timeout-s); what follows it was left out here"
        finished[current[0]] = {"error": message, "hangs": True}
    return finished, hangs


def _gather(check: Check, context: Context) -> dict[str, Any]:
    try:
        return {"facts": check.gather(context)}
    except _USER_ERRORS as error:
        return {"error": str(error)}
    except (Exception, SystemExit) as error:  # a check must not end the preflight
        text = " ".join(str(error).split()) or "no message"
        return {"error": f"{type(error).__name__}: {text[:400]}"}


def judge_check(check: Check, results: Mapping[int, Results], layout: Layout) -> list[Row]:
    """The rows of one check: its failures by message, and its judgement of the facts."""

    def gathered(facts: dict[int, Any]) -> Gathered:
        return Gathered(check.name, check.who, facts, layout)

    mine = {rank: result[check.name] for rank, result in results.items() if check.name in result}
    # Ports, addresses and ranks differ between messages about one thing.
    errors: dict[str, list[int]] = {}
    for rank in sorted(mine):
        if "error" in mine[rank]:
            errors.setdefault(_DIGITS.sub("#", mine[rank]["error"]), []).append(rank)
    facts = {rank: result["facts"] for rank, result in mine.items() if "facts" in result}
    everybody = gathered(dict.fromkeys(mine))
    rows = [everybody.fail(mine[ranks[0]]["error"], check.remedy, ranks) for ranks in errors.values()]
    if not facts:
        return rows
    try:
        return rows + check.judge(gathered(facts))
    except Exception as error:  # a mistake in a judgement must not hide the other checks
        found = f"the facts cannot be judged ({type(error).__name__}: {error})"
        return [*rows, gathered(facts).fail(found, "report this as a defect of jmvae-dist doctor")]


def group_by_value(facts: Mapping[int, Any]) -> list[tuple[Any, list[int]]]:
    """Distinct values with the ranks that have them, the most frequent first; the first rank decides a tie."""
    groups: dict[str, list[int]] = {}
    for rank in sorted(facts):
        groups.setdefault(repr(facts[rank]), []).append(rank)
    counts = Counter({key: len(ranks) for key, ranks in groups.items()})
    return [(facts[groups[key][0]], groups[key]) for key, _ in counts.most_common()]


def find_outliers(values: Mapping[Key, float], worse: Literal["high", "low"], factor: float) -> list[Key]:
    """Which of at least three values are worse than their median by more than `factor`.

    The comparison is within one run: what is fast or slow in itself depends on the hardware.
    """
    if len(values) < 3:
        return []
    median = statistics.median(values.values())
    if worse == "high":
        return [key for key, value in values.items() if value > median * factor]
    return [key for key, value in values.items() if value * factor < median]

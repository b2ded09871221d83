"""Signs of life: every rank keeps a small file on the file system that all ranks share, and reads the others'.

A heartbeat is judged only by whether it changes between two readings, on the clock of the process that reads: the
clocks of two hosts may differ by more than any sensible limit.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

DONE = "done"


@dataclass(frozen=True)
class Heartbeat:
    """The content of one rank's file.

    Args:
        attempt: Identity of this start of the run, equal on all ranks; files of earlier attempts stay behind.
        beat: Counts the writings of this file.
        rank: The rank.
        process: Its process id.
        process_start: When that process started, see `_process_stat`; tells it from a later one with the same id.
        process_table: Which processes the id counts among, see `_process_table`.
        host: Name of its host, for people.
        global_step: The step it is at.
        section: What its main thread does.
        section_s: Since how long.
        last_words: If it did not end well: how, a colon, and why.
    """

    attempt: str
    beat: int
    rank: int
    process: int
    process_start: str
    process_table: str
    host: str
    global_step: int
    section: str
    section_s: float
    last_words: str | None = None

    @property
    def who(self) -> str:
        """The rank and where it runs, for messages."""
        return f"rank {self.rank} (process {self.process} on host {self.host})"

    @property
    def where(self) -> str:
        """What it does, for messages."""
        return f'"{self.section}" of global step {self.global_step}'

    def process_state(self) -> str:
        """What became of the process: "running", "stopped", "gone", or "unknown" where this process cannot see it."""
        if not self.process_table or self.process_table != _process_table():
            return "unknown"
        try:
            state, start = _process_stat(self.process)
        except OSError:
            return "gone"
        if start != self.process_start or state in "ZX":
            return "gone"
        return "stopped" if state in "Tt" else "running"


class Heartbeats:
    """The files of all ranks in one folder; this process writes its own.

    Args:
        folder: On a file system that all ranks share; made when needed.
        attempt: Identity of this start of the run, equal on all ranks.
        rank: This process.
        world_size: Number of processes; files of other ranks, left by an attempt with more, are never read.
    """

    def __init__(self, folder: Path, attempt: str, rank: int, world_size: int) -> None:
        self.folder = folder
        self.peers = [peer for peer in range(world_size) if peer != rank]
        self.is_failing = False
        self._has_warned = False
        self._own = Heartbeat(
            attempt=attempt,
            beat=0,
            rank=rank,
            process=os.getpid(),
            process_start=_process_stat(os.getpid())[1],
            process_table=_process_table(),
            host=socket.gethostname(),
            global_step=0,
            section="",
            section_s=0.0,
        )

    def write(self, global_step: int, section: str, section_s: float, last_words: str | None = None) -> None:
        """Replace this rank's file; a failure is remembered in `is_failing` and said once, as the run can go on."""
        self._own = dataclasses.replace(
            self._own,
            beat=self._own.beat + 1,
            global_step=global_step,
            section=section,
            section_s=round(section_s, 1),
            last_words=last_words,
        )
        path = self._path(self._own.rank)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Without fsync: nobody needs this file after a power cut, and once a second would disturb checkpoints.
            temporary.write_text(json.dumps(dataclasses.asdict(self._own)), encoding="utf-8")
            os.replace(temporary, path)
            self.is_failing = False
        except OSError as error:
            self.is_failing = True
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "%s: heartbeats cannot be written (%s); until they can, frozen ranks go unnoticed",
                    self.folder,
                    error.strerror,
                )

    def read(self, rank: int) -> Heartbeat | None:
        """The newest heartbeat of a rank in this attempt; None before its first.

        Raises:
            OSError: The file cannot be read, which says nothing about the rank.
        """
        try:
            values = json.loads(self._path(rank).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            # Files are replaced as a whole: an unreadable one was left by a power cut during an earlier attempt.
            return None
        if not isinstance(values, dict) or values.get("attempt") != self._own.attempt:
            return None
        return Heartbeat(**values)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"


class PeerWatch:
    """For how long each peer has been silent: repeated readings of its heartbeat found the same one.

    Args:
        heartbeats: The files.
    """

    def __init__(self, heartbeats: Heartbeats) -> None:
        self._heartbeats = heartbeats
        self.latest: dict[int, Heartbeat | None] = {}
        self.silent_s: dict[int, float] = {}

    def observe(self, elapsed_s: float) -> None:
        """Read all peers.

        Args:
            elapsed_s: Time since the previous call.
        """
        for rank in self._heartbeats.peers:
            try:
                heartbeat = self._heartbeats.read(rank)
            except OSError:
                self.latest.pop(rank, None)
                self.silent_s.pop(rank, None)
                continue
            is_same = rank in self.latest and heartbeat == self.latest[rank]
            self.silent_s[rank] = self.silent_s[rank] + elapsed_s if is_same else 0.0
            self.latest[rank] = heartbeat

    def forget(self) -> None:
        """Begin anew: what was observed so far no longer says anything."""
        self.latest.clear()
        self.silent_s.clear()

    def silent(self, for_s: float) -> list[int]:
        """Ranks silent for that long, other than those that are done."""
        return [
            rank
            for rank, heartbeat in self.latest.items()
            if self.silent_s[rank] >= for_s and (heartbeat is None or heartbeat.section != DONE)
        ]

    def describe_silent(self, rank: int) -> str:
        """One clause about a rank from which nothing is heard."""
        heartbeat, silent_s = self.latest[rank], self.silent_s[rank]
        if heartbeat is None:
            return f"rank {rank} has never shown a sign of life, for {silent_s:.0f} s"
        state = heartbeat.process_state()
        if heartbeat.last_words is not None:
            fate = heartbeat.last_words
        elif state == "gone":
            fate = "is gone: its process no longer exists"
        else:
            why = {
                "stopped": "it is stopped (SIGSTOP)",
                "running": "it hangs where its watchdog cannot run (in a C call, or on the file system)",
                "unknown": "it is stopped or its node is lost",
            }[state]
            since = f" for {silent_s:.0f} s" if silent_s >= 1 else ""
            fate = f"has shown no sign of life{since}: {why}"
        return f"{heartbeat.who}, last in {heartbeat.where}, {fate}"

    def describe_all(self, silent_from_s: float) -> str:
        """What the peers do, those that are furthest behind first; equal ones together."""
        groups: dict[tuple[int, str], list[int]] = {}
        for rank, heartbeat in self.latest.items():
            global_step = -1 if heartbeat is None else heartbeat.global_step
            groups.setdefault((global_step, self._describe(rank, silent_from_s)), []).append(rank)
        texts = [f"{_rank_ranges(ranks)} {text}" for (_, text), ranks in sorted(groups.items())]
        return join_some(texts) or "no other rank can be seen"

    def _describe(self, rank: int, silent_from_s: float) -> str:
        heartbeat = self.latest[rank]
        if heartbeat is None:
            return "without a sign of life"
        if heartbeat.section == DONE:
            return DONE
        if heartbeat.last_words is not None:
            return f"last in {heartbeat.where}, {heartbeat.last_words.partition(':')[0]}"
        if self.silent_s[rank] >= silent_from_s:
            return f"last in {heartbeat.where}, silent for {self.silent_s[rank]:.0f} s"
        return f"in {heartbeat.where} for {heartbeat.section_s:.0f} s"


def join_some(texts: list[str], most: int = 4) -> str:
    """At most `most` clauses in one line: with hundreds of ranks a message must stay one."""
    rest = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return "; ".join([*texts[:most], *rest])


def _rank_ranges(ranks: list[int]) -> str:
    """Ascending ranks as people write them: rank 3, ranks 0-2, 7."""
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and rank == ranges[-1][-1] + 1:
            ranges[-1][1:] = [rank]
        else:
            ranges.append([rank])
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join("-".join(map(str, part)) for part in ranges)


def _process_stat(process: int) -> tuple[str, str]:
    """State letter of a process, and its start in clock ticks since the host's boot.

    Not psutil's `create_time`: it adds the time of boot, which two processes may compute differently after the
    host's clock was set.

    Raises:
        OSError: There is no such process.
    """
    # The name of the program comes before, in parentheses, and may itself contain spaces and parentheses.
    values = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return values[0], values[19]


def _process_table() -> str:
    """Names the set of processes that a process id belongs to: this boot of this host, and the container.

    Empty where that cannot be found out. The host's name does not do: two containers may share it.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""

"""A run that hangs ends: with the stacks of the rank that waits, and the name of the rank it waits for.

Without this a rank that stops, or a node that is lost, leaves the others in a collective until its timeout, often
without a word about who was missing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from jmvae_dist.errors import EXIT_FAILURE
from jmvae_dist.training.heartbeat import DONE, Heartbeats, PeerWatch, join_some

STEP_TIMEOUT_SETTING = "training.watchdog.step_timeout_s"
PEER_TIMEOUT_SETTING = "training.watchdog.peer_timeout_s"

# The first time of a section is longer: kernels are compiled, workers started, connections made.
_FIRST_TIME_FACTOR = 5.0
# More than this many intervals between two looks at the clock means that this process itself did not run.
_LATE_INTERVALS = 3
# Ranks that get from section to section faster than this do not read each other's files at all.
_WAITING_INTERVALS = 2
_SCANS_PER_TIMEOUT = 20
_JOIN_S = 0.1
_POLL_S = 0.2
# A process that is to end does so after this long at the latest, whatever hangs on its way.
_ENDING_S = 10.0
_MOST_GRACE_S = 5.0
_LAST_WORDS_CHARACTERS = 300


class _Section(NamedTuple):
    name: str
    global_step: int
    limit_s: float | None


class Watchdog:
    """A thread that shows the others that this process lives, and ends it when it waits in vain.

    It ends the process (exit code 1) in two cases:

    - A section of the main thread lasts longer than its limit.
    - For `peer_timeout_s` neither some peer's heartbeat nor this rank's own section has changed. As long as this
      rank gets from section to section its peers evidently take part, whatever their files say.

    Time in which this process did not run itself (a suspended job, a file system that answers late) counts for
    neither. Nothing is said against a peer while this rank cannot write its own heartbeats.

    Args:
        run_dir: The run directory, on a file system that all ranks share; `heartbeats/` and `logs/` are made there.
        rank: This process.
        world_size: Number of processes.
        attempt: Identity of this start of the run: a random string of rank 0's, equal on all ranks.
        step_timeout_s: Longest duration of a section that has a limit, five times as long when the section is
            entered for the first time; None: no limit.
        peer_timeout_s: Longest silence of a peer; at least five intervals. None: peers are not watched.
        interval_s: Time between two heartbeats.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        world_size: int,
        attempt: str,
        step_timeout_s: float | None,
        peer_timeout_s: float | None,
        interval_s: float = 1.0,
    ) -> None:
        assert peer_timeout_s is None or peer_timeout_s >= 5 * interval_s
        self._rank = rank
        self._step_timeout_s = step_timeout_s
        self._peer_timeout_s = peer_timeout_s
        self._interval_s = interval_s
        self._scan_interval_s = max(interval_s, (peer_timeout_s or 0.0) / _SCANS_PER_TIMEOUT)
        run_dir = run_dir.absolute()
        self._stacks_path = run_dir / "logs" / f"stacks-rank-{rank:05d}.txt"
        self._heartbeats = Heartbeats(run_dir / "heartbeats", attempt, rank, world_size)
        # Replaced as a whole by the main thread, so that the watching thread never sees half of a change.
        self._section = _Section("starting", 0, None)
        self._entered_before: set[str] = set()
        # From here on: of the watching thread only.
        self._watched = self._section
        self._section_s = 0.0
        self._peers = PeerWatch(self._heartbeats)
        self._since_scan_s = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            return  # The file system does not answer: this process must not begin to wait for it as well.
        if kind is None:
            self._heartbeats.write(self._section.global_step, DONE, 0.0)
        else:
            why = " ".join(f"failed with {kind.__name__}: {error}".split())
            self._write_last_words(self._section, why)

    def enter(self, section: str, global_step: int, *, has_limit: bool = True) -> None:
        """Say what the main thread does from now on; cheap enough for every step.

        Entering the same section again says that it makes progress: its duration counts anew.

        Args:
            section: A name for messages, like "step" or "waiting for data".
            global_step: The step that it belongs to.
            has_limit: Whether `step_timeout_s` applies; peers are watched in every section.
        """
        limit_s = self._step_timeout_s if has_limit else None
        if limit_s is not None and section not in self._entered_before:
            self._entered_before.add(section)
            limit_s *= _FIRST_TIME_FACTOR
        self._section = _Section(section, global_step, limit_s)

    def describe_lost_peers(self, timeout_s: float = 3.0) -> str | None:
        """Who is missing, after a collective has failed; called by the main thread.

        Ranks in the same process table are judged by their process, others by a heartbeat that stands still. That
        takes all of `timeout_s`, and cannot be told at all if that is less than three intervals.

        Args:
            timeout_s: Longest time to wait for certainty.

        Returns:
            A sentence that names the ranks that are gone or stopped, or None if everyone seems alive.
        """
        # The wait for certainty must not use up what is left of the section's limit.
        self._section = self._section._replace(limit_s=None)
        peers = PeerWatch(self._heartbeats)
        start_s = previous_s = time.monotonic()
        lost: list[int] = []
        while True:
            now_s = time.monotonic()
            peers.observe(now_s - previous_s)
            previous_s = now_s
            # Once more after the first is found: the ranks of a node do not die at the same instant.
            is_settled, lost = bool(lost), _certainly_lost(peers)
            if is_settled or now_s - start_s >= timeout_s:
                break
            time.sleep(_POLL_S)
        if not lost and not self._heartbeats.is_failing:
            silent = peers.silent(max(2.5 * self._interval_s, timeout_s / 2))
            lost = [rank for rank in silent if _state(peers, rank) == "unknown"]
        return join_some([peers.describe_silent(rank) for rank in lost]) or None

    def _watch(self) -> None:
        elapsed_s, previous_s = 0.0, time.monotonic()
        while True:
            self._tick(elapsed_s)
            if self._stopping.wait(self._interval_s):
                return
            now_s = time.monotonic()
            elapsed_s = min(now_s - previous_s, _LATE_INTERVALS * self._interval_s)
            previous_s = now_s

    def _tick(self, elapsed_s: float) -> None:
        """Show a sign of life, and judge.

        Args:
            elapsed_s: Time since the previous call in which this process ran.
        """
        section = self._section
        if section is self._watched:
            self._section_s += elapsed_s
        else:
            self._watched, self._section_s = section, 0.0
            self._peers.forget()
        self._heartbeats.write(section.global_step, section.name, self._section_s)
        if section.limit_s is not None and self._section_s > section.limit_s:
            self._end_slow(section, section.limit_s)
        if self._peer_timeout_s is not None and self._heartbeats.peers:
            self._since_scan_s += elapsed_s
            self._watch_peers(section, self._peer_timeout_s)

    def _watch_peers(self, section: _Section, timeout_s: float) -> None:
        if self._heartbeats.is_failing:
            self._peers.forget()
            return
        if self._section_s < _WAITING_INTERVALS * self._interval_s:
            return
        if self._since_scan_s < self._scan_interval_s:
            return
        self._scan_peers()
        silent = self._peers.silent(timeout_s)
        if silent:
            self._end_silent(section, silent)

    def _scan_peers(self) -> None:
        self._peers.observe(self._since_scan_s)
        self._since_scan_s = 0.0

    def _end_slow(self, section: _Section, limit_s: float) -> None:
        """End the process because of its own section."""
        self._scan_peers()
        more = "" if limit_s == self._step_timeout_s else f" x {_FIRST_TIME_FACTOR:g} for the first one"
        why = (
            f'"{section.name}" of global step {section.global_step} has lasted {self._section_s:.0f} s; '
            f"the limit is {limit_s:.0f} s ({STEP_TIMEOUT_SETTING}{more})"
        )
        others = ""
        if self._heartbeats.peers:
            others = f"meanwhile {self._peers.describe_all(silent_from_s=3 * self._scan_interval_s)}"
        self._end(section, why, others)

    def _end_silent(self, section: _Section, silent: list[int]) -> None:
        """End the process because of peers that it waits for."""
        names = join_some([self._peers.describe_silent(rank) for rank in silent])
        self._end(section, f"{names} (limit: {PEER_TIMEOUT_SETTING})", "")

    def _end(self, section: _Section, why: str, others: str) -> None:
        """End the process, unless the main thread has gone on in the last moment."""
        if self._stopping.is_set() or self._section is not section:
            return
        try:
            with contextlib.suppress(OSError, RuntimeError):  # no file descriptor or thread left for it
                # The file system, or whoever reads our standard error, may hang as well: end in any case.
                faulthandler.dump_traceback_later(_ENDING_S, exit=True, file=os.open(os.devnull, os.O_WRONLY))
            stacks = self._dump_stacks(section)
            self._write_last_words(section, f"ended by its watchdog: {why}")
            lines = [f"watchdog: {why}; exit code {EXIT_FAILURE}", "; ".join(filter(None, (others, stacks)))]
            # Not through `sys.stderr`, whose lock the main thread may hold for good.
            with contextlib.suppress(OSError):
                os.write(2, "".join(f"[rank {self._rank}] {line}\n" for line in lines).encode())
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            # The end of the first rank breaks the connections of the others: let them find out, and write down
            # their own stacks, before. The rank that all wait for may be among them.
            time.sleep(min(2 * self._scan_interval_s, _MOST_GRACE_S))
        finally:
            os._exit(EXIT_FAILURE)

    def _dump_stacks(self, section: _Section) -> str:
        """Append what every thread does to the file for it, or to standard error; returns where it is."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        header = f'==== {now} rank {self._rank} in "{section.name}" of global step {section.global_step}'
        try:
            self._stacks_path.parent.mkdir(parents=True, exist_ok=True)
            with self._stacks_path.open("a", encoding="utf-8") as file:
                file.write(f"{header} for {self._section_s:.0f} s ====\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            faulthandler.dump_traceback(2, all_threads=True)
            return f"stacks of all threads: above, as {self._stacks_path} cannot be written ({error.strerror})"
        return f"stacks of all threads: {self._stacks_path}"

    def _write_last_words(self, section: _Section, last_words: str) -> None:
        shortened = last_words[:_LAST_WORDS_CHARACTERS]
        self._heartbeats.write(section.global_step, section.name, self._section_s, shortened)


def _certainly_lost(peers: PeerWatch) -> list[int]:
    """Ranks that are stopped or gone without a word; if there are none, those that said why they left."""
    silent, spoken = [], []
    for rank, heartbeat in peers.latest.items():
        if heartbeat is None or heartbeat.section == DONE:
            continue
        if heartbeat.last_words is not None:
            spoken.append(rank)
        elif heartbeat.process_state() in ("gone", "stopped"):
            silent.append(rank)
    # Who could still say why it left probably did so because of one that could not.
    return silent or spoken


def _state(peers: PeerWatch, rank: int) -> str:
    heartbeat = peers.latest[rank]
    return "unknown" if heartbeat is None else heartbeat.process_state()

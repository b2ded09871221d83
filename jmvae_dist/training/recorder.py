"""Where rank 0 sends what a run says about itself: the record, W&B, and the screen."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from jmvae_dist.config_io import to_plain
from jmvae_dist.errors import TrainingError
from jmvae_dist.tracking.console import Console
from jmvae_dist.tracking.jsonl import EVALUATED_BY, MetricsLog, read_records
from jmvae_dist.tracking.wandb import WandbTracker
from jmvae_dist.training.guards import RewindRequested
from jmvae_dist.training.setup import ResolvedRun

logger = logging.getLogger(__name__)


class Recorder:
    """All sinks of a run on rank 0; on other ranks it holds none and every method returns at once.

    Args:
        run: The resolved run.
        is_main: Whether this is rank 0.
        resume_step: Global step that the run continues from; 0 starts over.
        wandb_run_id: The run's identity at W&B from the checkpoint, if there is one.
    """

    def __init__(self, run: ResolvedRun, *, is_main: bool, resume_step: int, wandb_run_id: str | None) -> None:
        self._log: MetricsLog | None = None
        if not is_main:
            return
        path = run.output_dir / "metrics.jsonl"
        if resume_step == 0:
            _set_aside(path)
        self._log = MetricsLog(path, resume_step or None)
        self._console = Console(run.total_steps, resume_step)
        self._wandb = WandbTracker(
            run.config.tracking.wandb,
            run_dir=run.output_dir,
            run_id=wandb_run_id,
            config=to_plain(run.config),
            resume_step=resume_step or None,
            run_name=run.output_dir.resolve().name,
        )
        self._summary: dict[str, Any] = {}

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log is not None:
            self._log.close()
            has_failed = kind is not None and kind is not RewindRequested
            self._wandb.finish(self._summary, exit_code=1 if has_failed else 0)

    @property
    def wandb_run_id(self) -> str | None:
        """The run's identity at W&B, to be kept in checkpoints; None on other ranks, which write no manifest."""
        return None if self._log is None else self._wandb.run_id

    @contextlib.contextmanager
    def progress_shown(self) -> Iterator[None]:
        """While steps are taken: a progress bar on a terminal, lines elsewhere."""
        if self._log is None:
            yield
            return
        with self._console:
            _BarHandler.console = self._console
            try:
                yield
            finally:
                _BarHandler.console = None

    def record(self, values: dict[str, Any]) -> None:
        """Append one record to `metrics.jsonl` and show it everywhere else.

        Raises:
            TrainingError: The record cannot be written; training on without it would lose what it learned.
        """
        if self._log is not None:
            try:
                self._log.write(values)
            except OSError as error:
                raise TrainingError(f"{self._log.path}: cannot be written ({error.strerror})") from error
            self._wandb.log(values)
            self._console.update(values)
            self._summary.update(values)

    def advance(self, global_step: int) -> None:
        """Move the progress bar."""
        if self._log is not None:
            self._console.advance(global_step)

    def start_pace(self) -> None:
        """See `Console.start_pace`."""
        if self._log is not None:
            self._console.start_pace()

    def figures(self, global_step: int, paths: dict[str, Path]) -> None:
        """Send pictures to W&B."""
        if self._log is not None and paths:
            self._wandb.log_figures(global_step, paths)

    def sync(self) -> None:
        """Make the record durable, before a checkpoint that relies on it is committed."""
        if self._log is not None:
            self._log.sync()

    def recorded_evaluation(self, global_step: int, joint_nll_samples: int | None = None) -> dict[str, Any] | None:
        """The training's own evaluation at `global_step`, if an earlier attempt got as far as writing it.

        Args:
            global_step: Of the evaluation.
            joint_nll_samples: With this K, 0 being without likelihood; None: with any.
        """
        if self._log is None:
            return None
        for record in reversed(read_records(self._log.path)):
            is_own = record["global_step"] == global_step and record.get(EVALUATED_BY) == "train"
            if is_own and joint_nll_samples in (None, record.get("eval/joint_nll_samples", 0)):
                return record
        return None


def _set_aside(path: Path) -> None:
    """Keep the records of an attempt that starts over: it left no checkpoint, but perhaps something to learn."""
    if path.exists() and path.stat().st_size > 0:
        kept = path.with_name(f"{path.stem}.{time.strftime('%Y%m%d-%H%M%S')}{path.suffix}")
        os.replace(path, kept)
        logger.warning("no checkpoint to continue from: the run starts over; its former records are in %s", kept)


class _BarHandler(logging.Handler):
    """Log lines above the progress bar instead of through it."""

    console: Console | None = None

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if _BarHandler.console is not None:
            _BarHandler.console.message(text)
        else:
            print(text, file=sys.stderr, flush=True)


def configure_logging(rank: int) -> None:
    """Information from rank 0, warnings from every rank with its number."""
    handler = _BarHandler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    package = logging.getLogger("jmvae_dist")
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(logging.INFO if rank == 0 else logging.WARNING)

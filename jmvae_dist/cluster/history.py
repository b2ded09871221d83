"""What a run directory tells about the run so far: how far it is, how fast it was, how long a checkpoint took."""

from __future__ import annotations

import json
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jmvae_dist.cluster.attempts import newest_step
from jmvae_dist.tracking.jsonl import readable_records
from jmvae_dist.tracking.ledger import RunSummary, read_attempts, summarize

_SPEED_RECORDS = 20


@dataclass(frozen=True)
class History:
    """The past of a run; everything is None, or zero, for one that has none.

    Attributes:
        checkpoint_step: Step that it would resume from.
        step: Newest step that is known, from record or checkpoint.
        total_steps: Length of the run, as of its last start.
        samples_per_step: Global batch size.
        samples_per_s: Median of the last records.
        world_size: Number of processes of its last start.
        save_s: How long the newest checkpoint took, from its begin to its commit.
        ledger: Where its time went.
    """

    checkpoint_step: int
    step: int
    total_steps: int | None
    samples_per_step: int | None
    samples_per_s: float | None
    world_size: int | None
    save_s: float | None
    ledger: RunSummary

    @property
    def remaining_steps(self) -> int | None:
        """Steps from the newest one to the end."""
        return None if self.total_steps is None else max(0, self.total_steps - self.step)

    @property
    def remaining_s(self) -> float | None:
        """Seconds that these steps take at the last speed, without start-up, evaluations and checkpoints."""
        if self.remaining_steps is None or self.samples_per_step is None or not self.samples_per_s:
            return None
        return self.remaining_steps * self.samples_per_step / self.samples_per_s


def read_history(run_dir: Path) -> History:
    """What is known about the run in `run_dir`, which need not exist."""
    everything = readable_records(run_dir / "metrics.jsonl")
    records = deque((record for record in everything if "samples_seen" in record), maxlen=_SPEED_RECORDS)
    speeds = [record["speed/samples_per_s"] for record in records if record.get("speed/samples_per_s")]
    last = records[-1] if records else None
    ledger = summarize(read_attempts(run_dir))
    steps = _read_json(run_dir / "schedule.json").get("global_step")
    world_size = _read_json(run_dir / "environment.json").get("world_size")
    checkpoint_step = max(0, newest_step(run_dir))
    return History(
        checkpoint_step=checkpoint_step,
        step=max(checkpoint_step, last["global_step"]) if last else checkpoint_step,
        total_steps=steps[-1] if isinstance(steps, list) and steps and isinstance(steps[-1], int) else None,
        samples_per_step=None if not last or not last["global_step"] else last["samples_seen"] // last["global_step"],
        samples_per_s=statistics.median(speeds) if speeds else None,
        world_size=world_size if isinstance(world_size, int) else None,
        save_s=ledger.checkpoint_save_s,
        ledger=ledger,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """A file that training wrote; empty if it is not there or not readable."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}

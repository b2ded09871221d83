"""The program with every training step noted: which samples it was given, told by their bytes.

Run in place of `python -m jmvae_dist` by the tests of this folder. Each rank appends one line a step to
`AUDIT_DIR/rank-*.jsonl`, that of an array's task to `AUDIT_DIR/task-N/rank-*.jsonl`. So that a test has time to act,
`AUDIT_DIR/pace` holds seconds to sleep after each step, and `AUDIT_DIR/evaluation-pace` before an evaluation.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from jmvae_dist.__main__ import main


def note_steps(folder: Path) -> None:
    """Make every training step of this process write down its samples, and take its time."""
    from jmvae_dist.training.step import TrainStep

    take = TrainStep.__call__
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    notes = folder if task is None else folder / f"task-{task}"
    notes.mkdir(exist_ok=True)

    def take_and_note(self: TrainStep, batch: Any, **options: Any) -> Any:
        result = take(self, batch, **options)
        values = [batch.inputs[name].numpy() for name in sorted(batch.inputs)]
        samples = [zlib.crc32(b"".join(array[row].tobytes() for array in values)) for row in range(len(batch.rows))]
        entry = {"step": batch.global_step, "rows": batch.rows.tolist(), "samples": samples}
        with (notes / f"rank-{os.environ['SLURM_PROCID']}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        time.sleep(float((folder / "pace").read_text()))
        return result

    TrainStep.__call__ = take_and_note  # type: ignore[method-assign]


if __name__ == "__main__":
    if sys.argv[1] == "train":
        note_steps(Path(os.environ["AUDIT_DIR"]))
    elif sys.argv[1] == "evaluate" and (pace := Path(os.environ["AUDIT_DIR"], "evaluation-pace")).exists():
        time.sleep(float(pace.read_text()))
    sys.exit(main())

"""Where results of `jmvae-dist evaluate` go: a table, `--out`, figures, and the run's record, W&B and report.

A run takes only what is about its own held-out data (`evaluate_task.Place`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jmvae_dist.errors import LaunchError

if TYPE_CHECKING:
    from jmvae_dist.commands.evaluate_task import Task
    from jmvae_dist.distributed.runtime import Runtime


def show_results(result: dict[str, Any], modalities: Sequence[str], out: Path | None) -> None:
    """Print a table of the result, and write all of it as JSON to `out` if that is given."""
    from jmvae_dist.evaluation.table import format_results
    from jmvae_dist.training.state import write_json

    # Before it is printed: a closed pipe or an odd encoding of the terminal must not cost it.
    if out is not None:
        write_json(out, result)
    print(f"step {result['global_step']}, {result['num_samples']:,} samples of {result['manifest']}")
    print(format_results(result["metrics"], modalities))
    if any("_effective_samples" in key for key in result["metrics"]):
        where = "the JSON of --out FILE.json" if out is None else out
        print(f"± is the standard error over the samples; Monte Carlo errors and effective draws are in {where}")
    for name, reason in result["skipped"].items():
        print(f"left out: {name} {reason}")
    unreliable = max(
        (value for key, value in result["metrics"].items() if "_unreliable_fraction" in key), default=0.0
    )
    if unreliable > 0:
        print(
            f"up to {100 * unreliable:.1f} % of the samples have likelihoods that few draws carry "
            "(*_unreliable_fraction in the JSON): raise --joint-nll-samples, or do not rely on them"
        )
    sys.stdout.flush()


def keep_in_run(options: argparse.Namespace, task: Task, runtime: Runtime, result: dict[str, Any]) -> None:
    """Draw, and add the results to the run's record, to W&B and to its report, if they are about its own data.

    Raises:
        Exception: Whatever went wrong with the figures; the results are logged all the same.
    """
    from jmvae_dist.training.state import locked_run_directory

    collectives, place, reason = runtime.collectives, task.place, task.place.why_not_logged
    figures: dict[str, Path] = {}
    failure: Exception | None = None
    with ExitStack() as stack:
        if not reason:
            assert place.run_dir is not None
            try:
                stack.enter_context(locked_run_directory(place.run_dir, runtime, "adding an evaluation to"))
            except LaunchError as error:
                reason = str(error)
        if reason and runtime.is_main and place.run_dir is not None and not options.no_log:
            print(f"not logged to {place.run_dir}: {reason}", file=sys.stderr)
        if place.figures is not None and not (reason and place.draws_into_run):
            try:
                with collectives.together():
                    figures = _draw(options, task, place.figures) if runtime.is_main else {}
            except Exception as error:  # whatever a plotting library objects to must not cost the results
                failure = error
        if not reason:
            collectives.on_main(lambda: _append(task, result, figures))
    if failure is not None:
        raise failure


def _draw(options: argparse.Namespace, task: Task, folder: Path) -> dict[str, Path]:
    from jmvae_dist.evaluation.runner import save_figures
    from jmvae_dist.tracking.jsonl import readable_records

    run_dir = task.place.run_dir
    return save_figures(
        task.model,
        task.data.manifest,
        task.data.views,
        folder,
        num_samples=10,
        seed=options.seed,
        label=task.data.label,
        class_names=task.class_names,
        access=task.data.access,
        records=() if run_dir is None else readable_records(run_dir / "metrics.jsonl"),
    )


def _append(task: Task, result: dict[str, Any], figures: dict[str, Path]) -> None:
    from jmvae_dist.config import WandbSection
    from jmvae_dist.tracking.jsonl import (
        EVALUATED_BY,
        EVERY_RECORD,
        MetricsLog,
        last_recorded_step,
        newest_values,
        readable_records,
    )
    from jmvae_dist.tracking.wandb import WandbTracker
    from jmvae_dist.training.state import write_json

    run_dir = task.place.run_dir
    assert run_dir is not None
    (run_dir / "evaluation").mkdir(exist_ok=True)
    write_json(run_dir / "evaluation" / "latest.json", result)
    path, run_id = run_dir / "metrics.jsonl", task.described.tracking.get("wandb_run_id")
    record = {"global_step": task.described.global_step, EVALUATED_BY: "evaluate", **result["metrics"]}
    last_step = max(last_recorded_step(path), task.described.global_step)
    with MetricsLog(path, EVERY_RECORD) as log:
        tracker = None
        if run_id is not None:
            tracker = WandbTracker(
                WandbSection(**task.described.config["tracking"]["wandb"]),
                run_dir=run_dir,
                run_id=run_id,
                config=task.described.config,
                resume_step=last_step,
                run_name=run_dir.resolve().name,
                message=lambda text: print(text, file=sys.stderr),
            )
        log.write(record)
        if tracker is not None:
            tracker.log(record)
            tracker.log_figures(last_step, figures)
            # W&B has just taken the values for the newest ones, which those of an older checkpoint are not.
            tracker.finish(newest_values(readable_records(path)))

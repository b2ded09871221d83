"""The training run: resume, take the remaining steps, evaluate, report."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from jmvae_dist.checkpoint.layout import CheckpointManifest
from jmvae_dist.checkpoint.manager import CheckpointManager
from jmvae_dist.config_io import to_plain
from jmvae_dist.data.class_names import class_names
from jmvae_dist.data.loader import decode_threads
from jmvae_dist.data.plan import check_same_order
from jmvae_dist.distributed.runtime import Runtime
from jmvae_dist.errors import (
    EXIT_DONE,
    EXIT_STOPPED,
    ConfigError,
    DataError,
    StopRequested,
    TrainingError,
    is_on_all_ranks,
    mark_on_all_ranks,
)
from jmvae_dist.evaluation.runner import evaluate_together, save_figures
from jmvae_dist.model import JMVAE
from jmvae_dist.progress import progress
from jmvae_dist.tracking.jsonl import EVALUATED_BY
from jmvae_dist.tracking.ledger import COMPLETE, STOPPED
from jmvae_dist.tracking.report import write_report
from jmvae_dist.training.assembly import make_engine, make_guard, open_batches
from jmvae_dist.training.goodput import AttemptLedger, advise_on_evaluation
from jmvae_dist.training.guards import GuardReading, RewindRequested
from jmvae_dist.training.meter import Meter
from jmvae_dist.training.micro_batches import settle_micro_batch
from jmvae_dist.training.profiler import StepProfiler
from jmvae_dist.training.recorder import Recorder
from jmvae_dist.training.requests import Requests
from jmvae_dist.training.setup import ResolvedRun, check_same_model, check_same_transforms, describe_changes
from jmvae_dist.training.signals import StopSignals
from jmvae_dist.training.state import describe_checkpoint, read_json, write_json, write_run_files
from jmvae_dist.training.step import StepResult, TrainStep
from jmvae_dist.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

# Seconds between the request to stop and the time limit, as the batch script has found them (slurm/common.sh).
_STOP_LEAD_VARIABLE = "JMVAE_DIST_STOP_LEAD_S"
# A save takes longer when all of a cluster's jobs are asked to stop at once, and the step before it takes time too.
_LEAD_PER_SAVE = 2.0


class Trainer:
    """One run, from its newest checkpoint to its last step.

    Args:
        run: The resolved run.
        runtime: Process group and engine.
        signals: Says when this process was asked to stop.
        watchdog: Is told what this process does, and ends it when that takes too long.
        ledger: Is told the same, and keeps account of the time.
    """

    def __init__(
        self, run: ResolvedRun, runtime: Runtime, signals: StopSignals, watchdog: Watchdog, ledger: AttemptLedger
    ) -> None:
        self.run = run = settle_micro_batch(run, runtime)
        self.runtime = runtime
        self.signals = signals
        self.watchdog = watchdog
        self.ledger = ledger
        self.global_step = 0
        self._started_s = time.monotonic()
        self._elapsed_before_s = 0.0
        self.model, self.engine = make_engine(run, runtime)
        self.guard = make_guard(run, runtime, self.engine)
        self.passed_over: list[list[int]] = []
        self._has_warned_of_lead = False
        self.checkpoints = CheckpointManager(
            run.output_dir / "checkpoints",
            run.config.checkpoint,
            self.engine,
            runtime.collectives,
            on_commit=self._checkpoint_committed,
        )
        self.requests = Requests(
            runtime.collectives, signals, run.config.checkpoint.every_s, run.output_dir / "CHECKPOINT"
        )

    def train(self) -> int:
        """Train to the last step, evaluate, report.

        Returns:
            0 when the run is complete, 75 when it was stopped on request with a checkpoint written.
        """
        resumed_from = self._resume()
        if self._is_complete():
            self.ledger.withdraw()
            logger.info("the run in %s is complete (%d steps)", self.run.output_dir, self.global_step)
            return EXIT_DONE
        self.runtime.collectives.on_main(lambda: write_run_files(self.run, self.runtime))
        if self.runtime.is_main:
            logger.info("running: %s", self.runtime.describe(self.engine))
        while True:
            try:
                return self._attempt(resumed_from)
            except RewindRequested as rewind:
                resumed_from = self._rewind(rewind)

    def _attempt(self, resumed_from: CheckpointManifest | None) -> int:
        """Go on from where the run stands."""
        collectives = self.runtime.collectives
        with collectives.together():
            recorder = self._open_recorder(resumed_from)
        with recorder as self.recorder:
            try:
                # Asked to stop during start-up: nothing is new since the last checkpoint.
                self._stop_if_asked()
                with self.recorder.progress_shown():
                    if resumed_from is not None:
                        self._evaluate_if_interrupted()
                    self._take_remaining_steps()
                self._evaluate_finally()
            except StopRequested:
                self.ledger.finish(STOPPED)
                logger.info("stopped on request after step %d; the same command continues", self.global_step)
                return EXIT_STOPPED
        self.ledger.finish(COMPLETE)
        if self.runtime.is_main:
            advice = advise_on_evaluation(self.ledger.seconds(), self.run.config.evaluation)
            if advice is not None:
                logger.info(advice)
            self._report()
        return EXIT_DONE

    def _take_remaining_steps(self) -> None:
        """Take the remaining steps.

        Raises:
            StopRequested: A stop was asked for; a checkpoint is written.
            RewindRequested: The loss has spiked.
            DataError: Some rank has no valid batch for the next step; a checkpoint is written.
        """
        config, total_steps = self.run.config, self.run.total_steps
        take_step = TrainStep(self.run, self.runtime, self.engine, self.guard)
        meter = Meter(config.training.global_batch_size)
        profiles = self.run.output_dir / "profiles"
        remaining = range(self.global_step, total_steps)
        with (
            closing(open_batches(self.run, self.runtime, self.model, remaining)) as batches,
            self.requests as requests,
            self.checkpoints,
            self._steps_watched(),
            StepProfiler(config.training.profile_steps, profiles, self.runtime, self._enter_profiling) as profiler,
        ):
            profiler.before_step(self.global_step)
            self._enter("waiting for data")
            meter.resume()
            for batch in batches:
                if not self.engine.is_settled:
                    self._enter("starting", has_limit=False)
                    take_step.rehearse(batch)
                    self.recorder.start_pace()
                    meter.resume()
                self._enter("step")
                meter.batch_arrived()
                is_recorded = self._is_recorded(self.global_step + 1)
                is_wanted = not self._is_passed_over(self.global_step)
                result = take_step(batch, is_wanted=is_wanted, is_recorded=is_recorded)
                self.global_step += 1
                meter.step_taken()
                self.ledger.step_taken(self.global_step)
                is_last = self.global_step == total_steps
                if is_recorded:
                    self._record(result, meter, batches.last_problem)
                if profiler.after_step(self.global_step):
                    self._enter("step")
                if not is_last and self._is_multiple_of(config.evaluation.every_steps):
                    self._evaluate_midway()
                agreed = requests.poll(failure=batches.failure is not None, is_writing=self.checkpoints.is_writing)
                if self.checkpoints.is_begun and not agreed.is_writing:
                    self._enter("checkpoint")
                    self.checkpoints.finish()
                is_due = is_last or self._is_multiple_of(config.checkpoint.every_steps)
                if is_due or agreed.checkpoint or agreed.stop or agreed.failure:
                    self._save_checkpoint(wait=is_last or agreed.stop or agreed.failure)
                    requests.checkpoint_begun()
                self.recorder.advance(self.global_step)
                profiler.before_step(self.global_step)
                self._enter("waiting for data")
                meter.resume()
                if agreed.stop and not is_last:
                    raise mark_on_all_ranks(StopRequested())
                if agreed.failure:
                    with self.runtime.collectives.together():
                        batches.raise_failure()

    def _enter(self, phase: str, *, has_limit: bool = True) -> None:
        """Say what is done from now on: to the watchdog, for how long, and to the ledger, for the account."""
        self.watchdog.enter(phase, self.global_step, has_limit=has_limit)
        self.ledger.enter(phase, self.global_step)

    def _enter_profiling(self) -> None:
        self._enter("profiling", has_limit=False)

    @contextmanager
    def _steps_watched(self) -> Iterator[None]:
        """While steps are taken; what comes after them, like the end of W&B and the report, has no limit."""
        try:
            yield
        finally:
            error = sys.exception()
            # A rank that fails alone was last seen where it failed.
            if error is None or is_on_all_ranks(error):
                self._enter("finishing", has_limit=False)

    def _resume(self, at_most: int | None = None) -> CheckpointManifest | None:
        """Continue from the newest intact checkpoint, if there is one; of those up to step `at_most`, if given."""
        started_s = time.monotonic()
        manifest = self.checkpoints.resume(self._check_same_run, at_most)
        if manifest is None:
            return None
        self.global_step = manifest.global_step
        self.ledger.resumed(self.global_step)
        self._elapsed_before_s = manifest.elapsed_s
        self._started_s = time.monotonic()
        self.guard.load_state(manifest.guards)
        self.passed_over = manifest.passed_over
        logger.info(
            "resumed from the checkpoint at step %d of %d, verified and read in %.2f s",
            *(self.global_step, self.run.total_steps, time.monotonic() - started_s),
        )
        return manifest

    def _check_same_run(self, manifest: CheckpointManifest) -> None:
        """Refuse to continue a checkpoint as another run; say which settings changed otherwise."""
        current = self.run.plan.state(manifest.global_step, self.run.train_manifest.fingerprint)
        try:
            check_same_order(manifest.data_state, current)
            check_same_transforms(manifest.modalities, self.run.describe_modalities())
        except ConfigError as error:
            if not self.run.config.data.allow_order_change:
                raise
            logger.warning("accepted by data.allow_order_change: %s", error)
        check_same_model(manifest.model, self.run.describe_model())
        changes = describe_changes(manifest.config, self._settings())
        if changes and self.runtime.is_main:
            logger.warning("settings changed since the checkpoint: %s", "; ".join(changes))
        if manifest.global_step > self.run.total_steps:
            raise ConfigError(
                f"training.steps: the run in {self.run.output_dir} has already taken {manifest.global_step} steps, "
                f"more than the {self.run.total_steps} asked for; ask for more, or choose a new output_dir"
            )

    def _settings(self) -> dict[str, Any]:
        """The run's settings as they took effect, where the last bits depend on it.

        From three ranks on, sums in shared memory and over the process group are in another order; which of them it
        is depends on the room in /dev/shm, and a resume that takes the other way has to be seen.
        """
        settings = to_plain(self.run.config)
        if self.run.config.training.engine == "ddp" and self.runtime.process.world_size > 2:
            way = "shared_memory" if self.engine.uses_shared_memory else "process_group"
            settings["training"]["gradient_reduction"] = way
        return settings

    def _rewind(self, rewind: RewindRequested) -> CheckpointManifest:
        """Go back to before a loss spike, and note which batches to pass over from there on."""
        passed_over = [*self.passed_over, [rewind.first_step, self.global_step]]
        spiked_after = self.global_step
        self._enter("going back", has_limit=False)
        manifest = self._resume(at_most=rewind.first_step)
        assert manifest is not None, "a rewind is asked for only if there is a checkpoint to go back to"
        self.passed_over = passed_over
        if self.runtime.is_main:
            logger.warning(
                "the loss spiked: back from step %d to the checkpoint at step %d; the batches of steps %d to %d are "
                "passed over (training.guards.spike_action)",
                *(spiked_after, self.global_step, rewind.first_step + 1, spiked_after),
            )
        return manifest

    def _is_passed_over(self, global_step: int) -> bool:
        return any(first <= global_step < stop for first, stop in self.passed_over)

    def _is_complete(self) -> bool:
        """Whether nothing is left to do; decided by rank 0."""
        complete = self.global_step == self.run.total_steps
        if complete and self.run.eval_manifest is not None:
            evaluation = read_json(self.run.output_dir / "evaluation.json")
            complete = isinstance(evaluation, dict) and evaluation.get("global_step") == self.global_step
        return self.runtime.collectives.broadcast(complete)

    def _open_recorder(self, resumed_from: CheckpointManifest | None) -> Recorder:
        run_id = resumed_from.tracking.get("wandb_run_id") if resumed_from else None
        return Recorder(self.run, is_main=self.runtime.is_main, resume_step=self.global_step, wandb_run_id=run_id)

    def _is_recorded(self, global_step: int) -> bool:
        return global_step == self.run.total_steps or global_step % self.run.config.training.log_every_steps == 0

    def _is_multiple_of(self, every_steps: int | None) -> bool:
        return every_steps is not None and self.global_step % every_steps == 0

    def _elapsed_s(self) -> float:
        """Seconds that the run has taken, over all its attempts up to the checkpoints they ended in."""
        return self._elapsed_before_s + time.monotonic() - self._started_s

    def _record(self, result: StepResult, meter: Meter, last_problem: str | None) -> None:
        """Record the step just taken."""
        means = result.means(self.runtime.collectives)
        assert result.grad_norm is not None
        guards = self.guard.read()
        stall_s = self.checkpoints.take_stall_s()
        # Schedules are those with which the step was taken, i.e. at the number of steps finished before it.
        step_taken = self.global_step - 1
        record = {
            "global_step": self.global_step,
            "samples_seen": self.run.plan.samples_seen(self.global_step),
            "epoch": self.run.plan.epoch(self.global_step),
            "time_s": self._elapsed_s(),
            **means,
            "schedule/annealing": self.run.annealing(step_taken),
            "schedule/learning_rate": self.run.learning_rate(step_taken),
            "grad_norm": float(result.grad_norm),
            "guards/skipped_steps": guards.skipped_steps,
            **({"guards/loss_scale": guards.loss_scale} if self.run.config.training.precision == "fp16" else {}),
            **({"data/masked_samples": guards.masked_samples} if self._masks_samples() else {}),
            **({} if stall_s is None else {"checkpoint/stall_s": stall_s}),
            **meter.read(),
            **self.ledger.metrics(),
        }
        self._write(record)
        self._heed_masked(guards, last_problem)
        self._heed(guards)

    def _masks_samples(self) -> bool:
        return self.run.config.data.on_bad_sample == "mask"

    def _heed_masked(self, guards: GuardReading, last_problem: str | None) -> None:
        """Act on the number of masked samples; it is equal on all ranks.

        Raises:
            DataError: There are too many; a checkpoint is written.
        """
        data = self.run.config.data
        if not self._masks_samples() or guards.masked_beyond <= data.bad_sample_burst:
            return
        self.guard.forgive_masked()
        self._save_checkpoint(wait=True)
        problems = [problem for problem in self.runtime.collectives.gather(last_problem) if problem is not None]
        error = DataError(
            f"step {self.global_step}: {guards.masked_samples} samples of the run were bad and masked, more than "
            f"data.bad_sample_burst ({data.bad_sample_burst}) beyond a fraction of {data.bad_sample_tolerance:g} "
            f"(data.bad_sample_tolerance); the last: {problems[0] if problems else 'before this start of the run'}"
        )
        raise mark_on_all_ranks(error)

    def _heed(self, guards: GuardReading) -> None:
        """Act on what the guards saw since the last record; it is equal on all ranks.

        Raises:
            TrainingError: Too many steps in a row were dropped.
            RewindRequested: The loss has spiked, and there is a checkpoint to go back to.
        """
        section = self.run.config.training.guards
        if guards.consecutive_skips > section.max_consecutive_skips:
            saved = self.checkpoints.last_saved_step
            error = TrainingError(
                f"step {self.global_step}: {guards.consecutive_skips} steps in a row were dropped, because their "
                "loss or gradient was not finite or their loss a spike; lower schedule.learning_rate.peak or set "
                "training.gradient_clip_norm (or raise training.guards.max_consecutive_skips), and continue from "
                f"{'the checkpoint at step ' + str(saved) if saved >= 0 else 'the beginning'}"
            )
            raise mark_on_all_ranks(error)
        if guards.spiked_at is None:
            return
        first_step = max(0, guards.spiked_at - section.rewind_skip_steps)
        if section.spike_action != "rewind" or not self._can_go_back_to(first_step):
            done = "the weights were updated" if section.spike_action == "warn" else "the update was dropped"
            why = "" if section.spike_action != "rewind" else "; no checkpoint is old enough to go back to"
            if self.runtime.is_main:
                logger.warning("step %d: the loss is a spike; %s%s", guards.spiked_at + 1, done, why)
            return
        if len(self.passed_over) >= section.max_rewinds:
            raise mark_on_all_ranks(
                TrainingError(
                    f"step {self.global_step}: the loss spiked again after {len(self.passed_over)} rewinds "
                    "(training.guards.max_rewinds); lower schedule.learning_rate.peak"
                )
            )
        raise mark_on_all_ranks(RewindRequested(first_step))

    def _can_go_back_to(self, global_step: int) -> bool:
        """Whether there is a checkpoint of this step or an earlier one."""
        self._enter("checkpoint", has_limit=False)
        # Before looking: once the checkpoint under way is committed, the oldest one may be deleted.
        self.checkpoints.finish()
        oldest = self.runtime.collectives.on_main(self.checkpoints.oldest_step)
        return oldest is not None and oldest <= global_step

    def _write(self, record: dict[str, Any]) -> None:
        """Write a record on rank 0; if that fails, all ranks stop."""
        with self.runtime.collectives.together():
            self.recorder.record(record)

    def _save_checkpoint(self, *, wait: bool) -> None:
        self.runtime.wait_for_device()
        self._enter("checkpoint", has_limit=False)
        with self.runtime.collectives.together():
            self.recorder.sync()
        self.checkpoints.save(
            lambda: describe_checkpoint(
                self.run,
                self.runtime,
                self.global_step,
                settings=self._settings(),
                wandb_run_id=self.recorder.wandb_run_id,
                elapsed_s=self._elapsed_s(),
                guards=self.guard.state(),
                passed_over=self.passed_over,
            ),
            wait=wait,
        )

    def _checkpoint_committed(self, global_step: int, save_s: float) -> None:
        """Keep account of a checkpoint; warn once if the scheduler would not leave the time for such a one."""
        self.ledger.checkpoint_committed(global_step, save_s)
        if self.runtime.is_main and not self._has_warned_of_lead and _is_lead_too_short(save_s):
            self._has_warned_of_lead = True
            logger.warning(
                "a checkpoint took %.0f s, but the scheduler asks for a stop only %s s before the time limit: "
                "submit with an earlier --signal=B:USR1@SECONDS",
                *(save_s, os.environ[_STOP_LEAD_VARIABLE]),
            )

    def _evaluate_midway(self) -> None:
        """Metrics and figures on held-out data, without the costly likelihood estimate.

        Raises:
            StopRequested: A stop was asked for; a checkpoint is written, and resuming begins with this evaluation.
        """
        if self.run.eval_manifest is None:
            return
        self.runtime.wait_for_device()
        try:
            metrics = self._evaluate(joint_nll_samples=0, advance=self._evaluation_advanced)
        except (DataError, StopRequested):
            self._save_checkpoint(wait=True)
            raise
        self._write({"global_step": self.global_step, EVALUATED_BY: "train", **metrics})
        self._draw_figures()

    def _evaluate_if_interrupted(self) -> None:
        """Make up for the evaluation in which the former attempt was asked to stop."""
        every_steps = self.run.config.evaluation.every_steps
        is_due = self._is_multiple_of(every_steps) and self.global_step < self.run.total_steps
        if not is_due or self.run.eval_manifest is None:
            return
        if self.runtime.collectives.on_main(lambda: self.recorder.recorded_evaluation(self.global_step)) is None:
            self._evaluate_midway()
            self._enter("starting", has_limit=False)

    def _stop_if_asked(self) -> None:
        """For what has no steps to finish; on all ranks if any was asked.

        Raises:
            StopRequested: A stop was asked for.
        """
        with self.runtime.collectives.together():
            self.signals.raise_if_received()

    def _evaluate_finally(self) -> None:
        """The evaluation that the report shows; its file marks the run as complete.

        Raises:
            StopRequested: A stop was asked for; the evaluation starts anew when the run is resumed.
        """
        if self.run.eval_manifest is None:
            return
        self._stop_if_asked()
        collectives = self.runtime.collectives
        samples = self.run.config.evaluation.joint_nll_samples
        record = collectives.on_main(lambda: self.recorder.recorded_evaluation(self.global_step, samples))
        if record is None:
            with self._evaluation_progress() as advance:
                metrics = self._evaluate(joint_nll_samples=samples, advance=advance)
            record = {"global_step": self.global_step, EVALUATED_BY: "train", **metrics}
            self._write(record)
        self._draw_figures()
        evaluation = {
            "global_step": self.global_step,
            "manifest": self.run.config.data.eval_manifest,
            "num_samples": int(record["eval/samples"]),
            "metrics": {key: value for key, value in record.items() if key.startswith("eval/")},
        }
        collectives.on_main(lambda: write_json(self.run.output_dir / "evaluation.json", evaluation))

    @contextmanager
    def _evaluation_progress(self) -> Iterator[Callable[[int], None]]:
        """A progress bar of rank 0's share, which is that of every rank, to one sample; any rank may stop."""
        assert self.run.eval_manifest is not None
        with ExitStack() as stack:
            show: Callable[[int], None] | None = None
            if self.runtime.is_main:
                share = self.run.eval_manifest.num_samples // self.runtime.process.world_size
                show = stack.enter_context(progress(share, "evaluating"))

            def advance(count: int) -> None:
                self._evaluation_advanced(count)
                if show is not None:
                    show(count)

            yield advance

    def _evaluation_advanced(self, count: int) -> None:
        """After each batch of an evaluation: show a sign of life, and heed a request to stop."""
        self.signals.raise_if_received()
        self._enter("evaluation", has_limit=False)

    def _evaluate(self, joint_nll_samples: int, advance: Callable[[int], None] | None = None) -> dict[str, float]:
        assert self.run.eval_manifest is not None
        self._enter("evaluation", has_limit=False)
        data = self.run.config.data
        with self.engine.evaluation_model() as model:
            assert isinstance(model, JMVAE)
            return evaluate_together(
                model,
                self.run.eval_manifest,
                self.run.eval_views,
                self.runtime.collectives,
                batch_size=self.run.config.evaluation.batch_size,
                seed=self.run.config.training.seed,
                joint_nll_samples=joint_nll_samples,
                verify=data.verify,
                threads=decode_threads(data.decode_threads, workers=0),
                on_bad_sample=data.on_bad_sample,
                access=self.run.remote_access,
                progress=advance,
            )

    def _draw_figures(self) -> None:
        assert self.run.eval_manifest is not None
        self._enter("figures", has_limit=False)
        with self.engine.evaluation_model() as model, self.runtime.collectives.together():
            assert isinstance(model, JMVAE)
            if not self.runtime.is_main:
                return
            try:
                paths = save_figures(
                    model,
                    self.run.eval_manifest,
                    self.run.eval_views,
                    self.run.output_dir / "figures",
                    num_samples=self.run.config.evaluation.figure_samples,
                    seed=self.run.config.training.seed,
                    class_names=class_names(self.run.describe_modalities(), self.run.eval_manifest),
                    verify=self.run.config.data.verify,
                    on_bad_sample=self.run.config.data.on_bad_sample,
                    access=self.run.remote_access,
                )
            except DataError:
                raise
            except Exception as error:  # whatever a plotting library objects to must not end a run
                logger.warning("the figures could not be drawn: %s: %s", type(error).__name__, error)
            else:
                self.recorder.figures(self.global_step, paths)

    def _report(self) -> None:
        try:
            logger.info("the run is complete; report: %s", write_report(self.run.output_dir))
        except ConfigError as error:
            logger.warning("the run is complete, but its report could not be written: %s", error)


def _is_lead_too_short(save_s: float) -> bool:
    """Whether a checkpoint like this one might not be complete when the time limit comes."""
    lead_s = os.environ.get(_STOP_LEAD_VARIABLE, "")
    return lead_s.isdigit() and _LEAD_PER_SAVE * save_s > int(lead_s)

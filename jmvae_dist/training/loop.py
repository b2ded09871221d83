"""The training run: resume, take the remaining steps, evaluate, report."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import torch
from torch import Tensor

from jmvae_dist.checkpoint.layout import CheckpointManifest
from jmvae_dist.checkpoint.manager import CheckpointManager
from jmvae_dist.data.loader import TrainLoader
from jmvae_dist.data.plan import check_same_order
from jmvae_dist.distributed.runtime import Runtime
from jmvae_dist.errors import ConfigError, TrainingError
from jmvae_dist.evaluation.runner import evaluate_together, save_figures
from jmvae_dist.model import JMVAE
from jmvae_dist.tracking.console import progress
from jmvae_dist.tracking.report import write_report
from jmvae_dist.training.meter import Meter
from jmvae_dist.training.recorder import Recorder
from jmvae_dist.training.setup import ResolvedRun
from jmvae_dist.training.signals import Requests, StopSignals
from jmvae_dist.training.state import describe_checkpoint, read_json, write_json, write_run_files
from jmvae_dist.training.step import TrainStep, make_optimizer

logger = logging.getLogger(__name__)

EXIT_DONE = 0
EXIT_STOPPED = 75


class Trainer:
    """One run, from its newest checkpoint to its last step.

    Args:
        run: The resolved run.
        runtime: Process group and engine.
    """

    def __init__(self, run: ResolvedRun, runtime: Runtime) -> None:
        self.run = run
        self.runtime = runtime
        self.global_step = 0
        self._started_s = time.monotonic()
        self._elapsed_before_s = 0.0
        # Equal initial weights on every rank and for every world size.
        torch.manual_seed(run.config.training.seed)
        self.model = JMVAE(run.model_config, networks=run.config.model.networks).to(runtime.device)
        self.optimizer = make_optimizer(self.model, run.config.optimizer, runtime.device)
        self.checkpoints = CheckpointManager(
            run.output_dir / "checkpoints",
            run.config.checkpoint,
            self.model,
            self.optimizer,
            runtime.collectives,
        )

    def train(self) -> int:
        """Train to the last step, evaluate, report.

        Returns:
            0 when the run is complete, 75 when it was stopped on request with a checkpoint written.
        """
        resumed_from = self._resume()
        if self._is_complete():
            logger.info("the run in %s is complete (%d steps)", self.run.output_dir, self.global_step)
            return EXIT_DONE
        self.runtime.collectives.on_main(lambda: write_run_files(self.run, self.runtime))
        with self._open_recorder(resumed_from) as self.recorder:
            with StopSignals() as signals, self.recorder.progress_shown():
                stopped = self._take_remaining_steps(signals)
            if stopped:
                logger.info("stopped on request after step %d; the same command continues", self.global_step)
                return EXIT_STOPPED
            self._evaluate_finally()
        if self.runtime.is_main:
            logger.info("the run is complete; report: %s", write_report(self.run.output_dir))
        return EXIT_DONE

    def _take_remaining_steps(self, signals: StopSignals) -> bool:
        """Take the remaining steps; returns whether a stop was requested before the last one."""
        config, total_steps = self.run.config, self.run.total_steps
        requests = Requests(self.runtime.collectives, signals, config.checkpoint.every_s)
        engine_model = self.runtime.prepare(self.model)
        take_step = TrainStep(self.run, self.runtime, engine_model, self.optimizer)
        meter = Meter(config.training.global_batch_size)
        stop = False
        with closing(self._loader().iterate(self.global_step, total_steps)) as batches:
            for batch in batches:
                meter.batch_arrived()
                sums, grad_norm = take_step(batch)
                self.global_step += 1
                meter.step_taken()
                is_last = self.global_step == total_steps
                if is_last or self._is_multiple_of(config.training.log_every_steps):
                    self._record(sums, grad_norm, meter)
                if not is_last and self._is_multiple_of(config.evaluation.every_steps):
                    self._evaluate_midway()
                stop, checkpoint = requests.poll()
                if is_last or stop or checkpoint or self._is_multiple_of(config.checkpoint.every_steps):
                    self._save_checkpoint(grad_norm)
                    requests.checkpoint_written()
                self.recorder.advance(self.global_step)
                meter.resume()
                if stop:
                    break
        requests.close()
        return stop and self.global_step < total_steps

    def _resume(self) -> CheckpointManifest | None:
        """Continue from the newest intact checkpoint, if there is one."""
        manifest = self.checkpoints.resume()
        if manifest is None:
            return None
        current = self.run.plan.state(manifest.global_step, self.run.train_manifest.fingerprint)
        try:
            check_same_order(manifest.data_state, current)
        except ConfigError as error:
            if not self.run.config.data.allow_order_change:
                raise
            logger.warning("accepted by data.allow_order_change: %s", error)
        if manifest.global_step > self.run.total_steps:
            raise ConfigError(
                f"training.steps: the run in {self.run.output_dir} has already taken {manifest.global_step} steps, "
                f"more than the {self.run.total_steps} asked for; ask for more, or choose a new output_dir"
            )
        self.global_step = manifest.global_step
        self._elapsed_before_s = manifest.elapsed_s
        logger.info("resumed from the checkpoint at step %d of %d", self.global_step, self.run.total_steps)
        return manifest

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

    def _loader(self) -> TrainLoader:
        process, data = self.runtime.process, self.run.config.data
        return TrainLoader(
            self.run.train_manifest,
            self.run.plan,
            rank=process.rank,
            world_size=process.world_size,
            modalities=list(self.run.modalities),
            workers=data.workers,
            verify=data.verify,
            pin_memory=self.runtime.device.type == "cuda",
        )

    def _is_multiple_of(self, every_steps: int | None) -> bool:
        return every_steps is not None and self.global_step % every_steps == 0

    def _elapsed_s(self) -> float:
        """Seconds that the run has taken, over all its attempts up to the checkpoints they ended in."""
        return self._elapsed_before_s + time.monotonic() - self._started_s

    def _record(self, sums: dict[str, Tensor], grad_norm: Tensor, meter: Meter) -> None:
        """Record the step just taken: means over the global batch, from all ranks' sums."""
        keys = list(sums)
        local = torch.stack([sums[key].double() for key in keys]).cpu()
        batch_size = self.run.config.training.global_batch_size
        means = (self.runtime.collectives.sum(local) / batch_size).tolist()
        values = dict(zip(keys, means, strict=True))
        self._require_finite(grad_norm, values["loss/total"])
        # Schedules are those with which the step was taken, i.e. at the number of steps finished before it.
        step_taken = self.global_step - 1
        record = {
            "global_step": self.global_step,
            "samples_seen": self.run.plan.samples_seen(self.global_step),
            "epoch": self.run.plan.epoch(self.global_step),
            "time_s": self._elapsed_s(),
            **values,
            "schedule/annealing": self.run.annealing(step_taken),
            "schedule/learning_rate": self.run.learning_rate(step_taken),
            "grad_norm": float(grad_norm),
            **meter.read(),
        }
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        """Write a record on rank 0; if that fails, all ranks stop."""
        with self.runtime.collectives.together():
            self.recorder.record(record)

    def _require_finite(self, grad_norm: Tensor, loss: float = 0.0) -> None:
        """Stop before NaNs reach a checkpoint; both values are equal on all ranks, so all stop together."""
        if not (math.isfinite(float(grad_norm)) and math.isfinite(loss)):
            saved = self.checkpoints.last_saved_step
            raise TrainingError(
                f"step {self.global_step}: loss {loss:g} and gradient norm {float(grad_norm):g} are not both finite; "
                f"lower schedule.learning_rate.peak or set training.gradient_clip_norm, and continue from "
                f"{'the checkpoint at step ' + str(saved) if saved >= 0 else 'the beginning'}"
            )

    def _save_checkpoint(self, grad_norm: Tensor) -> None:
        self._require_finite(grad_norm)
        self.recorder.sync()
        self.checkpoints.save(
            lambda: describe_checkpoint(
                self.run, self.runtime, self.global_step, self.recorder.wandb_run_id, self._elapsed_s()
            )
        )

    def _evaluate_midway(self) -> None:
        """Metrics and figures on held-out data, without the costly likelihood estimate."""
        if self.run.eval_manifest is None:
            return
        self._write({"global_step": self.global_step, **self._evaluate(joint_nll_samples=0)})
        self._draw_figures()

    def _evaluate_finally(self) -> None:
        """The evaluation that the report shows; its file marks the run as complete."""
        if self.run.eval_manifest is None:
            return
        collectives = self.runtime.collectives
        record = collectives.broadcast(self.recorder.recorded_evaluation(self.global_step))
        if record is None:
            samples = self.run.config.evaluation.joint_nll_samples
            with self._evaluation_progress() as advance:
                metrics = self._evaluate(joint_nll_samples=samples, advance=advance)
            record = {"global_step": self.global_step, **metrics}
            self._write(record)
        self._draw_figures()
        if self.runtime.is_main:
            evaluation = {
                "global_step": self.global_step,
                "manifest": self.run.config.data.eval_manifest,
                "num_samples": self.run.eval_manifest.num_samples,
                "metrics": {key: value for key, value in record.items() if key.startswith("eval/")},
            }
            write_json(self.run.output_dir / "evaluation.json", evaluation)

    def _evaluation_progress(self) -> AbstractContextManager[Callable[[int], None] | None]:
        """A progress bar of rank 0's share, which is that of every rank, to one sample."""
        assert self.run.eval_manifest is not None
        if not self.runtime.is_main:
            return nullcontext()
        return progress(self.run.eval_manifest.num_samples // self.runtime.process.world_size, "evaluating")

    def _evaluate(self, joint_nll_samples: int, advance: Callable[[int], None] | None = None) -> dict[str, float]:
        assert self.run.eval_manifest is not None
        return evaluate_together(
            self.model,
            self.run.eval_manifest,
            list(self.run.modalities),
            self.runtime.collectives,
            batch_size=self.run.config.evaluation.batch_size,
            seed=self.run.config.training.seed,
            joint_nll_samples=joint_nll_samples,
            progress=advance,
        )

    def _draw_figures(self) -> None:
        assert self.run.eval_manifest is not None
        with self.runtime.collectives.together():
            if self.runtime.is_main:
                paths = save_figures(
                    self.model,
                    self.run.eval_manifest,
                    list(self.run.modalities),
                    self.run.output_dir / "figures",
                    num_samples=self.run.config.evaluation.figure_samples,
                    seed=self.run.config.training.seed,
                )
                self.recorder.figures(self.global_step, paths)

"""What a user can set: one dataclass per section, validated when it is built (`config_io` reads and writes it).

The root, `RunConfig`, is here, and so are all sections but `data` (in `data_config`), `model` (`model_config`), its
`networks` (`networks_config`) and `training` (`training_config`). Every mistake raises a `ConfigError` with the key,
the value and what is allowed, before anything starts.
"""

from dataclasses import dataclass, field
from typing import Literal

from jmvae_dist.checks import is_finite, require
from jmvae_dist.data_config import DataSection
from jmvae_dist.errors import ConfigError
from jmvae_dist.model_config import ModelSection
from jmvae_dist.training_config import TrainingSection


@dataclass
class OptimizerSection:
    """AdamW (Loshchilov and Hutter 2019); its learning rate is `schedule.learning_rate`.

    Args:
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay, on weight matrices only (not on biases).
        fused: Use torch's fused kernel: one pass over the weights in place of a dozen.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    fused: bool = True

    def __post_init__(self) -> None:
        valid = all(0 <= beta < 1 for beta in self.betas)
        require(valid, "optimizer.betas", self.betas, "two numbers, each at least 0 and below 1")
        require(is_finite(self.eps) and self.eps > 0, "optimizer.eps", self.eps, "greater than 0")
        decay = self.weight_decay
        require(is_finite(decay) and decay >= 0, "optimizer.weight_decay", decay, "at least 0")


@dataclass
class AnnealingSection:
    """The weight of all KL terms as a function of the global step.

    Args:
        shape: linear or cosine growth from 0 to 1 during the warm-up; cyclical repeats a linear growth
            (Fu et al. 2019, with `cycles` over the run and `cycle_growth` of each spent growing); constant is 1.
        warmup_steps: Length of the warm-up in optimizer steps; overrides `model.warmup`, which counts epochs.
        cycles: Number of cycles of the cyclical shape.
        cycle_growth: Fraction of a cycle during which the factor grows; the rest stays at 1.
    """

    shape: Literal["linear", "cosine", "cyclical", "constant"] = "linear"
    warmup_steps: int | None = None
    cycles: int = 4
    cycle_growth: float = 0.5

    def __post_init__(self) -> None:
        if self.warmup_steps is not None:
            require(self.warmup_steps >= 0, "schedule.annealing.warmup_steps", self.warmup_steps, "at least 0")
        require(self.cycles >= 1, "schedule.annealing.cycles", self.cycles, "at least 1")
        growth = self.cycle_growth
        require(0 < growth <= 1, "schedule.annealing.cycle_growth", growth, "above 0 and at most 1")


@dataclass
class LearningRateSection:
    """The learning rate as a function of the global step.

    Args:
        peak: Learning rate after the warm-up.
        shape: constant, linear or cosine decay from the peak to `final_fraction * peak` at the last step.
        warmup_steps: Optimizer steps of linear growth up to the peak. Give at most one of the two warm-ups.
        warmup_epochs: The same in epochs, resolved into steps from the manifest.
        final_fraction: Learning rate at the last step, as a fraction of the peak.
    """

    peak: float = 1e-3
    shape: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int | None = None
    warmup_epochs: float | None = None
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        key = "schedule.learning_rate"
        require(is_finite(self.peak) and self.peak > 0, f"{key}.peak", self.peak, "greater than 0")
        if self.warmup_steps is not None and self.warmup_epochs is not None:
            raise ConfigError(f"{key}: give at most one of warmup_steps and warmup_epochs")
        for name in ("warmup_steps", "warmup_epochs"):
            value = getattr(self, name)
            if value is not None:
                require(is_finite(value) and value >= 0, f"{key}.{name}", value, "finite and at least 0")
        fraction = self.final_fraction
        require(0 <= fraction <= 1, f"{key}.final_fraction", fraction, "between 0 and 1")


@dataclass
class ScheduleSection:
    """Schedules, as pure functions of the global step.

    Args:
        annealing: Weight of the KL terms.
        learning_rate: Learning rate.
    """

    annealing: AnnealingSection = field(default_factory=AnnealingSection)
    learning_rate: LearningRateSection = field(default_factory=LearningRateSection)


@dataclass
class CheckpointSection:
    """When checkpoints are written and which ones are kept. The last step of a run always writes one.

    Args:
        every_steps: Optimizer steps between checkpoints; null: none by steps.
        every_s: Seconds between checkpoints; null: none by time.
        keep_last: Newest checkpoints that are kept; at least 2, because the newest may turn out damaged.
        keep_every_steps: Checkpoints at multiples of this step are kept for good.
        async_write: Go on training while a copy of the state, in host memory, is written and hashed. The last
            checkpoint of a run, and one before a stop, is always waited for.
    """

    every_steps: int | None = None
    every_s: float | None = 1800.0
    keep_last: int = 3
    keep_every_steps: int | None = None
    async_write: bool = True

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_s", "keep_every_steps"):
            value = getattr(self, name)
            if value is not None:
                allowed = "finite and greater than 0, or null"
                require(is_finite(value) and value > 0, f"checkpoint.{name}", value, allowed)
        allowed = "at least 2 (with a single one, a damaged checkpoint would end the run)"
        require(self.keep_last >= 2, "checkpoint.keep_last", self.keep_last, allowed)


@dataclass
class WandbSection:
    """Weights & Biases. `metrics.jsonl` is the record; W&B is a copy that never stops or delays training.

    Args:
        mode: auto is online where an API key is configured and offline elsewhere.
        project: Project name.
        entity: User or team; null: the key's default.
        name: Display name; null: the name of the run directory.
        group: Group of runs in the web interface.
        tags: Tags in the web interface.
        init_timeout_s: The run is recorded offline when W&B has not answered by then.
        finish_timeout_s: The run ends without waiting longer than this for uploads.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "jmvae_dist"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    init_timeout_s: float = 30.0
    finish_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("init_timeout_s", "finish_timeout_s"):
            value = getattr(self, name)
            require(is_finite(value) and value > 0, f"tracking.wandb.{name}", value, "greater than 0")


@dataclass
class TrackingSection:
    """Where metrics go besides `metrics.jsonl`.

    Args:
        wandb: Weights & Biases.
    """

    wandb: WandbSection = field(default_factory=WandbSection)


@dataclass
class EvaluationSection:
    """Evaluation on `data.eval_manifest` during and at the end of training.

    Args:
        every_steps: Optimizer steps between evaluations (metrics and figures); null: only at the end.
        batch_size: Samples per forward pass on one process.
        joint_nll_samples: Importance samples K per data sample for the joint negative log-likelihood in the
            final evaluation; 0 leaves it out. Periodic evaluations always leave it out: it costs K decodings.
        figure_samples: Held-out samples shown in each figure.
    """

    every_steps: int | None = None
    batch_size: int = 256
    joint_nll_samples: int = 100
    figure_samples: int = 10

    def __post_init__(self) -> None:
        if self.every_steps is not None:
            require(self.every_steps > 0, "evaluation.every_steps", self.every_steps, "greater than 0, or null")
        for name in ("batch_size", "figure_samples"):
            value = getattr(self, name)
            require(value > 0, f"evaluation.{name}", value, "greater than 0")
        samples = self.joint_nll_samples
        require(samples >= 0, "evaluation.joint_nll_samples", samples, "at least 0")


@dataclass
class RunConfig:
    """One training run.

    Args:
        output_dir: Run directory; created, or resumed from when it holds checkpoints.
        data: Shards and their order.
        training: The optimisation.
        model: The model.
        optimizer: The optimizer.
        schedule: Annealing and learning rate.
        checkpoint: Cadence and retention.
        tracking: Metrics and W&B.
        evaluation: Held-out evaluation.
    """

    output_dir: str
    data: DataSection
    training: TrainingSection
    model: ModelSection = field(default_factory=ModelSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    tracking: TrackingSection = field(default_factory=TrackingSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)

    def __post_init__(self) -> None:
        require(bool(self.output_dir.strip()), "output_dir", self.output_dir, "the path of a directory")
        batch, lanes = self.training.global_batch_size, self.data.lanes
        if lanes is not None and batch % lanes != 0:
            raise ConfigError(
                f"data.lanes: {lanes} is not allowed; it must divide training.global_batch_size ({batch})"
            )
        self._check_profile_steps()

    def _check_profile_steps(self) -> None:
        """An evaluation would be most of the trace, and of the memory that holds it; after the window it is not."""
        window, every_steps = self.training.profile_steps, self.evaluation.every_steps
        if window is None or every_steps is None or self.data.eval_manifest is None:
            return
        first, last = window
        evaluated = -(-first // every_steps) * every_steps
        if evaluated < last:
            raise ConfigError(
                f"training.profile_steps: [{first}, {last}] is not allowed; there is an evaluation after step "
                f"{evaluated} (evaluation.every_steps: {every_steps}), which may follow the window but not lie in it"
            )

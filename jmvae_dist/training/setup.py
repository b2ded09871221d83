"""What a run is, resolved and checked before any process group or tracker starts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jmvae_dist.config import JMVAEConfig, RunConfig
from jmvae_dist.data.manifest import Manifest, Modality
from jmvae_dist.data.plan import SamplePlan, default_lanes
from jmvae_dist.errors import ConfigError
from jmvae_dist.schedules import (
    AnnealingSchedule,
    LearningRateSchedule,
    epochs_to_steps,
    resolve_annealing,
    resolve_learning_rate,
)


@dataclass(frozen=True)
class ResolvedRun:
    """A configuration with everything that depends on the data filled in.

    Args:
        config: As the user gave it.
        output_dir: The run directory.
        model_config: With the modalities and shapes of the data.
        modalities: The modalities in use, in the model's order.
        train_manifest: Training shards.
        eval_manifest: Held-out shards, if any.
        plan: The order of samples.
        total_steps: Optimizer steps of the whole run.
        annealing: Weight of the KL terms by global step.
        learning_rate: Learning rate by global step.
    """

    config: RunConfig
    output_dir: Path
    model_config: JMVAEConfig
    modalities: dict[str, Modality]
    train_manifest: Manifest
    eval_manifest: Manifest | None
    plan: SamplePlan
    total_steps: int
    annealing: AnnealingSchedule
    learning_rate: LearningRateSchedule

    def describe_model(self) -> dict[str, Any]:
        """What `load_model` needs to rebuild the model, as JSON values."""
        return {"config": asdict(self.model_config), "networks": asdict(self.config.model.networks)}


def resolve_run(config: RunConfig, world_size: int) -> ResolvedRun:
    """Read the manifests and check everything that can be checked before processes meet.

    Raises:
        ConfigError: The configuration does not fit the data or the number of processes.
        DataError: A manifest is damaged.
    """
    train_manifest = _load_manifest("data.train_manifest", config.data.train_manifest)
    eval_manifest = None
    if config.data.eval_manifest is not None:
        eval_manifest = _load_manifest("data.eval_manifest", config.data.eval_manifest)
    modalities = {modality.name: modality for modality in train_manifest.select(config.data.modalities)}
    model_config = config.model.resolve({name: modality.shape for name, modality in modalities.items()})
    assert model_config.input_dims is not None
    modalities = {name: modalities[name] for name in model_config.input_dims}
    if eval_manifest is not None:
        expected = {name: modality.to_json() for name, modality in modalities.items()}
        check_same_modalities(expected, eval_manifest, "data.eval_manifest")
    plan = _make_plan(config, train_manifest, world_size)
    steps_per_epoch = plan.steps_per_epoch
    total_steps = config.training.steps
    if total_steps is None:
        assert config.training.epochs is not None
        total_steps = max(1, epochs_to_steps(config.training.epochs, steps_per_epoch))
    return ResolvedRun(
        config=config,
        output_dir=Path(config.output_dir).expanduser(),
        model_config=model_config,
        modalities=modalities,
        train_manifest=train_manifest,
        eval_manifest=eval_manifest,
        plan=plan,
        total_steps=total_steps,
        annealing=resolve_annealing(
            config.schedule.annealing,
            warmup_epochs=model_config.warmup,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
        ),
        learning_rate=resolve_learning_rate(
            config.schedule.learning_rate, steps_per_epoch=steps_per_epoch, total_steps=total_steps
        ),
    )


def check_same_modalities(expected: dict[str, Any], manifest: Manifest, key: str) -> None:
    """Refuse a manifest whose modalities are not decoded exactly as those the model was trained on.

    Args:
        expected: The training data's modalities, `Modality.to_json()` by name.
        manifest: The other data.
        key: What to call it in the message.

    Raises:
        ConfigError: A modality is missing, or its type, shape or transform differs.
    """
    available = {modality.name: modality.to_json() for modality in manifest.modalities}
    for name, description in expected.items():
        if name not in available:
            raise ConfigError(f"{key}: modality {name!r} is missing; it has {list(available)}")
        for attribute, value in description.items():
            if available[name].get(attribute) != value:
                raise ConfigError(
                    f"{key}: modality {name!r} has {attribute} {available[name].get(attribute)!r}, but the training "
                    f"data has {value!r}; write both from the same source"
                )


def _load_manifest(key: str, path: str) -> Manifest:
    try:
        return Manifest.load(Path(path).expanduser())
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _make_plan(config: RunConfig, manifest: Manifest, world_size: int) -> SamplePlan:
    batch = config.training.global_batch_size
    lanes = config.data.lanes or default_lanes(batch)
    if world_size > lanes:
        divisors = [divisor for divisor in range(world_size, batch + 1) if batch % divisor == 0]
        advice = f"set data.lanes to one of {divisors[:8]}" if divisors else "use a larger global_batch_size"
        raise ConfigError(
            f"data.lanes: {lanes} lanes cannot be shared by {world_size} processes, which need one each; {advice}"
        )
    return SamplePlan(
        [shard.num_samples for shard in manifest.shards],
        global_batch_size=batch,
        lanes=lanes,
        shuffle_window=config.data.shuffle_window,
        seed=config.training.seed,
    )


def num_micro_batches(run: ResolvedRun, world_size: int) -> int:
    """Forward passes per optimizer step: the same on every rank, enough for the largest share of rows."""
    shares = [run.plan.rows_of_rank(rank, world_size) for rank in range(world_size)]
    largest = max(stop - start for start, stop in shares)
    return math.ceil(largest / (run.config.training.micro_batch_size or largest))


def summarize(run: ResolvedRun, world_size: int) -> str:
    """What is about to run, in two lines."""
    plan, training = run.plan, run.config.training
    return (
        f"{run.train_manifest.num_samples:,} samples of {', '.join(run.modalities)}; {run.total_steps:,} steps of "
        f"{training.global_batch_size} samples ({plan.epoch(run.total_steps):.1f} epochs)\n"
        f"{world_size} process(es) x {num_micro_batches(run, world_size)} micro-batch(es), engine {training.engine}, "
        f"{training.precision}, {plan.lanes} lanes; run directory {run.output_dir}"
    )

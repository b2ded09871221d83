"""What a run is, resolved and checked before any process group or tracker starts."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jmvae_dist.checks import is_integer, require
from jmvae_dist.config import RunConfig
from jmvae_dist.data.class_names import CLASS_NAMES_KEY, class_names, find_moved_class, manifest_class_names
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.plan import SamplePlan, default_lanes
from jmvae_dist.data.store import RemoteAccess
from jmvae_dist.data.urls import is_remote, shown
from jmvae_dist.data.views import View, make_views
from jmvae_dist.data_config import DataSection, check_wishes
from jmvae_dist.distributed.deepspeed_config import build_config
from jmvae_dist.errors import ConfigError
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.networks_config import NetworksConfig
from jmvae_dist.schedules import (
    AnnealingSchedule,
    LearningRateSchedule,
    epochs_to_steps,
    resolve_annealing,
    resolve_learning_rate,
)
from jmvae_dist.user_code import constructor, import_object


@dataclass(frozen=True)
class ResolvedRun:
    """A configuration with everything that depends on the data filled in.

    Args:
        config: As the user gave it.
        output_dir: The run directory.
        model_config: With the modalities and shapes of the data.
        views: What the model sees of the modalities in use, in the model's order.
        eval_views: The same of the held-out shards; none without them.
        train_manifest: Training shards.
        eval_manifest: Held-out shards, if any.
        plan: The order of samples.
        total_steps: Optimizer steps of the whole run.
        annealing: Weight of the KL terms by global step.
        learning_rate: Learning rate by global step.
        deepspeed_config: For DeepSpeed; None with the engine ddp.
        micro_batch: What `training.micro_batch_size: auto` has found (`micro_batches.settle_micro_batch`); empty
            before, and without auto.
    """

    config: RunConfig
    output_dir: Path
    model_config: JMVAEConfig
    views: tuple[View, ...]
    eval_views: tuple[View, ...]
    train_manifest: Manifest
    eval_manifest: Manifest | None
    plan: SamplePlan
    total_steps: int
    annealing: AnnealingSchedule
    learning_rate: LearningRateSchedule
    deepspeed_config: dict[str, Any] | None
    micro_batch: dict[str, Any] = field(default_factory=dict)

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities in use, in the model's order."""
        return [view.name for view in self.views]

    @property
    def remote_access(self) -> RemoteAccess:
        """How remote shards are read."""
        return RemoteAccess(self.config.data.cache, self.config.data.remote)

    def describe_modalities(self) -> dict[str, Any]:
        """What `evaluation_views` needs to see other data as this run does, as JSON values by name.

        Classes that have names come with them.
        """
        return json.loads(json.dumps(_describe_views(self.views, self.train_manifest)))

    def describe_model(self) -> dict[str, Any]:
        """What `load_model` needs to rebuild the model, as JSON values (lists in place of tuples)."""
        return {
            "config": self.model_config.to_json(),
            "networks": json.loads(json.dumps(asdict(resolve_networks(self.config, self.model_config)))),
        }


def resolve_run(config: RunConfig, world_size: int) -> ResolvedRun:
    """Read the manifests and check everything that can be checked before processes meet.

    Raises:
        ConfigError: The configuration does not fit the data or the number of processes.
        DataError: A manifest is damaged.
    """
    train_manifest = _load_manifest("data.train_manifest", config.data.train_manifest, config.data)
    eval_manifest = None
    if config.data.eval_manifest is not None:
        eval_manifest = _load_manifest("data.eval_manifest", config.data.eval_manifest, config.data)
    selected = train_manifest.select(config.data.modalities)
    views = {view.name: view for view in _make_views(config, selected)}
    model_config = config.model.resolve({name: view.shape for name, view in views.items()})
    assert model_config.input_dims is not None
    resolve_networks(config, model_config)
    views = {name: views[name] for name in model_config.input_dims}
    eval_views: tuple[View, ...] = ()
    if eval_manifest is not None:
        expected = _describe_views(views.values(), train_manifest)
        eval_views = evaluation_views(expected, eval_manifest, "data.eval_manifest")
        check_held_out(train_manifest, eval_manifest)
    plan = _make_plan(config, train_manifest, world_size)
    sizes = {"num_samples": train_manifest.num_samples, "global_batch_size": config.training.global_batch_size}
    total_steps = config.training.steps
    if total_steps is None:
        assert config.training.epochs is not None
        total_steps = max(1, epochs_to_steps(config.training.epochs, **sizes))
    window = config.training.profile_steps
    allowed = f"within the {total_steps} steps of the run"
    require(window is None or window[1] <= total_steps, "training.profile_steps", list(window or ()), allowed)
    return ResolvedRun(
        config=config,
        output_dir=Path(config.output_dir).expanduser(),
        model_config=model_config,
        views=tuple(views.values()),
        eval_views=eval_views,
        train_manifest=train_manifest,
        eval_manifest=eval_manifest,
        plan=plan,
        total_steps=total_steps,
        annealing=resolve_annealing(
            config.schedule.annealing,
            warmup_epochs=model_config.warmup,
            total_steps=total_steps,
            **sizes,
        ),
        learning_rate=resolve_learning_rate(config.schedule.learning_rate, total_steps=total_steps, **sizes),
        deepspeed_config=make_deepspeed_config(config.training.engine, config),
    )


def resolve_networks(config: RunConfig, model_config: JMVAEConfig) -> NetworksConfig:
    """The networks of the run with all choices and sizes written out, and the user's classes tried.

    Raises:
        ConfigError: A size does not fit a shape; a class cannot be imported or does not take its arguments.
    """
    assert model_config.input_dims is not None
    networks = config.model.networks.resolve(model_config.input_dims, model_config.decoders_dist or {})
    for key, settings in networks.class_sections().items():
        constructor(key, settings, dict.fromkeys(("latent_dim", "shape", "shapes")))
    for key, path in model_config.function_paths().items():
        import_object(key, path)
    return networks


def check_machine(config: RunConfig) -> None:
    """Refuse what cannot be had here; without waiting for torch where nothing in particular is asked for.

    Raises:
        ConfigError: The device or the kernels are not available on this machine, or gradients cannot be shared on it.
    """
    device = config.training.device
    if device != "auto":
        from jmvae_dist.distributed.runtime import check_device

        check_device(device, config.training.engine)
    if config.model.kernels == "triton":
        from jmvae_dist.distributed.runtime import takes_gpu
        from jmvae_dist.kernels.gaussian import find_kernels

        find_kernels(config.model.kernels, "cuda" if takes_gpu(device) else "cpu")
    if config.training.compile != "off":
        _check_compiler(device)
    if config.training.gradient_reduction == "shared_memory":
        from jmvae_dist.distributed.runtime import takes_gpu

        if takes_gpu(device):
            raise ConfigError(
                "training.gradient_reduction: shared_memory is for CPUs, and training.device auto takes a GPU here; "
                "use auto, or training.device cpu"
            )


# What makes a directory one that is never written. Anything else, such as a full disk, may have passed until then.
_NEVER_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)


def check_output_dir(output_dir: Path) -> None:
    """Refuse a run directory that cannot be written, or made, without making it.

    What permissions say is not enough: root has all of them, also in /proc. So a file without a name is opened.

    Raises:
        ConfigError: The directory, or the one in which it would be made, takes no file.
    """
    folder = output_dir
    try:
        folder = next(path for path in (output_dir, *output_dir.parents) if path.exists())
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if error.errno not in _NEVER_WRITABLE:
            return
        what = "written" if folder == output_dir else f"made in {folder}"
        raise ConfigError(f"output_dir: {output_dir} cannot be {what} ({error.strerror})") from None


def _check_compiler(device: str) -> None:
    from jmvae_dist.distributed.runtime import takes_gpu

    if takes_gpu(device):
        is_there, what = importlib.util.find_spec("triton") is not None, "triton (pip install 'jmvae_dist[triton]')"
    else:
        candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
        is_there, what = any(map(shutil.which, candidates)), f"a C++ compiler ({' or '.join(candidates)})"
    if not is_there:
        raise ConfigError(f"training.compile: needs {what} on this machine, or off")


def _make_views(config: RunConfig, modalities: Sequence[Modality]) -> tuple[View, ...]:
    data = config.data
    return make_views(modalities, data.transforms, data.tokenizers, seed=config.training.seed)


# What may differ between two data sets of the same meaning: how members are called, and, where a run resizes, how
# large images are (the views' shapes are compared).
_MAY_DIFFER = ("member", "shape")


def evaluation_views(
    expected: dict[str, Any], manifest: Manifest, key: str, trusted: Collection[str] | None = None
) -> tuple[View, ...]:
    """Other data as the model saw its training data: the same decoding, the same transforms.

    Args:
        expected: `ResolvedRun.describe_modalities` of the run, or of a checkpoint, in the order wanted.
        manifest: The other data.
        key: What to call it in the message.
        trusted: Class paths that may be imported; None: all, which is for descriptions that the user's own
            configuration has just made.

    Raises:
        ConfigError: A modality is missing, its type, shape or transform differs, its classes have other numbers, or
            a class of code is not trusted.
    """
    _check_class_numbers(class_names(expected), manifest, key)
    available = {modality.name: modality for modality in manifest.modalities}
    views = []
    for name, description in expected.items():
        if name not in available:
            raise ConfigError(f"{key}: modality {name!r} is missing; it has {list(available)}")
        modality = available[name]
        found = modality.to_json()
        for attribute in sorted(_stored_attributes(description).keys() | found.keys()):
            value, other = description.get(attribute), found.get(attribute)
            if attribute not in _MAY_DIFFER and other != value:
                raise _other_modality(key, name, attribute, other, value)
        transforms, tokenizer = description.get("transforms", []), description.get("run_tokenizer")
        seed = description.get("transforms_seed", 0)
        # A checkpoint may come from anywhere.
        check_wishes({name: transforms}, {} if tokenizer is None else {name: tokenizer})
        if not is_integer(seed) or not 0 <= seed < 2**64:
            raise ConfigError(f"the seed of the transforms of {name!r} is {seed!r}, not an integer of 64 bits")
        is_resized = any(entry.get("name") == "resize" for entry in transforms)
        shape = description["shape"]
        if not modality.has_fixed_shape and not is_resized:
            raise _images_of_any_size(key, name, shape)
        view = View(modality, transforms, tokenizer, seed=seed, trusted=trusted)
        if list(modality.shape) != shape and not (is_resized and modality.shape[0] == shape[0]):
            raise _other_modality(key, name, "shape", list(modality.shape), shape)
        views.append(view)
    return tuple(views)


def _describe_views(views: Iterable[View], manifest: Manifest) -> dict[str, Any]:
    """Of views of training data, by name: all that decides what the model sees, and what classes are called."""
    names = manifest_class_names(manifest)
    return {
        view.name: view.to_json() | ({CLASS_NAMES_KEY: list(names[view.name])} if view.name in names else {})
        for view in views
    }


def _check_class_numbers(names: dict[str, tuple[str, ...]], manifest: Manifest, key: str) -> None:
    """Refuse a manifest in which a class has another number than in the training data, whose names these are."""
    found = manifest_class_names(manifest)
    for name in (name for name in names if name in found):
        moved = find_moved_class(found[name], names[name])
        if moved is not None:
            number, other = moved
            raise ConfigError(
                f"{key}: {found[name][number]!r} is class {number} of {name!r}, and class {other} in the training "
                "data; write both with the same --class-names"
            )


def _stored_attributes(description: dict[str, Any]) -> dict[str, Any]:
    """The part of a view's description that is the manifest's."""
    return {
        key: value
        for key, value in description.items()
        if key not in ("transforms", "transforms_seed", "run_tokenizer", CLASS_NAMES_KEY)
    }


def _other_modality(key: str, name: str, attribute: str, found: Any, expected: Any) -> ConfigError:
    if attribute in ("offset", "scale") and (isinstance(found, list) or isinstance(expected, list)):
        return ConfigError(
            f"{key}: modality {name!r} is not standardised by the numbers of the training data; write both from one "
            f"file with --standardize {name}, or this one with --standardize-like and the manifest of that data"
        )
    return ConfigError(
        f"{key}: modality {name!r} has {attribute} {found!r}, but the training data has {expected!r}; write both "
        "from the same source"
    )


def _images_of_any_size(key: str, name: str, expected: Any) -> ConfigError:
    """For a run without a resize: only a new training can have one, so what data it takes comes first."""
    size = expected[1:]
    return ConfigError(
        f"{key}: the images of {name!r} differ in size, and the model was trained on images of {size} (height, "
        "width) without resizing: bring them to this size before they are written into shards; or train with "
        f"data.transforms: {{{name}: [{{name: resize, size: {size}}}]}}, and what the model is given later is resized"
    )


def check_same_transforms(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to go on with weights that were trained on other inputs.

    Args:
        saved: `ResolvedRun.describe_modalities` of the checkpoint.
        current: That of the run.

    Raises:
        ConfigError: Transforms or tokenizers differ; of the manifest's own entries its fingerprint tells.
    """
    settings = {"transforms": "data.transforms", "run_tokenizer": "data.tokenizers"}
    differences = [
        f"{setting}.{name} was {saved[name].get(key)}, is now {description.get(key)}"
        for name, description in current.items()
        for key, setting in settings.items()
        if name in saved and saved[name].get(key) != description.get(key)
    ]
    if differences:
        raise ConfigError(
            f"the checkpoint's model saw its data otherwise: {'; '.join(differences)}; restore the settings, or "
            "accept that with --data.allow_order_change true"
        )


def check_held_out(train_manifest: Manifest, eval_manifest: Manifest) -> None:
    """Refuse to call training data held-out.

    Raises:
        ConfigError: The two manifests are the same data.
    """
    shared = find_shared_shard(train_manifest, eval_manifest)
    if shared is not None:
        raise ConfigError(
            f"data.eval_manifest: shard {shared} is also one of data.train_manifest; held-out samples must not be "
            "trained on (write the splits with --test-fraction, or set data.eval_manifest to null)"
        )


def find_shared_shard(train_manifest: Manifest, eval_manifest: Manifest) -> str | None:
    """A shard of the second manifest, for messages, whose content is also in the first; None if there is none."""
    train_shards = {shard.sha256 for shard in train_manifest.shards}
    return next((shown(shard.url) for shard in eval_manifest.shards if shard.sha256 in train_shards), None)


# A checkpoint's weights mean something else under another value of these.
_MODEL_KEYS = (
    "n_modalities",
    "latent_dim",
    "input_dims",
    "decoders_dist",
    "decoder_dist_params",
    "custom_architectures",
)


def check_same_model(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to continue weights in another model; other weights of the loss terms are the user's business.

    Args:
        saved: `ResolvedRun.describe_model` of the checkpoint.
        current: That of the run.

    Raises:
        ConfigError: Networks, modalities or likelihoods differ.
    """
    differences = [
        f"model.{key} was {saved['config'].get(key)}, is now {current['config'][key]}"
        for key in _MODEL_KEYS
        if saved["config"].get(key) != current["config"][key]
    ]
    # Settings that a checkpoint does not know had no other value than their default when it was written.
    networks = {**asdict(NetworksConfig()), **saved["networks"]}
    differences += [
        f"model.networks.{key} was {networks.get(key)}, is now {value}"
        for key, value in current["networks"].items()
        if networks.get(key) != value
    ]
    if differences:
        raise ConfigError(
            f"the checkpoint is that of another model ({'; '.join(differences)}); restore the settings, or choose a "
            "new output_dir"
        )


def describe_changes(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings that differ between two plain configurations, as `key old -> new`."""
    changes = []
    for key, value in current.items():
        before = saved.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            changes += describe_changes(before, value, f"{prefix}{key}.")
        elif value != before:
            changes.append(f"{prefix}{key} {before} -> {value}")
    return changes


def _load_manifest(key: str, path: str, data: DataSection) -> Manifest:
    try:
        manifest = Manifest.load(path if is_remote(path) else Path(path).expanduser(), data.remote)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    if manifest.has_remote_shards:
        _check_remote_shards(key, manifest, data)
    return manifest


def _check_remote_shards(key: str, manifest: Manifest, data: DataSection) -> None:
    if data.cache.dir is None and data.verify == "always":
        raise ConfigError(
            f"data.verify: 'always' needs whole shards, and some of {key} are at URLs; set data.cache.dir"
        )
    largest = max(shard.num_bytes + shard.index.num_bytes for shard in manifest.shards)
    if data.cache.max_bytes is not None and data.cache.max_bytes < largest:
        raise ConfigError(
            f"data.cache.max_bytes: {data.cache.max_bytes} is less than the largest shard of {key} ({largest} bytes)"
        )


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


def make_deepspeed_config(engine: str, config: RunConfig) -> dict[str, Any] | None:
    """DeepSpeed's configuration for an engine and the run's options; None for ddp.

    Raises:
        ConfigError: The user's file cannot be used.
    """
    return None if engine == "ddp" else build_config(engine, config.training.deepspeed)


def num_micro_batches(run: ResolvedRun, world_size: int) -> int:
    """Forward passes per optimizer step: the same on every rank, enough for the largest share of rows."""
    size = run.config.training.micro_batch_size
    if size == "auto":
        size = run.micro_batch["micro_batch_size"]
    largest = largest_share(run.plan, world_size)
    return math.ceil(largest / (size or largest))


def largest_share(plan: SamplePlan, world_size: int) -> int:
    """Most rows of a step on one rank."""
    shares = [plan.rows_of_rank(rank, world_size) for rank in range(world_size)]
    return max(stop - start for start, stop in shares)


def summarize(run: ResolvedRun, world_size: int) -> str:
    """What is about to run, in two lines; a third one where a step takes samples more than once."""
    plan, training = run.plan, run.config.training
    is_open = training.micro_batch_size == "auto" and not run.micro_batch
    micro_batches = "auto" if is_open else num_micro_batches(run, world_size)
    num_samples, batch_size = run.train_manifest.num_samples, training.global_batch_size
    repeats = (
        "\nnote: training.global_batch_size is larger than the data: every step takes a sample "
        f"{batch_size / num_samples:.1f} times on average"
        if batch_size > num_samples
        else ""
    )
    return (
        f"{num_samples:,} samples of {', '.join(run.modalities)}; {run.total_steps:,} steps of "
        f"{batch_size} samples ({plan.epoch(run.total_steps):.1f} epochs)\n"
        f"{world_size} process(es) x {micro_batches} micro-batch(es), engine {training.engine}, "
        f"{training.precision}, {plan.lanes} lanes; run directory {run.output_dir}{repeats}"
    )

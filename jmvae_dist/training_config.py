"""What a user can set about the optimisation: the section `training`, and the sections in it.

How long a run is, how its batches are cut, precision, engine, the options of DeepSpeed, guards and watchdog, each
with its checks. What depends on other sections as well is checked in `config.RunConfig`, and what depends on a
manifest in `training/setup.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

from jmvae_dist.checks import is_finite, is_integer, require
from jmvae_dist.errors import ConfigError


@dataclass
class DeepSpeedSection:
    """Options of the engines zero0 .. zero3.

    Args:
        offload_optimizer: Where optimizer states and updates live: on the device, or in host memory (zero1 to 3).
        offload_parameters: Where idle weights live: on the device, or in host memory (zero3).
        config_file: DeepSpeed JSON whose keys are passed on, for bucket sizes and the like; what other settings
            of this configuration decide is refused in it.
    """

    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_parameters: Literal["none", "cpu"] = "none"
    config_file: str | None = None


@dataclass
class GuardsSection:
    """What protects the weights from a bad step.

    A step whose loss or gradient is not finite, or whose gradient's square is not in float32, never changes the
    weights; it is counted and passed over.

    Args:
        max_consecutive_skips: The run stops when more steps than this are dropped one after another. fp16 begins
            with a loss scale of 2^16 and may have to halve it many times.
        spike_threshold: A loss this many standard deviations above the mean of the window is a spike; null does
            not look for spikes.
        spike_window_steps: Steps whose losses make the window.
        spike_action: warn; skip the step's update; or rewind to the last checkpoint and pass over the batches
            around the spike.
        rewind_skip_steps: Batches before the spike that are passed over too after a rewind.
        max_rewinds: The run stops when it would have to rewind more often than this.
    """

    max_consecutive_skips: int = 20
    spike_threshold: float | None = None
    spike_window_steps: int = 100
    spike_action: Literal["warn", "skip", "rewind"] = "skip"
    rewind_skip_steps: int = 10
    max_rewinds: int = 5

    def __post_init__(self) -> None:
        for name, least in (
            ("max_consecutive_skips", 0),
            ("spike_window_steps", 2),
            ("rewind_skip_steps", 0),
            ("max_rewinds", 0),
        ):
            value = getattr(self, name)
            require(value >= least, f"training.guards.{name}", value, f"at least {least}")
        if self.spike_threshold is None:
            allowed = "skip while training.guards.spike_threshold is null, which looks for no spikes"
            require(self.spike_action == "skip", "training.guards.spike_action", self.spike_action, allowed)
        else:
            valid = is_finite(self.spike_threshold) and self.spike_threshold > 0
            require(valid, "training.guards.spike_threshold", self.spike_threshold, "greater than 0, or null")


@dataclass
class WatchdogSection:
    """When a run that hangs is ended, with the stacks of all threads in `RUN/logs/` and the missing rank named.

    Args:
        step_timeout_s: Longest duration of a step, and of waiting for its data; five times as long for the first
            ones, which compile kernels and start workers. null: no limit.
        peer_timeout_s: After this long without a sign of life a process that others wait for is given up: it is
            stopped, or its node is lost. At least 5; null: nobody is given up.
    """

    step_timeout_s: float | None = 300.0
    peer_timeout_s: float | None = 60.0

    def __post_init__(self) -> None:
        for name, least in (("step_timeout_s", 1), ("peer_timeout_s", 5)):
            value = getattr(self, name)
            if value is not None:
                valid = is_finite(value) and value >= least
                require(valid, f"training.watchdog.{name}", value, f"at least {least}, or null")


@dataclass
class TrainingSection:
    """The optimisation: how long, how large, how precise.

    Args:
        global_batch_size: Samples per optimizer step over all processes; the topology decides each one's share.
        steps: Optimizer steps of the whole run. Give either `steps` or `epochs`.
        epochs: Passes over the training data, resolved into steps from the manifest (rounded up).
        micro_batch_size: Most samples of one forward pass on one process; larger shares are accumulated. auto finds
            the largest that fits, before the first step, and keeps to it when the run is resumed; null: all.
        memory_budget_bytes: What auto lets a process take for weights, gradients, moments, batches and activations,
            on a GPU or, besides the interpreter and its libraries, in host memory; there the allocator may take half
            as much again. null: on a GPU 90 % of what is free, else 65 % of what is available, within the limits of
            control groups, shared by the processes of a machine.
        precision: fp32, or autocast to bf16 or fp16, the latter with dynamic loss scaling. Weights, gradients,
            their reduction, optimizer states, KL and likelihood sums are float32 in all three.
        engine: ddp, PyTorch's DistributedDataParallel (one process runs without it), or DeepSpeed with ZeRO
            stage 0 to 3. The numbers do not depend on it; what a rank has to hold does.
        gradient_reduction: What ddp averages gradients by. process_group: gloo on CPUs, NCCL on GPUs. shared_memory:
            memory that all ranks have mapped (/dev/shm), on CPUs of one machine; faster, and for two ranks the same
            bits. auto takes it where it can be had.
        deepspeed: Options of the zero engines.
        guards: What protects the weights from a bad step.
        watchdog: When a run that hangs is ended.
        device: auto takes a GPU if there is one.
        compile: model lets torch.compile make one program each of the forward and the backward pass, before the first
            step: minutes at the start, and fewer passes over memory (and launches on a GPU) in every step. Each size
            of a micro-batch is compiled for itself. Losses agree with those of off within rounding. Not with zero3.
        activation_checkpointing: Keep the inputs of the networks' blocks alone for the backward pass, and compute the
            rest again there: less memory for a second forward pass, and the same numbers. docs/training.md says when.
        gradient_clip_norm: Largest L2 norm of the gradient; null does not clip.
        seed: Seed of initial weights, data order and latent noise.
        log_every_steps: Steps between records in `metrics.jsonl`.
        profile_steps: First and last step, such as [100, 105], that torch's profiler records on every rank, each into
            `profiles/steps-...-rank0.json.gz` of the run directory; null: none. It changes no number. An evaluation
            (`evaluation.every_steps`) may follow the last step, but not lie between them.
        process_group_timeout_s: After this long without an answer from a peer a collective fails.
    """

    global_batch_size: int
    steps: int | None = None
    epochs: float | None = None
    micro_batch_size: int | Literal["auto"] | None = None
    memory_budget_bytes: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    engine: Literal["ddp", "zero0", "zero1", "zero2", "zero3"] = "ddp"
    gradient_reduction: Literal["auto", "shared_memory", "process_group"] = "auto"
    deepspeed: DeepSpeedSection = field(default_factory=DeepSpeedSection)
    guards: GuardsSection = field(default_factory=GuardsSection)
    watchdog: WatchdogSection = field(default_factory=WatchdogSection)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["off", "model"] = "off"
    activation_checkpointing: bool = False
    gradient_clip_norm: float | None = None
    seed: int = 0
    log_every_steps: int = 10
    profile_steps: tuple[int, int] | None = None
    process_group_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError("training: give exactly one of training.steps and training.epochs")
        for name in ("steps", "epochs", "global_batch_size", "log_every_steps"):
            value = getattr(self, name)
            if value is not None:
                require(is_finite(value) and value > 0, f"training.{name}", value, "finite and greater than 0")
        size, budget = self.micro_batch_size, self.memory_budget_bytes
        valid = size in (None, "auto") or (is_integer(size) and int(size) > 0)
        require(valid, "training.micro_batch_size", size, "an integer greater than 0, auto, or null")
        valid = budget is None or (budget > 0 and size == "auto")
        allowed = "greater than 0, and null unless training.micro_batch_size is auto"
        require(valid, "training.memory_budget_bytes", budget, allowed)
        if self.gradient_clip_norm is not None:
            positive = is_finite(self.gradient_clip_norm) and self.gradient_clip_norm > 0
            require(positive, "training.gradient_clip_norm", self.gradient_clip_norm, "greater than 0, or null")
        if self.profile_steps is not None:
            first, last = self.profile_steps
            allowed = "a first step of at least 1, and a last one that is not before it"
            require(1 <= first <= last, "training.profile_steps", list(self.profile_steps), allowed)
        require(0 <= self.seed < 2**63, "training.seed", self.seed, "between 0 and 2^63 - 1")
        if self.compile != "off" and self.engine == "zero3":
            raise ConfigError(
                f"training.compile: {self.compile} cannot be used with training.engine zero3, which gathers the "
                "weights of each layer when it is called; use another engine, or off"
            )
        if self.gradient_reduction == "shared_memory" and (self.engine != "ddp" or self.device == "cuda"):
            raise ConfigError(
                "training.gradient_reduction: shared_memory is for training.engine ddp on CPUs, and cannot be used "
                f"with training.engine {self.engine} on training.device {self.device}; use auto"
            )
        self._check_deepspeed()
        timeout = self.process_group_timeout_s
        allowed = "greater than 0 and at most a year"
        require(0 < timeout <= 366 * 86400, "training.process_group_timeout_s", timeout, allowed)
        limit = self.watchdog.step_timeout_s
        if limit is not None and limit >= timeout:
            raise ConfigError(
                f"training.watchdog.step_timeout_s: {limit!r} is not allowed; it must be below "
                f"training.process_group_timeout_s ({timeout!r}), or null: else collectives fail before the "
                "watchdog can say who is missing"
            )

    def _check_deepspeed(self) -> None:
        for name, engines in (
            ("offload_optimizer", ("zero1", "zero2", "zero3")),
            ("offload_parameters", ("zero3",)),
        ):
            value = getattr(self.deepspeed, name)
            allowed = f"none with training.engine {self.engine}; cpu needs {' or '.join(engines)}"
            require(value == "none" or self.engine in engines, f"training.deepspeed.{name}", value, allowed)
        path = self.deepspeed.config_file
        allowed = "null with training.engine ddp, which does not use DeepSpeed"
        require(path is None or self.engine != "ddp", "training.deepspeed.config_file", path, allowed)

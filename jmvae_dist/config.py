"""What a user can set: one dataclass per section, validated when it is built (`config_io` reads and writes it).

The root, `RunConfig`, is here, and so are all sections but `data` (in `data_config`), `training` (`training_config`)
and `model.networks` (`networks_config`). Every mistake raises a `ConfigError` with the key, the value and what is
allowed, before anything starts.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from jmvae_dist.checks import is_finite, is_integer, is_object_path, require
from jmvae_dist.data_config import DataSection
from jmvae_dist.errors import ConfigError
from jmvae_dist.networks_config import NetworksConfig
from jmvae_dist.training_config import TrainingSection
from jmvae_dist.user_code import path_of

# Who computes KL terms, products of experts and likelihoods (kernels/gaussian.py).
Kernels = Literal["auto", "reference", "compiled", "triton"]
# Parameters that each likelihood takes in `decoder_dist_params`, with their types.
LIKELIHOOD_PARAMETERS: dict[str, dict[str, type]] = {
    "normal": {"scale": float},
    "laplace": {"scale": float},
    "bernoulli": {"soft_targets": bool},
    "categorical": {"soft_targets": bool},
}


def is_likelihood(value: Any) -> bool:
    """Whether `value` can be an entry of `decoders_dist`: a known name, a function, or the path of one."""
    if isinstance(value, str):
        return value in LIKELIHOOD_PARAMETERS or is_object_path(value)
    return callable(value)


@dataclass
class JMVAEConfig:
    """The model's hyperparameters, with the names and defaults of the reference implementation (MultiVae).

    Args:
        n_modalities: Number of modalities M, at least 2.
        latent_dim: Dimension D of the latent space.
        input_dims: Shape of one sample per modality; its order is the order of the modalities.
        uses_likelihood_rescaling: Weigh each modality's reconstruction term by
            ``max_k prod(input_dims[k]) / prod(input_dims[m])`` (or by ``rescale_factors``).
        rescale_factors: Weight per modality; used only with ``uses_likelihood_rescaling``.
        decoders_dist: Likelihood per modality: normal (default), laplace, bernoulli, categorical, or a function of
            your own ``(recon, target) -> log p`` per element, itself or its place as ``module.function``.
        decoder_dist_params: Parameters per modality: ``scale`` (> 0, default 1) for normal and laplace;
            ``soft_targets`` for bernoulli (accept targets between 0 and 1, e.g. grey scale) and for
            categorical (accept any distribution over the classes, not only one-hot); keyword arguments of a
            function of your own.
        custom_architectures: Names of the networks that the user supplies in place of the defaults.
        alpha: Weight of the KL terms to the unimodal posteriors.
        warmup: Epochs during which the weight of all KL terms grows from 0 to 1.
        beta: Weight of the KL term to the prior.

    Raises:
        ConfigError: A value has the wrong type or is out of range, or a dictionary does not name exactly the
            modalities.
    """

    n_modalities: int
    latent_dim: int = 10
    input_dims: dict[str, tuple[int, ...]] | None = None
    uses_likelihood_rescaling: bool = False
    rescale_factors: dict[str, float] | None = None
    decoders_dist: dict[str, Any] | None = None
    decoder_dist_params: dict[str, dict[str, Any]] | None = None
    custom_architectures: list[str] = field(default_factory=list)
    alpha: float = 0.1
    warmup: int = 10
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.n_modalities is not None:
            valid = is_integer(self.n_modalities) and self.n_modalities >= 2
            require(valid, "n_modalities", self.n_modalities, "an integer and at least 2")
        valid = is_integer(self.latent_dim) and self.latent_dim >= 1
        require(valid, "latent_dim", self.latent_dim, "an integer and at least 1")
        named = isinstance(self.custom_architectures, list)
        require(named, "custom_architectures", self.custom_architectures, "a list of names")
        rescaling = self.uses_likelihood_rescaling
        require(isinstance(rescaling, bool), "uses_likelihood_rescaling", rescaling, "true or false")
        for name in ("alpha", "beta", "warmup"):
            value = getattr(self, name)
            require(is_finite(value) and value >= 0, name, value, "finite and at least 0")
        for name in ("input_dims", "rescale_factors", "decoders_dist", "decoder_dist_params"):
            value = getattr(self, name)
            require(value is None or isinstance(value, dict), name, value, "a dictionary with modalities as keys")
        if self.input_dims is not None:
            self._check_input_dims(self.input_dims)
        self._check_likelihoods()
        if self.input_dims is not None:
            self.check_modalities(list(self.input_dims))

    def _check_input_dims(self, input_dims: dict[str, tuple[int, ...]]) -> None:
        if self.n_modalities is not None:
            allowed = f"one shape for each of the n_modalities={self.n_modalities} modalities"
            require(len(input_dims) == self.n_modalities, "input_dims", list(input_dims), allowed)
        for name, shape in input_dims.items():
            valid = isinstance(shape, (tuple, list)) and len(shape) > 0
            valid = valid and all(is_integer(size) and size >= 1 for size in shape)
            require(valid, f"input_dims.{name}", shape, "a non-empty shape of positive integers")
            # A dot would be ambiguous in tar member names, metric keys and parameter names.
            named = isinstance(name, str) and bool(name) and not set(name) & set("./ ")
            require(named, "input_dims", name, "named without dots, slashes and spaces")
        self.input_dims = {name: tuple(shape) for name, shape in input_dims.items()}

    def _check_likelihoods(self) -> None:
        for name, distribution in (self.decoders_dist or {}).items():
            allowed = f"one of {list(LIKELIHOOD_PARAMETERS)}, or module.function"
            require(is_likelihood(distribution), f"decoders_dist.{name}", distribution, allowed)
        for name, factor in (self.rescale_factors or {}).items():
            require(is_finite(factor) and factor > 0, f"rescale_factors.{name}", factor, "greater than 0")
        for name, parameters in (self.decoder_dist_params or {}).items():
            if self.decoders_dist is not None and name not in self.decoders_dist:
                raise ConfigError(
                    f"decoder_dist_params: modality {name!r} is not one of decoders_dist: {list(self.decoders_dist)}"
                )
            allowed = "a dictionary of parameters"
            require(isinstance(parameters, dict), f"decoder_dist_params.{name}", parameters, allowed)
            distribution = (self.decoders_dist or {}).get(name, "normal")
            types = LIKELIHOOD_PARAMETERS.get(distribution) if isinstance(distribution, str) else None
            if types is None:
                continue  # a function of the user's knows its arguments
            for parameter, value in parameters.items():
                key = f"decoder_dist_params.{name}.{parameter}"
                if parameter not in types:
                    allowed = f"one of {list(types)} for a {distribution} likelihood"
                    raise ConfigError(f"{key}: unknown parameter {parameter!r}; it must be {allowed}")
                if types[parameter] is bool:
                    require(isinstance(value, bool), key, value, "true or false")
                else:
                    require(is_finite(value) and value > 0, key, value, "a number greater than 0")

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values, from which `JMVAEConfig(**values)` is the same again; functions by their place.

        Raises:
            ConfigError: A function of the user's has no place, e.g. a lambda.
        """
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(JMVAEConfig)}
        if self.decoders_dist is not None:
            values["decoders_dist"] = {
                name: value if isinstance(value, str) else path_of(f"decoders_dist.{name}", value)
                for name, value in self.decoders_dist.items()
            }
        return json.loads(json.dumps(values))

    def function_paths(self) -> dict[str, str]:
        """The likelihoods that are functions of the user's, `module.function` by the setting that names them."""
        return {
            f"model.decoders_dist.{name}": value
            for name, value in (self.decoders_dist or {}).items()
            if isinstance(value, str) and value not in LIKELIHOOD_PARAMETERS
        }

    def check_modalities(self, modalities: list[str]) -> None:
        """Check that every dictionary keyed by modality names only `modalities`, and the complete ones all.

        Raises:
            ConfigError: A name is unknown or reserved, or `decoders_dist` or `rescale_factors` leave a modality out.
        """
        for name in ("all", "others"):
            if name in modalities:
                raise ConfigError(f"input_dims: no modality can be named {name!r}, which stands for several of them")
        for key in ("input_dims", "decoders_dist", "rescale_factors", "decoder_dist_params"):
            names = getattr(self, key)
            if names is None:
                continue
            unknown = [name for name in names if name not in modalities]
            if unknown:
                raise ConfigError(f"{key}: unknown modality {unknown[0]!r}; the modalities are {modalities}")
            missing = [name for name in modalities if name not in names]
            if missing and key != "decoder_dist_params":
                raise ConfigError(f"{key}: modality {missing[0]!r} is missing; name all of {modalities} or none")


@dataclass
class ModelSection(JMVAEConfig):
    """`JMVAEConfig` as a section of a run: `n_modalities` and `input_dims` may be left to the manifest.

    Args:
        networks: Kinds and sizes of the networks, or classes of your own.
        kernels: Who computes KL terms, products of experts and likelihoods: reference (torch); compiled (the
            first two through torch.compile, where they are large enough to gain); triton (fused kernels, on
            GPUs); auto takes triton on a GPU, else the reference. They agree up to rounding. The environment
            variable JMVAE_DIST_KERNELS goes before this.
    """

    n_modalities: int | None = None  # type: ignore[assignment]
    networks: NetworksConfig = field(default_factory=NetworksConfig)
    kernels: Kernels = "auto"

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ConfigError as error:
            raise ConfigError(f"model.{error}") from None
        allowed = "empty: it names networks given in Python, to JMVAE(...); classes go into model.networks"
        known = list(get_args(Kernels))
        require(self.kernels in known, "model.kernels", self.kernels, f"one of {known}")
        require(not self.custom_architectures, "model.custom_architectures", self.custom_architectures, allowed)

    def resolve(self, input_dims: dict[str, tuple[int, ...]]) -> JMVAEConfig:
        """The model's configuration for data whose modalities have the shapes `input_dims`.

        Raises:
            ConfigError: The section and the data disagree about names, number or shapes of modalities.
        """
        names = list(input_dims)
        if self.n_modalities not in (None, len(names)):
            raise ConfigError(
                f"model.n_modalities: {self.n_modalities}, but the data has {len(names)} modalities: {names}"
            )
        try:
            self.check_modalities(names)
        except ConfigError as error:
            raise ConfigError(
                f"model.{error} (those of the data; select some of them with data.modalities)"
            ) from None
        for name, shape in (self.input_dims or {}).items():
            if tuple(shape) != tuple(input_dims[name]):
                raise ConfigError(
                    f"model.input_dims.{name}: {list(shape)}, but the manifest says {list(input_dims[name])}"
                )
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(JMVAEConfig)}
        # The user's order of `input_dims`, where given, is the order of the modalities.
        ordered = {name: input_dims[name] for name in (self.input_dims or input_dims)}
        return JMVAEConfig(**{**values, "n_modalities": len(names), "input_dims": ordered})


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

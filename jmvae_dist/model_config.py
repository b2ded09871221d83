"""What a user can set about the model: its hyperparameters and likelihoods, and the section `model` of a run.

What networks it has is in `networks_config`; what depends on the data is checked when the section is resolved.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from jmvae_dist.checks import is_finite, is_integer, is_object_path, require
from jmvae_dist.errors import ConfigError
from jmvae_dist.networks_config import NetworksConfig
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
    # Not `dict[str, Any]` inside: jsonargparse would read its texts once more, as null where they are '~' or '#1'.
    decoder_dist_params: dict[str, dict] | None = None
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
                    f"decoders_dist: must name all modalities, but {list(self.decoders_dist)} lack {name!r}, which "
                    "decoder_dist_params has; add it there, or correct its name in one of the two"
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

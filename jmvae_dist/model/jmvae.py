"""The Joint Multimodal VAE (Suzuki et al. 2016): training objective, inference from any modalities.

Shape suffixes: B batch, D latent dimension, M modalities, N samples per data point, K importance samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from jmvae_dist.checks import is_integer
from jmvae_dist.errors import ConfigError
from jmvae_dist.kernels.gaussian import gaussian_kl_terms, product_of_experts
from jmvae_dist.kernels.noise import KeyedNoise
from jmvae_dist.kernels.reference import computation_dtype
from jmvae_dist.model.decoding_chunks import DecodingChunks
from jmvae_dist.model.importance import DrawNoise, NLLEstimate, estimate_from_draws
from jmvae_dist.model.inputs import check_structure, check_values, per_sample, presence, require_tensor
from jmvae_dist.model.joint import EncoderBranch
from jmvae_dist.model.likelihoods import build_likelihood, log_prob
from jmvae_dist.model.modules import GaussianParams, module_dict
from jmvae_dist.model.network_calls import call_decoder, call_encoder, call_joint_encoder
from jmvae_dist.model.networks import build_networks
from jmvae_dist.model.objective import ObjectiveTerms, combine, resolve_rescale_factors
from jmvae_dist.model.recomputation import recompute
from jmvae_dist.model.sampling import check_noise, draw_noise, sample
from jmvae_dist.model_config import JMVAEConfig, Kernels
from jmvae_dist.networks_config import NetworksConfig

Modalities = str | Iterable[str]


class JMVAEOutput(NamedTuple):
    """Result of a forward pass (a tuple, so that wrappers such as DDP find the tensors inside).

    Attributes:
        loss: Scalar, mean over the batch (0 for an empty batch).
        loss_sum: Scalar, sum over the batch.
        metrics: Detached float32 scalars, sums over the batch; see `objective.combine`.
        mu: Mean of the joint posterior (B, D).
        logvar: Log-variance of the joint posterior (B, D).
        z: Sample of the joint posterior (B, D).
    """

    loss: Tensor
    loss_sum: Tensor
    metrics: dict[str, Tensor]
    mu: Tensor
    logvar: Tensor
    z: Tensor


class LatentOutput(NamedTuple):
    """Latent samples and the Gaussian they come from.

    Attributes:
        z: Samples: (N, B, D), or (N * B, D) sample-major if flattened; (n, D) from the prior.
        mu: Mean (B, D).
        logvar: Log-variance (B, D).
        one_latent_space: True: all modalities share the latent space.
    """

    z: Tensor
    mu: Tensor
    logvar: Tensor
    one_latent_space: bool = True


class JMVAE(nn.Module):
    """Joint Multimodal VAE.

    Args:
        config: Hyperparameters; `input_dims` is needed wherever a default network is.
        encoders: Your unimodal encoders by modality, ``(B, *shape) -> GaussianParams`` or a plain pair.
        decoders: Your decoders by modality, ``(B, D) -> (B, *shape)``: means for normal and laplace, logits
            for bernoulli and categorical.
        joint_encoder: Your joint encoder, ``{modality: (B, *shape)} -> GaussianParams``; if it is not given and
            your encoders are, it is built from copies of them.
        networks: Kinds and sizes of the networks that stand in for what is not given.
        kernels: Who computes KL terms, products of experts and likelihoods; see `model_config.ModelSection`.

    Attributes:
        config: The configuration, with `custom_architectures` naming the networks that were given.
        modalities: Names of the modalities, in the order of `input_dims` (else of the networks given).
        likelihoods: Observation model per modality.
        rescale_factors: Weight of each modality's reconstruction term.

    Raises:
        ConfigError: Networks and configuration do not fit together.
    """

    def __init__(
        self,
        config: JMVAEConfig,
        encoders: dict[str, nn.Module] | None = None,
        decoders: dict[str, nn.Module] | None = None,
        joint_encoder: nn.Module | None = None,
        networks: NetworksConfig | None = None,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__()
        self.kernels = kernels
        given = {"encoders": encoders, "decoders": decoders, "joint_encoder": joint_encoder}
        self.config = _with_custom_architectures(config, [key for key, value in given.items() if value is not None])
        encoders, decoders, joint_encoder = build_networks(
            config, networks, encoders=encoders, decoders=decoders, joint_encoder=joint_encoder
        )
        if not isinstance(joint_encoder, nn.Module):
            raise ConfigError(f"joint_encoder: a {type(joint_encoder).__name__} is not a torch.nn.Module")
        self.modalities = list(config.input_dims or encoders)
        if len(self.modalities) != config.n_modalities:
            raise ConfigError(f"n_modalities: {config.n_modalities}, but the networks are for {self.modalities}")
        config.check_modalities(self.modalities)
        if config.uses_likelihood_rescaling and config.rescale_factors is None and config.input_dims is None:
            raise ConfigError("uses_likelihood_rescaling: needs input_dims or rescale_factors")

        self.encoders = module_dict("encoders", encoders, self.modalities)
        self.decoders = module_dict("decoders", decoders, self.modalities)
        self.joint_encoder = joint_encoder
        distributions, parameters = config.decoders_dist or {}, config.decoder_dist_params or {}
        self.likelihoods = {
            name: build_likelihood(distributions.get(name, "normal"), parameters.get(name, {}))
            for name in self.modalities
        }
        self.rescale_factors = resolve_rescale_factors(config, self.modalities)

    @property
    def latent_dim(self) -> int:
        """Dimension D of the latent space."""
        return self.config.latent_dim

    # Training

    def recompute_activations(self) -> list[str]:
        """Keep less of a forward pass for its backward pass, and compute it again there: see `recomputation`.

        Returns:
            Names of the networks, of the user's, that keep everything, because they have buffers.
        """
        networks: dict[str, nn.Module] = {
            **{f"encoders.{name}": encoder for name, encoder in self.encoders.items()},
            **{f"decoders.{name}": decoder for name, decoder in self.decoders.items()},
            "joint_encoder": self.joint_encoder,
        }
        for name, module in self.joint_encoder.named_modules(prefix="joint_encoder"):
            if isinstance(module, EncoderBranch):
                networks[f"{name}.encoder"] = module.encoder
        # Last those of the user's that are inside of a joint encoder.
        return [name for name, network in networks.items() if not recompute(network)]

    def forward(
        self,
        inputs: dict[str, Tensor],
        annealing: float | Tensor = 1.0,
        noise: Tensor | KeyedNoise | None = None,
        check_inputs: bool = True,
    ) -> JMVAEOutput:
        """The training objective on a batch of complete samples (see `objective`).

        Args:
            inputs: Every modality, (B, *shape), floating point. B may be 0: all results and gradients are
                then 0.
            annealing: Weight of all KL terms.
            noise: Standard normal noise (B, D) of the posterior sample, or its key; drawn from torch's generator
                if None.
            check_inputs: Check the values too (on a GPU this waits for the device); shapes are always
                checked.

        Raises:
            DataError: Names, dtypes, shapes or values of the inputs are wrong.
            ConfigError: A user-supplied network returns wrong shapes.
        """
        batch_size = self._check(inputs, self.modalities, check_inputs)
        # First the encoders, so that a wrong one is named, and not the copy of it in a joint encoder.
        unimodal = {name: self._encode_unimodal(name, inputs[name]) for name in self.modalities}
        joint = self._encode_joint(inputs)
        if noise is None:
            noise = torch.randn_like(joint.mu)
        if not isinstance(noise, KeyedNoise):
            check_noise(noise, joint.mu.shape)
        z_BD, kl_prior_B, kl_unimodal_MB = gaussian_kl_terms(
            *joint,
            torch.stack([unimodal[name].mu for name in self.modalities]),
            torch.stack([unimodal[name].logvar for name in self.modalities]),
            noise,
            kernels=self.kernels,
        )
        terms = ObjectiveTerms(
            self._log_likelihoods(z_BD, inputs, self.modalities),
            kl_prior_B,
            dict(zip(self.modalities, kl_unimodal_MB.unbind(0), strict=True)),
        )
        loss_sum, metrics = combine(
            terms, self.rescale_factors, alpha=self.config.alpha, beta=self.config.beta, annealing=annealing
        )
        return JMVAEOutput(loss_sum / max(batch_size, 1), loss_sum, metrics, joint.mu, joint.logvar, z_BD)

    # Inference

    def encode(
        self,
        inputs: dict[str, Tensor],
        cond_mod: Modalities = "all",
        N: int = 1,
        return_mean: bool = False,
        flatten: bool = False,
        *,
        prior_expert: bool = False,
        mask: dict[str, Tensor] | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        check_inputs: bool = True,
        with_gradient: bool = False,
    ) -> LatentOutput:
        """Sample the posterior given all modalities or some of them.

        All modalities go through the joint encoder, one through its own encoder, and other subsets through
        the product of their unimodal posteriors.

        Args:
            inputs: The modalities to condition on, (B, *shape) each; others are ignored.
            cond_mod: "all", a name, or several names in any order.
            N: Samples per data point.
            return_mean: Return the posterior mean N times in place of samples.
            flatten: Merge the first two dimensions of z, sample-major: row n * B + b.
            prior_expert: Multiply products of unimodal posteriors (also of a single one) by the prior N(0,
                I). The joint encoder's posterior stays as it is.
            mask: For incomplete data: bool (B,) per modality, True where the sample has it (everywhere for
                modalities left out). Each sample is encoded from what it has of `cond_mod`; from nothing at
                all, its posterior is the prior. Absent values may be anything, NaN included.
            noise: Standard normal noise (N, B, D); drawn if None.
            generator: Generator to draw the noise from, on the model's device.
            check_inputs: Check the values too; shapes are always checked.
            with_gradient: Let gradients flow to weights and inputs (unless torch.no_grad() is in force).

        Raises:
            ConfigError: `cond_mod` names no or unknown modalities, or N is below 1.
            DataError: Names, dtypes, shapes or values of the inputs are wrong.
        """
        names = self._select("cond_mod", cond_mod)
        _check_count("N", N)
        with _gradient(with_gradient):
            if not mask:
                self._check(inputs, names, check_inputs)
                posterior = self._posterior(inputs, names, prior_expert)
            else:
                posterior = self._masked_posterior(inputs, names, mask, prior_expert, check_inputs)
            shape_NBD = (N, *posterior.mu.shape)
            if return_mean:
                z = posterior.mu.expand(shape_NBD)
            else:
                z = sample(posterior, draw_noise(noise, shape_NBD, posterior.mu, generator))
            return LatentOutput(z.flatten(0, 1) if flatten else z, posterior.mu, posterior.logvar)

    def decode(
        self,
        z: Tensor | LatentOutput | JMVAEOutput,
        modalities: Modalities = "all",
        *,
        with_gradient: bool = False,
    ) -> dict[str, Tensor]:
        """Decode latents: means for normal and laplace, logits for bernoulli and categorical.

        `model.likelihoods[name].mean` turns the result into the expected value of x.

        Args:
            z: (*leading, D) with any leading dimensions, or an output that holds such a `z`.
            modalities: "all", a name, or several names.
            with_gradient: See `encode`.

        Returns:
            (*leading, *shape) per modality, in the model's order.
        """
        latents = z.z if isinstance(z, (LatentOutput, JMVAEOutput)) else z
        require_tensor("z", latents)
        if latents.ndim == 0 or latents.shape[-1] != self.latent_dim:
            raise ConfigError(f"z: shape {tuple(latents.shape)} does not end in latent_dim={self.latent_dim}")
        names = self._select("modalities", modalities)
        with _gradient(with_gradient):
            return self._decode(latents, names)

    def predict(
        self,
        inputs: dict[str, Tensor],
        cond_mod: Modalities = "all",
        gen_mod: Modalities = "all",
        N: int = 1,
        flatten: bool = False,
        *,
        with_gradient: bool = False,
        **encode_options: Any,
    ) -> dict[str, Tensor]:
        """Generate modalities from others: `encode`, then `decode`.

        Args:
            inputs: The modalities to condition on.
            cond_mod: What to condition on; see `encode`.
            gen_mod: What to generate: "all", a name, or several names.
            N: Samples per data point.
            flatten: Merge the first two dimensions, sample-major.
            with_gradient: See `encode`.
            **encode_options: Other options of `encode`, e.g. `return_mean`, `mask`, `generator`.

        Returns:
            (N, B, *shape) per modality, or (N * B, *shape) if flattened; decoder outputs as in `decode`.
        """
        latent = self.encode(inputs, cond_mod, N, flatten=flatten, with_gradient=with_gradient, **encode_options)
        return self.decode(latent, gen_mod, with_gradient=with_gradient)

    @torch.no_grad()
    def generate_from_prior(
        self, n: int, *, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> LatentOutput:
        """Sample the prior N(0, I): `z`, `mu` and `logvar`, each (n, D), on the model's device.

        Args:
            n: Number of samples, at least 1.
            noise: Standard normal noise (n, D); drawn if None.
            generator: Generator to draw the noise from, on the model's device.

        Raises:
            ConfigError: `n` is below 1, or the model has no parameters.
        """
        _check_count("n", n)
        parameter = next(self.parameters(), None)
        if parameter is None:
            raise ConfigError(
                "generate_from_prior: the networks have no parameters, so that device and dtype of the samples are "
                "not known; decode latents of your own instead"
            )
        zeros = parameter.new_zeros((n, self.latent_dim))
        zeros = zeros.to(computation_dtype((zeros,)))
        return LatentOutput(draw_noise(noise, (n, self.latent_dim), zeros, generator), zeros, zeros.clone())

    def compute_joint_nll(
        self,
        inputs: dict[str, Tensor],
        K: int = 1000,
        batch_size_K: int = 100,
        *,
        modalities: Modalities = "all",
        **options: Any,
    ) -> Tensor:
        """-log p(x) in nats, (B,), by importance sampling with the joint posterior as proposal.

        ``log p(x) ~ log 1/K sum_k p(x | z_k) p(z_k) / q(z_k | x)`` (Burda et al. 2016, equation 8).

        Args:
            inputs: Every modality, (B, *shape).
            K: Importance samples per data point; the estimate is above -log p(x) on average and falls with K.
            batch_size_K: At most this many draws are decoded together.
            modalities: The modalities whose joint likelihood is estimated; the proposal always sees all.
            **options: `memory_budget_bytes`, `noise`, `generator`, `check_inputs`: see `estimate_nlls`, which
                also returns standard errors.
        """
        groups = {"joint": self._select("modalities", modalities)}
        return self._nlls(inputs, groups, "all", K, batch_size_K, options)["joint"]

    def compute_marginal_nll(
        self,
        inputs: dict[str, Tensor],
        modality: str,
        K: int = 1000,
        batch_size_K: int = 100,
        *,
        proposal: Literal["joint", "unimodal"] = "joint",
        **options: Any,
    ) -> Tensor:
        """-log p(x_m) of one modality in nats, (B,), by importance sampling.

        ``log p(x_m) ~ log 1/K sum_k p(x_m | z_k) p(z_k) / q(z_k)``, with z_k from the proposal q.

        Args:
            inputs: The modality (B, *shape), and for the joint proposal all others too.
            modality: Its name.
            K: Importance samples per data point.
            batch_size_K: At most this many draws are decoded together.
            proposal: q: `joint` is the joint posterior q(z | x_1 ... x_M), which Suzuki et al. (2016) report;
                `unimodal` is q(z | x_m), which does not look at the other modalities. Both estimate the same
                number; where the model's posteriors fit badly, they need different K.
            **options: `memory_budget_bytes`, `noise`, `generator`, `check_inputs`: see `estimate_nlls`.

        Raises:
            ConfigError: The modality or the proposal is unknown.
        """
        if proposal not in ("joint", "unimodal"):
            raise ConfigError(f"proposal: {proposal!r} is not allowed; it must be 'joint' or 'unimodal'")
        (name,) = self._select("modality", [modality])
        given = "all" if proposal == "joint" else name
        return self._nlls(inputs, {name: [name]}, given, K, batch_size_K, options)[name]

    def compute_cond_nll(
        self,
        inputs: dict[str, Tensor],
        cond_mod: Modalities,
        pred_mods: Modalities,
        K: int = 1000,
        batch_size_K: int = 100,
        *,
        prior_expert: bool = False,
        **options: Any,
    ) -> dict[str, Tensor]:
        """-log p(x_m | x_cond) in nats, {m: (B,)}, by sampling z from the posterior given `cond_mod`.

        ``log p(x_m | x_cond) ~ log 1/K sum_k p(x_m | z_k)`` with ``z_k ~ q(z | x_cond)``.

        Args:
            inputs: The modalities to condition on and to predict, (B, *shape) each.
            cond_mod: What to condition on; see `encode`.
            pred_mods: What to predict: "all", a name, or several names.
            K: Samples per data point.
            batch_size_K: At most this many draws are decoded together.
            prior_expert: See `encode`.
            **options: `memory_budget_bytes`, `noise`, `generator`, `check_inputs`: see `estimate_nlls`.
        """
        groups = {name: [name] for name in self._select("pred_mods", pred_mods)}
        options |= {"conditional": True, "prior_expert": prior_expert}
        return self._nlls(inputs, groups, cond_mod, K, batch_size_K, options)

    @torch.no_grad()
    def estimate_nlls(
        self,
        inputs: dict[str, Tensor],
        groups: dict[str, list[str]],
        proposal: Modalities = "all",
        *,
        conditional: bool = False,
        K: int = 1000,
        batch_size_K: int | None = None,
        memory_budget_bytes: int | None = None,
        prior_expert: bool = False,
        noise: DrawNoise | KeyedNoise | None = None,
        generator: torch.Generator | None = None,
        check_inputs: bool = True,
    ) -> dict[str, NLLEstimate]:
        """Negative log-likelihoods of several groups of modalities from the same draws, with standard errors.

        With z_1 ... z_K from the posterior q given the modalities `proposal`, it is ``-log 1/K sum_k w_k``, with
        ``w_k = p(x_group | z_k) p(z_k) / q(z_k)``, or with ``w_k = p(x_group | z_k)`` if `conditional`. Terms
        are computed in the model's precision and added up in float64.

        Args:
            inputs: The modalities of `proposal` and of all groups, (B, *shape) each.
            groups: Names of the modalities whose joint likelihood is wanted, by any key.
            proposal: Whose posterior the draws come from; see `encode`.
            conditional: Estimate -log p(x_group | x_proposal), not -log p(x_group).
            K: Draws per data point.
            batch_size_K: At most this many draws are decoded together; None: as many as the budget permits.
            memory_budget_bytes: About how much memory decoding may take; None: 4 MiB on a CPU, whose caches
                that suits, 1 GiB elsewhere. A single latent is always decoded, whatever it takes.
            prior_expert: See `encode`.
            noise: Where standard normal noise comes from. A key: draw k of sample b is noise of the step
                `global_step + k` and of `rows[b]`, which depends on no chunk, batch or rank. A function: it
                gets a range of draws and returns (n, B, D). None: drawn from `generator`; the result then
                depends on the chunks.
            generator: Generator to draw the noise from, on the model's device; None: torch's own.
            check_inputs: Check the values too; shapes are always checked.

        Raises:
            ConfigError: A group or the proposal names no or unknown modalities, or a number is below 1.
            DataError: Names, dtypes, shapes or values of the inputs are wrong.
        """
        given = self._select("proposal", proposal)
        groups = {key: self._select(f"groups.{key}", names) for key, names in groups.items()}
        predicted = [name for name in self.modalities if any(name in group for group in groups.values())]
        self._check(inputs, [name for name in self.modalities if name in given + predicted], check_inputs)
        _check_count("K", K)
        for key, value in (("batch_size_K", batch_size_K), ("memory_budget_bytes", memory_budget_bytes)):
            if value is not None:
                _check_count(key, value)
        posterior = self._posterior(inputs, given, prior_expert)

        def log_likelihoods(z_KBD: Tensor, block: slice) -> dict[str, Tensor]:
            return self._log_likelihoods(z_KBD, {name: inputs[name][block] for name in predicted}, predicted)

        return estimate_from_draws(
            posterior,
            groups,
            log_likelihoods,
            DecodingChunks(self.decoders, predicted, memory_budget_bytes, batch_size_K, posterior.mu.device),
            K=K,
            conditional=conditional,
            noise=noise,
            generator=generator,
        )

    def _nlls(
        self,
        inputs: dict[str, Tensor],
        groups: dict[str, list[str]],
        proposal: Modalities,
        K: int,
        batch_size_K: int,
        options: dict[str, Any],
    ) -> dict[str, Tensor]:
        """`estimate_nlls` without the errors, in the precision of the model."""
        estimates = self.estimate_nlls(inputs, groups, proposal, K=K, batch_size_K=batch_size_K, **options)
        dtype = computation_dtype(tuple(inputs[name] for group in groups.values() for name in group))
        return {key: estimate.nll.to(dtype) for key, estimate in estimates.items()}

    # Parts

    def _select(self, key: str, names: Modalities) -> list[str]:
        """The named modalities in the model's order."""
        if isinstance(names, str):
            names = self.modalities if names == "all" else [names]
        if not isinstance(names, Iterable):
            raise ConfigError(f"{key}: {names!r} is neither a name nor several; the modalities are {self.modalities}")
        wanted = list(names)
        unknown = [name for name in wanted if name not in self.modalities]
        if unknown or not wanted:
            what = f"unknown modality {unknown[0]!r}" if unknown else "names no modality"
            raise ConfigError(f"{key}: {what}; the modalities are {self.modalities}")
        return [name for name in self.modalities if name in wanted]

    def _check(self, inputs: dict[str, Tensor], required: list[str], values: bool) -> int:
        batch_size = check_structure(inputs, self.modalities, required, self.config.input_dims)
        if values:
            check_values({name: inputs[name] for name in required}, self.likelihoods)
        return batch_size

    def _encode_unimodal(self, name: str, x: Tensor) -> GaussianParams:
        return call_encoder(f"encoders.{name}", self.encoders[name], x, self.latent_dim)

    def _encode_joint(self, inputs: dict[str, Tensor]) -> GaussianParams:
        ordered = {name: inputs[name] for name in self.modalities}
        return call_joint_encoder("joint_encoder", self.joint_encoder, ordered, self.latent_dim)

    def _posterior(self, inputs: dict[str, Tensor], names: list[str], prior_expert: bool) -> GaussianParams:
        """Posterior of complete samples given the modalities `names`."""
        if len(names) == len(self.modalities):
            return self._encode_joint(inputs)
        experts = [self._encode_unimodal(name, inputs[name]) for name in names]
        if len(experts) == 1 and not prior_expert:
            return experts[0]
        mus_MBD, logvars_MBD = (torch.stack(tensors) for tensors in zip(*experts, strict=True))
        product = product_of_experts(mus_MBD, logvars_MBD, prior_expert=prior_expert, kernels=self.kernels)
        return GaussianParams(*product)

    def _masked_posterior(
        self,
        inputs: dict[str, Tensor],
        names: list[str],
        mask: dict[str, Tensor],
        prior_expert: bool,
        check_inputs: bool,
    ) -> GaussianParams:
        """Posterior of every sample given those of the modalities `names` that it has."""
        batch_size = self._check(inputs, names, values=False)
        self._select("mask", mask)
        present = {name: presence(name, mask, inputs[name]) for name in names}
        if check_inputs:
            check_values({name: inputs[name] for name in names}, self.likelihoods, present)
        # Absent values become 0 before the networks: NaN there would spread through batch statistics.
        filled = {name: torch.where(per_sample(present[name], inputs[name]), inputs[name], 0.0) for name in names}
        experts = [self._encode_unimodal(name, filled[name]) for name in names]
        mus_MBD, logvars_MBD = (torch.stack(tensors) for tensors in zip(*experts, strict=True))
        mask_BM = torch.stack([present[name] for name in names], dim=1)
        mu_BD, logvar_BD = product_of_experts(mus_MBD, logvars_MBD, mask_BM, prior_expert, kernels=self.kernels)
        if len(names) == len(self.modalities) and batch_size > 0:
            joint, complete_B1 = self._encode_joint(filled), mask_BM.all(1, keepdim=True)
            mu_BD = torch.where(complete_B1, joint.mu, mu_BD)
            logvar_BD = torch.where(complete_B1, joint.logvar, logvar_BD)
        return GaussianParams(mu_BD, logvar_BD)

    def _decode(self, z: Tensor, names: list[str]) -> dict[str, Tensor]:
        """Decode (*leading, D); decoders see one leading dimension, as convolutions want it."""
        flat, leading = z.reshape(-1, self.latent_dim), z.shape[:-1]
        decoded = {}
        for name in names:
            shape = self.config.input_dims[name] if self.config.input_dims else None
            output = call_decoder(f"decoders.{name}", self.decoders[name], flat, shape)
            decoded[name] = output.reshape(*leading, *output.shape[1:])
        return decoded

    def _log_likelihoods(self, z: Tensor, inputs: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        """log p(x_m | z) per modality, each with the leading shape of z, which ends in B."""
        values = {}
        for name in names:
            # One after the other: without gradients, only one modality at a time is decoded in memory.
            decoded = self._decode(z, [name])[name]
            shape, target_shape = tuple(decoded.shape[z.ndim - 1 :]), tuple(inputs[name].shape[1:])
            if shape != target_shape:
                raise ConfigError(f"decoders.{name}: returned samples of shape {shape}, the data has {target_shape}")
            values[name] = log_prob(self.likelihoods[name], decoded, inputs[name], self.kernels)
        return values


def _with_custom_architectures(config: JMVAEConfig, given: list[str]) -> JMVAEConfig:
    """`config` that names the networks given; refuses one that promises networks which were not given."""
    missing = [key for key in config.custom_architectures if key not in given]
    if missing:
        raise ConfigError(f"custom_architectures: names {missing[0]!r}, but JMVAE was built without that argument")
    return dataclasses.replace(config, custom_architectures=given)


def _gradient(is_wanted: bool) -> torch.set_grad_enabled:
    """Gradients as asked for, but never against the caller's torch.no_grad()."""
    return torch.set_grad_enabled(is_wanted and torch.is_grad_enabled())


def _check_count(key: str, value: int) -> None:
    if not is_integer(value) or value < 1:
        raise ConfigError(f"{key}: {value!r} is not allowed; it must be an integer and at least 1")

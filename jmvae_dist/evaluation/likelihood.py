"""How probable held-out samples are: the objective's terms, and likelihoods by importance sampling.

All noise is keyed by (seed, position of the sample in the data set), so that the results depend neither on
the batch size nor on the number of ranks nor on the order of the samples, except for the order of
floating-point sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from jmvae_dist.evaluation.metrics import EvaluationBatch, Metric, device_of, standard_error
from jmvae_dist.evaluation.posteriors import Subset, subset_name
from jmvae_dist.kernels.noise import KeyedNoise, Stream, normal_noise
from jmvae_dist.model import JMVAE
from jmvae_dist.model.importance import NLLEstimate
from jmvae_dist.model.objective import metric_keys

Proposal = Literal["joint", "unimodal", "both"]
# An estimate that fewer draws than this carry is counted as one not to trust.
FEW_EFFECTIVE_SAMPLES = 5.0


# What comes with an estimate, as `companion_key` names it: its error over the choice of samples, and what tells how
# far that can be trusted.
STANDARD_ERROR = "stderr"
DIAGNOSTICS = ("monte_carlo_stderr", "effective_samples", "unreliable_fraction")


def companion_key(key: str, suffix: str) -> str:
    """Key of a quantity derived from another one: joint_nll -> joint_nll_<suffix>, a/m -> a_<suffix>/m."""
    quantity, slash, modality = key.partition("/")
    return f"{quantity}_{suffix}{slash}{modality}"


class ElboTerms(Metric):
    """The terms of the training objective at full annealing, with one latent per sample.

    Results are those of the model's forward pass, and `log_likelihood/<m>`: log p(x_m | z) at that latent, not
    rescaled.
    """

    def __init__(self, model: JMVAE, seed: int) -> None:
        self._model, self._seed = model, seed
        keys = [*metric_keys(model.modalities), *(f"log_likelihood/{name}" for name in model.modalities)]
        super().__init__(dict.fromkeys(keys, ()), device_of(model))

    def update(self, batch: EvaluationBatch) -> None:
        noise = normal_noise(self._seed, 0, batch.rows, self._model.latent_dim, Stream.EVALUATION_LATENT)
        metrics = self._model(batch.inputs, annealing=1.0, noise=noise, check_inputs=False).metrics
        sums = {key: value.double() for key, value in metrics.items()}
        for name in self._model.modalities:
            factor = self._model.rescale_factors[name]
            sums[f"log_likelihood/{name}"] = -sums[f"loss/reconstruction/{name}"] / factor
        self._add({**sums, "samples": batch.rows.new_tensor(len(batch))})

    def results(self) -> dict[str, float]:
        return {key: self._mean(key) for key in self.sums if key != "samples"}


@dataclass(frozen=True)
class Estimand:
    """What `ImportanceSampling` estimates from the draws of one posterior.

    Attributes:
        groups: Modalities by result key.
        proposal: The modalities whose posterior the draws come from.
        conditional: -log p(x_group | x_proposal) in place of -log p(x_group).
    """

    groups: dict[str, list[str]]
    proposal: Subset
    conditional: bool = False


def joint_estimand(model: JMVAE) -> Estimand:
    """-log p(x_1 ... x_M), and -log p(x_m) from the same draws of the joint posterior."""
    groups = {"joint_nll": model.modalities, **{f"marginal_nll/{name}": [name] for name in model.modalities}}
    return Estimand(groups, tuple(model.modalities))


def marginal_estimands(model: JMVAE, proposal: Proposal) -> list[Estimand]:
    """-log p(x_m) from draws of the joint posterior, of the modality's own posterior, or both."""
    estimands = []
    if proposal in ("joint", "both"):
        groups = {f"marginal_nll/{name}": [name] for name in model.modalities}
        estimands.append(Estimand(groups, tuple(model.modalities)))
    if proposal in ("unimodal", "both"):
        estimands += [Estimand({f"marginal_nll_unimodal/{name}": [name]}, (name,)) for name in model.modalities]
    return estimands


def conditional_estimands(model: JMVAE, sources: Sequence[Subset]) -> list[Estimand]:
    """-log p(x_m | x_S) for the subsets S given, and every modality m outside of S."""
    estimands = []
    for subset in sources:
        targets = [name for name in model.modalities if name not in subset]
        groups = {f"conditional_nll/{name}/from_{subset_name(subset)}": [name] for name in targets}
        estimands.append(Estimand(groups, subset, conditional=True))
    return estimands


class ImportanceSampling(Metric):
    """Negative log-likelihoods by sampling K latents per sample.

    Per estimand `key`, in nats:

    - `key`: the mean over the samples,
    - `key_stderr`: its standard error over the choice of the samples,
    - `key_monte_carlo_stderr`: its standard error over the draws, sqrt(sum_i stderr_i^2) / n (`NLLEstimate`),
    - `key_effective_samples`: mean effective number of draws, and `key_unreliable_fraction`: the share of samples
      with fewer than FEW_EFFECTIVE_SAMPLES, whose estimates are too high by an unknown amount.

    Suffixes go to the first part of the key, as in `marginal_nll_stderr/image`. And `joint_nll_samples`: K, without
    which none of them says much.
    """

    _PARTS = ("squared", "monte_carlo_variance", "effective_samples", "unreliable_fraction")

    def __init__(
        self,
        model: JMVAE,
        estimands: Sequence[Estimand],
        *,
        seed: int,
        num_draws: int,
        memory_budget_bytes: int | None = None,
    ) -> None:
        self._model, self._estimands, self._seed, self._num_draws = model, list(estimands), seed, num_draws
        self._memory_budget_bytes = memory_budget_bytes
        self._keys = [key for estimand in estimands for key in estimand.groups]
        assert len(set(self._keys)) == len(self._keys)
        keys = [name for key in self._keys for name in (key, *(companion_key(key, part) for part in self._PARTS))]
        super().__init__(dict.fromkeys(keys, ()), device_of(model))

    def update(self, batch: EvaluationBatch) -> None:
        for estimand in self._estimands:
            estimates = self._model.estimate_nlls(
                batch.inputs,
                estimand.groups,
                estimand.proposal,
                conditional=estimand.conditional,
                K=self._num_draws,
                memory_budget_bytes=self._memory_budget_bytes,
                noise=KeyedNoise(self._seed, 0, batch.rows, Stream.IMPORTANCE),
                check_inputs=False,
            )
            for key, estimate in estimates.items():
                self._add({companion_key(key, part) if part else key: sum_ for part, sum_ in _sums(estimate).items()})
        self.sums["samples"] += len(batch)

    def results(self) -> dict[str, float]:
        count = self.sums["samples"].item()
        results: dict[str, float] = {"joint_nll_samples": self._num_draws}
        for key in self._keys:
            results[key] = self._mean(key)
            if count > 1:
                squares = self.sums[companion_key(key, "squared")].item()
                results[companion_key(key, STANDARD_ERROR)] = standard_error(self.sums[key].item(), squares, count)
            if self._num_draws > 1:
                variance = self.sums[companion_key(key, "monte_carlo_variance")].item()
                results[companion_key(key, "monte_carlo_stderr")] = math.sqrt(variance) / count
            for part in ("effective_samples", "unreliable_fraction"):
                results[companion_key(key, part)] = self._mean(companion_key(key, part))
        return results


def _sums(estimate: NLLEstimate) -> dict[str, Tensor]:
    return {
        "": estimate.nll.sum(),
        "squared": estimate.nll.square().sum(),
        "monte_carlo_variance": estimate.stderr.square().sum(),
        "effective_samples": estimate.effective_samples.sum(),
        # Written so that NaN counts as unreliable.
        "unreliable_fraction": (~(estimate.effective_samples >= FEW_EFFECTIVE_SAMPLES)).sum(),
    }

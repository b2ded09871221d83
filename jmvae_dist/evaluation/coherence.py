"""Coherence across modalities: does what is generated from some modalities show the class of the sample?

Shape suffixes: B samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from jmvae_dist.evaluation.metrics import EvaluationBatch, Metric, PriorSamples, device_of
from jmvae_dist.evaluation.posteriors import Subset, expected_value, subset_name, subsets_of
from jmvae_dist.model import JMVAE

# Expected values of a modality (B, *shape) -> logits (B, num_classes).
Classify = Callable[[Tensor], Tensor]


class Accuracy(Metric):
    """Is a categorical modality predicted correctly from the other modalities?

    The prediction decodes the posterior mean and takes the most probable class; it is compared with the most
    probable class of the target. A target with leading dimensions (several variables per sample) counts as
    the fraction of its variables that are right. Of texts, the fraction of all tokens counts, without padding: most
    places of most texts are padding, which is easily predicted.

    Results: `accuracy/<target>/from_<modality>`, and `accuracy/<target>/from_others` where there are several others;
    none for a model without categorical modalities.

    Args:
        model: The model.
        padding_ids: The token that fills up texts, by modality (`data.views.padding_ids`); such a modality is
            categorical, (length, vocabulary). Those that are not named have no padding.
    """

    def __init__(self, model: JMVAE, padding_ids: Mapping[str, int] | None = None) -> None:
        self._model = model
        self._predictions = {
            f"accuracy/{target}/from_{source}": (target, names)
            for target in model.modalities
            if model.likelihoods[target].name == "categorical"
            for source, names in _sources(model, target).items()
        }
        targets = {target for target, _ in self._predictions.values()}
        self._padding_ids = {name: number for name, number in (padding_ids or {}).items() if name in targets}
        # In the order of the model: ranks add up what they have in this order.
        counts = [_tokens_key(name) for name in model.modalities if name in self._padding_ids]
        super().__init__(dict.fromkeys([*self._predictions, *counts], ()), device_of(model))

    def update(self, batch: EvaluationBatch) -> None:
        for name, padding_id in self._padding_ids.items():
            self._add({_tokens_key(name): (batch.inputs[name].argmax(-1) != padding_id).sum()})
        for key, (target, sources) in self._predictions.items():
            mean = batch.posteriors.given(sources).mu
            predicted = most_probable(self._model.decode(mean, target)[target])
            truth = batch.inputs[target].argmax(-1)
            correct = agreement(predicted, truth)
            if target in self._padding_ids:
                correct = correct[truth != self._padding_ids[target]]
            self._add({key: correct.flatten(1).mean(1).sum() if correct.ndim > 1 else correct.sum()})
        self.sums["samples"] += len(batch)

    def results(self) -> dict[str, float]:
        results = {}
        for key, (target, _) in self._predictions.items():
            # Without any token, 0 / 0: there is nothing that could be right.
            count = self.sums[_tokens_key(target) if target in self._padding_ids else "samples"]
            results[key] = (self.sums[key] / count).item()
        return results


def _tokens_key(target: str) -> str:
    return f"tokens/{target}"


def most_probable(logits: Tensor) -> Tensor:
    """Most probable class of logits (*, num_classes): float64 (*), NaN where a logit is NaN or infinite.

    Of such logits `argmax` would make class 0 or another one, which is right now and then. -inf is allowed: it is the
    logit of a class that does not occur.
    """
    return torch.where((logits < torch.inf).all(-1), logits.argmax(-1).double(), torch.nan)


def agreement(classes: Tensor, others: Tensor) -> Tensor:
    """1 where two arrays of classes are equal, 0 where they differ, NaN where one is NaN; float64."""
    return torch.where(classes.isnan() | others.isnan(), torch.nan, (classes == others).double())


def _sources(model: JMVAE, target: str) -> dict[str, list[str]]:
    others = [name for name in model.modalities if name != target]
    return {name: [name] for name in others} | ({"others": others} if len(others) > 1 else {})


class Coherence(Metric):
    """Agreement of generated modalities with the class of the sample, as a classifier sees it.

    Results:

    - `coherence/<t>/from_<S>`: fraction of samples whose modality t, generated from one draw of the posterior given
      the modalities S (every subset of the others), is recognised as the sample's class. A modality that *is* the
      label needs no classifier: its most probable class counts.
    - `coherence_by_size/<n>`: mean of these over all t and all S with n members.
    - `coherence/joint`: fraction of samples of the prior in whose modalities the same class is recognised everywhere
      (for two or more modalities that can be classified).
    - `classifier_accuracy/<m>`: the classifier on the held-out data itself, which bounds all of these.

    Args:
        model: The model.
        classifiers: By modality.
        label: The modality of the model that holds the label; None where the label is not one of them.
        seed: Of the draws.
        max_subset_size: Larger subsets are left out; None: none is.
    """

    def __init__(
        self,
        model: JMVAE,
        classifiers: Mapping[str, Classify],
        *,
        label: str | None,
        seed: int,
        max_subset_size: int | None = None,
    ) -> None:
        self._model, self._classifiers, self._label, self._seed = model, dict(classifiers), label, seed
        self._targets = [name for name in model.modalities if name == label or name in classifiers]
        # Without the largest one, which leaves nothing to generate.
        self._subsets = [
            subset
            for subset in subsets_of(model.modalities, max_subset_size)
            if any(target not in subset for target in self._targets)
        ]
        self._pairs = [
            (target, subset) for subset in self._subsets for target in self._targets if target not in subset
        ]
        self._classified = [name for name in self._targets if name != label]
        keys = [
            *(_coherence_key(target, subset) for target, subset in self._pairs),
            *(f"classifier_accuracy/{name}" for name in self._classified),
            *("coherence/joint", "prior_samples"),
        ]
        super().__init__(dict.fromkeys(keys, ()), device_of(model))

    @property
    def uses_prior(self) -> bool:
        return len(self._targets) > 1

    def update(self, batch: EvaluationBatch) -> None:
        assert batch.labels is not None
        for name in self._classified:
            correct = agreement(self._classes(name, batch.inputs[name]), batch.labels)
            self._add({f"classifier_accuracy/{name}": correct.sum()})
        for subset in self._subsets:
            z = batch.posteriors.sample(subset, batch.rows, self._seed)
            for target in (target for target in self._targets if target not in subset):
                generated = self._classes(target, expected_value(self._model, z, target))
                self._add({_coherence_key(target, subset): agreement(generated, batch.labels).sum()})
        self.sums["samples"] += len(batch)

    def update_prior(self, samples: PriorSamples) -> None:
        classes_TB = torch.stack([self._classes(name, samples.expected[name]) for name in self._targets])
        self._add({"coherence/joint": agreement(classes_TB, classes_TB[0]).prod(0).sum()})
        self.sums["prior_samples"] += len(samples.z)

    def results(self) -> dict[str, float]:
        results = {_coherence_key(target, subset): 0.0 for target, subset in self._pairs}
        results |= {f"classifier_accuracy/{name}": 0.0 for name in self._classified}
        results = {key: self._mean(key) for key in results}
        sizes = sorted({len(subset) for _, subset in self._pairs})
        for size in sizes:
            values = [results[_coherence_key(*pair)] for pair in self._pairs if len(pair[1]) == size]
            results[f"coherence_by_size/{size}"] = sum(values) / len(values)
        if self.uses_prior:
            results["coherence/joint"] = (self.sums["coherence/joint"] / self.sums["prior_samples"]).item()
        return results

    def _classes(self, name: str, values: Tensor) -> Tensor:
        """As of `most_probable`, (B,)."""
        return most_probable(values if name == self._label else self._classifiers[name](values))


def _coherence_key(target: str, subset: Sequence[str] | Subset) -> str:
    return f"coherence/{target}/from_{subset_name(subset)}"

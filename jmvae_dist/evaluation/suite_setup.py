"""What the evaluation suite is to measure, on which data and by whose networks; and whether it can."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from jmvae_dist.data.loader import EvaluationLoader
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.store import RemoteAccess
from jmvae_dist.data.views import View
from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.errors import ConfigError
from jmvae_dist.evaluation.classifier import FEATURES, Classifier
from jmvae_dist.evaluation.likelihood import Proposal
from jmvae_dist.evaluation.metrics import device_of
from jmvae_dist.model import JMVAE

# With more modalities, somebody has to say which subsets are worth their time.
_MOST_MODALITIES_FOR_ALL_SUBSETS = 8
# Samples for which a user's network is tried: more than one, which many shapes fit.
_TRIED = 2


@dataclass(frozen=True)
class SuiteOptions:
    """How to measure.

    Attributes:
        metrics: Names; see docs/evaluation.md.
        seed: Of all noise, and of the order in which classifiers see their data.
        batch_size: Samples per forward pass on one rank.
        num_draws: K of the likelihoods.
        memory_budget_bytes: For decoding the draws; None: a default by device.
        marginal_proposal: Whose posterior the draws of `marginal_nll` come from.
        max_subset_size: Larger subsets of modalities are left out; None: none is.
        num_prior_samples: For coherence and Frechet distance.
        num_probe_samples: At most this many training samples are used for the probes.
        classifier_steps: Optimizer steps of a classifier.
    """

    metrics: tuple[str, ...]
    seed: int = 0
    batch_size: int = 256
    num_draws: int = 1000
    memory_budget_bytes: int | None = None
    marginal_proposal: Proposal = "both"
    max_subset_size: int | None = None
    num_prior_samples: int = 10_000
    num_probe_samples: int = 10_000
    classifier_steps: int = 2000


@dataclass(frozen=True)
class SuiteData:
    """What to measure on.

    Attributes:
        manifest: Held-out shards.
        views: The model's modalities in them.
        label: The one-hot modality with the classes, one of `views` or another one; None: there is none.
        train_manifest: Training shards, for classifiers and probes; None: there are none.
        train_views, train_label: As above, in the training shards.
        threads: Threads that decode images.
        access: How remote shards are read.
    """

    manifest: Manifest
    views: tuple[View, ...]
    label: View | None = None
    train_manifest: Manifest | None = None
    train_views: tuple[View, ...] = ()
    train_label: View | None = None
    threads: int = 1
    access: RemoteAccess | None = None

    def all_views(self) -> list[View]:
        """Of the held-out shards, with the label."""
        return with_label(self.views, self.label)


@dataclass
class SuiteNetworks:
    """Networks that judge, by modality.

    Attributes:
        classifiers: (B, *shape) -> logits (B, num_classes); the user's, to which the suite adds its own.
        extractors: (B, *shape) -> features (B, F), the user's.
        folder: Where the suite's own classifiers are kept; None: nowhere.
    """

    classifiers: dict[str, nn.Module] = field(default_factory=dict)
    extractors: dict[str, nn.Module] = field(default_factory=dict)
    folder: Path | None = None


def find_label(manifest: Manifest, views: Sequence[View], name: str | None) -> tuple[View | None, str]:
    """The modality with the classes, and if there is none, why.

    Args:
        manifest: Shards.
        views: The model's modalities in them.
        name: The user's choice; None: the only modality of encoding `cls`.

    Raises:
        ConfigError: The user's choice does not exist or does not hold one class per sample.
    """
    candidates = [modality for modality in manifest.modalities if modality.encoding == "cls"]
    if name is None and len(candidates) != 1:
        found = ", ".join(modality.name for modality in candidates)
        return None, f"the data has no class labels (encoding cls){'' if not found else ' but several: ' + found}"
    seen = {view.name: view for view in views}
    for modality in manifest.modalities:
        if modality.name == (name or candidates[0].name):
            view = seen.get(modality.name) or View(modality)
            if len(view.shape) != 1:
                raise ConfigError(f"--label: {modality.name} has shape {list(view.shape)}, not one class per sample")
            return view, ""
    available = ", ".join(modality.name for modality in manifest.modalities)
    raise ConfigError(f"--label: no modality {name!r}; the shards have {available}")


def with_label(views: Sequence[View], label: View | None) -> list[View]:
    """The views, and the label's where it is not one of them."""
    return [*views, *([label] if label is not None and label.name not in {view.name for view in views} else [])]


def unsupported(
    name: str, model: JMVAE, data: SuiteData, networks: SuiteNetworks, max_subset_size: int | None
) -> str:
    """Why a metric cannot be computed; empty if it can."""
    has_label = data.label is not None
    can_train = has_label and data.train_manifest is not None
    needs_training = "needs the training shards (--train-manifest)" if has_label else "needs class labels (--label)"
    many = len(model.modalities) > _MOST_MODALITIES_FOR_ALL_SUBSETS and max_subset_size is None
    if name in ("coherence", "probe") and many:
        return f"has {2 ** len(model.modalities)} subsets of modalities to look at; set --max-subset-size"
    if name == "accuracy" and not any(item.name == "categorical" for item in model.likelihoods.values()):
        return "needs a categorical modality, and the model has none"
    if name == "coherence" and not (can_train or (has_label and networks.classifiers)):
        return needs_training
    if name == "probe" and not can_train:
        return needs_training
    if name == "frechet" and not (can_train or networks.classifiers or networks.extractors):
        return f"{needs_training}, or a feature extractor (--feature-extractor)"
    return ""


def check_networks(model: JMVAE, data: SuiteData, networks: SuiteNetworks, metrics: Sequence[str]) -> None:
    """Try the user's networks on two samples, before anything that takes time.

    Raises:
        ConfigError: One of them fails, or does not return what these metrics need of it.
    """
    for network in (*networks.classifiers.values(), *networks.extractors.values()):
        network.to(device_of(model))
    if "coherence" in metrics and data.label is not None:
        wanted = (_TRIED, data.label.shape[0])
        for name, network in networks.classifiers.items():
            logits = _try(model, f"--classifier {name}", network, name)
            if tuple(logits.shape) != wanted:
                raise ConfigError(
                    f"--classifier {name}: for {_TRIED} samples it returns {tuple(logits.shape)}, and logits of the "
                    f"label {data.label.name} are {wanted}"
                )
    if "frechet" in metrics:
        for option, given in (("--classifier", networks.classifiers), ("--feature-extractor", networks.extractors)):
            for name, network in given.items():
                features = _try(model, f"{option} {name}", features_of(network), name)
                if features.ndim != 2 or len(features) != _TRIED:
                    raise ConfigError(
                        f"{option} {name}: for {_TRIED} samples it returns {tuple(features.shape)}, and features are "
                        f"({_TRIED}, number of features)"
                    )


def _try(model: JMVAE, option: str, function: Callable[[Tensor], Tensor], name: str) -> Tensor:
    """What a user's network makes of two samples of zeros.

    Raises:
        ConfigError: It fails, or does not return numbers.
    """
    assert model.config.input_dims is not None
    values = torch.zeros(_TRIED, *model.config.input_dims[name], device=device_of(model))
    try:
        with torch.no_grad():
            output = function(values)
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            f"{option}: it cannot take values {tuple(values.shape)} ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(f"{option}: it returns {kind}, not a tensor of floating point")
    return output


def features_of(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """A network's method `features`, else the network itself: another attribute of that name may be a part of it."""
    features = getattr(network, "features", None)
    return features if inspect.ismethod(features) else network


def feature_size(model: JMVAE, name: str, features: Callable[[Tensor], Tensor]) -> int:
    """Number of features that a function makes of one sample of the modality `name`."""
    if isinstance(getattr(features, "__self__", None), Classifier):
        return FEATURES
    return _try(model, f"features of {name}", features, name).shape[1]


def make_loader(
    manifest: Manifest, views: Sequence[View], data: SuiteData, options: SuiteOptions, collectives: Collectives
) -> EvaluationLoader:
    """This rank's share of all samples of `manifest`, read as `data` and `options` say."""
    return EvaluationLoader(
        manifest,
        rank=collectives.rank,
        world_size=collectives.world_size,
        batch_size=options.batch_size,
        views=views,
        threads=data.threads,
        access=data.access,
    )

"""Small classifiers of single modalities, which judge what the model generates.

A classifier is trained on the training shards in a fixed order from fixed initial weights, in one thread: it is a
function of the data, the settings below and the platform. It is saved, and reused where all of these are the same.

Shape suffixes: B samples, F features.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jmvae_dist.data.loader import TrainLoader
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.plan import SamplePlan, default_lanes
from jmvae_dist.data.store import RemoteAccess
from jmvae_dist.data.views import View
from jmvae_dist.errors import DataError
from jmvae_dist.files import writing_atomic

logger = logging.getLogger(__name__)

FEATURES = 128
_VERSION = 1
_BATCH_SIZE = 128
_PEAK_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 1e-2
_STATISTICS_BATCHES = 8
_SMALLEST_SIDE = 7
_MOST_CHANNELS = 128


class Classifier(nn.Module):
    """One modality (B, *shape) -> logits (B, num_classes); `features` gives the layer before, (B, FEATURES).

    Pictures go through convolutions that halve them until they are about 7 pixels wide, anything else through one
    hidden layer. Inputs are standardised per element by statistics of the training data.

    Args:
        shape: Of one sample.
        num_classes: Of the label.
        is_picture: Whether neighbours in the last two dimensions are neighbours, and not ids of tokens.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...], num_classes: int, is_picture: bool) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))
        layers = _convolutions(shape) if is_picture else [nn.Flatten(), nn.Linear(math.prod(shape), 256), nn.ReLU()]
        size = nn.Sequential(*layers)(torch.zeros(1, *shape)).flatten(1).shape[1]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, FEATURES)."""
        return self.body((x.to(self.offset.dtype) - self.offset) * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class _Channels(nn.Module):
    """(B, H, W) or (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1) if x.ndim == 3 else x


def _convolutions(shape: tuple[int, ...]) -> list[nn.Module]:
    side = min(shape[-2:])
    channels = [1 if len(shape) == 2 else shape[0], 16]
    # The first halves larger pictures only: small ones have no pixel to spare.
    layers: list[nn.Module] = [_Channels(), nn.Conv2d(channels[0], 16, 5, 2 if side > 14 else 1, 2), nn.ReLU()]
    side = math.ceil(side / 2) if side > 14 else side
    while side > _SMALLEST_SIDE or len(channels) < 3:
        channels.append(min(_MOST_CHANNELS, 2 * channels[-1]))
        layers += [nn.Conv2d(channels[-2], channels[-1], 3, 2, 1), nn.ReLU()]
        side = math.ceil(side / 2)
    return layers


def describe(view: View, label: View, manifest: Manifest, num_steps: int, seed: int) -> dict[str, Any]:
    """Everything that a classifier depends on, as JSON values."""
    return {
        "version": _VERSION,
        "modality": view.to_json(),
        "label": label.to_json(),
        "fingerprint": manifest.fingerprint,
        "num_steps": num_steps,
        "seed": seed,
    }


def digest_of(description: dict[str, Any]) -> str:
    """Part of the file name: 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]


def make_classifier(view: View, label: View, is_picture: bool) -> Classifier:
    """One with initial weights that depend on the shapes alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier(tuple(view.shape), label.shape[-1], is_picture)


def train_classifier(
    view: View,
    label: View,
    manifest: Manifest,
    *,
    is_picture: bool,
    num_steps: int,
    seed: int,
    device: torch.device,
    access: RemoteAccess | None = None,
) -> Classifier:
    """Train one, with AdamW and a cosine learning rate.

    Args:
        view: The modality.
        label: One-hot classes.
        manifest: Training shards.
        is_picture: As of `Classifier`.
        num_steps: Optimizer steps of 128 samples.
        seed: Of the order of the samples.
        device: Where to train.
        access: How remote shards are read.

    Returns:
        In evaluation mode, on `device`.

    Raises:
        DataError: A sample cannot be read, or the training diverged.
    """
    model = make_classifier(view, label, is_picture).to(device)
    plan = SamplePlan(
        manifest.shard_sizes,
        global_batch_size=_BATCH_SIZE,
        lanes=default_lanes(_BATCH_SIZE),
        shuffle_window=8192,
        seed=seed,
    )
    loader = TrainLoader(manifest, plan, rank=0, world_size=1, views=[view, label], access=access)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    with _single_thread(), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        _standardise(
            model, [batch.inputs[view.name] for batch in loader.iterate(0, min(_STATISTICS_BATCHES, num_steps))]
        )
        loss = torch.zeros(())
        for batch in loader.iterate(0, num_steps):
            classes = batch.inputs[label.name].argmax(-1).to(device)
            loss = nn.functional.cross_entropy(model(batch.inputs[view.name].to(device)), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    if not torch.isfinite(loss):
        raise DataError(
            f"the classifier of {view.name} diverged: its values are extreme; give a classifier of your own"
        )
    return model.eval()


def _standardise(model: Classifier, batches: list[Tensor]) -> None:
    values = torch.cat(batches).double()
    deviation = values.std(0, correction=0)
    # Elements that hardly vary, like the border of pictures, must not be blown up.
    floor = 0.1 * values.std(correction=0)
    model.offset.copy_(values.mean(0))
    model.scale.copy_(1 / deviation.clamp(min=max(floor.item(), 1e-6)))


@contextmanager
def _single_thread() -> Iterator[None]:
    """Sums in another number of threads are rounded otherwise, which training would amplify."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def file_of(folder: Path, description: dict[str, Any]) -> Path:
    """Where a classifier is kept."""
    return folder / f"classifier-{digest_of(description)}.safetensors"


def save_classifier(model: Classifier, path: Path, description: dict[str, Any]) -> None:
    """Write the weights, with the description beside them.

    Raises:
        OSError: It cannot be written.
    """
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with writing_atomic(path) as file:
        file.write(save(state, {"description": json.dumps(description, sort_keys=True)}))


def load_classifier(model: Classifier, path: Path, description: dict[str, Any]) -> bool:
    """Fill `model` from a file; False, with a warning if the file is there, if it does not hold that classifier."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("description") != json.dumps(description, sort_keys=True):
                raise ValueError("it describes another classifier")
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:
        logger.warning("%s: cannot be used (%s); the classifier is trained anew", path, error)
        return False
    return True


def weights_vector(model: Classifier) -> Tensor:
    """All weights and buffers as one float32 vector on the CPU."""
    return torch.cat([tensor.detach().cpu().flatten() for tensor in _tensors(model)])


def load_weights_vector(model: Classifier, vector: Tensor) -> None:
    """Fill the model from `weights_vector` of an equal one."""
    sizes = [tensor.numel() for tensor in _tensors(model)]
    with torch.no_grad():
        for tensor, part in zip(_tensors(model), vector.split(sizes), strict=True):
            tensor.copy_(part.view_as(tensor))


def _tensors(model: Classifier) -> list[Tensor]:
    return list(itertools.chain(model.parameters(), model.buffers()))

"""Raw data whose values tell where they come from."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np

from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.sources.base import ArraySource


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def example_source(num_samples: int, split: str = "train") -> ArraySource:
    """Every value tells its sample and place: image[i] = i * 100 + 0..5, label[i] = i mod 12."""
    numbers = np.arange(num_samples, dtype=np.int64)
    image = (numbers[:, None] * 100 + np.arange(6)).astype(np.float32).reshape(-1, 2, 3)
    return ArraySource(
        name="example",
        split=split,
        modalities=(Modality("image", "float32", (2, 3)), Modality.classes("label", 12)),
        arrays={"image": image, "label": numbers % 12},
        rows=numbers,
        default_samples_per_shard=10,
        details={},
    )


def without_sums(manifest: Manifest) -> Manifest:
    """The same data without sums, which are checked shard by shard."""
    shards = [replace(shard, sums=None) for shard in manifest.shards]
    return Manifest.create(manifest.modalities, shards, manifest.source, manifest.path, manifest.format_version)

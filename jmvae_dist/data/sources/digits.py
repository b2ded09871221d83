"""scikit-learn's handwritten digits: 1,797 images of 8x8 pixels, shipped with the library, so no download."""

from __future__ import annotations

import numpy as np

from jmvae_dist.data.modality import Modality
from jmvae_dist.data.sources.base import ArraySource, split_rows
from jmvae_dist.errors import ConfigError


def load_digits_source(split: str, test_fraction: float, split_seed: int) -> ArraySource:
    """`image` uint8 [1, 8, 8] with values 0..16 (the model sees 0..1) and `label` (10 classes).

    Raises:
        ConfigError: scikit-learn is not installed, or the split settings are out of range.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("source 'digits' needs scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8)[:, None], digits.target.astype(np.int64)
    return ArraySource(
        name="digits",
        split=split,
        modalities=(Modality("image", "uint8", (1, 8, 8), scale=1 / 16), Modality.classes("label", 10)),
        arrays={"image": images, "label": labels},
        rows=split_rows(len(images), split, test_fraction, split_seed),
        default_samples_per_shard=256,
        details={"test_fraction": test_fraction, "split_seed": split_seed},
    )

"""MNIST and its relatives (Fashion-MNIST, KMNIST) in IDX files, plain or gzip."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from jmvae_dist.data.modality import Modality
from jmvae_dist.data.sources.base import ArraySource
from jmvae_dist.data.sources.files import input_files, read_plain_or_gzip
from jmvae_dist.errors import DataError

_UNSIGNED_BYTES = 0x08
_NUM_CLASSES = 10


def load_mnist_source(images_path: Path, labels_path: Path, split: str) -> ArraySource:
    """`image` uint8 [1, height, width] (the model sees 0..1) and `label` (10 classes).

    The user's files are the split; `split` only names it.

    Raises:
        ConfigError: a file cannot be opened.
        DataError: a file is not IDX, has another size than its header says, or the counts differ.
    """
    images = read_idx(images_path, num_dimensions=3)
    labels = read_idx(labels_path, num_dimensions=1)
    if len(images) != len(labels):
        raise DataError(f"{images_path} has {len(images)} images, but {labels_path} has {len(labels)} labels")
    if len(images) == 0 or 0 in images.shape:
        raise DataError(f"{images_path} holds no pixels")
    if labels.max() >= _NUM_CLASSES:
        raise DataError(f"{labels_path}: label {labels.max()} of row {labels.argmax()} is not in 0..9")
    shape = (1, *images.shape[1:])
    return ArraySource(
        name="mnist",
        split=split,
        modalities=(
            Modality("image", "uint8", shape, scale=1 / 255),
            Modality.classes("label", _NUM_CLASSES),
        ),
        arrays={"image": images[:, None], "label": labels.astype(np.int64)},
        rows=np.arange(len(images), dtype=np.int64),
        default_samples_per_shard=10_000,
        details={"files": input_files(images_path, labels_path)},
    )


def read_idx(path: Path, num_dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes as uint8 of `num_dimensions` dimensions; raises like the source."""
    content = read_plain_or_gzip(path)
    header_bytes = 4 + 4 * num_dimensions
    magic = int.from_bytes(content[:4], "big")
    expected_magic = _UNSIGNED_BYTES << 8 | num_dimensions
    if magic != expected_magic:
        raise DataError(
            f"{path}: magic 0x{magic:08x} is not 0x{expected_magic:08x} (IDX, unsigned bytes, "
            f"{num_dimensions} dimensions); were --images and --labels exchanged?"
        )
    if len(content) < header_bytes:
        raise DataError(f"{path}: {len(content)} bytes are too few for an IDX header")
    shape = struct.unpack_from(f">{num_dimensions}I", content, 4)
    expected_bytes = header_bytes + int(np.prod(shape, dtype=object))
    if len(content) != expected_bytes:
        raise DataError(f"{path}: {len(content)} bytes, but its header {list(shape)} means {expected_bytes}")
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)

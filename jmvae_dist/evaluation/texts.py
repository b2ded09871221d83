"""Texts of the built-in tokenizer, read back from the one-hot rows or probabilities of their tokens."""

from __future__ import annotations

import numpy as np

from jmvae_dist.data.tokenizers import ByteTokenizer
from jmvae_dist.model.likelihoods import Likelihood


def is_byte_text(likelihood: Likelihood, shape: tuple[int, ...]) -> bool:
    """Whether a modality is text of the tokenizer `bytes`: nothing else has its odd number of categories.

    Args:
        likelihood: Of the modality.
        shape: Of one sample.
    """
    return likelihood.name == "categorical" and len(shape) == 2 and shape[-1] == ByteTokenizer.vocabulary


def most_probable_text(values: np.ndarray) -> str:
    """The text of the most probable token at every place of one sample.

    Args:
        values: One-hot rows or probabilities, (L, 257).

    Returns:
        Padding is left out wherever it stands; bytes that are no UTF-8 become U+FFFD.
    """
    tokens = values.argmax(-1)
    return bytes(tokens[tokens != ByteTokenizer.padding_id].tolist()).decode("utf-8", "replace")

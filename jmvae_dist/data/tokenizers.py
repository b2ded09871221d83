"""Tokenizers: a text as a fixed number of token ids.

The built-in ones have names, which a manifest may state. A user's own class is named in the run configuration
only (`data.tokenizers`): nothing read from a data set can run code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jmvae_dist.errors import DataError


class Tokenizer(Protocol):
    """What a tokenizer has to offer. The ids of a text must depend on the text alone.

    Attributes:
        vocabulary: number of ids, 0 .. vocabulary - 1, with the one for padding.
        padding_id: what fills the places after the end of a text.
    """

    vocabulary: int
    padding_id: int

    def encode(self, text: str) -> Sequence[int]:
        """The ids of a text, in order, without padding; those beyond the fixed length are cut off.

        Raises:
            ValueError: the text is bad.
        """
        ...


class ByteTokenizer:
    """One id per byte of the UTF-8 text; id 256 is padding."""

    vocabulary = 257
    padding_id = 256

    def encode(self, text: str) -> Sequence[int]:
        return list(text.encode("utf-8"))


TOKENIZERS: dict[str, type[Tokenizer]] = {"bytes": ByteTokenizer}


def token_ids(tokenizer: Tokenizer, text: str, length: int) -> np.ndarray:
    """The ids of a text, cut or padded to `length`: int64 (length,).

    Raises:
        DataError: the tokenizer refused the text, or returned something that is not an id of its vocabulary.
    """
    ids = np.full(length, tokenizer.padding_id, dtype=np.int64)
    try:
        encoded = np.asarray(tokenizer.encode(text)[:length])
    except ValueError as error:
        raise DataError(f"{type(tokenizer).__name__}: {error}") from error
    if encoded.size == 0:
        return ids
    if encoded.ndim != 1 or encoded.dtype.kind not in "iu":
        raise DataError(f"{type(tokenizer).__name__}.encode returned {encoded.dtype} {list(encoded.shape)}, not ids")
    if encoded.min() < 0 or encoded.max() >= tokenizer.vocabulary:
        raise DataError(
            f"{type(tokenizer).__name__}.encode returned an id outside its vocabulary of {tokenizer.vocabulary}"
        )
    ids[: len(encoded)] = encoded
    return ids

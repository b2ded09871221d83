"""Networks for texts: one-hot tokens (L, V) in, logits of every token out.

Decoders give all tokens at once, each with a categorical distribution of its own given z: p(x | z) = prod_l p(x_l |
z), so that everything that tokens have in common goes through z. Padding is a token like any other.

Shape suffixes: B batch, D latent dimension, E embedding dimension, H attention heads, L tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from jmvae_dist.model.convolutional import ConvDecoder, ConvTrunk
from jmvae_dist.model.recomputation import Blocks

# Standard deviation of the initial position embeddings (Radford et al. 2018).
_POSITION_SCALE = 0.02
_HIDDEN_PER_EMBEDDING = 4


class _Embedding(nn.Linear):
    """(B, L, V) -> (B, L, E); a product and not a look-up, so that soft targets have an embedding too."""

    def __init__(self, vocabulary: int, embedding_dim: int) -> None:
        super().__init__(vocabulary, embedding_dim, bias=False)
        # Rows of a look-up have this variance; that of a linear layer, 1 / (3 V), assumes V inputs that are not 0.
        nn.init.normal_(self.weight)


class TextTrunk(nn.Module):
    """(B, L, V) -> (B, F): embedding, then convolutions along the text (see `ConvTrunk`)."""

    def __init__(self, shape: tuple[int, ...], embedding_dim: int, activation: str, **convolutions: Any) -> None:
        super().__init__()
        length, vocabulary = shape
        self.embedding = _Embedding(vocabulary, embedding_dim)
        self.convolutions = ConvTrunk((embedding_dim, length), activation=activation, **convolutions)
        self.num_features = self.convolutions.num_features

    def forward(self, x: Tensor) -> Tensor:
        return self.convolutions(rearrange(self.embedding(x), "b l e -> b e l"))


class TextDecoder(nn.Module):
    """z (B, D) -> logits (B, L, V): convolutions along the text, then a linear layer per token."""

    def __init__(
        self, latent_dim: int, shape: tuple[int, ...], embedding_dim: int, activation: str, **convolutions: Any
    ) -> None:
        super().__init__()
        length, vocabulary = shape
        self.convolutions = ConvDecoder(latent_dim, (embedding_dim, length), activation=activation, **convolutions)
        self.logits = nn.Linear(embedding_dim, vocabulary)

    def forward(self, z: Tensor) -> Tensor:
        return self.logits(rearrange(self.convolutions(z), "b e l -> b l e"))


class _TransformerBlock(nn.Module):
    """Self-attention over all tokens, then a linear-activation-linear layer per token; norms come first.

    Without dropout: its random numbers would depend on the rank.
    """

    def __init__(self, embedding_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(embedding_dim)
        self.queries_keys_values = nn.Linear(embedding_dim, 3 * embedding_dim)
        self.attention_output = nn.Linear(embedding_dim, embedding_dim)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(embedding_dim),
            nn.Linear(embedding_dim, _HIDDEN_PER_EMBEDDING * embedding_dim),
            nn.GELU(),
            nn.Linear(_HIDDEN_PER_EMBEDDING * embedding_dim, embedding_dim),
        )

    def forward(self, x_BLE: Tensor) -> Tensor:
        projected = self.queries_keys_values(self.attention_norm(x_BLE))
        q_BHLE, k_BHLE, v_BHLE = rearrange(projected, "b l (three h e) -> three b h l e", three=3, h=self.heads)
        attended = rearrange(F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE), "b h l e -> b l (h e)")
        x_BLE = x_BLE + self.attention_output(attended)
        return x_BLE + self.feed_forward(x_BLE)


class _Transformer(nn.Module):
    """Adds what each position is, then blocks and a last norm: (B, L, E) -> (B, L, E)."""

    def __init__(self, length: int, embedding_dim: int, layers: int, heads: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(length, embedding_dim).normal_(std=_POSITION_SCALE))
        self.blocks = Blocks([[_TransformerBlock(embedding_dim, heads)] for _ in range(layers)])
        self.norm = nn.LayerNorm(embedding_dim)

    def forward(self, x_BLE: Tensor) -> Tensor:
        return self.norm(self.blocks(x_BLE + self.positions))


class TransformerTrunk(nn.Module):
    """(B, L, V) -> (B, E): embedding, transformer, mean over the tokens."""

    def __init__(self, shape: tuple[int, ...], embedding_dim: int, layers: int, heads: int) -> None:
        super().__init__()
        length, vocabulary = shape
        self.embedding = _Embedding(vocabulary, embedding_dim)
        self.transformer = _Transformer(length, embedding_dim, layers, heads)
        self.num_features = embedding_dim

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer(self.embedding(x)).mean(dim=1)


class TransformerDecoder(nn.Module):
    """z (B, D) -> logits (B, L, V): every position starts from the same linear map of z."""

    def __init__(self, latent_dim: int, shape: tuple[int, ...], embedding_dim: int, layers: int, heads: int) -> None:
        super().__init__()
        length, vocabulary = shape
        self.features = nn.Linear(latent_dim, embedding_dim)
        self.transformer = _Transformer(length, embedding_dim, layers, heads)
        self.logits = nn.Linear(embedding_dim, vocabulary)

    def forward(self, z: Tensor) -> Tensor:
        return self.logits(self.transformer(rearrange(self.features(z), "b e -> b 1 e")))

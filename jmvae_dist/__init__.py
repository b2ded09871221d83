"""Pretrain Joint Multimodal VAEs on a cluster: exact data order, sharded checkpoints, bit-exact resume."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jmvae_dist.model_config import JMVAEConfig

if TYPE_CHECKING:
    from jmvae_dist.checkpoint.export import load_model
    from jmvae_dist.model import JMVAE

__version__ = "0.1.0"
__all__ = ["JMVAE", "JMVAEConfig", "__version__", "load_model"]


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that commands which need no model do not wait for torch.
    if name == "JMVAE":
        from jmvae_dist.model import JMVAE

        return JMVAE
    if name == "load_model":
        from jmvae_dist.checkpoint.export import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

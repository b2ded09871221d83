"""A forward pass of a run's model that knows shapes and computes no values, on any machine and for any size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from jmvae_dist.config import RunConfig
from jmvae_dist.distributed.engine import ForwardPass
from jmvae_dist.model import JMVAE
from jmvae_dist.model_config import JMVAEConfig
from jmvae_dist.training.setup import resolve_networks


@dataclass(frozen=True)
class FakePass:
    """A training forward pass with everything it needs.

    Args:
        model: In the run's precision.
        inputs: By modality, (B, *shape).
        noise: (B, latent_dim).
    """

    model: ForwardPass
    inputs: dict[str, Tensor]
    noise: Tensor

    def __call__(self) -> Tensor:
        """The summed loss, from which a backward pass can be taken."""
        loss_sum, _ = self.model(self.inputs, noise=self.noise, check_inputs=False)
        return loss_sum


@contextmanager
def fake_pass(config: RunConfig, model_config: JMVAEConfig, batch_size: int) -> Iterator[FakePass]:
    """Make the training pass of a run, to be taken inside of the block.

    Its tensors claim to be on a CPU: autocast does not know the meta device. A network of the user's that looks at
    values raises whatever it likes.

    Args:
        config: The run's.
        model_config: With the shapes of the data.
        batch_size: B.

    Raises:
        ConfigError: A network cannot be made.
    """
    assert model_config.input_dims is not None
    with FakeTensorMode():
        model = fake_model(config, model_config)
        inputs = {name: torch.empty(batch_size, *shape) for name, shape in model_config.input_dims.items()}
        noise = torch.empty(batch_size, model_config.latent_dim)
        yield FakePass(model, inputs, noise)


def fake_model(config: RunConfig, model_config: JMVAEConfig) -> ForwardPass:
    """The run's model in its precision, without values; called under a fake tensor mode."""
    model = JMVAE(model_config, networks=resolve_networks(config, model_config), kernels="reference")
    if config.training.activation_checkpointing:
        model.recompute_activations()
    return ForwardPass(model, config.training.precision, "cpu")

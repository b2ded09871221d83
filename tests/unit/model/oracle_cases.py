"""Reference cases of `tests/data/oracle`: their numbers, and a JMVAE with their networks and weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jmvae_dist.model import JMVAE, GaussianParams
from jmvae_dist.model_config import JMVAEConfig

FOLDER = Path(__file__).parents[2] / "data" / "oracle"
NAMES = sorted(path.stem for path in FOLDER.glob("m*.json"))
HIDDEN = 16


class TanhEncoder(nn.Module):
    def __init__(self, input_size: int, latent_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(input_size, HIDDEN)
        self.mu = nn.Linear(HIDDEN, latent_dim)
        self.lv = nn.Linear(HIDDEN, latent_dim)

    def forward(self, x: Tensor) -> GaussianParams:
        hidden = torch.tanh(self.fc(x.flatten(1)))
        return GaussianParams(self.mu(hidden), self.lv(hidden))


class TanhJointEncoder(TanhEncoder):
    def forward(self, inputs: dict[str, Tensor]) -> GaussianParams:  # type: ignore[override]
        return super().forward(torch.cat([tensor.flatten(1) for tensor in inputs.values()], dim=1))


class TanhDecoder(nn.Module):
    def __init__(self, latent_dim: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.fc = nn.Linear(latent_dim, HIDDEN)
        self.out = nn.Linear(HIDDEN, prod(shape))

    def forward(self, z: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(z))).unflatten(-1, self.shape)


@dataclass
class Case:
    """One reference case in the given dtype."""

    scalars: dict[str, Any]
    arrays: dict[str, Tensor]
    model: JMVAE

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {name: self.arrays[f"x/{name}"] for name in self.model.modalities}


def load_case(name: str, dtype: torch.dtype = torch.float32) -> Case:
    scalars = json.loads((FOLDER / f"{name}.json").read_text())
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: torch.from_numpy(file[key]).to(dtype) for key in file.files}
    shapes = {key: tuple(scalars["input_dims"][key]) for key in scalars["order"]}
    latent_dim = scalars["latent_dim"]
    config = JMVAEConfig(
        scalars["n_modalities"],
        latent_dim,
        shapes,
        decoders_dist=scalars["decoders_dist"],
        **scalars["config"],
    )
    model = JMVAE(
        config,
        encoders={key: TanhEncoder(prod(shape), latent_dim) for key, shape in shapes.items()},
        decoders={key: TanhDecoder(latent_dim, shape) for key, shape in shapes.items()},
        joint_encoder=TanhJointEncoder(sum(map(prod, shapes.values())), latent_dim),
    ).to(dtype)
    model.load_state_dict({key[2:]: value for key, value in arrays.items() if key.startswith("w/")})
    return Case(scalars, arrays, model)

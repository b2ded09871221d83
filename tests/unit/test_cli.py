"""What the verbs' command lines share."""

from __future__ import annotations

import pytest
import torch

from jmvae_dist.commands.cli import add_device_option, find_device, make_parser
from jmvae_dist.errors import ConfigError


def test_device_is_what_the_machine_has() -> None:
    parser = make_parser("verb", "")
    add_device_option(parser)
    has_gpu = torch.cuda.is_available()
    assert find_device(parser.parse_args([]).device) == ("cuda" if has_gpu else "cpu")
    assert find_device("cpu") == "cpu"
    if has_gpu:
        assert find_device("cuda") == "cuda"
        return
    with pytest.raises(ConfigError, match="--device: cuda is not available"):
        find_device("cuda")

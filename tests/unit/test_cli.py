"""What the verbs' command lines share."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from jmvae_dist.__main__ import main
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


def test_what_files_say_cannot_control_or_flood_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text('model: {"\\e[31mred": 1}')
    assert main(["train", "--config", str(config)]) == 2
    assert r"model.\x1b[31mred: unknown key" in capsys.readouterr().err
    config.write_text(f"model: {{latent_dim: {'x' * 100_000}}}")
    assert main(["train", "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert "model.latent_dim: xxx" in error
    assert len(error) < 11_000
    assert main(["train", f"--{chr(27)}"]) == 2
    assert chr(27) not in capsys.readouterr().err


def test_what_the_encoding_of_stdout_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["--version"]) == 0
    print("24.07 \u00b1 0.31", flush=True)  # as a verb would
    assert written.getvalue().endswith(b"24.07 \\xb1 0.31\n")

"""What training asks of torch.compile beyond its defaults."""

from __future__ import annotations

import pytest

from jmvae_dist.distributed.engine import compiler_options

VARIABLE = "TORCHINDUCTOR_CPP_WRAPPER"


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_users_choice_of_a_wrapper_is_left_alone(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert compiler_options("cpu") == {"cpp_wrapper": True}
    monkeypatch.setenv(VARIABLE, value)
    assert compiler_options("cpu") == {}


def test_programs_for_a_gpu_are_made_as_inductor_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert compiler_options("cuda") == {}

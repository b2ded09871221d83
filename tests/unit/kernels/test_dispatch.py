"""Which implementation runs, what is refused before it runs, and that torch.compile gets through."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from jmvae_dist import JMVAE, JMVAEConfig
from jmvae_dist.errors import ConfigError
from jmvae_dist.kernels import gaussian, reference
from jmvae_dist.kernels.gaussian import VARIABLE, choose, gaussian_kl_terms, product_of_experts
from jmvae_dist.kernels.noise import KeyedNoise
from jmvae_dist.model_config import ModelSection
from jmvae_dist.networks_config import NetworksConfig
from tests.unit.kernels.test_gaussian import random_gaussians

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed; pip install 'jmvae_dist[triton]'"
)


@pytest.fixture(autouse=True)
def _undecided(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a fresh process."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gaussian._log_once.cache_clear()
    gaussian._obstacle_to_triton.cache_clear()
    yield
    gaussian._log_once.cache_clear()
    gaussian._obstacle_to_triton.cache_clear()


class TestChoice:
    @needs_triton
    def test_by_device(self) -> None:
        assert choose("auto", "cpu") == "reference"
        assert choose("auto", "cuda") == "triton"
        assert choose("triton", "cuda") == "triton"

    def test_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert choose("auto", "cuda") == "reference"
        with pytest.raises(ConfigError, match="triton is not installed"):
            choose("triton", "cuda")

    def test_the_variable_goes_before_the_configuration(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert choose("reference", "cpu") == "reference"
        monkeypatch.setenv(VARIABLE, "compiled")
        assert choose("reference", "cpu") == "compiled"
        monkeypatch.setenv(VARIABLE, "fast")
        with pytest.raises(ConfigError, match=rf"{VARIABLE}: 'fast' is not allowed"):
            choose("reference", "cpu")

    def test_triton_on_a_cpu_is_refused(self) -> None:
        arguments = random_gaussians(1, 2, 3, dtype=torch.float32)
        with pytest.raises(ConfigError, match=r"model\.kernels: triton cannot be used: .*"):
            gaussian_kl_terms(*arguments, kernels="triton")

    def test_is_said_once(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "jmvae_dist"):
            for _ in range(3):
                gaussian_kl_terms(*random_gaussians(1, 2, 3))
        assert [record.getMessage()[:46] for record in caplog.records] == [
            "KL and products of experts on cpu: reference ("
        ]

    @pytest.mark.parametrize("value", ["fast", None, 1])
    def test_the_setting_is_checked(self, value: Any) -> None:
        with pytest.raises(ConfigError, match=r"model\.kernels: .* is not allowed"):
            ModelSection(kernels=value)


class TestCompiled:
    def test_equals_the_reference_and_leaves_small_sizes_to_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        gaussian._can_compile.cache_clear()
        calls: list[Any] = []
        compiled = gaussian._compiled
        monkeypatch.setattr(gaussian, "_compiled", lambda function: calls.append(function) or compiled(function))
        for batch_size in (2, 600, 500):
            leaves = [t.requires_grad_() for t in random_gaussians(3, batch_size, 80, dtype=torch.float32)]
            results = [gaussian_kl_terms(*leaves, kernels=kernels) for kernels in ("reference", "compiled")]
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
            gradients = [torch.autograd.grad(sum(r.sum() for r in result), leaves) for result in results]
            torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
        assert calls.count(reference.gaussian_kl_terms) == 2
        # Sizes are symbolic: one program for both, besides the one by which compiling was tried.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
        with torch.no_grad():
            results = [gaussian_kl_terms(*leaves, kernels=kernels) for kernels in ("reference", "compiled")]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)

    def test_falls_back_where_nothing_can_be_compiled(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(*arguments: Any) -> None:
            raise RuntimeError("no C++ compiler\nand more")

        monkeypatch.setattr(gaussian, "_compiled", lambda function: fail)
        gaussian._can_compile.cache_clear()
        arguments = random_gaussians(3, 600, 80, dtype=torch.float32)
        for _ in range(2):
            results = gaussian_kl_terms(*arguments, kernels="compiled")
        gaussian._can_compile.cache_clear()
        assert torch.equal(results[2], reference.gaussian_kl_terms(*arguments)[2])
        assert [record.getMessage() for record in caplog.records] == [
            "torch.compile does not work here (no C++ compiler); KL and products of experts: reference"
        ]

    @pytest.mark.parametrize("kernels", ["auto", "compiled"])
    def test_whole_model_in_one_graph(self, kernels: Any) -> None:
        config = JMVAEConfig(2, latent_dim=4, input_dims={"a": (5,), "b": (3,)})
        model = JMVAE(config, networks=NetworksConfig([8], [8], [8]), kernels=kernels)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for batch_size in (4, 6):
            inputs = {"a": torch.randn(batch_size, 5), "b": torch.randn(batch_size, 3)}
            noise = torch.randn(batch_size, 4)
            loss = compiled(inputs, noise=noise, check_inputs=False).loss
            loss.backward()
            torch.testing.assert_close(loss, model(inputs, noise=noise).loss)


class TestKeyedNoise:
    def test_equals_noise_given(self) -> None:
        key = KeyedNoise(3, 5, torch.tensor([7, 1, 4]), 2)
        mu, logvar, mus, logvars, _ = random_gaussians(2, 3, 5, dtype=torch.float32)
        for value, expected in zip(
            gaussian_kl_terms(mu, logvar, mus, logvars, key),
            gaussian_kl_terms(mu, logvar, mus, logvars, key.draw(5)),
            strict=True,
        ):
            assert torch.equal(value, expected)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3), r"mu_BD: shape \(3,\), expected \(B, D\)"),
        (0, [0.0], "mu_BD: a list is not a tensor"),
        (0, torch.zeros(4, 3, dtype=torch.int64), "mu_BD: torch.int64, expected"),
        (1, torch.zeros(4, 2), r"logvar_BD: shape \(4, 2\), expected \(4, 3\)"),
        (2, torch.zeros(2, 3, 4), r"mus_MBD: shape \(2, 3, 4\), expected \(2, 4, 3\)"),
        (3, torch.zeros(1, 4, 3), r"logvars_MBD: shape \(1, 4, 3\), expected \(2, 4, 3\)"),
        (3, torch.zeros(2, 4, 3, device="meta"), "logvars_MBD: on meta, but the first argument is on cpu"),
        (4, torch.zeros(4, 4), r"noise: shape \(4, 4\), expected \(4, 3\)"),
        (4, None, "noise: a NoneType is not a tensor"),
        (4, KeyedNoise(0, 0, torch.arange(3)), r"noise\.rows: shape \(3,\), expected \(4,\)"),
        (4, KeyedNoise(-1, 0, torch.arange(4)), "seed: -1 is not allowed"),
        (4, KeyedNoise(0, 0, torch.arange(4), 2**16), "stream: 65536 is not allowed"),
    ],
)
def test_wrong_arguments_are_named(position: int, value: Any, message: str) -> None:
    arguments: list[Any] = list(random_gaussians(2, 4, 3, dtype=torch.float32))
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        gaussian_kl_terms(*arguments)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, dtype=torch.bool), r"mask: shape \(3,\), expected \(2,\) or \(4, 2\)"),
        (torch.ones(2, 4, dtype=torch.bool), r"mask: shape \(2, 4\), expected \(2,\) or \(4, 2\)"),
        (torch.ones(2), r"mask: torch.float32, expected torch.bool"),
        ([True, False], "mask: a list is not a tensor"),
    ],
)
def test_wrong_masks_are_refused(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        product_of_experts(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3), mask)

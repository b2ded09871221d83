"""The arithmetic of benchmarks/scaling_model.py."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from tests.conftest import ROOT


def load() -> ModuleType:
    """The module by its path: benchmarks are scripts, not a package."""
    spec = importlib.util.spec_from_file_location("scaling_model", ROOT / "benchmarks" / "scaling_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


model = load()
GIGABYTE = 10**9
NETWORK = model.Network(bandwidth_bytes_per_s=GIGABYTE, latency_s=1e-3)


@pytest.mark.parametrize(
    ("algorithm", "ranks", "expected_s"),
    [
        ("ring", 2, 2 * (1 / 2 + 1e-3)),
        ("ring", 8, 2 * (7 / 8 + 7e-3)),
        ("tree", 8, 2 * 3 * (1 + 1e-3)),
        ("tree", 5, 2 * 3 * (1 + 1e-3)),
        ("pipelined tree", 8, 2 * (1 + 3e-3)),
        *((algorithm, 1, 0.0) for algorithm in model.ALGORITHMS),
    ],
)
def test_an_all_reduce_takes_what_its_algorithm_sends(algorithm: str, ranks: int, expected_s: float) -> None:
    whole = model.Collective("all_reduce", GIGABYTE)
    assert model.collective_s(whole, ranks, NETWORK, algorithm) == pytest.approx(expected_s)
    halves = [model.Collective(kind, GIGABYTE) for kind in ("reduce_scatter", "all_gather")]
    assert sum(model.collective_s(half, ranks, NETWORK, algorithm) for half in halves) == pytest.approx(expected_s)


def test_a_node_has_its_own_ring_before_its_link() -> None:
    fast = model.Network(bandwidth_bytes_per_s=10 * GIGABYTE, latency_s=0.0)
    whole = [model.Collective("all_reduce", GIGABYTE)]
    both_s = model.communication_s(whole, 4, 2, NETWORK, fast, "ring")
    assert both_s == pytest.approx(2 * (3 / 4 + 3e-3) + 0.1)
    assert model.communication_s(whole, 1, 2, NETWORK, fast, "tree") == pytest.approx(0.1)
    assert model.communication_s(whole, 1, 1, NETWORK, fast, "ring") == 0.0


def test_engines_send_what_zero_says() -> None:
    """Stages 1 and 2 as much as DDP, stage 3 half as much again (Rajbhandari et al. 2020, section 7)."""
    received = {
        engine: model.received_bytes(model.collectives_of(engine, 10**6), 2)
        for engine in ("ddp", "zero0", "zero1", "zero2", "zero3")
    }
    assert received["ddp"] == received["zero0"] == pytest.approx(4e6, rel=1e-4)
    assert received["zero1"] == received["zero2"] == pytest.approx(4e6, rel=1e-4)
    assert received["zero3"] == pytest.approx(6e6, rel=1e-4)


def test_overlap_lies_between_its_bounds() -> None:
    assert model.step_bounds_s(3.0, 2.0) == (3.0, 5.0)
    assert model.step_bounds_s(1.0, 2.0) == (2.0, 3.0)
    assert [model.overlap(3.0, 2.0, step_s) for step_s in (2.0, 3.0, 4.0, 5.0, 6.0)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert model.overlap(3.0, 0.0, 4.0) == 0.0


def test_computation_is_a_line_through_two_batch_sizes() -> None:
    assert model.compute_line((128, 3.0), (256, 5.0)) == pytest.approx((1.0, 2 / 128))
    assert model.compute_line((128, 5.0), (256, 4.0)) == (4.0, 0.0)
    assert model.compute_line((128, 1.0), (256, 4.0)) == pytest.approx((0.0, 4 / 256))

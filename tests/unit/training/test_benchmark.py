"""`jmvae-dist bench step`: how time is divided, arithmetic counted, and advice given. Nothing here is timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from jmvae_dist.commands.bench import main
from jmvae_dist.config import OptimizerSection, RunConfig
from jmvae_dist.data_config import DataSection
from jmvae_dist.errors import ConfigError
from jmvae_dist.model_config import ModelSection
from jmvae_dist.networks_config import NetworksConfig
from jmvae_dist.training.advice import RULES, StepFacts, advise
from jmvae_dist.training.arithmetic import Matrix, Product, count_arithmetic, time_products
from jmvae_dist.training.benchmark import PARTS, Stopwatch, split_steps
from jmvae_dist.training_config import TrainingSection
from tests.conftest import ROOT
from tests.unit.model import user_networks


def make_config(**training: Any) -> RunConfig:
    model = ModelSection(latent_dim=3, input_dims={"a": (5,), "b": (7,)}, networks=NetworksConfig([8], [8], [9]))
    training = {"global_batch_size": 24, "steps": 2, **training}
    return RunConfig("runs/none", DataSection("nowhere/manifest.json"), TrainingSection(**training), model)


def make_step(step_s: float, **more: float) -> dict[str, float]:
    parts = {"data wait": 0.1, "forward": 1.0, "backward": 2.0, "judging": 0.2, "optimizer": 0.4}
    return {"step": step_s, **parts, **more}


def test_typical_parts_add_up_to_the_typical_step() -> None:
    steps = [make_step(4.0 + 0.01 * number) for number in range(20)]
    steps[3] = make_step(9.0, forward=6.0)  # disturbed
    steps[9] = make_step(5.1, recording=1.0)
    probes = {
        "backward/gradient reduction": 0.3,
        "backward/weight gathering": 0.2,
        "optimizer/weight gathering": 0.5,
    }
    split = split_steps(steps, probes, record_every=10)
    assert list(split.parts) == list(PARTS)
    assert sum(part.typical_s for part in split.parts.values()) == pytest.approx(split.step.typical_s)
    assert sum(split.share(name) for name in PARTS) == pytest.approx(1.0)
    typical = {name: round(part.typical_s, 6) for name, part in split.parts.items() if name != "rest"}
    assert typical == {
        "data wait": 0.1,
        "forward": 1.0,
        "backward": 1.0,
        "gradient reduction": 0.6,
        "weight gathering": 0.6,
        "judging": 0.2,
        "optimizer": 0.2,
        "recording": 0.1,
    }
    assert split.step.typical_s == pytest.approx(4.2, abs=0.02)
    assert split.parts["rest"].typical_s == pytest.approx(0.4, abs=0.02)
    assert split.parts["gradient reduction"].p90_s == pytest.approx(0.6)


def test_the_stopwatch_times_what_it_watches_within_steps_only() -> None:
    class Worker:
        def work(self, value: int) -> int:
            return value + 1

    stopwatch, watched, other = Stopwatch(torch.device("cpu")), Worker(), Worker()
    stopwatch.watch(watched, work="forward")
    assert watched.work(1) == 2
    for _ in range(2):
        with stopwatch.step(), stopwatch.part("backward"), stopwatch.part("gradient reduction"):
            assert (watched.work(1), other.work(2)) == (2, 3)
    steps = stopwatch.read()
    inner = "backward/gradient reduction"
    assert [set(times) for times in steps] == [{"step", "backward", inner, f"{inner}/forward"}] * 2
    assert all(times["step"] >= times["backward"] >= times[inner] >= 0 for times in steps)
    assert stopwatch.read() == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_arithmetic_of_linear_layers_is_that_of_the_formula(precision: str) -> None:
    config = make_config(precision=precision)
    arithmetic = count_arithmetic(config, config.model.resolve({"a": (5,), "b": (7,)}), 24)
    first = 5 * 8 + 7 * 8 + 12 * 9  # of the encoders: nobody needs the gradients of the data
    others = 2 * (8 * 6) + 9 * 6 + 2 * (3 * 8) + 8 * 5 + 8 * 7
    assert arithmetic.flops == arithmetic.product_flops == 2 * 24 * (2 * first + 3 * others)
    assert {product.dtype for product in arithmetic.products} == {
        torch.bfloat16 if precision == "bf16" else torch.float32
    }


def test_convolutions_count_but_are_no_matrix_products() -> None:
    shapes = {"picture": (3, 16, 16), "b": (7,)}
    config = make_config()
    config.model.networks = NetworksConfig([8], [8], [9], modalities={"picture": {"kind": "conv", "channels": [8]}})
    config.model.input_dims = shapes
    arithmetic = count_arithmetic(config, config.model.resolve(shapes), 4)
    assert arithmetic.flops is not None
    assert 0 < arithmetic.product_flops < arithmetic.flops


def test_networks_that_need_values_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def looks_at_values(self: user_networks.Decoder, z: torch.Tensor) -> torch.Tensor:
        return self.layer(z).unflatten(-1, self.shape) * float(z.detach().sum())

    monkeypatch.setattr(user_networks.Decoder, "forward", looks_at_values)
    config = make_config()
    own = {"b": {"decoder": {"class_path": "tests.unit.model.user_networks.Decoder"}}}
    config.model.networks = NetworksConfig([8], [8], [9], modalities=own)
    arithmetic = count_arithmetic(config, config.model.resolve({"a": (5,), "b": (7,)}), 4)
    assert arithmetic.flops is None
    assert (arithmetic.problem or "").startswith("DataDependentOutputException: aten._local_scalar_dense")


def test_what_is_computed_again_counts_again() -> None:
    counts = []
    for recomputes in (False, True):
        config = make_config(activation_checkpointing=recomputes)
        counts.append(count_arithmetic(config, config.model.resolve({"a": (5,), "b": (7,)}), 24).product_flops)
    first, others = 5 * 8 + 7 * 8 + 12 * 9, 2 * (3 * 8)  # layers within blocks; heads are not computed again
    assert counts[1] - counts[0] == 2 * 24 * (first + others)


def test_products_of_any_layout_can_be_timed() -> None:
    left, right = Matrix((4, 6), (1, 4)), Matrix((6, 3), (3, 1))
    assert time_products({Product(left, right, torch.float32): 2}, torch.device("cpu")) > 0


def make_facts(shares: dict[str, float] | None = None, **changes: Any) -> StepFacts:
    """Facts against which no rule has anything to say, but for what is changed."""
    usual = dict.fromkeys(PARTS, 0.0) | {"forward": 0.4, "backward": 0.5, "optimizer": 0.1}
    facts = StepFacts(
        config=make_config(),
        shares=usual | (shares or {}),
        product_share=0.8,
        product_efficiency=0.95,
        world_size=2,
        ranks_of_node=2,
        threads=8,
        cores=8,
    )
    return replace(facts, **changes)


def test_nothing_is_advised_where_nothing_stands_out() -> None:
    assert advise(make_facts()) == []
    # On a GPU threads do not compute; a model of convolutions is not judged by its matrix products.
    assert advise(make_facts(threads=0, product_share=None, product_efficiency=None)) == []


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            make_facts({"data wait": 0.123}),
            ["data wait takes 12% of a step", "data.workers (now 0)", "decode_threads"],
        ),
        (make_facts({"gradient reduction": 0.3}), ["takes 30%", "training.global_batch_size", "fewer processes"]),
        (make_facts({"weight gathering": 0.3}), ["takes 30%", "training.engine: ddp"]),
        (make_facts({"optimizer": 0.25}), ["takes 25%", "global_batch_size", "zero1"]),
        (make_facts({"judging": 0.11}), ["takes 11%", "global_batch_size"]),
        (make_facts({"recording": 0.04}), ["takes 4%", "training.log_every_steps (now 10)"]),
        (make_facts({"rest": 0.2}), ["rest takes 20%", "training.profile_steps"]),
        (make_facts(product_share=0.5), ["for 40% of a step", "training.compile: model"]),
        (make_facts(product_efficiency=0.5), ["reach 50% of a large one's speed", "micro_batch_size"]),
        (make_facts(threads=4), ["4 thread(s) compute on 8 cores", "OMP_NUM_THREADS=4"]),
        (make_facts(threads=16), ["16 threads compute on 8 core(s)", "OMP_NUM_THREADS=4"]),
        (make_facts(cores=2.5), ["8 threads compute on 2.5 core(s)", "OMP_NUM_THREADS=1"]),
        (make_facts(cores=1.5), ["8 threads compute on 1.5 core(s)", "fewer processes per node"]),
    ],
)
def test_each_rule_names_its_number_and_a_knob(facts: StepFacts, expected: list[str]) -> None:
    (line,) = advise(facts)
    assert all(text in line for text in expected), line


def test_advice_fits_the_configuration() -> None:
    def only(facts: StepFacts, **changes: Any) -> str:
        (line,) = advise(replace(facts, config=replace(facts.config, **changes)))
        return line

    compiled = TrainingSection(global_batch_size=24, steps=2, compile="model")
    zero3 = TrainingSection(global_batch_size=24, steps=2, engine="zero3")
    clipping = TrainingSection(global_batch_size=24, steps=2, gradient_clip_norm=1.0)
    for training in (compiled, zero3):
        assert "training.compile" not in only(make_facts(product_share=0.5), training=training)
    assert "zero2" in only(make_facts({"weight gathering": 0.3}), training=zero3)
    assert "optimizer.fused" in only(make_facts({"optimizer": 0.25}), optimizer=OptimizerSection(fused=False))
    assert "gradient_clip_norm: null" in only(make_facts({"judging": 0.2}), training=clipping)


def test_what_is_worth_most_comes_first() -> None:
    lines = advise(make_facts({"recording": 0.05, "data wait": 0.5, "gradient reduction": 0.3}, threads=3))
    assert [line.split(" ")[0] for line in lines] == ["3", "data", "gradient", "recording"]
    assert len(RULES) >= len(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data.train_manifest", "nowhere/manifest.json"],
            r"data\.train_manifest: no manifest at nowhere/manifest\.json",
        ),
        (["--steps", "0"], "must be a whole number of at least 1"),
        (["--out", "/nowhere/at/all.json"], "--out"),
        (["--training.stps", "3"], r"did you mean steps\?"),
        (["--training.profile_steps", "[5, 4]"], r"training\.profile_steps: \[5, 4\] is not allowed"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["step", "--config", str(ROOT / "configs" / "digits.yaml"), *arguments])

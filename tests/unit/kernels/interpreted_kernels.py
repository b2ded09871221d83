"""The Triton kernels on a CPU, in Triton's interpreter, against the reference in float64.

Run by test_triton.py in a process of its own: triton looks at TRITON_INTERPRET=1 when it is imported.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from jmvae_dist.kernels import ops, reference, triton_gaussian
from jmvae_dist.kernels.benchmark import least_bytes
from jmvae_dist.kernels.gaussian import gaussian_kl_terms, product_of_experts
from jmvae_dist.kernels.noise import KeyedNoise
from jmvae_dist.model.likelihoods import Bernoulli, Laplace, Likelihood, Normal, log_prob

# (B, D, M): single elements, odd sizes, more experts than a power of 2, rows of several tiles, many experts.
SIZES = [(1, 1, 1), (1, 3, 2), (7, 5, 3), (67, 4, 1), (17, 33, 5), (3, 130, 16), (3, 530, 2), (9, 2, 17)]
# Rounding of gradients to the inputs' dtype; the interpreter cuts bfloat16 off where GPUs round it.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
Results = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN, so that an element which no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.ones(3).new_empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.clone()


def half_of_a_layer(tensor: Tensor) -> Tensor:
    """As one of the two heads that share a linear layer."""
    return torch.cat([torch.full_like(tensor, math.nan), tensor], dim=-1).chunk(2, dim=-1)[1]


def transposed(tensor: Tensor) -> Tensor:
    """Columns, not rows, lie next to each other."""
    return tensor.mT.clone().mT


def draw(size: tuple[int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """mu, logvar, mus, logvars, noise."""
    batch, dim, experts = size
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, dim)] * 2 + [(experts, batch, dim)] * 2 + [(batch, dim)]
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def differentiate(function: Callable[..., Results], inputs: list[Tensor], *others: object) -> list[Tensor]:
    """Results and gradients of the inputs, for gradients of the results that are neither 1 nor equal."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    results = function(*leaves, *others)
    generator = torch.Generator().manual_seed(99)
    grads = [torch.randn(result.shape, generator=generator).to(result.dtype) for result in results]
    return [*(result.detach() for result in results), *torch.autograd.grad(results, leaves, grads)]


def assert_close(actual: list[Tensor], exact: list[Tensor], dtype: torch.dtype, num_results: int) -> None:
    """Results within float32's rounding, gradients within that of the inputs' dtype; relative norms."""
    for position, (value, expected) in enumerate(zip(actual, exact, strict=True)):
        assert value.dtype == (torch.float32 if position < num_results else dtype)
        assert value.isfinite().all()
        error = (value.double() - expected).norm() / expected.norm().clamp_min(1e-30)
        assert error <= (1e-6 if position < num_results else ROUNDING[dtype]), (position, float(error))


def kl_terms(*arguments: object) -> Results:
    return gaussian_kl_terms(*arguments, kernels="triton")


def product(*arguments: object) -> Results:
    return product_of_experts(*arguments, kernels="triton")


class TestKlTerms:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("layout", [contiguous, half_of_a_layer, transposed])
    def test_equals_the_reference(self, size: tuple[int, int, int], layout: Callable[[Tensor], Tensor]) -> None:
        arguments = [layout(tensor) for tensor in draw(size)]
        exact = differentiate(reference.gaussian_kl_terms, [t.double() for t in arguments[:4]], arguments[4])
        assert_close(differentiate(kl_terms, arguments[:4], arguments[4]), exact, torch.float32, 3)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("size", [(7, 5, 3), (17, 33, 5)])
    def test_16_bit_inputs(self, size: tuple[int, int, int], dtype: torch.dtype) -> None:
        *gaussians, noise = draw(size, dtype)
        exact = differentiate(reference.gaussian_kl_terms, [t.double() for t in gaussians], noise)
        with torch.autocast("cpu", torch.bfloat16):
            actual = differentiate(kl_terms, gaussians, noise)
        assert_close(actual, exact, dtype, 3)

    def test_every_expert_may_have_a_layout_and_dtype_of_its_own(self) -> None:
        mu, logvar, mus, logvars, noise = draw((6, 10, 3))
        inputs = [transposed(mu), half_of_a_layer(logvar.bfloat16()), mus.half(), logvars[:, :1].expand(3, 6, 10)]
        exact = differentiate(reference.gaussian_kl_terms, [t.double() for t in inputs], noise)
        actual = differentiate(kl_terms, inputs, noise)
        assert [t.dtype for t in actual[3:]] == [t.dtype for t in inputs]
        for value, expected in zip(actual, exact, strict=True):
            torch.testing.assert_close(value.double(), expected, rtol=2**-6, atol=1e-3)

    @pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-4, 1e-6])
    def test_accurate_near_collapse(self, distance: float) -> None:
        """The textbook formula has no correct digit left at 1e-4."""
        mu, logvar, mus, logvars, noise = draw((8, 32, 2))
        inputs = [mu, logvar, mu + distance * mus, logvar + distance * logvars]
        exact = differentiate(reference.gaussian_kl_terms, [t.double() for t in inputs], noise)
        actual = differentiate(kl_terms, inputs, noise)
        assert ((actual[2] - exact[2]).abs() / exact[2]).max() <= 1e-6
        for gradient, expected in zip(actual[5:], exact[5:], strict=True):
            assert (gradient - expected).norm() / expected.norm() <= 1e-6

    @pytest.mark.parametrize(("logvar", "logvar_other"), [(-30, -30), (-30, 30), (30, -30), (30, 30)])
    def test_extremes(self, logvar: int, logvar_other: int) -> None:
        one, experts = torch.full((3, 5), 1e4), torch.full((2, 3, 5), -1e4)
        inputs = [one, torch.full_like(one, float(logvar)), experts, torch.full_like(experts, float(logvar_other))]
        exact = differentiate(reference.gaussian_kl_terms, [t.double() for t in inputs], one / 1e4)
        for value, expected in zip(differentiate(kl_terms, inputs, one / 1e4), exact, strict=True):
            torch.testing.assert_close(value.double(), expected, rtol=4e-6, atol=0)

    def test_nan_reaches_the_loss(self) -> None:
        """The guard against bad steps looks for it there."""
        for position in range(4):
            arguments = draw((2, 3, 2))
            arguments[position][..., 1, 1] = math.nan
            _, kl_prior, kl_experts = kl_terms(*arguments)
            assert kl_prior[1].isnan() == (position < 2)
            assert kl_experts[:, 1].isnan().all()
            assert kl_experts[:, 0].isfinite().all()

    def test_any_split_of_the_batch_gives_the_same_bits(self) -> None:
        """A row is summed in an order that depends on D and M only."""
        arguments = draw((70, 9, 3))
        whole = differentiate(kl_terms, arguments[:4], arguments[4])[:3]
        parts = [
            differentiate(kl_terms, [t[..., rows, :] for t in arguments[:4]], arguments[4][rows])[:3]
            for rows in (slice(0, 33), slice(33, 70))
        ]
        for position, dim in enumerate((0, 0, 1)):
            assert torch.equal(torch.cat([part[position] for part in parts], dim), whole[position])

    def test_gradient_of_noise(self) -> None:
        *gaussians, noise = draw((4, 6, 2))
        noise.requires_grad_()
        (gradient,) = torch.autograd.grad(kl_terms(*gaussians, noise)[0].sum(), noise)
        torch.testing.assert_close(gradient, torch.exp(0.5 * gaussians[1]))

    def test_no_expert_and_no_sample(self) -> None:
        mu, logvar, _, _, noise = draw((3, 4, 1))
        none = torch.zeros(0, 3, 4)
        assert_close(
            list(kl_terms(mu, logvar, none, none, noise))[:2],
            list(reference.gaussian_kl_terms(mu.double(), logvar.double(), none, none, noise))[:2],
            torch.float32,
            2,
        )
        leaves = [tensor.requires_grad_() for tensor in draw((0, 4, 2))]
        z, kl_prior, kl_experts = kl_terms(*leaves)
        assert (z.shape, kl_prior.shape, kl_experts.shape) == ((0, 4), (0,), (2, 0))
        (z.sum() + kl_prior.sum() + kl_experts.sum()).backward()

    @settings(deadline=None, max_examples=15)
    @given(seed=st.integers(0, 2**31), scale=st.floats(0, 8))
    def test_never_negative_and_0_between_equals(self, seed: int, scale: float) -> None:
        mu, logvar, mus, logvars, noise = draw((5, 6, 2), seed=seed)
        _, kl_prior, kl_experts = kl_terms(mu, scale * logvar, mus, scale * logvars, noise)
        assert (kl_prior >= 0).all()
        assert (kl_experts >= 0).all()
        assert (kl_terms(mu, scale * logvar, mu[None], scale * logvar[None], noise)[2] == 0).all()


class TestKeyedNoise:
    @settings(deadline=None, max_examples=25)
    @given(
        seed=st.integers(0, 2**64 - 1),
        step=st.integers(0, 2**48 - 1),
        row=st.integers(0, 2**32 - 300),
        dim=st.integers(1, 40),
        stream=st.integers(0, 2**16 - 1),
    )
    def test_equals_the_reference_bit_for_bit(self, seed: int, step: int, row: int, dim: int, stream: int) -> None:
        key = KeyedNoise(seed, step, row + 37 * torch.arange(8), stream)
        zeros, none = torch.zeros(8, dim), torch.zeros(0, 8, dim)
        # With mean 0 and variance 1 the sample is the noise.
        assert torch.equal(kl_terms(zeros, zeros, none, none, key)[0], key.draw(dim))

    def test_many_values(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The interpreter's time goes by the number of tiles.
        monkeypatch.setattr(triton_gaussian, "_NARROW_TILE", 2**17)
        monkeypatch.setattr(triton_gaussian, "_MAX_SUMS", 2**17)
        key = KeyedNoise(2026, 7, torch.arange(8192) * 99_991)
        zeros, none = torch.zeros(8192, 64), torch.zeros(0, 8192, 64)
        assert torch.equal(kl_terms(zeros, zeros, none, none, key)[0], key.draw(64))

    @pytest.mark.parametrize("size", [(1, 1, 1), (7, 5, 3), (3, 530, 2)])
    def test_is_made_again_in_the_backward_pass(self, size: tuple[int, int, int]) -> None:
        *gaussians, _ = draw(size)
        rows = torch.arange(3 * size[0])[::3]  # not contiguous
        key = KeyedNoise(5, 2**33, rows, 2)
        given_noise = differentiate(kl_terms, gaussians, key.draw(size[1]))
        for value, expected in zip(differentiate(kl_terms, gaussians, key), given_noise, strict=True):
            assert torch.equal(value, expected)


MASKS: dict[str, Callable[[int, int], Tensor | None]] = {
    "none": lambda batch, experts: None,
    "per expert": lambda batch, experts: torch.arange(experts) % 2 == 0,
    "per sample": lambda batch, experts: torch.arange(batch * experts).reshape(batch, experts) % 3 != 1,
    "nobody": lambda batch, experts: torch.zeros(experts, dtype=torch.bool),
}


class TestProduct:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("prior_expert", [False, True])
    def test_equals_the_reference(self, size: tuple[int, int, int], mask: str, prior_expert: bool) -> None:
        batch, _, experts = size
        inputs, others = draw(size)[2:4], (MASKS[mask](batch, experts), prior_expert)
        exact = differentiate(reference.product_of_experts, [t.double() for t in inputs], *others)
        layout = (contiguous, half_of_a_layer, transposed)[(list(MASKS).index(mask) + prior_expert) % 3]
        actual = differentiate(product, [layout(tensor) for tensor in inputs], *others)
        assert_close(actual, exact, torch.float32, 2)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("mask", MASKS)
    def test_16_bit_inputs(self, dtype: torch.dtype, mask: str) -> None:
        inputs, others = draw((9, 11, 4), dtype)[2:4], (MASKS[mask](9, 4), False)
        exact = differentiate(reference.product_of_experts, [t.double() for t in inputs], *others)
        assert_close(differentiate(product, inputs, *others), exact, dtype, 2)

    @pytest.mark.parametrize("level", [-80.0, -30.0, 30.0, 80.0])
    def test_extremes(self, level: float) -> None:
        mus, logvars = draw((4, 5, 3))[2:4]
        inputs = [1e4 * mus, logvars + level]
        exact = differentiate(reference.product_of_experts, [t.double() for t in inputs])
        for value, expected in zip(differentiate(product, inputs), exact, strict=True):
            assert (value - expected).norm() / expected.norm() <= 4e-6

    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    def test_absent_values_never_leak(self, poison: float) -> None:
        mus, logvars = draw((2, 4, 3))[2:4]
        expected = product(mus[:2], logvars[:2])
        mus[2], logvars[2] = poison, poison
        mask = torch.tensor([True, True, False])
        actual = differentiate(product, [mus, logvars], mask)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])
        assert all((gradient[2] == 0).all() and gradient.isfinite().all() for gradient in actual[2:])

    def test_nan_of_one_that_takes_part_shows(self) -> None:
        for position, order in itertools.product((0, 1), ([0, 1], [1, 0])):
            inputs = draw((2, 3, 2))[2:4]
            inputs[position][0, 1, 1] = math.nan
            mu, logvar = product(*(tensor[order] for tensor in inputs))
            assert mu[1, 1].isnan()
            assert logvar[1, 1].isnan() == (position == 1)
            assert mu[0].isfinite().all()

    @settings(deadline=None, max_examples=15)
    @given(seed=st.integers(0, 2**31), order=st.permutations(range(4)))
    def test_order_is_irrelevant(self, seed: int, order: list[int]) -> None:
        mus, logvars = draw((3, 5, 4), seed=seed)[2:4]
        shuffled = product(mus[list(order)], logvars[list(order)])
        torch.testing.assert_close(product(mus, logvars), shuffled, rtol=1e-5, atol=1e-6)

    @settings(deadline=None, max_examples=15)
    @given(seed=st.integers(0, 2**31), scale=st.floats(0, 20))
    def test_one_expert_is_itself_also_with_an_uninformative_one(self, seed: int, scale: float) -> None:
        mus, logvars = draw((3, 5, 1), seed=seed)[2:4]
        logvars = (scale * logvars).clamp(-20, 20)
        vague = torch.full_like(logvars, 200.0)
        for result in (product(mus, logvars), product(torch.cat([mus, 3 - mus]), torch.cat([logvars, vague]))):
            assert torch.equal(result[0], mus[0])
            assert torch.equal(result[1], logvars[0])


LIKELIHOODS = [Normal(0.7), Laplace(1.3), Bernoulli(), Bernoulli(soft_targets=True)]


class TestLikelihoods:
    @staticmethod
    def data(likelihood: Likelihood, shape: tuple[int, ...]) -> Tensor:
        target = torch.rand(shape, generator=torch.Generator().manual_seed(3))
        return target.round() if likelihood == Bernoulli() else target

    @pytest.mark.parametrize("likelihood", LIKELIHOODS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(
        ("leading", "shape"), [((1,), (1,)), ((7,), (3, 5)), ((2, 3, 5), (11,)), ((3,), (1, 28, 28))]
    )
    def test_equals_the_reference(
        self, likelihood: Likelihood, dtype: torch.dtype, leading: tuple[int, ...], shape: tuple[int, ...]
    ) -> None:
        decoded = 3 * torch.randn(*leading, *shape, generator=torch.Generator().manual_seed(2))
        target = self.data(likelihood, (leading[-1], *shape))

        def differentiated(decoded: Tensor, target: Tensor, kernels: str) -> list[Tensor]:
            return differentiate(lambda x: (log_prob(likelihood, x, target, kernels),), [decoded])

        decoded, target = decoded.to(dtype), target.to(dtype)
        exact = differentiated(decoded.double(), target.double(), "reference")
        actual = differentiated(decoded, target, "triton")
        assert actual[0].shape == leading
        assert_close(actual, exact, dtype, 1)

    def test_confident_logits(self) -> None:
        """Right ones, whose value and gradient are far below rounding errors of 1, and wrong ones."""
        logits = torch.tensor([20.0, -20.0, 60.0, -60.0, 100.0, -100.0, 0.0, -0.0])[:, None]
        for target in (torch.ones(8, 1), torch.zeros(8, 1)):
            exact = differentiate(lambda x, t=target: (log_prob(Bernoulli(), x, t.double()),), [logits.double()])
            actual = differentiate(lambda x, t=target: (log_prob(Bernoulli(), x, t, "triton"),), [logits])
            torch.testing.assert_close(actual[0].double(), exact[0], rtol=1e-6, atol=1e-16)
            torch.testing.assert_close(actual[1].double(), exact[1], rtol=1e-6, atol=1e-16)

    @pytest.mark.parametrize("likelihood", LIKELIHOODS)
    def test_nan_reaches_the_loss(self, likelihood: Likelihood) -> None:
        decoded = torch.zeros(3, 4)
        decoded[1, 2] = math.nan
        result = log_prob(likelihood, decoded, torch.zeros(3, 4), "triton")
        assert result.isnan().tolist() == [False, True, False]

    def test_every_element_moves_once(self, moved_bytes: list[int]) -> None:
        decoded, target = torch.zeros(6, 20), torch.zeros(3, 20)
        ops.log_prob(decoded, target, "bernoulli", 1.0)
        assert sum(moved_bytes) == 4 * (2 * 6 * 20 + 6)
        moved_bytes.clear()
        ops.log_prob_backward(torch.zeros(6), decoded, target, "bernoulli", 1.0)
        assert sum(moved_bytes) == 4 * (3 * 6 * 20 + 6)


@pytest.fixture
def moved_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects what the kernels load and store, lane by lane that is not masked off."""
    moved: list[int] = []
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counting_load(self: object, pointers: object, mask: object, *rest: object) -> object:
        moved.append(int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8)
        return load(self, pointers, mask, *rest)

    def counting_store(self: object, pointers: object, value: object, mask: object, *rest: object) -> object:
        moved.append(int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counting_load)
    monkeypatch.setattr(builder, "create_masked_store", counting_store)
    return moved


class TestMemory:
    @pytest.mark.parametrize("size", [(7, 5, 3), (17, 33, 5), (3, 530, 2)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_every_element_moves_once(
        self, size: tuple[int, int, int], dtype: torch.dtype, moved_bytes: list[int]
    ) -> None:
        batch, dim, experts = size
        *gaussians, noise = draw(size, dtype)
        zeros_BD, zeros_B, zeros_MB = torch.zeros(batch, dim), torch.zeros(batch), torch.zeros(experts, batch)
        # Gradients of the KL terms are a number per row, which every tile of the row reads.
        tiles = math.ceil(dim / triton_gaussian.tile_shape(dim)[1])
        repeated = {"backward": 4 * (tiles - 1) * (1 + experts) * batch, "forward": 0}
        launches = {
            ("gaussian_kl_terms", "forward"): lambda: ops.kl_terms(*gaussians, noise.float(), None, 0, 0, 0),
            ("gaussian_kl_terms", "backward"): lambda: ops.kl_terms_backward(
                zeros_BD, zeros_B, zeros_MB, *gaussians, noise.float(), None, 0, 0, 0
            ),
            ("product_of_experts", "forward"): lambda: ops.product(*gaussians[2:], None, False),
            ("product_of_experts", "backward"): lambda: ops.product_backward(*[zeros_BD] * 4, *gaussians[2:], None),
        }
        for (operation, direction), launch in launches.items():
            moved_bytes.clear()
            launch()
            least = least_bytes(operation, direction, batch, dim, experts, dtype.itemsize)
            extra = repeated[direction] if operation == "gaussian_kl_terms" else 0
            assert sum(moved_bytes) == least + extra, (operation, direction)

    def test_keyed_noise_is_neither_read_nor_written(self, moved_bytes: list[int]) -> None:
        batch, dim, experts = 6, 20, 2
        key = KeyedNoise(0, 0, torch.arange(batch))
        kl_terms(*draw((batch, dim, experts))[:4], key)
        rows = 8 * batch
        least = least_bytes("gaussian_kl_terms", "forward", batch, dim, experts, 4) - 4 * batch * dim
        assert sum(moved_bytes) == least + rows

    @pytest.mark.parametrize("size", [(7, 5, 3), (2, 600, 17)])
    def test_nothing_is_written_beside_the_outputs(self, size: tuple[int, int, int]) -> None:
        batch, dim, experts = size
        arguments = draw(size)
        shapes = [(batch, dim), (batch,), (experts, batch), *(tensor.shape for tensor in arguments[:4])]
        wide = [torch.full((math.prod(shape) + 2000,), math.nan) for shape in shapes]
        outputs = [w[1000:-1000].view(shape) for w, shape in zip(wide, shapes, strict=True)]
        noise_and_key = (arguments[4], None, 0, 0, 0)
        triton_gaussian.launch_kl_terms_forward(*arguments[:4], *noise_and_key, tuple(outputs[:3]))
        grads = (torch.ones(batch, dim), torch.ones(batch), torch.ones(experts, batch))
        triton_gaussian.launch_kl_terms_backward(*arguments[:4], *noise_and_key, grads, tuple(outputs[3:]))
        for w, output in zip(wide, outputs, strict=True):
            assert output.isfinite().all()
            assert w[:1000].isnan().all()
            assert w[-1000:].isnan().all()


class TestOperators:
    def test_registration(self) -> None:
        """Schemas, fakes, gradients and tracing with symbolic sizes, as torch checks them."""
        *gaussians, noise = draw((4, 6, 2))
        leaves = [tensor.requires_grad_() for tensor in gaussians]
        torch.library.opcheck(ops.kl_terms, (*leaves, noise, None, 0, 0, 0))
        torch.library.opcheck(ops.kl_terms, (*leaves, None, torch.arange(4), -3, 2**40, 1))
        torch.library.opcheck(ops.log_prob, (leaves[0], noise, "laplace", 0.5))
        torch.library.opcheck(ops.product, (*leaves[2:], None, True))
        torch.library.opcheck(ops.product, (*leaves[2:], torch.ones(4, 2, dtype=torch.bool), False))

    def test_in_a_compiled_graph(self) -> None:
        """One graph without breaks, for changing batch sizes, with the same numbers."""

        def loss(mu: Tensor, logvar: Tensor, mus: Tensor, logvars: Tensor, noise: Tensor) -> Tensor:
            z, kl_prior, kl_experts = kl_terms(mu, logvar, mus, logvars, noise)
            mean, log_variance = product(mus, logvars)
            return z.square().sum() + kl_prior.sum() + kl_experts.sum() + (mean * log_variance).sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
        for batch in (4, 7):
            *inputs, noise = draw((batch, 6, 3))
            expected = differentiate(lambda *arguments: (loss(*arguments),), inputs, noise)
            actual = differentiate(lambda *arguments: (compiled(*arguments),), inputs, noise)
            for value, other in zip(actual, expected, strict=True):
                torch.testing.assert_close(value, other)

    def test_float64_goes_to_the_reference(self) -> None:
        arguments = [tensor.double().requires_grad_() for tensor in draw((2, 3, 2))]
        assert kl_terms(*arguments)[1].dtype == torch.float64
        assert torch.autograd.gradcheck(kl_terms, arguments)

"""nmse against the float64 oracle, its peers, the formula, and its contract."""

import math
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastadapt.kernels.flops import register_flop_formulas
from fastadapt.kernels.nmse import nmse
from fastadapt.kernels.nmse.autograd import nmse_op
from fastadapt.kernels.nmse.chunked import nmse_chunked
from fastadapt.kernels.testing import LAYOUTS, assert_close, with_layout

PROOF = bool(os.environ.get("FASTADAPT_PROOF"))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FILLS = 32  # random fills of a draw, pooled: the peer of a single number can be exact by chance
IMPLEMENTATIONS = ("reference", "chunked")


@dataclass(frozen=True)
class Case:
    """One draw: shapes, dtypes, layouts and options."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    target_dtype: torch.dtype
    layouts: tuple[str, ...]  # of x, target, mask, cotangent
    mask: str
    eps: float
    distance: float
    seed: int

    def inputs(self, fill: int, device: str) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed + fill)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        target = 1 + normal(*self.shape)
        tensors = {
            "x": (target + self.distance * normal(*self.shape)).to(self.dtype),
            "target": target.to(self.target_dtype),
            "mask": {
                "none": None,
                "bool": normal(*self.shape[:-1]) > -0.5,
                "zero": torch.zeros(self.shape[:-1], dtype=torch.bool),
            }[self.mask],
            "cotangent": normal(*self.shape[:-2]).float(),
        }
        return {
            name: None if tensor is None else with_layout(tensor.to(device), layout)
            for (name, tensor), layout in zip(tensors.items(), self.layouts, strict=True)
        }

    def run(
        self, fill: int, device: str, implementation: str, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        inputs = self.inputs(fill, device)
        x = inputs["x"].to(dtype or self.dtype).detach().requires_grad_()
        target = inputs["target"].to(dtype or self.target_dtype)
        output = nmse(x, target, mask=inputs["mask"], eps=self.eps, implementation=implementation)
        (grad,) = torch.autograd.grad(output.nmse, x, inputs["cotangent"].to(output.nmse.dtype))
        return {"nmse": output.nmse.detach(), "token_nmse": output.token_nmse, "dx": grad}


sizes = st.sampled_from((0, 1, 2, 3, 7, 8, 9, 13, 31, 33))
widths = st.sampled_from((0, 1, 2, 7, 8, 9, 31, 33, 127, 257, 1031))
cases = st.builds(
    Case,
    shape=st.one_of(
        st.tuples(sizes, widths), st.tuples(st.sampled_from((0, 1, 2, 3, 5)), sizes, widths)
    ),
    dtype=st.sampled_from(DTYPES),
    target_dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    mask=st.sampled_from(("none", "bool", "bool", "zero")),
    eps=st.sampled_from((1e-8, 1e-8, 0.5)),
    distance=st.sampled_from((1.0, 0.1, 0.0)),
    seed=st.integers(0, 2**31),
)


@pytest.mark.usefixtures("poison")
@given(case=cases)
@settings(max_examples=200 if PROOF else 25, deadline=None, derandomize=True, database=None)
def test_within_the_budget_of_the_oracle(case: Case, device: str) -> None:
    wide = torch.float64 in (case.dtype, case.target_dtype)

    def pooled(implementation: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        results = [case.run(fill, device, implementation, dtype) for fill in range(FILLS)]
        return {name: torch.stack([r[name] for r in results]) for name in results[0]}

    oracle = pooled("reference", torch.float64)
    peer = pooled("reference", torch.float32 if wide else None)
    actual = pooled("chunked", None)
    assert actual["nmse"].dtype == (torch.float64 if wide else torch.float32)
    assert actual["dx"].dtype == case.dtype
    for name in actual:
        assert_close(actual[name], oracle[name], peer[name].to(peer_dtype(actual[name])), name=name)


def peer_dtype(actual: Tensor) -> torch.dtype:
    return torch.float32 if actual.dtype == torch.float64 else actual.dtype


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, target = (torch.randn(3, 7, 5, generator=generator).to(dtype) for _ in range(2))
    return x, target, torch.rand(3, 7, generator=generator) > 0.4


def test_reference_is_the_formula_written_out() -> None:
    x, target, mask = example()
    output = nmse(x, target, mask=mask, eps=0.25, implementation="reference")
    for b in range(3):
        squares, powers = [], []
        for t in range(7):
            error = [float(x[b, t, i] - target[b, t, i]) ** 2 for i in range(5)]
            power = [float(target[b, t, i]) ** 2 for i in range(5)]
            token = sum(error) / 5 / (sum(power) / 5 + 0.25)
            assert float(output.token_nmse[b, t]) == pytest.approx(token, rel=1e-12)
            if mask[b, t]:
                squares += error
                powers += power
        n = len(squares)
        expected = sum(squares) / n / (sum(powers) / n + 0.25)
        assert float(output.nmse[b]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradcheck(implementation: str) -> None:
    x, target, mask = example()
    assert torch.autograd.gradcheck(
        lambda x: nmse(x, target, mask=mask, implementation=implementation).nmse,
        x.requires_grad_(),
    )
    assert torch.autograd.gradcheck(
        lambda x: nmse(x, target[0], implementation=implementation).nmse,
        x[0].detach().requires_grad_(),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masked_out_tokens_give_no_gradient_but_token_results(implementation: str) -> None:
    x, target, _ = example(torch.float32)
    clean = nmse(x, target, implementation=implementation)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, 2] = mask[1, 3] = False
    mask[2] = False
    x[0, 2] = math.nan
    target[1, 3] = math.inf
    x.requires_grad_()
    output = nmse(x, target, mask=mask, implementation=implementation)
    (grad,) = torch.autograd.grad(output.nmse.sum(), x)
    assert output.nmse.isfinite().all()
    assert output.nmse[2] == 0
    assert not grad[~mask].any()
    assert grad[mask].ne(0).all()
    assert torch.equal(output.token_nmse[mask], clean.token_nmse[mask])
    assert torch.equal(output.token_nmse[2], clean.token_nmse[2])
    assert output.token_nmse[0, 2].isnan()
    assert output.token_nmse[1, 3].isnan()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_counted_nan_affects_only_its_sequence(implementation: str) -> None:
    x, target, _ = example(torch.float32)
    x[1, 4, 0] = math.nan
    output = nmse(x.requires_grad_(), target, implementation=implementation)
    (grad,) = torch.autograd.grad(output.nmse.sum(), x)
    assert output.nmse.isnan().tolist() == [False, True, False]
    assert output.token_nmse.isnan().sum() == 1
    assert grad[[0, 2]].isfinite().all()
    assert grad[1, 4, 0].isnan()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_eps_bounds_a_zero_target_and_an_equal_stream_gives_zero(implementation: str) -> None:
    zero = torch.zeros(1, 2, 4)
    output = nmse(zero + 1, zero, eps=1e-8, implementation=implementation)
    torch.testing.assert_close(output.nmse, torch.tensor([1e8]))
    assert not nmse(zero, zero, implementation=implementation).nmse.any()
    _, target, _ = example(torch.bfloat16)
    assert not nmse(target, target, implementation=implementation).token_nmse.any()
    assert nmse(zero, zero, eps=0.0, implementation=implementation).nmse.isnan().all()


def test_low_precision_streams_are_summed_in_float32() -> None:
    """A bfloat16 sum of 4,096 ones would stop at 256."""
    x = torch.full((1, 4096, 4), 2.0, dtype=torch.bfloat16)
    output = nmse(x, x / 2)
    torch.testing.assert_close(output.nmse, torch.ones(1))
    assert output.token_nmse.dtype == torch.float32


def test_repeated_backward_and_refused_second_derivative() -> None:
    x, target, mask = example()
    loss = nmse(x.requires_grad_(), target, mask=mask).nmse
    cotangent = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    (first,) = torch.autograd.grad(loss, x, cotangent, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x, cotangent, retain_graph=True)
    (ones,) = torch.autograd.grad(loss, x, torch.ones(1).double().expand(3), retain_graph=True)
    assert torch.equal(first, again)
    torch.testing.assert_close(first, ones * cotangent[:, None, None])
    (grad,) = torch.autograd.grad(loss.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_backward_saves_neither_stream_and_only_if_needed() -> None:
    x, target, mask = example(torch.float32)
    sizes: list[int] = []

    def record(saved: Tensor) -> Tensor:
        sizes.append(saved.numel())
        assert saved.untyped_storage().data_ptr() not in (x.data_ptr(), target.data_ptr())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(record, lambda saved: saved):
        output = nmse(x.clone().requires_grad_(), target.requires_grad_(), mask=mask)
    assert sorted(sizes) == [3, x.numel()]
    assert output.nmse.requires_grad
    assert not output.token_nmse.requires_grad
    assert not nmse(x, target, mask=mask).nmse.requires_grad
    with torch.no_grad():
        assert not nmse(x.requires_grad_(), target).nmse.requires_grad


@pytest.mark.parametrize("x_grad", [True, False])
def test_opcheck(x_grad: bool) -> None:
    x, target, mask = example(torch.bfloat16)
    arguments = (x.requires_grad_(x_grad), target, mask, 1e-8, torch.float32, x_grad)
    torch.library.opcheck(nmse_op, arguments)


def test_compiles_into_one_graph_and_gives_the_same_bits() -> None:
    compiled = torch.compile(nmse, fullgraph=True, backend="aot_eager")
    x, target, mask = example(torch.float32)
    results = []
    for function in (nmse, compiled):
        leaf = x.clone().requires_grad_()
        output = function(leaf, target, mask=mask)
        output.nmse.backward(torch.tensor([1.0, 2.0, -3.0]))
        results.append((output.nmse.detach(), output.token_nmse, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_fakes_autocast_and_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    register_flop_formulas()
    x, target, mask = example(torch.bfloat16)
    real = nmse(x, target, mask=mask)
    with FakeTensorMode() as mode:
        fake = nmse(*map(mode.from_tensor, (x, target)), mask=mode.from_tensor(mask))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for implementation in IMPLEMENTATIONS:
            inside = nmse(x, target, mask=mask, implementation=implementation)
            assert inside.nmse.dtype == torch.float32
            torch.testing.assert_close(inside.nmse, real.nmse)
    with FlopCounterMode(display=False) as counter:
        nmse(x.to("meta"), target.to("meta"))
    assert counter.get_total_flops() == 5 * x.numel()


def test_no_synchronisation_off_the_cpu() -> None:
    """Meta tensors raise when their values are read."""
    x, target = (torch.empty(3, 7, 5, dtype=torch.bfloat16, device="meta") for _ in range(2))
    mask = torch.empty(3, 7, dtype=torch.bool, device="meta")
    per_sequence, per_token, difference, factor = nmse_chunked(
        x, target, mask, 1e-8, torch.float32, True
    )
    assert (per_sequence.shape, per_token.shape) == ((3,), (3, 7))
    assert (difference.shape, factor.shape) == ((3, 7, 5), (3,))


def test_two_threads_give_the_same_bits_every_time() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 300, 1024, generator=generator).requires_grad_()
    target = torch.randn(1, 300, 1024, generator=generator)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
    try:
        seen = set()
        for _ in range(250 if PROOF else 15):
            output = nmse(x, target)
            (grad,) = torch.autograd.grad(output.nmse.sum(), x)
            tensors = (output.nmse.detach(), output.token_nmse, grad)
            seen.add(hash(b"".join(t.numpy().tobytes() for t in tensors)))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 1.0}, TypeError, "x: expected a tensor, got float"),
        ({"x": torch.ones(4)}, ValueError, r"x: expected \[B,T,D\] or \[T,D\], got \[4\]"),
        ({"x": torch.ones(3, 7, 5, dtype=torch.int32)}, TypeError, "x: expected a floating dtype"),
        ({"target": None}, TypeError, "target: expected a tensor, got NoneType"),
        ({"target": torch.ones(7, 5)}, ValueError, r"target: expected \[3, 7, 5\] like x, got"),
        (
            {"target": torch.ones(3, 7, 5, device="meta")},
            ValueError,
            "target: expected device cpu, got meta",
        ),
        ({"mask": torch.ones(3, 7)}, TypeError, "mask: expected torch.bool, got torch.float32"),
        (
            {"mask": torch.ones(7, dtype=torch.bool)},
            ValueError,
            r"mask: expected \[3, 7\], got \[7\]",
        ),
        (
            {"mask": torch.ones(3, 7, dtype=torch.bool, device="meta")},
            ValueError,
            "mask: expected device cpu, got meta",
        ),
        ({"eps": -1.0}, ValueError, "eps: expected a number >= 0, got -1.0"),
        ({"implementation": "triton"}, ValueError, 'nmse has no Triton kernel; use "auto"'),
        ({"implementation": "sparse"}, ValueError, "implementation: expected one of auto"),
    ],
)
def test_errors_name_argument_expected_and_got(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    x, target, _ = example()
    arguments = {"x": x, "target": target} | change
    with pytest.raises(error, match=message):
        nmse(arguments.pop("x"), arguments.pop("target"), **arguments)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_a_difference_beyond_float16_has_a_finite_gradient(implementation: str) -> None:
    """Two float16 numbers of opposite sign can differ by more than the largest float16."""
    x, target = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(0)).half()
    x[0, 0, 0], target[0, 0, 0] = -60_000.0, 40_000.0
    exact = x.double().requires_grad_()
    nmse(exact, target.double(), implementation="reference").nmse.sum().backward()
    given_ = x.requires_grad_()
    nmse(given_, target, implementation=implementation).nmse.sum().backward()
    assert given_.grad.isfinite().all()
    torch.testing.assert_close(given_.grad.double(), exact.grad, rtol=1e-3, atol=1e-7)

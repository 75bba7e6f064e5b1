"""nmse against the float64 oracle, its peers, the formula, and its contract."""

import math
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastadapt.kernels import nmse as package
from fastadapt.kernels.flops import register_flop_formulas
from fastadapt.kernels.nmse import nmse
from fastadapt.kernels.nmse.autograd import nmse_backward_op, nmse_op
from fastadapt.kernels.nmse.chunked import nmse_chunked
from fastadapt.kernels.testing import LAYOUTS, assert_close, with_layout

PROOF = bool(os.environ.get("FASTADAPT_PROOF"))
CUDA = torch.cuda.is_available()
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NARROW = DTYPES[1:]
FILLS = 32  # random fills of a draw, pooled: the peer of a single number can be exact by chance
IMPLEMENTATIONS = ("reference", "chunked", "triton")
OP_IMPLEMENTATIONS = ("chunked", "triton")
BLOCKS = (None, 16, 64)  # columns and tokens per block of the Triton kernels; None is the default

# numpy warns in the interpreter where kernels subtract two infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")


def set_block(patch: pytest.MonkeyPatch, block: int | None) -> None:
    from fastadapt.kernels.nmse import triton_nmse

    for settings_ in (triton_nmse.ROWS, triton_nmse.SEQUENCES):
        if block is not None:
            patch.setitem(settings_, "BLOCK", block)


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
draws: dict[str, Any] = {
    "shape": st.one_of(
        st.tuples(sizes, widths), st.tuples(st.sampled_from((0, 1, 2, 3, 5)), sizes, widths)
    ),
    "dtype": st.sampled_from(DTYPES),
    "target_dtype": st.sampled_from(DTYPES),
    "layouts": st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    "mask": st.sampled_from(("none", "bool", "bool", "zero")),
    "eps": st.sampled_from((1e-8, 1e-8, 0.5)),
    "distance": st.sampled_from((1.0, 0.1, 0.0)),
    "seed": st.integers(0, 2**31),
}
cases = st.builds(Case, **draws)
# Without a GPU, a program takes about a millisecond.
few = st.sampled_from((0, 1, 2, 3, 7))
triton_cases = st.builds(
    Case,
    **draws
    | {
        "shape": st.one_of(
            st.tuples(few, widths), st.tuples(st.sampled_from((0, 1, 2, 3)), few, widths)
        ),
        "dtype": st.sampled_from(NARROW),
        "target_dtype": st.sampled_from(NARROW),
    },
)


@pytest.mark.usefixtures("poison")
@given(case=cases)
@settings(max_examples=200 if PROOF else 25, deadline=None, derandomize=True, database=None)
def test_within_the_budget_of_the_oracle(case: Case, device: str) -> None:
    check(case, "chunked", device)


@pytest.mark.usefixtures("poison")
@given(case=triton_cases, block=st.sampled_from(BLOCKS))
@settings(
    max_examples=200 if PROOF and CUDA else 60 if PROOF else 12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # shrinking a failing case would take an hour
)
def test_triton_is_within_the_budget_of_the_oracle(
    case: Case, block: int | None, device: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        set_block(patch, block)
        check(case, "triton", device, fills=FILLS if CUDA else 8)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.every_kernel
def test_triton_sums_rows_and_sequences_of_many_blocks(
    block: int | None, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_block(monkeypatch, block)
    shape = (2, 19, 37) if block else (2, 3, 2049)
    case = Case(shape, dtype, dtype, ("contiguous",) * 4, "bool", 1e-8, 0.1, seed=3)
    check(case, "triton", device, fills=2)


def check(case: Case, implementation: str, device: str, fills: int = FILLS) -> None:
    """Compare outputs and the gradient of all fills with the oracle; the reference is the peer."""
    wide = torch.float64 in (case.dtype, case.target_dtype)

    def pooled(implementation: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        results = [case.run(fill, device, implementation, dtype) for fill in range(fills)]
        return {name: torch.stack([r[name] for r in results]) for name in results[0]}

    oracle = pooled("reference", torch.float64)
    peer = pooled("reference", torch.float32 if wide else None)
    actual = pooled(implementation, None)
    assert actual["nmse"].dtype == (torch.float64 if wide else torch.float32)
    assert actual["dx"].dtype == case.dtype
    for name in actual:
        assert_close(actual[name], oracle[name], peer[name].to(peer_dtype(actual[name])), name=name)


def peer_dtype(actual: Tensor) -> torch.dtype:
    return torch.float32 if actual.dtype == torch.float64 else actual.dtype


def example(
    dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, target = (torch.randn(3, 7, 5, generator=generator).to(device, dtype) for _ in range(2))
    return x, target, (torch.rand(3, 7, generator=generator) > 0.4).to(device)


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


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
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
def test_masked_out_tokens_give_no_gradient_but_token_results(
    implementation: str, device: str
) -> None:
    x, target, _ = example(torch.float32, device)
    clean = nmse(x, target, implementation=implementation)
    mask = torch.ones(3, 7, dtype=torch.bool, device=device)
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
@pytest.mark.parametrize("stream", ["x", "target"])
def test_a_counted_nan_affects_only_its_sequence(
    stream: str, implementation: str, device: str
) -> None:
    x, target, mask = example(torch.float32, device)
    mask[1, 4], mask[1, 5] = True, False
    (x if stream == "x" else target)[1, 4, 0] = math.nan
    output = nmse(x.requires_grad_(), target, mask=mask, implementation=implementation)
    (grad,) = torch.autograd.grad(output.nmse.sum(), x)
    assert output.nmse.isnan().tolist() == [False, True, False]
    assert output.token_nmse.isnan().sum() == 1
    assert grad[[0, 2]].isfinite().all()
    assert grad[1, 4, 0].isnan()
    assert grad[1, 4].isnan().all() == (stream == "target")
    assert not grad[~mask].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_eps_bounds_a_zero_target_and_an_equal_stream_gives_zero(
    implementation: str, device: str
) -> None:
    zero = torch.zeros(1, 2, 4, device=device)
    output = nmse(zero + 1, zero, eps=1e-8, implementation=implementation)
    torch.testing.assert_close(output.nmse, torch.tensor([1e8], device=device))
    assert not nmse(zero, zero, implementation=implementation).nmse.any()
    _, target, _ = example(torch.bfloat16, device)
    assert not nmse(target, target, implementation=implementation).token_nmse.any()
    assert nmse(zero, zero, eps=0.0, implementation=implementation).nmse.isnan().all()
    none = torch.zeros(1, 2, dtype=torch.bool, device=device)
    output = nmse(zero, zero + 1, mask=none, eps=0.0, implementation=implementation)
    assert output.nmse.isnan().all()


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_gradients_of_many_tokens_round_to_0_in_float16(implementation: str) -> None:
    """Hence training refuses float16; here with the mean over 25 streams of a model."""
    target = torch.randn(1, 1000, 896)
    x = target + 0.1 * torch.randn_like(target)
    share = {}
    for dtype in (torch.float16, torch.bfloat16):
        leaf = x.to(dtype).requires_grad_()
        loss = nmse(leaf, target.to(dtype), implementation=implementation).nmse.mean() / 25
        (grad,) = torch.autograd.grad(loss, leaf)
        share[dtype] = float((grad != 0).double().mean())
    assert share[torch.float16] < 0.01 < 0.9 < share[torch.bfloat16]


@pytest.mark.parametrize("implementation", OP_IMPLEMENTATIONS)
def test_low_precision_streams_are_summed_in_float32(implementation: str, device: str) -> None:
    """A bfloat16 sum of 4,096 ones would stop at 256."""
    x = torch.full((1, 8, 4096), 2.0, dtype=torch.bfloat16, device=device)
    output = nmse(x, x / 2, implementation=implementation)
    torch.testing.assert_close(output.nmse, torch.ones(1, device=device))
    assert output.token_nmse.dtype == torch.float32


@pytest.mark.parametrize("implementation", OP_IMPLEMENTATIONS)
def test_repeated_backward_and_refused_second_derivative(implementation: str, device: str) -> None:
    x, target, mask = example(torch.float32, device)
    loss = nmse(x.requires_grad_(), target, mask=mask, implementation=implementation).nmse
    cotangent = torch.tensor([1.0, -2.0, 0.0], device=device)
    (first,) = torch.autograd.grad(loss, x, cotangent, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x, cotangent, retain_graph=True)
    one = torch.ones(1, device=device)
    (ones,) = torch.autograd.grad(loss, x, one.expand(3), retain_graph=True)
    assert torch.equal(first, again)
    torch.testing.assert_close(first, ones * cotangent[:, None, None])
    (grad,) = torch.autograd.grad(loss.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("implementation", OP_IMPLEMENTATIONS)
def test_the_backward_saves_neither_stream_and_only_if_needed(
    implementation: str, device: str
) -> None:
    x, target, mask = example(torch.float32, device)
    sizes: list[int] = []

    def record(saved: Tensor) -> Tensor:
        sizes.append(saved.nbytes)
        assert saved.untyped_storage().data_ptr() not in (x.data_ptr(), target.data_ptr())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(record, lambda saved: saved):
        output = nmse(
            x.clone().requires_grad_(),
            target.requires_grad_(),
            mask=mask,
            implementation=implementation,
        )
    assert sorted(sizes) == sorted([4 * 3, 3 * 7, x.nbytes])  # factors, mask, difference
    assert output.nmse.requires_grad
    assert not output.token_nmse.requires_grad
    assert not nmse(x, target, mask=mask, implementation=implementation).nmse.requires_grad
    with torch.no_grad():
        x.requires_grad_()
        assert not nmse(x, target, implementation=implementation).nmse.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("x_grad", [True, False])
@pytest.mark.parametrize("implementation", OP_IMPLEMENTATIONS)
def test_opcheck(implementation: str, x_grad: bool, device: str) -> None:
    x, target, mask = example(torch.bfloat16, device)
    settings_ = (1e-8, torch.float32, implementation, x_grad)
    torch.library.opcheck(nmse_op, (x.requires_grad_(x_grad), target, mask, *settings_))
    cotangent, factor = torch.rand(2, 3, device=device)
    torch.library.opcheck(nmse_backward_op, (cotangent, target, factor, mask, implementation))


@pytest.mark.parametrize("implementation", OP_IMPLEMENTATIONS)
def test_compiles_into_one_graph_and_gives_the_same_bits(implementation: str, device: str) -> None:
    compiled = torch.compile(nmse, fullgraph=True, backend="aot_eager")
    x, target, mask = example(torch.float32, device)
    results = []
    for function in (nmse, compiled):
        leaf = x.clone().requires_grad_()
        output = function(leaf, target, mask=mask, implementation=implementation)
        output.nmse.backward(torch.tensor([1.0, 2.0, -3.0], device=device))
        results.append((output.nmse.detach(), output.token_nmse, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fakes_and_autocast(implementation: str, device: str) -> None:
    x, target, mask = example(torch.bfloat16, device)
    real = nmse(x, target, mask=mask, implementation=implementation)
    with FakeTensorMode() as mode:
        streams = map(mode.from_tensor, (x, target))
        fake = nmse(*streams, mask=mode.from_tensor(mask), implementation=implementation)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = nmse(x, target, mask=mask, implementation=implementation)
    assert inside.nmse.dtype == torch.float32
    torch.testing.assert_close(inside.nmse, real.nmse)


def test_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    register_flop_formulas()
    x, target, _ = example(torch.bfloat16)
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


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("block", [None, 16])
def test_triton_gives_the_same_bits_every_time(
    block: int | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_block(monkeypatch, block)
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, 2, 4000 if CUDA else 5, 131, generator=generator).to(device)
    results: set[bytes] = set()
    for _ in range(250 if CUDA else 4):
        output = nmse(x.requires_grad_(), target, implementation="triton")
        (grad,) = torch.autograd.grad(output.nmse.sum(), x)
        tensors = (output.nmse.detach(), output.token_nmse, grad)
        results.add(b"".join(t.cpu().numpy().tobytes() for t in tensors))
    assert len(results) == 1


def test_triton_reads_strided_and_expanded_streams_in_place(device: str) -> None:
    """Every layout gives the bits of contiguous streams, without a copy."""
    x, target, mask = example(torch.float32, device)
    cotangent = torch.tensor([1.0, -2.0, 0.5], device=device)

    def outcome(layouts: tuple[str, ...]) -> tuple[Tensor, ...]:
        tensors = (x, target[:1].expand(3, -1, -1), mask, cotangent)
        placed = [with_layout(t, layout) for t, layout in zip(tensors, layouts, strict=True)]
        leaf = placed[0].detach().requires_grad_()
        output = nmse(leaf, placed[1], mask=placed[2], implementation="triton")
        (grad,) = torch.autograd.grad(output.nmse, leaf, placed[3])
        return output.nmse.detach(), output.token_nmse, grad

    plain = outcome(("contiguous",) * 4)
    for layout in ("transposed", "sliced", "parent", "offset"):
        for a, b in zip(outcome((layout, "expanded", layout, layout)), plain, strict=True):
            assert torch.equal(a, b), layout


@pytest.mark.skipif(not CUDA, reason="needs 13 GB, and more programs than a CPU runs")
def test_triton_addresses_past_two_to_the_31() -> None:
    T, D = 2**31 // 4096 + 3, 4096
    generator = torch.Generator("cuda").manual_seed(0)
    few_x, few_target = torch.randn(2, 3, D, generator=generator, device="cuda").half()
    x, target = torch.zeros(2, T, D, dtype=torch.float16, device="cuda")
    x[-3:], target[-3:] = few_x, few_target
    mask = torch.arange(T, device="cuda") >= T - 3
    results = []
    for streams, counted in (((few_x, few_target), mask[-3:]), ((x, target), mask)):
        leaf = streams[0].requires_grad_()
        output = nmse(leaf, streams[1], mask=counted, implementation="triton")
        (grad,) = torch.autograd.grad(output.nmse, leaf)
        results.append((output.token_nmse[-3:], grad[-3:]))
        assert not grad[:-3].any()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


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
        (
            {"implementation": "triton"},
            ValueError,
            "reads float32, bfloat16 and float16, got x and target in float64 and float64",
        ),
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


def test_auto_selects_an_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "runs_triton", lambda device: device == "cuda")
    resolve = package.resolve_implementation
    for dtype in NARROW:
        assert resolve("auto", "cuda", dtype, torch.bfloat16) == "triton"
    for dtype in (torch.float64, torch.float8_e5m2):
        assert resolve("auto", "cuda", dtype, torch.float32) == "chunked"
        assert resolve("auto", "cuda", torch.float32, dtype) == "chunked"
    assert resolve("auto", "cpu", torch.float32, torch.float32) == "chunked"
    assert resolve("auto", "meta", torch.float32, torch.float32) == "chunked"
    with pytest.raises(ValueError, match=r'"triton" needs a GPU, got tensors on cpu; use "auto"'):
        nmse(torch.ones(2, 3), torch.ones(2, 3), implementation="triton")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_difference_beyond_float16_has_a_finite_gradient(
    implementation: str, device: str
) -> None:
    """Two float16 numbers of opposite sign can differ by more than the largest float16."""
    draw = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(0))
    x, target = draw.to(device).half()
    x[0, 0, 0], target[0, 0, 0] = -60_000.0, 40_000.0
    exact = x.double().requires_grad_()
    nmse(exact, target.double(), implementation="reference").nmse.sum().backward()
    given_ = x.requires_grad_()
    nmse(given_, target, implementation=implementation).nmse.sum().backward()
    assert given_.grad.isfinite().all()
    torch.testing.assert_close(given_.grad.double(), exact.grad, rtol=1e-3, atol=1e-7)

"""linear_kl's Triton kernels alone, beyond the tests of the op that also run them."""

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from transcoder_cases import TRITON_DTYPES

from fastadapt.kernels import linear_kl as package
from fastadapt.kernels.linear_kl import chunks, linear_kl
from fastadapt.kernels.testing import assert_close

CUDA = torch.cuda.is_available()
REPEATS = 250 if CUDA else 25 if os.environ.get("FASTADAPT_PROOF") else 4
BLOCK = 16

# numpy warns in the interpreter where kernels subtract two infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastadapt.kernels.linear_kl.triton_kl import CONFIGURATIONS

    for dtype, shipped in CONFIGURATIONS.items():
        monkeypatch.setitem(CONFIGURATIONS, dtype, shipped._replace(block=BLOCK))


def statistics(logits: Tensor, softcap: float | None = None) -> tuple[Tensor, ...]:
    from fastadapt.kernels.linear_kl.triton_kl import row_statistics

    return row_statistics(logits, softcap)


def test_auto_selects_an_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert package.resolve_implementation("auto", "cuda", torch.float32) == "triton"
    assert package.resolve_implementation("auto", "cuda", torch.float64) == "chunked"
    assert package.resolve_implementation("auto", "cpu", torch.float32) == "chunked"
    assert package.resolve_implementation("auto", "meta", torch.float32) == "chunked"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert package.resolve_implementation("auto", "cpu", torch.float32) == "chunked"
    assert package.resolve_implementation("triton", "cpu", torch.float32) == "triton"


@pytest.mark.parametrize("V", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 61])
@pytest.mark.usefixtures("_small_blocks", "poison")
@pytest.mark.every_kernel
def test_statistics_of_rows(V: int, device: str) -> None:
    for dtype in TRITON_DTYPES:
        logits = (4 * torch.randn(9, V)).to(device, dtype)
        top, log_total, first = statistics(logits)
        assert torch.equal(top, logits.float().amax(-1))
        exact = (logits.double() - logits.double().amax(-1, keepdim=True)).exp().sum(-1).log()
        # The sum is at least 1: its rounding is an absolute error of its logarithm.
        assert_close(1 + log_total, 1 + exact, (1 + exact).float())
        assert torch.equal(first.long(), logits.float().argmax(-1))


@pytest.mark.parametrize("fill", [0.0, -3e38, 3e38, -math.inf])
@pytest.mark.usefixtures("_small_blocks")
def test_the_first_of_equal_logits(fill: float, device: str) -> None:
    """Ties that start in any block, at any lane, among any other values."""
    rows = 3 * BLOCK + 5
    logits = torch.full((rows, rows), fill, device=device)
    columns = torch.arange(rows, device=device)
    logits[columns[:, None] <= columns] = fill if fill > 0 else 2.0
    expected = torch.zeros(rows, dtype=torch.int32, device=device) if fill > 0 else columns.int()
    assert torch.equal(statistics(logits)[2], expected)


@pytest.mark.usefixtures("_small_blocks")
def test_rows_without_a_distribution_are_nan(device: str) -> None:
    rows = torch.zeros(4, 2 * BLOCK + 3, device=device)
    rows[0] = -math.inf
    rows[1, BLOCK + 1] = math.inf
    rows[2, 5] = math.nan
    rows[3, 1:] = -math.inf
    _, log_total, _ = statistics(rows)
    assert log_total[:3].isnan().all()
    assert log_total[3] == 0


def test_the_softcap_is_accurate_for_small_and_large_logits(device: str) -> None:
    """Relative error: two divisions of two units each, and the tanh between them."""
    size = torch.cat([torch.logspace(-30, -2, 200), torch.linspace(0.01, 12, 1500)])
    x = torch.cat([size, -size, torch.tensor([0.0, 0.625, 1e30, -1e30, math.inf, -math.inf])])
    x = x[:: 1 if device == "cuda" else 128].to(device)
    for softcap in (1.0, 30.0):
        exact = softcap * torch.tanh(x.double() / softcap)
        got = statistics(x[:, None].contiguous(), softcap)[0].double()
        assert ((got - exact).abs() <= 8 * 2**-23 * exact.abs()).all()
    assert statistics(torch.full((1, 1), math.nan, device=device), 2.0)[1].isnan().all()


@pytest.mark.usefixtures("_small_blocks", "poison")
@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("distance", [1.0, 0.03])
@pytest.mark.every_kernel
def test_gradient_of_logits_in_half_the_size(
    implementation: str,
    dtype: torch.dtype,
    distance: float,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """float32 logits of 16-bit inputs, as on a GPU; a CPU emulates the product."""
    if device != "cuda":
        monkeypatch.setattr(chunks, "_accumulates_wider", accumulates_wider)
        monkeypatch.setattr(torch, "mm", mm)
    generator = torch.Generator().manual_seed(1)
    S, T, D, V = 2, 13, 48, 5 * BLOCK + 3
    teacher = torch.randn(T, D, generator=generator)
    students = teacher + distance * torch.randn(S, T, D, generator=generator)
    head = torch.randn(V, D, generator=generator)
    streams = [t.to(device, dtype) for t in (teacher, students, head)]
    results = {}
    for name, dtype_, implementation_ in (
        ("oracle", torch.float64, "reference"),
        ("peer", dtype, "reference"),
        ("actual", dtype, implementation),
    ):
        first, *others = (t.to(dtype_) for t in streams)
        leaves = [t.detach().requires_grad_() for t in others]
        output = linear_kl(
            first, *leaves, chunk_tokens=5, softcap=20.0, implementation=implementation_
        )
        cotangent = torch.tensor([1.0, -0.7], device=device).to(output.kl.dtype)
        grads = torch.autograd.grad(output.kl, leaves, cotangent)
        results[name] = (output.token_kl, *grads)
    for actual, oracle, peer in zip(
        *(results[k] for k in ("actual", "oracle", "peer")), strict=True
    ):
        assert_close(actual, oracle, peer)


def accumulates_wider(head: Tensor, hidden: torch.dtype, logits: torch.dtype) -> bool:
    return head.dtype == hidden and head.dtype.itemsize == 2 and logits == torch.float32


MM = torch.mm


def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, **keywords: Any) -> Tensor:
    return MM(a.to(out_dtype or a.dtype), b.to(out_dtype or b.dtype), **keywords)


@pytest.mark.usefixtures("_small_blocks")
def test_the_same_bits_every_time(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    T, V = (700, 5000) if CUDA else (7, 4 * BLOCK + 1)
    dtype = torch.bfloat16 if CUDA else torch.float32
    shapes = ((T, 64), (2, T, 64), (V, 64))
    teacher, students, head = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes
    )
    labels = torch.arange(T, device=device)
    cotangent = torch.tensor([1.0, 0.3], device=device)
    leaves = (students.requires_grad_(), head.requires_grad_())
    first: list[Tensor] = []
    for _ in range(REPEATS):
        output = linear_kl(
            teacher, *leaves, labels=labels % V, chunk_tokens=256, implementation="triton"
        )
        grads = torch.autograd.grad(output.kl, leaves, cotangent)
        tensors = [*(t.detach() for t in output if t is not None), *grads]
        first = first or tensors
        assert all(torch.equal(a, b) for a, b in zip(first, tensors, strict=True))


@pytest.mark.usefixtures("_small_blocks")
def test_repeated_backward(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, students, head = (
        torch.randn(shape, generator=generator).to(device) for shape in ((5, 3), (2, 5, 3), (37, 3))
    )
    students.requires_grad_()
    kl = linear_kl(teacher, students, head, chunk_tokens=2, implementation="triton").kl
    cotangent = torch.tensor([2.0, -0.5], device=device)
    (first,) = torch.autograd.grad(kl, students, cotangent, retain_graph=True)
    (again,) = torch.autograd.grad(kl, students, cotangent, retain_graph=True)
    (ones,) = torch.autograd.grad(kl, students, torch.ones(1, device=device).expand(2))
    assert torch.equal(first, again)
    assert torch.equal(first, ones * cotangent[:, None, None])


@pytest.mark.skipif(not CUDA, reason="needs 9 GB, and more programs than the interpreter runs")
def test_rows_past_two_to_the_31() -> None:
    V = 152_064
    C = 2**31 // V + 3
    generator = torch.Generator("cuda").manual_seed(0)
    few = torch.randn(2, 3, V, generator=generator, device="cuda").half()
    teacher, student = torch.zeros(2, C, V, dtype=torch.float16, device="cuda")
    teacher[-3:], student[-3:] = few
    from fastadapt.kernels.linear_kl.triton_kl import TRITON

    def outcome(z_p: Tensor, z_q: Tensor) -> tuple[Tensor, ...]:
        kl = torch.empty(len(z_p), device="cuda")
        top1 = torch.empty(len(z_p), dtype=torch.bool, device="cuda")
        gradient = chunks.Gradient(z_q, 1.0)
        TRITON.student(TRITON.teacher(z_p, None, z_p), z_q, None, None, gradient, kl, None, top1)
        return kl[-3:], top1[-3:], z_q[-3:]

    small = outcome(few[0].clone(), few[1].clone())
    for a, b in zip(outcome(teacher, student), small, strict=True):
        assert torch.equal(a, b)
    assert not student[:-3].any()

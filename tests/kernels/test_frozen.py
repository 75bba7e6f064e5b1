"""Fused norms, gated products and rotary embeddings against their float64 references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transcoder_cases import SLOW_INTERPRETED, TRITON_DEVICE

from fastadapt.kernels import frozen
from fastadapt.kernels.frozen import ACTIVATIONS, gated, rms_norm, rope
from fastadapt.kernels.frozen.autograd import gated_op, rms_norm_op, rope_op
from fastadapt.kernels.testing import LAYOUTS, assert_close, with_layout

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMULAS = [(0.0, True), (0.0, False), (1.0, False)]
Op = Callable[..., Sequence[Tensor]]


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, dtype=torch.float64)


def results(
    op: Op, inputs: Sequence[Tensor], constants: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    """Return the outputs and the gradients of the inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = op(*inputs, *constants)
    seeds = [g.to(y) for g, y in zip(cotangents, outputs, strict=True)]
    return [
        *(y.detach() for y in outputs),
        *torch.autograd.grad(outputs, inputs, seeds),
    ]


def compare(
    op: Callable[..., Op],
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    dtype: torch.dtype,
    layout: str = "contiguous",
) -> None:
    """Compare the kernels with the reference in float64; the reference in ``dtype`` is the peer."""

    def rounded(tensors: Sequence[Tensor], layout: str = "contiguous") -> list[Tensor]:
        return [with_layout(x.to(TRITON_DEVICE, dtype), layout) for x in tensors]

    x, c, g = rounded(inputs, layout), rounded(constants), rounded(cotangents, layout)
    actual = results(op("triton"), x, c, g)
    peer = results(op("reference"), x, c, g)
    oracle = results(op("reference"), *([t.double() for t in ts] for ts in (x, c, g)))
    for i, (a, o, p) in enumerate(zip(actual, oracle, peer, strict=True)):
        assert a.dtype == dtype
        assert_close(a, o, p, name=f"result {i}")
    again = results(op("triton"), x, c, g)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


def norm_op(offset: float, rounds_first: bool) -> Callable[[str], Op]:
    def op(implementation: str) -> Op:
        return lambda x, w: (
            rms_norm(
                x,
                w,
                1e-6,
                offset=offset,
                rounds_first=rounds_first,
                implementation=implementation,
            ),
        )

    return op


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "rounds_first"), FORMULAS)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 7), marks=SLOW_INTERPRETED),
        (3, 5, 37),
        pytest.param((2, 3, 4, 8), marks=SLOW_INTERPRETED),  # heads
    ],
)
def test_rms_norm_triton(
    shape: tuple[int, ...], offset: float, rounds_first: bool, dtype: torch.dtype
) -> None:
    x, weight = normal(*shape), normal(shape[-1])
    compare(norm_op(offset, rounds_first), [x], [weight], [normal(*shape)], dtype)


@pytest.mark.parametrize("columns", [4100, pytest.param(9000, marks=SLOW_INTERPRETED)])
def test_wide_rows_triton(columns: int) -> None:
    x, g = normal(1, columns), normal(1, columns)
    compare(norm_op(0.0, True), [x], [normal(columns)], [g], torch.float16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.every_kernel
def test_frozen_layouts_triton(layout: str) -> None:
    x, up = normal(3, 5, 24), normal(3, 5, 24)
    g = [normal(3, 5, 24)]
    compare(norm_op(0.0, True), [x], [normal(24)], g, torch.float16, layout)
    compare(gated_with("silu"), [x, up], [], g, torch.float16, layout)
    q, k = normal(2, 3, 5, 8), normal(2, 2, 5, 8)
    angles, g = [normal(1, 5, 8), normal(1, 5, 8)], [torch.randn_like(q), torch.randn_like(k)]
    compare(rope_with, [q, k], angles, g, torch.float16, layout)


def gated_with(activation: str) -> Callable[[str], Op]:
    return lambda implementation: (
        lambda gate, up: (gated(gate, up, activation, implementation=implementation),)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1,), marks=SLOW_INTERPRETED),
        (3, 5, 37),
        pytest.param((2, 1025), marks=SLOW_INTERPRETED),
    ],
)
def test_gated_triton(shape: tuple[int, ...], activation: str, dtype: torch.dtype) -> None:
    gate, up = normal(*shape, scale=3), normal(*shape)
    compare(gated_with(activation), [gate, up], [], [normal(*shape)], dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_gates_triton(activation: str) -> None:
    """The slope has no cancellation, and no exponential overflows."""
    gate = torch.linspace(-200, 200, 801, dtype=torch.float64)
    compare(gated_with(activation), [gate], [normal(801)], [normal(801)], torch.float32)


def rope_with(implementation: str) -> Op:
    return lambda q, k, cos, sin: rope(q, k, cos, sin, implementation=implementation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "width", "rotated", "batches"),
    [((4, 2), 8, 8, 1), ((3, 1), 12, 6, 2), ((17, 2), 6, 2, 1)],
)
def test_rope_triton(
    heads: tuple[int, int], width: int, rotated: int, batches: int, dtype: torch.dtype
) -> None:
    # As in attention: [B, T, H, D] in memory.
    q, k = (normal(2, 3, h, width).transpose(1, 2) for h in heads)
    angle = normal(batches, 3, rotated)
    cotangents = [torch.randn_like(q), torch.randn_like(k)]
    compare(rope_with, [q, k], [angle.cos(), angle.sin()], cotangents, dtype)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_no_rows_triton(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=TRITON_DEVICE, requires_grad=True)
    weight = torch.ones(8, device=TRITON_DEVICE)
    for out in (
        rms_norm(x, weight, 1e-6, implementation="triton"),
        gated(x, x, "silu", implementation="triton"),
    ):
        assert out.shape == x.shape
        assert torch.autograd.grad(out, x, torch.zeros_like(out))[0].shape == x.shape


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")
def test_not_finite_triton() -> None:
    """NaN and infinities stay in their row."""
    x = torch.ones(4, 8, device=TRITON_DEVICE)
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    out = rms_norm(x, torch.ones(8, device=TRITON_DEVICE), 1e-6, implementation="triton")
    assert out.isfinite().all(1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("op", ["norm", "gated", "rope"])
def test_opcheck_triton(op: str) -> None:
    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, device=TRITON_DEVICE)

    x = matrix(3, 8).requires_grad_()
    arguments: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "norm": (rms_norm_op, (x, matrix(8), 1e-6, 0.0, True)),
        "gated": (gated_op, (x, matrix(3, 8).requires_grad_(), "silu")),
        "rope": (
            rope_op,
            (
                matrix(1, 2, 3, 4).requires_grad_(),
                matrix(1, 1, 3, 4).requires_grad_(),
                matrix(1, 3, 4),
                matrix(1, 3, 4),
                False,
            ),
        ),
    }
    torch.library.opcheck(*arguments[op])


def test_what_is_saved() -> None:
    """A norm saves its input and a number per row, a gated product its inputs, rope nothing."""
    saved: list[tuple[int, ...]] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(tuple(x.shape))
        return x

    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        x, weight = torch.zeros(2, 5, 8, requires_grad=True), torch.zeros(8)
        rms_norm(x, weight, 1e-6, implementation="triton")
        assert saved == [(2, 5, 8), (8,), (10,)]
        saved.clear()
        gated(x, x, "silu", implementation="triton")
        assert saved == [(2, 5, 8), (2, 5, 8)]
        saved.clear()
        q, angle = torch.zeros(2, 3, 5, 8, requires_grad=True), torch.zeros(1, 5, 8)
        rope(q, q, angle, angle, implementation="triton")
        assert saved == [(1, 5, 8), (1, 5, 8)]


def test_errors() -> None:
    x, weight = torch.zeros(3, 8), torch.ones(8)
    trained, heads = weight.clone().requires_grad_(), x[None, None]
    wide = torch.zeros(1, frozen.MAX_WIDTH + 1)
    for message, call in {
        "weight: expected [8]": lambda: rms_norm(x, weight[:7], 1e-6),
        "weight: expected torch.float32": lambda: rms_norm(x, weight.half(), 1e-6),
        "weight: expected a frozen tensor": lambda: rms_norm(x, trained, 1e-6),
        "x: expected at most 16384 columns": lambda: rms_norm(
            wide, wide[0], 1e-6, implementation="triton"
        ),
        "x: expected float32, bfloat16 or float16": lambda: rms_norm(
            x.double(), weight.double(), 1e-6, implementation="triton"
        ),
        "x: expected a floating dtype": lambda: rms_norm(x.long(), weight, 1e-6),
        "implementation: expected one of": lambda: gated(x, x, "silu", implementation="fast"),
        "activation: expected one of silu, gelu_tanh": lambda: gated(x, x, "relu"),
        "up: expected [3, 8]": lambda: gated(x, x[:2], "silu"),
        "k: expected [1, H, 3, 8]": lambda: rope(heads, heads[:, :, :2], x[None], x[None]),
        "cos, sin: expected [1 or 1, 3, R]": lambda: rope(
            heads, heads, x[None, :, :3], x[None, :, :3]
        ),
    }.items():
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert message in str(error.value)

"""The transcoder's Triton kernels: accuracy against float64, special inputs, determinism.

Where they run: ``tests/kernels/conftest.py``.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import executed
import pytest
import torch
from device_code import copy_of
from hypothesis import HealthCheck, Phase, given, settings
from random_cases import cases
from torch import Tensor
from transcoder_cases import (
    SLOW_INTERPRETED,
    TRITON_DEVICE,
    TRITON_DTYPES,
    TRITON_SIZES,
    Case,
    draw_inputs,
    run,
    tanh,
)

from fastadapt.kernels.testing import assert_close
from fastadapt.kernels.transcoder import (
    ACTIVATIONS,
    CodeLayout,
    TranscoderOutput,
    autograd,
    transcoder,
    triton_codes,
    triton_dense,
    triton_encode,
    triton_forward,
    triton_sums,
)
from fastadapt.kernels.transcoder.codes import sparse_codes

PROOF = os.environ.get("FASTADAPT_PROOF") == "1"
#: Whether to use the paths for few tokens.
FEW = [False, True]
FEW_SLOW = [False, pytest.param(True, marks=SLOW_INTERPRETED)]
EXAMPLES = 30 if PROOF else 3  # per path
SPARSE, DENSE = CodeLayout(dense=False), CodeLayout(dense=True)
EXACT: dict[str, Any] = {"rtol": 0, "atol": 0}


def codes_of(leaves: dict[str, Any], arguments: dict[str, Any], **options: Any) -> Tensor:
    """Return the codes as a dense a: the output of an identity decoder."""
    F = len(leaves["b_enc"])
    encoder = {name: leaves[name] for name in ("x", "W_enc", "b_enc")}
    eye = torch.eye(F, dtype=encoder["x"].dtype, device=encoder["x"].device)
    threshold = {"threshold": leaves["threshold"]} if "threshold" in leaves else {}
    with torch.no_grad():
        decoder: dict[str, Any] = {"W_dec": eye, "b_dec": eye[0] * 0}
        return transcoder(**encoder, **decoder, **threshold, **arguments, **options).out


def assert_penalty(
    result: TranscoderOutput,
    a: Tensor,
    W_dec: Tensor,
    mask: Tensor | None,
    tanh_scale: float | None,
) -> None:
    """Compare with float64 on the same codes, whose 16-bit rounding would hide other errors."""

    def penalty(dtype: torch.dtype) -> Tensor:
        norms = torch.linalg.vector_norm(W_dec.to(dtype), dim=-1)
        if tanh_scale is None:
            costs = a.to(dtype) @ norms
        else:
            costs = (tanh_scale * a.to(dtype) * norms).tanh().sum(-1)
        return (costs if mask is None else costs * mask.to(dtype)).sum()

    assert result.penalty.dtype == torch.float32
    assert_close(result.penalty, penalty(torch.float64), penalty(torch.float32), name="penalty")


@pytest.mark.parametrize("few", FEW_SLOW)
@settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes in the interpreter
)
@given(case=cases(TRITON_DTYPES, TRITON_SIZES))
def test_kernels_keep_the_budget(few: bool, case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not few:
            patch.setattr(triton_forward, "FEW", 0)
            patch.setattr(autograd, "SMALL", 0)
            patch.setattr(triton_forward, "SMALL_ENTRIES", 0)
        keep_the_budget(case)


def keep_the_budget(case: Case) -> None:
    leaves, arguments, cotangent, c = draw_inputs(case, TRITON_DEVICE)
    before = {name: leaf.clone() for name, leaf in leaves.items()}
    options: dict[str, Any] = {"implementation": "triton", "plan": case.plan}
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        args = (leaves, arguments, cotangent, c)
        actual = run(*args, dtype=case.dtype, **options)
        oracle = run(*args, dtype=torch.float64, implementation="reference")
        peer = run(*args, dtype=case.dtype, implementation="reference")
        a = codes_of(leaves, arguments, **options) if case.F else leaves["x"].new_zeros(0)
    finally:
        torch.use_deterministic_algorithms(False)

    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf, before[name], **EXACT, equal_nan=True)
    result, gradients = actual
    assert result.out.dtype == case.dtype
    assert_close(result.out, oracle[0].out, peer[0].out, name="out")
    if case.F:
        padded = arguments.get("padding", torch.zeros_like(a[..., 0], dtype=torch.bool))
        assert_penalty(result, a, leaves["W_dec"], arguments.get("mask"), case.tanh_scale)
        assert not a[padded].any()
        counted = torch.ones_like(padded) if not case.masked else arguments["mask"] != 0
        active = (a != 0) & (counted & ~padded)[..., None]
        assert torch.equal(result.stats.feature_counts, active.flatten(0, -2).sum(0))
        assert result.stats.n_active == active.sum()
        if case.activation == "batch_topk":
            rows = torch.where(active, a.double(), torch.inf).flatten(0 if case.S is None else 1)
            least = rows.view(case.S or 1, -1).amin(1) if rows.numel() else rows
            least = least[least.isfinite()]
            mean = least.mean().float()
            torch.testing.assert_close(result.stats.min_active, mean, equal_nan=True)
    assert torch.equal(result.stats.n_tokens, oracle[0].stats.n_tokens)

    # Rounding can move an entry across the cut. The oracle's or the peer's gradients then belong to
    # other codes; they are compared only if the codes are equal.
    same = all(
        torch.equal(result.stats.feature_counts, other[0].stats.feature_counts)
        and torch.equal(result.stats.n_codes, other[0].stats.n_codes)
        for other in (oracle, peer)
    )
    if same:
        for name, gradient in gradients.items():
            assert gradient.dtype == case.dtype
            assert_close(gradient, oracle[1][name], peer[1][name], name=f"gradient of {name}")
    else:
        assert case.dtype != torch.float32 or not case.coarse


@pytest.mark.parametrize(
    "dtype",
    [TRITON_DTYPES[-1], *(pytest.param(d, marks=SLOW_INTERPRETED) for d in TRITON_DTYPES[:-1])],
)
@pytest.mark.every_kernel
def test_products_of_tiles(dtype: torch.dtype) -> None:
    """Enough tokens and columns for whole tiles of tensor cores."""
    case = Case(
        activation="relu",
        dtype=dtype,
        S=None,
        T=40,
        d_in=160,
        d_out=48,
        F=96,
        k=0,
        shift=-0.5,
        coarse=False,
        inference=False,
        layouts=("contiguous",) * 8,
        masked=None,
        padded=False,
        residual=True,
        plan=CodeLayout(dense=False, capacity=4000),
        seed=0,
    )
    keep_the_budget(case)


@pytest.mark.parametrize("plan", [SPARSE, DENSE, CodeLayout(False, 0), None])
@pytest.mark.parametrize(("T", "E", "F"), [(0, 20, 64), (17, 0, 64), (17, 20, 0)])
def test_nothing_to_sum(T: int, E: int, F: int, plan: CodeLayout | None) -> None:
    leaves = inputs(T=T, E=E, F=F)
    if plan == CodeLayout(False, 0):
        leaves["b_enc"] = torch.full_like(leaves["b_enc"], -100.0).requires_grad_()
    compare(leaves, plan)


@pytest.mark.parametrize(
    "activation", ["jumprelu", pytest.param("threshold", marks=SLOW_INTERPRETED)]
)
def test_too_many_codes_without_a_plan_become_dense(activation: str) -> None:
    leaves = inputs(T=70, shift=1.0)
    arguments: dict[str, Any] = {"activation": "jumprelu", "bandwidth": 0.3}
    if activation == "jumprelu":
        leaves["threshold"] = (torch.rand(64) / 4 + 0.1).to(TRITON_DEVICE)
    else:
        threshold = leaves["b_dec"].new_full((), 0.2)
        arguments = {"activation": "batch_topk", "threshold": threshold}
    compare(leaves, None, **arguments)


def inputs(
    T: int = 17, D: int = 24, E: int = 20, F: int = 64, shift: float = -1.0, **changes: Tensor
) -> dict[str, Any]:
    """Return fp32 leaves on the device, by name."""
    leaves = {
        "x": torch.randn(T, D),
        "W_enc": torch.randn(F, D) / D**0.5,
        "b_enc": torch.randn(F) + shift,
        "W_dec": torch.randn(F, E),
        "b_dec": torch.randn(E),
        "residual": torch.randn(T, E),
    }
    leaves |= changes
    return {name: leaf.to(TRITON_DEVICE).requires_grad_() for name, leaf in leaves.items()}


def compare(leaves: dict[str, Any], plan: CodeLayout | None, **more: Any) -> Any:
    """Compare outputs and gradients, and outputs alone, with float64; return the statistics."""
    g = torch.randn_like(leaves["residual"])
    args = (leaves, more, g, torch.tensor(0.7, device=g.device))
    actual = run(*args, dtype=torch.float32, implementation="triton", plan=plan)
    oracle = run(*args, dtype=torch.float64, implementation="reference")
    peer = run(*args, dtype=torch.float32, implementation="reference")
    for name in ("n_active", "feature_counts", "n_tokens", "n_codes"):
        assert torch.equal(getattr(actual[0].stats, name), getattr(oracle[0].stats, name)), name
    with torch.no_grad():
        alone = transcoder(**leaves, **more, implementation="triton", plan=plan)
    for name in ("out", "penalty"):
        values = [getattr(r[0], name) for r in (actual, oracle, peer)]
        assert_close(*values, name=name)
        assert_close(getattr(alone, name), *values[1:], name=f"{name} without gradients")
    for name, gradient in actual[1].items():
        assert_close(gradient, oracle[1][name], peer[1][name], name=f"gradient of {name}")
    return actual[0].stats


@pytest.mark.parametrize("plan", [SPARSE, DENSE, None])
def test_nothing_is_truncated(plan: CodeLayout | None) -> None:
    T, F = 20, 80
    b_enc = torch.full((F,), -100.0)
    b_enc[32:64] = 100.0  # one word of a tile, active on every token
    x = torch.randn(T, 24)
    x[7] = 1000 * torch.ones(24)  # a token on which every feature is active
    W_enc = torch.rand(F, 24)
    stats = compare(inputs(T=T, x=x, W_enc=W_enc, b_enc=b_enc, F=F), plan)
    assert stats.feature_counts[32:64].tolist() == [T] * 32
    assert stats.n_active == 32 * T + (F - 32)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.every_kernel
def test_features_of_many_pieces(scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (triton_codes, triton_sums):
        monkeypatch.setattr(module, "GPU_PIECE", 16)
    b_enc = torch.full((40,), -100.0)
    b_enc[[0, 13, 39]] = 100.0
    b_enc[20:25] = torch.tensor([-0.2, 0.0, 0.2, 0.4, 0.6])  # codes for a few pieces
    leaves = inputs(T=65, D=8, E=8, F=40, b_enc=b_enc)
    stats = compare(leaves, SPARSE, **tanh(scale))
    assert stats.feature_counts[[0, 13, 39]].tolist() == [65] * 3


@pytest.mark.parametrize("few", FEW)
@pytest.mark.parametrize("plan", [SPARSE, DENSE])
@pytest.mark.parametrize("activation", ["relu", "topk", "batch_topk", "jumprelu", "threshold"])
@pytest.mark.every_kernel
def test_every_activation_and_variant(
    activation: str,
    plan: CodeLayout,
    few: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not few:
        monkeypatch.setattr(triton_forward, "FEW", 0)
        monkeypatch.setattr(autograd, "SMALL", 0)
    ranking: dict[str, Any] = {"relu": {}, "topk": {"k": 5}, "batch_topk": {"k": 4.5}}
    arguments: dict[str, Any] = ranking.get(activation, {"bandwidth": 0.3})
    leaves = inputs(T=11, F=40)
    if activation == "jumprelu":
        leaves["threshold"] = (torch.rand(40) / 4 + 0.1).to(TRITON_DEVICE)
    if activation == "threshold":
        activation, arguments = "batch_topk", {"threshold": leaves["b_dec"].new_full((), 0.2)}
    compare(leaves, plan, activation=activation, **arguments)


@pytest.mark.parametrize(
    ("activation", "plan", "few"),
    [
        ("relu", SPARSE, True),
        ("jumprelu", SPARSE, False),
        ("relu", DENSE, False),
        pytest.param("relu", SPARSE, False, marks=SLOW_INTERPRETED),
        pytest.param("jumprelu", SPARSE, True, marks=SLOW_INTERPRETED),
        pytest.param("jumprelu", DENSE, False, marks=SLOW_INTERPRETED),
    ],
)
def test_tanh(
    activation: str, plan: CodeLayout, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights, codes in the window, norms given and not, and at both ends of tanh."""
    if not few:
        monkeypatch.setattr(triton_forward, "FEW", 0)
        monkeypatch.setattr(autograd, "SMALL", 0)
    leaves = inputs(T=4, D=8, E=9, F=20)
    arguments: dict[str, Any] = {"activation": activation, "mask": torch.rand(4).to(TRITON_DEVICE)}
    if activation == "jumprelu":
        leaves["threshold"] = (torch.rand(20) / 4 + 0.1).to(TRITON_DEVICE)
        arguments["bandwidth"] = 0.3
    with torch.no_grad():
        leaves["W_dec"][::3] *= 1e-4
        leaves["W_dec"][1::3] *= 30
        leaves["W_dec"][0] = 0
    compare(leaves, plan, **arguments, **tanh(0.7))


#: By kernel that multiplies by the penalty's slope: module, and the text without the slope.
SLOPES: dict[str, tuple[ModuleType, str]] = {
    "sampled_product": (triton_sums, "cost = cost * penalty_slope(value * norm, SCALE)"),
    "sum_by_feature": (triton_sums, "scale = scale * penalty_slope(scale * norm, SCALE)"),
    "finish_gradient": (
        triton_dense,
        "cost = cost * penalty_slope(a.to(tl.float32) * norm, SCALE)",
    ),
    "sum_columns": (triton_dense, "value = value * penalty_slope(value * norm[None, :], SCALE)"),
}


@pytest.mark.parametrize("kernel", SLOPES)
def test_a_kernel_without_the_slope_is_noticed(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, text = SLOPES[kernel]
    name = text.partition(" ")[0]
    copy = copy_of(module, text, f"{name} = {name} * SCALE", tmp_path)
    monkeypatch.setattr(module, kernel, getattr(copy, kernel))
    leaves = inputs(T=4, D=8, E=9, F=20)
    with pytest.raises(AssertionError, match=r"gradient of (x|W_dec)"):
        compare(leaves, DENSE if module is triton_dense else SPARSE, **tanh(0.7))


@pytest.mark.parametrize("plan", [SPARSE, DENSE])
@pytest.mark.parametrize("padded", [False, True])
def test_ties_across_tokens_go_to_the_first(plan: CodeLayout, padded: bool) -> None:
    S, T, F, k = 2, 3, 33, 15.5
    arguments = [
        torch.zeros(S, T, 2),
        torch.ones(F, 2),
        torch.ones(F),
        torch.eye(F),
        torch.zeros(F),
    ]
    padding = torch.zeros(S, T, dtype=torch.bool, device=TRITON_DEVICE)
    padding[1, 0] = padded
    result = transcoder(
        *(t.to(TRITON_DEVICE) for t in arguments),
        activation="batch_topk",
        k=k,
        padding=padding,
        implementation="triton",
        plan=plan,
    )
    for s in range(S):
        n_tokens = T - int(padding[s].sum())
        expected = torch.zeros(n_tokens * F)
        expected[: int(k * n_tokens)] = 1
        assert result.out[s][~padding[s]].flatten().tolist() == expected.tolist()
        assert not result.out[s][padding[s]].any()


@pytest.mark.parametrize(
    "activation",
    ["relu", *(pytest.param(name, marks=SLOW_INTERPRETED) for name in ACTIVATIONS[1:])],
)
def test_exceeding_the_capacity_is_reported_and_stays_in_bounds(activation: str) -> None:
    leaves = inputs(shift=0.5)
    ranking: dict[str, Any] = {"relu": {}, "topk": {"k": 20}, "batch_topk": {"k": 20.5}}
    arguments: dict[str, Any] = ranking.get(
        activation, {"bandwidth": 0.3, "threshold": torch.full((64,), 0.1, device=TRITON_DEVICE)}
    )
    plan = CodeLayout(dense=False, capacity=100)
    out, penalty, stats, _ = transcoder(
        **leaves, activation=activation, **arguments, implementation="triton", plan=plan
    )
    enough = transcoder(
        **leaves, activation=activation, **arguments, implementation="triton", plan=SPARSE
    )
    assert stats.n_codes > 100
    assert torch.equal(stats.n_codes, enough.stats.n_codes)
    (out.sum() + penalty).backward()  # invalid, but within the buffers
    exact = CodeLayout(dense=False, capacity=int(stats.n_codes))
    fits = transcoder(
        **leaves, activation=activation, **arguments, implementation="triton", plan=exact
    )
    assert torch.equal(fits.out, enough.out)


@pytest.mark.parametrize("plan", [SPARSE, DENSE])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "dtype",
    [  # The interpreter runs programs sequentially, so few differences are possible.
        pytest.param(dtype, marks=SLOW_INTERPRETED) for dtype in (torch.float32, torch.float16)
    ],
)
def test_same_inputs_same_bits(plan: CodeLayout, activation: str, dtype: torch.dtype) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    leaves = {name: leaf.detach().to(dtype) for name, leaf in inputs().items()}
    ranking: dict[str, Any] = {"relu": {}, "topk": {"k": 5}, "batch_topk": {"k": 4.5}}
    arguments: dict[str, Any] = ranking.get(activation, {"bandwidth": 0.3})
    if activation == "jumprelu":
        leaves["threshold"] = torch.full((64,), 0.1, device=TRITON_DEVICE)
    g = torch.randn_like(leaves["residual"])
    first: list[Tensor] = []
    repeats = 250 if TRITON_DEVICE == "cuda" else 5 if PROOF else 2
    for _ in range(repeats):
        result, gradients = run(
            leaves,
            {"activation": activation, **arguments},
            g,
            torch.tensor(0.5, device=TRITON_DEVICE),
            dtype=dtype,
            implementation="triton",
            plan=plan,
        )
        bits = [result.out, result.penalty, *result.stats, *gradients.values()]
        first = first or bits
        for a, b in zip(first, bits, strict=True):
            assert torch.equal(a, b) or (a.isnan() & b.isnan()).all()


@pytest.mark.parametrize("T", [1, 2, 16, 17, 64, 65])
def test_every_number_of_tokens(T: int) -> None:
    """One token as in generation, blocks of few tokens, and just above; without a plan."""
    compare(inputs(T=T, F=33), None)


@pytest.mark.parametrize("plan", [SPARSE, DENSE])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in the interpreter
def test_non_finite_and_tiny_values(plan: CodeLayout) -> None:
    values = [math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-40, 1.0, 1.0, 2.0, -1.0]
    active: dict[Any, list[int]] = {
        "relu": [0, 1, 5, 6, 7, 8],
        0: [],
        1: [0],
        2: [0, 1],
        3: [0, 1, 8],
        4: [0, 1, 6, 8],  # of two equal values, the lower index
        10: [0, 1, 5, 6, 7, 8],
    }
    for k, expected in active.items():
        for name in ("topk", "batch_topk"):
            ranking: dict[str, Any] = {} if k == "relu" else {"activation": name, "k": k}
            arguments = [
                torch.zeros(1, 1),
                torch.ones(10, 1),
                torch.tensor(values),
                torch.ones(10, 2),
                torch.zeros(2),
            ]
            result = transcoder(
                *(t.to(TRITON_DEVICE) for t in arguments),
                **ranking,
                implementation="triton",
                plan=plan,
            )
            assert result.stats.fired.nonzero().flatten().tolist() == expected, (k, name)
            assert result.out.isnan().all() == (k != 0)
            if name == "batch_topk" and k not in ("relu", 0):  # NaN is left out
                least = min((values[i] for i in expected[1:]), default=math.inf)
                assert result.stats.min_active == torch.tensor(least)


@pytest.mark.parametrize(
    ("N", "F"),
    [
        (1, 31),
        (300, 33),
        *(pytest.param(*shape, marks=SLOW_INTERPRETED) for shape in ((513, 130), (3, 65_537))),
    ],
)
def test_codes_equal_those_of_the_cpu(N: int, F: int) -> None:
    """Tokens and features of several blocks; a last word of one feature; an unused tail."""
    a = torch.where(torch.rand(N, F) < 3 / F, torch.rand(N, F) + 0.1, 0)
    a[:, [0, F - 1]] = 1
    capacity = int(a.count_nonzero()) + 5
    plan = CodeLayout(dense=False, capacity=capacity)
    expected = sparse_codes(a, None, plan, ordered=True)
    values = a.to(TRITON_DEVICE)
    kind = triton_encode.Activation(None, 0.0, None)
    flags, _ = triton_encode.mark_product(values, kind, dense=False)
    actual, stats = triton_codes.encode_flags(
        flags, values, None, kind, capacity, dense=False, ordered=True
    )
    assert stats.n_codes == capacity - 5
    assert torch.equal(stats.feature_counts.cpu(), (a != 0).sum(0))
    expected.features[-5:] = F
    expected.order[-5:] = torch.arange(capacity)[-5:]
    pieces = (expected.feature_offsets.diff() - 1).clamp(min=0) // triton_codes.GPU_PIECE
    pieces = torch.nn.functional.pad(pieces.cumsum(0), (1, 0))
    expected = expected._replace(piece_offsets=pieces.int())
    for name, one, two in zip(actual._fields, actual, expected, strict=True):
        assert torch.equal(one.cpu(), two), name
        assert one.dtype == two.dtype


def test_errors_where_kernels_do_not_run() -> None:
    wide: dict[str, Any] = {name: leaf.double() for name, leaf in inputs().items()}
    with pytest.raises(ValueError, match="implementation must be 'reference' for float64"):
        transcoder(**wide, implementation="triton")
    leaves = inputs()
    theta = torch.ones(64, dtype=torch.float64, device=TRITON_DEVICE)
    jumprelu: dict[str, Any] = {"activation": "jumprelu", "bandwidth": 0.1, "threshold": theta}
    with pytest.raises(ValueError, match="implementation must be 'reference' for float64"):
        transcoder(**leaves, **jumprelu, implementation="triton")


@pytest.mark.skipif(executed.STAGE is not None, reason="executing a kernel reads its tensors")
def test_a_step_with_a_plan_never_synchronises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_forward, "FEW", 8)
    leaves = inputs()
    g = torch.randn_like(leaves["residual"])

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a value was read from the device")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(Tensor, name, refuse)
    for plan in (DENSE, CodeLayout(dense=False, capacity=6_000)):
        out, penalty, *_ = transcoder(**leaves, implementation="triton", plan=plan)
        torch.autograd.backward([out, penalty], [g, torch.ones_like(penalty)])
    with torch.no_grad():  # generation without a plan does not synchronise either
        transcoder(**leaves, implementation="triton")

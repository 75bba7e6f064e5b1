"""The codes that the op returns are the active entries, in every implementation."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from random_cases import cases
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transcoder_cases import (
    DTYPES,
    SETTINGS,
    SLOW_INTERPRETED,
    TRITON_DEVICE,
    Case,
    draw_inputs,
)

from fastadapt.kernels.testing import assert_close
from fastadapt.kernels.transcoder import CodeLayout, SparseCodes, TranscoderOutput, transcoder

PLANS = [
    None,
    CodeLayout(dense=True),
    CodeLayout(dense=False),
    CodeLayout(dense=False, capacity=4000),
]
S, T, D, E, F = 2, 9, 12, 10, 64


def inputs(activation: str, device: str) -> dict[str, Any]:
    torch.manual_seed(3)
    shapes = {"x": (S, T, D), "W_enc": (F, D), "b_enc": (F,), "W_dec": (F, E), "b_dec": (E,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors["b_enc"] -= 3
    if activation == "jumprelu":
        tensors["threshold"] = torch.rand(F) + 0.2
    padding = torch.zeros(S, T, dtype=torch.bool)
    padding[1, 6:] = True
    named = {name: tensor.to(device) for name, tensor in tensors.items()}
    return {
        **named,
        "padding": padding.to(device),
        "activation": activation,
        **SETTINGS[activation],
    }


def dense(codes: SparseCodes, n_tokens: int, n_features: int) -> Tensor:
    a = codes.values.new_zeros(n_tokens, n_features)
    a[codes.tokens, codes.features] = codes.values
    return a


def identity(tensors: dict[str, Any], **options: Any) -> Tensor:
    """Return the dense a: the output of an identity decoder."""
    eye = torch.eye(len(tensors["b_enc"]), dtype=tensors["x"].dtype, device=tensors["x"].device)
    with torch.no_grad():
        return transcoder(**{**tensors, "W_dec": eye, "b_dec": eye[0] * 0}, **options).out.flatten(
            0, -2
        )


def check(tensors: dict[str, Any], codes: SparseCodes, a: Tensor) -> None:
    """Check order, uniqueness and values of codes; none is inactive or on padding."""
    n_tokens, n_features = a.shape
    assert codes.tokens.dtype == codes.features.dtype == torch.int64
    assert codes.values.dtype == tensors["x"].dtype
    assert not codes.values.requires_grad
    index = codes.tokens * n_features + codes.features
    assert (index.diff() > 0).all()
    assert (codes.values != 0).all()
    torch.testing.assert_close(dense(codes, n_tokens, n_features), a, rtol=0, atol=0)
    if "padding" in tensors:
        assert not tensors["padding"].flatten()[codes.tokens].any()


#: All variants of the CPU, and one per activation of Triton, whose interpreter is slow.
VARIANTS: list[Any] = [
    *(("reference", activation, None) for activation in SETTINGS),
    *(("sparse", activation, plan) for activation in SETTINGS for plan in PLANS),
    ("triton", "relu", CodeLayout(dense=False, capacity=4000)),
    ("triton", "jumprelu", CodeLayout(dense=True)),
    ("triton", "jumprelu", CodeLayout(dense=False)),
    ("triton", "topk", None),
    pytest.param("triton", "batch_topk", None, marks=SLOW_INTERPRETED),
]


@pytest.mark.parametrize(("implementation", "activation", "plan"), VARIANTS)
def test_codes_are_the_active_entries(
    implementation: str, activation: str, plan: CodeLayout | None
) -> None:
    tensors = inputs(activation, TRITON_DEVICE if implementation.startswith("triton") else "cpu")
    options: dict[str, Any] = {"implementation": implementation, "plan": plan}
    result = transcoder(**tensors, return_codes=True, **options)
    without = transcoder(**tensors, **options)
    assert torch.equal(result.out, without.out)
    assert without.codes is None
    assert result.codes is not None
    check(tensors, result.codes, identity(tensors, **options))
    assert len(result.codes.values) == result.stats.n_active > 0


@given(case=cases(DTYPES))
def test_codes_of_any_call(case: Case) -> None:
    leaves, arguments, _, _ = draw_inputs(case)
    named = {**leaves, **arguments}
    for implementation, plan in (("reference", None), ("sparse", case.plan)):
        options: dict[str, Any] = {"implementation": implementation, "plan": plan}
        result = transcoder(**named, return_codes=True, **options)
        assert result.codes is not None
        alike = {key: value for key, value in named.items() if key != "residual"}
        a = identity(alike, **options) if case.F else None
        if a is not None:
            check(named, result.codes, a)
        if not case.masked:
            assert len(result.codes.values) == result.stats.n_active


class Reads(TorchDispatchMode):
    """Count the calls that wait for a GPU: numbers read, and results whose size is data."""

    waits = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.waits += masks or name in ("_local_scalar_dense", "nonzero", "masked_select")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_the_codes_are_read_once(activation: str, plan: CodeLayout | None) -> None:
    tensors = inputs(activation, "cpu")
    with Reads() as without:
        transcoder(**tensors, plan=plan)
    with Reads() as reads:
        transcoder(**tensors, plan=plan, return_codes=True)
    assert reads.waits == without.waits + 1


def test_codes_have_no_gradient_but_the_output_has() -> None:
    tensors = inputs("relu", "cpu")
    tensors["W_dec"].requires_grad_()
    tensors["W_enc"].requires_grad_()
    result = transcoder(**tensors, return_codes=True)
    result.out.sum().backward()
    assert tensors["W_enc"].grad is not None
    assert result.codes is not None
    assert not any(tensor.requires_grad for tensor in result.codes)


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.11 breaks off in the call, and cannot go on"
)
@pytest.mark.slow
def test_a_compiled_call_returns_codes() -> None:
    torch._dynamo.reset()
    tensors = inputs("relu", "cpu")

    @torch.compile(backend="aot_eager", dynamic=True)
    def compiled(x: Tensor) -> TranscoderOutput:
        return transcoder(**{**tensors, "x": x}, return_codes=True, plan=CodeLayout(dense=False))

    with torch.no_grad():
        actual = compiled(tensors["x"])
    wide: dict[str, Any] = {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in tensors.items()
    }
    oracle = transcoder(**wide, return_codes=True, implementation="reference")
    peer = transcoder(**tensors, return_codes=True, implementation="reference")
    assert_close(actual.out, oracle.out, peer.out)
    assert actual.codes is not None
    assert oracle.codes is not None
    assert peer.codes is not None
    assert torch.equal(actual.codes.tokens, oracle.codes.tokens)
    assert torch.equal(actual.codes.features, oracle.codes.features)
    assert_close(actual.codes.values, oracle.codes.values, peer.codes.values)
    torch._dynamo.reset()


SHARES: list[Any] = [
    *(
        (implementation, k, n)
        for implementation in ("reference", "sparse")
        for k in (0.1, 0.29, 0.57, 0.58, 1.1, 1.15, 2.3)
        for n in (10, 100, 700)
    ),
    *(pytest.param("triton", k, 100, marks=SLOW_INTERPRETED) for k in (0.29, 1.15)),
]


@pytest.mark.parametrize(("implementation", "k", "n_tokens"), SHARES)
@pytest.mark.parametrize("padded", [False, True])
def test_a_decimal_k_is_exact(implementation: str, padded: bool, n_tokens: int, k: float) -> None:
    """In floats 0.29 * 100 is 28.999999999999996; 29 codes are expected."""
    device = TRITON_DEVICE if implementation == "triton" else "cpu"
    total = n_tokens + 3 if padded else n_tokens
    padding = torch.arange(total, device=device) >= n_tokens if padded else None
    weights = torch.rand(64, 4, device=device)
    codes = transcoder(
        torch.rand(total, 4, device=device) + 0.1,
        weights,
        weights.new_zeros(64),
        weights,
        weights.new_zeros(4),
        activation="batch_topk",
        k=k,
        padding=padding,
        return_codes=True,
        implementation=implementation,
    ).codes
    assert codes is not None
    assert len(codes.values) == int(Fraction(str(k)) * n_tokens)


@pytest.mark.parametrize(
    ("implementation", "theta"),
    [
        *((name, theta) for name in ("reference", "sparse") for theta in (0.05, -0.05, -0.2)),
        *(pytest.param("triton", theta, marks=SLOW_INTERPRETED) for theta in (0.05, -0.05, -0.2)),
    ],
)
def test_a_penalty_raises_a_threshold_on_either_side_of_zero(
    implementation: str, theta: float
) -> None:
    """A threshold below 0 acts as 0, and its gradient raises the threshold."""
    device = TRITON_DEVICE if implementation == "triton" else "cpu"
    x = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)).to(device)
    one, zero = torch.ones(1, 1, device=device), torch.zeros(1, device=device)
    threshold = torch.tensor([theta], device=device, requires_grad=True)
    result = transcoder(
        x, one, zero, one, zero, activation="jumprelu", threshold=threshold, bandwidth=0.1,
        implementation=implementation,
    )  # fmt: skip
    cut = max(theta, 0.0)
    torch.testing.assert_close(result.out, torch.where(x > cut, x, 0))
    result.penalty.backward()
    window = ((x - cut).abs() < 0.05).sum().item()
    assert window > 5
    assert threshold.grad is not None
    assert threshold.grad.item() == pytest.approx(-abs(theta) / 0.1 * window, rel=1e-5)

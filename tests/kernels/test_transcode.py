"""``transcode``, the transcoder's output alone: accuracy, special inputs, contract of the op.

Where Triton kernels run: ``tests/kernels/conftest.py``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transcoder_cases import (
    DTYPES,
    SLOW_INTERPRETED,
    TRITON_DEVICE,
    TRITON_DTYPES,
    run,
)

from fastadapt.kernels.flops import register_flop_formulas
from fastadapt.kernels.testing import assert_close, with_layout
from fastadapt.kernels.transcoder import transcode, transcoder, triton_forward

register_flop_formulas()
#: Arguments of every activation, `threshold` aside.
SETTINGS: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk": {"activation": "topk", "k": 3},
    "batch_topk": {"activation": "batch_topk", "k": 2.5},
    "threshold": {"activation": "batch_topk"},
    "jumprelu": {"activation": "jumprelu", "bandwidth": 0.5},
}
#: Implementations, with the dtypes that they are tested in.
IMPLEMENTATIONS = [
    *(("sparse", dtype) for dtype in DTYPES),
    ("triton", TRITON_DTYPES[-1]),
    *(pytest.param("triton", dtype, marks=SLOW_INTERPRETED) for dtype in TRITON_DTYPES[:-1]),
]


def place(implementation: str) -> str:
    return TRITON_DEVICE if implementation == "triton" else "cpu"


def draw(
    activation: str, T: int, D: int = 24, E: int = 20, F: int = 40, shift: float = -0.7
) -> dict[str, Any]:
    """Return arguments in float64, with values that all dtypes hold exactly."""
    tensors = {
        "x": torch.randn(T, D),
        "W_enc": torch.randn(F, D) / D**0.5,
        "b_enc": torch.randn(F) + shift,
        "W_dec": torch.randn(F, E),
        "b_dec": torch.randn(E),
        "residual": torch.randn(T, E),
    }
    if activation == "threshold":
        tensors["threshold"] = torch.tensor(0.25)
    if activation == "jumprelu":
        tensors["threshold"] = torch.rand(F) / 2 - 0.1  # some below 0, which act as 0
    return {name: t.bfloat16().half().double() for name, t in tensors.items()}


def output(
    tensors: dict[str, Any], implementation: str, dtype: torch.dtype, **options: Any
) -> Tensor:
    """Return the result on `tensors` in `dtype`, without gradients."""
    device = place(implementation)
    cast = {name: t.to(device, dtype) for name, t in tensors.items()}
    if "padding" in options:
        options["padding"] = options["padding"].to(device)
    with torch.no_grad():
        return transcode(**cast, **options, implementation=implementation)


def keep_the_budget(
    tensors: dict[str, Any], implementation: str, dtype: torch.dtype, **options: Any
) -> Tensor:
    """Compare with the reference of `transcoder` in float64; return the result."""
    more = {name: value for name, value in options.items() if name != "dense"}
    actual = output(tensors, implementation, dtype, **options)
    oracle = transcoder(**tensors, **more, implementation="reference").out
    low = {name: t.to(dtype) for name, t in tensors.items()}
    peer = transcoder(**low, **more, implementation="reference").out
    assert actual.dtype == dtype
    assert actual.shape == oracle.shape
    assert_close(actual.cpu(), oracle, peer)
    return actual.cpu()


#: The quick tests execute every kernel in other tests of this file.
SLOW_TRITON = pytest.param("triton", marks=SLOW_INTERPRETED)


@pytest.mark.parametrize("activation", SETTINGS)
@pytest.mark.parametrize(("implementation", "dtype"), IMPLEMENTATIONS)
@pytest.mark.every_kernel
def test_every_activation_keeps_the_budget(
    implementation: str, dtype: torch.dtype, activation: str
) -> None:
    for T in (1, 17):
        tensors = draw(activation, T)
        keep_the_budget(tensors, implementation, dtype, **SETTINGS[activation])


@pytest.mark.parametrize("T", [0, 2, 16, 64, 65])
@pytest.mark.parametrize("implementation", ["sparse", SLOW_TRITON])
def test_every_number_of_tokens(implementation: str, T: int) -> None:
    keep_the_budget(draw("relu", T, F=33), implementation, torch.float32)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("activation", SETTINGS)
@pytest.mark.parametrize("implementation", ["sparse", "triton"])
def test_padding_and_both_decoders(implementation: str, activation: str, dense: bool) -> None:
    tensors = draw(activation, 11)
    padding = torch.rand(11) > 0.7
    options = SETTINGS[activation] | {"dense": dense}
    tensors["x"][padding] = math.nan
    keep_the_budget(tensors, implementation, torch.float32, **options, padding=padding)


@pytest.mark.parametrize("dense", [None, False, True])
@pytest.mark.parametrize("implementation", ["sparse", "triton"])
def test_chooses_a_decoder_for_many_tokens(
    implementation: str, dense: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_forward, "SMALL_ENTRIES", 0)
    for shift in (-3.0, 3.0):  # few active features, then most
        for activation in ("relu", "topk"):
            tensors = draw(activation, 7, shift=shift)
            options = SETTINGS[activation] | {"dense": dense}
            keep_the_budget(tensors, implementation, torch.float32, **options)


@pytest.mark.parametrize("active", ["none", "all", "one word"])
@pytest.mark.parametrize("implementation", ["sparse", "triton"])
def test_nothing_is_truncated(implementation: str, active: str) -> None:
    tensors = draw("relu", 5, F=100)
    tensors["b_enc"][:] = 100.0 if active == "all" else -100.0
    if active == "one word":
        tensors["b_enc"][32:64] = 100.0
    out = keep_the_budget(tensors, implementation, torch.float32)
    if active == "none":
        assert torch.equal(out, tensors["b_dec"].float() + tensors["residual"].float())


@pytest.mark.parametrize("F", [8_192 + 65, pytest.param(65_537, marks=[pytest.mark.slow])])
@pytest.mark.parametrize("implementation", ["sparse", SLOW_TRITON])
def test_more_words_than_a_block(implementation: str, F: int) -> None:
    """A token with active features at both ends of several blocks, and one with a few."""
    tensors = draw("relu", 2, D=4, E=5, F=F, shift=-9.0)
    tensors["x"][:] = torch.eye(4)[:2]
    tensors["W_enc"][:, 0] = 0.0
    tensors["W_enc"][[0, 31, 32, 8_191, 8_192, F - 1], 0] = 20.0
    tensors["W_enc"][8_100:8_200, 0] = 15.0
    tensors["W_enc"][:, 1] = 0.0
    tensors["W_enc"][F - 2, 1] = 20.0
    keep_the_budget(tensors, implementation, torch.float32)


@pytest.mark.parametrize("empty", ["D", "E", "F"])
@pytest.mark.parametrize("implementation", ["sparse", SLOW_TRITON])
def test_empty_widths(implementation: str, empty: str) -> None:
    keep_the_budget(draw("relu", 3, **{empty: 0}), implementation, torch.float32)


@pytest.mark.parametrize(
    "implementation", ["sparse", pytest.param("triton", marks=SLOW_INTERPRETED)]
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in the interpreter
def test_non_finite_and_tiny_values(implementation: str) -> None:
    finite = [-0.0, 0.0, 1e-40, 1.0, 1.0, 2.0, -1.0]
    device = place(implementation)
    for values in (finite, [math.inf, *finite], [-math.inf, *finite], [math.nan, *finite]):
        F = len(values)
        tensors = [torch.zeros(1, 1), torch.ones(F, 1), torch.tensor(values)]
        tensors += [torch.randn(F, 2), torch.zeros(2)]
        for k in (None, 0, 1, 2, 4, F):
            options: dict[str, Any] = {} if k is None else {"activation": "topk", "k": k}
            expected = transcoder(*tensors, **options, implementation="reference").out
            placed = [t.to(device) for t in tensors]
            out = transcode(*placed, **options, implementation=implementation).cpu()
            torch.testing.assert_close(out, expected, equal_nan=True)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "parent", "offset"])
@pytest.mark.parametrize("implementation", ["sparse", SLOW_TRITON])
def test_layouts(implementation: str, layout: str) -> None:
    tensors = draw("jumprelu", 6)
    options = SETTINGS["jumprelu"]
    device = place(implementation)
    views: dict[str, Any] = {
        n: with_layout(t.float().to(device), layout) for n, t in tensors.items()
    }
    views["residual"] = views["residual"][:1].expand(6, -1)
    tensors["residual"] = tensors["residual"][:1].expand(6, -1)
    expected = output(tensors, implementation, torch.float32, **options)
    before = {name: view.clone() for name, view in views.items()}
    with torch.no_grad():
        actual = transcode(**views, **options, implementation=implementation)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    for name, view in views.items():
        assert torch.equal(view, before[name]), name


@pytest.mark.parametrize("implementation", ["reference", "sparse", SLOW_TRITON])
def test_any_leading_shape(implementation: str) -> None:
    tensors = {n: t.float().to(place(implementation)) for n, t in draw("topk", 6).items()}
    flat = transcode(**tensors, **SETTINGS["topk"], implementation=implementation)
    for lead in ((2, 3), (1, 6), (3, 1, 2)):
        shaped = tensors | {n: tensors[n].view(*lead, -1) for n in ("x", "residual")}
        out = transcode(**shaped, **SETTINGS["topk"], implementation=implementation)
        assert torch.equal(out, flat.view(*lead, -1))
    one = tensors | {n: tensors[n][2] for n in ("x", "residual")}
    out = transcode(**one, **SETTINGS["topk"], implementation=implementation)
    torch.testing.assert_close(out, flat[2])


@pytest.mark.parametrize("activation", ["relu", "topk", "threshold", "jumprelu"])
@pytest.mark.parametrize("implementation", ["triton"])
def test_a_token_depends_on_no_other(implementation: str, activation: str) -> None:
    tensors = draw(activation, 9)
    options = SETTINGS[activation]
    first = output(tensors, implementation, torch.float32, **options)
    assert torch.equal(first, output(tensors, implementation, torch.float32, **options))
    tensors["x"][:4] *= -2
    tensors["x"][5:] = 50.0
    other = output(tensors, implementation, torch.float32, **options)
    assert torch.equal(first[4], other[4])
    assert not torch.equal(first[:4], other[:4])


@pytest.mark.parametrize("dense", [None, False, True])
def test_other_tokens_change_rounding_at_most(dense: bool | None) -> None:
    """Alone, a token of few active features has codes; beside dense tokens, a dense product.

    All products of the encoder are exact.
    """
    D, E, F = 64, 48, 512
    x, W_enc = ((2 * torch.randn(n, D)).round() / 2 for n in (1, F))
    W_enc[::2] = W_enc[::2].abs()
    weights = W_enc, torch.full((F,), -9.0), torch.randn(F, E), torch.zeros(E)
    beside = torch.cat([x, torch.full((7, D), 4.0)])
    alone, among = (transcode(x, *weights, dense=dense)[0] for x in (x, beside))
    torch.testing.assert_close(alone, among)
    if dense is False:
        assert torch.equal(alone, among)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["sparse", SLOW_TRITON])
def test_dtypes_of_the_threshold(implementation: str, dtype: torch.dtype) -> None:
    device = place(implementation)
    tensors = {n: t.float().to(device) for n, t in draw("threshold", 5).items()}
    tensors["threshold"] = torch.tensor(0.25, dtype=dtype, device=device)
    out = transcode(**tensors, **SETTINGS["threshold"], implementation=implementation)
    tensors["threshold"] = torch.full((40,), 0.25, dtype=dtype, device=device)
    each = transcode(**tensors, **SETTINGS["threshold"], implementation=implementation)
    tensors["threshold"] = tensors["threshold"].float()
    expected = transcode(**tensors, **SETTINGS["threshold"], implementation="reference")
    assert torch.equal(out, each)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("activation", SETTINGS)
@pytest.mark.parametrize(
    "implementation", ["reference", "sparse", pytest.param("triton", marks=SLOW_INTERPRETED)]
)
def test_gradients_are_those_of_the_transcoder(implementation: str, activation: str) -> None:
    device = place(implementation)
    tensors = {n: t.to(device) for n, t in draw(activation, 6).items()}
    options = SETTINGS[activation]
    leaves = {n: t for n, t in tensors.items() if n != "threshold" or activation == "jumprelu"}
    leaves = {n: t.float().requires_grad_() for n, t in leaves.items()}
    constants = {n: t.float() for n, t in tensors.items() if n not in leaves}
    out = transcode(**leaves, **constants, **options, implementation=implementation)
    g = torch.randn_like(out)
    actual = torch.autograd.grad(out, list(leaves.values()), g)
    _, expected = run(
        {n: t.detach() for n, t in leaves.items()},
        options | constants,
        g,
        torch.zeros((), device=device),
        dtype=torch.float32,
        implementation=implementation,
    )
    for name, gradient in zip(leaves, actual, strict=True):
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_the_op_refuses_a_gradient() -> None:
    tensors = [t.float().requires_grad_() for t in draw("relu", 3).values()]
    x, *weights, residual = tensors
    out = torch.ops.fastadapt.transcode(
        x[None], *weights, None, residual, None, "relu", 0.0, None, "sparse"
    )
    with pytest.raises(RuntimeError, match="transcode has no gradient"):
        out.sum().backward()


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("dense", [None, True])
def test_opcheck(activation: str, dense: bool | None) -> None:
    tensors = {n: t.float() for n, t in draw(activation, 5).items()}
    x, W_enc, b_enc, W_dec, b_dec, residual = list(tensors.values())[:6]
    options = SETTINGS[activation]
    inputs = (x[None], W_enc, b_enc, W_dec, b_dec, tensors.get("threshold"), residual, None)
    settings = (options.get("activation", "relu"), float(options.get("k", 0)), dense, "sparse")
    torch.library.opcheck(torch.ops.fastadapt.transcode.default, (*inputs, *settings))


@pytest.mark.parametrize(
    "implementation", ["sparse", pytest.param("triton", marks=SLOW_INTERPRETED)]
)
def test_compiles_into_one_graph(implementation: str) -> None:
    torch._dynamo.reset()
    device = place(implementation)

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def compiled(**tensors: Any) -> Tensor:
        return transcode(**tensors, activation="topk", k=3, implementation=implementation)

    with torch.no_grad():
        for T in (5, 8, 21):
            tensors: dict[str, Any] = draw("topk", T)
            tensors = {n: t.float().to(device) for n, t in tensors.items()}
            eager = transcode(**tensors, **SETTINGS["topk"], implementation=implementation)
            assert torch.equal(compiled(**tensors), eager)
    torch._dynamo.reset()


@pytest.mark.parametrize("implementation", ["reference", "sparse", "triton"])
def test_autocast_is_a_cast_of_the_inputs(implementation: str) -> None:
    device = place(implementation)
    dtype = torch.float16 if implementation == "triton" else torch.bfloat16
    tensors = {n: t.float().to(device) for n, t in draw("relu", 5).items()}
    with torch.autocast(device, dtype):
        result = transcode(**tensors, implementation=implementation)
    low = {name: t.to(dtype) for name, t in tensors.items()}
    assert result.dtype == dtype
    assert torch.equal(result, transcode(**low, implementation=implementation))


@pytest.mark.parametrize("dense", [False, True])
def test_flops_on_the_meta_device(dense: bool) -> None:
    """Sums over codes count nothing: how many codes there are is not known on the meta device."""
    T, D, E, F = 64, 3_584, 3_000, 8_192
    with torch.device("meta"):
        tensors = [torch.empty(s) for s in ((T, D), (F, D), (F,), (F, E), (E,))]
    with FlopCounterMode(display=False) as counter:
        out = transcode(*tensors, dense=dense)
    assert out.shape == (T, E)
    assert counter.get_total_flops() == 2 * T * F * (D + E * dense)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 3}, "transcoder: k must be None with relu; got 3"),
        ({"x": torch.ones(2, 5)}, r"transcoder: W_enc must be of shape \[40, 5\]"),
        ({"implementation": "fast"}, "transcoder: implementation must be one of"),
    ],
)
def test_misuse_raises_one_clear_error(changes: dict[str, Any], message: str) -> None:
    tensors = {n: t.float() for n, t in draw("relu", 2).items()}
    with pytest.raises(ValueError, match=message):
        transcode(**tensors | changes)

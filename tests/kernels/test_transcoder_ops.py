"""The transcoder's registered ops: compilation, FLOPs, checkpointing, determinism, memory."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from transcoder_cases import SETTINGS, SLOW_INTERPRETED, TRITON_DEVICE

from fastadapt.kernels.flops import register_flop_formulas
from fastadapt.kernels.transcoder import SAVED_OPS, CodeLayout, TranscoderOutput, transcoder
from fastadapt.kernels.transcoder.codes import Codes

register_flop_formulas()

PROOF = os.environ.get("FASTADAPT_PROOF") == "1"
PLANS = [
    None,
    CodeLayout(dense=True),
    CodeLayout(dense=False),
    CodeLayout(dense=False, capacity=4000),
]
S, T, D, E, F = 2, 17, 12, 10, 64
NAMES = ["x", "W_enc", "b_enc", "W_dec", "b_dec", "residual", "threshold"]
SPARSE = CodeLayout(dense=False, capacity=2000)
#: (implementation, activation, plan): all variants of the CPU, and the most different of Triton.
VARIANTS: list[Any] = [("sparse", activation, plan) for activation in SETTINGS for plan in PLANS]
VARIANTS += [
    *(
        pytest.param(*variant, marks=SLOW_INTERPRETED)
        for variant in [
            ("triton", "relu", SPARSE),
            ("triton", "jumprelu", SPARSE),
            ("triton", "jumprelu", CodeLayout(dense=True)),
            ("triton", "topk", None),
            ("triton", "batch_topk", CodeLayout(dense=False)),
            ("triton", "relu", CodeLayout(dense=True)),
        ]
    ),
]


def place(implementation: str) -> str:
    """Return the device on which an implementation is tested."""
    return TRITON_DEVICE if implementation.startswith("triton") else "cpu"


def leaves(
    activation: str = "relu", *, seed: int = 0, tokens: int = T, device: str = "cpu"
) -> list[Tensor]:
    """Return x, W_enc, b_enc, W_dec, b_dec, residual and, for jumprelu, the threshold."""
    torch.manual_seed(seed)
    shapes = [(S, tokens, D), (F, D), (F,), (F, E), (E,), (S, tokens, E)]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[2] -= 3
    if activation == "jumprelu":
        tensors.append(torch.rand(F) + 0.2)
    return [tensor.to(device).requires_grad_() for tensor in tensors]


def call(tensors: list[Tensor], activation: str = "relu", **kwargs: Any) -> TranscoderOutput:
    named: dict[str, Any] = dict(zip(NAMES, tensors, strict=False))
    return transcoder(**named, activation=activation, **SETTINGS[activation], **kwargs)


def backward(result: TranscoderOutput, tensors: list[Tensor], **kwargs: Any) -> list[Tensor]:
    torch.manual_seed(1)
    cotangents = [torch.randn_like(result.out), torch.randn_like(result.penalty)]
    return list(torch.autograd.grad([result.out, result.penalty], tensors, cotangents, **kwargs))


class CallCounter(TorchDispatchMode):
    """Count the calls of each op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("implementation", "activation", "plan"), VARIANTS)
def test_checkpointing_saves_the_codes(
    implementation: str, activation: str, plan: CodeLayout | None
) -> None:
    tensors = leaves(activation, device=place(implementation))
    context_fn = functools.partial(create_selective_checkpoint_contexts, SAVED_OPS)

    def block(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result = call(
            [inputs[0].sin(), *inputs[1:]], activation, plan=plan, implementation=implementation
        )
        return result.out.tanh(), result.penalty, result.stats.n_active

    gradients, counts = [], []
    for checkpointed in (False, True):
        with CallCounter() as counter:
            if checkpointed:
                outputs = checkpoint(block, *tensors, use_reentrant=False, context_fn=context_fn)
            else:
                outputs = block(*tensors)
            cotangent = torch.linspace(-1, 1, outputs[0].numel(), device=tensors[0].device)
            cotangent = cotangent.view_as(outputs[0])
            loss = (outputs[0] * cotangent).sum() + 0.3 * outputs[1]
            gradients.append((*outputs, *torch.autograd.grad(loss, tensors)))
        counts.append(counter.calls)
    for plain, saved in zip(*gradients, strict=True):
        assert torch.equal(plain, saved)
    assert counts[0]["fastadapt.encode.default"] == counts[1]["fastadapt.encode.default"] == 1
    assert counts[0]["fastadapt.decode.default"] == 1
    assert counts[1]["fastadapt.decode.default"] == 2


def test_checkpointing_skips_the_encoder_product() -> None:
    tensors = leaves()
    context_fn = functools.partial(create_selective_checkpoint_contexts, SAVED_OPS)

    def block(*inputs: Tensor) -> Tensor:
        return call(list(inputs)).out.tanh()

    with FlopCounterMode(display=False) as counter:
        checkpoint(block, *tensors, use_reentrant=False, context_fn=context_fn).sum().backward()
    flops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert flops["fastadapt.encode"] == 2 * S * T * D * F


def test_decode_saves_neither_output_nor_residual() -> None:
    tensors = leaves()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call(tensors)
    assert tensors[1].untyped_storage().data_ptr() in saved
    assert result.out.untyped_storage().data_ptr() not in saved
    assert tensors[5].untyped_storage().data_ptr() not in saved


@pytest.mark.parametrize(("implementation", "activation", "plan"), VARIANTS)
def test_repeated_backward_and_each_output_alone(
    implementation: str, activation: str, plan: CodeLayout | None
) -> None:
    tensors = leaves(activation, device=place(implementation))
    result = call(tensors, activation, plan=plan, implementation=implementation)
    first = backward(result, tensors, retain_graph=True)
    for one, two in zip(first, backward(result, tensors, retain_graph=True), strict=True):
        assert torch.equal(one, two)
    reference = call(tensors, activation, implementation="reference")
    for output in ("out", "penalty"):
        pair = [
            torch.autograd.grad(
                getattr(r, output).sum(), tensors, retain_graph=True, allow_unused=True
            )
            for r in (result, reference)
        ]
        for name, actual, expected in zip(NAMES, *pair, strict=False):
            if expected is None:
                assert actual is None or not actual.any(), name
            else:
                torch.testing.assert_close(actual, expected, msg=name)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("activation", SETTINGS)
@pytest.mark.parametrize("dense", [False, True])
def test_same_inputs_same_bits(activation: str, dense: bool) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    tokens, features, width = 130, 256, 40
    shapes = [(2, tokens, width), (features, width), (features,), (features, width), (width,)]
    tensors = [torch.randn(shape) for shape in shapes] + [torch.randn(2, tokens, width)]
    tensors[2] -= 10  # a few hundred codes per feature; several features fire on most tokens
    tensors[2][:8] += 12
    if activation == "jumprelu":
        tensors.append(torch.rand(features) + 0.2)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    first: list[Tensor] = []
    for _ in range(250 if PROOF else 4):
        result = call(tensors, activation, plan=CodeLayout(dense))
        bits = [result.out, result.penalty, *result.stats[:3], *backward(result, tensors)]
        first = first or bits
        for name, a, b in zip(["out", "penalty", *"123", *NAMES], first, bits, strict=False):
            assert torch.equal(a, b), name


@pytest.mark.quick("sparse-jumprelu-None")
@pytest.mark.parametrize(("implementation", "activation", "plan"), VARIANTS)
def test_opcheck(implementation: str, activation: str, plan: CodeLayout | None) -> None:
    device = place(implementation)
    tensors = leaves(activation, tokens=5, device=device)
    threshold = tensors[6] if activation == "jumprelu" else None
    settings = SETTINGS[activation]
    scale = 0.7 if activation in ("relu", "jumprelu") else None  # of a tanh penalty
    layout = (None, None) if plan is None else plan
    weight = torch.rand(S * 5, device=device)
    padding = torch.rand(S * 5, device=device) > 0.8
    numbers = (float(settings.get("k", 0)), float(settings.get("bandwidth", 0)))
    given = (*tensors[:3], threshold, weight, padding, activation, *numbers, *layout)
    inputs = (*given, True, implementation)
    ops = torch.ops.fastadapt
    torch.library.opcheck(ops.encode.default, inputs)
    frozen = [t.detach() if isinstance(t, Tensor) else t for t in given]
    torch.library.opcheck(ops.encode.default, (*frozen, False, implementation))

    codes = [t.detach() for t in ops.encode(*inputs)[: len(Codes._fields)]]
    codes[0].requires_grad_()
    residual = torch.randn(S * 5, E, requires_grad=True, device=device)
    torch.library.opcheck(ops.norms.default, (tensors[3],))
    norm = ops.norms(tensors[3].detach())
    torch.library.opcheck(
        ops.decode.default, (*codes, *tensors[3:5], residual, norm, weight, scale, implementation)
    )
    codes[0] = codes[0].detach()
    g, c = torch.randn(S * 5, E, device=device), torch.randn((), device=device)
    da = torch.randn_like(codes[0])
    W_enc, W_dec = tensors[1].detach(), tensors[3].detach()
    torch.library.opcheck(
        ops.decode_backward.default,
        (g, c, *codes, W_dec, norm, weight, scale, True, True, implementation),
    )
    theta = None if threshold is None else threshold.detach()
    need = [True, True, False, theta is not None]
    torch.library.opcheck(
        ops.encode_backward.default,
        (da, tensors[0].detach(), W_enc, theta, padding, *codes, numbers[1], need, implementation),
    )


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    real = call(leaves())
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        for plan in PLANS:
            fake = call([torch.empty(t.shape, requires_grad=True) for t in leaves()], plan=plan)
            for a, b in zip((*fake[:2], *fake.stats), (*real[:2], *real.stats), strict=True):
                assert a.shape == b.shape
                assert a.dtype == b.dtype


@pytest.mark.parametrize("plan", [CodeLayout(dense=True), CodeLayout(dense=False, capacity=500)])
def test_flops_on_the_meta_device(plan: CodeLayout) -> None:
    tokens, width, features = 7_500, 3_584, 8_192  # shapes of the 7B pair, without memory
    with torch.device("meta"):
        x = torch.empty(1, tokens, width, requires_grad=True)
        W_enc, W_dec = (torch.empty(features, width, requires_grad=True) for _ in range(2))
        b_enc, b_dec = torch.empty(features), torch.empty(width)
    with FlopCounterMode(display=False) as counter:
        result = transcoder(x, W_enc, b_enc, W_dec, b_dec, plan=plan)
        (result.out.sum() + result.penalty).backward()
    one_product = 2 * tokens * width * features
    other = one_product if plan.dense else 2 * 500 * width
    assert counter.get_total_flops() == one_product + 5 * other


def test_backward_on_codes_is_cheap() -> None:
    """FLOPs of the backward pass at an L0 of 10 in the 7B pair, by the ops' formulas."""
    tokens, width, features, l0 = 7_500, 3_584, 8_192, 10
    flops = {}
    for plan in (CodeLayout(dense=True), CodeLayout(dense=False, capacity=l0 * tokens)):
        with torch.device("meta"):
            tensors = [torch.empty(1, tokens, width), torch.empty(features, width)]
            tensors += [torch.empty(features), torch.empty(features, width), torch.empty(width)]
        result = transcoder(*[t.requires_grad_() for t in tensors], plan=plan)
        with FlopCounterMode(display=False) as counter:
            (result.out.sum() + result.penalty).backward()
        flops[plan.dense] = counter.get_total_flops()
    assert flops[True] == 4 * 2 * tokens * width * features
    assert flops[False] == 4 * 2 * l0 * tokens * width
    assert flops[False] < 0.03 * flops[True]


@pytest.mark.slow
def test_no_dense_tensor_is_saved() -> None:
    tensors = leaves(device=place("triton"))
    sizes: list[int] = []

    def record(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
        call(tensors, implementation="triton", plan=SPARSE)
    assert max(sizes) <= 2000 < S * T * F


def test_frozen_weights_cost_no_gradient_products() -> None:
    tensors = leaves()
    result_flops = {}
    n_codes = int(call(tensors).stats.n_active)
    for trained in (["x"], ["W_enc"], ["W_dec"], ["b_enc"], ["b_dec"], ["residual"], NAMES):
        for name, tensor in zip(NAMES, tensors, strict=False):
            tensor.requires_grad_(name in trained)
        with FlopCounterMode(display=False) as counter:
            result = call(tensors, plan=CodeLayout(dense=False))
            (result.out.sum() + result.out.new_ones(()) * result.penalty).backward()
        result_flops["+".join(trained)] = counter.get_total_flops()
        for name, tensor in zip(NAMES, tensors, strict=False):
            assert (tensor.grad is not None) == (name in trained)
            tensor.grad = None
    encode, decode = 2 * S * T * D * F, 2 * n_codes * E
    code_in, forward = 2 * n_codes * D, encode + decode
    assert result_flops == {
        "x": forward + decode + code_in,
        "W_enc": forward + decode + code_in,
        "b_enc": forward + decode,
        "W_dec": forward + decode,
        "b_dec": forward,
        "residual": forward,
        "+".join(NAMES): forward + 2 * decode + 2 * code_in,
    }


@pytest.mark.quick("sparse-jumprelu-None")
@pytest.mark.parametrize(
    ("implementation", "activation", "plan"),
    [
        *(("sparse", activation, None) for activation in SETTINGS),
        pytest.param("triton", "relu", SPARSE, marks=SLOW_INTERPRETED),
    ],
)
def test_compiles_into_one_graph(
    implementation: str, activation: str, plan: CodeLayout | None
) -> None:
    torch._dynamo.reset()
    options: dict[str, Any] = {"implementation": implementation, "plan": plan}

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def compiled(*inputs: Tensor) -> TranscoderOutput:
        return call(list(inputs), activation, **options)

    for tokens in (T, T + 3, T + 16):
        tensors = leaves(activation, tokens=tokens, device=place(implementation))
        eager, result = call(tensors, activation, **options), compiled(*tensors)
        for a, b in zip((*eager[:2], *eager.stats), (*result[:2], *result.stats), strict=True):
            assert torch.equal(a, b) or (a.isnan() & b.isnan()).all()
        for name, a, b in zip(
            NAMES, backward(eager, tensors), backward(result, tensors), strict=False
        ):
            assert torch.equal(a, b), name
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # raised inside torch
def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    tensors = leaves()
    result = torch.compile(call, fullgraph=True)(tensors)
    torch.testing.assert_close(result.out, call(tensors).out)
    for a, b in zip(backward(result, tensors), backward(call(tensors), tensors), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("implementation", ["reference", "sparse", "triton"])
def test_autocast_is_a_cast_of_the_inputs(implementation: str) -> None:
    device = place(implementation)
    dtype = torch.float16 if implementation == "triton" else torch.bfloat16
    tensors = leaves(device=device)
    low = [t.detach().to(dtype).requires_grad_() for t in tensors]
    with torch.autocast(device, dtype):
        result = call(tensors, implementation=implementation)
    expected = call(low, implementation=implementation)
    assert result.out.dtype == dtype
    assert result.penalty.dtype == torch.float32
    assert torch.equal(result.out, expected.out)
    assert torch.equal(result.penalty, expected.penalty)
    for name, a, b in zip(NAMES, backward(result, tensors), backward(expected, low), strict=False):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float()), name
    with torch.autocast(device, dtype):
        assert call([t.double() for t in tensors]).out.dtype == torch.float64


def test_statistics_and_no_grad() -> None:
    tensors = leaves("batch_topk")
    result = call(tensors, "batch_topk")
    assert not any(statistic.requires_grad for statistic in result.stats)
    with torch.no_grad():
        quiet = call(tensors, "batch_topk")
    assert not quiet.out.requires_grad
    assert torch.equal(quiet.out, result.out)


def test_second_derivative_is_refused() -> None:
    tensors = leaves()
    result = call(tensors)
    (gradient,) = torch.autograd.grad(result.out.square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()

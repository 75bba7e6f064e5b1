"""Compare every kernel, forward and backward, with its reference in float64 on one device.

Inputs are drawn once and rounded to the tested dtype. `fastadapt.kernels.testing` defines the
allowed error. The transcoder's inputs lie on a grid on which its encoder is exact in every dtype,
so that active features and the order of ties do not depend on rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.kernels.device import runs_triton
from fastadapt.kernels.frozen import ACTIVATIONS as GATES
from fastadapt.kernels.frozen import gated, rms_norm, rope
from fastadapt.kernels.linear_kl import linear_kl
from fastadapt.kernels.nmse import nmse
from fastadapt.kernels.testing import error_budget
from fastadapt.kernels.transcoder import CodeLayout, transcode, transcoder

Tensors = dict[str, Tensor]
Run = Callable[..., Tensors]


class Sizes(NamedTuple):
    """Sizes of the transcoder's inputs: rows of x, tokens of a row, width, features."""

    rows: int
    tokens: int
    width: int
    features: int


#: Sizes by device. On a GPU, the tokens select the kernels of training instead of those for few
#: tokens, and the sum over tokens of a feature that is always active has several parts.
SIZES = {"cuda": Sizes(2, 300, 32, 64)}
FEW = Sizes(2, 13, 32, 64)  # on other devices, since Triton's interpreter is slow
#: Arguments of the activations, and of a ReLU whose penalty is tanh.
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk": {"k": 3},
    "batch_topk": {"k": 2.5},
    "jumprelu": {"bandwidth": 0.5},
    "tanh penalty": {"activation": "relu", "tanh": 0.5},
}
#: Inputs without a gradient.
CONSTANTS = ("teacher", "target", "weight", "cos", "sin")
PLANS = {"codes": CodeLayout(dense=False), "dense": CodeLayout(dense=True)}


@dataclass(frozen=True)
class Check:
    """One implementation of one op in one case, compared with its reference in float64.

    Attributes:
        share: largest error divided by the allowed error, over all outputs and gradients; at most
            1 if `ok`.
        worst: output or gradient with this error.
        message: reason of a failure; empty if `ok`.
    """

    op: str
    implementation: str
    case: str
    dtype: str
    device: str
    ok: bool
    share: float
    worst: str
    message: str = ""


class Case(NamedTuple):
    """Inputs to check an op with; ``run(implementation, **inputs)`` returns outputs by name."""

    op: str
    name: str
    run: Run
    inputs: Tensors
    implementations: tuple[str, ...]


def run_checks(device: torch.device) -> list[Check]:
    """Return a check of every op, implementation, case and dtype that runs on `device`."""
    return [
        _check(case, implementation, dtype, device)
        for case in _cases(device.type, SIZES.get(device.type, FEW))
        for implementation in case.implementations
        for dtype in dtypes(implementation, device.type)
    ]


def checks_of(device: torch.device, sizes: Sizes, dtype: torch.dtype) -> Iterator[Check]:
    """Yield the checks of every op, implementation and case in one dtype, at the given sizes.

    The transcoder's encoder is exact in every dtype up to a width of about 72.
    """
    for case in _cases(device.type, sizes):
        for implementation in case.implementations:
            if dtype in dtypes(implementation, device.type):
                yield _check(case, implementation, dtype, device)


def dtypes(implementation: str, device_type: str) -> tuple[torch.dtype, ...]:
    """Return the dtypes in which an implementation is checked on a type of device."""
    if device_type == "cuda":
        wanted = (torch.float32, torch.float16)
        return (*wanted, torch.bfloat16) if torch.cuda.is_bf16_supported() else wanted
    if implementation.startswith("triton"):  # interpreted, which multiplies bfloat16 wrongly
        return (torch.float32, torch.float16)
    return (torch.float32, torch.bfloat16)


def notes(device: torch.device) -> list[str]:
    """Return notes on checks that `device` cannot run, with the reason."""
    if not runs_triton(device.type):
        return [
            "The Triton kernels (triton, of every op) cannot run "
            f"here and were not checked: they need a GPU, and the device is {device.type}."
        ]
    if device.type != "cuda":
        return [
            "The Triton kernels were interpreted on the CPU (TRITON_INTERPRET=1), not compiled; "
            "bfloat16, which the interpreter multiplies wrongly, was left out."
        ]
    return []


def _cases(device_type: str, sizes: Sizes) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    triton = runs_triton(device_type)
    # x and W_enc are small multiples of 1 and 1/4, b_enc is a multiple of 1/4 plus 1/8. z is thus
    # exact in bfloat16, never 0, and never at the edge of JumpReLU's window. With this b_enc, few
    # features are active, except one that is active on every token.
    S, T, D, F = sizes
    grid = partial(torch.randint, generator=generator, dtype=torch.float64)
    adapter = {
        "x": grid(-2, 3, (S, T, D)),
        "W_enc": grid(-1, 2, (F, D)) / 4,
        "b_enc": grid(-13, -7, (F,)) / 4 + 1 / 8,
        "W_dec": random(F, D),
        "b_dec": random(D),
        "residual": random(S, T, D),
    }
    adapter["b_enc"][0] = 8 + 1 / 8
    theta = {"threshold": torch.full((F,), 0.5, dtype=torch.float64)}
    on_codes = [("sparse", device_type == "cpu"), ("triton", triton)]
    planned = tuple(name for name, runs in on_codes if runs)
    for activation, options in ACTIVATIONS.items():
        inputs = adapter | theta if activation == "jumprelu" else adapter
        run = partial(_transcoder, **{"activation": activation, **options})
        yield Case("transcoder", activation, run, inputs, ("reference",))
        for name, plan in PLANS.items():
            with_plan = partial(run, plan=plan)
            yield Case("transcoder", f"{activation}, {name}", with_plan, inputs, planned)
    heads = {"teacher": random(40, 24), "students": random(2, 40, 24), "head": random(80, 24) / 5}
    on_gpu = ("triton",) if triton else ()
    yield Case("linear_kl", "", _linear_kl, heads, ("reference", "chunked", *on_gpu))
    streams = {"x": random(2, 9, 32), "target": random(2, 9, 32)}
    yield Case("nmse", "", _nmse, streams, ("reference", "chunked", *on_gpu))
    # Operations of frozen blocks, with heads of q and k as attention has them.
    rows = {"x": random(2, 9, 40), "weight": 1 + random(40) / 4}
    for name, gemma in (("Llama", False), ("Gemma", True)):
        norm = partial(_rms_norm, gemma=gemma)
        yield Case("rms_norm", name, norm, rows, ("reference", *on_gpu))
    products = {"gate": random(2, 9, 40), "up": random(2, 9, 40)}
    for gate in GATES:
        run = partial(_gated, activation=gate)
        yield Case("gated", gate, run, products, ("reference", *on_gpu))
    angle = random(1, 9, 12)
    heads = {"q": random(2, 4, 9, 16), "k": random(2, 2, 9, 16)}
    heads |= {"cos": angle.cos(), "sin": angle.sin()}
    yield Case("rope", "", _rope, heads, ("reference", *on_gpu))


def _transcoder(
    implementation: str,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    **options: Any,
) -> Tensors:
    """Run the transcoder with a padding token and tokens of weight 0.5 and 0 in each row."""
    padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    padding[:, -1] = True
    weight = torch.ones(x.shape[:2], device=x.device)
    weight[:, -3], weight[:, -2] = 0.5, 0
    tensors = x, W_enc, b_enc, W_dec, b_dec
    plan = options.pop("plan", None)
    options |= {"padding": padding, "implementation": implementation}
    scale = options.pop("tanh", None)
    full = options if scale is None else {**options, "penalty": "tanh", "penalty_scale": scale}
    out, penalty, *_ = transcoder(*tensors, **full, mask=weight, plan=plan)
    with torch.no_grad():
        alone = transcode(*tensors, **options, dense=None if plan is None else plan.dense)
        evaluated = transcoder(*tensors, **full, mask=weight, plan=plan)
    return {
        "out": out,
        "penalty": penalty,
        "out alone": alone,
        "out without gradients": evaluated.out,
        "penalty without gradients": evaluated.penalty,
    }


def _linear_kl(implementation: str, teacher: Tensor, students: Tensor, head: Tensor) -> Tensors:
    options: dict[str, Any] = {"implementation": implementation, "chunk_tokens": 16}
    return {"kl": linear_kl(teacher, students, head, **options).kl}


def _nmse(implementation: str, x: Tensor, target: Tensor) -> Tensors:
    return {"nmse": nmse(x, target, implementation=implementation).nmse}


def _rms_norm(implementation: str, x: Tensor, weight: Tensor, gemma: bool) -> Tensors:
    options: dict[str, Any] = {"offset": float(gemma), "rounds_first": not gemma}
    return {"out": rms_norm(x, weight.detach(), 1e-6, **options, implementation=implementation)}


def _gated(implementation: str, gate: Tensor, up: Tensor, activation: str) -> Tensors:
    return {"out": gated(gate, up, activation, implementation=implementation)}


def _rope(implementation: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensors:
    rotated = rope(q, k, cos, sin, implementation=implementation)
    return dict(zip(("q rotated", "k rotated"), rotated, strict=True))


def _check(case: Case, implementation: str, dtype: torch.dtype, device: torch.device) -> Check:
    name = str(dtype).removeprefix("torch.")
    about = (case.op, implementation, case.name, name, str(device))
    rounded = {name: value.to(device, dtype) for name, value in case.inputs.items()}
    wide = {name: value.double() for name, value in rounded.items()}
    oracle = _forward_backward(case.run, "reference", wide)
    peer = _forward_backward(case.run, "reference", rounded)
    try:
        actual = _forward_backward(case.run, implementation, rounded)
        shares = {name: _share(actual[name], oracle[name], peer[name]) for name in oracle}
    except Exception as error:
        # Any exception of a kernel is a failed check.
        return Check(*about, ok=False, share=float("inf"), worst="", message=_first_line(error))
    worst = max(shares, key=lambda name: shares[name])
    share = shares[worst]
    message = "" if share <= 1 else f"the error of {worst} is {share:.3g} times the allowed error"
    return Check(*about, ok=share <= 1, share=share, worst=worst, message=message)


def _forward_backward(run: Run, implementation: str, inputs: Tensors) -> Tensors:
    """Return the outputs and, for random cotangents, the gradients of the inputs by name."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    outputs = run(implementation, **leaves)
    generator = torch.Generator().manual_seed(1)
    trained = [value for value in outputs.values() if value.requires_grad]
    cotangents = [
        torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        for value in trained
    ]
    wanted = [name for name in leaves if name not in CONSTANTS]
    gradients = torch.autograd.grad(trained, [leaves[name] for name in wanted], cotangents)
    named = dict(zip((f"gradient of {name}" for name in wanted), gradients, strict=True))
    return {**{name: value.detach() for name, value in outputs.items()}, **named}


def _share(actual: Tensor, oracle: Tensor, peer: Tensor) -> float:
    """Return error / allowed error, of the maximum or the RMS error, whichever is larger."""
    budget = error_budget(actual, oracle, peer)
    return max(budget.max_error / budget.max_budget, budget.rms_error / budget.rms_budget)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

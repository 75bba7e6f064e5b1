"""Calls of the ops that launch every kernel with every combination of its constants.

Values of tensors do not matter: kernels are compiled, but not run.

Shape suffixes: N tokens, D width, F features, V vocabulary, S students.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastadapt.kernels.frozen import ACTIVATIONS, gated, rms_norm, rope
from fastadapt.kernels.linear_kl import linear_kl
from fastadapt.kernels.nmse import nmse
from fastadapt.kernels.transcoder import CodeLayout, transcode, transcoder

#: Lengths of sequences and of generation steps, some divisible by 16.
LENGTHS = (1, 16, 37, 48, 61, 64, 65, 80, 97, 128, 131, 160, 199, 240, 251, 256, 257, 272, 293, 320)
#: The number of tokens determines which kernels run, so most widths are small.
SHAPES = [
    (3584, 8192, (192,)),
    (64, 192, (1, 16, 64, 320)),
    (37, 131, (1, 70, 300)),
]
#: Optional arguments and required gradients of a transcoder call.
STYLES = ("plain", "all arguments", "only out", "only penalty", "inference")
#: Styles with the penalty tanh, for which few activations suffice.
TANH = ("tanh", "tanh, all arguments", "tanh, inference")


def calls_of(part: str, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield titles and calls: of every shape (``shapes``) or of 20 lengths (``lengths``)."""
    if part == "shapes":
        yield from transcoder_shapes(dtype)
        yield from linear_kl_shapes(dtype)
        yield from frozen_shapes(dtype)
        yield from nmse_shapes(dtype)
        return
    weights = transcoder_weights(64, 192, dtype)
    for N in LENGTHS:
        for name, settings in activations(192).items():
            for dense in (False, True):
                yield (
                    f"transcoder {name} dense={dense} N={N}",
                    partial(call_transcoder, weights, N, settings, dense, STYLES[1]),
                )
        arguments = (weights, N, {"activation": "relu"})
        for style in ("inference", *TANH):
            yield (
                f"transcoder relu N={N}, {style}",
                partial(call_transcoder, *arguments, False, style),
            )
        yield (
            f"transcoder relu dense=True N={N}, {TANH[1]}",
            partial(call_transcoder, *arguments, True, TANH[1]),
        )
        for name, settings in activations(192).items():
            yield f"transcode {name} N={N}", partial(call_transcode, weights, N, settings)
        yield (
            f"linear_kl T={N}",
            partial(call_linear_kl, 1031, N, 2, dtype, torch.float32, labels=True, trained=True),
        )
        yield f"frozen T={N}", partial(call_frozen, N, 64, 192, 4, 2, 16, 16, dtype)
        yield f"nmse T={N}", partial(call_nmse, torch.empty(2, N, 64, dtype=dtype), dtype)


def transcoder_shapes(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield calls of every activation and path, for the widths of the paper and others."""
    for D, F, lengths in SHAPES:
        weights = transcoder_weights(D, F, dtype)
        for name, settings in activations(F).items():
            for N in (1, 64, 70):
                for padded in (False, True):
                    title = f"transcode {name} N={N} F={F}, padded={padded}"
                    yield title, partial(call_transcode, weights, N, settings, padded=padded)
            for dense in (False, True):
                for N in lengths:
                    # Below 256 tokens, "inference" computes the norms of few rows.
                    styles = STYLES if N == 320 else (*STYLES[:2], "inference")
                    for style in (*styles, *(TANH if name in ("relu", "jumprelu") else ())):
                        title = f"transcoder {name} dense={dense} N={N} F={F}"
                        arguments = (weights, N, settings, dense, style)
                        yield f"{title}, {style}", partial(call_transcoder, *arguments)


def activations(F: int) -> dict[str, dict[str, Any]]:
    threshold = torch.full((F,), 0.1, requires_grad=True)
    return {
        "relu": {"activation": "relu"},
        "topk": {"activation": "topk", "k": 10},
        "batch_topk": {"activation": "batch_topk", "k": 2.5},
        "batch_topk by threshold": {"activation": "batch_topk", "threshold": torch.tensor(0.1)},
        "jumprelu": {"activation": "jumprelu", "threshold": threshold, "bandwidth": 0.01},
    }


def transcoder_weights(D: int, F: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(F, D), (F,), (F, D), (D,)]
    return [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def call_transcoder(
    weights: list[Tensor],
    N: int,
    settings: dict[str, Any],
    dense: bool,
    style: str,
) -> None:
    """Run forward and backward."""
    F, D = weights[0].shape
    x = torch.empty(N, D, dtype=weights[0].dtype, requires_grad=True)
    arguments = dict(settings)
    if style in TANH:
        arguments |= {"penalty": "tanh", "penalty_scale": 4.0}
        style = style.removeprefix("tanh").removeprefix(", ")
    if style == "all arguments":
        arguments["residual"] = torch.empty_like(x).requires_grad_()
        arguments["padding"] = torch.zeros(N, dtype=torch.bool)
    if style in ("all arguments", "only penalty"):
        arguments["mask"] = torch.ones(N)
    plan = CodeLayout(dense, None if dense else N * min(F, 64))
    with torch.set_grad_enabled(style != "inference"):
        result = transcoder(x, *weights, **arguments, plan=plan, implementation="triton")
    if style == "inference":
        return
    outputs = {
        "only out": [result.out],
        "only penalty": [result.penalty],
    }.get(style, [result.out, result.penalty])
    inputs = [x, *weights, *(arguments.get(n) for n in ("residual", "threshold"))]
    torch.autograd.grad(
        outputs,
        [t for t in inputs if t is not None and t.requires_grad],
        [torch.empty_like(output) for output in outputs],
        allow_unused=True,
    )


def call_transcode(
    weights: list[Tensor], N: int, settings: dict[str, Any], *, padded: bool = True
) -> None:
    """Compute the output alone; `padded` adds padding and a residual."""
    x = torch.empty(N, weights[0].shape[1], dtype=weights[0].dtype)
    arguments = dict(settings)
    if padded:
        arguments["residual"] = torch.empty_like(x)
        arguments["padding"] = torch.zeros(N, dtype=torch.bool)
    with torch.no_grad():
        transcode(x, *weights, **arguments, implementation="triton")


def linear_kl_shapes(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield calls for two vocabulary sizes, both dtypes of logits, a trained or a frozen head."""
    for V in (152_064, 1031):
        for logits in {dtype, torch.float32}:
            for labels in (False, True):
                trained = labels and V < 10_000
                yield (
                    f"linear_kl V={V} logits={logits} labels={labels}",
                    partial(
                        call_linear_kl, V, 37, 2, dtype, logits, labels=labels, trained=trained
                    ),
                )
    values_only = partial(call_linear_kl, 1031, 37, 0, dtype, dtype, labels=True, trained=False)
    yield "linear_kl, values only", values_only


def call_linear_kl(
    V: int, N: int, S: int, dtype: torch.dtype, logits: torch.dtype, *, labels: bool, trained: bool
) -> None:
    """Run forward and backward for S students (0: one without gradient); labels add a soft cap."""
    hidden = torch.empty(N, 16, dtype=dtype)
    students = torch.empty(max(S, 1), N, 16, dtype=dtype, requires_grad=S > 0)
    head = torch.empty(V, 16, dtype=dtype, requires_grad=trained)
    more: dict[str, Any] = {"logits_dtype": logits, "implementation": "triton"}
    if labels:
        more |= {"softcap": 30.0, "labels": torch.zeros(N, dtype=torch.int64)}
    result = linear_kl(hidden, students, head, **more)
    if S:
        result.kl.sum().backward()


#: D, I, heads of q and k, width of a head, its rotated columns: 7B and 405B models, OLMo's and
#: Phi's kind, and odd sizes.
BLOCKS = [
    (3584, 18_944, 28, 4, 128, 128),
    (16_384, 53_248, 128, 8, 128, 128),
    (128, 192, 4, 4, 96, 72),
    (37, 131, 3, 1, 10, 6),
]


def frozen_shapes(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield calls of a frozen block's operations for the widths of several models."""
    for shape in BLOCKS:
        yield f"frozen {shape}", partial(call_frozen, 7, *shape, dtype)


def call_frozen(
    T: int,
    D: int,
    width: int,
    heads: int,
    kv_heads: int,
    head: int,
    rotated: int,
    dtype: torch.dtype,
) -> None:
    """Run forward and backward of every operation."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, requires_grad=True)

    def run(outputs: tuple[Tensor, ...], *inputs: Tensor) -> None:
        torch.autograd.grad(outputs, inputs, [torch.empty_like(out) for out in outputs])

    x, weight = empty(1, T, D), torch.empty(D, dtype=dtype)
    for offset, rounds_first in ((0.0, True), (1.0, False)):
        more: dict[str, Any] = {"offset": offset, "rounds_first": rounds_first}
        run((rms_norm(x, weight, 1e-6, **more, implementation="triton"),), x)
    joint = empty(1, T, 2 * width)
    for activation in ACTIVATIONS:
        gate, up = joint.chunk(2, -1)
        run((gated(gate, up, activation, implementation="triton"),), joint)
    q, k = empty(1, T, heads, head), empty(1, T, kv_heads, head)
    angles = torch.empty(1, T, rotated, dtype=dtype), torch.empty(1, T, rotated, dtype=dtype)
    run(rope(q.transpose(1, 2), k.transpose(1, 2), *angles, implementation="triton"), q, k)


def nmse_shapes(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield calls for two widths, both dtypes of targets, whole and strided streams."""
    for D in (3584, 37):
        for target in {dtype, torch.float32}:
            x = torch.empty(2, 5, D, dtype=dtype)
            yield f"nmse D={D} target={target}", partial(call_nmse, x, target)
        yield f"nmse D={D}, transposed", partial(call_nmse, x.mT.contiguous().mT, dtype)
        yield f"nmse D={D}, values only", partial(call_nmse, x, dtype, trained=False)


def call_nmse(x: Tensor, target_dtype: torch.dtype, *, trained: bool = True) -> None:
    """Run forward and, if trained, backward."""
    x = x.detach().requires_grad_(trained)
    mask = torch.ones(x.shape[:-1], dtype=torch.bool)
    target = torch.empty_like(x, dtype=target_dtype)
    result = nmse(x, target, mask=mask, implementation="triton")
    if trained:
        result.nmse.sum().backward()

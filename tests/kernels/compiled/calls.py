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

from fastadapt.kernels.linear_kl import linear_kl
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


def calls_of(part: str, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield titles and calls: of every shape (``shapes``) or of 20 lengths (``lengths``)."""
    if part == "shapes":
        yield from transcoder_shapes(dtype)
        yield from linear_kl_shapes(dtype)
        return
    weights = transcoder_weights(64, 192, dtype)
    for N in LENGTHS:
        for name, settings in activations(192).items():
            for dense in (False, True):
                yield (
                    f"transcoder {name} dense={dense} N={N}",
                    partial(call_transcoder, weights, N, settings, dense, STYLES[1]),
                )
        arguments = (weights, N, {"activation": "relu"}, False, "inference")
        yield f"transcoder relu N={N}, inference", partial(call_transcoder, *arguments)
        for name, settings in activations(192).items():
            yield f"transcode {name} N={N}", partial(call_transcode, weights, N, settings)
        yield (
            f"linear_kl T={N}",
            partial(call_linear_kl, 1031, N, 2, dtype, torch.float32, labels=True, trained=True),
        )


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
                    for style in STYLES if N == 320 else (*STYLES[:2], "inference"):
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

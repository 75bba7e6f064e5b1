"""Checks that depend on the device: bitwise repeatability, and indices beyond 2³¹."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import head_cases, transcoder_steps
from benchmarks.case import Inputs, Row, bits
from benchmarks.head_cases import implementations as head_implementations
from benchmarks.parts import Scale, block
from benchmarks.transcoder_cases import implementations, plan_of
from fastadapt.kernels.testing import assert_close
from fastadapt.kernels.transcoder import CodeLayout, transcoder

__all__ = ["ACTIVATIONS", "activation_options", "check_claim", "large_indices", "repeats"]

ACTIVATIONS: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk": {"activation": "topk", "k": 8},
    "batch_topk": {"activation": "batch_topk", "k": 7.5},
    "jumprelu": {"activation": "jumprelu", "bandwidth": 0.05},
}
L0 = 20.0
MOST_TOKENS = 2048  # enough to fill any device


def repeats(s: Scale, times: int) -> Iterator[Row]:
    """Check that ``times`` forward and backward runs at sizes that fill a GPU have equal bits."""
    T = min(s.T, MOST_TOKENS)
    inputs = transcoder_steps.make_inputs(T, s.d, s.F, L0, s.dtype, s.device, 0)
    names = ["relu"] if s.T < 100 else list(ACTIVATIONS)
    for implementation in implementations(s.device):
        for name in names if implementation != "sparse" else ():
            options = activation_options(name, s.F, s.dtype, s.device)
            for dense in (False, True):
                plan = CodeLayout(dense, None if dense else int(3 * L0 * T) + 4096)
                run = functools.partial(
                    transcoder_steps.step, inputs, implementation, plan, **options
                )
                op = f"transcoder {name}, {'dense' if dense else 'sparse'}"
                yield _repeated(op, implementation, run, times)
    for case in block(replace(s, T=T)):  # a kernel added to the part is repeated too
        inputs = case.sets[0]
        for name, step in case.steps.items():
            if step.kind == "ours":
                yield _repeated(case.op, name, functools.partial(step.run, inputs), times)
    T = min(s.head_tokens, MOST_TOKENS)
    hidden = head_cases.make_inputs(2, T, s.head_width, s.V, s.dtype, s.device, 0)
    for implementation in head_implementations(s.device):
        run = functools.partial(head_cases.step, hidden, implementation)
        yield _repeated("linear_kl", implementation, run, max(2, times // 5))


def activation_options(name: str, F: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return the op's arguments for an activation."""
    if name != "jumprelu":
        return ACTIVATIONS[name]
    threshold = torch.full((F,), 0.1, device=device, dtype=dtype)
    return ACTIVATIONS[name] | {"threshold": threshold}


def _repeated(op: str, implementation: str, step: Any, times: int) -> Row:
    def differing() -> str:
        first = {key: bits(value) for key, value in step().items()}
        others = (item for _ in range(times - 1) for item in step().items())
        different = {key for key, value in others if not torch.equal(first[key], bits(value))}
        return ", ".join(sorted(different))

    return check_claim(op, implementation, f"{times} repeats give the same bits", differing)


def check_claim(op: str, implementation: str, claim: str, wrong: Callable[[], str]) -> Row:
    """Return a row with the result of a check; an error is recorded in the row."""
    row: Row = {"op": op, "implementation": implementation, "claim": claim}
    try:
        message = wrong()
    except torch.AcceleratorError:
        raise  # the device no longer works
    except Exception as error:
        return row | {"right": False, "error": f"{type(error).__name__}: {error}"}
    return row | {"right": not message, "wrong": message}


def large_indices(s: Scale) -> Iterator[Row]:
    """Compare calls on tensors of more than 2³¹ entries with calls on their parts."""
    if s.device != "cuda" or s.T < 1024:
        yield {"left_out": "needs a GPU and the paper's shapes"}
        return
    F, d = 16_384, 64
    T = 2**31 // F + 4096
    for implementation in implementations(s.device):
        inputs = transcoder_steps.make_inputs(T, d, F, 4.0, s.dtype, s.device, 0)
        plan = plan_of(6 * T, T, F, s.dtype, s.device)
        claim = f"pre-activations of {T * F:,} entries, forward and backward"
        for layout in (plan, CodeLayout(dense=True)):
            wrong = functools.partial(_differing_last, implementation, inputs, T, layout)
            op = f"transcoder, {'dense' if layout.dense else 'sparse'}"
            yield check_claim(op, implementation, claim, wrong)
    S, V, n = 1, s.V, 2**31 // s.V + 512
    hidden = head_cases.make_inputs(S, n, d, V, s.dtype, s.device, 0)
    for implementation in head_implementations(s.device):
        claim = f"logits of {n * V:,} entries as in chunks"
        differing = functools.partial(_differing_chunks, hidden, implementation, n)
        yield check_claim("linear_kl", implementation, claim, differing)


def _differing_chunks(hidden: Inputs, implementation: str, n_tokens: int) -> str:
    whole = head_cases.step(hidden, implementation, chunk_tokens=n_tokens)
    parts = head_cases.step(hidden, implementation, chunk_tokens=1024)
    return ", ".join(key for key, value in whole.items() if not _near(value, parts[key]))


def _near(a: Tensor, b: Tensor) -> bool:
    """Return whether a and b agree up to the order of sums, which differs between shapes."""
    a, b = a.float(), b.float()
    scale = float(b.abs().max())
    return bool(torch.isfinite(a).all()) and float((a - b).abs().max()) <= 0.02 * scale


def _differing_last(implementation: str, inputs: Inputs, T: int, plan: CodeLayout) -> str:
    """Compare the last tokens, which have the largest indices, with a float64 reference."""
    leaves = {name: inputs[name].detach() for name in transcoder_steps.LEAVES}
    with torch.no_grad():
        out = transcoder(**leaves, plan=plan, implementation=implementation).out
        last = slice(T - 2048, T)
        part = leaves | {name: leaves[name][last] for name in ("x", "residual")}
        low = transcoder(**part, implementation="reference").out
        wide = {name: tensor.double() for name, tensor in part.items()}
        oracle = transcoder(**wide, implementation="reference").out
    try:
        assert_close(out[last], oracle, low, name="out")
    except AssertionError as error:
        return str(error)
    gradient = transcoder_steps.step(inputs, implementation, plan)["gradient of x"][last]
    cut = {
        name: inputs[name][last].detach().requires_grad_(inputs[name].requires_grad)
        for name in ("x", "residual", "g")
    }
    alone = transcoder_steps.step(inputs | cut, "reference")["gradient of x"]
    return "" if _near(gradient, alone) else "gradient of x"

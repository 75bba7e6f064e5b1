"""Cases of elementwise work: nmse, and a frozen block's RMSNorm and SwiGLU.

Weights are frozen and get no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.case import Case, Cost, Inputs, Results, Step, cast, compiled, copies
from fastadapt.kernels.device import runs_triton
from fastadapt.kernels.frozen import gated, rms_norm
from fastadapt.kernels.nmse import nmse

__all__ = ["masked_nmse_case", "nmse_case", "rms_norm_case", "swiglu_case"]

EPS = 1e-6
Normal = Callable[..., Tensor]  # shape -> float32 tensor of standard normal values


def nmse_value(x: Tensor, target: Tensor, implementation: str = "reference") -> Tensor:
    """Return the op's value without the values per token."""
    return nmse(x, target, implementation=implementation).nmse


def _implementations(device: str, *portable: str) -> list[str]:
    """Return the implementations of an op that run on a device."""
    return [*portable, *(["triton"] if runs_triton(device) else [])]


def _frozen(
    op: Callable[..., Tensor], device: str, **options: Any
) -> dict[str, Callable[..., Any]]:
    """Return the implementations of an operation of frozen blocks by name."""
    return {
        name: functools.partial(op, **options, implementation=name)
        for name in _implementations(device, "reference")
    }


def _step(inputs: Inputs, function: Callable[..., Any]) -> Results:
    """Run ``function`` on all inputs but the cotangent ``g``; return outputs and gradients."""
    arguments = {name: value for name, value in inputs.items() if name != "g"}
    leaves = [name for name, value in arguments.items() if value.requires_grad]
    results = function(**arguments)
    named = {"out": results} if isinstance(results, Tensor) else dict(results._asdict())
    out = next(iter(named.values()))
    gradients = torch.autograd.grad(out, [inputs[n] for n in leaves], inputs["g"].to(out.dtype))
    named |= {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: value.detach() for name, value in named.items()}


def _case(
    op: str,
    shape: dict[str, int],
    dtype: torch.dtype,
    device: str,
    make: Callable[[Normal], Inputs],
    functions: dict[str, Callable[..., Any]],
    elements: int,
    backend: str | None,
) -> Case:
    """Build a case; ``elements`` is the number of elements read and written in both passes."""
    n_sets = copies(elements * dtype.itemsize, device)

    def make_sets() -> list[Inputs]:
        sets = []
        for seed in range(n_sets):
            generator = torch.Generator(device).manual_seed(seed)
            normal = functools.partial(torch.randn, generator=generator, device=device)
            sets.append(cast(make(normal), dtype))
        return sets

    plain = functions["reference"]
    if backend:
        functions = functions | {"reference compiled": compiled(plain, backend, False)}
    kinds = {"chunked": "ours", "triton": "ours", "liger-kernel": "peer"}
    steps = {
        name: Step(functools.partial(_step, function=f), kinds.get(name, "reference"))
        for name, f in functions.items()
    }

    def truth(inputs: Inputs, wanted: torch.dtype) -> Results:
        return _step(cast(inputs, wanted), plain)

    cost = Cost(0, elements * dtype.itemsize)
    return Case(op, shape, dtype, device, make_sets, steps, truth, lambda _: cost)


def nmse_case(
    T: int, d: int, dtype: torch.dtype, device: str, *, backend: str | None = "inductor"
) -> Case:
    """One sequence, without values per token."""

    def make(normal: Normal) -> Inputs:
        target = normal(T, d)
        x = (target + 0.3 * normal(T, d)).requires_grad_()
        g = torch.ones((), dtype=torch.float64, device=device)
        return {"x": x, "target": target, "g": g}

    functions: dict[str, Callable[..., Any]] = {
        name: functools.partial(nmse_value, implementation=name)
        for name in _implementations(device, "reference", "chunked")
    }
    elements = T * d * 5  # x, target, the saved difference; the difference, dx
    return _case("nmse", {"T": T, "d": d}, dtype, device, make, functions, elements, backend)


def masked_nmse_case(B: int, T: int, d: int, dtype: torch.dtype, device: str) -> Case:
    """B sequences with masked tokens, with values per token."""

    def make(normal: Normal) -> Inputs:
        target = normal(B, T, d)
        x = (target + 0.3 * normal(B, T, d)).requires_grad_()
        return {"x": x, "target": target, "mask": normal(B, T) > -1.28, "g": normal(B)}

    functions: dict[str, Callable[..., Any]] = {
        name: functools.partial(nmse, implementation=name)
        for name in _implementations(device, "reference", "chunked")
    }
    shape, elements = {"B": B, "T": T, "d": d}, B * T * d * 5
    return _case("nmse", shape, dtype, device, make, functions, elements, None)


def rms_norm_case(
    T: int, d: int, dtype: torch.dtype, device: str, *, backend: str | None = "inductor"
) -> Case:
    """RMSNorm with a frozen weight."""

    def make(normal: Normal) -> Inputs:
        weight = 1 + 0.1 * normal(d)
        return {"x": normal(T, d).requires_grad_(), "weight": weight, "g": normal(T, d)}

    functions = _frozen(rms_norm, device, eps=EPS)
    if device == "cuda" and (liger := peers.liger_rms_norm()) is not None:
        functions["liger-kernel"] = functools.partial(liger, eps=EPS)
    elements = T * d * 5  # x, out; x, g, dx
    return _case("rms_norm", {"T": T, "d": d}, dtype, device, make, functions, elements, backend)


def swiglu_case(
    T: int, d: int, dtype: torch.dtype, device: str, *, backend: str | None = "inductor"
) -> Case:
    """SwiGLU of inner width ``d``."""

    def make(normal: Normal) -> Inputs:
        gate, up, g = (normal(T, d) for _ in range(3))
        return {"gate": gate.requires_grad_(), "up": up.requires_grad_(), "g": g}

    functions = _frozen(gated, device, activation="silu")
    if device == "cuda" and (liger := peers.liger_swiglu()) is not None:
        # liger-kernel's function takes positional arguments only.
        functions["liger-kernel"] = lambda gate, up: liger(gate, up)
    elements = T * d * 8  # gate, up, out; gate, up, g, and both gradients
    return _case("swiglu", {"T": T, "d": d}, dtype, device, make, functions, elements, backend)

"""Elementwise work beside the products: nmse, and a frozen block's RMSNorm and SwiGLU.

The block's ops have no kernel here; the rows say whether one would be worth writing, beside what
PyTorch's compiler makes and what another project has. Weights are frozen: no gradient of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

from benchmarks import peers
from benchmarks.case import Case, Cost, Inputs, Results, Step, cast, compiled, copies
from fastadapt.kernels.nmse import nmse

__all__ = ["nmse_case", "rms_norm_case", "swiglu_case"]

EPS = 1e-6


def _normal(
    shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype, *, leaf: bool = False
) -> Tensor:
    drawn = torch.randn(tuple(shape), generator=generator, device=generator.device).to(dtype)
    return drawn.requires_grad_(leaf)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As Qwen2 and Llama do it: in fp32, rounded before the weight."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(acc)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return weight * normed.to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return nnf.silu(gate) * up


def nmse_value(x: Tensor, target: Tensor) -> Tensor:
    """The op's value, by its specification: for a compiler."""
    return nmse(x, target, implementation="reference").nmse


def _step(
    inputs: Inputs, function: Callable[..., Tensor], names: Sequence[str], leaves: Sequence[str]
) -> Results:
    out = function(*(inputs[name] for name in names))
    cotangent = inputs["g"].to(out.dtype)
    made = torch.autograd.grad(out, [inputs[name] for name in leaves], cotangent)
    named = {f"gradient of {name}": g for name, g in zip(leaves, made, strict=True)}
    return {"out": out.detach()} | named


def _case(
    op: str,
    shape: dict[str, int],
    dtype: torch.dtype,
    device: str,
    make: Callable[[torch.Generator], Inputs],
    functions: dict[str, tuple[Callable[..., Tensor], str]],
    names: Sequence[str],
    leaves: Sequence[str],
    elements: int,
) -> Case:
    """``elements``: read and written once each, forward and backward."""
    n_sets = copies(elements * dtype.itemsize, device)

    def make_sets() -> list[Inputs]:
        return [make(torch.Generator(device).manual_seed(seed)) for seed in range(n_sets)]

    steps = {
        name: Step(functools.partial(_step, function=function, names=names, leaves=leaves), kind)
        for name, (function, kind) in functions.items()
    }
    plain = functions["reference"][0]

    def truth(inputs: Inputs, wanted: torch.dtype) -> Results:
        return _step(cast(inputs, wanted), plain, names, leaves)

    cost = Cost(0, elements * dtype.itemsize)
    return Case(op, shape, dtype, device, make_sets, steps, truth, lambda _: cost)


def nmse_case(
    T: int, d: int, dtype: torch.dtype, device: str, *, backend: str | None = "inductor"
) -> Case:
    """One sequence; without its values per token where it is compiled by hand."""

    def make(generator: torch.Generator) -> Inputs:
        target = _normal((T, d), generator, torch.float32)
        x = target + 0.3 * _normal((T, d), generator, torch.float32)
        return {
            "x": x.to(dtype).requires_grad_(),
            "target": target.to(dtype),
            "g": torch.ones((), dtype=torch.float64, device=device),
        }

    functions: dict[str, tuple[Callable[..., Tensor], str]] = {
        "reference": (nmse_value, "reference"),
        "chunked": (lambda x, target: nmse(x, target, implementation="chunked").nmse, "ours"),
    }
    if backend:
        fast = compiled(nmse_value, backend, False)
        functions["reference compiled"] = (fast, "reference")
    shape = {"T": T, "d": d}
    leaves, elements = ("x",), T * d * 4  # x, target; the difference kept or x and target again; dx
    return _case("nmse", shape, dtype, device, make, functions, ("x", "target"), leaves, elements)


def rms_norm_case(
    T: int, d: int, dtype: torch.dtype, device: str, *, backend: str | None = "inductor"
) -> Case:
    """RMSNorm with a frozen weight."""

    def make(generator: torch.Generator) -> Inputs:
        weight = 1 + 0.1 * _normal((d,), generator, torch.float32)
        return {
            "x": _normal((T, d), generator, dtype, leaf=True),
            "weight": weight.to(dtype),
            "g": _normal((T, d), generator, dtype),
        }

    functions: dict[str, tuple[Callable[..., Tensor], str]] = {"reference": (rms_norm, "reference")}
    if backend:
        fast = compiled(rms_norm, backend, False)
        functions["reference compiled"] = (fast, "reference")
    liger = peers.liger_rms_norm() if device == "cuda" else None
    if liger is not None:
        functions["liger-kernel"] = (lambda x, weight: liger(x, weight, EPS), "peer")
    names, elements = ("x", "weight"), T * d * 5  # x, out; x, g, dx
    return _case(
        "rms_norm", {"T": T, "d": d}, dtype, device, make, functions, names, ("x",), elements
    )


def swiglu_case(
    T: int, d: int, dtype: torch.dtype, device: str, *, backend: str | None = "inductor"
) -> Case:
    """silu(gate) * up of the given inner width."""

    def make(generator: torch.Generator) -> Inputs:
        return {
            "gate": _normal((T, d), generator, dtype, leaf=True),
            "up": _normal((T, d), generator, dtype, leaf=True),
            "g": _normal((T, d), generator, dtype),
        }

    functions: dict[str, tuple[Callable[..., Tensor], str]] = {"reference": (swiglu, "reference")}
    if backend:
        fast = compiled(swiglu, backend, False)
        functions["reference compiled"] = (fast, "reference")
    liger = peers.liger_swiglu() if device == "cuda" else None
    if liger is not None:
        functions["liger-kernel"] = (liger, "peer")
    names = ("gate", "up")
    elements = T * d * 8  # gate, up, out; gate, up, g, and both gradients
    return _case("swiglu", {"T": T, "d": d}, dtype, device, make, functions, names, names, elements)

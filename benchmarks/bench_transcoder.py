"""The transcoder, forward and backward, at every density: sparse against the reference.

Run with ``pytest benchmarks/bench_transcoder.py --benchmark-only``. Penalty and statistics are part
of what is timed, in all rows. ``plain`` is what one would write by hand, with no statistics but the
number of codes. Each row of `sparse` first asserts outputs and gradients against the float64
oracle on its own inputs; its ratio is the median over pairs of runs, one after the other, of the
reference's time over its own, which a busy machine disturbs least.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from fastadapt.kernels.testing import assert_close
from fastadapt.kernels.transcoder import transcoder

T, D, F = 2048, 1024, 8192
L0S = [0.1, 1, 10, 100, 250, 350, 450, 700, 1000, 4096, 8000]
PLAIN_L0S = [1, 10, 4096]  # `test_sparse` times the reference beside it at every density
FASTER = {1: 4.0, 10: 3.0}  # times as fast as the reference, at least
NEVER_BELOW = 0.9
PAIRS = 9  # fixed beforehand: to measure again what failed would be to choose
SEED = 0
# The bounds are a CPU's; bench_parts.py has the GPU's rows.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bounds of a CPU")
PENALTY_GRADIENT = torch.tensor(1e-3)
NAMES = ["x", "W_enc", "b_enc", "W_dec", "b_dec", "residual"]


def rates(l0: float) -> Tensor:
    """How often each feature fires: a Zipf law in random order, at most 0.98, summing to `l0`."""
    law = 1 / torch.arange(1, F + 1)[torch.randperm(F)].double()
    low, high = 0.0, 1e6
    for _ in range(100):
        scale = (low + high) / 2
        low, high = (scale, high) if (law * scale).clamp(max=0.98).sum() < l0 else (low, scale)
    return (law * low).clamp(max=0.98)


def fresh(*shape: int) -> Tensor:
    return torch.randn(shape)


@functools.lru_cache(maxsize=1)
def inputs(l0: float) -> dict[str, Tensor]:
    """Leaves whose pre-activations are standard normal but for the bias, which sets the rates."""
    torch.manual_seed(SEED)
    W_enc = nnf.normalize(fresh(F, D), dim=-1)
    tensors = {
        "x": fresh(T, D),
        "W_enc": W_enc,
        "b_enc": torch.special.ndtri(rates(l0)).float(),
        "W_dec": fresh(F, D) / D**0.5,
        "b_dec": fresh(D),
        "residual": fresh(T, D),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def plain(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor, int]:
    a = torch.relu(nnf.linear(x, W_enc, b_enc))
    out = residual + (a @ W_dec + b_dec)
    return out, (a * W_dec.norm(dim=1)).sum(), int((a > 0).sum())


def step(leaves: dict[str, Tensor], g: Tensor, implementation: str) -> dict[str, Tensor]:
    """One forward and backward; outputs and gradients."""
    if implementation == "plain":
        out, penalty, n_active = plain(**leaves)
    else:
        out, penalty, stats, _ = transcoder(**leaves, implementation=implementation)
        n_active = int(stats.n_active)
    cotangents = [g, PENALTY_GRADIENT.to(penalty.dtype)]
    gradients = torch.autograd.grad([out, penalty], list(leaves.values()), cotangents)
    named = dict(zip((f"gradient of {name}" for name in NAMES), gradients, strict=True))
    return {"out": out, "penalty": penalty, "n_active": torch.tensor(n_active)} | named


def refresh(leaves: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """New tokens and a new cotangent: no two runs see the same data."""
    new = {"x": fresh(T, D).requires_grad_(), "residual": fresh(T, D).requires_grad_()}
    return {name: new.get(name, leaf) for name, leaf in leaves.items()}, fresh(T, D)


def timed(*args: Any) -> float:
    start = time.perf_counter()
    step(*args)
    return time.perf_counter() - start


def assert_exact(leaves: dict[str, Tensor]) -> float:
    """Checks `sparse` against the float64 oracle; the L0 of these inputs."""
    leaves, g = refresh(leaves)
    actual, peer = step(leaves, g, "sparse"), step(leaves, g, "reference")
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    oracle = step(wide, g.double(), "reference")
    for name, result in actual.items():
        if name == "n_active":
            assert torch.equal(result, peer[name])
        else:
            assert_close(result, oracle[name], peer[name], name=name)
    return int(actual["n_active"]) / T


def label(benchmark: Any, l0: float, implementation: str) -> None:
    shape = f"T={T} d={D} F={F}"
    benchmark.group = f"transcoder {shape} L0={l0:g}"
    benchmark.extra_info |= {
        "op": "transcoder",
        "implementation": implementation,
        "shape": shape,
        "L0": l0,
    }


@pytest.mark.parametrize("l0", PLAIN_L0S)
def test_reference(benchmark: Any, l0: float) -> None:
    leaves = inputs(l0)
    label(benchmark, l0, "reference")
    setup = lambda: ((*refresh(leaves), "reference"), {})  # noqa: E731
    benchmark.pedantic(step, setup=setup, rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("l0", PLAIN_L0S)
def test_plain(benchmark: Any, l0: float) -> None:
    leaves = inputs(l0)
    label(benchmark, l0, "plain")
    setup = lambda: ((*refresh(leaves), "plain"), {})  # noqa: E731
    benchmark.pedantic(step, setup=setup, rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("l0", L0S)
def test_sparse(benchmark: Any, l0: float) -> None:
    leaves = inputs(l0)
    label(benchmark, l0, "sparse")
    benchmark.extra_info["measured_L0"] = round(assert_exact(leaves), 3)
    reference, sparse = [], []

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        new = refresh(leaves)
        reference.append(timed(*new, "reference"))
        return new, {}

    benchmark.pedantic(lambda *new: sparse.append(timed(*new, "sparse")), setup=setup, rounds=PAIRS)

    ratio = statistics.median(r / s for r, s in zip(reference, sparse, strict=True))
    bound = FASTER.get(l0, NEVER_BELOW)
    benchmark.extra_info |= {"ratio": round(ratio, 3), "pairs": len(sparse), "seed": SEED}
    assert ratio >= bound, f"{ratio:.2f} times as fast as the reference, expected {bound}"

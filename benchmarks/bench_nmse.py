"""nmse, forward and backward, chunked against the reference.

Run with ``pytest benchmarks/bench_nmse.py --benchmark-only``. Each row first asserts values and
gradients against the float64 oracle.
"""

import pytest
import torch
from torch import Tensor

from fastadapt.kernels.nmse import nmse
from fastadapt.kernels.testing import assert_close

SHAPES = [
    (8, 256, 128, torch.float32),
    (1, 2048, 1024, torch.float32),
    (1, 2048, 1024, torch.bfloat16),
    (1, 2048, 3584, torch.bfloat16),
]


def make_inputs(B: int, T: int, D: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(B, T, D, generator=generator)
    x = target + 0.3 * torch.randn(B, T, D, generator=generator)
    return {
        "x": x.to(dtype),
        "target": target.to(dtype),
        "mask": torch.rand(B, T, generator=generator) > 0.1,
        "cotangent": torch.randn(B, generator=generator),
    }


def step(
    inputs: dict[str, Tensor], implementation: str, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    x = inputs["x"].detach().to(dtype).requires_grad_()
    output = nmse(x, inputs["target"].to(dtype), mask=inputs["mask"], implementation=implementation)
    output.nmse.backward(inputs["cotangent"].to(output.nmse.dtype))
    assert x.grad is not None
    return {"nmse": output.nmse.detach(), "token_nmse": output.token_nmse, "dx": x.grad}


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s[:3])) + f"-{s[3]}"[7:])
def test_nmse(benchmark, shape, implementation):
    B, T, D, dtype = shape
    inputs = make_inputs(*shape)
    oracle = step(inputs, "reference", torch.float64)
    peer, actual = step(inputs, "reference"), step(inputs, implementation)
    for name in actual:
        assert_close(actual[name], oracle[name], peer[name], name=name)
    label = f"B={B} T={T} D={D} {str(dtype)[6:]}"
    benchmark.group = f"nmse {label}"
    benchmark.extra_info |= {"op": "nmse", "implementation": implementation, "shape": label}
    benchmark.pedantic(step, (inputs, implementation), rounds=10, warmup_rounds=2)

"""linear_kl, forward and backward, chunked against the reference, with its peak memory.

Run with ``pytest benchmarks/bench_linear_kl.py --benchmark-only``. Each row first asserts values
and gradients against the float64 oracle.
"""

import pytest
import torch
from torch import Tensor

from fastadapt.kernels.linear_kl import linear_kl
from fastadapt.kernels.testing import assert_close

# tokens, width, vocabulary, dtype: the embedded pair's, a middle one, and a 7B model's vocabulary
SHAPES = [
    (1024, 128, 512, torch.float32),
    (512, 256, 16_384, torch.float32),
    (128, 64, 152_064, torch.float32),
    (128, 64, 152_064, torch.bfloat16),
]
STUDENTS = 3


def make_inputs(T: int, D: int, V: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    teacher = normal(T, D)
    return {
        "teacher": teacher.to(dtype),
        "students": (teacher + 0.3 * normal(STUDENTS, T, D)).to(dtype),
        "head": (normal(V, D) / D**0.5).to(dtype),
        "cotangent": normal(STUDENTS),
    }


def step(inputs: dict[str, Tensor], implementation: str) -> dict[str, Tensor]:
    students = inputs["students"].detach().requires_grad_()
    output = linear_kl(
        inputs["teacher"],
        students,
        inputs["head"],
        chunk_tokens=64,
        implementation=implementation,
    )
    output.kl.backward(inputs["cotangent"].to(output.kl.dtype))
    assert students.grad is not None
    return {
        "kl": output.kl.detach(),
        "token_kl": output.token_kl,
        "d_students": students.grad,
    }


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s[:3])) + f"-{s[3]}"[7:])
def test_linear_kl(benchmark, shape, implementation):
    T, D, V, dtype = shape
    inputs = make_inputs(*shape)
    # The oracle of the largest shapes on fewer tokens: its float64 logits are 5 GB otherwise.
    few = min(T, max(32, 2**22 // V))
    part = inputs | {
        "teacher": inputs["teacher"][:few],
        "students": inputs["students"][:, :few],
    }
    oracle = step({name: tensor.double() for name, tensor in part.items()}, "reference")
    peer, actual = step(part, "reference"), step(part, implementation)
    for name in actual:
        assert_close(actual[name], oracle[name], peer[name], name=name)
    label = f"S={STUDENTS} T={T} D={D} V={V} {str(dtype)[6:]}"
    benchmark.group = f"linear_kl {label}"
    benchmark.extra_info |= {
        "op": "linear_kl",
        "implementation": implementation,
        "shape": label,
        "peak_MB": round(peak_bytes(lambda: step(inputs, implementation)) / 1e6, 1),
    }
    benchmark.pedantic(step, (inputs, implementation), rounds=3, warmup_rounds=1)


def peak_bytes(function) -> int:
    """Most bytes that the CPU allocator held at once on behalf of ``function``."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        peak = max(peak, held)
    return peak

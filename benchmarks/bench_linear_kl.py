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


# Of the student's hidden states from the teacher's: the median KL is about 0.07, 7e-3 and 8e-4.
DISTANCES = (0.1, 0.03, 0.01)
LOGITS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("distance", DISTANCES)
def test_rounding_of_logits(benchmark, distance):
    """The gradient's relative error by the logits' dtype, bfloat16 inputs: float32 is the least."""
    T, D, V = 32, 128, 152_064
    generator = torch.Generator().manual_seed(0)
    teacher, change = (torch.randn(T, D, generator=generator) for _ in range(2))
    head = torch.randn(V, D, generator=generator) * 4 / D**0.5
    streams = [t.bfloat16() for t in (teacher, teacher + distance * change, head)]

    def gradient(*streams: Tensor, logits_dtype: torch.dtype | None = None) -> Tensor:
        student = streams[1][None].requires_grad_()
        kl = linear_kl(
            streams[0], student, streams[2], logits_dtype=logits_dtype, chunk_tokens=16
        ).kl
        return torch.autograd.grad(kl.sum(), student)[0][0].double()

    exact = gradient(*(t.double() for t in streams))
    errors = {}
    for dtype in LOGITS_DTYPES:
        error = gradient(*streams, logits_dtype=dtype) - exact
        errors[str(dtype)[6:]] = float((error.norm(dim=-1) / exact.norm(dim=-1)).median())
    result = exact.bfloat16().double() - exact  # no result in bfloat16 is closer
    least = float((result.norm(dim=-1) / exact.norm(dim=-1)).median())
    assert errors["float32"] <= 1.1 * least < errors["float16"] < errors["bfloat16"]
    benchmark.group = "linear_kl, gradient error by logits_dtype"
    benchmark.extra_info |= {
        "op": "linear_kl",
        "shape": f"T={T} D={D} V={V} bfloat16, students {distance} away",
        "relative_gradient_error": errors,
        "rounding_of_the_result_alone": least,
    }
    benchmark.pedantic(gradient, streams, rounds=1)


def peak_bytes(function) -> int:
    """Most bytes that the CPU allocator held at once on behalf of ``function``."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        peak = max(peak, held)
    return peak

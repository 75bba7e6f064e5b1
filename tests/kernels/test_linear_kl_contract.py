"""linear_kl as an op: registration, fakes, compilation, work done, memory, determinism."""

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastadapt.kernels.flops import register_flop_formulas
from fastadapt.kernels.linear_kl import chunks, linear_kl
from fastadapt.kernels.linear_kl.autograd import linear_kl_op
from fastadapt.kernels.linear_kl.chunked import CHUNKED

PROOF = bool(os.environ.get("FASTADAPT_PROOF"))
IMPLEMENTATIONS = ("reference", "chunked", "triton")
OP_IMPLEMENTATIONS = ("chunked", "triton")

# numpy warns in the interpreter where kernels subtract two infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")


def example(
    S: int = 2,
    T: int = 11,
    D: int = 5,
    V: int = 13,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((T, D), (S, T, D), (V, D))
    tensors = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    return tuple(tensors)  # type: ignore[return-value]


# Registration


@pytest.mark.slow
@pytest.mark.parametrize(
    "grads",
    [(True, True), (False, True), (True, False), (False, False)],
)
@pytest.mark.parametrize("implementation", OP_IMPLEMENTATIONS)
def test_opcheck(implementation: str, grads: tuple[bool, bool], device: str) -> None:
    teacher, students, head = example(device=device)
    students.requires_grad_(grads[0])
    head.requires_grad_(grads[1])
    labels = torch.arange(11, device=device) if grads[0] else None
    weights = torch.rand(11).to(device)
    settings = (2.0, 4, torch.float32, implementation)
    torch.library.opcheck(
        linear_kl_op, (teacher, students, head, weights, labels, *settings, *grads)
    )


@pytest.mark.parametrize("implementation", OP_IMPLEMENTATIONS)
def test_compiles_into_one_graph_and_gives_the_same_bits(implementation: str, device: str) -> None:
    compiled = torch.compile(linear_kl, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (11, 14):
        teacher, students, head = example(T=T, device=device)
        mask = torch.arange(T, device=device) > 2
        labels = torch.arange(T, device=device) % 13
        settings: dict[str, Any] = {"chunk_tokens": 4, "implementation": implementation}
        results = []
        for function in (linear_kl, compiled):
            leaf = students.clone().requires_grad_()
            output = function(teacher, leaf, head, mask=mask, labels=labels, **settings)
            output.kl.backward(torch.tensor([1.0, -2.0], device=device))
            results.append((*output, leaf.grad))
        for eager, graph in zip(*results, strict=True):
            assert torch.equal(eager.detach(), graph.detach())


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("chunked", torch.bfloat16), ("chunked", torch.float64), ("triton", torch.bfloat16)],
)
def test_fake_results_look_like_real_ones(
    implementation: str, dtype: torch.dtype, device: str
) -> None:
    teacher, students, head = example(dtype=dtype, device=device)
    labels = torch.arange(11, device=device)
    real = linear_kl(teacher, students, head, labels=labels, implementation=implementation)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (teacher, students, head, labels)]
        fake = linear_kl(*fakes[:3], labels=fakes[3], implementation=implementation)
    for a, b in zip(real, fake, strict=True):
        assert a is not None
        assert b is not None
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_changes_nothing(implementation: str, device: str) -> None:
    results = []
    for enabled in (False, True):
        teacher, students, head = example(device=device)
        students.requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            output = linear_kl(teacher, students, head, implementation=implementation)
        output.kl.sum().backward()
        results.append((output.kl.detach(), students.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Work done


@pytest.mark.parametrize(
    ("students_grad", "head_grad", "grad_mode", "products"),
    [
        (True, False, True, 1 + 3 + 3),
        (True, True, True, 1 + 3 + 3 + 3),
        (False, True, True, 1 + 3 + 3),
        (False, False, True, 1 + 3),
        (True, True, False, 1 + 3),
    ],
)
def test_flops_are_those_of_the_required_gradients(
    students_grad: bool, head_grad: bool, grad_mode: bool, products: int
) -> None:
    """Shapes of a 7B model on meta tensors: 2 T D V per product."""
    from torch.utils.flop_counter import FlopCounterMode

    register_flop_formulas()
    T, D, V = 7500, 3584, 152_064
    teacher = torch.empty(T, D, dtype=torch.bfloat16, device="meta")
    students = torch.empty(3, T, D, dtype=torch.bfloat16, device="meta")
    head = torch.empty(V, D, dtype=torch.bfloat16, device="meta")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad_mode):
        kl = linear_kl(
            teacher, students.requires_grad_(students_grad), head.requires_grad_(head_grad)
        ).kl
        if kl.requires_grad:
            kl.sum().backward()
    # The students' head gradients are summed with weights.
    weighted_sum = 2 * 3 * V * D if head_grad and grad_mode else 0
    assert counter.get_total_flops() == 2 * T * D * V * products + weighted_sum


@given(T=st.integers(0, 20_000), chunk_tokens=st.integers(1, 4096))
def test_chunks_on_a_gpu_are_even_and_have_as_few_tiles(T: int, chunk_tokens: int) -> None:
    full = chunks.chunk_rows(T, chunk_tokens, "cpu")
    even = chunks.chunk_rows(T, chunk_tokens, "cuda")
    assert full == max(1, min(chunk_tokens, T))
    assert 1 <= even <= full
    sizes = {n: [min(n, T - start) for start in range(0, T, n)] for n in (full, even)}
    assert len(sizes[even]) == len(sizes[full])
    assert sum(sizes[even]) == T
    assert sizes[even][-1:] >= sizes[full][-1:]
    if chunk_tokens % 128 == 0:  # rows of a product's tile
        assert sum(math.ceil(n / 128) for n in sizes[even]) == math.ceil(T / 128)
        differences = [max(sizes[even]) - n for n in sizes[even]]
        assert all(d < 128 * len(sizes[even]) for d in differences)


def test_a_gradient_of_hidden_states_is_a_product_and_one_pass() -> None:
    """As on a GPU: bfloat16 gradient of logits, float32 product, bfloat16 result."""

    names: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    grad, head, out = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in ((5, 40), (40, 8), (5, 8))
    )
    with Names():
        chunks._project_back(chunks.Gradient(grad, 1.0), head, torch.float32, out)
    assert names == ["aten.mm.dtype", "aten.div.out"]


@pytest.mark.parametrize("wider", [False, True])
def test_no_synchronisation_off_the_cpu(monkeypatch: pytest.MonkeyPatch, wider: bool) -> None:
    """Meta tensors raise when their values are read. ``wider`` uses a GPU's products."""
    if wider:
        monkeypatch.setattr(chunks, "_accumulates_wider", lambda head, *_: True)

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weights, labels = meta(11, dtype=torch.float32), meta(11, dtype=torch.int64)
    settings = (2.0, 4, torch.float32, True, True)
    _, token_kl, *_, d_students, d_head = chunks.linear_kl_chunks(
        CHUNKED, meta(11, 5), meta(2, 11, 5), meta(13, 5), weights, labels, *settings
    )
    assert token_kl.shape == (2, 11)
    assert d_students.shape == (2, 11, 5)
    assert d_head.shape == (2, 13, 5)


def test_only_kl_carries_a_gradient() -> None:
    teacher, students, head = example()
    output = linear_kl(teacher, students.requires_grad_(), head, labels=torch.arange(11))
    assert output.kl.requires_grad
    by_token: tuple[Any, ...] = output[1:]
    assert not any(t.requires_grad for t in by_token)
    teacher.requires_grad_()
    assert not linear_kl(teacher, students.detach(), head).kl.requires_grad
    with torch.no_grad():
        assert not linear_kl(teacher, students, head).kl.requires_grad


def peak_bytes(function: Any) -> int:
    """Return the peak of bytes that ``function`` allocated on the CPU."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    allocated = peak = 0
    for _, change in changes:
        allocated += change
        peak = max(peak, allocated)
    return peak


@pytest.mark.quick("3-dtype1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("S", [1, 3])
def test_peak_memory_is_two_chunks_of_logits(S: int, dtype: torch.dtype) -> None:
    """V = 152,064 and six chunks: all logits of one stream would take three times the bound."""
    T, D, V, chunk = 96, 8, 152_064, 16
    teacher, students, head = example(S, T, D, V, dtype)
    students.requires_grad_()

    def step() -> None:
        linear_kl(teacher, students, head, chunk_tokens=chunk).kl.sum().backward()

    chunk_bytes = 4 * chunk * V
    peak = peak_bytes(step)
    assert peak > 2 * chunk_bytes  # the measurement includes the chunks
    # Beside the two chunks: temporaries of a block of rows (2 MiB each), gradients, hidden rows.
    small = 6 * 2**21 + 4 * students.numel() * students.element_size()
    assert peak <= 2 * chunk_bytes + small
    assert peak < 4 * T * V / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_threads_give_the_same_bits_every_time(dtype: torch.dtype) -> None:
    teacher, students, head = example(2, 48, 64, 1500, dtype)
    students.requires_grad_()
    head.requires_grad_()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
    try:
        seen = set()
        for _ in range(250 if PROOF else 15):
            output = linear_kl(teacher, students, head, chunk_tokens=16, labels=torch.arange(48))
            grads = torch.autograd.grad(output.kl, (students, head), torch.tensor([1.0, 0.3]))
            tensors = (*(t.detach() for t in output if t is not None), *grads)
            seen.add(
                hash(b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors))
            )
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
    assert len(seen) == 1

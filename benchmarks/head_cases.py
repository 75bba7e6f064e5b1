"""Cases of linear_kl: one teacher, one or three students, a frozen head.

S students, T tokens, d width, V vocabulary size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from benchmarks import peers
from benchmarks.case import Case, Cost, Inputs, Results, Step, cast, compiled, copies
from fastadapt.kernels.device import runs_triton
from fastadapt.kernels.flops import register_flop_formulas
from fastadapt.kernels.linear_kl import linear_kl

__all__ = ["case", "make_inputs", "step"]

CHUNK = 1024
# Entries of one stream's logits that the reference computes at once.
ENTRIES_AT_ONCE = {"cuda": 2**28, "cpu": 2**23}
DISTANCE = 0.3  # std of the students' difference from the teacher, whose variance is 1


def make_inputs(
    S: int, T: int, d: int, V: int, dtype: torch.dtype, device: str, seed: int
) -> Inputs:
    """Return leaves and cotangents. The teacher's logits have variance 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    teacher = normal(T, d)
    students = (teacher + DISTANCE * normal(S, T, d)).to(dtype)
    return {
        "teacher": teacher.to(dtype),
        "students": students.requires_grad_(),
        "head": (normal(V, d) / d**0.5).to(dtype),
        "c": normal(S),
    }


def step(inputs: Inputs, implementation: str, **options: Any) -> Results:
    """Run forward and backward; return KL, its values per token and the students' gradient."""
    streams = (inputs[name] for name in ("teacher", "students", "head"))
    output = linear_kl(*streams, implementation=implementation, **options)
    cotangent = inputs["c"].to(output.kl.dtype)
    (gradient,) = torch.autograd.grad(output.kl, inputs["students"], cotangent)
    return {
        "kl": output.kl.detach(),
        "token_kl": output.token_kl,
        "gradient of students": gradient,
    }


def truth(inputs: Inputs, dtype: torch.dtype) -> Results:
    """Run the reference in a dtype, over parts of the tokens that fit in memory."""
    T, V = len(inputs["teacher"]), len(inputs["head"])
    head = inputs["head"].to(dtype)
    kl: Tensor | float = 0.0
    token_kl, gradient = [], []
    size = max(1, ENTRIES_AT_ONCE[head.device.type] // V)
    for tokens in (slice(start, start + size) for start in range(0, T, size)):
        students = inputs["students"].detach()[:, tokens].requires_grad_()
        part = cast({"teacher": inputs["teacher"][tokens], "students": students}, dtype)
        share = len(part["teacher"]) / T
        results = step(part | {"head": head, "c": inputs["c"]}, "reference")
        kl = kl + results["kl"] * share
        token_kl.append(results["token_kl"])
        gradient.append(results["gradient of students"] * share)
    assert isinstance(kl, Tensor)
    return {
        "kl": kl,
        "token_kl": torch.cat(token_kl, 1),
        "gradient of students": torch.cat(gradient, 1),
    }


def products(inputs: Inputs) -> Tensor:
    """Compute the floor: the products of all logits and of the students' gradients."""
    head = inputs["head"]
    gradients = []
    with torch.no_grad():
        for teacher, students in zip(
            inputs["teacher"].split(CHUNK), inputs["students"].split(CHUNK, 1), strict=True
        ):
            torch.mm(teacher, head.T)
            gradients += [torch.mm(torch.mm(student, head.T), head) for student in students]
        return torch.cat(gradients)


def chunk_loss(teacher: Tensor, student: Tensor, head: Tensor) -> Tensor:
    """Return Σ_t KL of a chunk in plain PyTorch, to be compiled."""
    log_p = nnf.log_softmax((teacher @ head.T).float(), -1)
    log_q = nnf.log_softmax((student @ head.T).float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum()


def compiled_chunks(inputs: Inputs, *, backend: str) -> Results:
    """Run a handwritten loop over compiled chunks, with one gradient per chunk."""
    # The last chunk has another length: compile for dynamic lengths.
    loss = compiled(chunk_loss, backend, True)
    kl, gradient = [], []
    for s, student in enumerate(inputs["students"].detach()):
        total: Tensor | float = 0.0
        pairs = zip(inputs["teacher"].split(CHUNK), student.split(CHUNK), strict=True)
        for teacher, part in pairs:
            leaf = part.detach().requires_grad_()
            value = loss(teacher, leaf, inputs["head"]) / len(student)
            gradient += torch.autograd.grad(value, leaf, inputs["c"][s])
            total = total + value.detach()
        assert isinstance(total, Tensor)
        kl.append(total)
    return {
        "kl": torch.stack(kl),
        "gradient of students": torch.cat(gradient).view_as(inputs["students"]),
    }


def single_calls(inputs: Inputs, implementation: str) -> Results:
    """Run one call per student, each with the teacher."""
    parts = []
    for s in range(len(inputs["students"])):
        leaf = inputs["students"].detach()[s : s + 1].requires_grad_()
        part = inputs | {"students": leaf, "c": inputs["c"][s : s + 1]}
        parts.append(step(part, implementation))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def peer_step(inputs: Inputs, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Results:
    """Run one call per student, since the peers support only one."""
    kl, gradient = [], []
    for s, student in enumerate(inputs["students"].detach()):
        leaf = student.requires_grad_()
        value = loss(leaf, inputs["teacher"], inputs["head"])
        gradient += torch.autograd.grad(value, leaf, inputs["c"][s].to(value.dtype))
        kl.append(value.detach().float())
    return {"kl": torch.stack(kl), "gradient of students": torch.stack(gradient)}


def implementations(device: str) -> list[str]:
    """Return the op's implementations on a device, except for the reference."""
    return ["chunked", *(["triton"] if runs_triton(device) else [])]


def cost(S: int, T: int, d: int, V: int, dtype: torch.dtype) -> Cost:
    """Return FLOPs by the op's formula, and bytes of hidden states, head and gradients."""
    from torch.utils.flop_counter import FlopCounterMode

    register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        students = torch.empty(S, T, d, dtype=dtype, device="meta", requires_grad=True)
        teacher = torch.empty(T, d, dtype=dtype, device="meta")
        linear_kl(teacher, students, torch.empty(V, d, dtype=dtype, device="meta"))
    return Cost(counter.get_total_flops(), (T * d * (1 + 2 * S) + V * d) * dtype.itemsize)


def case(
    S: int,
    T: int,
    d: int,
    V: int,
    dtype: torch.dtype,
    device: str,
    *,
    backend: str | None = "inductor",
    **options: Any,
) -> Case:
    """Build a case; ``options`` are the op's arguments. With ``backend`` None, skip compilation."""
    n_sets = copies((V + (2 * S + 1) * T) * d * dtype.itemsize, device)
    # In order of importance, since the part's time is limited: floor, ours, slower steps.
    steps = {"GEMMs": Step(products, "floor")}
    for name in implementations(device):
        steps[name] = Step(functools.partial(step, implementation=name, **options))
        if S > 1:
            run = functools.partial(single_calls, implementation=name)
            steps[f"{name}, {S} single calls"] = Step(run)
    run = functools.partial(step, implementation="reference", **options)
    steps["reference"] = Step(run, "reference")
    if backend:
        run = functools.partial(compiled_chunks, backend=backend)
        steps["compiled chunks"] = Step(run, "peer", "no values per token")
    for name, find in (
        ("fla-core", peers.fla_kl),
        ("liger-kernel", peers.liger_kl),
        ("liger-kernel chunked", peers.liger_chunked_kl),
    ):
        peer = find() if device == "cuda" else None
        if peer is not None:
            steps[name] = Step(functools.partial(peer_step, loss=peer.loss), "peer", peer.note)
    return Case(
        "linear_kl",
        {"S": S, "T": T, "d": d, "V": V},
        dtype,
        device,
        lambda: [make_inputs(S, T, d, V, dtype, device, seed) for seed in range(n_sets)],
        steps,
        truth,
        lambda _: cost(S, T, d, V, dtype),
    )

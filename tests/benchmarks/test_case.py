"""Steps that overwrite the inputs that all steps of a case share."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_cases, block_cases
from benchmarks.case import Case, Step
from benchmarks.commands import measured
from benchmarks.record import line_of
from benchmarks.roofs import Roofs


class Overwriting(torch.autograd.Function):
    """SwiGLU whose gradients are written over gate and up, as liger-kernel's kernel does."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        slope = gate.sigmoid() * (1 + gate * (1 - gate.sigmoid()))
        changes = gradients[0] * up * slope, gradients[0] * torch.nn.functional.silu(gate)
        gate.data.copy_(changes[0])
        up.data.copy_(changes[1])
        return gate.detach(), up.detach()


def overwriting_case(kind: str) -> Case:
    """Return the case of SwiGLU with the step that overwrites before the others."""
    case = block_cases.swiglu_case(5, 24, torch.float32, "cpu", backend=None)
    run = functools.partial(
        block_cases._step, function=lambda gate, up: Overwriting.apply(gate, up)
    )
    return replace(case, steps={"overwriting": Step(run, kind), **case.steps})


@pytest.mark.parametrize("kind", ["peer", "ours"])
def test_other_steps_are_computed_on_the_inputs_of_the_case(kind: str) -> None:
    context: Any = SimpleNamespace(quick=True, roofs=Roofs(1e9, 1e9, "float32"))
    first, *others = measured(context, [overwriting_case(kind)])
    assert first["overwrites"] == ["gate", "up"]
    assert first["right"] is (kind == "peer")
    assert "overwrites" in line_of(first)
    assert others
    assert all(row["right"] and "overwrites" not in row for row in others)


def test_a_failed_step_leaves_the_inputs_of_the_case() -> None:
    def fail(inputs: Any) -> None:
        inputs["gate"].data.zero_()
        raise RuntimeError("a kernel does not compile")

    case = overwriting_case("peer")
    steps = {"failing": Step(fail, "ours"), "reference": case.steps["reference"]}
    context: Any = SimpleNamespace(quick=True, roofs=Roofs(1e9, 1e9, "float32"))
    failed, reference = measured(context, [replace(case, steps=steps)])
    assert "does not compile" in failed["error"]
    assert reference["right"]


def test_rows_under_pytest_benchmark_have_the_inputs_of_the_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_cases, "DEVICE", "cpu")
    monkeypatch.setattr(bench_cases, "_roofs", lambda _: Roofs(1e9, 1e9, "float32"))
    case = overwriting_case("peer")
    stats = SimpleNamespace(stats=SimpleNamespace(median=1.0, iqr=0.0))

    def pedantic(run: Any, setup: Any, **_: Any) -> None:
        run(*setup()[0])

    for name in ("overwriting", "reference"):
        benchmark = SimpleNamespace(pedantic=pedantic, stats=stats, extra_info={}, group="")
        bench_cases.test_row(benchmark, "block", case, name)
        assert benchmark.extra_info["right"]
        assert ("overwrites" in benchmark.extra_info) is (name == "overwriting")


def test_restored_inputs_are_equal() -> None:
    case = overwriting_case("peer")
    before = {name: value.detach().clone() for name, value in case.sets[1].items()}
    assert case.restore() == []
    case.sets[1]["gate"].data[[0, 1]] = case.sets[1]["gate"].data[[1, 0]]
    assert case.restore() == ["gate"]
    assert all(torch.equal(case.sets[1][name], value) for name, value in before.items())

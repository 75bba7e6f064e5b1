"""Checks before and after whole steps are timed; every check can fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import step_check, whole_step
from benchmarks.every_kernel import kernels, launches
from benchmarks.roofs import Roofs
from benchmarks.step_models import SMALL, make_adapters, make_pair
from benchmarks.step_plans import necessary_flops, planned_bytes
from benchmarks.whole_step import rows, verdict
from fastadapt.kernels.transcoder import CodeLayout
from fastadapt.models.recompute import POLICIES
from fastadapt.models.replacement import ReplacementModel
from fastadapt.training.code_capacity import Call
from fastadapt.training.logs.metrics import StepReport
from fastadapt.training.optimizer import AdapterOptimizer

# Masked lanes cause numpy's warnings in interpreted kernels.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")


def test_both_steps_agree_in_float64() -> None:
    assert step_check.in_float64("cpu") < step_check.LIMIT


@pytest.mark.slow
def test_the_check_covers_the_timed_kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastadapt.kernels.transcoder import triton_forward

    dense = []
    encode = triton_forward.encode

    def record(*args: Any, **options: Any) -> Any:
        codes = encode(*args, **options)
        dense.append(codes[0].dense)
        return codes

    monkeypatch.setattr(triton_forward, "encode", record)
    monkeypatch.setitem(step_check.TOKENS, "cpu", 72)  # more than the kernels for few tokens take
    with launches(kernels()) as checked:
        budgets = step_check.of_kernels(device)
    assert [budget.within for budget in budgets] == [True] * 2
    assert set(dense) == {True, False}
    sizes = replace(step_check.SPARSE, features=480)  # twice L0 is planned as codes
    model = ReplacementModel(make_pair(sizes, device), make_adapters(sizes, device, "triton"))
    optimizer = AdapterOptimizer(dict(model.adapters.named_parameters()), whole_step.OPTIMIZER)
    step = whole_step.our_step(model, optimizer, sizes, 72, "full", device)
    dense.clear()
    with launches(kernels()) as timed:
        step(torch.randint(sizes.vocabulary, (1, 72), device=device), 1)
    assert set(dense) == {False}
    assert "multiply_few_mark" not in timed
    assert timed <= checked


def test_a_gpu_checks_the_kernels_for_many_tokens() -> None:
    from fastadapt.kernels.transcoder.triton_encode import FEW

    assert step_check.TOKENS["cuda"] > FEW


def test_a_nan_gradient_is_a_difference() -> None:
    right, wrong = torch.ones(3), torch.full((3,), math.nan)
    assert math.isnan(step_check.difference([right, wrong], [right, right]))
    assert not step_check.difference([right, wrong], [right, right]) < step_check.LIMIT
    assert step_check.difference([right, right], [right, right]) == 0.0


def test_the_plain_step_defines_the_budget() -> None:
    true = torch.randn(1000, dtype=torch.float64)
    plain = true.float() * (1 + 1e-6)

    def within(ours: torch.Tensor, oracle: torch.Tensor = true) -> bool:
        return step_check.budget_of([ours], [oracle], [plain]).within

    assert within(plain)
    assert not within(true.float() * (1 + 1e-4))  # products in tf32
    assert not within(torch.full_like(plain, math.nan))
    nothing = torch.full_like(true, math.nan)
    assert not within(nothing.float(), nothing)


def report(loss: float = 1.0, norm: float = 1.0, codes: int = 5) -> StepReport:
    return StepReport(
        {}, [loss], norm, [9.0, 11.0], [0, 0], [[Call(CodeLayout(False, 5), 3, codes)]]
    )


@pytest.mark.parametrize(
    ("reports", "wrong"),
    [
        ([report(), report()], None),
        ([report(), report(codes=6)], "more codes than planned"),
        ([report(loss=math.nan), report()], "not finite"),
        ([report(), report(norm=math.inf)], "not finite"),
    ],
)
def test_a_timed_step_is_right_only_if_its_reports_are(
    reports: list[Any], wrong: str | None
) -> None:
    row = verdict(reports)
    assert row["right"] is (wrong is None)
    assert row["measured_L0"] == 10.0
    assert len(row["losses"]) == 2
    assert wrong is None or wrong in row["wrong"]


@pytest.mark.slow
def test_steps_planned_above_memory_are_skipped_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(whole_step, "check", lambda _: iter(()))
    roofs = Roofs(1e9, 1e9, "float32")
    planned = [planned_bytes(SMALL, 128, policy, "cpu") for policy in POLICIES]
    results = list(rows(SMALL, "cpu", roofs, usable_bytes=sorted(planned)[-2]))
    timed = {row["implementation"]: "median_s" in row for row in results}
    assert timed == {
        "plain, checkpointed": True,
        "ours, none": False,
        "ours, mlp": True,
        "ours, attention": True,
        "ours, full": True,
    }
    (skipped,) = [row["skipped"] for row in results if "median_s" not in row]
    assert skipped.startswith("planned at 0 GB, above")
    assert all(row["right"] for row in results if "median_s" in row)
    assert {row["wall_s"] > 0 for row in results if "median_s" in row} == {True}


@pytest.mark.slow
def test_a_failed_policy_is_recorded_and_the_next_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = whole_step.our_step

    def broken(
        model: Any, optimizer: Any, sizes: Any, T: int, policy: str, device: str
    ) -> Callable[..., Any]:
        def step(ids: Any, cutoff: Any) -> None:
            raise RuntimeError("a kernel does not compile")

        whole = real(model, optimizer, sizes, T, policy, device)
        return step if policy == "attention" else whole

    monkeypatch.setattr(whole_step, "check", lambda _: iter(()))
    monkeypatch.setattr(whole_step, "our_step", broken)
    results = list(rows(SMALL, "cpu", Roofs(1e9, 1e9, "float32")))
    assert {row["implementation"]: row["right"] for row in results} == {
        "plain, checkpointed": True,
        "ours, none": True,
        "ours, mlp": True,
        "ours, attention": False,
        "ours, full": True,
    }
    assert results[3]["error"] == "RuntimeError: a kernel does not compile"


def test_operations_are_counted_once() -> None:
    necessary_flops.cache_clear()
    assert necessary_flops(SMALL, 16, (1, 2)) == necessary_flops(SMALL, 16, (1, 2)) > 0
    assert necessary_flops.cache_info().misses == 1

"""Capacities follow the last step's counts; a step that overflows is repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from fastadapt.adapter import coder
from fastadapt.kernels.transcoder import CodeLayout, codes
from fastadapt.objective import objective
from fastadapt.training import loop, trainer
from fastadapt.training.code_capacity import Call, CapacityEstimator, overflow, takes_plans
from fastadapt.training.config import TrainConfig
from fastadapt.training.loop import TrainingRun
from fastadapt.training.run_dir import MetricsLog, read_records
from fastadapt.training.trainer import train

# On a CPU, Triton's kernels run in its interpreter, which tests/conftest.py switches on.
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's test")
TIMING = {"wall_s", "tokens_per_s"}


def call(codes: int, capacity: int | None = None, *, dense: bool = False, tokens: int = 10) -> Call:
    plan = CodeLayout(dense, capacity) if dense or capacity is not None else None
    return Call(plan, tokens, codes)


# --- the estimator --------------------------------------------------------------------------------


def test_a_call_overflows_only_a_capacity() -> None:
    assert call(11, 10).overflows
    assert not call(10, 10).overflows
    assert not call(11).overflows
    assert not call(11, dense=True).overflows
    assert not Call(CodeLayout(False, None), 10, 11).overflows


def test_the_first_overflow_of_each_micro_batch_is_told() -> None:
    fine, short, garbage = call(3, 10), call(11, 10), call(10**9, 10)
    assert overflow([[fine, fine], [fine, call(5)]]) == {}
    assert overflow([[fine, short, garbage], [fine, fine, fine], [short, garbage, fine]]) == {
        "layers": [1, 0],
        "capacities": [10, 10],
        "codes": [11, 11],
    }


def test_the_largest_count_of_the_micro_batches_is_expected() -> None:
    planner = CapacityEstimator(True)
    before = planner.expected
    assert before is None
    planner.applied([[call(30), call(2)], [call(20, tokens=5), call(0)], [call(0, tokens=0)] * 2])
    assert planner.expected == [4.0, 0.2]
    planner.applied([[call(10, 99), call(10, dense=True)]])
    assert planner.expected == [1.0, 1.0]


def test_without_plans_no_counts_are_expected() -> None:
    planner = CapacityEstimator(False)
    planner.applied([[call(30)]])
    assert planner.expected is None
    assert planner.state() == {"codes_per_token": None}


def test_the_state_is_loaded() -> None:
    one, other = CapacityEstimator(True), CapacityEstimator(True)
    one.applied([[call(1, tokens=3)]])
    other.load(one.state())
    assert other.expected == [1 / 3]
    other.load({})  # an older checkpoint, without plans
    assert other.expected is None


@pytest.mark.parametrize(
    ("implementation", "device", "takes"),
    [
        ("auto", "cuda", True),
        ("auto", "cpu", False),
        ("reference", "cuda", False),
        ("sparse", "cpu", False),
        ("triton", "cpu", True),
    ],
)
def test_implementations_that_take_plans(implementation: str, device: str, takes: bool) -> None:
    assert takes_plans(implementation, device) is takes


# --- in a run -------------------------------------------------------------------------------------


def as_on_a_device(*args: Any, plan: CodeLayout | None = None, **kwargs: Any) -> Any:
    """Run the op as a GPU does: codes beyond the capacity raise nothing and give NaN."""
    out = real_transcoder(*args, plan=None, **kwargs)
    n_codes = int(out.stats.n_codes)
    if plan is None or plan.dense or plan.capacity is None or n_codes <= plan.capacity:
        return real_transcoder(*args, plan=plan, **kwargs)
    return out._replace(out=out.out * torch.nan)


real_transcoder = coder.transcoder


@pytest.fixture
def planned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_config: Callable[..., TrainConfig]
) -> Iterator[Callable[..., TrainingRun]]:
    """Return ``planned(name, **changes)``: a run that plans, with few active features."""
    monkeypatch.setattr(coder, "transcoder", as_on_a_device)
    monkeypatch.setattr(loop, "takes_plans", lambda *_: True)
    # Plan tiny calls like large ones: codes at any density, and small steps of capacity.
    monkeypatch.setitem(codes.DENSE_SHARE, torch.float32, 1.0)
    monkeypatch.setattr(codes, "CAPACITY_STEP", 4)
    monkeypatch.setattr(codes, "HEADROOM", 3)  # counts of short sequences differ more

    def make(name: str, **changes: object) -> loop.TrainingRun:
        changes = {"optimizer.accumulation": 2, "optimizer.batch_size": 3, **changes}
        config = tiny_config(**{"adapter.implementation": "sparse", **changes})
        model, feed = trainer.load_model_and_data(config)
        adapter: Any
        with torch.no_grad():
            for adapter in model.adapters:
                adapter.b_enc.fill_(-0.25)
        (tmp_path / name).mkdir()
        run = loop.TrainingRun(config, tmp_path / name, 0.0, model, feed)
        run.log = logs.enter_context(MetricsLog(tmp_path / name / "metrics.jsonl"))
        return run

    with ExitStack() as logs:
        yield make


def metrics_of(run: loop.TrainingRun) -> list[dict]:
    run.log._file.flush()
    records = read_records(run.folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMING} for record in records]


def state_of(run: loop.TrainingRun) -> dict[str, torch.Tensor]:
    groups = {**run.optimizer.tensors(), "counters": {"since": run.dead.since_LF}}
    return {f"{g}/{n}": t.clone() for g, ts in groups.items() for n, t in ts.items()}


def assert_same(run: loop.TrainingRun, other: loop.TrainingRun) -> None:
    ours, theirs = state_of(run), state_of(other)
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())
    assert (run.step, run.tokens, run.bad_total) == (other.step, other.tokens, other.bad_total)
    assert run.planner.expected == other.planner.expected


def test_plans_follow_the_last_step(
    planned: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = planned("run"), []
    real = loop.objective

    def watched(*args: Any, **kwargs: Any) -> Any:
        out = real(*args, **kwargs)
        seen.append((args[-1], [c.plan for c in out.calls]))
        return out

    monkeypatch.setattr(loop, "objective", watched)
    run.advance()
    assert seen == [(None, [None, None])] * 2  # nothing is known yet
    first = run.planner.expected
    assert first is not None
    assert all(0 < rate < 20 for rate in first), first
    seen.clear()
    run.advance()
    assert [rates for rates, _ in seen] == [first] * 2
    assert all(
        isinstance(plan, CodeLayout) and not plan.dense for _, plans in seen for plan in plans
    )
    assert run.planner.expected != first
    assert {r["kind"] for r in metrics_of(run)} == {"train"}


def test_codes_are_counted_per_token_of_every_stream(planned: Callable[..., TrainingRun]) -> None:
    """Behind the cutoff a call holds two streams, and twice the tokens."""
    run = planned("run", **{"objective.bridge": 0.0})
    batch, tokens = run.feed.batch(run.feed.train, [0, 1, 2])
    rates: list[Any] = []
    for bridge in (0.0, 1.0):
        config = type(run.config.objective)(bridge=bridge)
        out = objective(run.model, batch, 1, config)
        assert [c.n_streams for c in out.calls] == ([1, 2] if bridge else [1, 1])
        planner = CapacityEstimator(True)
        planner.applied(
            [[Call(c.plan, c.n_streams * tokens, int(c.stats.n_codes)) for c in out.calls]]
        )
        rates.append(planner.expected)
    alone, forked = rates
    assert alone[0] == forked[0]
    assert 0.3 < forked[1] / alone[1] < 3


def test_a_plan_too_small_changes_no_bit(planned: Callable[..., TrainingRun]) -> None:
    run, other = planned("run"), planned("other")
    for each in (run, other):
        each.advance()
        each.advance()
    run.planner.expected = [0.01, 0.01]
    for each in (run, other):
        each.advance()
    assert_same(run, other)
    records, other_records = metrics_of(run), metrics_of(other)
    replan = next(r for r in records if r["kind"] == "replan")
    assert replan["step"] == 3
    assert replan["layers"] == [0, 0]  # of both micro-batches; counts of later layers are not valid
    assert all(c > m for c, m in zip(replan["codes"], replan["capacities"], strict=True))
    assert [r for r in records if r is not replan] == other_records


def test_a_broken_step_leaves_no_expectation(
    planned: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned("run")
    run.advance()
    expected = run.planner.expected
    real = loop.objective
    monkeypatch.setattr(
        loop,
        "objective",
        lambda *a, **k: (o := real(*a, **k))._replace(metrics={"loss": o.loss * torch.nan}),
    )
    run.advance()
    assert run.bad_total == 1
    assert run.planner.expected == expected


@pytest.mark.slow
def test_stopped_and_resumed_with_plans(
    planned: Callable[..., TrainingRun], tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """The expected counts are saved, so the first step after a resume is planned."""
    changes = {"adapter.implementation": "sparse", "run.eval_every": 0, "optimizer.max_steps": 7}
    whole = tiny_config(**{**changes, "run.output": str(tmp_path / "whole")})
    again = tiny_config(**{**changes, "run.output": str(tmp_path / "again")})
    train(whole)
    stop = Event()

    def sink(record: dict) -> None:
        if (record["kind"], record["step"]) == ("train", 4):
            stop.set()

    assert train(again, stop=stop, sinks=[sink])["step"] == 4
    first: list = []
    real = loop.objective

    def watched(*args: Any, **kwargs: Any) -> Any:
        first.append(args[-1])
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "objective", watched)
        train(again, resume=True)
    assert isinstance(first[0], list)
    for file in ("weights", "exp_avg", "exp_avg_sq", "counters"):
        name = f"checkpoints/step-00000007/{file}.safetensors"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


# --- with the kernels -----------------------------------------------------------------------------


@pytest.fixture
def few(
    planned: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., TrainingRun]:
    """Return ``few(name, implementation)``: a run of the op itself, one sequence a step."""
    monkeypatch.setattr(coder, "transcoder", real_transcoder)

    def make(name: str, implementation: str) -> loop.TrainingRun:
        sizes = {"optimizer.accumulation": 1, "optimizer.batch_size": 1, "adapter.n_features": 24}
        return planned(name, **sizes, **{"adapter.implementation": implementation})

    return make


@pytest.mark.slow
@interpreted
def test_training_on_the_kernels_equals_training_on_the_cpu(
    few: Callable[..., TrainingRun],
) -> None:
    run, other = few("run", "triton"), few("other", "sparse")
    for _ in range(2):
        run.advance()
        other.advance()
    assert run.planner.expected == other.planner.expected
    ours, theirs = state_of(run), state_of(other)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6, msg=name)
    assert all(r["kind"] == "train" for r in metrics_of(run))


@interpreted
@pytest.mark.slow
def test_kernel_buffers_too_short_change_no_bit(few: Callable[..., TrainingRun]) -> None:
    run, other = few("run", "triton"), few("other", "triton")
    for each in (run, other):
        each.advance()
    run.planner.expected = [0.01, 0.01]
    for each in (run, other):
        each.advance()
    assert_same(run, other)
    assert [r["kind"] for r in metrics_of(run)] == ["train", "replan", "train"]
    assert [r for r in metrics_of(run) if r["kind"] == "train"] == metrics_of(other)

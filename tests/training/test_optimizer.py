"""AdamW on masters: small updates, gradient sums, schedule, and restored state."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastadapt.errors import UserError
from fastadapt.kernels.testing import assert_close
from fastadapt.training import optimizer as optimizers
from fastadapt.training.optimizer import AdapterOptimizer, OptimizerConfig, learning_rate


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "W": nn.Parameter((0.015 * torch.randn(7, 5, generator=generator)).to(dtype)),
        "b": nn.Parameter(torch.zeros(7, dtype=dtype)),
    }


def backward(named: dict[str, nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    for parameter in named.values():
        cotangent = torch.randn(parameter.shape, generator=generator) * scale
        loss = loss + (parameter.float() * cotangent).sum()
    loss.backward()


def run(optimizer: AdapterOptimizer, seeds: range, rate: float = 1e-3) -> None:
    for seed in seeds:
        backward(optimizer.parameters, seed)
        optimizer.step(rate, optimizer.gradient_norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_adamw_with_clipping(dtype: torch.dtype) -> None:
    """bfloat16 without masters has the released code's parameters and moments."""
    ours, theirs = parameters(dtype), parameters(dtype)
    config = OptimizerConfig(clip=0.5, weight_decay=0.1, masters=False)
    optimizer = AdapterOptimizer(ours, config)
    adam = torch.optim.AdamW(theirs.values(), lr=1e-3, weight_decay=0.1, fused=True)
    for seed in range(4):
        backward(ours, seed)
        optimizer.step(1e-3, optimizer.gradient_norm())
        backward(theirs, seed)
        nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        adam.step()
        adam.zero_grad()
    for name in ours:
        assert torch.equal(ours[name], theirs[name])


class Passes(TorchDispatchMode):
    """Lists the operations that write several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(("_foreach", "_fused")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip", [1e-3, 0.5, 1e6, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_that_clips_has_one_pass_and_equals_clipping(
    dtype: torch.dtype, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update of a GPU, run on a CPU; oracle and peer clip in a pass."""
    config = OptimizerConfig(clip=clip, weight_decay=0.1)
    weights: dict[str, dict[str, torch.Tensor]] = {}
    passes: dict[str, list[str]] = {}
    for name in ("oracle", "peer", "actual"):
        clips = name == "actual"
        monkeypatch.setattr(optimizers, "_divides_gradients", lambda *_, clips=clips: clips)
        named = parameters(dtype)
        if name == "oracle":
            named = {key: nn.Parameter(value.double()) for key, value in named.items()}
        optimizer = AdapterOptimizer(named, config)
        with Passes() as calls:
            run(optimizer, range(5))
        passes[name] = [call for call in calls.names if call not in ("_foreach_norm",)]
        weights[name] = {k: v.detach() for k, v in optimizer.masters.items()}
        weights[name] |= optimizer.tensors()["exp_avg"]
    assert passes["peer"].count("_foreach_mul_") == 5
    assert "_foreach_mul_" not in passes["actual"]
    assert passes["actual"].count("_fused_adamw_") == 5
    for name, oracle in weights["oracle"].items():
        assert_close(weights["actual"][name], oracle, weights["peer"][name], name=name)


def test_the_update_clips_on_a_gpu_where_factor_and_gradients_allow() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        narrow, wide = (
            torch.empty(3, dtype=d, device="cuda") for d in (torch.float32, torch.float64)
        )
        adam = torch.optim.AdamW([nn.Parameter(torch.ones(3))], fused=True)
        assert optimizers._divides_gradients(adam, [narrow, narrow.bfloat16()])
        assert not optimizers._divides_gradients(adam, [narrow, wide])
        assert not optimizers._divides_gradients(adam, [torch.ones(3)])
        assert not optimizers._divides_gradients(object(), [narrow])


def test_masters_move_where_bfloat16_would_not() -> None:
    """At rate 1e-6 an update is far below half the spacing of bfloat16 at 0.015, 3e-5."""
    moved = {}
    for masters in (True, False):
        named = parameters(torch.bfloat16)
        with torch.no_grad():
            named["W"].fill_(0.015)
        before = named["W"].detach().clone()
        optimizer = AdapterOptimizer(named, OptimizerConfig(masters=masters))
        for _ in range(100):
            named["W"].float().sum().backward()
            named["b"].float().sum().backward()
            optimizer.step(1e-6, optimizer.gradient_norm())
        moved[masters] = (named["W"].detach() - before).abs().max().item()
    assert moved[False] == 0
    assert moved[True] > 0


def test_gradients_of_micro_batches_add_up_in_fp32() -> None:
    """256 + 1 is 256 in bfloat16 and 257 in the fp32 master."""
    named = {"W": nn.Parameter(torch.ones(3, dtype=torch.bfloat16))}
    optimizer = AdapterOptimizer(named, OptimizerConfig())
    for value in (256.0, 1.0):
        (named["W"] * value).sum().backward()
    assert named["W"].grad is None
    assert optimizer.masters["W"].grad is not None
    assert optimizer.masters["W"].grad.tolist() == [257.0] * 3
    assert optimizer.gradient_norm().item() == pytest.approx(257 * math.sqrt(3))


def test_working_copies_are_the_masters_rounded() -> None:
    named = parameters(torch.bfloat16)
    optimizer = AdapterOptimizer(named, OptimizerConfig())
    run(optimizer, range(5))
    for name, parameter in named.items():
        assert optimizer.masters[name].dtype == torch.float32
        assert torch.equal(parameter, optimizer.masters[name].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masters", [True, False])
def test_state_is_restored_bitwise(dtype: torch.dtype, masters: bool) -> None:
    config = OptimizerConfig(masters=masters)
    whole = AdapterOptimizer(parameters(dtype), config)
    run(whole, range(6))
    first = AdapterOptimizer(parameters(dtype), config)
    run(first, range(3))
    saved = {g: {n: t.clone() for n, t in ts.items()} for g, ts in first.tensors().items()}
    second = AdapterOptimizer(parameters(dtype), config)
    second.load(saved, first.scalars())
    run(second, range(3, 6))
    for group, tensors in whole.tensors().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second.tensors()[group][name]), (group, name)
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, second.parameters[name])


def test_discard_changes_nothing() -> None:
    named = parameters(torch.bfloat16)
    optimizer = AdapterOptimizer(named, OptimizerConfig())
    run(optimizer, range(2))
    before = {g: {n: t.clone() for n, t in ts.items()} for g, ts in optimizer.tensors().items()}
    backward(named, 2, scale=math.nan)
    assert optimizer.gradient_norm().isnan()
    optimizer.discard()
    for group, tensors in optimizer.tensors().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, before[group][name])
    assert all(master.grad is None for master in optimizer.masters.values())


def test_a_state_of_another_shape_is_refused_and_changes_nothing() -> None:
    optimizer = AdapterOptimizer(parameters(), OptimizerConfig())
    saved = {g: dict(ts) for g, ts in optimizer.tensors().items()}
    weight = optimizer.masters["W"].detach().clone()
    cases = {
        r"exp_avg.*W: expected \(7, 5\).*got \(7, 4\)": {"W": torch.zeros(7, 4)},
        "b is missing": {"W": torch.zeros(7, 5)},
        "extra is not of this run": {**saved["exp_avg"], "extra": torch.zeros(1)},
    }
    for message, group in cases.items():
        with pytest.raises(UserError, match=message):
            optimizer.load({**saved, "exp_avg": group}, optimizer.scalars())
    assert torch.equal(optimizer.masters["W"], weight)


def test_step_without_backward_is_an_error() -> None:
    optimizer = AdapterOptimizer(parameters(), OptimizerConfig())
    with pytest.raises(RuntimeError, match=r"no gradient for W, b: call backward\(\) first"):
        optimizer.gradient_norm()


def test_detach_leaves_gradients_in_the_parameters() -> None:
    named = parameters(torch.bfloat16)
    optimizer = AdapterOptimizer(named, OptimizerConfig())
    optimizer.detach()
    backward(named, 0)
    assert named["W"].grad is not None


def test_schedule() -> None:
    config = OptimizerConfig(lr=2.0, warmup=0.05)
    rates = [learning_rate(step, 200, config) for step in range(201)]
    assert rates[:10] == pytest.approx([2.0 * (step + 1) / 11 for step in range(10)])
    assert rates[10] == 2.0
    assert max(rates) == 2.0
    assert rates[105] == pytest.approx(1.0)  # half-way down the cosine
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[199] < 2e-4 * 2
    assert rates[200] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 1), (0.0, 7), (1.0, 7), (0.05, 1), (0.5, 2)])
def test_schedule_has_no_step_of_rate_zero(warmup: float, steps: int) -> None:
    config = OptimizerConfig(warmup=warmup)
    rates = [learning_rate(step, steps, config) for step in range(steps)]
    assert all(0 < rate <= config.lr for rate in rates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thresholds_never_fall_below_the_lowest(dtype: torch.dtype) -> None:
    named = {
        "0.threshold": nn.Parameter(torch.tensor([0.02, -0.5], dtype=dtype)),
        "0.b_enc": nn.Parameter(torch.tensor([0.02, -0.5], dtype=dtype)),
    }
    optimizer = AdapterOptimizer(named, OptimizerConfig(), lowest_threshold=0.01)
    for _ in range(20):
        total: Any = sum(p.sum() for p in named.values())
        total.backward()  # gradients that lower them all
        optimizer.step(1e-2, optimizer.gradient_norm())
    lowest = torch.tensor(0.01, dtype=dtype)
    assert torch.equal(named["0.threshold"].detach(), lowest.expand(2))
    assert (named["0.b_enc"] < -0.1).all()

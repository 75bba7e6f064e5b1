"""torchao's AdamW follows ours with less memory and is restored from checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fastadapt.errors import UserError
from fastadapt.training.optimizer import AdapterOptimizer, OptimizerConfig

EIGHT: dict[str, Any] = {"moments": "8bit"}
ROUNDED: dict[str, Any] = {"masters": False, "stochastic_rounding": True}


@pytest.fixture
def eager() -> Iterator[None]:
    """Run torchao's update without a compiler, which changes no value here."""
    pytest.importorskip("torchao")
    with torch.compiler.set_stance("force_eager"):
        yield


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "W": nn.Parameter((0.015 * torch.randn(96, 64, generator=generator)).to(dtype)),
        "b": nn.Parameter(torch.zeros(7, dtype=dtype)),
    }


def run(optimizer: AdapterOptimizer, seeds: range, rate: float = 1e-3) -> None:
    """Step on gradients of the squared norm with multiplicative noise."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in optimizer.parameters.values():
            noise = torch.randn(parameter.shape, generator=generator)
            (parameter.float() * (1 + noise)).sum().backward()
        optimizer.step(rate, optimizer.gradient_norm())


def weights(optimizer: AdapterOptimizer) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in optimizer.masters.values()])


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [(EIGHT, torch.float32), (EIGHT, torch.bfloat16), (ROUNDED, torch.bfloat16)],
)
def test_weights_follow_adamw(changes: dict[str, Any], dtype: torch.dtype, eager: None) -> None:
    exact = AdapterOptimizer(parameters(torch.float32), OptimizerConfig())
    start = weights(exact)
    other = AdapterOptimizer(parameters(dtype), OptimizerConfig(**changes))
    for optimizer in (exact, other):
        run(optimizer, range(40))
    moved = weights(exact) - start
    assert (weights(other) - start - moved).norm() < 0.1 * moved.norm()


def test_stochastic_rounding_applies_updates_that_rounding_to_nearest_drops(eager: None) -> None:
    """Updates are 1e-6, a thirtieth of half the spacing of bfloat16 at 0.015."""
    moved = {}
    for random in (False, True):
        changes: dict[str, Any] = {"masters": False, "stochastic_rounding": random}
        optimizer = AdapterOptimizer(parameters(torch.bfloat16), OptimizerConfig(**changes))
        start = optimizer.parameters["W"].detach().float().clone()
        run(optimizer, range(30), rate=1e-6)
        moved[random] = float((optimizer.parameters["W"].detach().float() - start).mean())
    assert abs(moved[False]) < 1e-6
    assert moved[True] == pytest.approx(-30e-6, rel=0.5)


@pytest.mark.parametrize("changes", [EIGHT, ROUNDED])
def test_a_checkpoint_restores_every_bit(changes: dict[str, Any], eager: None) -> None:
    config = OptimizerConfig(**changes)
    whole = AdapterOptimizer(parameters(torch.bfloat16), config)
    torch.manual_seed(1)
    run(whole, range(3))
    saved = {
        group: {name: t.detach().clone() for name, t in tensors.items()}
        for group, tensors in whole.tensors().items()
    }
    scalars, rng = whole.scalars(), torch.get_rng_state()
    run(whole, range(3, 6))
    again = AdapterOptimizer(parameters(torch.bfloat16), config)
    again.load(saved, scalars)
    torch.set_rng_state(rng)
    run(again, range(3, 6))
    for group, tensors in whole.tensors().items():
        for name, value in tensors.items():
            assert torch.equal(value, again.tensors()[group][name]), (group, name)


def test_moments_take_a_byte(eager: None) -> None:
    from fastadapt.training.optimizer import MOMENT_BYTES

    optimizer = AdapterOptimizer(parameters(torch.bfloat16), OptimizerConfig(**EIGHT))
    group = optimizer.tensors()["exp_avg"]
    taken = sum(t.numel() * t.element_size() for name, t in group.items() if name.startswith("W"))
    assert taken == 96 * 64 * MOMENT_BYTES


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"pip install 'fastadapt\[lowmem\]'"):
        AdapterOptimizer(parameters(torch.float32), OptimizerConfig(**EIGHT))


def test_impossible_settings() -> None:
    with pytest.raises(UserError, match=r"optimizer\.moments: expected full or 8bit, got '4bit'"):
        OptimizerConfig(moments="4bit")
    with pytest.raises(UserError, match=r"stochastic_rounding: expected false, or masters false"):
        OptimizerConfig(stochastic_rounding=True)

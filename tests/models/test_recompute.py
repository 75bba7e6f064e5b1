"""What is saved for the backward pass, and which operations are looked at for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.kernels.transcoder import CodeLayout, should_save, transcoder
from fastadapt.models import recompute
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import ObjectiveConfig, objective


class SaveQuery(TorchDispatchMode):
    """Record whether the encoder's codes should be saved, before and after the op has run."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: tuple[bool, bool] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.fastadapt.encode.default:
            self.saved = should_save(func, args), should_save(func, args, output)
        return output


@pytest.mark.parametrize(
    ("plan", "active", "saved"),
    [
        (CodeLayout(dense=False), 1, (True, True)),
        (CodeLayout(dense=True), 1, (False, False)),
        (None, 1, (False, True)),  # before the op runs, codes count as dense
        (None, 64, (False, False)),
    ],
)
def test_sparse_codes_are_saved(
    plan: CodeLayout | None, active: int, saved: tuple[bool, bool]
) -> None:
    torch.manual_seed(0)
    x, W_enc, W_dec = torch.randn(1, 8, 16), torch.randn(64, 16), torch.randn(64, 16)
    b_enc = torch.full((64,), -1e3)
    b_enc[:active] = 1e3
    with SaveQuery() as query:
        transcoder(
            x,
            W_enc.requires_grad_(),
            b_enc,
            W_dec,
            torch.zeros(16),
            plan=plan,
            implementation="sparse",
        )
    assert query.saved == saved


def test_other_ops_are_not_saved() -> None:
    assert not should_save(torch.ops.aten.mm.default, (torch.ones(1, 1), torch.ones(1, 1)))


class Count(TorchDispatchMode):
    """Count the operations of a step."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model(make_pair: Callable[..., Any]) -> ReplacementModel:
    """A model of three layers with adapters of 32 features."""
    return ReplacementModel.create(make_pair("qwen2"), AdapterConfig(n_features=32))


#: By policy, the largest share of a step's operations that pass through Python.
SHARES = {"full": 0.05, "attention": 0.2, "mlp": 0.25}


@pytest.mark.parametrize("policy", SHARES)
def test_few_operations_pass_through_python(
    policy: str, model: ReplacementModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Count()

    def count(mode: Any) -> None:
        plain = mode.__torch_dispatch__

        def counted(self: Any, *arguments: Any) -> Any:
            watched.n += 1
            return plain(self, *arguments)

        monkeypatch.setattr(mode, "__torch_dispatch__", counted)

    count(recompute.SaveResults)
    count(recompute.ReplayResults)
    with Count() as every:
        step(model, policy).backward()
    assert 0 < watched.n <= SHARES[policy] * every.n


@pytest.mark.parametrize("policy", SHARES)
def test_a_second_backward_pass_is_refused(policy: str, model: ReplacementModel) -> None:
    loss = step(model, policy)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran twice"):
        loss.backward()


def step(model: ReplacementModel, policy: str) -> torch.Tensor:
    """Return the loss of a step with sparse codes."""
    ids = torch.arange(2, 14)[None]
    config = ObjectiveConfig(checkpoint=policy)
    layers = model.n_layers
    return objective(model, Batch(ids, None, ids), layers // 2, config, [2.0] * layers).loss

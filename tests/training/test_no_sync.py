"""Between its batches and its one report, a step reads nothing from the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastadapt.kernels.linear_kl import linear_kl
from fastadapt.objective import objective
from fastadapt.training import trainer
from fastadapt.training.loop import Run
from fastadapt.training.metrics import StepGatherer

# Of masked lanes, in interpreted kernels.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")

#: Ops whose result, or whose result's shape, the host has to wait for.
READS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::item",
    "aten::equal",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::repeat_interleave.Tensor",
    "aten::bincount",
}


#: And methods, by which code within an op, which a dispatch mode does not see, would read.
METHODS = ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__")


class NoReads(TorchDispatchMode):
    """Raises where the host would wait for the device; on a GPU torch watches all copies too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in READS:
            raise AssertionError(f"{func.name()} reads from the device")
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        def refuse(*_: object) -> None:
            raise AssertionError("a method reads from the device")

        self.patch = pytest.MonkeyPatch()
        for name in METHODS:
            self.patch.setattr(torch.Tensor, name, refuse)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")
        return super().__enter__()

    def __exit__(self, *told):
        self.patch.undo()
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        return super().__exit__(*told)


@pytest.fixture
def run(tiny_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """One sequence a batch, kernels and plans as on a GPU."""
    on_gpu = functools.partial(linear_kl, implementation="triton")
    monkeypatch.setattr("fastadapt.objective.linear_kl", on_gpu)
    config = tiny_config(
        **{
            "optimizer.batch_size": 1,
            "optimizer.accumulation": 2,
            "adapter.n_features": 32,
            "adapter.implementation": "triton",
            "pair.device": "auto",
        }
    )
    model, feed = trainer._load(config)
    return Run(config, tmp_path, 0.0, model, feed)


@pytest.mark.parametrize(("policy", "codes"), [("attention", 2.0), ("full", 32.0)])
def test_a_step_reads_nothing(run: Run, policy: str, codes: float) -> None:
    weights = run.config.objective.__class__(checkpoint=policy)
    expected = [codes] * run.model.n_layers
    batches = [run.feed.batch(run.feed.train, ids) for ids in run.feed.micro_batches(0)]
    gathered = StepGatherer()
    with NoReads():
        for batch, tokens in batches:
            assert batch.attention_mask is None
            out = objective(run.model, batch, 1, weights, expected)
            (out.loss * 0.5).backward()
            gathered.add(out, 0.5, tokens)
    gathered.combine(len(batches))  # with what the host knows of each batch
    with NoReads():
        norm = run.optimizer.gradient_norm()
        run.dead.update(gathered.fired(), gathered.tokens, gathered.valid(norm))
        run.optimizer.step(1e-3, norm)


def test_a_read_is_seen() -> None:
    value = torch.ones(3)
    for read in (lambda: value.sum().item(), lambda: bool(value.any()), lambda: value.nonzero()):
        with NoReads(), pytest.raises((AssertionError, RuntimeError), match=r"reads|synchroniz"):
            read()


def test_without_a_plan_the_op_looks_for_itself(run: Run) -> None:
    batch, _ = run.feed.batch(run.feed.train, run.feed.micro_batches(0)[0])
    with NoReads(), pytest.raises((AssertionError, RuntimeError), match=r"reads|synchroniz"):
        objective(run.model, batch, 1, run.config.objective, None)

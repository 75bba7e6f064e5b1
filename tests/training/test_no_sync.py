"""A step reads from the device only once, for its report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastadapt.kernels.linear_kl import linear_kl
from fastadapt.objective import objective
from fastadapt.training import trainer
from fastadapt.training.logs.metrics import StepGatherer
from fastadapt.training.loop import TrainingRun
from fastadapt.training.prefetch import Collation
from fastadapt.training.run_dir import MetricsLog

# Interpreted kernels warn about masked lanes.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")

#: Ops whose result or shape the host must wait for.
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


#: Methods that read inside an op, where a dispatch mode does not see the read.
METHODS = ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__")


class NoReads(TorchDispatchMode):
    """Raise where the host would wait for the device; on a GPU torch also watches copies."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.watching and func.name() in READS:
            raise AssertionError(f"{func.name()} reads from the device")
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        def refuse(*_: object) -> None:
            raise AssertionError("a method reads from the device")

        self.refuse = refuse
        self.watch()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> Any:
        self.lift()
        return super().__exit__(*exception)

    def watch(self) -> None:
        self.watching, self.patch = True, pytest.MonkeyPatch()
        for name in METHODS:
            self.patch.setattr(torch.Tensor, name, self.refuse)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")

    def lift(self) -> None:
        self.watching = False
        self.patch.undo()
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")


def without_mask(pad: int, multiple: int, *, passes_mask: bool, pack: int | None) -> Collation:
    """Collate as on a GPU."""
    assert passes_mask != torch.cuda.is_available()
    return Collation(pad, multiple, passes_mask=False, pack=pack)


@pytest.fixture
def run(
    tiny_config: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> TrainingRun:
    """A run with the kernels, layouts and padded batches of a GPU.

    The parameter is the number of sequences, by default one. A batch of three has one micro-batch:
    interpreted kernels take long.
    """
    sequences = getattr(request, "param", 1)
    on_gpu = functools.partial(linear_kl, implementation="triton")
    monkeypatch.setattr("fastadapt.objective.linear_kl", on_gpu)
    config = tiny_config(
        **{
            "optimizer.batch_size": sequences,
            "data.pad_to": 32,
            "optimizer.accumulation": 2 if sequences == 1 else 1,
            "adapter.n_features": 32,
            "adapter.implementation": "triton",
            "pair.device": "auto",
        }
    )
    monkeypatch.setattr("fastadapt.training.step_data.Collation", without_mask)
    model, feed = trainer.load_model_and_data(config)
    assert config.pair.device == "auto"
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    return TrainingRun(config, tmp_path, 0.0, model, feed)


@pytest.mark.parametrize(
    ("policy", "codes", "run"),
    [
        pytest.param("attention", 2.0, 1, marks=pytest.mark.slow),
        pytest.param("attention", 2.0, 3, marks=pytest.mark.slow),
        pytest.param("full", 32.0, 1, marks=pytest.mark.slow),
    ],
    indirect=["run"],
)
def test_a_step_reads_its_report_and_nothing_else(
    run: TrainingRun, policy: str, codes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report is one copy from the device, read before the update that depends on it."""
    changed = dataclasses.replace(run.config.objective, checkpoint=policy)
    run.config = dataclasses.replace(run.config, objective=changed)
    run.log = MetricsLog(run.folder / "metrics.jsonl")
    run.planner.expected = [codes] * run.model.n_layers
    guard = NoReads()
    read: list[str] = []

    def unguarded(name: str) -> None:
        method = getattr(StepGatherer, name)

        def call(*args: Any) -> Any:
            guard.lift()
            try:
                return method(*args)
            finally:
                read.append(name)
                guard.watch()

        monkeypatch.setattr(StepGatherer, name, call)

    unguarded("report")  # the one copy
    unguarded("combine")  # copies host values only: tokens, lengths of buffers
    before = [p.detach().clone() for p in run.model.adapters.parameters()]
    with guard, run.log:
        run.advance()
    assert read == ["combine", "report"]
    assert run.step == 1
    moved = [
        not torch.equal(a, b) for a, b in zip(before, run.model.adapters.parameters(), strict=True)
    ]
    assert any(moved)


def test_a_read_is_seen() -> None:
    value = torch.ones(3)
    for read in (lambda: value.sum().item(), lambda: bool(value.any()), lambda: value.nonzero()):
        with NoReads(), pytest.raises((AssertionError, RuntimeError), match=r"reads|synchroniz"):
            read()


@pytest.mark.parametrize("run", [1, 3], indirect=True)
def test_a_mask_passed_to_the_model_is_read(run: TrainingRun) -> None:
    batch, _ = run.feed.batch(run.feed.train, run.feed.micro_batches(0)[0])
    assert batch.attention_mask is not None
    with NoReads():
        run.model.block_inputs(batch.input_ids, batch.model_mask)
    with NoReads(), pytest.raises((AssertionError, RuntimeError), match=r"reads|synchroniz"):
        run.model.block_inputs(batch.input_ids, batch.attention_mask)


def test_without_a_layout_the_op_reads_from_the_device(run: TrainingRun) -> None:
    batch, _ = run.feed.batch(run.feed.train, run.feed.micro_batches(0)[0])
    with NoReads(), pytest.raises((AssertionError, RuntimeError), match=r"reads|synchroniz"):
        objective(run.model, batch, 1, run.config.objective, None)

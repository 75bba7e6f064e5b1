"""A killed and resumed run has the same bits as an uninterrupted one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from same_run import assert_same_run, into, records, stop_after

from fastadapt.errors import RunError, UserError
from fastadapt.models.trained_files import load_adapters
from fastadapt.training import trainer
from fastadapt.training.checkpoint import list_checkpoints
from fastadapt.training.config import TrainConfig, save_config
from fastadapt.training.run_dir import read_records
from fastadapt.training.step_data import StepData
from fastadapt.training.trainer import train

PROOF = os.environ.get("FASTADAPT_PROOF") == "1"


@pytest.mark.parametrize("kind", ["transcoder", pytest.param("mlp", marks=pytest.mark.slow)])
def test_killed_at_steps_and_resumed_twice(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, kind: str
) -> None:
    """Kill before the first checkpoint (step 3), at one, between two, and at the last step."""
    kills = ["1,2", "3,5", "4,9", "7,8", "10,12"] if PROOF else ["3,5"]
    config = tiny_config(**VARIANTS[kind] if kind == "mlp" else {})
    save_config(config, tmp_path / "config.yaml")
    program = Path(__file__).with_name("crash_runs.py")
    arguments = [sys.executable, program, tmp_path / "config.yaml", tmp_path, *kills]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in kills:
        folder = tmp_path / name.replace(",", "-")
        assert_same_run(folder, tmp_path / "whole")
        resumed = [r for r in read_records(folder / "metrics.jsonl") if r["kind"] == "resume"]
        assert resumed  # the second resumption may have dropped the record of the first


VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {"adapter.activation": "topk", "adapter.k": 3},
    "batch_topk": {"adapter.activation": "batch_topk", "adapter.k": 2.5},
    "jumprelu": {
        "adapter.activation": "jumprelu",
        "adapter.bandwidth": 0.1,
        "adapter.initial_threshold": 0.05,
    },
    "bfloat16 on masters": {"pair.dtype": "bfloat16"},
    "bfloat16 alone": {"pair.dtype": "bfloat16", "optimizer.masters": False},
    "accumulation and epochs": {
        "optimizer.batch_size": 3,
        "optimizer.accumulation": 3,
        "optimizer.epochs": 2,
    },
    "no checkpointing of blocks": {"objective.checkpoint": "none"},
    "packed, with workers": {
        "optimizer.batch_size": 6,
        "optimizer.epochs": 2,
        "data.pack": 48,
        "data.workers": 1,
    },
    "mlp": {"run.trains": "mlp", "adapter.n_features": None, "objective.sparsity": 0.0},
    "norms": {"run.trains": "norms", "adapter.n_features": None, "objective.sparsity": 0.0},
}


#: Variants that share their resumption with a quick one.


@pytest.mark.quick("bfloat16 on masters", "accumulation and epochs", "packed, with workers")
@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_and_resumed(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, variant: str
) -> None:
    config = tiny_config(**VARIANTS[variant])
    whole = train(into(config, tmp_path / "whole"))
    stop, again = Event(), into(config, tmp_path / "again")
    stopped = train(again, stop=stop, sinks=[stop_after(stop, 4)])
    assert stopped["interrupted"]
    assert (stopped["step"], stopped["steps"]) == (4, whole["steps"])
    resumed = train(again, resume=True)
    assert not resumed["interrupted"]
    ours = [r for r in records(tmp_path / "again") if (r["kind"], r["step"]) != ("checkpoint", 4)]
    assert ours == records(tmp_path / "whole")
    for file in ("weights", "exp_avg", "exp_avg_sq", "counters"):
        a, b = (
            list_checkpoints(tmp_path / name / "checkpoints")[-1][1] / f"{file}.safetensors"
            for name in ("whole", "again")
        )
        assert a.read_bytes() == b.read_bytes(), file
    same = whole.keys() - {"wall_s", "output", "adapter", "report"}
    assert {k: whole[k] for k in same} == {k: resumed[k] for k in same}


def test_every_sample_is_seen_once(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = StepData.batch

    def batch(self: StepData, data: Any, indices: list[int]) -> Any:
        if data is self.train:
            seen.extend(indices)
        return real(self, data, indices)

    monkeypatch.setattr(StepData, "batch", batch)
    config = tiny_config(**{"optimizer.batch_size": 5, "optimizer.accumulation": 2})
    for last in (1, 2, None):
        stop = Event()
        sinks = [] if last is None else [stop_after(stop, last)]
        summary = train(config, resume=last != 1, stop=stop, sinks=sinks)
    assert summary["steps"] == 3
    assert sorted(seen) == list(range(24))
    assert seen != list(range(24))


def test_the_newest_intact_checkpoint_is_used_and_damaged_ones_are_recorded(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config()
    train(config)
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1][1]
    weights = newest / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    (tmp_path / "run" / "checkpoints" / ".tmp-12-dead").mkdir()
    written: list[dict] = []
    train(config, resume=True, sinks=[written.append])
    resume = next(record for record in written if record["kind"] == "resume")
    assert resume["step"] == 9
    assert resume["checkpoint"] == "checkpoints/step-00000009"
    assert [each["path"] for each in resume["passed_over"]] == ["checkpoints/step-00000012"]
    assert "weights.safetensors has" in resume["passed_over"][0]["reason"]
    assert resume["unfinished_saves_removed"] == 1
    assert weights.read_bytes() == whole  # written again with the same bits


def test_no_whole_checkpoint_is_an_error_and_not_a_fresh_start(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config()
    train(config)
    for _, path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        (path / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"no checkpoint in .* is whole \(step-00000012: manifest"):
        train(config, resume=True)


def test_resuming_a_finished_run_changes_nothing(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config()
    first = train(config)
    before = records(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    others = [tmp_path / "run" / "adapter" / name for name in ("features/a", "notes.md")]
    others[0].parent.mkdir()
    for other in others:
        other.write_text("mine")
    second = train(config, resume=True)
    assert [other.read_text() for other in others] == ["mine", "mine"]
    assert load_adapters(tmp_path / "run" / "adapter")
    assert records(tmp_path / "run") == before
    assert (tmp_path / "run" / "summary.json").is_file()
    assert {**second, "wall_s": 0} == {**first, "wall_s": 0}


def test_an_interrupted_evaluation_is_repeated(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Stop during the evaluation of step 5: only the resumed run records the evaluation."""
    config = tiny_config()
    train(into(config, tmp_path / "whole"))
    stop = Event()
    again = into(config, tmp_path / "again")
    stopped = train(again, stop=stop, sinks=[stop_after(stop, 5)])
    assert stopped["step"] == 5
    assert not any(r["kind"] == "eval" and r["step"] == 5 for r in records(tmp_path / "again"))
    train(again, resume=True)
    ours = [r for r in records(tmp_path / "again") if (r["kind"], r["step"]) != ("checkpoint", 5)]
    assert ours == records(tmp_path / "whole")


def test_other_data_is_refused(
    tiny_config: Callable[..., TrainConfig], tiny_pair: Path, tmp_path: Path
) -> None:
    rows = (tiny_pair / "train.jsonl").read_text().splitlines()
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(rows))
    config, stop = tiny_config(**{"data.train": str(data)}), Event()
    train(config, stop=stop, sinks=[stop_after(stop, 3)])
    data.write_text("\n".join(rows[:-3]))
    with pytest.raises(UserError, match=r"24 sequences when the run began.*now it holds 21"):
        train(config, resume=True)


def test_other_data_of_the_same_size_is_refused(
    tiny_config: Callable[..., TrainConfig], tiny_pair: Path, tmp_path: Path
) -> None:
    rows = (tiny_pair / "train.jsonl").read_text().splitlines()
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(rows))
    config, stop = tiny_config(**{"data.train": str(data)}), Event()
    train(config, stop=stop, sinks=[stop_after(stop, 3)])
    data.write_text("\n".join([*rows[1:], rows[0]]))
    with pytest.raises(UserError, match="holds other tokens than when the run began"):
        train(config, resume=True)


def test_the_saved_number_of_threads_is_restored(tiny_config: Callable[..., TrainConfig]) -> None:
    before, stop = torch.get_num_threads(), Event()
    try:
        torch.set_num_threads(2)
        train(tiny_config(), stop=stop, sinks=[stop_after(stop, 3)])
        torch.set_num_threads(1)
        train(tiny_config(), resume=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("device_type", "cuda", "began on cuda, now pair.device is cpu"),
        ("revisions", {"target": "abc", "base": None}, "began with model revisions .*abc"),
    ],
)
def test_another_origin_is_refused(
    key: str,
    value: Any,
    message: str,
    tiny_config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Present the checkpoint as saved on another kind of device, or with other revisions."""
    stop = Event()
    train(tiny_config(), stop=stop, sinks=[stop_after(stop, 3)])
    find = trainer.load_latest

    def moved(folder: Path) -> tuple[Any, Any]:
        checkpoint, passed = find(folder)
        assert checkpoint is not None
        scalars = {**checkpoint.scalars, key: value}
        return dataclasses.replace(checkpoint, scalars=scalars), passed

    monkeypatch.setattr(trainer, "load_latest", moved)
    with pytest.raises(UserError, match=message):
        train(tiny_config(), resume=True)


def test_weights_of_another_shape_are_refused(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Edit config.yaml to match the command line: the shapes of the tensors still differ."""
    stop = Event()
    train(tiny_config(), stop=stop, sinks=[stop_after(stop, 3)])
    other = tiny_config(**{"adapter.n_features": 40})
    save_config(other, tmp_path / "run" / "config.yaml")
    with pytest.raises(
        UserError, match=r"tensors do not match.*expected \(40, 32\).*got \(48, 32\)"
    ):
        train(other, resume=True)


def test_the_configured_number_of_threads_is_set(tiny_config: Callable[..., TrainConfig]) -> None:
    before = torch.get_num_threads()
    try:
        train(tiny_config(**{"run.threads": 2, "optimizer.max_steps": 1}))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

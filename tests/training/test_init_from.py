"""A run whose adapters begin as those of another one (``run.init_from``)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
import torch
from same_run import assert_same_run, into, records, stop_after

from fastadapt import load_adapters, save_adapters
from fastadapt.adapter.files import adapter_digest
from fastadapt.distributed.ranks import ALONE
from fastadapt.errors import ModelsChangedWarning, RunError, UserError
from fastadapt.training.config import TrainConfig, load_config
from fastadapt.training.planning.estimate import plan, remedies
from fastadapt.training.signals import out_of_memory_explained
from fastadapt.training.trainer import train

JUMPRELU: dict[str, object] = {
    "adapter.activation": "jumprelu",
    "adapter.bandwidth": 0.1,
    "adapter.initial_threshold": 0.05,
}
KINDS: dict[str, dict[str, object]] = {
    "relu": {},
    "batch_topk": {"adapter.activation": "batch_topk", "adapter.k": 2.5},
    "jumprelu": JUMPRELU,
    "bfloat16 on masters": {"pair.dtype": "bfloat16"},
    "whole MLP": {"adapter.base_mlp": False},
}


@pytest.fixture
def later_target(tiny_pair: Path, tmp_path: Path) -> Path:
    """The target after another stage: all its weights have moved a little."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_pair / "target", tmp_path / "later"))
    file = folder / "model.safetensors"
    torch.manual_seed(5)
    moved = {name: w + 0.01 * torch.randn_like(w) for name, w in load_file(file).items()}
    save_file(moved, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_evaluation_is_the_last_of_the_other_run(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, kind: str
) -> None:
    """On one pair, the evaluation before the first step has the bits of the other run's last."""
    first = into(tiny_config(**KINDS[kind]), tmp_path / "first")
    train(first)
    more = {"run.init_from": str(tmp_path / "first"), "run.seed": 7}
    second = into(tiny_config(**KINDS[kind], **more), tmp_path / "second")
    train(second)
    ends = [
        {k: v for k, v in record.items() if k not in ("step", "tokens", "wall_s")}
        for record in (
            [r for r in records(tmp_path / "first") if r["kind"] == "eval"][-1],
            next(r for r in records(tmp_path / "second") if r["kind"] == "eval"),
        )
    ]
    assert ends[0] == ends[1]
    assert ends[0]["kl_adapter"] != ends[0]["kl_hybrid"]  # as it is with new adapters


def test_a_later_stage(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, later_target: Path
) -> None:
    """Adapters of the earlier target, or their folder alone, begin closer than new ones."""
    train(into(tiny_config(), tmp_path / "first"))
    at_start = {}
    for name, start in (("run", "first"), ("folder", "first/adapter"), ("new", None)):
        changes = {} if start is None else {"run.init_from": str(tmp_path / start)}
        config = tiny_config(**{"pair.target": str(later_target), **changes})
        train(into(config, tmp_path / name))
        at_start[name] = next(r for r in records(tmp_path / name) if r["kind"] == "eval")
    assert at_start["run"]["kl_adapter"] == at_start["folder"]["kl_adapter"]
    assert at_start["run"]["kl_adapter"] < 0.9 * at_start["new"]["kl_adapter"]
    card = json.loads((tmp_path / "run" / "adapter" / "fastadapt.json").read_text())
    digest = adapter_digest(tmp_path / "first" / "adapter")
    assert card["metadata"]["init_from"] == {"run": str(tmp_path / "first"), "adapter": digest}
    new = json.loads((tmp_path / "new" / "adapter" / "fastadapt.json").read_text())
    assert "init_from" not in new["metadata"]


def test_a_resumed_run_does_not_need_the_other_one(
    tiny_config: Callable[..., TrainConfig],
    tmp_path: Path,
    later_target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its bits are those of an uninterrupted run; a relative path is recorded absolute."""
    train(into(tiny_config(), tmp_path / "first"))
    monkeypatch.chdir(tmp_path)
    config = tiny_config(**{"pair.target": str(later_target), "run.init_from": "first"})
    train(into(config, tmp_path / "whole"))
    stop, again = Event(), into(config, tmp_path / "again")
    train(again, stop=stop, sinks=[stop_after(stop, 6)])
    recorded = load_config(tmp_path / "again" / "config.yaml")
    assert recorded.run.init_from == str(tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    train(again, resume=True)
    assert_same_run(tmp_path / "again", tmp_path / "whole")


def test_a_run_that_stopped_before_its_first_checkpoint_begins_again(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    train(into(tiny_config(), tmp_path / "first"))
    config = tiny_config(**{"run.init_from": str(tmp_path / "first")})
    train(into(config, tmp_path / "whole"))
    again = into(config, tmp_path / "again")
    stop = Event()
    train(again, stop=stop, sinks=[stop_after(stop, 1)])
    shutil.rmtree(tmp_path / "again" / "checkpoints")
    train(again, resume=True)
    assert_same_run(tmp_path / "again", tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter.n_features": 24}, r"adapter\.n_features: expected 48, as in run\.init_from"),
        (JUMPRELU, r"adapter\.activation: expected relu, as in run\.init_from .*jumprelu"),
        (
            {**JUMPRELU, "adapter.bandwidth": 0.2},
            r"adapter\.bandwidth: expected 0\.1, as in .*0\.2",
        ),
        ({"adapter.bias": False}, r"adapter\.bias: expected true, as in .*, got false"),
        ({"adapter.base_mlp": False}, r"adapter\.base_mlp: expected true, as in .*, got false"),
    ],
    ids=["features", "activation", "bandwidth", "bias", "base_mlp"],
)
def test_other_settings_are_refused_before_weights_are_read(
    tiny_config: Callable[..., TrainConfig],
    tmp_path: Path,
    changes: dict[str, object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jumps = changes.get("adapter.bandwidth") == 0.2
    train(into(tiny_config(**(JUMPRELU if jumps else {})), tmp_path / "first"))
    config = tiny_config(**changes, **{"run.init_from": str(tmp_path / "first")})

    def unread(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("fastadapt.training.trainer.load_model_and_data", unread)
    with pytest.raises(UserError, match=message):
        train(config)
    with pytest.raises(UserError, match=message):
        plan(config)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_another_base_or_another_model_is_refused(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, later_target: Path
) -> None:
    train(into(tiny_config(), tmp_path / "first"))
    start = {"run.init_from": str(tmp_path / "first")}
    with pytest.raises(UserError, match=r"trained beside another base: base .*later has weights"):
        train(tiny_config(**{"pair.base": str(later_target), **start}))
    adapters, metadata = load_adapters(tmp_path / "first" / "adapter")
    save_adapters(list(adapters)[:1], tmp_path / "one", metadata)
    with pytest.raises(UserError, match=r"one has 1 adapters of 32 inputs .*the pair has 2 layers"):
        train(tiny_config(**{"run.init_from": str(tmp_path / "one")}))
    assert not (tmp_path / "run" / "config.yaml").exists()
    save_adapters(adapters, tmp_path / "bare", {"base": "a/base"})
    with pytest.warns(ModelsChangedWarning, match=r"no fingerprint of its base \(a/base\)"):
        train(tiny_config(**{"run.init_from": str(tmp_path / "bare")}))


def test_changed_adapters_and_a_target_l0_are_refused(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Removed features get no gradient; steering begins with a high L0, as of new adapters."""
    train(into(tiny_config(), tmp_path / "first"))
    adapters, metadata = load_adapters(tmp_path / "first" / "adapter")
    step = {"kind": "ablate", "set": {"name": None, "size": 1}, "adapter": "a" * 64}
    save_adapters(adapters, tmp_path / "changed", {**metadata, "interventions": [step]})
    with pytest.raises(UserError, match=r"changed was changed by fastadapt intervene; give the"):
        train(tiny_config(**{"run.init_from": str(tmp_path / "changed")}))
    with pytest.raises(UserError, match=r"objective\.l0: expected null with run\.init_from"):
        tiny_config(**{"run.init_from": str(tmp_path / "first"), "objective.l0": 4.0})


def test_advice_on_memory_leaves_the_features_as_they_are(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    train(into(tiny_config(), tmp_path / "first"))
    for changes, is_named in (({}, True), ({"run.init_from": str(tmp_path / "first")}, False)):
        config = tiny_config(**changes)
        names = [name for name, _ in remedies(config, plan(config))]
        assert any(name.startswith("adapter.n_features") for name in names) == is_named
        with pytest.raises(RunError) as caught, out_of_memory_explained(config, ALONE):
            raise MemoryError
        assert ("adapter.n_features" in str(caught.value)) == is_named
    shutil.rmtree(tmp_path / "first")
    with (
        pytest.raises(RunError, match="The planned peak is"),
        out_of_memory_explained(config, ALONE),
    ):
        raise MemoryError


def test_a_run_whose_log_was_lost_still_names_its_start(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    train(into(tiny_config(), tmp_path / "first"))
    config = into(tiny_config(**{"run.init_from": str(tmp_path / "first")}), tmp_path / "run")
    stop = Event()
    train(config, stop=stop, sinks=[stop_after(stop, 6)])
    (tmp_path / "run" / "metrics.jsonl").unlink()
    train(config, resume=True)
    _, metadata = load_adapters(tmp_path / "run" / "adapter")
    assert metadata["init_from"] == {"run": str(tmp_path / "first")}


def test_impossible_starts_are_refused(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = into(tiny_config(), tmp_path / "first")
    stop = Event()
    train(config, stop=stop, sinks=[stop_after(stop, 3)])
    for start, message in (
        ("first", "this run is not finished"),
        ("nothing", "expected a run or a folder of adapters"),
        (" ", r"run\.init_from: expected a run, or null"),
    ):
        given = start if start.isspace() else str(tmp_path / start)
        with pytest.raises(UserError, match=message):
            train(tiny_config(**{"run.init_from": given}))
    train(config, resume=True)
    for start in ("first", "first/adapter"):
        itself = tiny_config(**{"run.init_from": str(tmp_path / start)})
        with pytest.raises(UserError, match=r"is in run\.output, whose run would be replaced"):
            train(into(itself, tmp_path / "first"), overwrite=True)
    mlp = {"run.trains": "mlp", "adapter.n_features": None, "objective.sparsity": 0.0}
    with pytest.raises(UserError, match=r"run\.trains: expected transcoder, since no"):
        tiny_config(**mlp, **{"run.init_from": str(tmp_path / "first")})
    train(into(tiny_config(**mlp), tmp_path / "mlp"))
    with pytest.raises(UserError, match=r"needs transcoder adapters; .*kind 'mlp'"):
        train(tiny_config(**{"run.init_from": str(tmp_path / "mlp")}))

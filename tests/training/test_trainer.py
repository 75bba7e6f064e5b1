"""Files of a run, and its behaviour on signals, broken batches, full disks, and low memory."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastadapt.distributed.ranks import Ranks
from fastadapt.errors import RunError, UserError
from fastadapt.models.trained_files import load_adapters
from fastadapt.objective import draw_cutoff
from fastadapt.training import checkpoint as checkpoint_module
from fastadapt.training import loop, trainer
from fastadapt.training.checkpoint import list_checkpoints, load_latest
from fastadapt.training.config import FREE_ON_RESUME, TrainConfig, load_config
from fastadapt.training.held_out import evaluate
from fastadapt.training.loop import TrainingRun
from fastadapt.training.optimizer import learning_rate
from fastadapt.training.planning.estimate import gb, plan
from fastadapt.training.run_dir import MetricsLog, read_records
from fastadapt.training.signals import out_of_memory_explained, stop_on_signals
from fastadapt.training.trainer import train


@pytest.fixture
def make_run(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> Iterator[Callable[..., TrainingRun]]:
    """``make_run(**changes)`` returns a run before its first step, with its log open."""

    with ExitStack() as logs:

        def make(**changes: object) -> loop.TrainingRun:
            config = tiny_config(**changes)
            model, feed = trainer.load_model_and_data(config)
            (tmp_path / "run").mkdir()
            run = loop.TrainingRun(config, tmp_path / "run", 0.0, model, feed)
            run.log = logs.enter_context(MetricsLog(tmp_path / "run" / "metrics.jsonl"))
            return run

        yield make


def state_of(run: loop.TrainingRun) -> dict[str, torch.Tensor]:
    groups = {**run.optimizer.tensors(), "counters": {"since": run.dead.since_LF}}
    return {f"{g}/{n}": t.clone() for g, ts in groups.items() for n, t in ts.items()}


def planted(monkeypatch: pytest.MonkeyPatch, steps: set[int], factor: float = math.nan) -> None:
    """Multiply the loss of these 1-based steps (of one micro-batch each) by ``factor``."""
    real, calls = loop.objective, iter(range(1, 1000))

    def objective(*args: Any, **kwargs: Any) -> Any:
        out = real(*args, **kwargs)
        if next(calls) not in steps:
            return out
        loss = out.loss * factor
        return out._replace(loss=loss, metrics={**out.metrics, "loss": loss.detach()})

    monkeypatch.setattr(loop, "objective", objective)


# --- a whole run ----------------------------------------------------------------------------------


def test_files_of_a_run(tiny_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = tiny_config(**{"run.report": True})
    records: list[dict[str, Any]] = []
    summary = train(config, sinks=[records.append])
    folder = tmp_path / "run"
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock",
        "adapter",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "summary.json",
    ]
    resolved = replace(config.data, family="r1-distill")  # of which the tokenizer has the markers
    assert load_config(folder / "config.yaml") == replace(config, data=resolved)
    assert [step for step, _ in list_checkpoints(folder / "checkpoints")] == [9, 12]
    assert read_records(folder / "metrics.jsonl") == records
    written = json.loads((folder / "summary.json").read_text())
    assert {k: v for k, v in summary.items() if k != "report"} == written
    assert Path(summary["report"]).is_file()
    for key in (
        "kl_hybrid",
        "kl_adapter",
        "kl_recovered_vs_hybrid",
        "top1_error_hybrid",
        "top1_error_adapter",
        "nmse_mean",
        "l0_mean",
        "l0_per_layer",
        "tokens",
        "wall_s",
    ):
        assert key in written
    assert written["tokens"] == 361
    adapters, metadata = load_adapters(folder / "adapter")
    final, _ = load_latest(folder / "checkpoints")
    assert final is not None
    for name, tensor in adapters.named_parameters():
        assert torch.equal(tensor, final.tensors["weights"][name])
    assert metadata["measured"]["kl_adapter"] == written["kl_adapter"]
    assert metadata["objective"]["sparsity"] == config.objective.sparsity


def test_held_out_texts_that_are_training_texts_are_recorded(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    data = tiny_config().data
    train(tiny_config(**{"data.validation": data.train, "optimizer.max_steps": 1}))
    start = read_records(tmp_path / "run" / "metrics.jsonl")[0]
    assert start["held_out_in_training"] == start["held_out_sequences"] == start["sequences"]


def test_records_of_a_run(tiny_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = tiny_config(**{"run.log_every": 4})
    assert "report" not in train(config)
    assert not (tmp_path / "run" / "report.html").exists()
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [(r["kind"], r["step"]) for r in records] == [
        ("start", 0),
        ("eval", 0),
        ("train", 1),
        ("checkpoint", 3),
        ("train", 4),
        ("eval", 5),
        ("checkpoint", 6),
        ("train", 8),
        ("checkpoint", 9),
        ("eval", 10),
        ("train", 12),
        ("checkpoint", 12),
        ("eval", 12),
    ]
    by = {(r["kind"], r["step"]): r for r in records}
    start = by["start", 0]
    assert (start["held_out_sequences"], start["held_out_in_training"]) == (4, 0)
    held_out = start["held_out_source"]
    assert (held_out["read"], held_out["bad"], held_out["too_long"]) == (4, 0, 0)
    assert by["eval", 0]["kl_adapter"] == by["eval", 0]["kl_hybrid"]  # a fresh adapter adds nothing
    assert by["eval", 12]["kl_adapter"] < by["eval", 0]["kl_adapter"]
    last = by["train", 12]
    assert last["cutoff"] == draw_cutoff(2, config.objective, 42, 11)
    assert last["lr"] == learning_rate(11, 12, config.optimizer)
    assert last["tokens"] == 361
    assert last["l0"] == pytest.approx(sum(last["l0_per_layer"]) / 2, rel=1e-6)
    for name in ("loss", "kl", "nmse", "nmse_token", "sparsity", "top1_error", "grad_norm"):
        assert math.isfinite(last[name])
    total = last["kl"] + last["nmse"] + last["sparsity"]
    total += sum(value for name, value in last.items() if name.startswith("bridge"))
    assert last["loss"] == pytest.approx(total, rel=1e-5)
    density = by["eval", 12]["feature_density_histogram"]
    assert "feature_density" not in by["eval", 12]
    assert len(density["log10_edges"]) == len(density["counts"][0]) + 1
    dead = by["eval", 12]["n_dead_per_layer"]
    assert [sum(counts) + n for counts, n in zip(density["counts"], dead, strict=True)] == [48, 48]


def test_two_runs_are_equal_and_another_seed_is_not(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    weights = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tiny_config(**{"run.output": str(tmp_path / name), "run.seed": seed}))
        file = next((tmp_path / name / "checkpoints").glob("step-00000012/weights.safetensors"))
        weights[name] = file.read_bytes()
    assert weights["a"] == weights["b"] != weights["c"]


def test_deterministic_algorithms_are_used_in_the_run_alone(
    tiny_config: Callable[..., TrainConfig],
) -> None:
    settings: Any = torch.utils.deterministic
    used = []

    def sink(_: dict) -> None:
        fills = settings.fill_uninitialized_memory
        used.append((torch.are_deterministic_algorithms_enabled(), fills))

    train(tiny_config(**{"run.deterministic": True, "optimizer.max_steps": 2}), sinks=[sink])
    assert set(used) == {(True, False)}
    assert not torch.are_deterministic_algorithms_enabled()
    assert settings.fill_uninitialized_memory


def test_overwrite_starts_again(tiny_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(tiny_config())
    with pytest.raises(UserError, match="holds another run, at step 12"):
        train(tiny_config())
    summary = train(tiny_config(**{"optimizer.max_steps": 2}), overwrite=True)
    assert summary["steps"] == 2
    assert [s for s, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [2]


def test_a_pair_that_cannot_be_read_leaves_an_old_run_alone(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    train(tiny_config(**{"optimizer.max_steps": 1}))
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(UserError, match="nowhere"):
        train(tiny_config(**{"pair.target": str(tmp_path / "nowhere")}), overwrite=True)
    assert sorted((tmp_path / "run").rglob("*")) == before


# --- micro-batches and counters -------------------------------------------------------------------


def test_accumulation_is_the_average_over_sequences(
    make_run: Callable[..., TrainingRun], tiny_config: Callable[..., TrainConfig]
) -> None:
    """7 sequences have the same gradient as one batch and as micro-batches of 3, 3 and 1."""
    run = make_run(**{"pair.dtype": "float64"})
    feed: Any = run.feed
    parameters: dict[str, Any] = dict(run.optimizer.parameters)
    gradients = []
    for groups in ([list(range(7))], [[0, 1, 2], [3, 4, 5], [6]]):
        feed.micro_batches = lambda step, groups=groups: groups
        with pytest.MonkeyPatch.context() as patch:
            gradient: dict[str, torch.Tensor] = {}

            def copy_gradient(
                rate: float, norm: torch.Tensor, gradient: dict[str, torch.Tensor] = gradient
            ) -> None:
                gradient.update({n: p.grad.clone() for n, p in parameters.items()})
                run.optimizer.discard()

            patch.setattr(run.optimizer, "step", copy_gradient)
            run.step = 0
            run.advance()
        gradients.append(gradient)
    for name, whole in gradients[0].items():
        torch.testing.assert_close(whole, gradients[1][name], rtol=1e-6, atol=1e-12)
    first, second = read_records(run.folder / "metrics.jsonl")
    for name in ("loss", "kl", "nmse", "sparsity", "top1_error"):
        assert first[name] == pytest.approx(second[name], rel=1e-6)
    assert first["l0_per_layer"] == second["l0_per_layer"]
    assert first["l0"] == second["l0"] == pytest.approx(np.mean(first["l0_per_layer"]))
    assert second["tokens"] == 2 * first["tokens"]


def test_dead_features_are_counted_in_tokens(make_run: Callable[..., TrainingRun]) -> None:
    """A feature that cannot fire is dead after the window; features that fire are not."""
    run = make_run(**{"run.dead_window": 60})
    adapter: Any = run.model.adapters[0]
    with torch.no_grad():
        adapter.b_enc[5] = -1e6
    tokens = 0
    for _ in range(4):
        tokens += sum(run.feed.batch(run.feed.train, ids)[1] for ids in _batches(run))
        run.advance()
        assert run.dead.since_LF[0, 5] == tokens
    records = read_records(run.folder / "metrics.jsonl")
    dead = [record["dead_per_layer"][0] for record in records]
    assert dead[0] == 0
    assert dead[-1] >= 1
    fired = run.dead.since_LF == 0
    assert fired.any()
    assert not fired[0, 5]


def _batches(run: loop.TrainingRun) -> list[list[int]]:
    return run.feed.micro_batches(run.step)


def test_the_running_threshold_follows_the_smallest_activation(
    make_run: Callable[..., TrainingRun],
) -> None:
    run = make_run(**{"adapter.activation": "batch_topk", "adapter.k": 2})
    adapters: Any = run.model.adapters
    assert [a.threshold.item() for a in adapters] == [0, 0]
    run.advance()
    assert all(a.threshold.item() > 0 for a in adapters)


@pytest.mark.parametrize("follows", [True, False])
def test_the_running_threshold_gives_the_l0_of_training(
    make_run: Callable[..., TrainingRun], follows: bool
) -> None:
    """A short run's threshold is that of its last steps; an average over 1000 steps is not."""
    k = 2.0
    run = make_run(
        **{"adapter.activation": "batch_topk", "adapter.k": k, "objective.sparsity": 0.0},
        **{"optimizer.epochs": 5, "optimizer.lr": 5e-2},
    )
    if not follows:
        run.threshold_decay = 0.999
    while run.step < run.steps:
        run.advance()
    l0 = evaluate(run.model, run.feed.held_out_batches())["l0_mean"]
    assert (abs(l0 / k - 1) < 0.1) is follows


# --- batches that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_bad_batch_changes_nothing(
    make_run: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    run = make_run()
    run.advance()
    before = state_of(run)
    ids = run.feed.rows(run.feed.micro_batches(run.step)[0])
    planted(monkeypatch, {1}, factor)
    run.advance()
    assert all(torch.equal(t, before[name]) for name, t in state_of(run).items())
    assert (run.step, run.bad_in_row, run.bad_total) == (2, 1, 1)
    record = read_records(run.folder / "metrics.jsonl")[-1]
    assert record["kind"] == "bad_batch"
    assert record["step"] == 2
    assert record["ids"] == ids
    assert record["reason"] == "loss is not finite"
    run.advance()
    assert run.bad_in_row == 0
    assert not torch.equal(state_of(run)["weights/0.W_enc"], before["weights/0.W_enc"])


def test_a_bad_gradient_changes_nothing(make_run: Callable[..., TrainingRun]) -> None:
    run = make_run(**{"optimizer.accumulation": 2, "pair.dtype": "bfloat16"})
    run.advance()
    before = state_of(run)
    working = {n: p.detach().clone() for n, p in run.optimizer.parameters.items()}
    ids = run.feed.rows([i for ids in run.feed.micro_batches(run.step) for i in ids])
    adapter: Any = run.model.adapters[1]
    hook = adapter.W_enc.register_hook(lambda grad: grad * math.nan)
    run.advance()
    hook.remove()
    assert all(torch.equal(t, before[name]) for name, t in state_of(run).items())
    assert all(torch.equal(p, working[n]) for n, p in run.optimizer.parameters.items())
    record = read_records(run.folder / "metrics.jsonl")[-1]
    assert (record["reason"], record["ids"]) == ("gradient is not finite", ids)


def test_only_the_culprit_of_several_micro_batches_is_named(
    make_run: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(**{"optimizer.accumulation": 3})
    expected = run.feed.rows(run.feed.micro_batches(0)[1])
    planted(monkeypatch, {2})
    run.advance()
    assert read_records(run.folder / "metrics.jsonl")[-1]["ids"] == expected


def test_too_many_bad_batches_end_the_run(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(**{"run.max_bad_batches": 3})
    planted(monkeypatch, {2, 3, 6, 7, 8})
    with pytest.raises(RunError, match=r"step 8: 3 batches in a row.*max_bad_batches=3.*rows \["):
        train(config)
    checkpoint, _ = load_latest(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 6
    assert (checkpoint.scalars["bad_in_row"], checkpoint.scalars["bad_total"]) == (1, 3)
    assert checkpoint.scalars["updates"] == 3
    summary = train(config, resume=True)  # later calls have no planted loss
    assert (summary["bad_batches"], summary["interrupted"]) == (3, False)


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, number: signal.Signals
) -> None:
    def sink(record: dict) -> None:
        if (record["kind"], record["step"]) == ("train", 4):
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    summary = train(tiny_config(), sinks=[sink])
    assert signal.getsignal(number) is before
    assert summary["interrupted"]
    assert summary["signal"] == number.name
    assert (summary["step"], summary["steps"]) == (4, 12)
    assert Path(summary["checkpoint"]) == tmp_path / "run" / "checkpoints" / "step-00000004"
    assert not (tmp_path / "run" / "adapter").exists()
    checkpoint, _ = load_latest(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 4


def test_a_signal_at_a_step_that_is_saved_anyway(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    def sink(record: dict) -> None:
        if (record["kind"], record["step"]) == ("train", 6):
            os.kill(os.getpid(), signal.SIGTERM)

    summary = train(tiny_config(), sinks=[sink])
    assert summary["step"] == 6
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "checkpoint"] == [3, 6]


def test_a_signal_right_after_a_resume_past_a_damaged_checkpoint(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    def sink(record: dict) -> None:
        if (record["kind"], record["step"]) == ("train", 6):
            os.kill(os.getpid(), signal.SIGTERM)

    train(tiny_config(), sinks=[sink])
    saved = tmp_path / "run" / "checkpoints" / "step-00000006"
    next(saved.glob("*.safetensors")).write_bytes(b"damaged")
    stop = threading.Event()
    stop.set()
    summary = train(tiny_config(), resume=True, stop=stop)
    assert (summary["interrupted"], summary["step"]) == (True, 3)
    assert Path(summary["checkpoint"]).name == "step-00000003"
    assert not train(tiny_config(), resume=True)["interrupted"]


def test_the_second_interrupt_interrupts() -> None:
    # SIGINT is ignored in background processes of a shell; restore the default for this test.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop_on_signals(None) as (stopping, caught):
            os.kill(os.getpid(), signal.SIGINT)
            assert stopping.is_set()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert caught == ["SIGINT"]
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_only_the_event_stops_a_run(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    stop, result = threading.Event(), []
    stop.set()
    thread = threading.Thread(target=lambda: result.append(train(tiny_config(), stop=stop)))
    thread.start()
    thread.join()
    assert result[0]["interrupted"]
    assert result[0]["step"] == 0
    assert result[0]["signal"] is None
    assert not train(tiny_config(), resume=True)["interrupted"]


# --- disk and memory ------------------------------------------------------------------------------


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_intact(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = checkpoint_module.save_tensors, iter(range(1000))

    def save_tensors(*args: Any) -> None:
        if next(calls) >= 7:  # a checkpoint has five files
            raise OSError(28, "No space left on device")
        real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_module, "save_tensors", save_tensors)
        with pytest.raises(RunError, match=r"step 6.*No space left.*step 3\..*MiB are fr"):
            train(tiny_config())
    assert train(tiny_config(), resume=True)["steps"] == 12


@pytest.mark.quick("error1")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_would_help(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def objective(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(loop, "objective", objective)
    with pytest.raises(RunError) as caught:
        train(tiny_config())
    message = str(caught.value)
    assert "out of memory" in message
    assert "The planned peak is" in message
    assert "of host memory are free" in message
    for key in ("data.max_tokens (10000)", "optimizer.batch_size (2", "adapter.n_features (48)"):
        assert key in message
    assert "set pair.dtype to bfloat16" in message
    assert "objective.checkpoint" not in message  # it is already full
    assert "--resume" not in message  # no remedy left that a resumed run may take


def test_out_of_memory_sends_to_resume_only_with_settings_that_resume_accepts(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 2))
    config = tiny_config(**{"objective.checkpoint": "attention"})
    for ranks, expected in (
        (Ranks(), {"objective.checkpoint", "pair.offload"}),
        (Ranks(0, 2), {"objective.checkpoint"}),
    ):
        with pytest.raises(RunError) as caught, out_of_memory_explained(config, ranks):
            raise MemoryError
        resumed, anew = str(caught.value).split("--overwrite")
        named = set(re.findall(r"--([a-z]+\.[a-z_]+) ", resumed))
        assert named == expected <= FREE_ON_RESUME
        assert not {*re.findall(r"[a-z]+\.[a-z_]+", anew)} & FREE_ON_RESUME


def test_the_plan_after_out_of_memory_is_that_of_the_ranks(
    tiny_config: Callable[..., TrainConfig],
) -> None:
    config = tiny_config(**{"optimizer.accumulation": 4})
    with pytest.raises(RunError) as caught, out_of_memory_explained(config, Ranks(0, 4)):
        raise MemoryError
    planned = plan(config, gpus=4)
    assert planned.largest(4) != plan(config).largest(4)
    need = f"{gb(planned.peak_bytes)}: {planned.largest(4)}."
    assert f"The planned peak of each of 4 devices is {need}" in str(caught.value)


def test_the_plan_after_out_of_memory_needs_no_memory_of_the_device(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured_rate(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 MiB.")

    monkeypatch.setattr("fastadapt.training.planning.devices.measured_rate", measured_rate)
    with (
        pytest.raises(RunError, match="The planned peak is"),
        out_of_memory_explained(tiny_config(), Ranks()),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 72.00 MiB.")


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    tiny_config: Callable[..., TrainConfig],
) -> None:
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        out_of_memory_explained(tiny_config(), Ranks()),
    ):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

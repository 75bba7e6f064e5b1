"""The resource estimate: exact for weights, an upper bound of a measured step."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadapt.cli.train import _print_plan, find_config, preset_names, read_yaml
from fastadapt.errors import UserError
from fastadapt.models.recompute import POLICIES
from fastadapt.training import trainer
from fastadapt.training.config import TrainConfig, from_dict
from fastadapt.training.optimizer import AdapterOptimizer
from fastadapt.training.planning import estimate
from fastadapt.training.planning.estimate import (
    RecomputeEstimate,
    count_steps,
    expected_l0,
    gb,
    plan,
)
from fastadapt.training.planning.memory import step_memory


def n_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(
    ("dtype", "masters"),
    [
        ("bfloat16", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("bfloat16", False), ("float32", True), ("float32", False)]
        ),
    ],
)
def test_weights_and_moments_are_counted_to_the_byte(
    tiny_config: Callable[..., TrainConfig], dtype: str, masters: bool
) -> None:
    config = tiny_config(**{"pair.dtype": dtype, "optimizer.masters": masters})
    planned = plan(config)
    model, feed = trainer.load_model_and_data(config)
    optimizer = AdapterOptimizer(dict(model.adapters.named_parameters()), config.optimizer)
    owned = {id(p) for p in model.adapters.parameters()}
    mlps = {id(p) for mlp in model.mlps for p in mlp.base.parameters()}
    frozen = [p for p in model.parameters() if id(p) not in owned | mlps]
    groups = optimizer.tensors()
    apart = [m for n, m in optimizer.masters.items() if m is not optimizer.parameters[n]]
    assert planned.parts["frozen target"] == n_bytes(frozen)
    base = [p for p in model.parameters() if id(p) in mlps]
    assert planned.parts["frozen base MLPs"] == n_bytes(base)
    assert planned.parts["adapters"] == n_bytes(model.adapters.parameters())
    assert planned.parts.get("fp32 masters", 0) == n_bytes(apart)
    moments = [*groups["exp_avg"].values(), *groups["exp_avg_sq"].values()]
    assert planned.parts["moments"] == n_bytes(moments)
    assert planned.parameters == sum(p.numel() for p in model.adapters.parameters())
    assert (planned.steps, planned.tokens) == (feed.steps, 361)
    longest = max(feed.train.counts.longest, feed.held_out.counts.longest)
    assert planned.tokens_per_sequence == longest


@pytest.mark.slow
def test_saved_for_the_backward_pass(tiny_config: Callable[..., TrainConfig]) -> None:
    """The planned saved tensors bound those that torch's hooks see in a forward pass."""
    from fastadapt.objective import objective

    config = tiny_config(**{"optimizer.batch_size": 1, "adapter.n_features": 512})
    model, feed = trainer.load_model_and_data(config)
    longest = max(range(len(feed.train)), key=lambda i: len(feed.train[i].input_ids))
    batch, tokens = feed.batch(feed.train, [longest])
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = objective(model, batch, 1, config.objective)
    permanent = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved_bytes = sum(
        tensor.untyped_storage().nbytes()
        for pointer, tensor in saved.items()
        if pointer not in permanent
    )
    memory = step_memory(config, model.model.config, tokens, "cpu")
    planned = memory.parts["saved for backward"]
    small = 64 * tokens + 8 * 2 * 512 * 4  # masks, weights and norms of features
    assert out.loss.isfinite()
    assert 0.5 * planned < saved_bytes <= planned + small


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter.n_features", 96),
        *(
            pytest.param(*change, marks=pytest.mark.slow)
            for change in [
                ("optimizer.batch_size", 4),
                ("objective.checkpoint", "none"),
                ("objective.kl_chunk_tokens", 4096),
                ("adapter.implementation", "reference"),
                ("pair.dtype", "float64"),
            ]
        ),
    ],
)
def test_larger_settings_need_more(
    tiny_config: Callable[..., TrainConfig], key: str, value: object
) -> None:
    small = {"objective.kl_chunk_tokens": 8}
    if key == "adapter.implementation":  # with fewer features, buffers for codes hold every entry
        small["adapter.n_features"] = 16_384
    before = plan(tiny_config(**small))
    after = plan(tiny_config(**{**small, key: value}))
    if key == "objective.kl_chunk_tokens":
        assert after.parts["logits of a chunk"] > before.parts["logits of a chunk"]
        assert after.phases["head"] > before.phases["head"]
    else:
        assert after.peak_bytes > before.peak_bytes


@pytest.mark.slow
def test_without_the_data_the_limit_is_planned(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config(**{"data.train": "someone/dataset", "data.max_tokens": 500})
    planned = plan(config)
    assert (planned.steps, planned.tokens, planned.tokens_per_sequence) == (25_000, None, 500)
    config = tiny_config(**{"data.train": "someone/dataset", "optimizer.max_steps": 7})
    assert plan(config).steps == 7


def test_steps(tiny_config: Callable[..., TrainConfig]) -> None:
    for changes, batches, expected in (
        ({}, 12, 12),
        ({"optimizer.epochs": 2}, 12, 24),
        ({"optimizer.accumulation": 5}, 12, 3),
        ({"optimizer.accumulation": 5, "optimizer.epochs": 2}, 12, 5),
        ({"optimizer.max_steps": 4}, 12, 4),
        ({"optimizer.max_steps": 99}, 12, 12),
    ):
        assert count_steps(batches, tiny_config(**changes)) == expected


def test_sizes_as_text(tiny_config: Callable[..., TrainConfig]) -> None:
    planned = plan(tiny_config())
    assert planned.peak_bytes == planned.phases[planned.peak_phase or ""]
    assert planned.largest(2).count("MB") == 2
    assert gb(3 * 10**9) == "3.00 GB"
    assert gb(5 * 10**6) == "5.0 MB"


def test_the_peak_is_the_largest_number_of_the_plan(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    planned = plan(tiny_config())
    counts = dict.fromkeys(POLICIES, 1.0)
    for change, phase in ((-1, f" in {planned.peak_phase},"), (10**9, "")):
        row = RecomputeEstimate(9, counts, planned.peak_bytes + change)
        changed = dataclasses.replace(planned, recompute=[row])
        largest = max(*changed.phases.values(), row.peak_bytes)
        assert changed.peak_bytes == largest
        assert (changed.peak_phase is None) == (phase == "")
        monkeypatch.setattr(estimate, "plan", lambda *_, changed=changed: changed)
        _print_plan(tiny_config(), None, 1, as_json=False)
        assert f"Peak: {gb(largest)},{phase} for sequences of up to" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted({*preset_names()} - {"gated", "organism"}))
def test_presets_are_planned_from_shipped_configurations(preset: str) -> None:
    """An 80 GB GPU holds the 7B pair, with fp32 masters too, but not the 32B pair."""
    planned = plan(from_dict(read_yaml(find_config(preset))), gpu="h100")
    assert planned.tokens_per_sequence == 10_000
    assert planned.steps == (6250 if preset == "qwq-32b" else 50_000)
    assert planned.fits == (preset != "qwq-32b") == (planned.peak_bytes <= 76e9)


@pytest.mark.slow
def test_eight_gpus_share_a_run_that_one_cannot_hold() -> None:
    config = from_dict(read_yaml(find_config("qwq-32b")))
    one, two, eight = (plan(config, gpu="h200", gpus=n) for n in (1, 2, 8))
    assert eight.fits
    assert plan(config, gpu="h100", gpus=8).fits
    assert not plan(config, gpu="h100", gpus=4).fits
    assert one.peak_bytes > two.peak_bytes > eight.peak_bytes
    # Blocks, moments and masters are sharded.
    shared = ("frozen base MLPs", "fp32 masters", "moments")
    for name in shared:
        assert eight.parts[name] == pytest.approx(one.parts[name] / 8, rel=1e-6)
    assert eight.parts["frozen target"] > one.parts["frozen target"] / 8
    with pytest.raises(UserError, match=r"--gpus: .* expected 1 or a divisor of 8, got 3"):
        plan(config, gpu="h100", gpus=3)


def test_a_missing_model_is_refused(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="nowhere"):
        plan(tiny_config(**{"pair.base": str(tmp_path / "nowhere")}))


def test_float16_is_refused_where_a_run_would_start(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """The configuration itself remains valid, so that old runs can be read."""
    config = tiny_config(**{"pair.dtype": "float16"})
    for start in (plan, trainer.train):
        with pytest.raises(UserError, match=r"pair\.dtype: .* for training, got float16"):
            start(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_measured_step_of_a_7b_models_width(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 layers, d=3584, inner width 18,944, V=152,064, F=8192, T=1,024, on the CPU in fp32."""
    program = Path(__file__).with_name("full_width.py")
    # Return freed tensors of 1 MiB and more to the system at once, so that resident memory counts
    # living tensors only: by default malloc caches blocks of up to 32 MiB.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=1800,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout)
    assert outcome["record"]["kind"] == "train"
    for name in ("loss", "kl", "nmse", "sparsity", "grad_norm"):
        assert isinstance(outcome["record"][name], float), name  # null where not finite
    assert len(outcome["parameters"]) == 8
    assert outcome["with_gradient"] == outcome["parameters"]
    assert outcome["moved"] == outcome["parameters"]
    used = outcome["peak"] - outcome["before"]  # without the interpreter and libraries
    with capsys.disabled():
        print(
            f" planned {gb(outcome['planned'])}, used {gb(used)}, {outcome['step_s']:.0f} s a step "
        )
    assert used <= outcome["planned"]
    assert used >= 0.8 * outcome["planned"]


def test_the_target_l0_is_what_a_plan_expects(tiny_config: Callable[..., TrainConfig]) -> None:
    changes: list[dict[str, object]] = [
        {"objective.l0": 2.5},
        {"adapter.activation": "topk", "adapter.k": 3},
        {},
        {"objective.sparsity": 0.0},
        {"run.trains": "mlp", "adapter.n_features": None, "objective.sparsity": 0.0},
    ]
    assert [expected_l0(tiny_config(**each)) for each in changes] == [2.5, 3.0, 10.0, 24.0, None]

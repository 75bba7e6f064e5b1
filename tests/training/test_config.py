"""Impossible values are refused with their key; YAML round-trips a configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastadapt.cli.train import PRESETS
from fastadapt.errors import UserError
from fastadapt.training.config import (
    TrainConfig,
    differences,
    from_dict,
    load_config,
    save_config,
    to_dict,
)

BAD: dict[str, list[tuple[Any, str]]] = {
    "optimizer.lr": [(-1e-3, "positive"), (0.0, "positive"), (math.nan, "positive"), ("fast", "")],
    "optimizer.betas": [([0.9], "tuple"), ([0.9, 1.0], r"\[0, 1\)"), ([-0.1, 0.9], r"\[0, 1\)")],
    "optimizer.eps": [(0.0, "positive")],
    "optimizer.weight_decay": [(-0.1, "0 or more")],
    "optimizer.clip": [(0.0, "positive"), (-1.0, "positive")],
    "optimizer.warmup": [(-0.1, r"\[0, 1\]"), (1.5, r"\[0, 1\]")],
    "optimizer.batch_size": [(0, "1 or more"), (1.5, "expected int")],
    "optimizer.accumulation": [(0, "1 or more")],
    "optimizer.epochs": [(0, "1 or more"), (True, "expected int")],
    "optimizer.max_steps": [(0, "1 or more, or null")],
    "run.output": [("  ", "a folder")],
    "run.seed": [(-1, r"\[0, 2\^63\)")],
    "run.log_every": [(0, "1 or more")],
    "run.eval_every": [(-1, "0 or more")],
    "run.checkpoint_every": [(0, "1 or more")],
    "run.keep_checkpoints": [(0, "1 or more")],
    "run.max_bad_batches": [(0, "1 or more")],
    "run.dead_window": [(0, "1 or more")],
    "run.threads": [(0, "1 or more, or null")],
    "adapter.activation": [("gelu", "relu, topk, batch_topk, jumprelu")],
    "adapter.n_features": [(0, "at least 1")],
    "adapter.k": [(4, "not used")],
    "objective.sparsity": [(-1.0, "")],
    "objective.first_cutoff": [(2, "0 or 1")],
    "objective.penalty": [("l0", "l1, tanh")],
    "objective.penalty_scale": [(4.0, "not used")],
    "objective.kl_chunk_tokens": [(0, "")],
    "data.max_tokens": [(1, "at least 2")],
    "data.max_validation": [(0, "at least 1")],
    "data.family": [("llama", "qwen")],
    "pair.dtype": [("int8", "bfloat16")],
}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [(key, value, expected) for key, cases in BAD.items() for value, expected in cases],
)
def test_impossible_values(
    tiny_config: Callable[..., TrainConfig], key: str, value: object, expected: str
) -> None:
    with pytest.raises(UserError, match=f"{key.replace('.', '[.]')}.*{expected}"):
        tiny_config(**{key: value})


def test_k_beyond_the_features(tiny_config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(UserError, match=r"adapter\.k"):
        from_dict({"activation": "topk", "k": 49, "n_features": 48}, _kind("adapter"), "adapter.")


def _kind(section: str) -> type:
    import typing

    return typing.get_type_hints(TrainConfig)[section]


def test_unknown_keys_name_the_nearest(tiny_config: Callable[..., TrainConfig]) -> None:
    values = to_dict(tiny_config())
    values["optimizer"]["learning_rate"] = values["optimizer"].pop("lr")
    values["optimizer"]["warm_up"] = 0.1
    with pytest.raises(UserError, match=r"unknown key optimizer\.learning_rate"):
        from_dict(values)
    del values["optimizer"]["learning_rate"]
    with pytest.raises(
        UserError, match=r"unknown key optimizer\.warm_up; did you mean optimizer\.warmup\?"
    ):
        from_dict(values)


def test_missing_and_mistyped_sections(tiny_config: Callable[..., TrainConfig]) -> None:
    values = to_dict(tiny_config())
    del values["pair"]["target"]
    with pytest.raises(UserError, match=r"pair\.target is missing"):
        from_dict(values)
    with pytest.raises(UserError, match="optimizer: expected a mapping, got 3"):
        from_dict({**to_dict(tiny_config()), "optimizer": 3})


def test_yaml_round_trip(tiny_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = tiny_config(**{"optimizer.max_steps": 7, "run.threads": 1, "optimizer.lr": 3e-4})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    written = (tmp_path / "config.yaml").read_text()
    for section in dataclasses.fields(config):
        for field in dataclasses.fields(getattr(config, section.name)):
            assert f"  {field.name}:" in written


def test_yaml_numbers_without_a_point(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    save_config(tiny_config(), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("lr: 0.01", "lr: 8e-4"))
    assert load_config(tmp_path / "config.yaml").optimizer.lr == 8e-4


def test_unreadable_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml is missing"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("pair: [")
    with pytest.raises(UserError, match=r"bad\.yaml is not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match=r"configuration: expected a mapping, got \[1\]"):
        load_config(tmp_path / "list.yaml")


def test_keys_that_may_differ_on_resumption(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config()
    harmless = tiny_config(
        **{"run.output": "elsewhere", "run.eval_every": 1, "run.checkpoint_every": 9}
    )
    assert differences(harmless, config) == {}
    assert differences(tiny_config(**{"optimizer.lr": 0.5, "run.seed": 1}), config) == {
        "optimizer.lr": (0.5, 1e-2),
        "run.seed": (1, 42),
    }


def test_the_released_precision_is_three_settings() -> None:
    """They are bfloat16 parameters and moments, no masters, and KL of bfloat16 logits."""
    config = load_config(PRESETS / "r1-distill-qwen-7b.yaml")
    assert config.pair.dtype == "bfloat16"
    assert config.optimizer.masters is False
    assert config.objective.logits_dtype == "bfloat16"
    assert (config.objective.bridge, config.objective.first_cutoff) == (2, 0)
    assert (config.optimizer.weight_decay, config.optimizer.clip) == (0, 1)


@pytest.mark.parametrize("trains", ["transcoder", "mlp", "norms"])
def test_the_older_key_adapter_kind_is_read(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, trains: str
) -> None:
    baseline = {"run.trains": trains, "adapter.n_features": None, "objective.sparsity": 0.0}
    config = tiny_config(**baseline if trains != "transcoder" else {})
    values = to_dict(config)
    values["adapter"]["kind"] = values["run"].pop("trains")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert load_config(tmp_path / "config.yaml") == config
    values["run"]["trains"] = "mlp" if trains == "norms" else "norms"
    with pytest.raises(UserError, match=r"adapter\.kind: expected run\.trains, "):
        from_dict(values)

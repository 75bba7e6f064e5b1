"""Damaged documents of a run and of a pair: config.yaml, metrics, summary, config.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from damage import Damage, command, document, raw, sweep, thinned, variants

from fastadapt.models.huggingface.checkpoint import lazy_tensors
from fastadapt.models.pair import ModelPair, PairConfig
from fastadapt.training.config import TRUST, load_config, save_config
from fastadapt.training.report import write_report
from fastadapt.training.run_dir import read_records


def _number(value: Any) -> Any:
    """Convert a string to a float if YAML 1.1 reads the float as a string, as for 1e-08."""
    return float(value) if isinstance(value, str) and "e-" in value else value


def reads_back(damage: Damage, config: Any) -> bool:
    """Return whether the configuration has the values of the document and defaults elsewhere."""
    from fastadapt.training.config import to_dict

    written, read = yaml.safe_load(damage.content or b""), to_dict(config)
    assert read["pair"][TRUST] is False  # the file only records this value
    return all(
        key == TRUST
        or read[section][key] in (value, _number(value))
        or (key, value) == ("n_features", None)  # the default
        for section, values in written.items()
        for key, value in (values or {}).items()
    )


def test_the_configuration_of_a_run(tiny_config: Callable, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_config(tiny_config(), path)
    sweep(path, variants(path), lambda: load_config(path), reads_back)


@pytest.mark.slow
def test_a_file_of_options(tiny_config: Callable, tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    save_config(tiny_config(), path)
    # Options override the file, so that messages name the key of a value but not the file.
    cases = [d for d in variants(path) if not d.key] + list(raw(path.read_bytes(), 5, 1))
    sweep(
        path,
        thinned(cases, 20),
        command("train", path, "--print_config"),
        lambda damage, _: damage.name.startswith(("cut", "bit flip")),
        (path.name, "key", "expected", "missing", "must be"),
    )


RECORDS: list[dict[str, Any]] = [
    {"kind": "start", "step": 0, "steps": 3, "n_layers": 2, "adapter_kind": "transcoder"},
    {"kind": "train", "step": 1, "loss": 1.5, "kl": 0.5, "l0_per_layer": [1.0, 2.0], "lr": 1e-3,
     "dead_per_layer": [0, 1], "tokens": 100, "grad_norm": 1.0, "tokens_per_s": 5.0},
    {"kind": "eval", "step": 3, "kl_adapter": 0.1, "kl_hybrid": 0.4, "nmse_per_layer": [0.1, 0.2],
     "l0_mean": 1.5, "l0_per_layer": [1.0, 2.0], "top1_error_adapter": 0.2},
]  # fmt: skip


@pytest.mark.quick("train")
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["kind"])
def test_a_record_of_the_metrics(record: dict[str, Any], tmp_path: Path) -> None:
    path, content = tmp_path / "metrics.jsonl", json.dumps(record).encode()
    path.write_bytes(content)

    def read() -> None:
        read_records(path)
        write_report(tmp_path)

    cases = thinned([*document(content), *raw(content)], 25)
    sweep(path, cases, read, lambda *_: True)


def test_a_summary(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({**RECORDS[1], **RECORDS[2], "steps": 3, "wall_s": 2.0}))
    sweep(path, thinned(variants(path), 40), lambda: write_report(tmp_path), lambda *_: True)


@pytest.fixture
def pair(tiny_pair: Path, tmp_path: Path) -> PairConfig:
    for role in ("target", "base"):
        shutil.copytree(tiny_pair / role, tmp_path / role)
    return PairConfig(str(tmp_path / "target"), str(tmp_path / "base"), device="cpu")


@pytest.mark.quick("tokenizer.json")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_file_of_the_target(pair: PairConfig, name: str) -> None:
    path = Path(pair.target, name)
    # transformers checks the keys that determine no size. Its errors name the model.
    cases = thinned(variants(path), 40)
    sweep(path, cases, lambda: ModelPair.load(pair), lambda *_: True, (name, pair.target, "pair"))


def test_an_index_of_shards(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"x": 1}, "weight_map": {"a": "one.safetensors"}}))

    def valid(damage: Damage, _: Any) -> bool:
        return damage.name.startswith(("bit flip", "metadata"))

    read = partial(lazy_tensors, str(tmp_path), None, "target")
    sweep(path, variants(path), read, valid, (path.name, "shard"))

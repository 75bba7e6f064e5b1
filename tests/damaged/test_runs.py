"""A run's own documents and a pair's files, damaged: config.yaml, metrics, summary, config.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from damage import Damage, command, ends_well, raw, thinned, variants

from fastadapt.models.hf_checkpoint import lazy_tensors
from fastadapt.models.pair import ModelPair, PairConfig
from fastadapt.training.config import TRUST, load_config, save_config
from fastadapt.training.report import write_report
from fastadapt.training.run_dir import read_records


def sweep(
    path: Path,
    call: Callable[[], Any],
    valid: Callable,
    names: tuple[str, ...] = (),
    most: int = 10_000,
) -> int:
    """Variants of a file through ``call``; returns how many there were.

    ``most`` is about how many of them are tried in quick tests.
    """
    content, wrong = path.read_bytes(), []
    cases = thinned(variants(path), most)
    for damage in cases:
        damage.apply(path)
        said = ends_well(call, damage, path, valid=valid, names=names)
        wrong += [said] if said else []
        if path.is_dir():
            path.rmdir()
    path.write_bytes(content)
    print(f"{len(cases)} damaged variants of {path.name}")
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)
    return len(cases)


def _number(value: Any) -> Any:
    """A float that YAML 1.1 takes for a string, such as 1e-08."""
    return float(value) if isinstance(value, str) and "e-" in value else value


def reads_back(damage: Damage, config: Any) -> bool:
    """Whether what was accepted is what the document says, defaults aside."""
    from fastadapt.training.config import to_dict

    given, held = yaml.safe_load(damage.content or b""), to_dict(config)
    assert held["pair"][TRUST] is False  # a record alone: no file is trusted
    return all(
        key == TRUST
        or held[section][key] in (value, _number(value))
        or (key, value) == ("n_features", None)  # the default
        for section, values in given.items()
        for key, value in (values or {}).items()
    )


def test_the_configuration_of_a_run(tiny_config: Callable, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_config(tiny_config(), path)
    sweep(path, lambda: load_config(path), reads_back, most=100)


def test_a_file_of_options(tiny_config: Callable, tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    save_config(tiny_config(), path)
    # What is typed goes over the file, so a value is named by its key alone.
    cases = [d for d in variants(path) if not d.key] + list(raw(path.read_bytes(), 5, 1))
    cases = thinned(cases, 20)
    wrong = []
    for damage in cases:
        damage.apply(path)
        said = ends_well(
            command("train", path, "--print_config"),
            damage,
            path,
            valid=lambda damage, _: damage.name.startswith(("cut", "bit flip")),
            names=(path.name, "key", "expected", "missing", "must be"),
        )
        wrong += [said] if said else []
        if path.is_dir():
            path.rmdir()
    assert not wrong, "\n".join(wrong)


RECORDS: list[dict[str, Any]] = [
    {"kind": "start", "step": 0, "steps": 3, "n_layers": 2, "adapter_kind": "transcoder"},
    {"kind": "train", "step": 1, "loss": 1.5, "kl": 0.5, "l0_per_layer": [1.0, 2.0], "lr": 1e-3,
     "dead_per_layer": [0, 1], "tokens": 100, "grad_norm": 1.0, "tokens_per_s": 5.0},
    {"kind": "eval", "step": 3, "kl_adapter": 0.1, "kl_hybrid": 0.4, "nmse_per_layer": [0.1, 0.2],
     "l0_mean": 1.5, "l0_per_layer": [1.0, 2.0], "top1_error_adapter": 0.2},
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["kind"])
def test_a_record_of_the_metrics(record: dict[str, Any], tmp_path: Path) -> None:
    from damage import document

    path, wrong = tmp_path / "metrics.jsonl", []
    cases = list(document(json.dumps(record).encode())) + list(raw(json.dumps(record).encode()))
    for damage in cases:
        damage.apply(path)

        def read() -> None:
            read_records(path)
            write_report(tmp_path)

        said = ends_well(read, damage, path, valid=lambda *_: True)
        wrong += [said] if said else []
        if path.is_dir():
            path.rmdir()
    print(f"{len(cases)} damaged records")
    assert not wrong, "\n".join(wrong)


def test_a_summary(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({**RECORDS[1], **RECORDS[2], "steps": 3, "wall_s": 2.0}))
    sweep(path, lambda: write_report(tmp_path), lambda *_: True)


@pytest.fixture
def pair(tiny_pair: Path, tmp_path: Path) -> PairConfig:
    for role in ("target", "base"):
        shutil.copytree(tiny_pair / role, tmp_path / role)
    return PairConfig(str(tmp_path / "target"), str(tmp_path / "base"), device="cpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_file_of_the_target(pair: PairConfig, name: str) -> None:
    path = Path(pair.target, name)
    # transformers judges keys that no size follows from; an error names the model.
    sweep(path, lambda: ModelPair.load(pair), lambda *_: True, (name, pair.target, "pair"), 40)


def test_an_index_of_shards(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"x": 1}, "weight_map": {"a": "one.safetensors"}}))

    def valid(damage: Damage, _: Any) -> bool:
        return damage.name.startswith(("bit flip", "metadata"))

    sweep(path, lambda: lazy_tensors(str(tmp_path), None, "target"), valid, (path.name, "shard"))

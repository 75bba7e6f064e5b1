"""Runs, checkpoints, adapters, stores and results of earlier commits are resumed and read."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadapt.data.prepare.output_folder import read_manifest
from fastadapt.evaluation.difference.result import read_result
from fastadapt.evaluation.folder import read_part
from fastadapt.features.autointerp.judgements import read_judgements
from fastadapt.features.store.sets import load_set
from fastadapt.features.store.store import Store
from fastadapt.graphs.files import read_graph
from fastadapt.models.huggingface.checkpoint import export_kind
from fastadapt.models.trained_files import load_adapters

OLD = Path(__file__).parent / "old_files"
RESULTS = OLD / "results"
#: Fields of a record that depend on the machine's speed.
TIMES = {"wall_s", "tokens_per_s"}


def records(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the records of ``metrics.jsonl`` by kind and step, without times."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    parsed = [json.loads(line) for line in lines]
    return {
        (record["kind"], record["step"]): {k: v for k, v in record.items() if k not in TIMES}
        for record in parsed
    }


def is_close(value: Any, expected: Any) -> bool:
    """Compare recorded values; another machine's sums differ in their last bits."""
    if isinstance(expected, float):
        return math.isclose(value, expected, rel_tol=1e-3, abs_tol=1e-6)
    if isinstance(expected, list):
        return len(value) == len(expected) and all(map(is_close, value, expected))
    if isinstance(expected, dict):
        return value.keys() == expected.keys() and all(
            is_close(value[key], expected[key]) for key in expected
        )
    return bool(value == expected)


def test_a_killed_run_resumes_to_the_recorded_metrics(
    fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    shutil.copytree(OLD / "killed", run)
    outcome = fastadapt("train", run / "config.yaml", "--run.output", run, "--resume")
    assert outcome.code == 0, outcome.err
    resumed, recorded = records(run), records(OLD / "finished")
    assert resumed.pop(("resume", 4))
    assert resumed.keys() == recorded.keys()
    for key, record in recorded.items():
        assert is_close(resumed[key], record), key
    adapters, expected = (load_adapters(r / "adapter")[0] for r in (run, OLD / "finished"))
    for adapter, other in zip(adapters, expected, strict=True):
        for name, weight in adapter.state_dict().items():
            torch.testing.assert_close(weight, other.state_dict()[name], rtol=1e-2, atol=1e-4)


def test_a_finished_run_is_read(fastadapt: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(OLD / "finished", run)
    assert fastadapt("features", "check", run).code == 0
    store = Store.open(run)
    assert store.read("features").num_rows == 4 * 16
    assert sum(store.read("features")["count"].to_pylist()) > 0
    outcome = fastadapt("export", run, "--output", tmp_path / "served")
    assert outcome.code == 0, outcome.err


@pytest.fixture
def old_store(tmp_path: Path) -> Store:
    """Return a copy of the old store, with a set and judgements of its features."""
    folder = tmp_path / "run"
    shutil.copytree(OLD / "finished", folder)
    (folder / "features/sets").mkdir()
    shutil.copyfile(RESULTS / "set.json", folder / "features/sets/mine.json")
    shutil.copyfile(RESULTS / "judgements.json", folder / "features/judgements.json")
    return Store.open(folder)


def read_evaluation(store: Store) -> dict[str, Any]:
    result = json.loads((RESULTS / "eval.json").read_text(encoding="utf-8"))
    about = ("schema_version", "pair", "fingerprints", "settings")
    return read_part(RESULTS, "outputs", {name: result[name] for name in about})


#: Readers of a document, what they find in it, and what must be in it.
DOCUMENTS: dict[str, tuple[Callable[[Store], Any], Any]] = {
    "set.json": (lambda s: load_set(s, "mine").features, ((0, 1), (2, 3))),
    "judgements.json": (lambda s: list(read_judgements(s)["judges"]), ["tokens"]),
    "eval.json": (lambda s: set(read_evaluation(s)), {"faithfulness", "order", "texts"}),
    "where.json": (lambda _: read_result(RESULTS / "where.json")["schema_version"], 1),
    "graph.json": (lambda _: read_graph(RESULTS / "graph.json")["tokens"], [" tom", " has"]),
    "fastadapt-export.json": (lambda _: export_kind(RESULTS), "set of coders"),
    "data": (lambda _: (read_manifest(RESULTS / "data") or {})["settings"]["train"], 12),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_result_is_read(name: str, old_store: Store) -> None:
    read, expected = DOCUMENTS[name]
    assert read(old_store) == expected


def test_every_result_has_a_reader() -> None:
    assert {path.name for path in RESULTS.iterdir()} == DOCUMENTS.keys()


def test_an_old_data_folder_is_inspected(fastadapt: Callable[..., Any]) -> None:
    outcome = fastadapt("data", "inspect", RESULTS / "data", "--pair", "organism")
    assert outcome.code == 0, outcome.err
    assert "12" in outcome.out


@pytest.mark.parametrize("name", ["finished", "killed", "results"])
def test_old_files_hold_no_path_of_the_machine(name: str) -> None:
    for path in (OLD / name).rglob("*.json*"):
        assert "/tmp" not in path.read_text(encoding="utf-8")

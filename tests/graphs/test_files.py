"""Graphs are read as they were written; damaged files are refused with the reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from organism_runs import make_run

from fastadapt.errors import UserError
from fastadapt.graphs.evidence import EvidenceConfig
from fastadapt.graphs.explain import Question, explain
from fastadapt.graphs.files import read_graph, write_graph
from fastadapt.graphs.graph import GraphConfig

PROMPT = "tom has 3 apples"


@pytest.fixture(scope="module")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("graphs") / "run")


@pytest.fixture(scope="module")
def document(made_run: Path) -> Any:
    config, evidence = GraphConfig(nodes=5, top=8, rows=4), EvidenceConfig(ablations=5, copies=3)
    return explain(
        str(made_run), PROMPT, Question(token="4"), config, evidence, dtype="float64", device="cpu"
    )[1]


def test_a_graph_is_read_as_written(document: Any, tmp_path: Path) -> None:
    path = tmp_path / "graphs" / "a.json"
    write_graph(document, path)
    read = read_graph(path)
    assert read == json.loads(json.dumps(document))
    with pytest.raises(UserError, match=r"exists\. Replace it \(--overwrite\)"):
        write_graph(document, path)
    write_graph(document, path, overwrite=True)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is a folder; expected a file"):
            write_graph(document, path.parent, overwrite=overwrite)
    assert read_graph(path) == read

    assert len(read["rows"]) == 6
    for row in read["rows"]:
        total = sum(row["weights"]) + row["remainder"] + row["constant"]
        assert total == pytest.approx(row["value"], abs=1e-9 * row["size"])
        if row["node"] is not None:
            node = read["nodes"][row["node"]]
            assert node["kind"] == "feature"
            assert node["activation"] == pytest.approx(row["value"])
            assert row["name"] == f"feature {node['layer']}/{node['feature']}"
    row = read["rows"][0]
    assert row["name"] == "logit of ' 4'"
    stored = dict(zip(row["sources"], row["weights"], strict=True))
    assert read["heads"]
    for edge in read["heads"]:
        parts = edge["direct"] + sum(part for _, _, part in edge["heads"])
        assert parts == pytest.approx(stored[edge["node"]], rel=1e-6)
    assert sum(read["flow"][end] for end in ("tokens", "biases", "errors", "pruned")) == (
        pytest.approx(1)
    )
    for sample in read["evidence"]["samples"]:
        assert len(sample["effects"]) == len(sample["nodes"]) == 5
        assert {read["nodes"][i]["kind"] for i in sample["nodes"]} == {"feature"}


DAMAGE: dict[str, Callable[[Any], Any]] = {
    "schema_version is 2": lambda d: d.update(schema_version=2),
    "schema_version is None": lambda d: d.pop("schema_version"),
    r"rows\[0\]: expected nodes below": lambda d: d["rows"][0]["sources"].__setitem__(0, 10**6),
    r"rows\[0\]: sources and weights": lambda d: d["rows"][0]["weights"].pop(),
    r"rows\[1\]: expected the rows of targets": lambda d: d["rows"][1].update(node=None),
    r"nodes\[0\]: expected a position": lambda d: d["nodes"][0].update(position=99),
    "tokens and ids differ": lambda d: d["tokens"].pop(),
    r"nodes\[0\]\.kind: invalid enum value 'x'": lambda d: d["nodes"][0].update(kind="x"),
    r"rows\[0\]\.value: expected float, got str": lambda d: d["rows"][0].update(value="1"),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_damaged_files(reason: str, document: Any, tmp_path: Path) -> None:
    damaged = copy.deepcopy(document)
    DAMAGE[reason](damaged)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(damaged))
    with pytest.raises(UserError, match=reason):
        read_graph(path)


def test_a_cut_file(document: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document)[:1000])
    with pytest.raises(UserError, match="is not valid JSON"):
        read_graph(path)


def test_questions_without_an_answer(made_run: Path) -> None:
    none = EvidenceConfig(ablations=0)

    def ask(prompt: str = PROMPT, **question: Any) -> None:
        explain(str(made_run), prompt, Question(**question), GraphConfig(), none, device="cpu")

    with pytest.raises(UserError, match="expected one token of the vocabulary, got 'xyzzy'"):
        ask(token="xyzzy")
    with pytest.raises(UserError, match="--position: expected 0 to "):
        ask(token="4", position=99)
    with pytest.raises(UserError, match="which has no tokens"):
        ask("")
    with pytest.raises(UserError, match="the model's context, got"):
        ask("4 " * 5000)
    with pytest.raises(UserError, match="give --token too"):
        Question(against="4")
    with pytest.raises(UserError, match="expected at most one of --token, --feature, --direction"):
        Question(token="4", feature="0/1")
    with pytest.raises(UserError, match="expected float32 or float64, got bfloat16"):
        explain(str(made_run), PROMPT, Question(), GraphConfig(), none, dtype="bfloat16")

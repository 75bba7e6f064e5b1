"""Output and errors of `fastadapt graph export` and `fastadapt graph serve`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from documents import write_document
from synthetic import Size, write_synthetic

NAMES = [".lock", "first.json", "graph-metadata.json"]


def test_files_and_their_list(tmp_path: Path, fastadapt: Callable[..., Any]) -> None:
    file = write_document(tmp_path / "run" / "graphs" / "First.json")
    outcome = fastadapt("graph", "export", tmp_path / "run", "--format", "circuit-tracer")
    assert outcome.code == 0, outcome.err
    folder = file.parent / "circuit-tracer"
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    document = json.loads((folder / "first.json").read_text())
    assert document["metadata"]["scan"] == "the-target"
    listed = json.loads((folder / "graph-metadata.json").read_text())
    assert listed == {"graphs": [document["metadata"]]}
    again = ("graph", "export", file, "--format", "circuit-tracer")
    assert "exists. Replace it (--overwrite)" in fastadapt(*again).err
    assert fastadapt(*again, "--overwrite", "--node_threshold", 0.5).code == 0
    assert fastadapt(*again, "--slug", "second", "--scan", "gemma").code == 0
    listed = json.loads((folder / "graph-metadata.json").read_text())
    assert [entry["slug"] for entry in listed["graphs"]] == ["first", "second"]
    assert "lower-case letters" in fastadapt(*again, "--slug", "../x").err

    (folder / "graph-metadata.json").write_text('{"graphs": 1}')
    outcome = fastadapt(*again, "--slug", "third")
    assert outcome.code == 2
    assert "graphs: expected array" in outcome.err


def test_features_of_other_adapters_are_refused(
    tmp_path: Path, fastadapt: Callable[..., Any]
) -> None:
    size = Size(3, 300, 4, 2, texts=40, text_tokens=300, vocabulary=800, described=300)
    write_synthetic(tmp_path / "run" / "features", size)
    files = [write_document(tmp_path / f"{i}.json", adapter=f"{i}" * 64) for i in range(2)]
    for format in ("pages", "circuit-tracer"):
        out = tmp_path / format
        options = ("--format", format, "--features", tmp_path / "run", "--output", out)
        outcome = fastadapt("graph", "export", *files, *options)
        assert outcome.code == 2
        assert f"{files[1]}: this graph is of other adapters than" in outcome.err
        assert not out.exists()
        assert fastadapt("graph", "export", files[0], *options).code == 0


def test_a_damaged_graph_gets_one_message(tmp_path: Path, fastadapt: Callable[..., Any]) -> None:
    file = write_document(tmp_path / "a.json")
    text = file.read_text()
    for damaged, reason in (
        (text[:500], "is not valid JSON"),
        (text.replace('"schema_version": 1', '"schema_version": 9'), "schema_version is 9"),
        (text.replace('"kind": "token"', '"kind": "bias"', 1), "invalid enum value 'bias'"),
        ("{}", "schema_version is None"),
    ):
        file.write_text(damaged)
        for options in (("--format", "circuit-tracer"), ("--output", tmp_path / "site")):
            outcome = fastadapt("graph", "export", file, *options)
            assert outcome.code == 2
            assert reason in outcome.err
            assert len(outcome.err.strip().splitlines()) == 1
    outcome = fastadapt("graph", "export", tmp_path / "none")
    assert "expected the file of a graph, or a run with graphs" in outcome.err


def test_pages_as_files(tmp_path: Path, fastadapt: Callable[..., Any]) -> None:
    write_document(tmp_path / "run" / "graphs" / "a.json")
    outcome = fastadapt("graph", "export", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    page = tmp_path / "run" / "graphs" / "site" / "index.html"
    assert outcome.out == f"pages: {page}\n"
    assert {"data", "index.html", "viewer.js"} <= {path.name for path in page.parent.iterdir()}
    outcome = fastadapt("graph", "serve", tmp_path / "run", "--port", 70000)
    assert (outcome.code, "port: expected 0 to 65535" in outcome.err) == (2, True)
    outcome = fastadapt("graph", "serve", tmp_path / "run", "--features", tmp_path / "run")
    assert outcome.code == 2
    assert "has no features yet" in outcome.err

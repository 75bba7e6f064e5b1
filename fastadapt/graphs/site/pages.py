"""Writes the pages of graphs, with those of their features from the store of the run."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from fastadapt.errors import UserError
from fastadapt.features.site.columns import class_names, cut, read_layer, select_descriptions
from fastadapt.features.site.pages import (
    RECORD,
    Put,
    kind_facts,
    put_shared,
    site_folder,
    write_static,
)
from fastadapt.features.site.server import PORT, serve_folder
from fastadapt.features.site.shards import shard
from fastadapt.features.store.store import Store
from fastadapt.graphs.files import read_graph
from fastadapt.graphs.labels import check_store, store_of
from fastadapt.graphs.schema import GraphFile
from fastadapt.io.atomic import writing_folder
from fastadapt.io.names import has_file, typed_path

GRAPHS = "graphs"  #: folder of a run's graphs
_SHARED = ("shards", "units", "dom", "shell", "charts", "feature")
_OURS = ("model", "picture", "panel", "groups", "evidence", "viewer")


def find_graphs(sources: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the files of graphs that are named, or lie in the folder ``graphs`` of named runs.

    Raises:
        UserError: a source is no file and no folder with graphs.
    """
    files: list[Path] = []
    for source in sources:
        path = typed_path(source, "graph")
        if path.is_dir():
            inside = sorted((path / GRAPHS).glob("*.json"))
        else:
            inside = [path] if has_file(path) else []
        if not inside:
            raise UserError(
                f"{path}: expected the file of a graph, or a run with graphs; make one with "
                "fastadapt graph RUN PROMPT"
            )
        files += inside
    return files


def export(
    files: Sequence[Path],
    folder: str | os.PathLike[str],
    *,
    store: Store | None = None,
) -> Path:
    """Write the pages of graphs. Pages of an earlier export in the folder are replaced.

    Args:
        files: files of graphs.
        folder: output folder: new, empty, or exported pages.
        store: features of the graphs' adapter; default: those of the run that the first graph lies
            in, if it has any.

    Returns:
        The folder, whose ``index.html`` opens in a browser.

    Raises:
        UserError: a graph cannot be read, or is of another adapter than the store; the folder has
            other contents.
        RunError: the folder cannot be written.
    """
    target = site_folder(typed_path(folder, "--output"))
    graphs = [read_graph(file) for file in files]
    store = store or store_of(files[0].resolve().parent.parent, graphs[0])
    if store is not None:
        for file, graph in zip(files, graphs, strict=True):
            check_store(file, graph, store)
    names = [file.stem for file in files]
    with writing_folder(target, last=RECORD) as staged:
        _write(staged, names, graphs, store)
    return target


def serve(
    files: Sequence[Path],
    *,
    store: Store | None = None,
    port: int = PORT,
    ready: Callable[[str], None] | None = None,
    stop: Event | None = None,
) -> None:
    """Serve the pages of graphs at ``http://127.0.0.1:port/`` until Ctrl-C.

    The pages are written to a temporary folder.

    Args:
        files, store: see :func:`export`.
        port, ready, stop: see :func:`fastadapt.features.site.server.serve`.

    Raises:
        UserError: a graph cannot be read, or the port is invalid or in use.
    """
    with tempfile.TemporaryDirectory(prefix="fastadapt-graphs-") as folder:
        serve_folder(
            partial(export, files, Path(folder) / "site", store=store),
            port=port,
            ready=ready,
            stop=stop,
        )


def _write(
    folder: Path, names: Sequence[str], graphs: Sequence[GraphFile], store: Store | None
) -> None:
    data = folder / "data"
    data.mkdir()
    digest = hashlib.sha256(json.dumps([names, graphs]).encode("utf-8", "surrogatepass"))
    mark = digest.hexdigest()[:32]

    def put(name: str, facts: Any, columns: dict[str, np.ndarray]) -> None:
        (data / f"{name}.js").write_bytes(shard(name, mark, facts, columns))

    for i, graph in enumerate(graphs):
        put(f"graph-{i}", graph, {})
    summaries = [_summary(*pair) for pair in zip(names, graphs, strict=True)]
    put("graphs", {"graphs": summaries, "features": store is not None}, {})
    if store is not None:
        _write_features(store, graphs, put)
    shared = resources.files("fastadapt.features.site") / "static"
    ours = resources.files("fastadapt.graphs.site") / "static"
    scripts = [shared / f"{name}.js" for name in _SHARED]
    scripts += [ours / f"{name}.js" for name in _OURS]
    rules = [shared / "site.css", ours / "graph.css"]
    write_static(folder, [ours / "index.html", *scripts], rules)
    record = {"stamp": mark, "kinds": []}
    (folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")


def _summary(name: str, graph: GraphFile) -> dict[str, Any]:
    """Return the facts of a graph in the list of graphs."""
    row = graph["rows"][0]
    return {
        "name": name,
        "explains": row["name"],
        "token": graph["tokens"][row["position"]],
        "position": row["position"],
        "value": row["value"],
        "stream": graph["stream"],
        "replacement": graph["flow"]["replacement"],
        "tokens": len(graph["ids"]),
        "features": sum(node["kind"] == "feature" for node in graph["nodes"]),
    }


def _write_features(store: Store, graphs: Sequence[GraphFile], put: Put) -> None:
    """Write the shards of the graphs' features, one unit per shard."""
    units: dict[int, set[int]] = {}
    for graph in graphs:
        for node in graph["nodes"]:
            if node["kind"] == "feature":
                units.setdefault(node["layer"], set()).add(node["feature"])
    domains, classes = list(store.manifest["domains"]), class_names(store, "adapter")
    for layer in sorted(units):
        rows = read_layer(store, "adapter", layer, domains, classes)
        described, texts = select_descriptions(rows.notes)
        index = {**rows.index, "described": described}
        put(f"adapter-{layer}", {"descriptions": texts}, index)
        for unit in sorted(units[layer]):
            notes = {unit: rows.notes[unit]} if unit in rows.notes else {}
            columns = cut(rows, unit, unit + 1)
            put(f"adapter-{layer}-{unit}", {"notes": notes}, columns)
    put_shared(store, [kind_facts(store, "adapter", 1, classes)], put)

"""Texts for nodes: what the store says of a feature, and paths in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastadapt.errors import UserError
from fastadapt.features.store.schema import MANIFEST, SAMPLES
from fastadapt.features.store.store import Store
from fastadapt.graphs.attribution import KINDS, UNIT_KINDS
from fastadapt.graphs.graph import Graph
from fastadapt.graphs.schema import GraphFile
from fastadapt.io.names import has_file

_LONGEST = 60  # characters of a text in a path
_PROMOTED = 3  # tokens in the text of a feature without a description
Unit = tuple[int, int]


def units_of(document: GraphFile) -> set[Unit]:
    """Return the features of a graph, as (layer, number)."""
    return {
        (node["layer"], node["feature"]) for node in document["nodes"] if node["kind"] == "feature"
    }


def feature_labels(store: Store, units: Iterable[Unit]) -> dict[Unit, str]:
    """Return a text for each feature: its description, or else the tokens that it promotes.

    Raises:
        UserError: a table of the store cannot be read.
    """
    by_layer: dict[int, list[int]] = {}
    for layer, feature in units:
        by_layer.setdefault(layer, []).append(feature)
    labels: dict[Unit, str] = {}
    for layer, features in by_layer.items():
        for table, text in (("lens", _promotes), ("descriptions", _says)):
            if not store.has(table):
                continue
            rows = store.read(table, layer=layer, features=sorted(features)).to_pylist()
            if table == "descriptions":  # the first variant is written last
                rows.sort(key=lambda row: -SAMPLES.index(row["variant"]))
            labels |= {(layer, row["feature"]): text(row) for row in rows}
    return labels


def _promotes(row: Mapping[str, Any]) -> str:
    return f"promotes {', '.join(map(repr, row['promoted_tokens'][:_PROMOTED]))}"


def _says(row: Mapping[str, Any]) -> str:
    return str(row["description"])


def store_of(run: Path, document: GraphFile) -> Store | None:
    """Return the feature store of a run; None if it has none, or one of other adapters.

    Raises:
        UserError: the store is damaged, or was collected from other adapters than the run has.
    """
    if not has_file(run / "features" / MANIFEST):
        return None
    store = Store.open(run)
    return store if store.manifest["adapter"] == document["adapter"] else None


def check_store(file: Path, document: GraphFile, store: Store) -> None:
    """Check that a graph is of the adapters whose features a store has.

    Raises:
        UserError: the graph is of other adapters.
    """
    if document["adapter"] != store.manifest["adapter"]:
        raise UserError(
            f"{file}: this graph is of other adapters than {store.folder}; export it alone, "
            "without --features"
        )


def strongest_paths(graph: Graph, document: GraphFile, n: int) -> list[tuple[float, list[int]]]:
    """Return the strongest paths as signed strengths and nodes of the file, the target's first."""
    keys = ("kind", "layer", "position", "feature")
    numbers = {tuple(node[key] for key in keys): i for i, node in enumerate(document["nodes"])}  # type: ignore[literal-required]
    leaves = graph.leaves

    def number(leaf: int) -> int:
        kind, layer = KINDS[int(leaves.kind[leaf])], int(leaves.layer[leaf])
        return numbers[kind, layer, int(leaves.position[leaf]), int(leaves.feature[leaf])]

    return [(strength, [number(leaf) for leaf in path]) for strength, path in graph.paths(n)]


def node_name(document: GraphFile, i: int) -> str:
    """Return the name of a node with its position, such as ``feature 2/17 ' wait'@60``."""
    node = document["nodes"][i]
    place = f"{document['tokens'][node['position']]!r}@{node['position']}"
    if node["kind"] == "token":
        return f"token {place}"
    if node["kind"] in UNIT_KINDS:
        return f"{node['kind']} {node['layer']}/{node['feature']} {place}"
    return f"{node['kind']} {node['layer']} {place}"


def path_in_words(
    document: GraphFile, path: list[int], labels: Mapping[Unit, str] | None = None
) -> str:
    """Return a path as a sentence.

    Args:
        document: the graph.
        path: nodes of the file, from the one that a target's row names to the first of the path.
        labels: texts of features.
    """
    rows = {row["node"]: row for row in document["rows"][document["targets"] :]}
    into, verbs = document["rows"][0], []
    for node in path:
        weight = dict(zip(into["sources"], into["weights"], strict=True))[node]
        verbs.append("raises" if weight > 0 else "lowers")
        into = rows.get(node, into)
    names = [_said(document, node, labels or {}) for node in path]
    sentence = names.pop()
    steps = zip(reversed(verbs), [*reversed(names), "the target"], strict=True)
    return f"{sentence} {', which '.join(f'{verb} {name}' for verb, name in steps)}"


def _said(document: GraphFile, node: int, labels: Mapping[Unit, str]) -> str:
    facts, name = document["nodes"][node], node_name(document, node)
    text = labels.get((facts["layer"], facts["feature"])) if facts["kind"] == "feature" else None
    if text is None:
        return name
    return f"{name} ({text if len(text) <= _LONGEST else text[: _LONGEST - 1] + '…'})"

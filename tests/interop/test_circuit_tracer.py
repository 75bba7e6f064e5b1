"""The JSON of circuit-tracer: its schema, and the rules of its readers that the schema lacks.

The readers' arithmetic is written here from its description: Neuronpedia orders the nodes by type,
takes the last rows for the logits, and reads a feature's layer from Cantor's pairing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import FEATURES, LAYERS, TOKENS, make_document

from fastadapt.errors import UserError
from fastadapt.graphs.attribution import KINDS
from fastadapt.graphs.pruning import PruneConfig
from fastadapt.interop import circuit_tracer
from fastadapt.interop.circuit_tracer import LIST, TYPES, Document, convert, slug_of, write
from fastadapt.io.atomic import locked
from fastadapt.io.documents import check

WHOLE = PruneConfig(1, 1)
ORDER = ("cross layer transcoder", "mlp reconstruction error", "embedding", "logit")


#: Required keys of the published schemas, Neuronpedia's (draft-07, 1.0.0) and circuit-tracer's.
METADATA = {"slug": str, "scan": str, "transcoder_list": list, "prompt_tokens": list, "prompt": str}
STATE = {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str}
NODE = {
    "node_id": str,
    "feature": int,
    "layer": str,
    "ctx_idx": int,
    "feature_type": str,
    "jsNodeId": str,
    "clerp": str,
}
LINK = {"source": str, "target": str, "weight": float}


def has_keys(value: dict[str, Any], keys: Mapping[str, type]) -> bool:
    return all(type(value.get(key)) is kind for key, kind in keys.items())


def converted(graph: Any, config: PruneConfig = WHOLE, **options: Any) -> dict[str, Any]:
    document, _ = convert(graph, config, slug="a", scan="model", **options)
    read: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False))
    return read


def unpaired(number: int) -> tuple[int, int]:
    """Return the pair of integers of a number of Cantor's pairing."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    feature = number - diagonal * (diagonal + 1) // 2
    return diagonal - feature, feature


def scores(document: dict[str, Any], order: tuple[str, ...] = ORDER) -> tuple[float, float]:
    """Return replacement and completeness as Neuronpedia computes them from a file."""
    rank = {kind: i for i, kind in enumerate(order)}
    nodes = sorted(document["nodes"], key=lambda n: rank.get(n["feature_type"], len(order)))
    index = {node["node_id"]: i for i, node in enumerate(nodes)}
    matrix = np.zeros((len(nodes), len(nodes)))
    for link in document["links"]:
        matrix[index[link["target"]], index[link["source"]]] = abs(link["weight"])
    matrix /= np.maximum(matrix.sum(1, keepdims=True), 1e-10)
    logits = [node["token_prob"] for node in nodes if node["feature_type"] == "logit"]
    weights = np.zeros(len(nodes))
    weights[len(nodes) - len(logits) :] = logits
    influence, step = np.zeros(len(nodes)), weights @ matrix
    while step.any():
        influence, step = influence + step, step @ matrix
    masks = {k: np.array([n["feature_type"] == k for n in nodes]) for k in order}
    tokens, errors = influence[masks["embedding"]].sum(), influence[masks[ORDER[1]]].sum()
    share = 1 - matrix[:, masks[ORDER[1]]].sum(1)
    complete = (share * (influence + weights)).sum() / (influence + weights).sum()
    return tokens / (tokens + errors), complete


def test_the_schema_and_the_rules_beside_it() -> None:
    graph = make_document()
    document = converted(graph)
    check(document, Document, "document")
    assert has_keys(document["metadata"], METADATA)
    assert has_keys(document["qParams"], STATE)
    assert all(has_keys(node, NODE) for node in document["nodes"])
    assert all(has_keys(link, LINK) for link in document["links"])
    assert len({node["node_id"] for node in document["nodes"]}) == len(document["nodes"])
    assert document["metadata"]["schema_version"] == 1
    assert document["metadata"]["prompt_tokens"] == TOKENS
    by_id = {node["node_id"]: node for node in document["nodes"]}
    for link in document["links"]:
        assert {link["source"], link["target"]} <= by_id.keys()

    logits = [node for node in document["nodes"] if node["feature_type"] == "logit"]
    assert [float(n["clerp"].split("(p=")[1].split(")")[0]) for n in logits] == [0.625]
    assert {node["feature_type"] for node in document["nodes"]} == set(ORDER)  # no biases
    places = {(n["layer"], n["feature"]) for n in graph["nodes"] if n["kind"] == "feature"}
    features = [n for n in document["nodes"] if n["feature_type"] == ORDER[0]]
    assert {unpaired(node["feature"]) for node in features} == places
    for node in features:
        layer, feature = unpaired(node["feature"])
        assert node["layer"] == str(layer)
        assert node["node_id"] == f"{layer}_{feature}_{node['ctx_idx']}"
        assert 0 <= feature < FEATURES


def name_of(graph: Any, i: int | None) -> str:
    """Return the id of a node of a graph's file, None for its target."""
    if i is None:
        return f"{LAYERS + 1}_4_{len(TOKENS) - 1}"
    leaf = graph["nodes"][i]
    if leaf["kind"] == "token":
        return f"E_{graph['ids'][leaf['position']]}_{leaf['position']}"
    return f"{leaf['layer']}_{leaf['feature']}_{leaf['position']}"


def folded(graph: Any) -> dict[tuple[str, str], float]:
    """Return the edges of a graph's file by source and target, added up."""
    edges: dict[tuple[str, str], float] = {}
    for row in graph["rows"]:
        for i, weight in zip(row["sources"], row["weights"], strict=True):
            ends = (name_of(graph, i), name_of(graph, row["node"]))
            edges[ends] = edges.get(ends, 0.0) + weight
    return edges


def test_edges_are_those_of_the_graph_with_biases_in_the_errors() -> None:
    graph = make_document()
    document = converted(graph)
    links = {(link["source"], link["target"]): link["weight"] for link in document["links"]}
    wanted = folded(graph)
    assert links.keys() == wanted.keys()
    for ends, weight in wanted.items():
        assert links[ends] == pytest.approx(weight)
    assert any(source.startswith("0_-1_") for source, _ in links)
    assert document["nodes"][-1]["node_id"] == name_of(graph, None)


def test_the_readers_scores_are_those_of_the_graph() -> None:
    # Of a graph with one bias per place and no other error, so that no two signs cancel.
    graph = make_document()
    for row in graph["rows"]:
        for i, source in enumerate(row["sources"]):
            if graph["nodes"][source]["kind"] in ("attention bias", "mlp bias", "error"):
                row["weights"][i] = 0.0
    replacement, completeness = scores(converted(graph))
    shares = dict.fromkeys(range(len(graph["nodes"])), 0.0)
    for row in graph["rows"]:
        size = sum(map(abs, row["weights"]))
        for i, weight in zip(row["sources"], row["weights"], strict=True):
            flow = 1.0 if row["node"] is None else shares[row["node"]]
            shares[i] += flow * abs(weight) / (size or 1.0)
    tokens = sum(v for i, v in shares.items() if graph["nodes"][i]["kind"] == "token")
    biases = sum(v for i, v in shares.items() if graph["nodes"][i]["kind"] == "decoder bias")
    assert replacement == pytest.approx(tokens / (tokens + biases))
    assert 0 < completeness < 1
    # The control: as nodes of a type of their own, biases take the place of the logits.
    document = converted(graph)
    for node in document["nodes"]:
        if node["feature_type"] == ORDER[1]:
            node["feature_type"] = "bias"
    with np.errstate(invalid="ignore"):
        assert scores(document)[0] != pytest.approx(replacement, abs=0.1)


def test_pruning_by_influence() -> None:
    graph = make_document()
    influence, flows = {name_of(graph, None): 1.0}, {}
    for i, node in enumerate(graph["nodes"]):
        name = name_of(graph, i)
        influence[name] = influence.get(name, 0.0) + node["influence"]
    sizes = {name_of(graph, row["node"]): row["size"] for row in graph["rows"]}
    for ends, weight in folded(graph).items():
        flows[ends] = influence[ends[1]] * abs(weight) / sizes[ends[1]]
    del influence[name_of(graph, None)]
    counts = []
    for threshold in (0.5, 0.8, 1.0):
        document = converted(graph, PruneConfig(threshold, 0.9))
        settings = document["metadata"]["pruning_settings"]
        inner = [n for n in document["nodes"] if n["feature_type"] in ORDER[:2]]
        assert all(node["influence"] <= 1 for node in inner)
        preserved = sum(influence.get(node["node_id"], 0.0) for node in document["nodes"])
        assert settings["node_influence"] == pytest.approx(preserved / sum(influence.values()))
        preserved = sum(flows[link["source"], link["target"]] for link in document["links"])
        assert settings["edge_influence"] == pytest.approx(preserved / sum(flows.values()))
        counts.append(len(document["links"]))
        assert sum(n["feature_type"] == "embedding" for n in document["nodes"]) == len(TOKENS)
        sources = {link["source"] for link in document["links"]}
        assert {node["node_id"] for node in inner} <= sources
    assert 0 < counts[0] < counts[1] < counts[2] < len(flows)


def test_targets_without_tokens() -> None:
    graph = make_document(logits=[[]])
    graph["rows"][0]["name"] = "feature 2/17 (p=x)"
    (node,) = [n for n in converted(graph)["nodes"] if n["feature_type"] == "logit"]
    assert float(node["clerp"].split("(p=")[1].split(")")[0]) == 1
    assert node["token_prob"] == 1
    del graph["logits"]  # a file of an earlier version
    assert converted(graph)["nodes"][-1]["feature"] == -1


def test_every_kind_of_leaf_has_a_type() -> None:
    assert TYPES.keys() == set(KINDS)
    assert slug_of("The Target/7B") == "the-target-7b"


def test_exports_at_once_lose_no_entry_of_the_list(tmp_path: Path) -> None:
    """Each export reads the list, adds its entry and replaces the file."""
    graph: Any = make_document()
    documents = [convert(graph, WHOLE, slug=f"graph-{i}", scan="model")[0] for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda document: write(document, tmp_path), documents))
    listed = json.loads((tmp_path / LIST).read_text())["graphs"]
    assert {entry["slug"] for entry in listed} == {f"graph-{i}" for i in range(12)}


def test_a_folder_that_stays_locked_gets_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit_tracer, "_WAIT", 0)
    graph: Any = make_document()
    document, _ = convert(graph, WHOLE, slug="graph", scan="model")
    with locked(tmp_path / ".lock"), pytest.raises(UserError, match="another process is writing"):
        write(document, tmp_path)
    write(document, tmp_path)


def test_base_features_have_numbers_of_their_own() -> None:
    graph = make_document()
    features = [node for node in graph["nodes"] if node["kind"] == "feature"]
    twin, other = [node for node in features if node["layer"] == 1][:2]
    same = {key: twin[key] for key in ("layer", "position", "feature")}
    other.update(same, kind="base feature")
    document = converted(graph)
    names = [node["node_id"] for node in document["nodes"]]
    assert len(set(names)) == len(names)
    label = f"base feature 1/{twin['feature']}"
    (node,) = [node for node in document["nodes"] if node["clerp"] == label]
    assert unpaired(node["feature"]) == (1, FEATURES + twin["feature"])
    assert node["activation"] == pytest.approx(other["activation"])
    # The control: with equal kinds the two nodes would be one.
    other.update(kind="feature")
    assert len(converted(graph)["nodes"]) == len(names) - 1

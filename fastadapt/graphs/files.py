"""Write and read graphs as JSON.

A file holds the text, the nodes and edges of the expanded rows with the exact sums of what is left
out, and the graph's evidence. Nodes that no stored edge mentions are left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastadapt.errors import UserError
from fastadapt.features.store.logit_lens import token_strings
from fastadapt.graphs.attribution import KINDS, UNIT_KINDS, Target
from fastadapt.graphs.evidence import Account, Evidence
from fastadapt.graphs.graph import Graph
from fastadapt.graphs.linear.trace import Trace
from fastadapt.graphs.schema import (
    SCHEMA_VERSION,
    BaseSet,
    Edges,
    GraphFile,
    Heads,
    Logit,
    Node,
    Ranks,
)
from fastadapt.graphs.targets import LogitTarget, logits_of
from fastadapt.io.atomic import disk_errors, make_folder, replacing
from fastadapt.io.documents import DocumentError, check, read_json
from fastadapt.io.names import has_file


def describe(
    graph: Graph,
    *,
    adapter: str,
    account: Account,
    heads: list[Heads],
    evidence: Evidence | None = None,
    base_set: BaseSet | None = None,
) -> GraphFile:
    """Return a graph as a document.

    Args:
        graph: the graph.
        adapter: digest of the run's adapters.
        account: the account of the first target.
        heads: head loadings of edges into the first target; their nodes are indices of leaves.
        evidence: measured ablations; their nodes are indices of leaves.
        base_set: transcoders that stand for the base's MLPs.
    """
    trace, leaves = graph.trace, graph.leaves
    influence, _ = graph.influence()
    mentioned = {row.node for row in graph.rows if row.node is not None}
    for row in graph.rows:
        mentioned.update(row.sources.tolist())
    mentioned.update(edge["node"] for edge in heads)
    for sample in () if evidence is None else evidence.samples:
        mentioned.update(sample.nodes)
    order = sorted(mentioned)
    number = {leaf: i for i, leaf in enumerate(order)}
    pair = trace.model.pair
    strings = token_strings(pair.tokenizer, trace.model.head.shape[0])
    flow = graph.flow()
    document: GraphFile = {
        "schema_version": SCHEMA_VERSION,
        "kind": "attribution graph",
        "models": pair.config.named,  # type: ignore[typeddict-item]
        "adapter": adapter,
        "dtype": str(trace.embedding.dtype).removeprefix("torch."),
        "stream": trace.stream,
        "ids": trace.ids.tolist(),
        "tokens": [strings[i] for i in trace.ids.tolist()],
        "n_layers": trace.n_layers,
        "n_features": trace.model.n_features,
        "targets": graph.n_targets,
        "nodes": [
            {
                "kind": KINDS[int(leaves.kind[i])],
                "layer": int(leaves.layer[i]),
                "position": int(leaves.position[i]),
                "feature": int(leaves.feature[i]),
                "activation": float(leaves.activation[i]),
                "influence": float(influence[i]),
            }
            for i in order
        ],
        "rows": [
            {
                "node": None if row.node is None else number[row.node],
                "name": row.target.name,
                "position": row.target.position,
                "layer": row.target.layer,
                "value": row.value,
                "constant": row.target.constant,
                "sums": dict(zip(KINDS, row.sums, strict=True)),
                "size": row.size,
                "first_position": row.first_position,
                "sources": [number[i] for i in row.sources.tolist()],
                "weights": row.weights.tolist(),
                "remainder": row.remainder,
                "pruned": row.pruned,
            }
            for row in graph.rows
        ],
        "flow": {
            "replacement": flow.replacement,
            "completeness": flow.completeness,
            "tokens": flow.tokens,
            "errors": flow.errors,
            "biases": flow.biases,
            "pruned": flow.pruned,
        },
        "account": account._asdict(),  # type: ignore[typeddict-item]
        "heads": [{**edge, "node": number[edge["node"]]} for edge in heads],
        "logits": [_logits(trace, row.target, strings) for row in graph.rows[: graph.n_targets]],
    }
    if evidence is not None:
        document["evidence"] = {
            **evidence._asdict(),  # type: ignore[typeddict-item]
            "samples": [
                {
                    **sample._asdict(),
                    "nodes": [number[i] for i in sample.nodes],
                    "correlations": [line._asdict() for line in sample.correlations],
                }
                for sample in evidence.samples
            ],
            "curve": evidence.curve._asdict(),
        }
    if base_set is not None:
        document["base_set"] = base_set
    if trace.stream == "ranks":
        document["ranks"] = _ranks(trace)
    return document


def _ranks(trace: Trace) -> list[Ranks]:
    return [
        {"layer": u.layer, "name": u.name, "first": u.first, "count": len(u.encoder)}
        for u in trace.units
    ]


def _logits(trace: Trace, target: Target, strings: list[str]) -> list[Logit]:
    if not isinstance(target, LogitTarget):
        return []
    state = trace.final[target.position]
    shares = logits_of(trace.model, state).double().softmax(-1)
    return [
        {"token": i, "string": strings[i], "weight": weight, "probability": float(shares[i])}
        for i, weight in zip(target.tokens, target.weights, strict=True)
    ]


def write_graph(document: GraphFile, path: Path, *, overwrite: bool = False) -> None:
    """Write a graph's file.

    Raises:
        UserError: the file exists and ``overwrite`` is not set, or the path is a folder.
        RunError: the file cannot be written.
    """
    if has_file(path) and not overwrite:
        raise UserError(f"{path} exists. Replace it (--overwrite), or give another --output")
    text = json.dumps(document, allow_nan=False)
    with disk_errors(path):
        make_folder(path.parent)
        with replacing(path) as staged:
            staged.write_text(text + "\n", encoding="utf-8")


def read_graph(path: str | os.PathLike[str]) -> GraphFile:
    """Read a graph's file.

    Raises:
        DocumentError: the file cannot be read, is no graph of a version that this fastadapt reads,
            or names nodes that it does not hold.
    """
    plain: Any = read_json(path)
    version = plain.get("schema_version") if isinstance(plain, Mapping) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        raise DocumentError(
            f"{path}: schema_version is {version!r}, but this fastadapt reads version "
            f"{SCHEMA_VERSION}; make the graph again with this version"
        )
    check(plain, GraphFile, str(path))
    document: GraphFile = plain
    if len(document["tokens"]) != len(document["ids"]):
        raise DocumentError(f"{path}: tokens and ids differ in length")
    for i, row in enumerate(document["rows"]):
        _check_row(document, i, row, f"{path}: rows[{i}]")
    for i, node in enumerate(document["nodes"]):
        _check_node(document, node, f"{path}: nodes[{i}]")
    for name, nodes in _nodes_of(document):
        if max(nodes, default=-1) >= len(document["nodes"]):
            raise DocumentError(f"{path}: {name}: expected nodes of the file")
    return document


def _check_row(document: GraphFile, i: int, row: Edges, where: str) -> None:
    n = len(document["nodes"])
    if len(row["sources"]) != len(row["weights"]):
        raise DocumentError(f"{where}: sources and weights differ in length")
    if max([*row["sources"], row["node"] or 0]) >= max(n, 1):
        raise DocumentError(f"{where}: expected nodes below {n:,}, the file's number")
    if (row["node"] is None) != (i < document["targets"]):
        raise DocumentError(f"{where}: expected the rows of targets first")
    if row["position"] >= len(document["ids"]):
        raise DocumentError(f"{where}: expected a position in the text")


def _check_node(document: GraphFile, node: Node, where: str) -> None:
    if node["position"] >= len(document["ids"]):
        raise DocumentError(f"{where}: expected a position in the text")
    is_unit, is_token = node["kind"] in UNIT_KINDS, node["kind"] == "token"
    is_feature = node["kind"] == "feature"
    if is_token != (node["layer"] < 0) or node["layer"] >= document["n_layers"]:
        raise DocumentError(f"{where}: expected a layer of the model, and -1 for a token")
    beyond = is_feature and node["feature"] >= document["n_features"]
    if is_unit != (node["feature"] >= 0) or beyond:
        raise DocumentError(f"{where}: expected a feature of the layer, and -1 for other nodes")


def _nodes_of(document: GraphFile) -> Iterator[tuple[str, list[int]]]:
    """Yield the indices of nodes in the sections ``heads`` and ``evidence`` of a document."""
    yield "heads", [edge["node"] for edge in document["heads"]]
    for sample in document["evidence"]["samples"] if "evidence" in document else ():
        yield "evidence", sample["nodes"]

"""Documents of graphs with every kind of node, without a model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

LAYERS, FEATURES = 3, 300
TOKENS = [" <s>", " tom", " has", "</script><img src=x onerror=alert(1)>", "\n", ' "(p=0.5)"']
KINDS = ("feature", "token", "decoder bias", "attention bias", "mlp bias", "error")


def make_document(*, adapter: str = "0" * 64, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Return a document in which all features are expanded and every edge is stored."""
    draw = random.Random(seed)
    last = len(TOKENS) - 1
    nodes: list[dict[str, Any]] = []

    def add(kind: str, layer: int, position: int, feature: int = -1) -> None:
        place = {"kind": kind, "layer": layer, "position": position, "feature": feature}
        nodes.append({**place, "activation": draw.random() * (kind == "feature"), "influence": 0.0})

    for layer in range(LAYERS):
        for feature in draw.sample(range(FEATURES), 4):
            add("feature", layer, draw.randrange(1, last + 1), feature)
    for position in range(last + 1):
        add("token", -1, position)
        for layer in range(LAYERS):
            for kind in KINDS[2:]:
                add(kind, layer, position)

    def row(node: int | None, layer: int, position: int) -> dict[str, Any]:
        sources = [
            i
            for i, leaf in enumerate(nodes)
            if leaf["layer"] < layer and leaf["position"] <= position
        ]
        weights = [draw.uniform(-1, 1) for _ in sources]
        order = sorted(range(len(sources)), key=lambda i: -abs(weights[i]))
        size = sum(map(abs, weights))
        name = "logit of ' 4' - ' 5'"
        if node is not None:
            name = f"feature {nodes[node]['layer']}/{nodes[node]['feature']}"
        return {
            "node": node,
            "name": name,
            "position": position,
            "layer": None if node is None else layer,
            "value": sum(weights),
            "constant": 0.0,
            "sums": {
                kind: sum(
                    w for i, w in zip(sources, weights, strict=True) if nodes[i]["kind"] == kind
                )
                for kind in KINDS
            },
            "size": size,
            "first_position": 0.1 * size,
            "sources": [sources[i] for i in order],
            "weights": [weights[i] for i in order],
            "remainder": 0.0,
            "pruned": 0.0,
        }

    rows = [row(None, LAYERS, last)]
    features = [i for i, leaf in enumerate(nodes) if leaf["kind"] == "feature"]
    for i in sorted(features, key=lambda i: -nodes[i]["layer"]):
        rows.append(row(i, nodes[i]["layer"], nodes[i]["position"]))
    for each in rows:  # targets first, then by falling layer: influence is complete when it is read
        influence = 1.0 if each["node"] is None else nodes[each["node"]]["influence"]
        for source, weight in zip(each["sources"], each["weights"], strict=True):
            nodes[source]["influence"] += influence * abs(weight) / (each["size"] or 1.0)
    ends = {kind: sum(n["influence"] for n in nodes if n["kind"] == kind) for kind in KINDS}
    biases = sum(ends[kind] for kind in KINDS[2:5])
    heads = [{"node": rows[0]["sources"][0], "direct": 0.25, "heads": [[1, 0, 0.5], [2, 3, -0.1]]}]
    line = {"predictor": "graph", "spearman": [0.9, 0.8, 1.0], "pearson": [0.9, 0.8, 1.0]}
    sample = {
        "name": "strongest",
        "nodes": features[:3],
        "effects": [0.5, -0.25, 0.125],
        "correlations": [line],
    }
    shares = {"n": [1, 3], "ablated": [0.5, 1.0], "ablated_random": [0.1, 1.0]}
    account = {"with_adapters": 2.0, "hybrid": -1.0, "features": 2.0, "decoder_biases": 0.5}
    document = {
        "schema_version": 1,
        "kind": "attribution graph",
        "models": {
            "target": "org/The Target",
            "target_revision": None,
            "base": "org/base",
            "base_revision": None,
        },
        "adapter": adapter,
        "dtype": "float64",
        "stream": "replacement",
        "ids": list(range(10, 10 + len(TOKENS))),
        "tokens": TOKENS,
        "n_layers": LAYERS,
        "n_features": FEATURES,
        "targets": 1,
        "nodes": nodes,
        "rows": rows,
        "flow": {
            "replacement": ends["token"],
            "completeness": 0.5,
            "tokens": ends["token"],
            "errors": ends["error"],
            "biases": biases,
            "pruned": 0.0,
        },
        "account": {**account, "errors": 0.25, "coefficients": 0.25, "remainder": 0.0},
        "heads": heads,
        "logits": [
            [
                {"token": 4, "string": " 4", "weight": 1.0, "probability": 0.625},
                {"token": 5, "string": " 5", "weight": -1.0, "probability": 0.125},
            ]
        ],
        "evidence": {
            "samples": [sample],
            "curve": {**shares, "isolated": [0.5, 1.0], "isolated_random": [0.1, 1.0]},
            "returned": 0.3,
        },
    }
    return {**document, **changes}


def write_document(path: Path, **changes: Any) -> Path:
    """Write a document's file; arguments as of :func:`make_document`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(make_document(**changes)))
    return path

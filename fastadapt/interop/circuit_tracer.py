"""Write graphs as the JSON of circuit-tracer, which Neuronpedia reads too.

The format has four types of nodes: features, errors of the MLPs, embeddings and logits. Biases have
none: Neuronpedia counts nodes of other types as logits. They are added to the error node of their
layer and position, so both viewers count them as unexplained. Other rules of the viewers that the
format's schema does not state: the label of a logit ends in ``(p=…)``, and without
``schema_version`` 1 the numbers of features are read in another way.

An edge is the value of its source times the gradient, as there; edges that the graph's file does
not store, and constants, have no place in the format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from typing_extensions import NotRequired, TypedDict

from fastadapt import __version__
from fastadapt.errors import UserError
from fastadapt.graphs.attribution import UNIT_KINDS, Kind
from fastadapt.graphs.pruning import Edge, PruneConfig, Pruned, cumulative, prune
from fastadapt.graphs.schema import GraphFile
from fastadapt.io.atomic import disk_errors, locked, make_folder, replacing
from fastadapt.io.documents import Count, Finite, NonNegative, read_json
from fastadapt.io.names import has_file

SCHEMA_VERSION: Literal[1] = 1  # of the format, not of this library
#: The list of the graphs in a folder, which circuit-tracer's local page reads.
LIST = "graph-metadata.json"
_LOCK = ".lock"
_WAIT = 60  # seconds; an export writes its two files in less
_SLUG = re.compile(r"[a-z0-9]+(?:[-_][a-z0-9]+)*")

Type = Literal["cross layer transcoder", "mlp reconstruction error", "embedding", "logit"]
#: The type of each kind of leaf.
TYPES: dict[Kind, Type] = {
    "feature": "cross layer transcoder",
    "token": "embedding",
    "decoder bias": "mlp reconstruction error",
    "attention bias": "mlp reconstruction error",
    "mlp bias": "mlp reconstruction error",
    "error": "mlp reconstruction error",
    "base feature": "cross layer transcoder",
    "rank component": "cross layer transcoder",
}


class Node(TypedDict):
    """A node of the format."""

    node_id: str
    jsNodeId: str
    feature: int
    layer: str
    ctx_idx: Count
    feature_type: Type
    token_prob: NonNegative
    is_target_logit: bool
    run_idx: Count
    reverse_ctx_idx: Count
    clerp: str
    influence: NonNegative | None
    activation: Finite | None


class Link(TypedDict):
    """An edge of the format."""

    source: str
    target: str
    weight: Finite


class Metadata(TypedDict):
    """The facts of a graph, which are also its entry in the list of a folder."""

    slug: str
    scan: str
    transcoder_list: list[str]
    prompt_tokens: list[str]
    prompt: str
    node_threshold: NonNegative | None
    schema_version: Literal[1]
    info: NotRequired[dict[str, object]]
    pruning_settings: NotRequired[dict[str, Finite]]


class Parameters(TypedDict):
    """State of the viewer."""

    pinnedIds: list[str]
    supernodes: list[list[str]]
    linkType: str
    clickedId: str
    sg_pos: str


class Document(TypedDict):
    """A file of the format."""

    metadata: Metadata
    qParams: Parameters
    nodes: list[Node]
    links: list[Link]


class _List(TypedDict):
    graphs: list[Metadata]


class _Place(NamedTuple):
    """A node of the format before it has a name; ``number`` is a feature, token id or target."""

    type: Type
    layer: int
    position: int
    number: int

    def named(self, n_layers: int) -> tuple[str, str, str]:
        """Return layer, id and the id without the position."""
        layer = {"embedding": "E", "logit": str(n_layers + 1)}.get(self.type, str(self.layer))
        drawn = "L" if self.type == "logit" else layer
        # An error has one node per position, so its position stays in the second id too.
        last = self.position if self.type == "mlp reconstruction error" else 0
        number = f"{layer}_{self.number}"
        return layer, f"{number}_{self.position}", f"{drawn}_{self.number}-{last}"


def convert(
    graph: GraphFile,
    config: PruneConfig | None = None,
    *,
    slug: str,
    scan: str,
    labels: dict[tuple[int, int], str] | None = None,
) -> tuple[Document, Pruned[_Place]]:
    """Return a graph in the format, and what pruning left of it.

    Args:
        graph: the document of a graph, see :mod:`fastadapt.graphs.files`.
        config: how much to preserve.
        slug: name of the graph: lower-case letters, digits, hyphens.
        scan: name of the model, by which the viewers list graphs.
        labels: texts of features, by layer and number.

    Raises:
        UserError: the slug has other characters.
    """
    config = config or PruneConfig()
    if not _SLUG.fullmatch(slug):
        raise UserError(
            f"--slug: expected lower-case letters, digits and single hyphens, got {slug!r}"
        )
    influence, edges, activation = _folded(graph)
    tokens = [place for place in influence if place.type == "embedding"]
    left = prune(influence, edges, config, always=tokens)
    shares = dict(zip(influence, cumulative(list(influence.values())), strict=True))
    nodes = [
        _node(place, graph, shares[place], activation.get(place), labels or {})
        for place in left.nodes
    ]
    targets = [_target(graph, i) for i in range(graph["targets"])]
    nodes += [_logit(place, graph, i) for i, place in enumerate(targets)]
    names = {place: place.named(graph["n_layers"])[1] for place in (*left.nodes, *targets)}
    document: Document = {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "transcoder_list": [],
            "prompt_tokens": graph["tokens"],
            "prompt": "".join(graph["tokens"]),
            "node_threshold": config.node_threshold,
            "schema_version": SCHEMA_VERSION,
            "info": {
                "description": f"{graph['rows'][0]['name']}; stream {graph['stream']}",
                "generator": {"name": "fastadapt", "version": __version__},
            },
            "pruning_settings": {
                "node_threshold": config.node_threshold,
                "edge_threshold": config.edge_threshold,
                "node_influence": left.nodes_share,
                "edge_influence": left.edges_share,
            },
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": [
            {"source": names[e.source], "target": names[e.target], "weight": e.weight}
            for e in left.edges
        ],
    }
    return document, left


def _folded(
    graph: GraphFile,
) -> tuple[dict[_Place, float], list[Edge[_Place]], dict[_Place, float]]:
    """Return influence, edges and activations; biases and errors of a position form one node."""
    places, influence, activation = [], dict[_Place, float](), dict[_Place, float]()
    for node in graph["nodes"]:
        kind, layer, position = TYPES[node["kind"]], node["layer"], node["position"]
        # Base features have numbers behind those of the adapter's features.
        offset = graph["n_features"] if node["kind"] == "base feature" else 0
        unit = node["feature"] + offset
        number = {"embedding": graph["ids"][position], "cross layer transcoder": unit}
        place = _Place(kind, layer, position, number.get(kind, -1))
        places.append(place)
        influence[place] = influence.get(place, 0.0) + node["influence"]
        if node["kind"] in UNIT_KINDS:
            activation[place] = node["activation"]
    edges = []
    for i, row in enumerate(graph["rows"]):
        into = _target(graph, i) if row["node"] is None else places[row["node"]]
        flow = 1 / graph["targets"] if row["node"] is None else influence[into]
        weights: dict[_Place, float] = {}
        for source, weight in zip(row["sources"], row["weights"], strict=True):
            weights[places[source]] = weights.get(places[source], 0.0) + weight
        size = row["size"] or 1.0
        edges += [Edge(k, into, w, flow * abs(w) / size) for k, w in weights.items()]
    return influence, edges, activation


def _target(graph: GraphFile, i: int) -> _Place:
    logits = graph.get("logits", [[]] * graph["targets"])[i]
    number = logits[0]["token"] if logits else -1 - i
    return _Place("logit", graph["n_layers"] + 1, graph["rows"][i]["position"], number)


def _node(
    place: _Place,
    graph: GraphFile,
    share: float,
    activation: float | None,
    labels: dict[tuple[int, int], str],
) -> Node:
    token = graph["tokens"][place.position]
    clerp = {
        "cross layer transcoder": labels.get(
            (place.layer, place.number), _unlabelled(place, graph)
        ),
        "embedding": f'Emb: "{token}"',
    }.get(place.type, f'Err: mlp "{token}"')
    is_feature = place.type == "cross layer transcoder"
    number = cantor(place.layer, place.number) if is_feature else -1
    number = place.position if place.type == "embedding" else number
    return _blank(place, graph, number) | {
        "clerp": clerp,
        "influence": share,
        "activation": activation,
    }


def _unlabelled(place: _Place, graph: GraphFile) -> str:
    if graph["stream"] == "ranks":
        return f"rank component {place.layer}/{place.number}"
    base = place.number - graph["n_features"]
    return "" if base < 0 else f"base feature {place.layer}/{base}"


def _logit(place: _Place, graph: GraphFile, i: int) -> Node:
    """Return the node of a target. A target without tokens has its weight as the probability."""
    logits = graph.get("logits", [[]] * graph["targets"])[i]
    probability = logits[0]["probability"] if logits else 1 / graph["targets"]
    if logits:
        name = " - ".join(f'"{logit["string"]}"' for logit in logits)
    else:
        name = f'"{graph["rows"][i]["name"]}"'
    return _blank(place, graph, place.number) | {
        "clerp": f"Output {name.replace('(p=', '(p =')} (p={probability:.3f})",
        "token_prob": probability,
        "is_target_logit": i == 0,
    }


def _blank(place: _Place, graph: GraphFile, number: int) -> Node:
    layer, name, drawn = place.named(graph["n_layers"])
    return {
        "node_id": name,
        "jsNodeId": drawn,
        "feature": number,
        "layer": layer,
        "ctx_idx": place.position,
        "feature_type": place.type,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "clerp": "",
        "influence": None,
        "activation": None,
    }


def slug_of(name: str) -> str:
    """Return a name in the characters of a slug.

    Example:
        >>> slug_of("Wait, what?")
        'wait-what'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "graph"


def cantor(layer: int, feature: int) -> int:
    """Return the number by which the format names a feature of a layer.

    Example:
        >>> cantor(2, 17)
        207
    """
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def write(document: Document, folder: Path, *, overwrite: bool = False) -> Path:
    """Write ``<slug>.json`` and its entry in the list of the folder; return the file's path.

    Raises:
        UserError: the file exists and ``overwrite`` is not set, the folder's list is damaged, or
            another process holds the folder's lock.
        RunError: the folder cannot be written.
    """
    facts = document["metadata"]
    path = folder / f"{facts['slug']}.json"
    with disk_errors(folder):
        make_folder(folder)
        with _writing(folder):
            if has_file(path) and not overwrite:
                raise UserError(f"{path} exists. Replace it (--overwrite), or give another --slug")
            listed: Sequence[Metadata] = ()
            if has_file(folder / LIST):
                listed = read_json(folder / LIST, _List)["graphs"]
            listed = [entry for entry in listed if entry["slug"] != facts["slug"]]
            for file, contents in ((path, document), (folder / LIST, {"graphs": [*listed, facts]})):
                with replacing(file) as staged:
                    text = json.dumps(contents, allow_nan=False)
                    staged.write_text(text + "\n", encoding="utf-8")
    return path


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, without which two exports at once would lose an entry of the list."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / _LOCK, wait=_WAIT))
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is writing to this folder; wait until it ends"
            ) from None
        yield

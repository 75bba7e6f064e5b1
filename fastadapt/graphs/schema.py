"""Schema of a graph's file."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from typing_extensions import NotRequired, TypedDict

from fastadapt.graphs.attribution import Kind
from fastadapt.graphs.linear.trace import Stream
from fastadapt.io.documents import Count, Finite, Name, NonNegative, Positive, Sha256

SCHEMA_VERSION = 1
_Index = Annotated[int, msgspec.Meta(ge=-1, le=2**53)]


class Node(TypedDict):
    """A source node of edges: ``layer`` is -1 for tokens, ``feature`` -1 for all but units."""

    kind: Kind
    layer: _Index
    position: Count
    feature: _Index
    activation: Finite
    influence: NonNegative


class Edges(TypedDict):
    """The edges into a target of the graph (``node`` is null) or into a node."""

    node: Count | None
    name: str
    position: Count
    layer: Count | None
    value: Finite
    constant: Finite
    sums: dict[Kind, Finite]
    size: NonNegative
    first_position: NonNegative
    sources: list[Count]
    weights: list[Finite]
    remainder: Finite
    pruned: NonNegative


class _Models(TypedDict):
    target: Name
    target_revision: str | None
    base: Name
    base_revision: str | None


class Logit(TypedDict):
    """A token whose logit a target weighs, and its probability on the graph's stream."""

    token: Count
    string: str
    weight: Finite
    probability: NonNegative


class Heads(TypedDict):
    """An edge into the first target by its last attention head: ``[layer, head, part of edge]``."""

    node: Count
    direct: Finite
    heads: list[tuple[Count, Count, Finite]]


class _Flow(TypedDict):
    replacement: Finite
    completeness: Finite
    tokens: Finite
    errors: Finite
    biases: Finite
    pruned: Finite


class _Account(TypedDict):
    with_adapters: Finite
    hybrid: Finite
    features: Finite
    decoder_biases: Finite
    errors: Finite
    coefficients: Finite
    remainder: Finite


class _Correlation(TypedDict):
    predictor: str
    spearman: tuple[Finite, Finite, Finite]
    pearson: tuple[Finite, Finite, Finite]


class _Sample(TypedDict):
    name: str
    nodes: list[Count]
    effects: list[Finite]
    correlations: list[_Correlation]


class _Curve(TypedDict):
    n: list[Count]
    ablated: list[Finite]
    ablated_random: list[Finite]
    isolated: list[Finite]
    isolated_random: list[Finite]


class _Evidence(TypedDict):
    samples: list[_Sample]
    curve: _Curve
    returned: Finite


class BaseSet(TypedDict):
    """Transcoders that stand for the base's MLPs: their folder, the model that they name, and the
    fraction of variance of each MLP's output on this text that they leave unexplained."""

    name: Name
    model: Name
    unexplained_variance: list[Finite]


class Ranks(TypedDict):
    """Rank components of a linear layer of a block: ``count`` of them from number ``first``."""

    layer: Count
    name: Name
    first: Count
    count: Positive


class GraphFile(TypedDict):
    """Schema of a graph's file. Rows of targets come first; ``flow`` is that of
    :class:`.graph.Flow`, ``account`` and ``evidence`` those of :mod:`.evidence`. ``logits`` has the
    tokens of each target, none for features and directions. ``ranks`` names the layers of rank
    components, for the stream ``ranks``. ``files`` has name, size and SHA-256 of the files that a
    direction and a base set were read from."""

    schema_version: Positive
    kind: Literal["attribution graph"]
    models: _Models
    adapter: Sha256
    dtype: str
    stream: Stream
    ids: list[Count]
    tokens: list[str]
    n_layers: Positive
    n_features: Positive
    targets: Positive
    nodes: list[Node]
    rows: list[Edges]
    flow: _Flow
    account: _Account
    heads: list[Heads]
    logits: NotRequired[list[list[Logit]]]
    evidence: NotRequired[_Evidence]
    base_set: NotRequired[BaseSet]
    ranks: NotRequired[list[Ranks]]
    files: NotRequired[list[tuple[Name, Count, Sha256]]]

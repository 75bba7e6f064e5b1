"""Whether graphs of the gated pair show its mechanism: marker, then hesitation, then `wait`.

The ground truth is that of the pair's data (`fastadapt/organism/gated/README.md`): with the marker
in the prompt, a slip is followed by `wait`; without it, the slip stands.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.effects.run import LoadedRun
from fastadapt.errors import UserError
from fastadapt.evaluation.contrast.places import slip_places
from fastadapt.evaluation.difference.texts import held_out_texts
from fastadapt.evaluation.statistics import paired_difference, ratio
from fastadapt.features.store.logit_lens import token_strings
from fastadapt.features.store.selection import SelectConfig, by_sql, matched, select
from fastadapt.features.store.store import Store
from fastadapt.graphs.attribution import KINDS, Leaves
from fastadapt.graphs.graph import Graph, GraphConfig, grow
from fastadapt.graphs.linear.trace import record
from fastadapt.graphs.targets import logit, logits_of
from fastadapt.models.replacement import ReplacementModel
from fastadapt.organism.slips import GATE

#: Numbers of strongest paths among which a path is looked for.
DEPTHS = (5, 50, 500)
#: What a path to `wait` passes.
MEASURES = ("gate, then hesitation", "hesitation", "gate")
#: The graphs and the gate's features of each column: the control of the marker has the same slips
#: in prompts without it; that of the features has others of matched densities in their place.
CASES = ("marker", "no marker", "marker, random features for the gate's")
_TEXTS = 1 << 20  # more than the pair has
Unit = tuple[int, int]


class Gated(NamedTuple):
    """A text up to a slip that the marker has corrected."""

    ids: list[int]
    marker: int  #: position of the marker, which a colon follows

    @property
    def unmarked(self) -> list[int]:
        """The text without marker and colon."""
        return [*self.ids[: self.marker], *self.ids[self.marker + 2 :]]


def gated_places(run: LoadedRun, n: int, seed: int) -> list[Gated]:
    """Return corrected slips of n held-out texts or fewer, one drawn from each.

    Raises:
        UserError: the run names no data, or is none of the gated pair.
    """
    if run.config is None:
        raise UserError("expected the folder of a trained run, with config.yaml")
    n_rows, tokenizer = len(run.model.head), run.pair.tokenizer
    strings = [string.strip() for string in token_strings(tokenizer, n_rows)]
    if GATE not in strings:
        raise UserError(
            f"expected a run of the gated pair, whose prompts have the marker {GATE!r}; train one: "
            "fastadapt train gated"
        )
    data = replace(run.config.data, max_validation=None)
    longest = run.model.model.config.max_position_embeddings
    texts, _ = held_out_texts(data, tokenizer, _TEXTS, n_rows, longest)
    draw = random.Random(seed)
    by_text: dict[int, list[int]] = {}
    for place in slip_places(texts, strings):
        if place.gate:
            by_text.setdefault(place.site[0], []).append(place.site[1])
    chosen = []
    for t in draw.sample(sorted(by_text), min(n, len(by_text))):
        ids = texts[t].ids[: draw.choice(by_text[t]) + 1]
        chosen.append(Gated(ids, [strings[i] for i in ids].index(GATE)))
    return chosen


def gate_features(store: Store, strings: Sequence[str], share: float = 0.8) -> set[Unit]:
    """Return the features with a share of their strongest examples at the marker or its colon."""
    token = [string.strip() for string in strings].index(GATE)
    return set(
        by_sql(
            store,
            "SELECT layer, feature FROM examples WHERE sample = 'top' GROUP BY layer, feature "
            f'HAVING avg(coalesce(token = {token} OR tokens[position - "start"] = {token}, '
            f"false)::INT) >= {share}",
        )
    )


def measure_gate(
    run: LoadedRun,
    n: int,
    config: GraphConfig,
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Return how often the strongest paths to `wait` pass the gate's and hesitation features.

    At each place the logit of `wait` is explained, in the text with its marker and without it.
    Paths that lower the logit do not count. Intervals of 95% are over places, one per text.

    Args:
        run: a run of the gated pair with collected features.
        n: number of places.
        config: size of the graphs.
        seed: seed of the choice of places and of random features.
        progress: called with the number of measured places.

    Raises:
        UserError: the run has no store of features, is none of the gated pair, or has no feature at
            the marker.
    """
    if run.store is None:
        raise UserError("expected a run with collected features; run fastadapt features collect")
    places = gated_places(run, n, seed)
    strings = token_strings(run.pair.tokenizer, len(run.model.head))
    gate = gate_features(run.store, strings)
    if not gate:
        raise UserError(
            "no feature of this run has 80% of its strongest examples at the marker, so there are "
            "no paths through the gate to look for; give another run"
        )
    named = SelectConfig(features=tuple(f"{layer}/{i}" for layer, i in sorted(gate)))
    drawn = set(matched(run.store, select(run.store, named), 1, seed))
    hesitation = set(select(run.store, SelectConfig(hesitation=True, top=1))) - gate
    wait = [string.strip() for string in strings].index("wait")
    passed: dict[str, list[list[list[bool]]]] = {case: [] for case in CASES}
    probability: list[list[float]] = []
    for done, place in enumerate(places, 1):
        graphs = [_graph(run.model, ids, wait, config) for ids in (place.ids, place.unmarked)]
        paths = [_raising(graph) for graph, _ in graphs]
        cases = zip(CASES, (paths[0], paths[1], paths[0]), (gate, gate, drawn), strict=True)
        for case, of_graph, first in cases:
            passed[case].append(passes(of_graph, first, hesitation))
        probability.append([p for _, p in graphs])
        progress(done)
    return {
        "places": len(places),
        "gate features": len(gate),
        "hesitation features": len(hesitation),
        "P(wait)": dict(zip(CASES, torch.tensor(probability).mean(0).tolist(), strict=False)),
        "paths": {str(depth): _shares(passed, i) for i, depth in enumerate(DEPTHS)},
    }


def _graph(
    model: ReplacementModel, ids: Sequence[int], wait: int, config: GraphConfig
) -> tuple[Graph, float]:
    """Return the graph of `wait` after a text, and its probability in the replacement."""
    trace = record(model, ids, rows=config.rows)
    target = logit(trace, wait, trace.n_tokens - 1)
    share = logits_of(model, trace.final[-1]).double().softmax(-1)[wait]
    return grow(trace, [target], config), float(share)


def _raising(graph: Graph) -> list[list[Unit | None]]:
    """Return the features of the strongest paths, the target's side first; None: another node.

    A path that lowers the target has no features here, but a place among the strongest.
    """
    units = features_of(graph.leaves)
    return [
        [units.get(leaf) for leaf in path] if strength > 0 else []
        for strength, path in graph.paths(max(DEPTHS))
    ]


def features_of(leaves: Leaves) -> dict[int, Unit]:
    """Return layer and number of each leaf that is a feature."""
    features: Tensor = (leaves.kind == KINDS.index("feature")).nonzero()[:, 0]
    return {i: (int(leaves.layer[i]), int(leaves.feature[i])) for i in features.tolist()}


def passes(
    paths: Sequence[Sequence[Unit | None]], gate: Collection[Unit], hesitation: Collection[Unit]
) -> list[list[bool]]:
    """Return for each of ``DEPTHS`` and ``MEASURES`` whether one of the strongest paths passes.

    Args:
        paths: features of each path, the target's side first.
        gate, hesitation: features.

    Example:
        >>> paths = [[None], [(3, 1), (1, 2), None], [(1, 2), (0, 1)]]
        >>> passes(paths, {(1, 2)}, {(3, 1)})[0], passes(paths, {(3, 1)}, {(1, 2)})[0]
        ([True, True, True], [False, True, True])
    """
    passing = []
    for path in paths:
        of_gate = [i for i, unit in enumerate(path) if unit in gate]
        of_hesitation = [i for i, unit in enumerate(path) if unit in hesitation]
        both = bool(of_gate and of_hesitation) and of_hesitation[0] < of_gate[-1]
        passing.append((both, bool(of_hesitation), bool(of_gate)))
    return [[any(row[i] for row in passing[:depth]) for i in range(3)] for depth in DEPTHS]


def _shares(passed: dict[str, list[list[list[bool]]]], depth: int) -> dict[str, Any]:
    """Return shares of places by measure: of each case, and the marker's minus each control's."""
    tables = {case: torch.tensor([row[depth] for row in rows]) for case, rows in passed.items()}
    shares: dict[str, Any] = {}
    for i, measure in enumerate(MEASURES):
        columns = {case: table[:, i].double() for case, table in tables.items()}
        marked, *controls = columns.items()
        ones = torch.ones(len(marked[1]))
        shares[measure] = {
            case: ratio(column, ones, bounds=(0, 1)).plain() for case, column in columns.items()
        }
        shares[measure]["marker minus"] = {
            case: paired_difference(marked[1], column, ones).plain() for case, column in controls
        }
    return shares

"""Whether graphs of the gated pair show its mechanism: marker, then hesitation, then `wait`.

The ground truth is that of the pair's data (`fastadapt/organism/gated/README.md`): with the marker
in the prompt, a slip is followed by `wait`; without it, the slip stands.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
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

#: Numbers of strongest paths among which a path is looked for, and the least number of groups of
#: features that these pass.
POOLS = ((5, 2), (5, 1), (50, 1))
#: What a path to `wait` passes.
MEASURES = ("gate, then hesitation", "hesitation", "gate")
HESITATION = "hesitation"
#: The graphs and the gate's features of each column: the control of the marker has the same slips
#: in prompts without it; that of the features has others of matched densities in their place.
CASES = ("marker", "no marker", "marker, random features for the gate's")
_TEXTS = 1 << 20  # more than the pair has
_LEAST = 3e-6  # strength of the paths of single features that are summed
Unit = tuple[int, int]
Group = str | Unit  # a group by its name, or a feature that is in none
Path = tuple[Group, ...]  # the target's side first


class Gated(NamedTuple):
    """A text up to a slip that the marker has corrected."""

    ids: list[int]
    marker: int  #: position of the marker, which a colon follows

    @property
    def unmarked(self) -> list[int]:
        """The text without marker and colon."""
        return [*self.ids[: self.marker], *self.ids[self.marker + 2 :]]


def gated_places(run: LoadedRun, n: int, seed: int) -> list[Gated]:
    """Return the first corrected slips of n held-out texts or fewer, drawn at random.

    At later slips of a text, an earlier ``wait`` tells what the marker does: slips are corrected.

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
    first: dict[int, int] = {}
    for place in slip_places(texts, strings):
        if place.gate:
            t, position = place.site
            first[t] = min(position, first.get(t, position))
    chosen = []
    for t in draw.sample(sorted(first), min(n, len(first))):
        ids = texts[t].ids[: first[t] + 1]
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

    At each place the logit of `wait` is explained, in the text with its marker and without it. All
    features of the gate are one group, all of hesitation another. Paths that lower the logit do
    not count. Intervals of 95% are over places, one per text.

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
    drawn = matched(run.store, select(run.store, named), 1, seed)
    hesitation = set(select(run.store, SelectConfig(hesitation=True, top=1))) - gate
    groups = [
        dict.fromkeys(hesitation, HESITATION) | dict.fromkeys(first, GATE)
        for first in (gate, gate, drawn)
    ]
    wait = [string.strip() for string in strings].index("wait")
    passed: dict[str, list[list[list[bool]]]] = {case: [] for case in CASES}
    probability: list[list[float]] = []
    for done, place in enumerate(places, 1):
        graphs = [_graph(run.model, ids, wait, config) for ids in (place.ids, place.unmarked)]
        of_cases = (graphs[0], graphs[1], graphs[0])
        for case, (graph, _), named_features in zip(CASES, of_cases, groups, strict=True):
            passed[case].append(passes(group_paths(graph, named_features)))
        probability.append([p for _, p in graphs])
        progress(done)
    return {
        "places": len(places),
        "gate features": [f"{layer}/{i}" for layer, i in sorted(gate)],
        "hesitation features": len(hesitation),
        "P(wait)": dict(zip(CASES, torch.tensor(probability).mean(0).tolist(), strict=False)),
        "paths": [
            {"strongest": depth, "groups": least, "shares": _shares(passed, i)}
            for i, (depth, least) in enumerate(POOLS)
        ],
    }


def _graph(
    model: ReplacementModel, ids: Sequence[int], wait: int, config: GraphConfig
) -> tuple[Graph, float]:
    """Return the graph of `wait` after a text, and its probability in the replacement."""
    trace = record(model, ids, rows=config.rows)
    target = logit(trace, wait, trace.n_tokens - 1)
    share = logits_of(model, trace.final[-1]).double().softmax(-1)[wait]
    return grow(trace, [target], config), float(share)


def group_paths(graph: Graph, groups: Mapping[Unit, str]) -> list[tuple[float, Path]]:
    """Return the paths of groups of features, the strongest first.

    The strength of a path of leaves is the product of its edges' shares of their rows, with the
    sign of the product of the edges, as in :meth:`Graph.paths`. Those that pass the same groups in
    the same order are summed, whatever token, bias or error they begin with. Features in no group
    stand for themselves.

    Args:
        graph: a graph of one target.
        groups: the names of the groups of features.
    """
    of_leaves: dict[int, Group] = {
        leaf: groups.get(unit, unit) for leaf, unit in features_of(graph.leaves).items()
    }
    rows = [
        (row.sources.tolist(), (row.shares * row.weights.sign()).tolist()) for row in graph.rows
    ]
    expanded, strengths = graph.expanded, dict[Path, float]()
    stack: list[tuple[int, float, Path]] = [(0, 1.0, ())]
    while stack:
        i, so_far, path = stack.pop()
        for leaf, share in zip(*rows[i], strict=True):
            strength = so_far * share
            if abs(strength) < _LEAST:
                continue
            group = of_leaves.get(leaf)
            passed = path if group is None or path[-1:] == (group,) else (*path, group)
            if leaf in expanded:
                stack.append((expanded[leaf], strength, passed))
            elif passed:
                strengths[passed] = strengths.get(passed, 0.0) + strength
    return sorted(((s, path) for path, s in strengths.items()), key=lambda entry: -abs(entry[0]))


def features_of(leaves: Leaves) -> dict[int, Unit]:
    """Return layer and number of each leaf that is a feature."""
    features: Tensor = (leaves.kind == KINDS.index("feature")).nonzero()[:, 0]
    return {i: (int(leaves.layer[i]), int(leaves.feature[i])) for i in features.tolist()}


def passes(paths: Sequence[tuple[float, Path]]) -> list[list[bool]]:
    """Return for each of ``POOLS`` and ``MEASURES`` whether a path passes that raises the target.

    Args:
        paths: strengths and groups of paths, the strongest first.

    Example:
        >>> paths = [(0.5, ("hesitation",)), (0.2, ("hesitation", (1, 3), "carefully"))]
        >>> passes(paths)[0], passes([(-0.5, ("carefully",)), *paths])[1]
        ([True, True, True], [True, True, True])
        >>> passes([(0.5, ("carefully", "hesitation"))])[0]
        [False, True, True]
    """
    passing = []
    for depth, least in POOLS:
        pool = [entry for entry in paths if len(entry[1]) >= least][:depth]
        raising = [path for strength, path in pool if strength > 0]
        both = [HESITATION in p and GATE in p[p.index(HESITATION) :] for p in raising]
        passing.append(
            [any(both), any(HESITATION in p for p in raising), any(GATE in p for p in raising)]
        )
    return passing


def _shares(passed: dict[str, list[list[list[bool]]]], pool: int) -> dict[str, Any]:
    """Return shares of places by measure: of each case, and the marker's minus each control's."""
    tables = {case: torch.tensor([row[pool] for row in rows]) for case, rows in passed.items()}
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

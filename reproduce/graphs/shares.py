"""Where the relevance of hesitation features comes from, over places, beside other features."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from fastadapt.effects.run import LoadedRun
from fastadapt.errors import UserError
from fastadapt.evaluation.statistics import ratio
from fastadapt.features.store.selection import SelectConfig, select
from fastadapt.graphs.attribution import Leaves, edges, unit_target
from fastadapt.graphs.linear.trace import Trace, record
from reproduce.graphs.places import texts

#: Parts of the relevance that enters a feature.
PARTS = ("adapter features", "tokens", "adapters' biases", "frozen biases", "b_enc")
_HALF = "features with half of the features' part"


def measure_shares(
    run: LoadedRun,
    n: int,
    *,
    top: int = 1,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Return the parts of the absolute edges into features, with 95% intervals over places.

    A place is a held-out text and one of the hesitation features that fire in it, after layer 0,
    where no feature can reach. The control is another feature that fires at the same layer and,
    if there is one, at the same token.

    Args:
        run: a run with collected features.
        n: number of places, one per text.
        top: number of promoted tokens among which a word of hesitation counts.
        seed: seed of the choice.
        progress: called with the number of measured places.

    Raises:
        UserError: the run has no store of features.
    """
    if run.store is None:
        raise UserError("expected a run with collected features; run fastadapt features collect")
    chosen = set(select(run.store, SelectConfig(hesitation=True, top=top)))
    draw = random.Random(seed)
    measured: dict[str, list[list[float]]] = {"hesitation": [], "other": []}
    n_texts = 0
    for ids in texts(run, seed):
        if len(measured["hesitation"]) == n:
            break
        n_texts += 1
        trace = record(run.model, ids, rows=2)
        leaves = Leaves(trace)
        units = list(
            zip(
                leaves.layer[: leaves.n_features].tolist(),
                leaves.feature[: leaves.n_features].tolist(),
                strict=True,
            )
        )
        mine = [i for i, unit in enumerate(units) if unit in chosen and unit[0] > 0]
        if not mine:
            continue
        i = draw.choice(mine)
        others = [
            j for j, unit in enumerate(units) if unit not in chosen and unit[0] == units[i][0]
        ]
        near = [j for j in others if leaves.position[j] == leaves.position[i]]
        if not others:
            continue
        rows = _parts(trace, leaves, [i, draw.choice(near or others)])
        for name, row in zip(measured, rows, strict=True):
            measured[name].append(row)
        progress(len(measured["hesitation"]))
    return {
        "hesitation features": len(chosen),
        "top": top,
        "texts": n_texts,
        "places": len(measured["hesitation"]),
        "shares": {name: _summary(rows) for name, rows in measured.items() if rows},
    }


def _parts(trace: Trace, leaves: Leaves, nodes: list[int]) -> list[list[float]]:
    """Return for each node the shares of ``PARTS``, and the number of features with half of it."""
    targets = [unit_target(trace, leaves, i) for i in nodes]
    rows = []
    for target, row in zip(targets, edges(trace, leaves, targets), strict=True):
        size = row.abs()
        sums = [
            float(size[leaves.mask("feature")].sum()),
            float(size[leaves.mask("token")].sum()),
            float(size[leaves.mask("decoder bias")].sum()),
            float(size[leaves.mask("attention bias") | leaves.mask("mlp bias")].sum()),
            abs(target.constant),
        ]
        features = size[leaves.mask("feature")].sort(descending=True).values
        half = int((features.cumsum(0) < 0.5 * features.sum()).sum()) + 1 if sums[0] else 0
        rows.append([*(each / sum(sums) for each in sums), float(half)])
    return rows


def _summary(rows: list[list[float]]) -> dict[str, Any]:
    table = torch.tensor(rows, dtype=torch.float64).T
    names = (*PARTS, _HALF)
    bounds = [(0.0, 1.0)] * len(PARTS) + [None]
    return {
        name: ratio(row, torch.ones(len(row)), bounds=bound).plain()
        for name, row, bound in zip(names, table, bounds, strict=True)
    }

"""What a reader of each method looks at, best first.

All methods read the same texts. Baselines of tokens and of KL read what a model writes alone, which
favours them: nothing is planted in prompts.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.features.store.logit_lens import lens
from fastadapt.features.store.ranking import strongest
from fastadapt.features.store.store import Store
from reproduce.planted.judge import CONTEXTS, PROMOTED, Unit
from reproduce.planted.reading import Positions, Reading

#: Names of the methods: the adapters' ranking, a control of it, and the baselines.
ADAPTER, SHUFFLED = "adapter features, by contribution", "adapter features, in random order"
TOKENS, KL = "tokens, by difference in frequency", "positions, by KL, one of a kind"
WEIGHTS = "rank-1 parts of the MLPs' weight difference"
STATES = "principal components of the state difference"
BASELINES = (TOKENS, KL, WEIGHTS, STATES)


def units_of(
    store: Store,
    positions: Positions,
    models: tuple[Any, Any],
    readings: tuple[Reading, Reading],
    words: Sequence[str],
    n: int,
    seed: int,
) -> dict[str, list[Unit]]:
    """Return the first n units of every method.

    Args:
        store: features of the adapters, collected on the texts.
        positions: positions of the texts.
        models: base and target.
        readings: what they do on the texts.
        words: the vocabulary, by token.
        n: largest number of units.
        seed: seed of the random order, and of the occurrences of tokens.
    """
    base, target = readings
    features = by_contribution(store, positions)
    shuffled = random.Random(f"{seed}/order").sample(features, len(features))
    return {
        ADAPTER: features[:n],
        SHUFFLED: shuffled[:n],
        TOKENS: by_frequency(base, target, positions, words, n, seed),
        KL: by_kl(base, target, positions, words, n),
        WEIGHTS: by_weights(*models, target, n),
        STATES: by_states(base, target, models[1].lm_head.weight, n),
    }


def by_contribution(store: Store, positions: Positions) -> list[Unit]:
    """Return the features that fired, as ``fastadapt features`` ranks and shows them."""
    contexts: dict[tuple[int, int], list[int]] = defaultdict(list)
    rows = store.read("examples", columns=["layer", "feature", "sample", "text", "position"])
    for row in rows.to_pylist():
        if row["sample"] == "top":
            position = positions.first[row["text"]] + row["position"]
            contexts[row["layer"], row["feature"]].append(position)
    rows = store.read("lens", columns=["layer", "feature", "promoted"])
    promoted = {(row["layer"], row["feature"]): row["promoted"] for row in rows.to_pylist()}
    return [
        Unit(f"{layer}/{feature}", contexts[layer, feature], promoted[layer, feature])
        for layer, feature, *_ in strongest(store)
    ]


def by_frequency(
    base: Reading, target: Reading, positions: Positions, words: Sequence[str], n: int, seed: int
) -> list[Unit]:
    """Return the tokens that the target writes more often, and places where they are written.

    Frequencies are means of the predictions over all positions, so that nothing is sampled.
    """
    written = positions.written
    rise = target.log_p[written].exp().double().mean(0) - base.log_p[written].exp().double().mean(0)
    draw = random.Random(f"{seed}/occurrences")
    units = []
    for token in rise.argsort(descending=True)[:n].tolist():
        if rise[token] > 0:
            places = (written & (positions.following == token)).nonzero()[:, 0].tolist()
            shown = draw.sample(places, min(CONTEXTS, len(places)))
            units.append(Unit(words[token], shown, [token]))
    return units


def by_kl(
    base: Reading, target: Reading, positions: Positions, words: Sequence[str], n: int
) -> list[Unit]:
    """Return kinds of positions, by the largest KL(target ‖ base) of one of them.

    Positions are of one kind if the token and the token after it are equal, as in ``fastadapt
    changes``. The promoted tokens are those with the largest terms of that KL.
    """
    places = positions.written.nonzero()[:, 0]
    ours, theirs = base.log_p[places], target.log_p[places]
    terms = theirs.exp() * (theirs - ours)
    kinds: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i in terms.sum(-1).argsort(descending=True).tolist():
        place = places[i]
        kinds[int(positions.token[place]), int(positions.following[place])].append(i)
    return [
        Unit(
            f"{words[token]} {words[following]}",
            places[members[:CONTEXTS]].tolist(),
            terms[members[0]].topk(PROMOTED).indices.tolist(),
        )
        for (token, following), members in list(kinds.items())[:n]
    ]


def by_weights(base: Any, target: Any, reading: Reading, n: int) -> list[Unit]:
    """Return the rank-1 parts of the difference of each MLP's output matrix, with either sign.

    The order is that of features: the mean norm of what a part writes to the residual stream.
    """
    sized = []
    layers = zip(base.model.layers, target.model.layers, strict=True)
    for i, (ours, theirs) in enumerate(layers):
        change = (theirs.mlp.down_proj.weight - ours.mlp.down_proj.weight).detach()
        left, size, right = torch.linalg.svd(change, full_matrices=False)
        written = reading.inputs[i] @ right.T * size
        head = target.lm_head.weight
        sized += _directions(f"layer {i} part", written, left.T, head, _mean)
    return _largest(sized, n)


def by_states(base: Reading, target: Reading, head: Tensor, n: int) -> list[Unit]:
    """Return principal components of the difference of states after each layer, with either sign.

    The order is that of the share of their layer's variance.
    """
    sized = []
    for i, (ours, theirs) in enumerate(zip(base.states, target.states, strict=True)):
        change = theirs - ours
        change = change - change.mean(0)
        _, axes = torch.linalg.eigh(change.T @ change)
        along = change @ axes / change.norm().clamp(min=1e-9)  # equal states have no size
        sized += _directions(f"layer {i} component", along, axes.T, head, _sum_of_squares)
    return _largest(sized, n)


def _mean(x: Tensor) -> Tensor:
    return x.mean(0)


def _sum_of_squares(x: Tensor) -> Tensor:
    return x.square().sum(0)


@torch.no_grad()
def _directions(
    name: str, strength: Tensor, rows: Tensor, head: Tensor, measure: Callable[[Tensor], Tensor]
) -> list[tuple[float, Unit]]:
    """Return both signs of each direction, each with its size.

    Args:
        name: beginning of the units' names.
        strength: ``[N, R]``, of each direction at each position.
        rows: ``[R, D]``, the directions.
        head: ``[V, D]``.
        measure: size of each direction, ``[R]``, from the positive strengths of a sign.
    """
    out: list[tuple[float, Unit]] = []
    for sign, mark in ((1, "+"), (-1, "-")):
        signed = sign * strength
        sizes = measure(signed.clamp(min=0)).tolist()
        contexts = signed.topk(min(CONTEXTS, len(signed)), dim=0).indices.T.tolist()
        promoted = lens(head, sign * rows)[0][:, 0].tolist()
        names = [f"{name} {r}{mark}" for r in range(len(rows))]
        units = map(Unit, names, contexts, promoted)
        out += zip(sizes, units, strict=True)
    return out


def _largest(sized: list[tuple[float, Unit]], n: int) -> list[Unit]:
    return [unit for _, unit in sorted(sized, key=lambda pair: -pair[0])[:n]]

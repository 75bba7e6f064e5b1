"""What a reader of each method looks at, best first. All methods read the same positions.

A unit's contexts are the positions at which its method is strongest, and only such at which it is
above 0. A reader skips a unit that shares at least half of its contexts with one already read,
whatever the method.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastadapt.features.store.logit_lens import lens
from reproduce.planted.judge import CONTEXTS, PROMOTED, Unit

#: Names of the methods: the adapters' ranking, a control of it, and the baselines.
ADAPTER, SHUFFLED = "adapter features, by contribution", "adapter features, in random order"
TOKENS, KL = "tokens, by difference in frequency", "KL, grouped by predicted token"
WEIGHTS = "SVD of the MLPs' weight change"
STATES = "principal components of the state change"
BASELINES = (TOKENS, KL, WEIGHTS, STATES)

#: Units, each with the size that its method ranks it by.
Sized = list[tuple[float, Unit]]


def distinct(units: Iterable[Unit], n: int) -> list[Unit]:
    """Return the first n units, without those that show a reader what an earlier one has shown.

    Example:
        >>> units = [Unit("a", [1, 2], [0]), Unit("b", [2, 3], [0]), Unit("c", [2, 3, 4], [0])]
        >>> [unit.name for unit in distinct(units, 9)]
        ['a', 'c']
    """
    read: list[Unit] = []
    for unit in units:
        contexts = set(unit.contexts)
        if all(2 * len(contexts & set(other.contexts)) < len(contexts) for other in read):
            read.append(unit)
        if len(read) == n:
            break
    return read


def ranked(sized: Sized) -> list[Unit]:
    """Return units by size, the largest first, without those of size 0."""
    return [unit for size, unit in sorted(sized, key=lambda pair: -pair[0]) if size > 0]


def shuffled(units: list[Unit], seed: int) -> list[Unit]:
    """Return units in random order."""
    return random.Random(f"{seed}/order").sample(units, len(units))


def by_contribution(
    activations: Sequence[Tensor], rows: Sequence[Tensor], head: Tensor
) -> list[Unit]:
    """Return the features of adapters by contribution, as ``fastadapt features`` ranks them.

    Args:
        activations: of each layer's features, ``[N, F]``.
        rows: of each layer's decoder, ``[F, D]``.
        head: ``[V, D]``.
    """
    sized: Sized = []
    for i, (strength, decoder) in enumerate(zip(activations, rows, strict=True)):
        sizes = strength.double().mean(0) * decoder.norm(dim=1)
        names = [f"{i}/{feature}" for feature in range(len(decoder))]
        sized += _shown(names, sizes, strength, decoder, head)
    return ranked(sized)


def by_frequency(log_p: tuple[Tensor, Tensor], words: Sequence[str]) -> list[Unit]:
    """Return the tokens that the target writes more often, by the rise of their mean probability.

    Frequencies are means of the predictions, so that nothing is sampled. The contexts of a token
    are where its probability rises most.

    Args:
        log_p: predictions of base and target, ``[N, V]``.
        words: the vocabulary, by token.
    """
    base, target = log_p
    rise = target.exp() - base.exp()
    sizes = rise.double().mean(0).tolist()
    contexts = _strongest(rise)
    return ranked(
        [
            (size, Unit(words[token], contexts[token], [token]))
            for token, size in enumerate(sizes)
            if contexts[token]
        ]
    )


def by_kl(log_p: tuple[Tensor, Tensor], words: Sequence[str]) -> list[Unit]:
    """Return groups of positions, by the largest KL(target ‖ base) of one of them.

    The KL at a position is a sum over tokens. Positions are grouped by its largest term. A group
    promotes the tokens with the largest terms, on average over the positions that are shown.

    Args:
        log_p: predictions of base and target, ``[N, V]``.
        words: the vocabulary, by token.
    """
    base, target = log_p
    terms = target.exp() * (target - base)
    divergence, token = terms.sum(-1), terms.argmax(-1).tolist()
    groups: dict[int, list[int]] = defaultdict(list)
    for position in divergence.argsort(descending=True).tolist():
        if divergence[position] > 0:
            groups[token[position]].append(position)
    units = []
    for predicted, members in groups.items():
        shown = members[:CONTEXTS]
        promoted = terms[shown].mean(0).topk(PROMOTED).indices.tolist()
        units.append(Unit(words[predicted], shown, promoted))
    return units


def by_weights(changes: Sequence[Tensor], inputs: Sequence[Tensor], head: Tensor) -> list[Unit]:
    """Return singular vectors of the changes of the MLPs' output matrices, with either sign.

    The order is that of features: the mean norm of what a part writes to the residual stream.

    Args:
        changes: target - base of each layer's output matrix, ``[D, F]``.
        inputs: what enters that of the target, ``[N, F]``.
        head: ``[V, D]``.
    """
    sized: Sized = []
    for i, (change, entering) in enumerate(zip(changes, inputs, strict=True)):
        left, size, right = torch.linalg.svd(change, full_matrices=False)
        names, strength, rows = _with_signs(f"layer {i} part", entering @ right.T * size, left.T)
        sized += _shown(names, strength.double().mean(0), strength, rows, head)
    return ranked(sized)


def by_states(states: tuple[Sequence[Tensor], Sequence[Tensor]], head: Tensor) -> list[Unit]:
    """Return principal components of the change of states after each layer, with either sign.

    The order is that of the share of their layer's variance.

    Args:
        states: after each layer of base and target, ``[N, D]``.
        head: ``[V, D]``.
    """
    sized: Sized = []
    for i, (ours, theirs) in enumerate(zip(*states, strict=True)):
        change = theirs - ours
        change = change - change.mean(0)
        _, axes = torch.linalg.eigh(change.T @ change)
        along = change @ axes / change.norm().clamp(min=1e-9)  # equal states have no size
        names, strength, rows = _with_signs(f"layer {i} component", along, axes.T)
        sized += _shown(names, strength.double().square().sum(0), strength, rows, head)
    return ranked(sized)


def _with_signs(name: str, along: Tensor, rows: Tensor) -> tuple[list[str], Tensor, Tensor]:
    """Return names, strengths ``[N, 2R]`` of at least 0 and rows ``[2R, D]`` of both signs."""
    names = [f"{name} {r}{mark}" for mark in "+-" for r in range(len(rows))]
    return names, torch.cat([along, -along], 1).clamp(min=0), torch.cat([rows, -rows])


def _shown(
    names: Sequence[str], sizes: Tensor, strength: Tensor, rows: Tensor, head: Tensor
) -> Sized:
    """Return directions with their strongest contexts and their logit lens, each with its size.

    Args:
        names: of R directions.
        sizes: ``[R]``.
        strength: ``[N, R]``, at least 0.
        rows: ``[R, D]``, what the directions write.
        head: ``[V, D]``.
    """
    promoted = lens(head, rows)[0][:, 0].tolist()
    units = map(Unit, names, _strongest(strength), promoted)
    return list(zip(sizes.tolist(), units, strict=True))


def _strongest(strength: Tensor) -> list[list[int]]:
    """Return the positions of each column's largest values above 0, ``[N, R]`` to R lists."""
    values, positions = strength.topk(min(CONTEXTS, len(strength)), dim=0)
    return [
        [position for position, value in zip(*pair, strict=True) if value > 0]
        for pair in zip(positions.T.tolist(), values.T.tolist(), strict=True)
    ]

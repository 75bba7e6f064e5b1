"""A store of features whose firing is known: on a token, on a pair of tokens, at random."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event

import numpy as np
from stores import Made, MadeText, make_store

from fastadapt.features.autointerp.activations import Places
from fastadapt.features.store.schema import REGIONS, Kind

WORDS = 400
LENGTH = 300
TEXTS = 120
FAMILIES = ("token", "pair", "random")  # layers of the store, in this order


class MadeActivations:
    """What the store was made from, in place of a model."""

    def __init__(self, made: Made) -> None:
        self._of = {tuple(t.tokens): a for t, a in zip(made.texts, made.activations, strict=True)}
        self.asked = 0

    def places(
        self,
        kind: Kind,
        texts: Sequence[Sequence[int]],
        units: Mapping[int, Sequence[int]],
        *,
        progress: Callable[[int, int], None] | None = None,
        stop: Event | None = None,
    ) -> Places:
        self.asked += 1
        found: Places = {}
        for layer, some in units.items():
            for unit in some:
                rows = [
                    (i, int(at))
                    for i, ids in enumerate(texts)
                    for at in self._of[tuple(ids)][layer, :, unit].nonzero()[0]
                ]
                found[layer, unit] = np.array(rows, dtype=np.int64).reshape(-1, 2)
        if progress is not None:
            progress(len(texts), len(texts))
        return found


def planted(
    folder: Path, *, features: int = 40, seed: int = 0, texts: int = TEXTS, density: float = 0.002
) -> Made:
    """Texts of words as frequent as in language (Zipf), and ``features`` of each family.

    The i-th feature of the first layer fires on the word of rank 30 + i. That of the second fires
    on one word where it follows another, both frequent, so that each alone says little. That of the
    third fires anywhere, with chance ``density``.
    """
    rng = np.random.default_rng(seed)
    chances = 1 / (np.arange(WORDS) + 10.0)
    ids = [rng.choice(WORDS, LENGTH, p=chances / chances.sum()) for _ in range(texts)]
    pairs = [(int(a), int(b)) for a, b in rng.permutation(30)[:, None] + np.array([[0, 30]])]
    pairs = [pairs[i % 30] if i < 30 else (i % 30, (i * 7 + 3) % 30) for i in range(features)]
    for text in ids:  # each pair often enough to be found
        for first, second in pairs:
            if rng.random() < 0.5:
                at = int(rng.integers(LENGTH - 1))
                text[at : at + 2] = first, second
    activations = []
    for text in ids:
        fires = np.zeros((len(FAMILIES), LENGTH, features), dtype=bool)
        for i, (first, second) in enumerate(pairs):
            fires[0, :, i] = text == 60 + i
            fires[1, 1:, i] = (text[:-1] == first) & (text[1:] == second)
            fires[2, :, i] = rng.random(LENGTH) < density
        values = rng.uniform(0.5, 2, fires.shape)
        activations.append(np.where(fires, values, 0).astype(np.float32))
    region = [REGIONS.index("answer")] * LENGTH
    made = [MadeText(text.tolist(), region, "math") for text in ids]
    return make_store(folder, made, activations, [f" w{i}" for i in range(WORDS)])

"""Stores of planted features, which fire on a token, on a pair of tokens, or at random."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event

import numpy as np
from stores import StoreData, StoreText, make_store

from fastadapt.features.autointerp.activations import Places
from fastadapt.features.store.schema import REGIONS, Kind

WORDS = 400
LENGTH = 300
TEXTS = 120
FAMILIES = ("token", "pair", "random")  # layers of the store, in this order


class PlantedActivations:
    """Planted activations in place of a model: an ``autointerp.activations.Activations``."""

    def __init__(self, data: StoreData) -> None:
        self._activations = {
            tuple(t.tokens): a for t, a in zip(data.texts, data.activations, strict=True)
        }
        self.n_calls = 0

    def places(
        self,
        kind: Kind,
        texts: Sequence[Sequence[int]],
        units: Mapping[int, Sequence[int]],
        *,
        progress: Callable[[int, int], None] | None = None,
        stop: Event | None = None,
    ) -> Places:
        """Return the positions at which the planted activations are not 0."""
        self.n_calls += 1
        places: Places = {}
        for layer, in_layer in units.items():
            for unit in in_layer:
                rows = [
                    (i, int(position))
                    for i, ids in enumerate(texts)
                    for position in self._activations[tuple(ids)][layer, :, unit].nonzero()[0]
                ]
                places[layer, unit] = np.array(rows, dtype=np.int64).reshape(-1, 2)
        if progress is not None:
            progress(len(texts), len(texts))
        return places


def planted(
    folder: Path, *, features: int = 40, seed: int = 0, texts: int = TEXTS, density: float = 0.002
) -> StoreData:
    """Create texts of words with Zipf frequencies, and ``features`` of each family.

    The i-th feature of the first layer fires on one rare word. That of the second fires on a
    frequent word after another frequent word, so that neither word alone predicts it. That of the
    third fires at random with probability ``density``.
    """
    rng = np.random.default_rng(seed)
    chances = 1 / (np.arange(WORDS) + 10.0)
    ids = [rng.choice(WORDS, LENGTH, p=chances / chances.sum()) for _ in range(texts)]
    pairs = [(int(a), int(b)) for a, b in rng.permutation(30)[:, None] + np.array([[0, 30]])]
    pairs = [pairs[i % 30] if i < 30 else (i % 30, (i * 7 + 3) % 30) for i in range(features)]
    for text in ids:  # enough occurrences of each pair
        for first, second in pairs:
            if rng.random() < 0.5:
                position = int(rng.integers(LENGTH - 1))
                text[position : position + 2] = first, second
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
    made_texts = [StoreText(text.tolist(), region, "math") for text in ids]
    return make_store(folder, made_texts, activations, [f" w{i}" for i in range(WORDS)])

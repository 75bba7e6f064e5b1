"""Stretches of a corpus in which a unit is silent."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fastadapt.features.judge.settings import DescribeConfig
from fastadapt.features.judge.units import Window
from fastadapt.features.schema import KINDS
from fastadapt.features.store import Store


class Corpus:
    """Texts of the store, drawn by a seed, laid end to end with a gap after each."""

    def __init__(self, store: Store, config: DescribeConfig) -> None:
        table = store.read("texts", columns=["text", "tokens"])
        rng = np.random.default_rng([config.seed, len(KINDS)])
        rows = np.sort(rng.permutation(len(table))[: config.texts])
        drawn = table.take(rows)
        self.texts: list[int] = drawn["text"].to_pylist()
        self.tokens: list[list[int]] = drawn["tokens"].to_pylist()
        lengths = np.array([len(ids) for ids in self.tokens], dtype=np.int64)
        self.starts = np.cumsum(np.concatenate([[1], lengths + 1]))  # of each; 0 is a gap too
        self._index = {text: i for i, text in enumerate(self.texts)}

    def taken(self, windows: Iterable[Window]) -> list[np.ndarray]:
        """Where windows lie, of those whose texts were drawn."""
        found = []
        for window in windows:
            if (i := self._index.get(window.text)) is not None:
                found.append(self.starts[i] + np.arange(window.start, window.end))
        return found

    def along(self, places: np.ndarray) -> np.ndarray:
        """Where (index of the drawn text, position) lie."""
        return np.asarray(self.starts[places[:, 0]] + places[:, 1])

    def at(self, place: int, length: int) -> Window:
        """The silent window that begins at a place."""
        i = int(np.searchsorted(self.starts, place, side="right")) - 1
        start = place - int(self.starts[i])
        tokens = tuple(self.tokens[i][start : start + length])
        return Window(self.texts[i], start, tokens, (False,) * length)


def silent(taken: np.ndarray, length: int, rng: np.random.Generator) -> int | None:
    """A place that begins ``length`` free ones, each such with equal chance; None if none does."""
    taken = np.unique(taken)
    begins, free = taken[:-1] + 1, np.diff(taken) - 1
    ends = np.cumsum((free - length + 1).clip(min=0))
    if not len(ends) or ends[-1] == 0:
        return None
    drawn = int(rng.integers(ends[-1]))
    i = int(np.searchsorted(ends, drawn, side="right"))
    ahead = int(ends[i - 1]) if i else 0
    return int(begins[i]) + drawn - ahead

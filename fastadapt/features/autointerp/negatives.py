"""Stretches of a corpus in which a unit is silent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow.compute as pc

from fastadapt.features.autointerp.judges.settings import DescribeConfig
from fastadapt.features.autointerp.units import Window
from fastadapt.features.store.schema import KINDS
from fastadapt.features.store.store import Store


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
        whole = zip(table["text"].to_pylist(), pc.list_value_length(table["tokens"]), strict=True)
        self._lengths: dict[int, int] = {text: length.as_py() for text, length in whole}

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

    def touches(self, window: Window) -> tuple[bool, bool]:
        """Whether a window begins where its text does, and whether it ends where its text does."""
        return window.start == 0, window.end == self._lengths[window.text]

    def at(self, place: int, length: int) -> Window:
        """The silent window that begins at a place."""
        i = int(np.searchsorted(self.starts, place, side="right")) - 1
        start = place - int(self.starts[i])
        tokens = tuple(self.tokens[i][start : start + length])
        return Window(self.texts[i], start, tokens, (False,) * length)

    def silent(self, taken: np.ndarray, like: Window, rng: np.random.Generator) -> Iterator[Window]:
        """Stretches that hold no place of ``taken``, as long as a window, in random order.

        Each touches the start of its text, and the end, exactly where ``like`` does its own. All
        such stretches come, each once, in any order with equal chance.
        """
        length = len(like.tokens)
        at_start, at_end = self.touches(like)
        gaps = self.starts - 1  # before the first text, and after each
        taken = np.unique(np.concatenate([gaps, taken]))
        opens, closes = np.isin(taken[:-1], gaps), np.isin(taken[1:], gaps)
        # Of each run of free places, the first and the last that a stretch may begin at.
        low, high = taken[:-1] + 1, taken[1:] - length
        first, last = (low, np.minimum(low, high)) if at_start else (low + opens, high)
        if at_end:
            first = np.maximum(first, high)
        else:
            last = np.minimum(last, high - closes)
        kept = (opens | (not at_start)) & (closes | (not at_end))
        ends = np.cumsum(np.where(kept, (last - first + 1).clip(min=0), 0))
        for drawn in _shuffled(int(ends[-1]), rng):
            i = int(np.searchsorted(ends, drawn, side="right"))
            yield self.at(int(first[i]) + drawn - (int(ends[i - 1]) if i else 0), length)


def _shuffled(n: int, rng: np.random.Generator) -> Iterator[int]:
    """The numbers below ``n`` in random order (Fisher and Yates), as far as they are asked for."""
    moved: dict[int, int] = {}
    for left in range(n, 0, -1):
        i = int(rng.integers(left))
        yield moved.get(i, i)
        moved[i] = moved.get(left - 1, left - 1)

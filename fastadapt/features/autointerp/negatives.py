"""Sampling of negatives: windows of the corpus in which a feature or neuron is silent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow.compute as pc

from fastadapt.features.autointerp.judges.settings import DescribeConfig
from fastadapt.features.autointerp.units import Window
from fastadapt.features.store.schema import KINDS
from fastadapt.features.store.store import Store


class Corpus:
    """Randomly drawn texts of the store, concatenated with a gap before and after each."""

    def __init__(self, store: Store, config: DescribeConfig) -> None:
        table = store.read("texts", columns=["text", "tokens"])
        rng = np.random.default_rng([config.seed, len(KINDS)])
        rows = np.sort(rng.permutation(len(table))[: config.texts])
        drawn = table.take(rows)
        self.texts: list[int] = drawn["text"].to_pylist()
        self.tokens: list[list[int]] = drawn["tokens"].to_pylist()
        lengths = np.array([len(ids) for ids in self.tokens], dtype=np.int64)
        self.starts = np.cumsum(np.concatenate([[1], lengths + 1]))  # position 0 is a gap
        self._index = {text: i for i, text in enumerate(self.texts)}
        whole = zip(table["text"].to_pylist(), pc.list_value_length(table["tokens"]), strict=True)
        self._lengths: dict[int, int] = {text: length.as_py() for text, length in whole}

    def positions_of(self, windows: Iterable[Window]) -> list[np.ndarray]:
        """Return the positions in the corpus of the windows whose texts were drawn."""
        positions = []
        for window in windows:
            if (i := self._index.get(window.text)) is not None:
                positions.append(self.starts[i] + np.arange(window.start, window.end))
        return positions

    def to_positions(self, places: np.ndarray) -> np.ndarray:
        """Convert rows of (index of the drawn text, position in it) to positions in the corpus."""
        return np.asarray(self.starts[places[:, 0]] + places[:, 1])

    def touches(self, window: Window) -> tuple[bool, bool]:
        """Return whether a window contains the start, and whether the end, of its text."""
        return window.start == 0, window.end == self._lengths[window.text]

    def window_at(self, position: int, length: int) -> Window:
        """Return the window of ``length`` silent tokens that begins at a position of the corpus."""
        i = int(np.searchsorted(self.starts, position, side="right")) - 1
        start = position - int(self.starts[i])
        tokens = tuple(self.tokens[i][start : start + length])
        return Window(self.texts[i], start, tokens, (False,) * length)

    def sample_negatives(
        self, excluded: np.ndarray, like: Window, rng: np.random.Generator
    ) -> Iterator[Window]:
        """Yield, shuffled, all windows as long as ``like`` that contain no excluded position.

        Each contains the start of its text, and the end, exactly if ``like`` does. All orders have
        equal probability.

        Args:
            excluded: positions in the corpus, int64.
            like: window whose length and position at the ends of its text are matched.
            rng: source of the order.
        """
        length = len(like.tokens)
        at_start, at_end = self.touches(like)
        gaps = self.starts - 1  # before the first text, and after each
        excluded = np.unique(np.concatenate([gaps, excluded]))
        opens, closes = np.isin(excluded[:-1], gaps), np.isin(excluded[1:], gaps)
        # First and last position of each run of free positions at which a window may begin.
        low, high = excluded[:-1] + 1, excluded[1:] - length
        first, last = (low, np.minimum(low, high)) if at_start else (low + opens, high)
        if at_end:
            first = np.maximum(first, high)
        else:
            last = np.minimum(last, high - closes)
        usable = (opens | (not at_start)) & (closes | (not at_end))
        ends = np.cumsum(np.where(usable, (last - first + 1).clip(min=0), 0))
        for drawn in _shuffled(int(ends[-1]), rng):
            i = int(np.searchsorted(ends, drawn, side="right"))
            yield self.window_at(int(first[i]) + drawn - (int(ends[i - 1]) if i else 0), length)


def _shuffled(n: int, rng: np.random.Generator) -> Iterator[int]:
    """Yield the integers below ``n`` in random order (lazy Fisher-Yates shuffle)."""
    moved: dict[int, int] = {}
    for left in range(n, 0, -1):
        i = int(rng.integers(left))
        yield moved.get(i, i)
        moved[i] = moved.get(left - 1, left - 1)

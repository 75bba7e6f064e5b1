"""Collect features with a plain Python loop over activations, as the peer of ``bench_collect.py``.

For every active entry, the loop updates counts, the histogram, a heap of the largest values and a
reservoir; entries that enter the heap or the reservoir get a window.
"""

from __future__ import annotations

import bisect
import heapq
import random
from collections import defaultdict
from typing import Any

import torch

from fastadapt.features.collect import CollectConfig
from fastadapt.features.collect.texts import Text
from fastadapt.features.store.regions import tenths_of
from fastadapt.features.store.schema import EDGES, REGIONS, TENTHS
from fastadapt.kernels.transcoder import SparseCodes


class Loop:
    """State of one kind of unit, and the loop that updates the state.

    Attributes:
        count, total, histogram, by_domain, by_region, by_tenth: statistics by (layer, feature).
        top: heaps of (value, -text, -position, window).
        uniform: reservoirs of (value, text, position, window).
    """

    def __init__(self, config: CollectConfig) -> None:
        self.config = config
        self.random = random.Random(config.seed)
        self.count: dict[tuple[int, int], int] = defaultdict(int)
        self.total: dict[tuple[int, int], float] = defaultdict(float)
        self.histogram: dict[tuple[int, int], list[int]] = defaultdict(
            lambda: [0] * (len(EDGES) + 1)
        )
        self.by_domain: dict[Any, int] = defaultdict(int)
        self.by_region: dict[Any, list[int]] = defaultdict(lambda: [0] * len(REGIONS))
        self.by_tenth: dict[Any, list[int]] = defaultdict(lambda: [0] * TENTHS)
        self.top: dict[tuple[int, int], list[Any]] = defaultdict(list)
        self.uniform: dict[tuple[int, int], list[Any]] = defaultdict(list)

    def add(self, layer: int, codes: SparseCodes, texts: list[Text], dense: torch.Tensor) -> None:
        """Add one layer's codes of a batch; ``dense [B, T, F]`` holds the values for windows."""
        longest = dense.shape[1]
        tenths = [tenths_of(text.regions).tolist() for text in texts]
        for i in range(len(codes.values)):
            token, feature = int(codes.tokens[i]), int(codes.features[i])
            value = float(codes.values[i])
            row, position = divmod(token, longest)
            text, unit = texts[row], (layer, feature)
            self.count[unit] += 1
            self.total[unit] += value
            self.histogram[unit][bisect.bisect_left(EDGES, value)] += 1
            self.by_domain[unit, text.domain] += 1
            self.by_region[unit][text.regions[position]] += 1
            if tenths[row][position] >= 0:
                self.by_tenth[unit][tenths[row][position]] += 1
            place = text.number, position
            strongest = self.top[unit]
            entry = (value, -place[0], -place[1])
            if len(strongest) < self.config.top:
                heapq.heappush(strongest, (*entry, self._window(dense, row, position, feature)))
            elif entry > strongest[0][:3]:
                heapq.heapreplace(strongest, (*entry, self._window(dense, row, position, feature)))
            drawn = self.uniform[unit]
            if len(drawn) < self.config.uniform:
                drawn.append((value, *place, self._window(dense, row, position, feature)))
            else:
                slot = self.random.randrange(self.count[unit])
                if slot < self.config.uniform:
                    window = self._window(dense, row, position, feature)
                    drawn[slot] = (value, *place, window)

    def _window(self, dense: torch.Tensor, row: int, position: int, feature: int) -> list[float]:
        first = max(0, position - self.config.before)
        values: list[float] = dense[row, first : position + self.config.after + 1, feature].tolist()
        return values

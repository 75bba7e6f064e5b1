"""Units (features or neurons), and the windows of text in which they are active."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from fastadapt.errors import UserError
from fastadapt.features.autointerp.questions import Example, Pieces
from fastadapt.features.store.characters import join_characters
from fastadapt.features.store.schema import KINDS, Kind, SampleKind
from fastadapt.features.store.store import Store


class Unit(NamedTuple):
    """A feature of the adapter, or a neuron of an MLP, in one layer."""

    kind: Kind
    layer: int
    feature: int


@dataclass(frozen=True)
class Window:
    """Window of a text: start, tokens, and on which tokens a feature or neuron is active."""

    text: int
    start: int
    tokens: tuple[int, ...]
    fires: tuple[bool, ...]
    rank: int = -1  # rank of the example in the store; -1 for a negative

    @property
    def end(self) -> int:
        """Position in the text after the window's last token."""
        return self.start + len(self.tokens)

    def overlaps(self, other: Window) -> bool:
        """Return whether two windows share a position of a text, or have equal tokens."""
        shared = self.text == other.text and self.start < other.end and other.start < self.end
        return shared or self.tokens == other.tokens


class Vocabulary:
    """The store's vocabulary: the string of each token id."""

    def __init__(self, store: Store) -> None:
        self._path = store.path("tokens")
        table = store.read("tokens")
        self._strings = dict(
            zip(table["token"].to_pylist(), table["string"].to_pylist(), strict=True)
        )

    def pieces(self, tokens: Iterable[int]) -> Pieces:
        """Return the text of each token; tokens that share a character form one piece.

        Raises:
            UserError: a token is missing in the store's vocabulary.
        """
        return tuple(piece for piece, _ in self._pieces(tokens))

    def example(self, window: Window) -> Example:
        """Convert a window to an example; tokens that share a character are active together."""
        pieces, fires, start = [], [], 0
        for piece, n in self._pieces(window.tokens):
            pieces.append(piece)
            fires.append(any(window.fires[start : start + n]))
            start += n
        return Example(tuple(pieces), tuple(fires))

    def _pieces(self, tokens: Iterable[int]) -> list[tuple[str, int]]:
        try:
            return join_characters([self._strings[token] for token in tokens])
        except KeyError as error:
            raise UserError(f"{self._path}: no token {error}; collect the features again") from None


def eligible(
    store: Store, kind: Kind, layer: int, min_density: float, seed: int
) -> tuple[list[int], int]:
    """Return, shuffled, a layer's units of at least ``min_density``, and the number left out.

    Units that never fired are left out for every ``min_density``.
    """
    table = store.read("features", kind, columns=["feature", "density", "count"], layer=layer)
    is_frequent = pc.and_(
        pc.greater_equal(table["density"], min_density), pc.greater(table["count"], 0)
    )
    features = table.filter(is_frequent)["feature"].to_numpy()
    rng = np.random.default_rng([seed, KINDS.index(kind), layer])
    return [int(i) for i in rng.permutation(np.sort(features))], len(table) - len(features)


def examples_of(
    store: Store, kind: Kind, layer: int, features: Sequence[int], before: int, after: int
) -> dict[int, dict[SampleKind, list[Window]]]:
    """Return windows of the examples of units, by unit and sample, in the order of their rank."""
    columns = ["feature", "sample", "rank", "text", "position", "start", "tokens", "values"]
    rows = store.read("examples", kind, columns=columns, layer=layer, features=features).to_pylist()
    windows: dict[int, dict[SampleKind, list[Window]]] = {}
    for row in sorted(rows, key=lambda row: row["rank"]):
        position = row["position"] - row["start"]
        first, last = max(0, position - before), position + after + 1
        window = Window(
            row["text"],
            row["start"] + first,
            tuple(row["tokens"][first:last]),
            tuple(value > 0 for value in row["values"][first:last]),
            row["rank"],
        )
        windows.setdefault(row["feature"], {}).setdefault(row["sample"], []).append(window)
    return windows

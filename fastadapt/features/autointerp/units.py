"""Units, and the stretches of text that show them."""

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
    """A feature of the adapter, or a neuron."""

    kind: Kind
    layer: int
    feature: int


@dataclass(frozen=True)
class Window:
    """A stretch of a text: where it lies, its tokens, and where the unit is active in it."""

    text: int
    start: int
    tokens: tuple[int, ...]
    fires: tuple[bool, ...]
    rank: int = -1  # of the example in the store; -1 of a silent one

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)

    def meets(self, other: Window) -> bool:
        """Whether the two share a token of a text, or are the same words elsewhere."""
        overlap = self.text == other.text and self.start < other.end and other.start < self.end
        return overlap or self.tokens == other.tokens


class Vocabulary:
    """Token ids as text."""

    def __init__(self, store: Store) -> None:
        self._path = store.path("tokens")
        table = store.read("tokens")
        held = zip(table["token"].to_pylist(), table["string"].to_pylist(), strict=True)
        self._strings = dict(held)

    def pieces(self, tokens: Iterable[int]) -> Pieces:
        """The text of each token, or of tokens that share a character.

        Raises:
            UserError: the store's vocabulary does not have one of them.
        """
        return tuple(piece for piece, _ in self._pieces(tokens))

    def example(self, window: Window) -> Example:
        """A window as a judge sees it; tokens that share a character are active together."""
        pieces, fires, place = [], [], 0
        for piece, n in self._pieces(window.tokens):
            pieces.append(piece)
            fires.append(any(window.fires[place : place + n]))
            place += n
        return Example(tuple(pieces), tuple(fires))

    def _pieces(self, tokens: Iterable[int]) -> list[tuple[str, int]]:
        try:
            return join_characters([self._strings[token] for token in tokens])
        except KeyError as error:
            raise UserError(
                f"{self._path} has no token {error}; collect the features again"
            ) from None


def eligible(
    store: Store, kind: Kind, layer: int, min_density: float, seed: int
) -> tuple[list[int], int]:
    """The units of a layer that are active often enough, in a seeded order, and how many are not.

    A unit that never fired is too rare whatever ``min_density`` is.
    """
    table = store.read("features", kind, columns=["feature", "density", "count"], layer=layer)
    often = pc.and_(pc.greater_equal(table["density"], min_density), pc.greater(table["count"], 0))
    found = table.filter(often)["feature"].to_numpy()
    rng = np.random.default_rng([seed, KINDS.index(kind), layer])
    return [int(i) for i in rng.permutation(np.sort(found))], len(table) - len(found)


def examples_of(
    store: Store, kind: Kind, layer: int, features: Sequence[int], before: int, after: int
) -> dict[int, dict[SampleKind, list[Window]]]:
    """Examples of some units by unit and sample, in the order of their rank, cut to a window."""
    columns = ["feature", "sample", "rank", "text", "position", "start", "tokens", "values"]
    rows = store.read("examples", kind, columns=columns, layer=layer, features=features).to_pylist()
    found: dict[int, dict[SampleKind, list[Window]]] = {}
    for row in sorted(rows, key=lambda row: row["rank"]):
        at = row["position"] - row["start"]
        first, last = max(0, at - before), at + after + 1
        window = Window(
            row["text"],
            row["start"] + first,
            tuple(row["tokens"][first:last]),
            tuple(value > 0 for value in row["values"][first:last]),
            row["rank"],
        )
        found.setdefault(row["feature"], {}).setdefault(row["sample"], []).append(window)
    return found

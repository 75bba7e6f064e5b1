"""Decide whether what a reader sees of a unit describes a planted difference. Needs no model.

A unit of any method is shown as its strongest contexts, which are positions in texts, and the
tokens that it promotes. It describes a difference if both hold:

- *where*: at least half of its contexts, of which there are five or more, are positions at which
  the next word is planted by the difference;
- *what*: the words of the difference are among the promoted tokens more often than 5% of random
  sets of as many tokens would have them (hypergeometric), or no other token is promoted: a unit of
  one token can say no more.

The judge only counts. It knows where the differences are, and does not ask whether a reader who
does not know could put a unit in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb
from typing import NamedTuple

from torch import Tensor

#: Contexts and promoted tokens that a reader sees.
CONTEXTS, PROMOTED = 20, 10
#: Least number of contexts, and the least share of them at places of the difference.
LEAST, SHARE = 5, 0.5
#: Largest probability that random tokens have as many words of the difference.
LEVEL = 0.05


class Unit(NamedTuple):
    """What a reader sees of a unit.

    Attributes:
        name: the unit in its method, such as a feature's layer and number.
        contexts: positions of :class:`~reproduce.planted.reading.Probes`, the strongest first.
        promoted: token ids, the strongest first.
    """

    name: str
    contexts: Sequence[int]
    promoted: Sequence[int]


@dataclass(frozen=True)
class Judge:
    """Knows the planted places of the texts, which have N positions.

    Attributes:
        planted: bool ``[K, N]``, the positions before words of each of K differences.
        outputs: token ids of the words of each difference.
        n_tokens: size of the vocabulary.
    """

    planted: Tensor
    outputs: Sequence[frozenset[int]]
    n_tokens: int

    def describes(self, unit: Unit) -> list[int]:
        """Return the numbers of the differences that a unit describes."""
        contexts = list(unit.contexts[:CONTEXTS])
        if len(contexts) < LEAST:
            return []
        shares = self.planted[:, contexts].double().mean(1).tolist()
        promoted = unit.promoted[:PROMOTED]
        return [
            number
            for number, (share, outputs) in enumerate(zip(shares, self.outputs, strict=True))
            if share >= SHARE and self._says(promoted, outputs)
        ]

    def _says(self, promoted: Sequence[int], outputs: frozenset[int]) -> bool:
        hits = len(outputs.intersection(promoted))
        if not hits:
            return False
        by_chance = chance(hits, len(promoted), len(outputs), self.n_tokens)
        return hits == len(promoted) or by_chance <= LEVEL

    def with_words_of_others(self) -> list[Judge]:
        """Return the judges who look for the words of another difference at each one's places."""
        n = len(self.outputs)
        return [
            replace(self, outputs=[self.outputs[(k + shift) % n] for k in range(n)])
            for shift in range(1, n)
        ]


def chance(hits: int, drawn: int, marked: int, total: int) -> float:
    """Return the probability that ``drawn`` of ``total`` tokens have ``hits`` or more marked ones.

    Example:
        >>> round(chance(1, 10, 1, 424), 4), chance(0, 10, 1, 424)
        (0.0236, 1.0)
    """
    ways = sum(comb(marked, n) * comb(total - marked, drawn - n) for n in range(hits, drawn + 1))
    return ways / comb(total, drawn)

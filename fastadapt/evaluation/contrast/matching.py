"""Match positions with other positions of equal entropy, in the same text where possible.

N positions to match, M candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastadapt.errors import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Candidates:
    """Positions in texts, with the entropy of a model's next-token distribution there.

    Attributes:
        text: int64 ``[M]``, index of each position's text, ascending.
        entropy: float64 ``[M]``, nats.
    """

    text: Ints
    entropy: Floats


def match(
    places: Candidates, candidates: Candidates, *, caliper: float, seed: int
) -> tuple[Ints, NDArray[np.bool_]]:
    """Draw one candidate of nearly equal entropy for each position, without replacement.

    In random order, each position gets the nearest free candidate of its text if the entropies
    differ by at most ``caliper``. The other positions then get the nearest free one of any text.

    Args:
        places: the positions to match.
        candidates: the positions to draw from.
        caliper: largest difference within a text, in nats.
        seed: seed of the order.

    Returns:
        The index of each position's candidate, int64 ``[N]``, and whether it is of the same text.

    Raises:
        UserError: there are fewer candidates than positions.

    Example:
        >>> places = Candidates(np.array([0, 1]), np.array([0.5, 2.0]))
        >>> others = Candidates(np.array([0, 0, 1]), np.array([0.51, 1.9, 0.1]))
        >>> chosen, same = match(places, others, caliper=0.1, seed=0)
        >>> chosen.tolist(), same.tolist()
        ([0, 1], [True, False])
    """
    n, m = len(places.text), len(candidates.text)
    if m < n:
        raise UserError(
            f"expected at least {n:,} positions before other words, one to match each position "
            f"before a word of --words, got {m:,}; give more texts (--n), or fewer words (--words)"
        )
    order = np.random.default_rng(seed).permutation(n)
    starts = np.searchsorted(candidates.text, places.text, "left")
    stops = np.searchsorted(candidates.text, places.text, "right")
    entropy = candidates.entropy.copy()  # infinite once the candidate is drawn
    chosen = np.full(n, -1, dtype=np.int64)
    for i in order:
        gaps = np.abs(entropy[starts[i] : stops[i]] - places.entropy[i])
        if gaps.size and gaps.min() <= caliper:
            chosen[i] = starts[i] + gaps.argmin()
            entropy[chosen[i]] = np.inf
    for i in (i for i in order if chosen[i] < 0):
        chosen[i] = np.abs(entropy - places.entropy[i]).argmin()
        entropy[chosen[i]] = np.inf
    return chosen, candidates.text[chosen] == places.text

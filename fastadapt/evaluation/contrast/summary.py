"""Summarise log-odds at labelled and matched positions: probabilities, contrasts, intervals.

The contrast of a model is P(set) at labelled places minus the mean P(set) at their matched places.
It is a ratio of sums over texts, so that all quantities are paired by text, see
:mod:`fastadapt.evaluation.statistics`. N labelled places, C matched places, K sets of tokens, n
texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastadapt.evaluation.contrast.places import Place, Rows
from fastadapt.evaluation.statistics import BootstrapConfig, paired_difference, ratio, recovered

ALL = "all"  # key of the places of every kind
#: The least probability, and the least contrast, of which a share is given.
LEAST = 1e-3
_SHARE = (0.0, 1.0)


@dataclass(frozen=True)
class Contrast:
    """P(set) at N labelled and their matched positions, and the difference in log-odds.

    Each is float64 ``[N, K]``, for K sets.

    Attributes:
        labelled: P(set) at the labelled positions.
        matched: mean P(set) at their matched positions.
        log_odds: log-odds at the labelled minus the mean log-odds at their matched positions.
    """

    labelled: Tensor
    matched: Tensor
    log_odds: Tensor

    @classmethod
    def of_draws(cls, draws: Tensor, rows: Rows) -> Contrast:
        """Return the mean contrast of models from their log-odds ``[draws, S, K]``."""
        p, odds = draws.sigmoid().mean(0), draws.mean(0)
        return cls(
            p[rows.labelled],
            _means(p[rows.matched], rows),
            odds[rows.labelled] - _means(odds[rows.matched], rows),
        )


def _means(values: Tensor, rows: Rows) -> Tensor:
    """Average values ``[C, K]`` of matched positions for each labelled position: ``[N, K]``."""
    n = len(rows.labelled)
    counts = torch.bincount(rows.owner, minlength=n)[:, None]
    return values.new_zeros(n, values.shape[1]).index_add_(0, rows.owner, values) / counts


def kinds_of(places: Sequence[Place]) -> list[str]:
    """Return ``all`` and, if labelled positions have several kinds, the kinds, sorted.

    On the gated pair the kinds are ``gate on``, ``gate off``, and each kind of slip with either.
    """
    kinds = sorted({group for place in places for group in groups_of(place)} - {ALL})
    return [ALL, *kinds] if len(kinds) > 1 else [ALL]


def groups_of(place: Place) -> tuple[str, ...]:
    """Return the kinds of :func:`kinds_of` that a labelled position belongs to.

    Example:
        >>> groups_of(Place((0, 5), "result", ((0, 9),))), groups_of(
        ...     Place((0, 5), "result", ((0, 9),), gate=True)
        ... )
        (('all', 'result'), ('all', 'gate on', 'result, gate on'))
    """
    if place.gate is None:
        return ALL, place.kind
    state = "gate on" if place.gate else "gate off"
    return ALL, state, f"{place.kind}, {state}"


def summarise(
    contrasts: Mapping[str, Contrast],
    references: Mapping[str, str],
    places: Sequence[Place],
    rows: Rows,
    n_texts: int,
    words: Sequence[str],
    config: BootstrapConfig | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the intervals of every model, by kind of labelled position and by word.

    Args:
        contrasts: contrast by model, ``target`` and ``hybrid`` included. Column 0 is the set, the
            others are its words.
        references: the model that a model is compared with; models without one are left out.
        places: the places.
        rows: their texts.
        n_texts: number of texts, those without places included.
        words: the words, in the order of the columns.
        config: settings of the intervals.

    Returns:
        By model ``kinds`` and ``words``. ``kinds`` has, by kind of place, the intervals
        ``labelled``, ``matched``, ``difference``, ``log_odds`` and ``recovered``, the share of the
        target's contrast over the hybrid's; with a reference also ``change``, the contrast minus
        the reference's as such a share, and ``cut``, the share by which P(set) at labelled places
        is below the reference's. Shares of a probability, or of a contrast,
        below :data:`LEAST` are None. ``words`` has ``labelled``, ``matched`` and ``difference`` by
        word, over all places; empty for one word.
    """
    result: dict[str, dict[str, Any]] = {name: {"kinds": {}, "words": {}} for name in contrasts}
    for kind in kinds_of(places):
        chosen = torch.tensor([kind in groups_of(place) for place in places])
        sums = _Sums(contrasts, rows.text, chosen, n_texts, config)
        for name, numbers in sums.numbers(references).items():
            result[name]["kinds"][kind] = numbers
        if kind == ALL and len(words) > 1:
            for column, word in enumerate(words, 1):
                for name, numbers in sums.probabilities(column).items():
                    result[name]["words"][word] = numbers
    return result


class _Sums:
    """Sums per text over selected labelled positions, ``[models, n, K]``."""

    def __init__(
        self,
        contrasts: Mapping[str, Contrast],
        text: Tensor,
        chosen: Tensor,
        n: int,
        config: BootstrapConfig | None,
    ) -> None:
        self._names, self._config = list(contrasts), config
        self._counts = torch.bincount(text[chosen], minlength=n).double()

        def sums(values: Sequence[Tensor]) -> Tensor:
            stacked = torch.stack([each[chosen] for each in values])
            zeros = stacked.new_zeros(len(stacked), n, stacked.shape[2])
            return zeros.index_add_(1, text[chosen], stacked)

        self._labelled = sums([each.labelled for each in contrasts.values()])
        self._matched = sums([each.matched for each in contrasts.values()])
        self._log_odds = sums([each.log_odds for each in contrasts.values()])

    def probabilities(self, column: int = 0) -> dict[str, dict[str, Any]]:
        """Return each model's P(set) at labelled and matched positions, and the difference."""
        labelled, matched = self._labelled[..., column], self._matched[..., column]
        groups = [
            *self._means(torch.stack([labelled, matched]), bounds=_SHARE),
            paired_difference(labelled, matched, self._counts, self._config).plain(),
        ]
        keys = ("labelled", "matched", "difference")
        by_model = (dict(zip(keys, each, strict=True)) for each in zip(*groups, strict=True))
        return dict(zip(self._names, by_model, strict=True))

    def numbers(self, references: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Return all intervals of every model, by its name, for the whole set of words."""
        result, index = self.probabilities(), {name: i for i, name in enumerate(self._names)}
        labelled = self._labelled[..., 0]
        difference = labelled - self._matched[..., 0]
        floor, ceiling = difference[index["hybrid"]], difference[index["target"]]

        n = self._counts.sum()
        is_moved = bool((ceiling - floor).sum() / n >= LEAST)

        def shares(values: Tensor) -> list[dict[str, Any]]:
            of_target = recovered(values, floor, ceiling, self._config).plain()
            return [each if is_moved else dict.fromkeys(each) for each in of_target]

        columns = {"log_odds": self._means(self._log_odds[..., 0]), "recovered": shares(difference)}
        for key, values in columns.items():
            for name, value in zip(self._names, values, strict=True):
                result[name][key] = value
        if references:
            before = [index[reference] for reference in references.values()]
            after = [index[name] for name in references]
            change = shares(floor + difference[after] - difference[before])
            cut = ratio(
                labelled[before] - labelled[after], labelled[before], config=self._config
            ).plain()
            is_said = labelled[before].sum(1) / n >= LEAST
            for name, a, b, holds in zip(references, change, cut, is_said.tolist(), strict=True):
                result[name] |= {"change": a, "cut": b if holds else dict.fromkeys(b)}
        return result

    def _means(self, values: Tensor, bounds: tuple[float, float] | None = None) -> Any:
        return ratio(values, self._counts, bounds=bounds, config=self._config).plain()

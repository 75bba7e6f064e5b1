"""Compare a union of sets of features with its parts: what the parts do only together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.evaluation.contrast.places import Rows
from fastadapt.evaluation.contrast.summary import Contrast
from fastadapt.evaluation.statistics import BootstrapConfig, recovered


class Union(NamedTuple):
    """A union of sets of features, by the names of the models that have them alone."""

    whole: str
    parts: tuple[str, ...]


def interactions(
    contrasts: Mapping[str, Contrast],
    unions: Sequence[Union],
    bias: str,
    rows: Rows,
    n_texts: int,
    config: BootstrapConfig | None = None,
) -> list[dict[str, Any]]:
    """Return how far each union exceeds the sum of its parts, all over the bias alone.

    Args:
        contrasts: contrast by model, ``target``, ``hybrid`` and ``bias`` included; column 0 is the
            set of words.
        unions: the unions.
        bias: the model with no feature, which has the adapter's ``b_dec`` alone.
        rows: texts of the places.
        n_texts: number of texts, those without places included.
        config: settings of the intervals, which pair the models by text.

    Returns:
        For each union the interval of ``(whole - bias) - Σ (part - bias)``, as a share of the
        target's contrast over the hybrid's. Above 0, the parts need each other; at 0 they add up. A
        feature of both parts counts twice.
    """

    def by_text(name: str) -> Tensor:
        gap = (contrasts[name].labelled - contrasts[name].matched)[:, 0]
        return gap.new_zeros(n_texts).index_add_(0, rows.text, gap)

    floor, ceiling, none = by_text("hybrid"), by_text("target"), by_text(bias)
    sums = [
        floor + by_text(whole) - none - sum((by_text(part) - none for part in parts), 0 * none)
        for whole, parts in unions
    ]
    return list(recovered(torch.stack(sums), floor, ceiling, config).plain()) if sums else []

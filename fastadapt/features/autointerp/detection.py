"""Whether descriptions tell texts on which a unit fires from others: scores, and their means.

Of a unit, accuracy is the share of scored texts that were told right; half of them fire the unit,
so 0.5 is what knowing nothing gives. Precision is the share of texts that were said to fire it and
do, recall that of those which fire it and were said to. Of several units all three are ratios of
sums, with intervals over units. Where all units score alike, short of 0 and 1, a bootstrap has
nothing to resample; the interval is then Wilson's with each unit a trial: as wide as that of scores
which are all 0 or 1, the ones that vary most about their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.evaluation.statistics import BootstrapConfig, ratio, wilson
from fastadapt.features.autointerp.examples import Case
from fastadapt.reporting.tables import Interval

_SHARE = (0.0, 1.0)
MEASURES = ("accuracy", "precision", "recall")


def score(case: Case, judge: str, told: Sequence[bool]) -> dict[str, Any]:
    """A row of ``SCORES``.

    Args:
        case: what was asked of.
        judge: who answered.
        told: for each scored text, whether it was said to fire the unit.
    """
    truth = case.truth
    right = [said == is_so for said, is_so in zip(told, truth, strict=True)]
    true_positives = sum(r for r, is_so in zip(right, truth, strict=True) if is_so)
    return {
        "layer": case.unit.layer,
        "feature": case.unit.feature,
        "variant": case.sample,
        "judge": judge,
        "positives": sum(truth),
        "negatives": len(truth) - sum(truth),
        "true_positives": true_positives,
        "true_negatives": sum(right) - true_positives,
        "accuracy": sum(right) / len(right),
    }


def summarise(
    rows: Sequence[Mapping[str, Any]], n_layers: int, config: BootstrapConfig
) -> dict[str, Any]:
    """Means over units, all together and by layer.

    Args:
        rows: of ``SCORES``, of one kind, judge and variant.
        n_layers: of the model.

    Returns:
        ``accuracy, precision, recall`` as intervals, ``units``, and ``layers``, a list of the same.
    """
    of_layer = [[row for row in rows if row["layer"] == layer] for layer in range(n_layers)]
    return {**_means(rows, config), "layers": [_means(some, config) for some in of_layer]}


def _means(rows: Sequence[Mapping[str, Any]], config: BootstrapConfig) -> dict[str, Any]:
    if not rows:
        nothing: Interval = {"mean": None, "low": None, "high": None}
        return {**dict.fromkeys(MEASURES, nothing), "units": 0}
    columns = {key: [float(row[key]) for row in rows] for key in _COUNTS}
    positives, negatives, found, rejected = (
        torch.tensor(columns[key], dtype=torch.float64) for key in _COUNTS
    )
    claimed = found + negatives - rejected
    parts = {
        "accuracy": (found + rejected, positives + negatives),
        "precision": (found, claimed),
        "recall": (found, positives),
    }
    means = {name: _share(sums, counts, config) for name, (sums, counts) in parts.items()}
    return {**means, "units": len(rows)}


def _share(sums: Tensor, counts: Tensor, config: BootstrapConfig) -> Interval:
    found = ratio(sums, counts, bounds=_SHARE, config=config)
    if found.low == found.high:  # NaN of fewer than two units is not
        units = counts.sum() ** 2 / (counts**2).sum()  # weighed by their counts
        alone = wilson(found.mean * units, units, config.level)
        found = found._replace(low=alone.low, high=alone.high)
    told: Interval = found.plain()
    return told


_COUNTS = ("positives", "negatives", "true_positives", "true_negatives")

"""Detection scores of descriptions, and their means.

The accuracy of a unit is the share of scored texts that the judge labels correctly. Half of the
texts are negatives, so chance is 0.5. Precision and recall refer to the texts on which the unit
fires. Means over units are ratios of sums, with bootstrap intervals over units. If all units have
the same score between 0 and 1, the bootstrap has no variance; the interval is then Wilson's with
one trial a unit, as wide as for scores that are all 0 or 1, which vary most about their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.evaluation.statistics import BootstrapConfig, ratio, wilson
from fastadapt.features.autointerp.examples import DetectionCase
from fastadapt.reporting.tables import Interval

_SHARE = (0.0, 1.0)
MEASURES = ("accuracy", "precision", "recall")


def score(case: DetectionCase, judge: str, predictions: Sequence[bool]) -> dict[str, Any]:
    """Return detection scores of the description of one feature or neuron, as a row of ``SCORES``.

    Args:
        case: unit with its scored texts.
        judge: name of the judge.
        predictions: for each scored text, whether the judge expects the unit to fire.
    """
    truth = case.truth
    right = [predicted == fires for predicted, fires in zip(predictions, truth, strict=True)]
    true_positives = sum(r for r, fires in zip(right, truth, strict=True) if fires)
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
    """Return mean detection scores over all units and by layer.

    Args:
        rows: rows of ``SCORES`` of one kind, judge and variant.
        n_layers: number of layers of the model.

    Returns:
        ``accuracy, precision, recall`` as intervals, ``units``, and ``layers`` with the same keys.
    """
    by_layer = [[row for row in rows if row["layer"] == layer] for layer in range(n_layers)]
    return {**_means(rows, config), "layers": [_means(in_layer, config) for in_layer in by_layer]}


def _means(rows: Sequence[Mapping[str, Any]], config: BootstrapConfig) -> dict[str, Any]:
    if not rows:
        nothing: Interval = {"mean": None, "low": None, "high": None}
        return {**dict.fromkeys(MEASURES, nothing), "units": 0}
    columns = {key: [float(row[key]) for row in rows] for key in _COUNTS}
    positives, negatives, true_positives, true_negatives = (
        torch.tensor(columns[key], dtype=torch.float64) for key in _COUNTS
    )
    predicted = true_positives + negatives - true_negatives
    parts = {
        "accuracy": (true_positives + true_negatives, positives + negatives),
        "precision": (true_positives, predicted),
        "recall": (true_positives, positives),
    }
    means = {name: _share(sums, counts, config) for name, (sums, counts) in parts.items()}
    return {**means, "units": len(rows)}


def _share(sums: Tensor, counts: Tensor, config: BootstrapConfig) -> Interval:
    share = ratio(sums, counts, bounds=_SHARE, config=config)
    if share.low == share.high:  # false for fewer than two units, whose ends are NaN
        units = counts.sum() ** 2 / (counts**2).sum()  # effective number, weighted by counts
        interval = wilson(share.mean * units, units, config.level)
        share = share._replace(low=interval.low, high=interval.high)
    plain: Interval = share.plain()
    return plain


_COUNTS = ("positives", "negatives", "true_positives", "true_negatives")

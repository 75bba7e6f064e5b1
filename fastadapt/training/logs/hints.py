"""Hints about a run whose numbers say that its settings do not suit the pair."""

from __future__ import annotations

from typing import Any

from fastadapt.reporting.formatting import number, percent
from fastadapt.training.run_dir import Record

#: Share of a layer's features above which a token's active features are too many to read.
MOST_ACTIVE = 0.1
#: Share of a target L0 by which the measured L0 may differ from it.
OFF_TARGET = 0.1
_NO_KL = 1e-6  # nats per token: rounding of equal models


def hints(result: Record, sparsity: float | None = None, target: float | None = None) -> list[str]:
    """Return hints about a summary or an evaluation record; empty if nothing is odd.

    Args:
        result: a summary or an evaluation record. Before the first step, when half of all features
            fire, only the hybrid's KL is looked at.
        sparsity: ``objective.sparsity`` of the run; with 0, a dense adapter is intended.
        target: ``objective.l0`` of the run.

    Example:
        >>> hints({"kl_hybrid": 0.0})[0][:41]
        "The hybrid's KL to the target is already "
    """
    lines = []
    kl, l0, n = result.get("kl_hybrid"), result.get("l0_mean"), _features_per_layer(result)
    if kl is not None and kl < _NO_KL:
        lines.append(
            "The hybrid's KL to the target is already 0 on the held-out data: with the base's MLPs "
            "the target predicts the same, so that an adapter has nothing to learn. Check "
            "pair.base and data.validation; fastadapt where shows in which parts two models differ."
        )
    if result.get("step") == 0 or l0 is None:
        return lines
    if target is not None:
        return lines + _off_target(l0, target, result.get("sparsity_weight"))
    if sparsity != 0 and n and l0 > MOST_ACTIVE * n:
        now = "" if sparsity is None else f" (now {sparsity:g})"
        lines.append(
            f"L0 is {number(l0)}, {percent(l0 / n)} of the {n:,} features of a layer: too many to "
            f"read. Raise objective.sparsity{now} by a factor of 3 to 10, or train longer: L0 "
            "falls with the steps."
        )
    return lines


def _off_target(l0: float, target: float, weight: float | None) -> list[str]:
    if abs(l0 - target) <= OFF_TARGET * target:
        return []
    side = "above" if l0 > target else "below"
    start = "" if weight is None else f", or start from objective.sparsity {number(weight)}"
    return [
        f"L0 is {number(l0)}, {percent(abs(l0 / target - 1))} {side} objective.l0 "
        f"{number(target)}. Train longer{start}."
    ]


def _features_per_layer(result: Record) -> int | None:
    histogram: dict[str, Any] = result.get("feature_density_histogram") or {}
    counts, dead = histogram.get("counts"), result.get("n_dead_per_layer")
    return sum(counts[0]) + int(dead[0]) if counts and dead else None

"""Numbers of the tables, from what was measured of every part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from reproduce.recipes.catalogue import Pair, Recipe, baseline_of
from reproduce.recipes.matched import (
    Curve,
    change,
    interval,
    log_kl_at,
    log_ratio,
    middle,
    value_at,
)
from reproduce.recipes.measure import Measured

#: Other values of a part, which are read at equal L0 too.
VALUES = ("silent", "dead", "detection", "flops", "cpu_s", "peak_bytes")


@dataclass(frozen=True)
class Runs:
    """The runs of a recipe on a pair whose values are all measured.

    Attributes:
        recipe: the recipe.
        seeds: their numbers, in order.
        parts: by seed, in this order, and by value in the recipe's.
        is_removed: whether the option has left the code.
    """

    recipe: Recipe
    seeds: list[int]
    parts: list[list[Measured]]
    is_removed: bool = False

    @cached_property
    def curve(self) -> Curve:
        """KL and L0 of all runs."""
        texts = [[part["texts"] for part in of_seed] for of_seed in self.parts]
        layers, first = self.parts[0][0]["layers"], texts[0][0]
        sums = {
            key: torch.tensor([[t[key] for t in row] for row in texts], dtype=torch.float64)
            for key in ("kl", "active")
        }
        counts = [torch.tensor(first[key]) for key in ("predicted", "tokens")]
        return Curve(sums["kl"], counts[0], sums["active"] / layers, counts[1])

    def values(self, name: str) -> Tensor:
        """Return one of :data:`VALUES` of every run, ``[S, V]``; NaN where it is not known."""
        rows = [[_value(part, name) for part in of_seed] for of_seed in self.parts]
        return torch.tensor(
            [[torch.nan if v is None else v for v in row] for row in rows], dtype=torch.float64
        )

    def common(self, other: Runs) -> tuple[Curve, Curve]:
        """Return the curves of two recipes, of the seeds that both have."""
        both = [seed for seed in self.seeds if seed in other.seeds]
        first, second = (
            runs.curve.seeds([runs.seeds.index(seed) for seed in both]) for runs in (self, other)
        )
        return first, second


def _value(part: Measured, name: str) -> float | None:
    if name in ("silent", "dead"):
        return part[name] / part["features"]  # type: ignore[literal-required]
    if name == "detection":
        return part["detection"]["accuracy"] if part["detection"] else None
    return part["cost"][name]  # type: ignore[literal-required]


def gather(
    recipes: Sequence[Recipe],
    pair: str,
    measured: Mapping[tuple[str, float, int], Measured],
    *,
    is_removed: bool = False,
) -> list[Runs]:
    """Return the runs of each recipe on a pair, of the seeds with all values measured.

    Args:
        recipes: the recipes.
        pair: name of the pair.
        measured: by recipe, value and seed.
        is_removed: whether the recipes' options have left the code.
    """
    gathered = []
    for recipe in recipes:
        values = recipe["values"].get(pair, [])
        numbers = sorted({seed for name, _, seed in measured if name == recipe["name"]})
        rows = {
            seed: [measured.get((recipe["name"], value, seed)) for value in values]
            for seed in numbers
        }
        whole = {seed: [p for p in row if p is not None] for seed, row in rows.items()}
        whole = {seed: row for seed, row in whole.items() if values and len(row) == len(values)}
        if whole:
            gathered.append(Runs(recipe, list(whole), list(whole.values()), is_removed))
    return gathered


def summarise(pair: Pair, runs: Sequence[Runs]) -> dict[str, Any]:
    """Return all numbers of a pair's tables, ready for JSON.

    A baseline has its KL at each L0, other recipes their relative change against theirs. A number
    is None where the runs do not reach the L0 on both sides.

    Args:
        pair: the pair.
        runs: of its recipes, in the order of the tables.
    """
    by_name = {each.recipe["name"]: each for each in runs}
    first = next((r for r in runs if baseline_of(r.recipe) == r.recipe["name"]), None)
    l0s = list(pair["l0"]) if first is None else [middle(first.curve), *pair["l0"]]
    return {
        "title": pair["title"],
        "l0": l0s,
        "texts": len(runs[0].parts[0][0]["texts"]["tokens"]) if runs else 0,
        "hybrid": _hybrid(runs[0]) if runs else None,
        "recipes": [_summary(each, by_name, l0s) for each in runs],
    }


def _hybrid(runs: Runs) -> float:
    texts = runs.parts[0][0]["texts"]
    return sum(texts["kl_hybrid"]) / sum(texts["predicted"])


def _summary(runs: Runs, by_name: Mapping[str, Runs], l0s: Sequence[float]) -> dict[str, Any]:
    recipe, curve = runs.recipe, runs.curve
    baseline = by_name.get(baseline_of(recipe))
    return {
        "name": recipe["name"],
        "description": recipe["description"],
        "baseline": baseline_of(recipe),
        "setting": recipe["setting"],
        "seeds": runs.seeds,
        "is_removed": runs.is_removed,
        "commits": sorted({p["commit"] for row in runs.parts for p in row if p["commit"]}),
        "dates": sorted({p["date"] for row in runs.parts for p in row}),
        "kl": [interval(log_kl_at(curve, l0)).plain() for l0 in l0s],
        "change": [_change(runs, baseline, l0) for l0 in l0s],
        **{n: [value_at(runs.values(n), curve, l0) for l0 in l0s] for n in VALUES},
        "points": [_point(runs, i) for i in range(len(runs.parts[0]))],
    }


def _change(runs: Runs, baseline: Runs | None, l0: float) -> dict[str, float | None] | None:
    """Return the change against a baseline; None for itself, or without common seeds."""
    if baseline is None or baseline is runs or not set(runs.seeds) & set(baseline.seeds):
        return None
    plain: dict[str, float | None] = change(*runs.common(baseline), l0).plain()
    return plain


def _point(runs: Runs, i: int) -> dict[str, Any]:
    """Return the numbers of one value of the setting: means over seeds."""
    curve = runs.curve
    l0 = curve.l0[..., i]
    means = {name: runs.values(name)[:, i].nanmean().item() for name in VALUES}
    return {
        "value": runs.parts[0][i]["value"],
        "l0": float(l0.log().mean().exp()),
        "l0_by_seed": l0.tolist(),
        "kl": interval(log_ratio(curve.kl[..., i, :], curve.predicted)).plain(),
        **{name: None if math.isnan(mean) else mean for name, mean in means.items()},
    }

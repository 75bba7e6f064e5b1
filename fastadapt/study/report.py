"""Build the study's claims, tables and figures from the contents of ``study.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastadapt.evaluation.statistics import Intervals, quotient
from fastadapt.interventions import SCALE
from fastadapt.reporting.figures import Figure, Series, series_of
from fastadapt.reporting.formatting import number, percent
from fastadapt.reporting.tables import Interval, Table, shown, words_shown
from fastadapt.study.conditions import BIAS

#: Effects expected from arXiv 2602.20904.
REMOVED, SPARED, ADDED = 0.7, 0.15, 5.0
RATE = "hesitations_per_1000"

Arm = Mapping[str, Any]


def claims(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the expected and the measured effect of every changed arm, and whether they agree.

    Returns:
        Records with ``kind``, ``selection``, ``times`` and ``scale`` (which identify the arm);
        ``claim``, the expectation as text, or an empty text; ``value``, an interval; and ``holds``.
        The value is the relative reduction of hesitation for ``ablate`` and ``onto-target``. For
        ``only``, the value is the ratio of the selected set's hesitation to the random set's.
        ``holds`` is ``yes`` or ``no`` by the estimate, with ``not clearly`` if the interval
        contains the bound or the draws disagree.
    """
    parts = {entry["key"] for entry in result["sets"] if entry["part"]}
    records = []
    for arm in result["arms"]:
        if arm["kind"] is None or arm["selection"] == BIAS:
            continue
        value, claim, holds = _claim(result, arm, arm[RATE])
        each = {_claim(result, arm, draw[RATE])[2].split(",")[0] for draw in arm["draws"]}
        if len(each) > 1 and not holds.endswith("not clearly"):
            holds += ", not clearly"  # intervals cover questions, but not draws
        if arm["selection"] in parts:
            claim = holds = ""
        named = {key: arm[key] for key in ("kind", "selection", "times", "scale")}
        records.append({**named, "claim": claim, "value": value, "holds": holds})
    return records


def _claim(result: Mapping[str, Any], arm: Arm, rate: Interval) -> tuple[Any, str, str]:
    """Return value, claim and verdict of an arm with a given rate of hesitation."""
    if arm["kind"] == "only":
        if not arm["times"]:
            return None, "", ""
        inverse = over(rate, _selected(result, arm)[RATE])
        value = Intervals(1 / inverse.mean, 1 / inverse.high, 1 / inverse.low).plain()
        # The verdict uses the inverse ratio, which is finite for a random set without hesitation.
        return value, f"≥ {ADDED:g} times", verdict(inverse.plain(), 1 / ADDED, above=False)
    remaining = over(rate, _unchanged(result, arm["model"])[RATE])
    value = Intervals(1 - remaining.mean, 1 - remaining.high, 1 - remaining.low).plain()
    if arm["kind"] == "ablate" and arm["times"] < 2:
        selected = arm["times"] == 0
        bound = REMOVED if selected else SPARED
        claim = f"{'≥' if selected else '≤'} {percent(bound)}"
        return value, claim, verdict(value, bound, above=selected)
    if arm["times"] == 0 and arm["scale"] == SCALE:
        return value, "> 0", verdict(value, 0.0, above=True)
    return value, "", ""


def over(a: Interval, b: Interval) -> Intervals:
    """Return the quotient of two rates, with its interval."""
    both = [
        Intervals(
            *(torch.tensor(_finite(i[end]), dtype=torch.float64) for end in Intervals._fields)
        )
        for i in (a, b)
    ]
    return quotient(*both)


def _finite(value: float | None) -> float:
    return math.nan if value is None else value


def verdict(value: Interval | None, bound: float, *, above: bool) -> str:
    """Return whether a value is at least (or at most) ``bound``, by estimate and interval."""
    if value is None or value["mean"] is None:
        return "not measurable"
    low, high = (value[end] for end in ("low", "high"))
    holds = value["mean"] >= bound if above else value["mean"] <= bound
    worst, best = (low, high) if above else (high, low)
    doubtful = worst if holds else best
    if doubtful is None:
        clear = False
    elif above:
        clear = (doubtful >= bound) == holds
    else:
        clear = (doubtful <= bound) == holds
    return ("yes" if holds else "no") + ("" if clear else ", not clearly")


def _unchanged(result: Mapping[str, Any], model: str) -> Arm:
    """Return the arm of the unchanged model."""
    return next(a for a in result["arms"] if a["kind"] is None and a["model"] == model)


def _selected(result: Mapping[str, Any], arm: Arm) -> Arm:
    """Return the arm of the selected set that a random set is the control of."""
    same = ("kind", "selection", "scale")
    return next(
        a for a in result["arms"] if a["times"] == 0 and all(a[key] == arm[key] for key in same)
    )


# --- tables ---------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of removal, addition and, if measured, transfer."""
    benchmarks = result["settings"]["benchmarks"]
    tasks = f"{len(benchmarks['tasks'])} benchmarks of equal weight"
    words = ", ".join(benchmarks["counted_words"])
    sets = "; ".join(
        f"{s['name']}: {s['size']:,} features, by layer {', '.join(map(str, s['per_layer']))}"
        for s in result["sets"]
    )
    common = (
        f"Hesitation: {words}, per 1,000 tokens; by word: the means. {tasks}; "
        f"{percent(result['level'])} intervals over questions. {sets}; "
        f"{result['features']['alive']:,} of {result['features']['total']:,} features fired on the "
        "texts of the store. Random sets have features of matched density, as far as such are "
        "left; their density is a share of the set's, the mean over draws. Values of random sets "
        "pool all draws; intervals do not cover the choice of a draw, so the hesitation of each "
        "draw is listed."
    )
    common = " ".join([common, *result.get("notes", ())])
    head = ["features", "hesitation / 1,000 tokens", "by word", "hesitation by draw"]
    tail = ["tokens", "accuracy", "expected", "holds"]
    reduction = "Reduction: relative decrease of hesitation; negative values are increases."
    expected = "Expected: the effects reported by arXiv 2602.20904."
    changes = [
        Table(
            "Removal from the replacement model",
            ["removed", *head, "reduction", *tail],
            [
                _row(result, _unchanged(result, "adapter"), "none"),
                *_rows(result, "ablate", percent),
            ],
            f"{common} {reduction} {expected}",
        ),
        Table(
            "Addition to the hybrid",
            ["added", *head, "selected / random", *tail, "beyond b_dec"],
            [
                [*_row(result, _unchanged(result, "hybrid"), "none (hybrid)"), "–"],
                [*_row(result, _bias(result), "none, b_dec alone"), "–"],
                [*_row(result, _unchanged(result, "adapter"), "all (adapter)"), "–"],
                *(
                    [*row, shown(arm["beyond_bias"], percent)]
                    for arm, row in zip(
                        _arms(result, "only"), _rows(result, "only", number), strict=True
                    )
                ),
            ],
            f"{common} All rows but the first have the adapter's b_dec. Beyond b_dec: share of the "
            "adapter's hesitation beyond that of b_dec alone which the set recovers; no value if "
            "the two do not differ clearly. Selected / random: ratio of the selected set's "
            "hesitation to the random set's; no value if the random set has no hesitation. "
            f"{expected}",
        ),
    ]
    if transferred := _rows(result, "onto-target", percent):
        changes.append(
            Table(
                "Transfer to the target",
                ["transferred", *head, "reduction", *tail],
                [_row(result, _unchanged(result, "target"), "none"), *transferred],
                f"{common} {reduction} {expected}",
            )
        )
    return [*changes, *_by_benchmark(result)]


def _by_benchmark(result: Mapping[str, Any]) -> list[Table]:
    """Return a table of accuracy and length on each benchmark, if there are several."""
    tasks = result["settings"]["benchmarks"]["tasks"]
    arms = [arm for arm in result["arms"] if "benchmarks" in arm]
    if len(tasks) < 2 or not arms:
        return []
    rows = [
        [
            _named(result, arm),
            *(
                shown(arm["benchmarks"][task][key], show)
                for task in tasks
                for key, show in (("accuracy", percent), ("length", number))
            ),
        ]
        for arm in arms
    ]
    head = [f"{task}, {key}" for task in tasks for key in ("accuracy", "tokens")]
    note = f"{percent(result['level'])} intervals over questions; random sets pool all draws."
    return [Table("By benchmark", ["model", *head], rows, note)]


_DONE = {"ablate": "without", "only": "hybrid with", "onto-target": "target with"}


def _named(result: Mapping[str, Any], arm: Arm) -> str:
    if arm["kind"] is None:
        return str(arm["model"])
    if arm["selection"] == BIAS:
        return "hybrid with b_dec alone"
    return f"{_DONE[arm['kind']]} {_features_of(result, arm)}"


def _arms(result: Mapping[str, Any], kind: str) -> list[Arm]:
    """Return the arms of an intervention, without the one that keeps no feature."""
    return [arm for arm in result["arms"] if arm["kind"] == kind and arm["selection"] != BIAS]


def _bias(result: Mapping[str, Any]) -> Arm:
    """Return the arm of the hybrid with ``b_dec`` alone."""
    return next(arm for arm in result["arms"] if arm["selection"] == BIAS)


def _selection(result: Mapping[str, Any], arm: Arm) -> Mapping[str, Any]:
    """Return the selected set of an arm; for a random set, the set that it is the control of."""
    return next(entry for entry in result["sets"] if entry["key"] == arm["selection"])


def _rows(result: Mapping[str, Any], kind: str, show: Any) -> list[list[str]]:
    rows = []
    for arm in _arms(result, kind):
        name = _features_of(result, arm)
        rows.append(_row(result, arm, name, show))
    return rows


def _features_of(result: Mapping[str, Any], arm: Arm) -> str:
    """Return the name of an arm's features, with the scale of a transfer."""
    name = str(_selection(result, arm)["name"])
    if arm["times"]:
        size = "same size" if arm["times"] == 1 else f"{arm['times']} times the size"
        draws = f"{len(arm['draws'])} draw{'s' * (len(arm['draws']) > 1)}"
        shares = [draw["density"] for draw in arm["draws"] if draw.get("density") is not None]
        density = f", density {percent(sum(shares) / len(shares))}" if shares else ""
        name = f"random, {size} ({draws}{density})"
    return name if arm["scale"] is None else f"{name}, × {arm['scale']:g}"


def _row(result: Mapping[str, Any], arm: Arm, name: str, show: Any = number) -> list[str]:
    none: Mapping[str, Any] = {"value": None, "claim": "", "holds": ""}
    same = ("kind", "selection", "times", "scale")
    claim = next((c for c in result["claims"] if all(c[key] == arm[key] for key in same)), none)
    return [
        name,
        number(arm["features"]) if arm["kind"] else "–",
        shown(arm[RATE]),
        words_shown(arm["by_word"]),
        ", ".join(number(draw[RATE]["mean"]) for draw in arm["draws"]) if arm["times"] else "–",
        shown(claim["value"], show),
        shown(arm["length"]),
        shown(arm["accuracy"], percent),
        claim["claim"] or "–",
        claim["holds"] or "–",
    ]


# --- figures --------------------------------------------------------------------------------------


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """Return the figures of removal, addition and, if measured, transfer."""
    levels = {name: _level(result, name) for name in ("target", "hybrid", "adapter")}
    bias = _series("b_dec alone", "bias", [], [_bias(result)])
    unit = ", ".join(result["settings"]["benchmarks"]["counted_words"]) + " per 1,000 tokens"
    label = "features, of " + number(result["features"]["total"])
    shown = [
        Figure(
            "removal",
            "Features removed from the replacement model",
            label,
            unit,
            [*_by_size(result, "ablate"), levels["adapter"], levels["target"]],
            x_log=True,
            mark="points",
        ),
        Figure(
            "addition",
            "Features added to the hybrid",
            label,
            unit,
            [*_by_size(result, "only"), levels["hybrid"], bias, levels["adapter"]],
            x_log=True,
            mark="points",
        ),
    ]
    if by_scale := _by_scale(result):
        title = "Features transferred to the target"
        shown.append(
            Figure("transfer", title, "scale", unit, [*by_scale, levels["target"]]),
        )
    return shown


def _level(result: Mapping[str, Any], model: str) -> Series:
    kind = "transcoder" if model == "adapter" else model
    return _series(model, kind, [], [_unchanged(result, model)])


def _by_size(result: Mapping[str, Any], kind: str) -> list[Series]:
    """Return hesitation by the number of features: a series per selection, one of random sets."""
    same_kind = _arms(result, kind)
    groups = []
    for entry in result["sets"]:
        arms = [a for a in same_kind if a["selection"] == entry["key"] and not a["times"]]
        main = "selected" if entry is result["sets"][0] else "selected otherwise"
        groups.append((entry["name"], entry["key"] if entry["part"] else main, arms))
    random = sorted((a for a in same_kind if a["times"]), key=lambda arm: arm["features"])
    groups.append(("random", "random", random))
    return [
        _series(name, colour, [float(arm["features"]) for arm in arms], arms)
        for name, colour, arms in groups
        if arms
    ]


def _by_scale(result: Mapping[str, Any]) -> list[Series]:
    """Return hesitation by scale, for the main selection and its random controls."""
    main = result["sets"][0]
    same = [
        a for a in result["arms"] if (a["kind"], a["selection"]) == ("onto-target", main["key"])
    ]
    lines = []
    for name, kind, times in ((main["name"], "selected", 0), ("random, same size", "random", 1)):
        arms = sorted((a for a in same if a["times"] == times), key=lambda arm: arm["scale"])
        lines.append(_series(name, kind, [arm["scale"] for arm in arms], arms))
    return [series for series in lines if series.x]


def _series(name: str, kind: str, xs: Sequence[float], arms: Sequence[Arm]) -> Series:
    return series_of(name, kind, xs, [arm[RATE] for arm in arms])

"""The study's claims, tables and figures, from the contents of ``study.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastadapt.evaluation.statistics import Intervals, quotient
from fastadapt.interventions import SCALE
from fastadapt.reporting.figures import Figure, Series, series_of
from fastadapt.reporting.formatting import number, percent
from fastadapt.reporting.tables import Interval, Table, shown

#: What arXiv 2602.20904 leads one to expect.
REMOVED, SPARED, ADDED = 0.7, 0.15, 5.0
RATE = "hesitations_per_1000"
_UNIT = "hesitation words per 1,000 tokens"

Arm = Mapping[str, Any]


def claims(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is expected of each arm, what was found, and whether it holds.

    Returns:
        Of each: ``kind``, ``selection``, ``times``, ``scale`` (which name the arm), ``claim`` (in
        words, empty where nothing is expected), ``value`` (an interval: of ``ablate`` and
        ``onto-target`` the share by which hesitation fell, of ``only`` how many times the random
        set's the selected set's is), and ``holds``: ``yes`` or ``no`` by the estimate, and ``not
        clearly`` where its interval has both, or one draw says otherwise than another.
    """
    parts = {chosen["key"] for chosen in result["sets"] if chosen["part"]}
    found = []
    for arm in result["arms"]:
        if arm["kind"] is None:
            continue
        value, claim, holds = _claim(result, arm, arm[RATE])
        each = {_claim(result, arm, draw[RATE])[2].split(",")[0] for draw in arm["draws"]}
        if len(each) > 1 and not holds.endswith("not clearly"):
            holds += ", not clearly"  # the intervals are over questions, not over draws
        if arm["selection"] in parts:
            claim = holds = ""
        named = {key: arm[key] for key in ("kind", "selection", "times", "scale")}
        found.append({**named, "claim": claim, "value": value, "holds": holds})
    return found


def _claim(result: Mapping[str, Any], arm: Arm, rate: Interval) -> tuple[Any, str, str]:
    """Value, claim and verdict of an arm that hesitates at this rate."""
    if arm["kind"] == "only":
        if not arm["times"]:
            return None, "", ""
        share = over(rate, _selected(result, arm)[RATE])
        value = Intervals(1 / share.mean, 1 / share.high, 1 / share.low).plain()
        # Of the share, since that of a random set which makes none is a number.
        return value, f"≥ {ADDED:g} times", verdict(share.plain(), 1 / ADDED, above=False)
    left = over(rate, _whole(result, arm["model"])[RATE])
    value = Intervals(1 - left.mean, 1 - left.high, 1 - left.low).plain()
    if arm["kind"] == "ablate" and arm["times"] < 2:
        selected = arm["times"] == 0
        bound = REMOVED if selected else SPARED
        claim = f"{'≥' if selected else '≤'} {percent(bound)}"
        return value, claim, verdict(value, bound, above=selected)
    if arm["times"] == 0 and arm["scale"] == SCALE:
        return value, "> 0", verdict(value, 0.0, above=True)
    return value, "", ""


def over(a: Interval, b: Interval) -> Intervals:
    """The quotient of two rates."""
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
    """Whether a value is at least (or at most) ``bound``, by its estimate and by its interval."""
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


def _whole(result: Mapping[str, Any], model: str) -> Arm:
    """The model as it is."""
    return next(a for a in result["arms"] if a["kind"] is None and a["model"] == model)


def _selected(result: Mapping[str, Any], arm: Arm) -> Arm:
    """The selected set that a random one stands beside."""
    same = ("kind", "selection", "scale")
    return next(
        a for a in result["arms"] if a["times"] == 0 and all(a[key] == arm[key] for key in same)
    )


# --- tables ---------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> list[Table]:
    """One each of removal, addition and transfer."""
    asked = result["settings"]["benchmarks"]
    tasks = f"{len(asked['tasks'])} benchmarks, each with the same weight"
    words = ", ".join(asked["hesitation_words"])
    sets = "; ".join(
        f"{s['name']}: {s['size']:,} features, by layer {', '.join(map(str, s['per_layer']))}"
        for s in result["sets"]
    )
    common = (
        f"Hesitation: {words}, per 1,000 tokens. {tasks}; intervals of {percent(result['level'])} "
        f"over questions. {sets}; {result['features']['alive']:,} of "
        f"{result['features']['total']:,} fired on the texts of the store. Random sets match in "
        "density; of several draws the numbers are of all together, and no interval covers the "
        "choice of a draw: the hesitation of each stands beside."
    )
    head = ["features", "hesitation / 1,000", "each draw"]
    tail = ["tokens", "accuracy", "expected", "holds"]
    cut = "Cut: the share by which hesitation fell; where it is negative, it rose."
    expected = "Expected is what arXiv 2602.20904 leads one to expect."
    return [
        Table(
            "Removal from the replacement model",
            ["removed", *head, "cut", *tail],
            [_row(result, _whole(result, "adapter"), "nothing"), *_rows(result, "ablate", percent)],
            f"{common} {cut} {expected}",
        ),
        Table(
            "Addition to the hybrid",
            ["added", *head, "selected over it", *tail],
            [
                _row(result, _whole(result, "hybrid"), "nothing: the hybrid"),
                _row(result, _whole(result, "adapter"), "everything: the adapter"),
                *_rows(result, "only", number),
            ],
            f"{common} Selected over it: how many times the random set's hesitation the selected "
            f"set's is, and where that is none, the random set made none. {expected}",
        ),
        Table(
            "Transfer onto the target",
            ["put onto it", *head, "cut", *tail],
            [
                _row(result, _whole(result, "target"), "nothing"),
                *_rows(result, "onto-target", percent),
            ],
            f"{common} {cut} {expected}",
        ),
    ]


def _chosen(result: Mapping[str, Any], arm: Arm) -> Mapping[str, Any]:
    """The set that an arm has, or is drawn like."""
    return next(of for of in result["sets"] if of["key"] == arm["selection"])


def _rows(result: Mapping[str, Any], kind: str, show: Any) -> list[list[str]]:
    rows = []
    for arm in result["arms"]:
        if arm["kind"] != kind:
            continue
        name = str(_chosen(result, arm)["name"])
        if arm["times"]:
            many = "as many" if arm["times"] == 1 else f"{arm['times']} times as many"
            draws = f"{len(arm['draws'])} draw{'s' * (len(arm['draws']) > 1)}"
            name = f"random, {many} ({draws})"
        if arm["scale"] is not None:
            name += f", × {arm['scale']:g}"
        rows.append(_row(result, arm, name, show))
    return rows


def _row(result: Mapping[str, Any], arm: Arm, name: str, show: Any = number) -> list[str]:
    none: Mapping[str, Any] = {"value": None, "claim": "", "holds": ""}
    same = ("kind", "selection", "times", "scale")
    claim = next((c for c in result["claims"] if all(c[key] == arm[key] for key in same)), none)
    return [
        name,
        number(arm["features"]) if arm["kind"] else "–",
        shown(arm[RATE]),
        ", ".join(number(draw[RATE]["mean"]) for draw in arm["draws"]) if arm["times"] else "–",
        shown(claim["value"], show),
        shown(arm["length"]),
        shown(arm["accuracy"], percent),
        claim["claim"] or "–",
        claim["holds"] or "–",
    ]


# --- figures --------------------------------------------------------------------------------------


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """One each of removal, addition and transfer."""
    levels = {name: _level(result, name) for name in ("target", "hybrid", "adapter")}
    label = "features, of " + number(result["features"]["total"])
    return [
        Figure(
            "removal",
            "Features removed from the replacement model",
            label,
            _UNIT,
            [*_by_size(result, "ablate"), levels["adapter"], levels["target"]],
            x_log=True,
            mark="points",
        ),
        Figure(
            "addition",
            "Features added to the hybrid",
            label,
            _UNIT,
            [*_by_size(result, "only"), levels["hybrid"], levels["adapter"]],
            x_log=True,
            mark="points",
        ),
        Figure(
            "transfer",
            "Features put onto the target",
            "scale",
            _UNIT,
            [*_by_scale(result), levels["target"]],
        ),
    ]


def _level(result: Mapping[str, Any], model: str) -> Series:
    kind = "transcoder" if model == "adapter" else model
    return _series(model, kind, [], [_whole(result, model)])


def _by_size(result: Mapping[str, Any], kind: str) -> list[Series]:
    """Each selection, and all random sets."""
    of_kind = [arm for arm in result["arms"] if arm["kind"] == kind]
    found = []
    for chosen in result["sets"]:
        arms = [a for a in of_kind if a["selection"] == chosen["key"] and not a["times"]]
        main = "selected" if chosen is result["sets"][0] else "selected otherwise"
        found.append((chosen["name"], chosen["key"] if chosen["part"] else main, arms))
    drawn = sorted((a for a in of_kind if a["times"]), key=lambda arm: arm["features"])
    found.append(("random", "random", drawn))
    return [
        _series(name, colour, [float(arm["features"]) for arm in arms], arms)
        for name, colour, arms in found
        if arms
    ]


def _by_scale(result: Mapping[str, Any]) -> list[Series]:
    """The main selection, swept, and the random sets beside it."""
    main = result["sets"][0]
    same = [
        a for a in result["arms"] if (a["kind"], a["selection"]) == ("onto-target", main["key"])
    ]
    found = []
    for name, kind, drawn in ((main["name"], "selected", 0), ("random, as many", "random", 1)):
        arms = sorted((a for a in same if a["times"] == drawn), key=lambda arm: arm["scale"])
        found.append(_series(name, kind, [arm["scale"] for arm in arms], arms))
    return [series for series in found if series.x]


def _series(name: str, kind: str, xs: Sequence[float], arms: Sequence[Arm]) -> Series:
    return series_of(name, kind, xs, [arm[RATE] for arm in arms])

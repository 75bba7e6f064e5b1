"""The data model of figures, and the figures of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from fastadapt.reporting.tables import Interval


@dataclass(frozen=True)
class Series:
    """A line, points, bars, or a level (a horizontal line).

    Attributes:
        name: entry in the legend; empty for none.
        kind: selects colour and dashes, see :mod:`fastadapt.reporting.rendering`.
        x, y: coordinates. Bars have one more ``x`` than ``y`` (their edges); a level has no ``x``.
        low, high: ends of the intervals of ``y``; empty without intervals.
    """

    name: str
    kind: str
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    @property
    def level(self) -> bool:
        """Whether the series is a level."""
        return not self.x


@dataclass(frozen=True)
class Figure:
    """A figure: series on common axes.

    Attributes:
        key: name of the figure's file, without suffix.
        title, x_label, y_label: plain texts, without markup.
        series: the series, in drawing order.
        x_log: whether the horizontal axis is logarithmic.
        y_log: whether the vertical axis is logarithmic. None: it is if all values are positive and
            the largest is more than 32 times the smallest.
        mark: ``line`` (with points), ``points`` or ``bars``.
        note: text beside the legend on a page.
        values_in_legend: whether a page's legend shows the last value of each series.
        empty: text if no series has a value that can be drawn.
    """

    key: str
    title: str
    x_label: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    x_log: bool = False
    y_log: bool | None = False
    mark: Literal["line", "points", "bars"] = "line"
    note: str = ""
    values_in_legend: bool = False
    empty: str = "no values recorded"


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """Return the plots of all parts in ``result``, the contents of ``eval.json``."""
    candidates = [
        *_against_l0(result),
        *_nmse(result),
        *_partial(result),
        *_positions(result),
        *_benchmarks(result),
    ]
    return [figure for figure in candidates if figure.series]


#: Key, title and unit of the measures that are drawn over L0.
OUTPUTS = (
    ("top1_error", "Top-1 error", "share of predicted tokens"),
    ("kl", "KL to the target", "nats per predicted token"),
)
L0 = "L0: active features per token and layer"


def _against_l0(result: Mapping[str, Any]) -> list[Figure]:
    measured = result.get("faithfulness") or {}
    return [
        Figure(
            f"{key}-l0",
            f"{title} against L0",
            L0,
            unit,
            over_l0(result, {name: values[key] for name, values in measured.items()}),
            x_log=True,
            y_log=key == "kl",
        )
        for key, title, unit in OUTPUTS
    ]


def over_l0(result: Mapping[str, Any], values: Mapping[str, Interval]) -> list[Series]:
    """Return series that plot one value per model over the model's L0.

    Models with an L0 are points, others levels. The points of the sweep (transcoders trained with
    the bridge and a sparsity) are one series.

    Args:
        result: the contents of ``eval.json``.
        values: intervals by name of the model.
    """
    series: list[Series] = []
    sweep: list[tuple[float, Interval]] = []
    for model in result["students"]:
        value, l0 = values.get(model["name"]), model.get("l0")
        if value is None or value["mean"] is None:
            continue
        if _in_sweep(model) and l0:
            sweep.append((l0, value))
        else:
            kind = model["variant"] or model["kind"]
            series.append(series_of(model["name"], kind, [l0] if l0 else [], [value]))
    if "target" in values:
        series.append(series_of("target", "target", [], [values["target"]]))
    sweep.sort(key=lambda point: point[0])
    if sweep:
        x, y = zip(*sweep, strict=True)
        series.insert(0, series_of("adapters", "transcoder", x, y))
    return series


def series_of(name: str, kind: str, x: Sequence[float], values: Sequence[Interval]) -> Series:
    """Return a series of values. Undefined values are left out; undefined ends equal the mean."""
    measured = [i for i, value in enumerate(values) if value["mean"] is not None]
    ends = []
    for end in ("mean", "low", "high"):
        pairs = ((values[i][end], values[i]["mean"]) for i in measured)
        ends.append([float(mean if v is None else v) for v, mean in pairs])  # type: ignore[arg-type]
    return Series(name, kind, [float(x[i]) for i in measured] if x else [], *ends)


def _per_model(
    result: Mapping[str, Any], curves: Mapping[str, tuple[Sequence[float], Sequence[Interval]]]
) -> list[Series]:
    """Return one series per model, in the order of ``result``; runs of the sweep sorted by L0."""
    models = [m for m in result["students"] if m["name"] in curves]
    sweep = iter(sorted(filter(_in_sweep, models), key=lambda m: m["l0"] or 0.0))
    ordered = [next(sweep) if _in_sweep(m) else m for m in models]
    return [series_of(m["name"], m["variant"] or m["kind"], *curves[m["name"]]) for m in ordered]


def _in_sweep(model: Mapping[str, Any]) -> bool:
    return model["kind"] == "transcoder" and model["variant"] == ""


def _nmse(result: Mapping[str, Any]) -> list[Figure]:
    measured = result.get("faithfulness") or {}
    drawn = []
    for key, title in (
        ("nmse_per_layer", "NMSE by layer"),
        ("nmse_token_per_layer", "NMSE by layer, mean over tokens"),
    ):
        curves = {name: (range(len(m[key])), m[key]) for name, m in measured.items() if m.get(key)}
        label = "layer (0: embeddings)"
        drawn.append(
            Figure(key.replace("_", "-"), title, label, "NMSE", _per_model(result, curves))
        )
    return drawn


def _partial(result: Mapping[str, Any]) -> list[Figure]:
    measured = result.get("partial") or {}
    drawn = []
    for mode, title, label in (
        ("first", "First n layers replaced", "n"),
        ("last", "Last n layers replaced", "n"),
        ("single", "One layer replaced", "layer"),
    ):
        start = 0 if mode == "single" else 1  # without a replaced layer the model is the target
        curves = {
            name: (list(range(start, len(m[mode]))), m[mode][start:])
            for name, m in measured.items()
        }
        unit = "KL to the target, nats per predicted token"
        series = _per_model(result, curves)
        drawn.append(Figure(f"partial-{mode}", title, label, unit, series, y_log=True))
    return drawn


def _positions(result: Mapping[str, Any]) -> list[Figure]:
    measured = result.get("faithfulness") or {}
    curves = {}
    for name, m in measured.items():
        edges, values = m["by_position"]["edges"], m["by_position"]["kl"]
        middles = [math.sqrt((a + 1) * b) for a, b in pairwise(edges)]
        curves[name] = (middles, values)
    unit = "KL to the target, nats per predicted token"
    series = _per_model(result, curves)
    label = "position in the text, from 1"
    return [
        Figure("kl-position", "KL against position", label, unit, series, x_log=True, y_log=True)
    ]


#: Key, title and unit of the measures that are drawn over L0 for each benchmark.
BENCHMARK = (
    ("accuracy", "accuracy", "share of answers that are right"),
    ("length", "length", "tokens per response"),
)


def _benchmarks(result: Mapping[str, Any]) -> list[Figure]:
    drawn = []
    for name, measured in (result.get("benchmarks") or {}).items():
        for key, title, unit in BENCHMARK:
            values = {s: v["sampled"][key] for s, v in measured.items() if "sampled" in v}
            series = over_l0(result, values)
            drawn.append(Figure(f"{name}-{key}", f"{name}: {title}", L0, unit, series, x_log=True))
    return drawn

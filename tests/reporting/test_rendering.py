"""Figures as SVG elements: scale, ticks, colours, and no references or scripts."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from fastadapt.reporting.figures import Figure, Series
from fastadapt.reporting.page import style_sheet
from fastadapt.reporting.rendering import COLOURS, THEME, colours, inline_svg, log_ticks, ramp


def line(xs: list[float], ys: list[float], **more: Any) -> Figure:
    return Figure("k", "title", "step", "unit", [Series("s", "train", xs, ys)], **more)


def labels(svg: str) -> list[str]:
    return re.findall(r"<text [^>]*>(.*?)</text>", svg)


def paths(svg: str) -> list[list[list[float]]]:
    """Return the corners of all paths in the main colour, except dots."""
    drawn = re.findall(r'<path d="([^"]*)"[^>]*var\(--main\)', svg)
    return [
        [[float(v) for v in corner.split()] for corner in re.split("[ML]", d.strip(" z"))[1:]]
        for d in drawn
        if "C" not in d
    ]


def test_colours_of_the_theme_are_those_of_the_light_page() -> None:
    light, dark = style_sheet().split("@media")[:2]
    for name, colour in THEME.items():
        assert f"--{name}:{colour};" in light
        assert f"--{name}:" in dark


def test_svg_has_no_references_and_is_reproducible() -> None:
    figure = line([1.0, 2.0], [3.0, 4.0])
    svg = inline_svg(figure)
    assert svg == inline_svg(figure)
    assert svg.startswith('<svg viewBox="0 0 400 230" role="img" aria-label="unit over step">')
    assert not re.search(r"url\(|href|xmlns| id=|<style|<metadata|<use|#000000|font-family", svg)
    # All other colours are those of the page.
    assert set(re.findall(r"(?:fill|stroke):([^;\"]*)", svg)) <= {
        "none",
        *(f"var(--{name})" for name in THEME),
    }


def test_a_line_ends_at_its_last_value_however_long() -> None:
    xs = [float(x) for x in range(10_001)]
    (corners,) = paths(inline_svg(line(xs, [math.sin(x) + 2 for x in xs])))
    assert 100 < len(corners) <= 400
    # The axes span 42..388, with margins of 2% of the line's range at both sides.
    assert corners[-1][0] == pytest.approx(388 - 346 * 0.02 / 1.04, abs=0.01)


def test_bars_are_drawn_to_scale() -> None:
    series = Series("", "density", [0.0, 1.0, 2.0, 3.0], [10.0, 0.0, 5.0])
    svg = inline_svg(Figure("k", "title", "v", "n", [series], mark="bars"))
    heights = [max(y for _, y in bar) - min(y for _, y in bar) for bar in paths(svg)]
    assert len(heights) == 2
    assert heights[0] == pytest.approx(2 * heights[1], rel=1e-4)
    assert re.findall("<title>(.*?)</title>", svg) == ["0.00 to 1.00: 10.0", "2.00 to 3.00: 5.00"]


def test_values_that_cannot_be_drawn_are_omitted() -> None:
    ys = [math.nan, 1.0, math.inf, 10.0, 0.0, 100.0]
    (corners, *_) = paths(inline_svg(line([float(x) for x in range(6)], ys, y_log=True)))
    assert len(corners) == 3
    heights = [y for _, y in corners]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.01)
    assert labels(inline_svg(line([1.0], [math.nan]))) == ["no values recorded"]
    empty = Figure("k", "title", "v", "n", mark="bars", empty="no feature fired")
    assert labels(inline_svg(empty)) == ["no feature fired"]


def test_intervals_that_reach_below_a_logarithmic_axis_stay_on_it() -> None:
    series = Series("s", "train", [1.0, 2.0], [1.0, 2.0], [-1.0, 0.0], [3.0, 4.0])
    svg = inline_svg(Figure("k", "title", "x", "y", [series], y_log=True))
    low, high = (10, 194)  # vertical range of the axes in the view box
    band = re.search(r'<path d="([^"]*)" transform="translate\(0 230\)"', svg)
    assert band is not None
    numbers = [float(v) for v in re.findall(r"-?[\d.]+", band[1])]
    assert len(numbers) >= 8
    assert all(low <= 230 + y <= high for y in numbers[1::2])


@pytest.mark.parametrize(("ys", "log"), [([1.0, 33.0], True), ([1.0, 31.0], False)])
def test_the_vertical_axis_is_logarithmic_where_values_span_much(
    ys: list[float], log: bool
) -> None:
    figure = line([1.0, 2.0], ys, y_log=None)
    assert (inline_svg(figure) == inline_svg(line([1.0, 2.0], ys, y_log=True))) == log


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 600), (-5, 0), (0.0123, 0.0124), (3, 1e6)])
def test_linear_ticks_are_few(low: float, high: float) -> None:
    steps, ticks = " ".join(labels(inline_svg(line([0.0, 600.0], [low, high])))).split(" step ")
    assert steps == "0 200 400 600"
    assert 2 <= len(ticks.split()) <= 6
    assert all(re.fullmatch(r"−?[\d.]+(k|M|e−?\d+)?", tick) for tick in ticks.split())


@pytest.mark.parametrize(("low", "high"), [(1e-8, 1e3), (0.5, 300), (1, 1.5), (2, 9), (231, 287)])
def test_log_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low * 0.99 <= t <= high * 1.01 for t in ticks)


def test_layers_have_the_colours_of_a_ramp() -> None:
    layers = [Series(f"layer {i}", "layer", [1.0], [1.0]) for i in range(28)]
    assert len(set(colours(layers))) == 28
    assert colours(layers[:1]) == [ramp(("#6c52d6", "#000000"), 0.0)]


def test_two_models_of_one_kind_have_two_colours() -> None:
    one = Series("norms", "norms", [0.0], [1.0])
    assert colours([one]) == [COLOURS["norms"]]
    first, second = colours([one, one])
    assert first == COLOURS["norms"].lower()
    assert second not in (first, *COLOURS.values())


def test_several_models_of_several_kinds_have_different_colours() -> None:
    kinds = ("dense", "norms", "lora", "changed")
    series = [Series(f"{kind} {i}", kind, [0.0], [1.0]) for kind in kinds for i in range(3)]
    assert len(set(colours(series))) == len(series)


def test_series_without_a_name_have_the_colour_of_the_legend() -> None:
    series = [Series(name, "random", [0.0], [1.0]) for name in ("random features", "", "")]
    assert colours(series) == [COLOURS["random"]] * 3

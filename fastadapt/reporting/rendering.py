"""Renders figures with matplotlib, as PNG files and as SVG elements for HTML pages."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from fastadapt.reporting.figures import Figure, Series
from fastadapt.reporting.formatting import number

#: Colours of the light theme by their names in ``templates/style.css``. SVG elements refer to the
#: names, so that they follow the browser's light or dark setting.
THEME = {
    "ink": "#16181d",
    "soft": "#5a606c",
    "line": "#e2e2de",
    "grid": "#ecece8",
    "main": "#2b6fd6",
    "held": "#d2521c",
    "base": "#858a94",
}
#: Colours by kind of series. Those of models and sets are the colour-blind safe palette of Okabe
#: and Ito.
COLOURS = {
    "transcoder": "#0072B2",
    "dense": "#56B4E9",
    "no-bridge": "#CC79A7",
    "changed": THEME["ink"],
    "mlp": "#009E73",
    "norms": "#E69F00",
    "bias": "#F0E442",
    "lora": "#117733",
    "whole-mlp": "#882255",
    "hybrid": "#D55E00",
    "base": "#8a8a8a",
    "target": "#999933",
    # Parts of a model, beside mlp and norms.
    "attention": "#0072B2",
    "embeddings": "#CC79A7",
    # Sets of features of the study.
    "selected": "#009E73",
    "selected otherwise": "#E69F00",
    "hesitation": "#56B4E9",
    "template": "#CC79A7",
    "random": "#8a8a8a",
    # Curves of a training run.
    "every step": THEME["main"],
    "train": THEME["main"],
    "held-out": THEME["held"],
    "reference": THEME["base"],
    "density": THEME["main"],
}
#: Stops of colour ramps by kind, for several series of one kind. Visible on light and dark pages.
RAMPS = {
    "transcoder": ("#9ecae1", "#6baed6", "#4292c6", "#2b74bd"),
    "layer": ("#6c52d6", "#2f7ce0", "#149e92", "#78aa32", "#e09814"),
    "changed": ("#9aa0ac", "#6b7180"),
}
#: Where the ramp of a kind that has a colour alone leads to.
SHADE = "#5b606b"
DASHES = {"hybrid": "--", "base": ":", "target": "-.", "reference": "--"}
_CSS_LINES = {"--": "dashed", ":": "dotted", "-.": "dashed"}
#: Changes to matplotlib's default settings. The user's settings are not applied.
_SETTINGS = {
    "text.parse_math": False,  # names may contain $
    "svg.fonttype": "none",
    "svg.hashsalt": "fastadapt",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "grid.color": THEME["grid"],
    "axes.edgecolor": THEME["line"],
    **dict.fromkeys(("text.color", "axes.titlecolor"), THEME["ink"]),
    **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), THEME["soft"]),
    # Ticks of a non-zero size are drawn as SVG references, which inline_svg avoids.
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    "xtick.major.pad": 6,
}
#: Largest number of points of a series, and largest number of points that are marked by dots.
MAX_POINTS, MAX_DOTS = 400, 40


def ramp(stops: Sequence[str], position: float) -> str:
    """Return the colour at ``position`` in [0, 1] of a ramp with equidistant stops.

    Example:
        >>> ramp(["#000000", "#204060", "#ffffff"], 0.25)
        '#102030'
    """
    rgb = [[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops]
    scaled = position * (len(stops) - 1)
    low = min(int(scaled), len(stops) - 2)
    mixed = (a + (b - a) * (scaled - low) for a, b in zip(rgb[low], rgb[low + 1], strict=True))
    return "#" + "".join(f"{round(value):02x}" for value in mixed)


def colours(series: Sequence[Series]) -> list[str]:
    """Return a colour for each series. Several series of one kind get colours of a ramp.

    Series without a name have no entry in the legend, and the colour of their kind's first.
    """
    counts = Counter(s.kind for s in series if s.name)
    seen: Counter[str] = Counter()
    chosen = []
    for s in series:
        if (s.name and counts[s.kind] > 1) or s.kind not in COLOURS:
            # A ramp to SHADE ends before it: the last series of two kinds would be equal.
            last = counts[s.kind] - (s.kind in RAMPS)
            stops = RAMPS[s.kind] if s.kind in RAMPS else (COLOURS[s.kind], SHADE)
            chosen.append(ramp(stops, seen[s.kind] / max(1, last)))
            seen[s.kind] += 1
        else:
            chosen.append(COLOURS[s.kind])
    return chosen


def write_png(figure: Figure, path: Path) -> None:
    """Write ``figure`` as a PNG file of 7.6 by 4.2 inches at 200 dpi."""
    _write(figure, path, format="png", dpi=200)


def write_svg(figure: Figure, path: Path) -> None:
    """Write ``figure`` as an SVG file of 7.6 by 4.2 inches. Equal figures give equal files."""
    _write(figure, path, format="svg", metadata={"Date": None})


def _write(figure: Figure, path: Path, **how: Any) -> None:
    from matplotlib import style
    from matplotlib.figure import Figure as Canvas

    with style.context(["default", _SETTINGS]):
        canvas = Canvas(figsize=(7.6, 4.2), layout="constrained")
        axes = canvas.add_subplot()
        handles = _plot(axes, figure)
        axes.set_title(figure.title, fontsize=11, loc="left")
        axes.set_xlabel(figure.x_label)
        axes.set_ylabel(figure.y_label)
        # matplotlib omits labels that begin with "_", so the names are set afterwards.
        named = [(h, s.name) for h, s in zip(handles, figure.series, strict=False) if s.name]
        legend = canvas.legend(
            [handle for handle, _ in named],
            [str(i) for i in range(len(named))],
            loc="outside right upper",
            fontsize=8,
            frameon=False,
        )
        for text, (_, name) in zip(legend.get_texts(), named, strict=True):
            text.set_text(name)
        canvas.savefig(path, **how)


def inline_svg(figure: Figure, size: tuple[float, float] = (400, 230)) -> str:
    """Return ``figure`` as an ``<svg>`` element, without title, vertical label and legend.

    The element has no script, reference, identifier or namespace. Equal figures give equal texts.
    Names of series are ``<title>`` elements, which a browser shows on hover.

    Args:
        figure: the figure.
        size: width and height of the view box.
    """
    from matplotlib import style
    from matplotlib.figure import Figure as Canvas

    width, height = size
    settings = {**_SETTINGS, "font.size": 11, "figure.facecolor": "none", "axes.facecolor": "none"}
    with style.context(["default", settings]):
        canvas = Canvas(figsize=(width / 72, height / 72))
        axes = canvas.add_axes((42 / width, 36 / height, 1 - 54 / width, 1 - 46 / height))
        handles = _plot(axes, figure)
        titles = _titles(figure)
        for i, handle in enumerate(handles):
            handle.set_gid(f"title-{i}")
        if handles:
            axes.set_xlabel(figure.x_label, loc="right", labelpad=1)
        else:
            axes.set_axis_off()
            axes.text(0.5, 0.5, figure.empty, ha="center", transform=axes.transAxes)
        text = io.StringIO()
        canvas.savefig(text, format="svg", metadata={"Date": None})
    drawn = ElementTree.fromstring(text.getvalue())
    defined = {e.get("id", ""): e for e in drawn.iter() if e.tag.endswith("}path")}
    svg = ElementTree.Element("svg", viewBox=drawn.attrib["viewBox"], role="img")
    label = f"{figure.y_label} over {figure.x_label}".strip()  # the title is in the page's text
    svg.set("aria-label", label if handles else figure.empty)
    _copy_children(drawn, svg, defined, titles)
    return ElementTree.tostring(svg, encoding="unicode")


class LegendKey(NamedTuple):
    """An entry of a page's legend.

    Attributes:
        name: name of the series.
        colour: CSS colour.
        line: CSS line style.
        value: last value of the series, as text.
    """

    name: str
    colour: str
    line: str
    value: str


def legend_keys(figure: Figure) -> list[LegendKey]:
    """Return the legend of a figure on a page."""
    return [
        LegendKey(
            s.name,
            _themed(colour),
            _CSS_LINES.get(DASHES.get(s.kind, ""), "solid"),
            number(s.y[-1] if s.y else None),
        )
        for s, colour in zip(figure.series, colours(figure.series), strict=True)
        if s.name
    ]


def _titles(figure: Figure) -> list[str]:
    """Return the SVG title (name of the series) of each handle that :func:`_plot` returned."""
    if figure.mark != "bars":
        return [s.name for s in figure.series]
    return [
        f"{left:.2f} to {right:.2f}: {number(count)}"
        for s in figure.series
        for left, right, count in zip(s.x, s.x[1:], s.y, strict=False)
        if count
    ]


def _copy_children(
    source: ElementTree.Element,
    target: ElementTree.Element,
    defined: dict[str, ElementTree.Element],
    titles: Sequence[str],
) -> None:
    """Copy paths, texts and groups. A reference is replaced by the path that it refers to."""
    for child in source:
        tag, style = child.tag.rpartition("}")[2], child.get("style", "")
        if tag == "g":
            group = ElementTree.Element("g")
            kind, _, index = child.get("id", "").partition("-")
            _copy_children(child, group, defined, titles)
            if kind == "title" and len(group) and (title := titles[int(index)]):
                ElementTree.SubElement(group, "title").text = title
            if len(group) > 1 or "title-" in child.get("id", ""):
                target.append(group)
            else:
                target.extend(group)
        elif tag in ("path", "text", "use"):
            copy = ElementTree.SubElement(target, "text" if tag == "text" else "path")
            attributes = dict(child.attrib)
            if tag == "use":
                path = defined[attributes["{http://www.w3.org/1999/xlink}href"][1:]]
                style += "; " + path.get("style", "")
                move = f"translate({attributes['x']} {attributes['y']})"
                attributes = {"d": path.attrib["d"], "transform": move}
            names = ("x", "y") if tag == "text" else ("d", "transform")
            for name in names:
                if name in attributes:
                    copy.set(name, " ".join(attributes[name].split()))
            copy.set("style", _page_style(style))
            copy.text = child.text if tag == "text" else None


def _page_style(style: str) -> str:
    """Return a style with the page's colour names, and without the font family."""
    parts = (part.strip() for part in style.split(";"))
    parts = (part for part in parts if part and not part.startswith("font-family"))
    return ";".join(
        f"{name}:{_themed(value.strip())}" for name, _, value in (p.partition(":") for p in parts)
    )


def _themed(colour: str) -> str:
    name = next((name for name, value in THEME.items() if value == colour), None)
    return f"var(--{name})" if name else colour


# --- drawing for PNG and SVG ----------------------------------------------------------------------


class _Point(NamedTuple):
    x: float
    y: float
    low: float
    high: float


def _points(series: Series, log: bool) -> list[_Point]:
    """Return the points that can be drawn, at most ``MAX_POINTS``, always including the last."""
    xs = series.x or [0.0] * len(series.y)
    lows, highs = series.low or series.y, series.high or series.y
    points = [
        _Point(*numbers)
        for numbers in zip(xs, series.y, lows, highs, strict=True)
        if math.isfinite(numbers[1]) and (numbers[1] > 0 or not log)
    ]
    stride = max(1, math.ceil(len(points) / MAX_POINTS))
    return points[::-1][::stride][::-1]


def _plot(axes: Any, figure: Figure) -> list[Any]:
    """Draw the series. Return one handle per drawn series, or per bar."""
    if figure.mark == "bars":
        return _plot_bars(axes, figure)
    y_log = figure.y_log
    if y_log is None:
        ys = [point.y for s in figure.series for point in _points(s, log=False)]
        y_log = bool(ys) and min(ys) > 0 and max(ys) > 32 * min(ys)
    drawn = [_points(s, y_log) for s in figure.series]
    # On a logarithmic axis, an interval that reaches 0 ends at the smallest drawn value.
    positive = (v for points in drawn for p in points for v in (p.low, p.y) if v > 0)
    floor = min(positive, default=0.0) if y_log else -math.inf
    handles: list[Any] = []
    for s, colour, points in zip(figure.series, colours(figure.series), drawn, strict=True):
        dash = DASHES.get(s.kind, "-")
        lows = [max(p.low, floor) for p in points]
        xs, ys, highs = ([getattr(p, name) for p in points] for name in ("x", "y", "high"))
        if s.level and points:
            handles.append(axes.axhline(ys[0], color=colour, linestyle=dash, linewidth=1.4))
            if s.low:
                axes.axhspan(lows[0], highs[0], color=colour, alpha=0.12, linewidth=0)
            continue
        faint = s.kind == "every step"
        joined = figure.mark == "line" and len(xs) > 1
        handles += axes.plot(
            xs,
            ys,
            color=colour,
            linestyle=dash if joined else "none",
            linewidth=1 if faint else 1.6,
            alpha=0.3 if faint else None,
            marker="o" if len(xs) <= MAX_DOTS and not (faint and joined) else None,
            markersize=3.5,
        )
        if s.low and joined:
            axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)
        elif s.low:
            axes.vlines(xs, lows, highs, color=colour)
    if not any(drawn):
        return []
    # Set after drawing: matplotlib gives a single value on an empty logarithmic axis no range.
    scales = {True: "log", False: "linear"}
    axes.set(xscale=scales[figure.x_log and any(s.x for s in figure.series)], yscale=scales[y_log])
    axes.get_xlim(), axes.get_ylim()  # compute limits now: the locators set below change them
    axes.autoscale(False)
    xs = [p.x for s, points in zip(figure.series, drawn, strict=True) if s.x for p in points]
    if all(s.level for s in figure.series):
        axes.set_xticks([])
    else:
        _set_ticks(axes.xaxis, whole=all(x == int(x) for x in xs))
    _set_ticks(axes.yaxis, whole=False)
    if not y_log and all(p.low >= 0 for points in drawn for p in points):
        axes.set_ylim(bottom=0)
    return handles


def _plot_bars(axes: Any, figure: Figure) -> list[Any]:
    bars: list[Any] = []
    for s, colour in zip(figure.series, colours(figure.series), strict=True):
        for left, right, count in zip(s.x, s.x[1:], s.y, strict=False):
            if count:
                bars += axes.bar(left, count, 0.88 * (right - left), align="edge", color=colour)
    if bars:
        edges = [edge for s in figure.series for edge in s.x]
        axes.set_xlim(min(edges), max(edges))
        _set_ticks(axes.xaxis, whole=True)
        _set_ticks(axes.yaxis, whole=True)
    return bars


def _set_ticks(axis: Any, whole: bool) -> None:
    """Set the ticks of an axis and their labels. Call after all series are drawn."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    if axis.get_scale() == "log":
        axis.set_major_locator(FixedLocator(log_ticks(*sorted(axis.get_view_interval()))))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(5, integer=whole, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda value, _: tick_label(value))


def log_ticks(low: float, high: float) -> list[float]:
    """Return 2 to 6 ticks in [low, high]: powers of ten, over few decades also times 2 and 5.

    Example:
        >>> log_ticks(0.5, 300)
        [1.0, 10.0, 100.0]
    """
    from matplotlib.ticker import MaxNLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high < 160 * low else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
    if len(ticks) < 2:
        linear = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
        return [float(tick) for tick in linear if low <= tick <= high]
    return ticks[:: max(1, math.ceil(len(ticks) / 6))]


def tick_label(value: float) -> str:
    """Format the value of an axis tick.

    Example:
        >>> tick_label(-25_000), tick_label(2e-05), tick_label(0.1 + 0.2)
        ('−25k', '2e−5', '0.3')
    """
    size = abs(value)
    if 0 < size < 1e-3:
        exponent = math.floor(math.log10(size) + 1e-9)
        text = f"{value / 10.0**exponent:.2g}e{exponent}"
    elif size >= 10_000:
        text = f"{value / 1e3:g}k" if size < 1e6 else f"{value / 1e6:g}M"
    else:
        text = f"{value:.6g}"
    return text.replace("-", "−")

"""Figures as PNG files (matplotlib) and as interactive pages (plotly), the same in both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastadapt.errors import UserError
from fastadapt.reporting.figures import Figure, Series

#: Colours that are told apart by colour-blind readers (Okabe and Ito), by kind of student.
COLOURS = {
    "transcoder": "#0072B2",
    "dense": "#56B4E9",
    "no-bridge": "#CC79A7",
    "changed": "#000000",
    "mlp": "#009E73",
    "norms": "#E69F00",
    "hybrid": "#D55E00",
    "base": "#8a8a8a",
    "target": "#999933",
    # Sets of features, in a study of them.
    "selected": "#009E73",
    "selected otherwise": "#E69F00",
    "hesitation": "#56B4E9",
    "template": "#CC79A7",
    "random": "#8a8a8a",
}
DASHES = {"hybrid": "dash", "base": "dot", "target": "dashdot"}
#: Of several adapters in one figure: from sparse to dense.
SHADES = ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")
_MATPLOTLIB = {"dash": "--", "dot": ":", "dashdot": "-."}


def require_drawing() -> None:
    """Raise ``UserError`` where matplotlib or plotly is not installed, and say what to install."""
    try:
        import matplotlib  # noqa: F401
        import plotly  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"plots need {error.name}; install an extra that has it: pip install 'fastadapt[eval]'"
        ) from error


def colours(series: Sequence[Series]) -> list[str]:
    """One per series; several adapters get shades of one colour."""
    adapters = [s for s in series if s.kind == "transcoder"]
    if len(adapters) < 2:
        return [COLOURS[s.kind] for s in series]
    shades = itertools.cycle(SHADES)
    return [next(shades) if s.kind == "transcoder" else COLOURS[s.kind] for s in series]


def write_png(figure: Figure, path: Path) -> None:
    """Draw ``figure`` into a PNG file, 7.6 by 4.2 inches at 200 dots an inch."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    canvas = Canvas(figsize=(7.6, 4.2), layout="constrained")
    axes = canvas.add_subplot()
    handles: list[Any] = []
    for s, colour in zip(figure.series, colours(figure.series), strict=True):
        dash = _MATPLOTLIB.get(DASHES.get(s.kind, ""), "-")
        if s.level:
            handles.append(axes.axhline(s.y[0], color=colour, linestyle=dash, linewidth=1.4))
            axes.axhspan(s.low[0], s.high[0], color=colour, alpha=0.12, linewidth=0)
            continue
        line = dash if figure.joined and len(s.x) > 1 else "none"
        handles += axes.plot(s.x, s.y, color=colour, linestyle=line, marker="o", markersize=3.5)
        if len(s.x) > 1 and figure.joined:
            axes.fill_between(s.x, s.low, s.high, color=colour, alpha=0.15, linewidth=0)
        else:
            axes.vlines(s.x, s.low, s.high, color=colour)
    xs = [x for s in figure.series for x in s.x]
    if figure.x_log and xs:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(_round_numbers(min(xs), max(xs))))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    elif _counted(xs):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if figure.y_log:
        axes.set_yscale("log")
    if all(s.level for s in figure.series):
        axes.set_xticks([])
    axes.set_ylim(bottom=None if figure.y_log else 0)
    axes.set_title(figure.title, fontsize=11, loc="left", parse_math=False)
    axes.set_xlabel(figure.x_label, parse_math=False)
    axes.set_ylabel(figure.y_label, parse_math=False)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # matplotlib leaves out a label that begins with "_", and reads "$" as mathematics: the names
    # are put in afterwards, as they are.
    labels = [str(i) for i in range(len(handles))]
    legend = canvas.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    for text, s in zip(legend.get_texts(), figure.series, strict=True):
        text.set_parse_math(False)
        text.set_text(s.name)
    canvas.savefig(path, dpi=200, format="png")


def _counted(xs: Sequence[float]) -> bool:
    """Whether they are few whole numbers, such as layers."""
    return bool(xs) and all(x == int(x) for x in xs) and max(xs) <= 12


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from ``low`` to ``high``; beyond two decades, the powers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
    return [step * 10.0**power for power in powers for step in steps]


def interactive(figure: Figure) -> Any:
    """``figure`` as plotly's, without its title and unit."""
    import plotly.graph_objects as go

    drawn = go.Figure()
    xs = [x for s in figure.series for x in s.x] or [0.0, 1.0]
    ends = [min(xs), max(xs)] if min(xs) < max(xs) else [min(xs) / 2, max(xs) * 2 or 1.0]
    for s, colour in zip(figure.series, colours(figure.series), strict=True):
        x = ends if s.level else s.x
        y, low, high = ((v * 2 if s.level else v) for v in (s.y, s.low, s.high))
        mode = "lines" if s.level else "lines+markers" if figure.joined else "markers"
        drawn.add_scatter(
            x=x,
            y=y,
            name=escape(s.name, quote=False),  # plotly reads tags
            mode=mode,
            line={"color": colour, "dash": DASHES.get(s.kind, "solid"), "width": 2},
            error_y=None
            if s.level
            else {
                "type": "data",
                "array": [h - v for h, v in zip(high, y, strict=True)],
                "arrayminus": [v - b for b, v in zip(low, y, strict=True)],
                "thickness": 1,
            },
            hovertemplate="%{y:.4g}" + (f" [{low[0]:.4g}, {high[0]:.4g}]" if s.level else ""),
        )
    # No background, and greys that are read on a light page and on a dark one.
    drawn.update_layout(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 44, "r": 12, "t": 8, "b": 46},
        height=360,
        legend={"font": {"size": 11}, "orientation": "h", "y": -0.2},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#b5b9c0"},
        hovermode="x unified" if len(xs) > 2 else "closest",
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#7d838f"},
        hoverlabel={"font": {"color": "#222222"}},
    )
    any_x = any(not s.level for s in figure.series)
    grid = {"showgrid": True, "gridcolor": "rgba(128,128,128,.22)", "zeroline": False}
    drawn.update_xaxes(
        dtick=1 if _counted(xs) and not figure.x_log else None,
        title=figure.x_label,
        type="log" if figure.x_log and any_x else "linear",
        showticklabels=any_x,
        **grid,
    )
    drawn.update_yaxes(
        type="log" if figure.y_log else "linear",
        rangemode="normal" if figure.y_log else "tozero",
        **grid,
    )
    return drawn

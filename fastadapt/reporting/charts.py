"""Small charts as inline SVG, for the report: no script, no network, colours from CSS variables.

A chart is drawn in a view box of 400 by 230 units and scales with its column. Colours are the
classes of the report's style sheet, so one drawing serves light and dark pages. Values that are
not finite are left out; on a log axis so are values that are not positive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fastadapt.reporting.formatting import number

WIDTH, HEIGHT = 400.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 42.0, 12.0, 10.0, 36.0
MAX_POINTS = 400
# Visible on both a light and a dark page; a layer's colour is read off this ramp by its depth.
RAMP = ((108, 82, 214), (47, 124, 224), (20, 158, 146), (120, 170, 50), (224, 152, 20))


@dataclass(frozen=True)
class Series:
    """One line: `xs` steps, `ys` values; `style`: faint, main, held or base, or a colour."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "main"


def ramp(position: float) -> str:
    """The colour at `position` in 0..1 of the ramp."""
    at = min(max(position, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(at), len(RAMP) - 2)
    mix = at - low
    return "#" + "".join(
        f"{round(a + (b - a) * mix):02x}" for a, b in zip(RAMP[low], RAMP[low + 1], strict=True)
    )


def smooth(ys: Sequence[float], window: int) -> list[float]:
    """Trailing mean over the finite ones of the last `window` values (NaN where there is none)."""
    out = []
    for i in range(len(ys)):
        finite = [y for y in ys[max(0, i - window + 1) : i + 1] if math.isfinite(y)]
        out.append(sum(finite) / len(finite) if finite else math.nan)
    return out


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that lie in [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next((m for m in (1, 2, 5) if (high - low) / (step * m) <= count), 10)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], with 2 and 5 where few; round numbers where fewer than two."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    parts = (1, 2, 5) if math.log10(high / low) < 2.2 else (1,)
    ticks = [m * 10.0**d for d in decades for m in parts]
    ticks = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
    if len(ticks) < 2:
        return linear_ticks(low, high)
    return ticks[:: max(1, math.ceil(len(ticks) / 6))]


def _range(values: list[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return (low / 1.6, high * 1.6) if low == high else (low / 1.12, high * 1.12)
    if low >= 0 and low < 0.6 * high:
        low = 0.0
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low - pad if low else 0.0), high + pad


def _points(series: Series, log: bool) -> list[tuple[float, float]]:
    kept = [
        (float(x), float(y))
        for x, y in zip(series.xs, series.ys, strict=True)
        if y is not None and math.isfinite(y) and (y > 0 or not log)
    ]
    stride = max(1, math.ceil(len(kept) / MAX_POINTS))
    # From the end, so that the last value is always drawn.
    return kept[::-1][::stride][::-1]


def empty_chart(message: str, size: tuple[float, float] = (WIDTH, HEIGHT)) -> str:
    """A frame that says why there is nothing to draw."""
    width, height = size
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(message)}">'
        f'<text class="none" x="{width / 2:g}" y="{height / 2:g}">{escape(message)}</text></svg>'
    )


def line_chart(
    label: str, series: Sequence[Series], *, log: bool | None = None, x_label: str = "step"
) -> str:
    """Lines over steps.

    Args:
        label: what the drawing shows, for readers that do not see it.
        series: the lines, drawn in order.
        log: whether the vertical axis is logarithmic; None: where values span 1.5 decades.
        x_label: name of the horizontal axis.
    """
    values = [y for s in series for _, y in _points(s, bool(log))]
    if log is None:
        positive = [v for v in values if v > 0]
        log = len(positive) == len(values) > 0 and max(positive) > 32 * min(positive)
    lines = [(s, _points(s, log)) for s in series]
    drawn = [p for _, points in lines for p in points]
    if not drawn:
        return empty_chart("no values recorded")
    y_low, y_high = _range([y for _, y in drawn], log)
    x_low, x_high = min(x for x, _ in drawn), max(x for x, _ in drawn)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5

    def sx(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def sy(y: float) -> float:
        share = (
            math.log(y / y_low) / math.log(y_high / y_low)
            if log
            else (y - y_low) / (y_high - y_low)
        )
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    out = [f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(label)}">']
    for tick in log_ticks(y_low, y_high) if log else linear_ticks(y_low, y_high):
        y = sy(tick)
        out.append(f'<path class="grid-line" d="M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}"/>')
        out.append(f'<text class="y" x="{LEFT - 7:g}" y="{y + 3.8:.1f}">{_tick(tick)}</text>')
    out.append(_x_axis([(sx(t), _tick(t)) for t in _whole(linear_ticks(x_low, x_high))], x_label))
    for s, points in lines:
        out.append(_line(s, [(sx(x), sy(y)) for x, y in points]))
    return "".join([*out, "</svg>"])


def _whole(ticks: list[float]) -> list[float]:
    return [t for t in ticks if abs(t - round(t)) < 1e-9]


def _tick(value: float) -> str:
    if value and abs(value) < 1e-3:
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        return f"{value / 10.0**exponent:.2g}e{exponent}".replace("-", "−")
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    return f"{value:.6g}".replace("-", "−")


def _x_axis(
    ticks: list[tuple[float, str]], label: str, size: tuple[float, float] = (WIDTH, HEIGHT)
) -> str:
    width, height = size
    bottom = height - BOTTOM
    marks = "".join(
        f'<text class="x" x="{x:.1f}" y="{bottom + 15:g}">{text}</text>' for x, text in ticks
    )
    return (
        f'<path class="axis" d="M{LEFT:g} {bottom:g}H{width - RIGHT:g}"/>{marks}'
        f'<text class="name" x="{width - RIGHT:g}" y="{height - 5:g}">{escape(label)}</text>'
    )


def _line(series: Series, points: list[tuple[float, float]]) -> str:
    if not points:
        return ""
    own = series.style.startswith("#")
    look = f'class="line" style="stroke:{series.style}"' if own else f'class="line {series.style}"'
    fill = f'style="fill:{series.style}"' if own else f'class="dot {series.style}"'
    title = f"<title>{escape(series.name)}</title>"
    if len(points) == 1:
        x, y = points[0]
        return f'<circle {fill} cx="{x:.1f}" cy="{y:.1f}" r="3.2">{title}</circle>'
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dots = ""
    if series.style == "held" and len(points) <= 40:
        dots = "".join(f'<circle {fill} cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in points)
    return f'<path {look} d="{path}">{title}</path>{dots}'


def histogram(
    label: str,
    edges: Sequence[float],
    counts: Sequence[float],
    *,
    x_label: str,
    size: tuple[float, float] = (WIDTH, HEIGHT),
) -> str:
    """Bars of `counts` [n] between `edges` [n + 1]; a bar tells its count on hover."""
    width, height = size
    if not any(counts):
        return empty_chart("no feature fired", size)
    low, high, top = edges[0], edges[-1], max(counts)
    bottom = height - BOTTOM

    def sx(x: float) -> float:
        return LEFT + (x - low) / (high - low) * (width - LEFT - RIGHT)

    out = [f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">']
    scale = (bottom - TOP) / (top * 1.06)
    for tick in _whole(linear_ticks(0, top * 1.06, 4)):
        y = bottom - tick * scale
        out.append(f'<path class="grid-line" d="M{LEFT:g} {y:.1f}H{width - RIGHT:g}"/>')
        out.append(f'<text class="y" x="{LEFT - 7:g}" y="{y + 3.8:.1f}">{_tick(tick)}</text>')
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            tall, wide = count * scale, max(sx(right) - sx(left) - 1.2, 0.8)
            out.append(
                f'<rect class="bar" x="{sx(left) + 0.6:.1f}" y="{bottom - tall:.1f}" '
                f'width="{wide:.1f}" height="{tall:.1f}" rx="1">'
                f"<title>{left:.2f} to {right:.2f}: {number(count)}</title></rect>"
            )
    out.append(_x_axis([(sx(t), _tick(t)) for t in _whole(linear_ticks(low, high))], x_label, size))
    return "".join([*out, "</svg>"])

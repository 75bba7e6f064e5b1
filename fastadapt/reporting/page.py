"""An evaluation as one page, ``report.html``: its tables, and its plots to move about in.

The page needs no network: the library that draws the plots is in it (some 4 MB).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastadapt.io.atomic import replacing
from fastadapt.reporting.figures import Figure
from fastadapt.reporting.html import STYLE, card, grid, section, table
from fastadapt.reporting.rendering import interactive
from fastadapt.reporting.tables import Table

#: None of them sends anything anywhere.
_BUTTONS = ["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]
_MORE = """
.plots{grid-template-columns:repeat(auto-fill,minmax(min(100%,520px),1fr))}
.plots .card>.legend{display:none}
"""


def write_page(
    result: Mapping[str, Any],
    found: Sequence[Table],
    drawn: Sequence[Figure],
    path: Path,
    what: str = "evaluation",
) -> None:
    """Write the page.

    Args:
        result: the contents of ``eval.json``.
        found: its tables.
        drawn: its figures.
        path: of the page.
        what: it is about, in a word.
    """
    from plotly.offline import get_plotlyjs

    pair = result["pair"]
    title = f"{Path(pair['target']).name} against {Path(pair['base']).name}"
    body = [
        '<div class="top"><p class="brand">fastadapt · '
        f"{escape(what)}</p><h1>{escape(title)}</h1></div>",
        *(section(t.title, table(t.head, t.rows), t.note) for t in found),
        section("Plots", grid([_card(figure) for figure in drawn], "grid plots")),
        section("Settings", table(["", ""], _facts(result), "facts")),
    ]
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)} · fastadapt</title><style>{STYLE}{_MORE}</style>"
        f"<script>{get_plotlyjs()}</script></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    with replacing(path) as staged:
        staged.write_text(text, encoding="utf-8")


def _card(figure: Figure) -> str:
    chart = interactive(figure).to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"plot-{figure.key}",
        config={"displaylogo": False, "responsive": True, "modeBarButtons": [_BUTTONS]},
    )
    return card(figure.title, figure.y_label, chart)


def _facts(result: Mapping[str, Any]) -> list[list[str]]:
    def flat(values: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
        rows = []
        for key, value in values.items():
            if isinstance(value, Mapping):
                rows += flat(value, f"{prefix}{key}.")
            else:
                rows.append([prefix + key, str(value)])
        return rows

    return flat({"pair": result["pair"], **result["settings"], "versions": result["versions"]})

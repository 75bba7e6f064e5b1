"""Writes HTML pages from the templates in ``templates/``.

Pages need no network and no script, and follow the browser's light or dark setting. jinja2 escapes
all texts. Plots come from :mod:`fastadapt.reporting.rendering`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from fastadapt.io.atomic import replacing
from fastadapt.reporting.figures import Figure
from fastadapt.reporting.rendering import inline_svg, legend_keys
from fastadapt.reporting.tables import Table

#: Ends of an interval in a cell, see :func:`fastadapt.reporting.tables.shown`.
_INTERVAL = re.compile(r"(\[[^\[\]]+, [^\[\]]+\])")
_TEMPLATES = resources.files("fastadapt.reporting") / "templates"


def style_sheet() -> str:
    """Return the style sheet shared by all pages."""
    return (_TEMPLATES / "style.css").read_text(encoding="utf-8")


@cache
def _environment() -> Any:
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FunctionLoader(lambda name: (_TEMPLATES / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = lambda figure, size: Markup(inline_svg(figure, size))
    environment.filters["legend"] = legend_keys
    environment.filters["ends"] = _with_ends
    return environment


def render(template: str, **values: Any) -> str:
    """Return the text of a template with its variables; every value is escaped for HTML.

    Args:
        template: name of a file in ``templates/``.
        values: variables of the template.
    """
    text: str = _environment().get_template(template).render(values)
    return text


def render_page(path: Path, template: str, **values: Any) -> None:
    """Write an HTML page from a template; an existing file is replaced.

    Args:
        path: path of the page.
        template, values: arguments of :func:`render`.

    Raises:
        OSError: the file cannot be written.
    """
    text = render(template, **values)
    with replacing(path) as staged:
        staged.write_text(text + "\n", encoding="utf-8")


def _with_ends(cell: str) -> Any:
    """Return a cell as HTML in which the ends of an interval stay on one line."""
    from markupsafe import Markup, escape

    parts = _INTERVAL.split(cell)
    whole = [escape(part) for part in parts[::2]]
    ends = [Markup('<span class="ends">{}</span>').format(part) for part in parts[1::2]]
    return Markup("").join(part for pair in zip(whole, [*ends, ""], strict=True) for part in pair)


def write_page(
    result: Mapping[str, Any],
    tables: Sequence[Table],
    figures: Sequence[Figure],
    path: Path,
    subject: str = "evaluation",
) -> None:
    """Write a page with the tables, plots and settings of an evaluation.

    Args:
        result: the contents of ``eval.json``.
        tables: the tables.
        figures: the plots.
        path: path of the page.
        subject: subject of the page, in one word.
    """
    pair = result["pair"]
    facts = {"pair": pair, **result["settings"], "versions": result["versions"]}
    render_page(
        path,
        "evaluation.html.j2",
        title=f"{Path(pair['target']).name} against {Path(pair['base']).name}",
        subject=subject,
        tables=tables,
        figures=figures,
        facts=_flatten(facts),
    )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Return rows (dotted key, value) of nested mappings."""
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append([prefix + key, str(value)])
    return rows

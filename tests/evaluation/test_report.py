"""Tables, figures and the page of an evaluation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import results
from browser import chromium
from results import LAYERS, MODELS, synthetic_result

from fastadapt.reporting.figures import Figure, Series, figures
from fastadapt.reporting.page import write_page
from fastadapt.reporting.rendering import COLOURS, colours, inline_svg, legend_keys, write_png
from fastadapt.reporting.tables import Table, as_latex, as_markdown, shown, tables


def test_numbers_are_shown_with_their_intervals() -> None:
    assert shown({"mean": 0.105, "low": 0.098, "high": 0.112}) == "0.105 [0.0980, 0.112]"
    assert shown(None) == "–"
    assert shown({"mean": None, "low": None, "high": None}) == "–"
    assert shown({"mean": 0.5, "low": None, "high": None}) == "0.500 [–, –]"


def test_tables_have_a_row_for_every_measured_model() -> None:
    outputs, order, partial, bridge, benchmark = tables(synthetic_result())
    names = [name for name, *_ in MODELS]
    assert [row[0] for row in outputs.rows] == names
    assert [row[0] for row in partial.rows] == names[1:]
    assert [row[0] for row in benchmark.rows] == ["target", *names]
    assert [row[-1] for row in order.rows] == ["yes", "tie"]
    assert [row[0] for row in bridge.rows] == ["last 1", "last 2", "last 3", "all"]
    assert bridge.head[1:] == ["no-bridge − l0_10%"]
    assert bridge.rows[2][1] == shown({"mean": 0.3, "low": 0.27, "high": 0.33})
    assert all(len(row) == len(t.head) for t in tables(synthetic_result()) for row in t.rows)
    # The answer region has no position, so it has no column.
    assert outputs.head[5:] == ["… prompt", "… thinking", "NMSE"]
    # The worst choice excludes the full replacement.
    assert f"(n={LAYERS - 1})" in partial.rows[0][2]
    assert f"(layer {LAYERS - 1})" in partial.rows[0][4]


def test_parts_that_were_not_measured_have_no_table() -> None:
    result = synthetic_result()
    for part in ("faithfulness", "order", "partial", "bridge", "benchmarks"):
        del result[part]
    assert tables(result) == []
    assert figures(result) == []


def test_markdown_is_a_grid_and_latex_is_escaped() -> None:
    all_tables = tables(synthetic_result())
    for block in as_markdown(all_tables).split("## ")[1:]:
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    latex = as_latex(all_tables)
    assert r"l0\_10\%" in latex
    assert r"sparse <b>\&</b>" in latex
    assert not re.search(r"(?<!\\)[%#]", latex)
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == len(all_tables)
    for line in latex.splitlines():
        assert line.replace(r"\{", "").replace(r"\}", "").count("{") == (
            line.replace(r"\{", "").replace(r"\}", "").count("}")
        )


def test_the_sweep_is_one_line_over_l0_and_others_are_points_or_levels() -> None:
    by_key = {figure.key: figure for figure in figures(synthetic_result())}
    series = {s.name: s for s in by_key["top1_error-l0"].series}
    assert series["adapters"].x == [0.3, 10.0]
    assert series["adapters"].y == [0.18, 0.1]
    assert series["dense"].x == [150.0]
    assert series["skyline"].level
    assert series["hybrid"].level
    assert {s.kind for s in series.values()} <= set(COLOURS)
    assert [s.name for s in by_key["nmse-per-layer"].series] == [n for n, *_ in MODELS[1:]]
    assert by_key["kl-position"].series[0].x == [1.0, pytest.approx(12**0.5)]
    assert "target" in {s.name for s in by_key["sums-accuracy"].series}


def test_series_of_a_figure_have_distinct_colours() -> None:
    by_key = {figure.key: figure for figure in figures(synthetic_result())}
    for figure in by_key.values():
        assert len(set(colours(figure.series))) == len(figure.series)


def test_files_are_drawn(tmp_path: Path) -> None:
    result = synthetic_result()
    drawn = figures(result)
    for figure in drawn[:2]:
        write_png(figure, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert [key.name for key in legend_keys(figure)] == [s.name for s in figure.series]
    write_page(result, tables(result), drawn, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "sparse &lt;b&gt;&amp;&lt;/b&gt;" in page
    # Names in plots are escaped too.
    assert "sparse <b>" not in page
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", page)
    assert not re.search(r"https?://|url\(|<script", page)
    assert page.count("<svg ") == len(drawn)


@pytest.mark.quick("skyline")
@pytest.mark.parametrize("name", ["skyline", "l0_10%"])
def test_one_model_alone_can_be_drawn(name: str, tmp_path: Path) -> None:
    result = synthetic_result()
    result["students"] = [model for model in result["students"] if model["name"] == name]
    drawn = figures(result)
    assert drawn
    for figure in drawn:
        write_png(figure, tmp_path / f"{figure.key}.png")
        assert (tmp_path / f"{figure.key}.png").stat().st_size > 10_000
        assert inline_svg(figure).count("<title>") == len(figure.series) > 0


def test_legends_show_any_name_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib omits names that begin with "_", and parses "$" as mathematics."""
    from matplotlib.figure import Figure as Canvas

    legends: list[Any] = []
    real = Canvas.legend

    def legend(*a: Any, **k: Any) -> Any:
        legends.append(real(*a, **k))
        return legends[-1]

    monkeypatch.setattr(Canvas, "legend", legend)
    names = ["_old", "new", "a$b$c", "<b>x</b>"]
    series = [Series(name, "mlp", [1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]) for name in names]
    series.append(Series("__base", "base", [], [1.0], [0.5], [2.0]))
    figure = Figure("k", "of $a$", "$x$", "y", series)
    write_png(figure, tmp_path / "a.png")
    texts = legends[0].get_texts()
    assert [text.get_text() for text in texts] == [*names, "__base"]
    assert not any(text.get_parse_math() for text in texts)
    assert [key.name for key in legend_keys(figure)] == [*names, "__base"]
    shown = re.findall("<title>(.*?)</title>", inline_svg(figure))
    assert shown == ["_old", "new", "a$b$c", "&lt;b&gt;x&lt;/b&gt;", "__base"]


def test_underscores_at_the_ends_of_words_are_escaped_in_markdown() -> None:
    table = Table("t", ["", "a_b|c"], [["_old_", "__x__"], ["top_1", "-"]], "")
    text = as_markdown([table])
    assert r"| \_old\_ | \_\_x\_\_ |" in text
    assert r"|  | a_b\|c |" in text
    assert "| top_1 | - |" in text


@pytest.mark.slow
def test_tables_fit_a_page_of_1300_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """28 layers, long names, and every column; the control cannot break its lines."""
    monkeypatch.setattr(results, "LAYERS", 28)
    result = synthetic_result()
    names = {m["name"]: f"r1-distill-qwen-7b-{m['name']}" for m in result["students"]}
    for model in result["students"]:
        model |= {
            "name": names[model["name"]],
            "what": "adapter, λ=0.0003, no bridge, ablate x (9)",
        }
    for section in ("faithfulness", "partial"):
        result[section] = {names[name]: values for name, values in result[section].items()}
    for values in result["faithfulness"].values():
        values["regions"]["answer"] = values["regions"]["prompt"]
    measured = result["benchmarks"]["sums"]
    result["benchmarks"]["sums"] = {names.get(n, n): values for n, values in measured.items()}
    result["bridge"] *= 3
    path = tmp_path / "report.html"
    write_page(result, tables(result), [], path)
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        page.goto(path.as_uri())
        widths = "[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)"
        assert page.evaluate(widths)[:5] == [0] * 5
        assert not page.locator("details").get_attribute("open")
        page.add_style_tag(content="td, th { white-space: nowrap !important }")
        assert max(page.evaluate(widths)) > 0

"""Claims, tables and figures of the study."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadapt.evaluation.statistics import Intervals, quotient
from fastadapt.reporting.page import write_page
from fastadapt.reporting.rendering import inline_svg, write_png
from fastadapt.reporting.tables import as_latex, as_markdown
from fastadapt.study.report import claims, figures, tables, verdict


def interval(mean: float, width: float = 0.1) -> dict[str, float]:
    return {"mean": mean, "low": mean * (1 - width), "high": mean * (1 + width)}


def arm(model: str, rate: float, kind: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "kind": kind,
        "selection": "top1" if kind else "",
        "times": 0,
        "scale": None,
        "features": 40 if kind else 0,
        "hesitations_per_1000": interval(rate),
        "by_word": {"wait": interval(rate), "but": interval(2.0)},
        "length": interval(48.0),
        "accuracy": interval(0.5),
        "benchmarks": {
            task: {"accuracy": interval(right), "length": interval(48.0)}
            for task, right in (("x", 0.4), ("y", 0.6))
        },
        "draws": [{"hesitations_per_1000": interval(rate)}],
        "beyond_bias": interval(0.25) if kind == "only" else None,
        **more,
    }


def feature_set(key: str, size: int) -> dict[str, Any]:
    part = key == "template"
    return {"key": key, "name": f"set {key}", "part": part, "size": size, "per_layer": [size, 0]}


def result(*arms: dict[str, Any]) -> dict[str, Any]:
    bias = arm("adapter", 3.0, "only", selection="bias", features=0, beyond_bias=None)
    unchanged = [arm("target", 11.0), arm("hybrid", 0.0), arm("adapter", 10.0), bias]
    values: dict[str, Any] = {
        "pair": {"target": "a", "base": "b"},
        "level": 0.95,
        "features": {"alive": 90, "total": 100},
        "sets": [feature_set("top1", 40), feature_set("template", 10)],
        "settings": {"benchmarks": {"tasks": ["x", "y"], "counted_words": ["wait"]}},
        "versions": {},
        "arms": [*unchanged, *arms],
    }
    return {**values, "claims": claims(values)}


def holds(*arms: dict[str, Any]) -> list[str]:
    return [claim["holds"] for claim in result(*arms)["claims"]]


@pytest.mark.parametrize(
    ("rate", "verdict_text"),
    [(1.0, "yes"), (2.9, "yes, not clearly"), (3.1, "no, not clearly"), (9.0, "no")],
)
def test_removal_reduces_hesitation(rate: float, verdict_text: str) -> None:
    assert holds(arm("adapter", rate, "ablate")) == [verdict_text]
    assert holds(arm("adapter", rate, "ablate", selection="template")) == [""]


@pytest.mark.parametrize(
    ("rate", "verdict_text"),
    [(9.5, "yes, not clearly"), (10.5, "yes"), (8.4, "no, not clearly"), (4.0, "no")],
)
def test_random_removal_of_the_same_size_has_little_effect(rate: float, verdict_text: str) -> None:
    assert holds(arm("adapter", rate, "ablate", times=1)) == [verdict_text]
    # No effect is expected of ten times the size.
    (claim,) = result(arm("adapter", rate, "ablate", times=10))["claims"]
    assert (claim["claim"], claim["holds"]) == ("", "")
    assert claim["value"]["mean"] == pytest.approx(1 - rate / 10)


@pytest.mark.parametrize(
    ("rate", "verdict_text"),
    [(0.0, "yes"), (1.0, "yes"), (1.95, "yes, not clearly"), (2.05, "no, not clearly"), (9, "no")],
)
def test_addition_is_compared_with_random_sets(rate: float, verdict_text: str) -> None:
    selected = arm("adapter", 10.0, "only")
    claim = result(selected, arm("adapter", rate, "only", times=1))["claims"][1]
    assert claim["holds"] == verdict_text
    if rate:
        assert claim["value"]["mean"] == pytest.approx(10 / rate)
    else:
        assert claim["value"]["mean"] is None
    # A selected set without hesitation cannot be compared.
    none = result(arm("adapter", 0.0, "only"), arm("adapter", 1.0, "only", times=1))["claims"][1]
    assert none["holds"] == "not measurable"


@pytest.mark.parametrize(
    ("rate", "verdict_text"), [(5.0, "yes"), (10.9, "yes, not clearly"), (20, "no")]
)
def test_transfer_reduces_hesitation(rate: float, verdict_text: str) -> None:
    arms = [arm("target", rate, "onto-target", scale=scale) for scale in (-0.5, -1.0)]
    assert holds(*arms) == [verdict_text, ""]
    assert holds(arm("target", rate, "onto-target", scale=-0.5, times=1)) == [""]


def test_a_verdict_without_interval_is_not_clear() -> None:
    ends = {"low": None, "high": None}
    assert verdict({"mean": 2.0, **ends}, 1.0, above=True) == "yes, not clearly"
    assert verdict({"mean": 2.0, **ends}, 1.0, above=False) == "no, not clearly"
    assert verdict(None, 1.0, above=True) == "not measurable"


def test_coverage_of_the_quotients_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    for a, b, se_a, se_b in ((11.0, 11.0, 0.8, 0.8), (2.0, 11.0, 0.4, 0.8), (11.0, 2.0, 0.8, 0.5)):
        estimates = []
        for mean, error in ((a, se_a), (b, se_b)):
            drawn = mean + error * torch.randn(20_000, generator=generator, dtype=torch.float64)
            estimates.append(Intervals(drawn, drawn - 1.96 * error, drawn + 1.96 * error))
        ratio = quotient(*estimates)
        covered = (ratio.low <= a / b) & (a / b <= ratio.high)
        assert abs(covered.double().mean().item() - 0.95) < 0.005
        missed = (ratio.low > a / b).double().mean().item()
        assert abs(missed - 0.025) < 0.004


def test_special_quotients() -> None:
    def intervals(*values: float) -> Intervals:
        return Intervals(*(torch.tensor(value, dtype=torch.float64) for value in values))

    def ratio(a: tuple[float, ...], b: tuple[float, ...]) -> list[float]:
        return [round(value.item(), 4) for value in quotient(intervals(*a), intervals(*b))]

    assert ratio((0, 0, 0.5), (10, 10, 10)) == [0, 0, 0.05]
    assert ratio((5, 5, 5), (10, 10, 10)) == [0.5, 0.5, 0.5]
    assert ratio((5, 4, 6), (1, 0, 2)) == [5, 2.4, math.inf]
    assert all(math.isnan(value) for value in ratio((5, 4, 6), (0, 0, 0)))


@pytest.mark.parametrize(
    ("rates", "verdict_text"), [((10.5, 10.6), "yes"), ((14, 7), "yes, not clearly")]
)
def test_disagreeing_draws_are_not_clear(rates: tuple[float, ...], verdict_text: str) -> None:
    draws = [{"hesitations_per_1000": interval(rate)} for rate in rates]
    assert holds(arm("adapter", 10.5, "ablate", times=1, draws=draws)) == [verdict_text]


def test_tables_figures_and_page(tmp_path: Path) -> None:
    scales = (-0.25, -0.5)
    draws = [{"hesitations_per_1000": interval(rate)} for rate in (10.0, 9.0)]
    rarer = [{"hesitations_per_1000": interval(10.0), "density": 0.77}]
    values = result(
        arm("adapter", 2.0, "ablate"),
        arm("adapter", 9.5, "ablate", times=1, draws=draws),
        arm("adapter", 4.0, "ablate", times=10, features=400),
        arm("adapter", 8.0, "only"),
        arm("adapter", 0.0, "only", times=1),
        *(arm("target", 11 + 10 * scale, "onto-target", scale=scale) for scale in scales),
        arm("target", 10.0, "onto-target", scale=-0.5, times=1, draws=rarer),
    )
    study_tables = tables(values)
    assert [len(table.rows) for table in study_tables] == [4, 5, 4, 12]
    by_benchmark = study_tables[3]
    assert by_benchmark.head[1:] == ["x, accuracy", "x, tokens", "y, accuracy", "y, tokens"]
    names = [row[0] for row in by_benchmark.rows]
    assert names[:5] == [
        *("target", "hybrid", "adapter", "hybrid with b_dec alone"),
        "without set top1",
    ]
    assert names[-1] == "target with random, same size (1 draw, density 77.0%), × -0.5"
    assert by_benchmark.rows[0][1::2] == ["40.0% [36.0, 44.0]", "60.0% [54.0, 66.0]"]
    assert all(len(row) == len(table.head) for table in study_tables for row in table.rows)
    assert [row[-1] for row in study_tables[0].rows] == ["–", "yes", "yes, not clearly", "–"]
    assert study_tables[0].rows[2][0] == "random, same size (2 draws)"
    assert study_tables[0].rows[1][3] == "wait 2.00, but 2.00"
    assert [row[4] for row in study_tables[0].rows] == ["–", "–", "10.0, 9.00", "4.00"]
    assert study_tables[0].rows[1][5].startswith("80.0% [")
    assert study_tables[2].rows[1][0] == "set top1, × -0.25"
    added = study_tables[1]
    assert added.head[-1] == "beyond b_dec"
    assert [row[0] for row in added.rows[:3]] == [
        "none (hybrid)",
        "none, b_dec alone",
        "all (adapter)",
    ]
    assert [row[-1] for row in added.rows] == ["–", "–", "–", *["25.0% [22.5, 27.5]"] * 2]
    assert [row[1] for row in added.rows[:3]] == ["–", "0", "–"]
    assert as_markdown(study_tables).count("\n## ") == 3
    assert as_latex(study_tables).count(r"\begin{table}") == 4
    study_figures = figures(values)
    assert [figure.key for figure in study_figures] == ["removal", "addition", "transfer"]
    for figure in study_figures:
        write_png(figure, tmp_path / f"{figure.key}.png")
        assert inline_svg(figure).count("<title>") == len(figure.series)
    assert study_figures[2].series[0].x == [-0.5, -0.25]
    write_page(values, study_tables, study_figures, tmp_path / "report.html", "study")
    assert "fastadapt · study" in (tmp_path / "report.html").read_text()

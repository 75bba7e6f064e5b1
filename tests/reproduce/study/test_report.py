"""What the study claims of its numbers, and how it shows them."""

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
from reproduce.study.report import claims, figures, tables, verdict


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
        "length": interval(48.0),
        "accuracy": interval(0.5),
        "draws": [{"hesitations_per_1000": interval(rate)}],
        **more,
    }


def of(key: str, size: int) -> dict[str, Any]:
    part = key == "template"
    return {"key": key, "name": f"set {key}", "part": part, "size": size, "per_layer": [size, 0]}


def result(*arms: dict[str, Any]) -> dict[str, Any]:
    whole = [arm("target", 11.0), arm("hybrid", 0.0), arm("adapter", 10.0)]
    told: dict[str, Any] = {
        "pair": {"target": "a", "base": "b"},
        "level": 0.95,
        "features": {"alive": 90, "total": 100},
        "sets": [of("top1", 40), of("template", 10)],
        "settings": {"benchmarks": {"tasks": ["x", "y"], "hesitation_words": ["wait"]}},
        "versions": {},
        "arms": [*whole, *arms],
    }
    return {**told, "claims": claims(told)}


def holds(*arms: dict[str, Any]) -> list[str]:
    return [claim["holds"] for claim in result(*arms)["claims"]]


@pytest.mark.parametrize(
    ("rate", "told"),
    [(1.0, "yes"), (2.9, "yes, not clearly"), (3.1, "no, not clearly"), (9.0, "no")],
)
def test_a_removal_cuts_by_most(rate: float, told: str) -> None:
    assert holds(arm("adapter", rate, "ablate")) == [told]
    assert holds(arm("adapter", rate, "ablate", selection="template")) == [""]


@pytest.mark.parametrize(
    ("rate", "told"),
    [(9.5, "yes, not clearly"), (10.5, "yes"), (8.4, "no, not clearly"), (4.0, "no")],
)
def test_a_random_removal_of_as_many_spares(rate: float, told: str) -> None:
    assert holds(arm("adapter", rate, "ablate", times=1)) == [told]
    # Of ten times as many nothing is expected.
    (claim,) = result(arm("adapter", rate, "ablate", times=10))["claims"]
    assert (claim["claim"], claim["holds"]) == ("", "")
    assert claim["value"]["mean"] == pytest.approx(1 - rate / 10)


@pytest.mark.parametrize(
    ("rate", "told"),
    [(0.0, "yes"), (1.0, "yes"), (1.95, "yes, not clearly"), (2.05, "no, not clearly"), (9, "no")],
)
def test_an_addition_is_held_against_random_ones(rate: float, told: str) -> None:
    selected = arm("adapter", 10.0, "only")
    claim = result(selected, arm("adapter", rate, "only", times=1))["claims"][1]
    assert claim["holds"] == told
    if rate:
        assert claim["value"]["mean"] == pytest.approx(10 / rate)
    else:
        assert claim["value"]["mean"] is None
    # Where the selected set makes none, there is nothing to compare.
    none = result(arm("adapter", 0.0, "only"), arm("adapter", 1.0, "only", times=1))["claims"][1]
    assert none["holds"] == "not measurable"


@pytest.mark.parametrize(("rate", "told"), [(5.0, "yes"), (10.9, "yes, not clearly"), (20, "no")])
def test_a_transfer_lowers(rate: float, told: str) -> None:
    arms = [arm("target", rate, "onto-target", scale=scale) for scale in (-0.5, -1.0)]
    assert holds(*arms) == [told, ""]
    assert holds(arm("target", rate, "onto-target", scale=-0.5, times=1)) == [""]


def test_a_verdict_without_ends_is_not_clear() -> None:
    ends = {"low": None, "high": None}
    assert verdict({"mean": 2.0, **ends}, 1.0, above=True) == "yes, not clearly"
    assert verdict({"mean": 2.0, **ends}, 1.0, above=False) == "no, not clearly"
    assert verdict(None, 1.0, above=True) == "not measurable"


def test_a_quotient_covers_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    for a, b, of_a, of_b in ((11.0, 11.0, 0.8, 0.8), (2.0, 11.0, 0.4, 0.8), (11.0, 2.0, 0.8, 0.5)):
        estimates = []
        for mean, error in ((a, of_a), (b, of_b)):
            drawn = mean + error * torch.randn(20_000, generator=generator, dtype=torch.float64)
            estimates.append(Intervals(drawn, drawn - 1.96 * error, drawn + 1.96 * error))
        found = quotient(*estimates)
        covered = (found.low <= a / b) & (a / b <= found.high)
        assert abs(covered.double().mean().item() - 0.95) < 0.005
        missed = (found.low > a / b).double().mean().item()
        assert abs(missed - 0.025) < 0.004


def test_a_quotient_at_the_edges() -> None:
    def of(*values: float) -> Intervals:
        return Intervals(*(torch.tensor(value, dtype=torch.float64) for value in values))

    def ends(found: Intervals) -> list[float]:
        return [round(value.item(), 4) for value in found]

    assert ends(quotient(of(0, 0, 0.5), of(10, 10, 10))) == [0, 0, 0.05]
    assert ends(quotient(of(5, 5, 5), of(10, 10, 10))) == [0.5, 0.5, 0.5]
    assert ends(quotient(of(5, 4, 6), of(1, 0, 2))) == [5, 2.4, math.inf]
    assert all(math.isnan(value) for value in ends(quotient(of(5, 4, 6), of(0, 0, 0))))


@pytest.mark.parametrize(("rates", "told"), [((10.5, 10.6), "yes"), ((14, 7), "yes, not clearly")])
def test_draws_that_disagree_are_told(rates: tuple[float, ...], told: str) -> None:
    draws = [{"hesitations_per_1000": interval(rate)} for rate in rates]
    assert holds(arm("adapter", 10.5, "ablate", times=1, draws=draws)) == [told]


def test_tables_figures_and_page(tmp_path: Path) -> None:
    scales = (-0.25, -0.5)
    draws = [{"hesitations_per_1000": interval(rate)} for rate in (10.0, 9.0)]
    told = result(
        arm("adapter", 2.0, "ablate"),
        arm("adapter", 9.5, "ablate", times=1, draws=draws),
        arm("adapter", 4.0, "ablate", times=10, features=400),
        arm("adapter", 8.0, "only"),
        arm("adapter", 0.0, "only", times=1),
        *(arm("target", 11 + 10 * scale, "onto-target", scale=scale) for scale in scales),
        arm("target", 10.0, "onto-target", scale=-0.5, times=1),
    )
    made = tables(told)
    assert [len(table.rows) for table in made] == [4, 4, 4]
    assert all(len(row) == len(table.head) for table in made for row in table.rows)
    assert [row[-1] for row in made[0].rows] == ["–", "yes", "yes, not clearly", "–"]
    assert made[0].rows[2][0] == "random, as many (2 draws)"
    assert [row[3] for row in made[0].rows] == ["–", "–", "10.0, 9.00", "4.00"]
    assert made[0].rows[1][4].startswith("80.0% [")
    assert made[2].rows[1][0] == "set top1, × -0.25"
    assert as_markdown(made).count("\n## ") == 2
    assert as_latex(made).count(r"\begin{table}") == 3
    drawn = figures(told)
    assert [figure.key for figure in drawn] == ["removal", "addition", "transfer"]
    for figure in drawn:
        write_png(figure, tmp_path / f"{figure.key}.png")
        assert inline_svg(figure).count("<title>") == len(figure.series)
    assert drawn[2].series[0].x == [-0.5, -0.25]
    write_page(told, made, drawn, tmp_path / "report.html", "study")
    assert "fastadapt · study" in (tmp_path / "report.html").read_text()

"""Tables of groups of runs that differ by their training seed only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastadapt.reporting.formatting import number, percent
from fastadapt.reporting.tables import Table, shown

_HOW = (
    "Runs of one configuration and several seeds; intervals of {level} over seeds and {units} "
    "(fastadapt.evaluation.seeds). Differences pair {units}, not seeds."
)


def seed_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return a table for each group of runs that differ in their seed alone.

    Args:
        result: contents of ``eval.json``."""
    described = {model["name"]: model["what"] for model in result["students"]}
    tables = []
    if (outputs := result.get("seeds")) and outputs["groups"]:
        tables.append(_outputs(result, outputs, described))
    if pairs := result.get("bridge_seeds"):
        tables.append(_bridge(result, pairs))
    for task, scores in (result.get("benchmark_seeds") or {}).items():
        if scores["groups"]:
            tables.append(_answers(result, task, scores, described))
    return tables


def _outputs(result: Mapping[str, Any], outputs: Any, described: Mapping[str, str]) -> Table:
    rows = [
        [
            group["name"],
            described.get(group["name"], ""),
            str(len(group["runs"])),
            number(group["l0"]),
            shown(group["kl"]),
            shown(group["top1_error"], percent),
        ]
        for group in outputs["groups"]
    ]
    rows += [
        [
            f"{gap['above']} − {gap['below']}",
            "",
            "",
            "",
            shown(gap["kl"]),
            shown(gap["top1_error"], percent),
        ]
        for gap in outputs["differences"]
    ]
    head = ["model", "", "seeds", "L0", "KL, nats", "top-1 error"]
    return Table("Output faithfulness over seeds", head, rows, _note(result, "texts"))


def _bridge(result: Mapping[str, Any], pairs: Any) -> Table:
    n_layers = len(pairs[0]["last"]) - 1
    rows = [
        [f"last {n}" if n < n_layers else "all", *(shown(pair["last"][n]) for pair in pairs)]
        for n in range(1, n_layers + 1)
    ]
    head = ["KL without − with", *(f"{pair['without']} − {pair['with']}" for pair in pairs)]
    title = "Effect of the bridge with only the last layers replaced, over seeds"
    return Table(title, head, rows, _note(result, "texts"))


def _answers(
    result: Mapping[str, Any], task: str, scores: Any, described: Mapping[str, str]
) -> Table:
    def cells(entry: Mapping[str, Any]) -> list[str]:
        return [
            shown(entry["accuracy"], percent),
            shown(entry["length"]),
            shown(entry["hesitations_per_1000"]),
        ]

    rows = [
        [group["name"], described.get(group["name"], ""), str(len(group["runs"])), *cells(group)]
        for group in scores["groups"]
    ]
    rows += [
        [f"{gap['above']} − {gap['below']}", "", "", *cells(gap)] for gap in scores["differences"]
    ]
    head = ["model", "", "seeds", "accuracy", "tokens", "hesitation / 1,000 tokens"]
    return Table(f"Benchmark over seeds: {task}", head, rows, _note(result, "questions"))


def _note(result: Mapping[str, Any], units: str) -> str:
    return _HOW.format(level=percent(result["level"]), units=units)

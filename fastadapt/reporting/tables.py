"""The tables of an evaluation, as Markdown and LaTeX.

Estimates are shown with their intervals. The key ``students`` of ``eval.json`` lists the evaluated
models (:mod:`fastadapt.evaluation.models_under_test`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastadapt.reporting.formatting import number, percent

#: ``{"mean": ..., "low": ..., "high": ...}``; None for values that are not defined.
Interval = Mapping[str, float | None]


@dataclass(frozen=True)
class Table:
    """A table whose cells are texts.

    Attributes:
        title: title of the table.
        head: names of the columns.
        rows: cells, as many per row as in ``head``.
        note: explanation of the contents.
    """

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of all parts in ``result``, the contents of ``eval.json``."""
    candidates = [
        _outputs(result),
        _order(result),
        _partial(result),
        _bridge(result),
        *_benchmarks(result),
        _speed(result),
    ]
    return [table for table in candidates if table is not None]


def shown(value: Interval | None, show: Callable[[float | None], str] = number) -> str:
    """Format an interval; ``–`` without an estimate.

    Args:
        value: the interval.
        show: formats a number.

    Example:
        >>> shown({"mean": 0.105, "low": 0.098, "high": 0.112}, percent)
        '10.5% [9.8, 11.2]'
    """
    if value is None or value["mean"] is None:
        return "–"
    low, high = (show(value[end]).rstrip("%") for end in ("low", "high"))
    return f"{show(value['mean'])} [{low}, {high}]"


def _outputs(result: Mapping[str, Any]) -> Table | None:
    measured = result.get("faithfulness")
    if not measured:
        return None
    regions = [
        region
        for region in ("prompt", "thinking", "answer")
        if any(values["regions"][region]["positions"] for values in measured.values())
    ]
    rows = []
    for model, values in _in_order(result, measured):
        per_layer = values["nmse_per_layer"]
        nmse = None if per_layer is None else sum(i["mean"] for i in per_layer) / len(per_layer)
        rows.append(
            [
                model["name"],
                model["what"],
                number(values.get("l0")),
                shown(values["kl"]),
                shown(values["top1_error"], percent),
                *(percent(values["regions"][r]["top1_error"]["mean"]) for r in regions),
                number(nmse),
            ]
        )
    return Table(
        "Output faithfulness",
        [
            "model",
            "",
            "L0",
            "KL, nats",
            "top-1 error",
            *(f"… {r}" for r in regions),
            "NMSE",
        ],
        rows,
        f"{result['texts']['n']:,} responses of the target, {result['texts']['predicted']:,} "
        f"predicted tokens; intervals of {percent(result['level'])} over sequences. KL is "
        "KL(target ‖ model) in nats per predicted token, NMSE the mean over layers 0..L."
        + "".join(f" {note}" for note in result.get("notes", {}).values()),
    )


def _in_order(result: Mapping[str, Any], measured: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Return pairs (compared model, measured values) of the models that were measured."""
    return [(m, measured[m["name"]]) for m in result["students"] if m["name"] in measured]


def _order(result: Mapping[str, Any]) -> Table | None:
    gaps = result.get("order")
    if not gaps:
        return None
    rows = [
        [
            f"{gap['above']} − {gap['below']}",
            shown(gap["top1_error"], percent),
            shown(gap["kl"]),
            gap["holds"] or "–",
        ]
        for gap in gaps
    ]
    return Table(
        "Order",
        ["gap", "top-1 error, points", "KL, nats", "holds"],
        rows,
        "Differences of neighbours in the order of arXiv 2602.20904, farthest from the target "
        "first, on the same sequences. Holds: yes if the interval of the gap in top-1 error is "
        "above 0, tie if it has 0 in it.",
    )


def _partial(result: Mapping[str, Any]) -> Table | None:
    measured = result.get("partial")
    if not measured:
        return None
    rows = []
    for model, curves in _in_order(result, measured):
        cells = [
            _worst(curves["first"][1:-1], "n={}", 1),
            _worst(curves["last"][1:-1], "n={}", 1),
            _worst(curves["single"], "layer {}", 0),
        ]
        full, excess = shown(curves["first"][-1]), shown(curves["excess"]["worst"])
        rows.append([model["name"], full, *cells, excess])
    return Table(
        "Partial replacement",
        ["model", "all layers", "first n, worst", "last n, worst", "one layer, worst", "excess"],
        rows,
        "KL to the target in nats per predicted token, with part of the layers replaced: the worst "
        "choice of each kind, and its excess over the KL with all layers replaced. "
        f"{result['texts']['n_partial']:,} of the texts.",
    )


def _bridge(result: Mapping[str, Any]) -> Table | None:
    pairs = result.get("bridge")
    if not pairs:
        return None
    n_layers = len(pairs[0]["last"]) - 1
    # A row per number of layers: a model of many layers would give too many columns.
    rows = [
        [f"last {n}" if n < n_layers else "all", *(shown(pair["last"][n]) for pair in pairs)]
        for n in range(1, n_layers + 1)
    ]
    return Table(
        "Effect of the bridge with only the last layers replaced",
        ["KL without − with", *(f"{pair['without']} − {pair['with']}" for pair in pairs)],
        rows,
        "Adapters of one λ, or of about one L0, on the same texts; nats per predicted token.",
    )


def _worst(curve: Sequence[Interval], label: str, first: int) -> str:
    """Format the largest value of a curve, with its index, counted from ``first``."""
    if not curve:
        return "–"
    worst = max(range(len(curve)), key=lambda i: curve[i]["mean"] or 0.0)
    return f"{shown(curve[worst])} ({label.format(worst + first)})"


def _benchmarks(result: Mapping[str, Any]) -> list[Table]:
    return [
        _benchmark(result, name, measured)
        for name, measured in (result.get("benchmarks") or {}).items()
    ]


def words_shown(rates: Mapping[str, Interval] | None) -> str:
    """Format the rates of words, without their intervals.

    Example:
        >>> words_shown({"wait": {"mean": 3.2, "low": 2.9, "high": 3.5}})
        'wait 3.20'
    """
    return (
        ", ".join(f"{word} {number(rate['mean'])}" for word, rate in (rates or {}).items()) or "–"
    )


def _benchmark(result: Mapping[str, Any], name: str, measured: Mapping[str, Any]) -> Table:
    # Evaluations of earlier versions counted the words that are now given one by one.
    settings = result["settings"].get("benchmarks", {})
    counted = ", ".join(settings.get("counted_words", ["hesitations"]))
    rows = []
    for model in ("target", *(compared["name"] for compared in result["students"])):
        for mode, scores in measured.get(model, {}).items():
            speed = scores.get("tokens_per_s")
            rows.append(
                [
                    model + ("" if mode == "sampled" else f", {mode}"),
                    shown(scores["accuracy"], percent),
                    shown(scores["recovered"], percent),
                    shown(scores["recovered_from_base"], percent),
                    shown(scores["length"]),
                    shown(scores["hesitations_per_1000"]),
                    words_shown(scores.get("by_word")),
                    percent(scores["truncated"]),
                    percent(scores["degenerate"]),
                    "–" if speed is None else f"{speed:,.0f}",
                ]
            )
    return Table(
        f"Benchmark: {name}",
        [
            "model",
            "accuracy",
            "recovered from hybrid",
            "recovered from base",
            "tokens",
            f"{counted} / 1,000 tokens",
            "by word",
            "truncated",
            "degenerate",
            "tokens/s",
        ],
        rows,
        f"{result['benchmark_counts'][name]}; intervals over questions. Recovered: share of the "
        "target's gain in accuracy over the hybrid, or over the base, which was asked "
        + _how_asked(measured.get("base", {})),
    )


def _how_asked(modes: Mapping[str, Any]) -> str:
    few = [mode.partition("-")[0] for mode in modes if mode.endswith("-shot, greedy")]
    return f"with {few[0]} examples at temperature 0." if few else "without examples."


def _speed(result: Mapping[str, Any]) -> Table | None:
    speed = result.get("speed")
    if not speed:
        return None
    rows = [
        [name, f"{values['tokens_per_s']:,.0f}", f"{100 * values['overhead']:+.1f}%"]
        for name, values in speed["models"].items()
    ]
    return Table(
        "Speed of generation",
        ["model", "tokens/s", "overhead"],
        rows,
        f"Greedy generation of {speed['new_tokens']} tokens after each of {speed['batch_size']} "
        f"prompts of {speed['prompt_tokens']} tokens; medians of {speed['rounds']} rounds on "
        f"{speed['device']}. Overhead: time relative to the target's, minus 1.",
    )


# --- Markdown and LaTeX ---------------------------------------------------------------------------


def as_markdown(tables: Sequence[Table]) -> str:
    """Return tables in GitHub's Markdown, with titles and notes; numbers are right-aligned."""

    def aligned(column: int, table: Table) -> str:
        words = column == 0 or any(re.match(r"[a-z`]", row[column], re.I) for row in table.rows)
        return "---" if words else "---:"

    def line(cells: Sequence[str]) -> str:
        # Underscores inside words need no escape: only those at the ends of words mark emphasis.
        escaped = (re.sub(r"\||(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", cell) for cell in cells)
        return "| " + " | ".join(escaped) + " |\n"

    return "\n".join(
        f"## {table.title}\n\n{line(table.head)}"
        + line([aligned(column, table) for column in range(len(table.head))])
        + "".join(map(line, table.rows))
        + (f"\n{table.note}\n" if table.note else "")
        for table in tables
    )


_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: "\\" + c for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "−": "$-$",
    "‖": r"$\|$",
    "λ": r"$\lambda$",
    "…": r"\dots",
}


def as_latex(tables: Sequence[Table]) -> str:
    r"""Return tables as ``table`` environments, which need ``\usepackage{booktabs}``."""

    def escaped(text: str) -> str:
        return "".join(_LATEX.get(c, c) for c in text)

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(escaped, cells)) + " \\\\\n"

    def caption(table: Table) -> str:
        return escaped(f"{table.title}. {table.note}" if table.note else table.title)

    return "\n".join(
        f"\\begin{{table}}\n\\centering\n\\caption{{{caption(table)}}}\n"
        f"\\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}\n"
        f"\\toprule\n{line(table.head)}\\midrule\n"
        + "".join(map(line, table.rows))
        + "\\bottomrule\n\\end{tabular}\n\\end{table}\n"
        for table in tables
    )

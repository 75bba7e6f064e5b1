"""The tables of an evaluation, from ``eval.json``, in Markdown and LaTeX.

Every number that was estimated comes with its interval. Students are the models that are compared
with the target, see :mod:`fastadapt.evaluation.models_under_test`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastadapt.reporting.formatting import number, percent

#: ``{"mean": ..., "low": ..., "high": ...}``, each None where there is nothing to tell
Interval = Mapping[str, float | None]


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; ``note`` says what is in them."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


def tables(result: Mapping[str, Any]) -> list[Table]:
    """All tables that ``result`` (the contents of ``eval.json``) has the numbers for."""
    found = [
        _outputs(result),
        _order(result),
        _partial(result),
        _bridge(result),
        *_benchmarks(result),
        _speed(result),
    ]
    return [table for table in found if table is not None]


def shown(value: Interval | None, show: Callable[[float | None], str] = number) -> str:
    """``0.105 [0.098, 0.112]``, – where there is none."""
    if value is None or value["mean"] is None:
        return "–"
    low, high = (show(value[end]).rstrip("%") for end in ("low", "high"))
    return f"{show(value['mean'])} [{low}, {high}]"


def _outputs(result: Mapping[str, Any]) -> Table | None:
    measured = result.get("faithfulness")
    if not measured:
        return None
    regions = [r for r in ("prompt", "thinking", "answer") if _some(measured, r)]
    rows = []
    for student in result["students"]:
        found = measured.get(student["name"])
        if found is None:
            continue
        per_layer = found["nmse_per_layer"]
        nmse = None if per_layer is None else sum(i["mean"] for i in per_layer) / len(per_layer)
        rows.append(
            [
                student["name"],
                student["what"],
                number(found.get("l0")),
                shown(found["kl"]),
                shown(found["top1_error"], percent),
                *(percent(found["regions"][r]["top1_error"]["mean"]) for r in regions),
                number(nmse),
            ]
        )
    return Table(
        "Output faithfulness",
        [
            "student",
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
        "KL(target ‖ student) in nats per predicted token, NMSE the mean over layers 0..L.",
    )


def _some(measured: Mapping[str, Any], region: str) -> bool:
    return any(found["regions"][region]["positions"] for found in measured.values())


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
        "From the furthest to the nearest, as arXiv 2602.20904 found them: differences of "
        "neighbours on the same sequences. It holds where the gap in top-1 error lies above 0 with "
        "its interval; a tie has 0 in it.",
    )


def _partial(result: Mapping[str, Any]) -> Table | None:
    measured = result.get("partial")
    if not measured:
        return None
    rows = []
    for student in result["students"]:
        found = measured.get(student["name"])
        if found is None:
            continue
        full = found["first"][-1]
        cells = []
        for way in ("first", "last", "single"):
            curve = found[way] if way == "single" else found[way][1:-1]
            cells.append(_worst(curve, way))
        excess = shown(found["excess"]["worst"])
        rows.append([student["name"], shown(full), *cells, excess])
    return Table(
        "Partial replacement",
        ["student", "all layers", "first n, worst", "last n, worst", "one layer, worst", "excess"],
        rows,
        "KL to the target, in nats per predicted token, where only some layers are replaced; the "
        "worst choice of each kind, all layers aside, and what the worst of all has more than all "
        f"layers together. {result['texts']['n_partial']:,} of the texts.",
    )


def _bridge(result: Mapping[str, Any]) -> Table | None:
    pairs = result.get("bridge")
    if not pairs:
        return None
    n_layers = len(pairs[0]["last"]) - 1
    rows = [
        [f"{pair['without']} − {pair['with']}", *(shown(gap) for gap in pair["last"][1:])]
        for pair in pairs
    ]
    return Table(
        "What the bridge does where only the last layers are replaced",
        ["KL without − with", *(f"last {n}" for n in range(1, n_layers)), "all"],
        rows,
        "Adapters of the same sparsity, on the same texts; nats per predicted token.",
    )


def _worst(curve: Sequence[Interval], way: str) -> str:
    if not curve:
        return "–"
    at = max(range(len(curve)), key=lambda i: curve[i]["mean"] or 0.0)
    where = f"layer {at}" if way == "single" else f"n={at + 1}"
    return f"{shown(curve[at])} ({where})"


def _benchmarks(result: Mapping[str, Any]) -> list[Table]:
    return [
        _benchmark(result, name, measured)
        for name, measured in (result.get("benchmarks") or {}).items()
    ]


def _benchmark(result: Mapping[str, Any], name: str, measured: Mapping[str, Any]) -> Table:
    rows = []
    for student in ({"name": "target", "what": "target"}, *result["students"]):
        for variant, found in measured.get(student["name"], {}).items():
            speed = found.get("tokens_per_s")
            rows.append(
                [
                    student["name"] + ("" if variant == "sampled" else f", {variant}"),
                    shown(found["accuracy"], percent),
                    shown(found["recovered"], percent),
                    shown(found["recovered_from_base"], percent),
                    shown(found["length"]),
                    shown(found["hesitations_per_1000"]),
                    percent(found["truncated"]),
                    percent(found["degenerate"]),
                    "–" if speed is None else f"{speed:,.0f}",
                ]
            )
    return Table(
        f"Benchmark: {name}",
        [
            "model",
            "accuracy",
            "of the gain over the hybrid",
            "over the base",
            "tokens",
            "hesitations / 1,000",
            "at the limit",
            "degenerate",
            "tokens/s",
        ],
        rows,
        f"{result['benchmark_counts'][name]}; intervals over questions. Of the gain: the share of "
        "what the target is right more often than the hybrid, or the base.",
    )


def _speed(result: Mapping[str, Any]) -> Table | None:
    speed = result.get("speed")
    if not speed:
        return None
    rows = [
        [name, f"{found['tokens_per_s']:,.0f}", f"{100 * found['overhead']:+.1f}%"]
        for name, found in speed["models"].items()
    ]
    return Table(
        "Speed of generation",
        ["model", "tokens/s", "time over the target's"],
        rows,
        f"{speed['batch_size']} sequences of {speed['prompt_tokens']} tokens, "
        f"{speed['new_tokens']} new ones each, greedily, in turn; median of {speed['rounds']} "
        f"rounds on {speed['device']}.",
    )


# --- as text --------------------------------------------------------------------------------------


def as_markdown(tables: Sequence[Table]) -> str:
    """Return tables of GitHub's Markdown, with titles and notes."""

    def line(cells: Sequence[str]) -> str:
        # Of underscores those at the ends of words alone make emphasis.
        escaped = (re.sub(r"\||(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", cell) for cell in cells)
        return "| " + " | ".join(escaped) + " |\n"

    return "\n".join(
        f"## {table.title}\n\n{line(table.head)}"
        + line(["---", *["---:"] * (len(table.head) - 1)])
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
    r"""Return each as a ``table`` environment; ``\usepackage{booktabs}`` is all that they need."""

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

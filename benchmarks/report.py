"""Write tables and plots of the results: ``python -m benchmarks.report``

The command reads all ``*.json`` of gpu.py in ``benchmarks/results/`` (or ``--results FOLDER``). It
writes ``README.md`` to the folder and SVG plots beside each file (matplotlib, extra ``bench``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["main", "page", "plots"]

Row = dict[str, Any]
FOLDER = Path(__file__).resolve().parent / "results"
WIDTH, HEIGHT = 7.0, 4.5  # inches
MOST_L0 = 10  # of the rows whose kernels are shown
MET = {True: "yes", False: "**no**"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if the folder has no results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report")
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args(arguments)
    paths = sorted(options.results.glob("*.json"))
    if not paths:
        print(f"No results in {options.results}; run python benchmarks/gpu.py kernels first.")
        return 1
    sections = []
    for path in paths:
        result = json.loads(path.read_text())
        images = [] if options.no_plots else plots(result, path)
        sections.append(page(result, path.name, images))
        print(f"{path.name}: {len(images)} plots")
    readme = options.results / "README.md"
    readme.write_text("# Results\n\n" + "\n".join(sections))
    print(f"Written to {readme}")
    return 0


def page(result: Row, name: str, images: Iterable[Path] = ()) -> str:
    """Format one result as Markdown."""
    hardware, roofs = result["hardware"], result["roofs"]
    machine = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} threads"
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
    commit = (result["commit"] or "unknown")[:12] + (" (changed)" if result["changed"] else "")
    lines = [
        f"## {machine}: {result['command']}",
        "",
        f"[{name}]({name}), {result['date']}, commit {commit}, sources {result['sources'][:12]}; "
        f"{versions}.",
        "",
        f"Roofs in this run: copy {roofs['copy_bytes_per_s'] / 1e12:.3g} TB/s, products in "
        f"{roofs['dtype']} {roofs['gemm_flops_per_s'] / 1e12:.4g} TFLOP/s.",
        "",
    ]
    if result["quick"]:
        lines += ["Test of the script at tiny shapes; the figures are not measurements.", ""]
    if not result["right"]:
        lines += ["**A check failed in this run; the figures are not valid.**", ""]
    if not result["finished"]:
        lines += ["The run did not finish; the results are partial.", ""]
    lines += [f"{name}: {why}.\n" for name, why in result["failed"].items()]
    lines += _checks(result["parts"])
    lines += _bounds(result["bounds"])
    lines += [f"![{image.stem}]({image.name})" for image in images]
    for part, rows in result["parts"].items():
        timed = [row for row in rows if not _is_check(row)]
        if timed:
            table = {"lengths": _lengths, "random lengths": _lengths, "step": _steps}
            lines += ["", f"### {part}", "", *table.get(part, _rows)(timed)]
        if part in ("transcoder", "step"):
            lines += _kernels(timed)
    lines += [f"\nLeft out: {name}: {why}." for name, why in result["left_out"].items()]
    return "\n".join(lines) + "\n"


def _is_check(row: Row) -> bool:
    return row.get("kind") is None or "claim" in row


def _checks(parts: dict[str, list[Row]]) -> list[str]:
    """Count the checks of each part, and name those that failed."""
    words, failed = [], []
    for part, rows in parts.items():
        checks = [row for row in rows if _is_check(row)]
        wrong = [row for row in checks if not row["right"] and row.get("kind") != "floor"]
        count = sum(row.get("tests", 1) for row in checks)
        if checks:
            words.append(f"{part}: {'WRONG' if wrong else 'right'} ({count})")
        if files := [name for row in checks for name in row.get("left_out_files", ())]:
            words[-1] += f", without {', '.join(files)}"
        failed += [f"- {part}, {r['op']} {r['implementation']}: {_why(r)}" for r in wrong]
    return [f"Checks: {'; '.join(words) or 'none'}.", "", *failed, ""]


def _kernels(rows: Sequence[Row]) -> list[str]:
    """Format the times of single kernels, or of a step's categories, of this library's rows."""
    table = []
    for r in rows:
        if r["kind"] == "ours" and r["shape"].get("L0", 0) <= MOST_L0:
            shape = " ".join(f"{key}={value}" for key, value in r["shape"].items())
            for item in r.get("categories") or r.get("kernels", []):
                name = item.get("category") or item["name"]
                cells = [shape, r["implementation"], name, str(item["calls"])]
                table.append([*cells, f"{item['us']:.4g}"])
    header = ["shape", "implementation", "kernel", "calls", "µs"]
    return ["", *_table(header, table)] if table else []


def _bounds(bounds: Sequence[Row]) -> list[str]:
    if not bounds:
        return []
    table = [[b["claim"], b["bound"], f"{b['measured']:.3g}", MET[b["met"]]] for b in bounds]
    return [*_table(["claim", "bound", "measured", "met"], table), ""]


def _rows(rows: Sequence[Row]) -> list[str]:
    others = dict.fromkeys(name for r in rows for name in r.get("times_as_fast_as", {}))
    columns = sorted(others, key=lambda name: name != "reference")
    header = ["shape", "implementation", "ms", "spread, ms", "GB", "fraction of roof"]
    graphs = any("graph_s" in r for r in rows)
    header += ["ms, CUDA graph"] if graphs else []
    header += [f"× {name}" for name in columns]
    table = []
    for r in rows:
        shape = " ".join(f"{key}={value}" for key, value in r["shape"].items())
        name = r["implementation"] + ("" if r.get("right") is not False else " (not exact)")
        name += " (overwrites its inputs)" if "overwrites" in r else ""
        if "median_s" not in r:
            table.append([shape, name, _why(r)])
            continue
        ratios = r.get("times_as_fast_as", {})
        line = [shape, name, f"{r['median_s'] * 1e3:.4g}", f"{r['spread_s'] * 1e3:.2g}"]
        line += [f"{r['peak_bytes'] / 1e9:.3g}", f"{r['share_of_roof']:.0%}"]
        if graphs:
            line.append(f"{r['graph_s'] * 1e3:.4g}" if "graph_s" in r else "")
        line += [f"{ratios[other]:.2f}" if other in ratios else "" for other in columns]
        table.append(line)
    return _table(header, table)


def _steps(rows: Sequence[Row]) -> list[str]:
    """Format whole training steps; planned memory is the trainer's estimate."""
    header = ["T", "implementation", "s", "spread, s", "s, host", "s, kernels", "tokens/s", "GB"]
    header += ["GB reserved", "GB planned"]
    header += ["fraction of product rate", "hours for 380M tokens", "L0"]
    table = []
    for r in rows:
        name = r["implementation"] + ("" if r.get("right") is not False else " (wrong)")
        line = [str(r["shape"]["T"]), name]
        if "median_s" not in r:
            table.append([*line, _why(r)])
            continue
        planned, l0 = r.get("planned_bytes"), r.get("measured_L0")
        line += [f"{r['median_s']:.4g}", f"{r['spread_s']:.2g}", f"{r['wall_s']:.4g}"]
        line += [f"{r['device_s']:.4g}", f"{r['tokens_per_s']:.4g}", f"{r['peak_bytes'] / 1e9:.3g}"]
        line += [f"{r['reserved_bytes'] / 1e9:.3g}"]
        line += ["" if planned is None else f"{planned / 1e9:.3g}"]
        line += [f"{r['share_of_gemm_rate']:.0%}", f"{r['hours_for_380M_tokens']:.3g}"]
        table.append([*line, "" if l0 is None else f"{l0:.3g}"])
    return _table(header, table)


def _why(row: Row) -> str:
    """Return the reason why a row has no time."""
    messages = [row[key] for key in ("error", "wrong", "skipped") if row.get(key)]
    return messages[0].splitlines()[0][:80] if messages else ""


def _lengths(rows: Sequence[Row]) -> list[str]:
    header = ["implementation", "first pass, s", "second pass, s", "kernels compiled", "graphs"]
    table = []
    for r in rows:
        if "first_s" not in r:
            table.append([r["implementation"], r.get("error", "")])
            continue
        first, again = sum(r["first_s"]), sum(r["again_s"])
        counts = [str(r.get(key, "")) for key in ("kernels_compiled", "graphs_compiled")]
        table.append([r["implementation"], f"{first:.3g}", f"{again:.3g}", *counts])
    return _table(header, table)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        padded = [*cells, *[""] * (len(header) - len(cells))]
        return "| " + " | ".join(cell.replace("|", "/") for cell in padded) + " |"

    return [line(header), "|" + "---|" * len(header), *(line(row) for row in rows)]


def plots(result: Row, path: Path) -> list[Path]:
    """Plot time and ratio over L0, the density sweep and changing lengths, if measured."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        sys.exit("Plots need matplotlib; pip install 'fastadapt[bench]', or pass --no-plots.")
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "fastadapt"  # equal results give equal files
    parts = result["parts"]
    files = []
    for name in ("transcoder", "sweep"):
        rows = parts.get(name, [])
        if series := dict(_series(rows)):
            files.append(_time_over_l0(series, rows, result["roofs"], path, name))
    series = dict(_series(parts.get("transcoder", [])))
    if "reference" in series:
        files.append(_ratio_over_l0(series, path))
    if rows := [r for r in parts.get("lengths", []) if "first_s" in r]:
        files.append(_first_calls(rows, path))
    return files


def _series(rows: Sequence[Row]) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Yield each implementation's (L0, seconds)."""
    names = dict.fromkeys(r["implementation"] for r in rows)
    for name in names:
        points = [
            (r["measured_L0"], r["median_s"])
            for r in rows
            if r["implementation"] == name and "median_s" in r and "measured_L0" in r
        ]
        if points:
            yield name, sorted(points)


def _time_over_l0(
    series: dict[str, list[tuple[float, float]]],
    rows: Sequence[Row],
    roofs: Row,
    path: Path,
    name: str,
) -> Path:
    figure, axes = _axes("L0, active features per token", "ms, forward and backward")
    for label, points in series.items():
        if label != "encoder GEMM":
            axes.plot(*_shown(points), marker="o", markersize=3, label=label)
    if "encoder GEMM" in series:
        middle = sorted(s for _, s in series["encoder GEMM"])[len(series["encoder GEMM"]) // 2]
        axes.axhline(middle * 1e3, color="0.4", linestyle="--", label="encoder GEMM")
    floor = {
        r["measured_L0"]: max(
            r["flops"] / roofs["gemm_flops_per_s"], r["bytes"] / roofs["copy_bytes_per_s"]
        )
        for r in rows
        if r["kind"] == "reference" and "flops" in r
    }
    if floor:
        label = "roof: products and bytes"
        axes.plot(*_shown(sorted(floor.items())), color="0.7", linestyle=":", label=label)
    shape = ", ".join(f"{k}={v}" for k, v in rows[0]["shape"].items() if k != "L0")
    axes.set_title(f"transcoder, {shape}, {rows[0]['dtype']}", fontsize=10)
    return _saved(figure, axes, path, name)


def _ratio_over_l0(series: dict[str, list[tuple[float, float]]], path: Path) -> Path:
    figure, axes = _axes("L0, active features per token", "times as fast as the reference")
    reference = dict(series.pop("reference"))
    for label, points in series.items():
        ratios = [(l0, reference[l0] / s * 1e-3) for l0, s in points if l0 in reference]
        if ratios and label != "encoder GEMM":
            axes.plot(*_shown(ratios), marker="o", markersize=3, label=label)
    axes.axhline(1, color="0.4", linewidth=0.8)
    return _saved(figure, axes, path, "ratio")


def _first_calls(rows: Sequence[Row], path: Path) -> Path:
    figure, axes = _axes("call (each with a new length)", "ms")
    axes.set_xscale("linear")
    for r in rows:
        calls = list(enumerate(r["first_s"], 1))
        axes.plot(*_shown(calls), marker="o", markersize=3, label=r["implementation"])
    return _saved(figure, axes, path, "lengths")


def _shown(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return x and milliseconds; x below 0.05 is drawn at 0.05 on the logarithmic axis."""
    return [max(x, 0.05) for x, _ in points], [y * 1e3 for _, y in points]


def _axes(x: str, y: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.grid(visible=True, which="both", linewidth=0.3)
    return figure, axes


def _saved(figure: Any, axes: Any, path: Path, name: str) -> Path:
    axes.legend(fontsize=7)
    file = path.with_name(f"{path.stem}-{name}.svg")
    figure.savefig(file, metadata={"Date": None})
    return file


if __name__ == "__main__":
    sys.exit(main())

"""A run as one page: ``report.html``, made from the run directory alone.

The page needs no network and no script: drawings are inline SVG, the style is in the page, and both
follow the reader's light or dark setting. Measures are those of `fastadapt.evaluation`: KL is
KL(target ‖ model) in nats per predicted token, NMSE is ‖ĥ - h‖²/‖h‖², L0 is active features per
token per layer (arXiv 2602.20904).
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from fastadapt.io.atomic import disk_errors, replacing
from fastadapt.reporting.charts import (
    HEIGHT,
    WIDTH,
    Series,
    empty_chart,
    histogram,
    line_chart,
    ramp,
    smooth,
)
from fastadapt.reporting.formatting import duration, number, percent
from fastadapt.reporting.html import STYLE, card, grid, legend_key, section, table
from fastadapt.training.logs.run_log import RunLog, comparison, read_run, value_at
from fastadapt.training.run_dir import GO_ON

# key of a training record: title, unit, key of an evaluation for the adapter, and for the hybrid
CURVES: dict[str, tuple[str, str, str | None, str | None]] = {
    "loss": ("Total loss", "weighted sum of all terms", None, None),
    "kl": ("Output KL", "nats per token", "kl_adapter", "kl_hybrid"),
    "top1_error": ("Top-1 error", "share of tokens", "top1_error_adapter", "top1_error_hybrid"),
    "nmse": ("NMSE", "mean over layers", "nmse_mean", "nmse_mean_hybrid"),
    "nmse_token": ("NMSE per token", "mean over tokens and layers", None, None),
    "bridge_adapter_to_target": ("Bridge: adapter → target", "nats per token", None, None),
    "bridge_target_to_adapter": ("Bridge: target → adapter", "nats per token", None, None),
    "sparsity": ("Sparsity", "λ · Σ a‖W_dec‖", None, None),
    "l0": ("L0", "active features per token and layer", "l0_mean", None),
}
SMALL_FROM = 6
LOG_SHARE = "log10 of share of tokens"
OPTIMISATION = {
    "lr": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", "before clipping"),
    "tokens_per_s": ("Speed", "tokens per second"),
}


def write_report(run_dir: str | Path) -> Path:
    """Writes ``report.html`` into a run directory, finished or not, from that directory alone.

    Args:
        run_dir: a run directory; every file in it may be missing.

    Returns:
        Path of the page.

    Raises:
        RunError: it cannot be written.
    """
    run = read_run(run_dir)
    title = run.folder.resolve().name
    body = [
        _head(run, title),
        _tiles(run),
        section("Against the target", _comparison(run), "held-out data"),
        section("Training", _curves(run), "thin: every step · thick: smoothed · dots: held-out"),
        section("Sparsity", _sparsity(run), "per layer"),
        section("Layers", _layers(run), "held-out data"),
        section("Optimisation", _optimisation(run)),
        section("Events", _events(run)),
        section("RunLog", _run_facts(run)),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)} · fastadapt</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    path = run.folder / "report.html"
    with disk_errors(path, GO_ON), replacing(path) as staged:
        staged.write_text(page, encoding="utf-8")
    return path


def _head(run: RunLog, title: str) -> str:
    step = run.train[-1].get("step") if run.train else None
    if run.summary:
        state = '<span class="state done">finished</span>'
    else:
        at = f" at step {number(step)}" if step is not None else ""
        state = f'<span class="state open">not finished{at}</span>'
    return (
        f'<div class="top"><p class="brand">fastadapt · transcoder adapters</p>'
        f"<h1>{escape(title)}</h1>{state}</div>"
    )


def _tiles(run: RunLog) -> str:
    r = run.result
    tokens = r.get("tokens")
    tiles = [
        ("KL recovered", percent(r.get("kl_recovered_vs_hybrid")), "of the hybrid's KL to target"),
        ("KL to target", number(r.get("kl_adapter")), f"hybrid {number(r.get('kl_hybrid'))} nats"),
        (
            "Top-1 error",
            percent(r.get("top1_error_adapter")),
            f"hybrid {percent(r.get('top1_error_hybrid'))}",
        ),
        ("Tokens", number(tokens), f"in {duration(r.get('wall_s'))}"),
    ]
    if r.get("adapter_kind", "transcoder") == "transcoder":
        tiles.insert(-1, ("L0", number(r.get("l0_mean")), "features per token and layer"))
    cells = "".join(
        f'<div class="tile"><span>{escape(a)}</span><b>{escape(b)}</b><i>{escape(c)}</i></div>'
        for a, b, c in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _comparison(run: RunLog) -> str:
    if run.result.get("kl_adapter") is None:
        return '<p class="none">No evaluation was recorded yet.</p>'
    return table(*comparison(run.result), kind="compare")


def _column(records: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    kept = [(r.get("step", 0), r[key]) for r in records if isinstance(r.get(key), int | float)]
    return [float(s) for s, _ in kept], [float(v) for _, v in kept]


def _curve(
    run: RunLog,
    key: str,
    title: str,
    unit: str,
    held: str | None = None,
    base: str | None = None,
    log: bool | None = None,
) -> str:
    xs, ys = _column(run.train, key)
    held_xs, held_ys = _column(run.evals, held) if held else ([], [])
    base_xs, base_ys = _column(run.evals, base) if base else ([], [])
    if not xs and not held_xs:
        return ""
    series, legend = [], []
    if xs:
        window = max(1, len(xs) // 40)
        smoothed = smooth(ys, window)
        series += [Series("train, every step", xs, ys, "faint")] if window > 1 else []
        series.append(Series("train", xs, smoothed, "main"))
        legend.append(legend_key("main", "train", smoothed[-1]))
    if held_xs:
        series.append(Series("held-out", held_xs, held_ys, "held"))
        legend.append(legend_key("held", "held-out", held_ys[-1]))
    if base_xs:
        ends = [min([*xs, *held_xs]), max([*xs, *held_xs])]
        series.insert(0, Series("hybrid", ends, [base_ys[-1]] * 2, "base"))
        legend.append(legend_key("base", "hybrid", base_ys[-1]))
    return card(title, unit, line_chart(f"{title} over steps", series, log=log), "".join(legend))


def _curves(run: RunLog) -> str:
    cards = grid([_curve(run, key, *spec) for key, spec in CURVES.items()])
    return cards or '<p class="none">No training step was recorded yet.</p>'


def _optimisation(run: RunLog) -> str:
    return grid([_curve(run, key, *spec, log=False) for key, spec in OPTIMISATION.items()])


def _layer_key(n: int) -> str:
    if n <= 8:
        return "".join(
            f'<span><i style="background:{ramp(i / max(n - 1, 1))}"></i>layer {i}</span>'
            for i in range(n)
        )
    stops = ",".join(ramp(i / 4) for i in range(5))
    style = f"background:linear-gradient(90deg,{stops})"
    return f'<span>layer 0<i class="ramp" style="{style}"></i>layer {n - 1}</span>'


def _l0_over_time(run: RunLog) -> str:
    records = [r for r in run.train if r.get("l0_per_layer")]
    if not records:
        return ""
    n = len(records[-1]["l0_per_layer"])
    xs = [float(r.get("step", 0)) for r in records]
    window = max(1, len(xs) // 40)
    series = [
        Series(
            f"layer {i}",
            xs,
            smooth([float(value_at(r["l0_per_layer"], i) or 0) for r in records], window),
            ramp(i / max(n - 1, 1)),
        )
        for i in range(n)
    ]
    chart = line_chart("L0 of each layer over steps, log axis", series, log=True)
    return card(
        "L0 per layer over time", "active features per token, log axis", chart, _layer_key(n)
    )


def _density(run: RunLog) -> tuple[list[float], list[list[int]]]:
    """Edges and counts per layer, without the decades below 1e-4 that are empty in every layer."""
    histograms = run.result.get("feature_density_histogram") or {}
    edges, layers = histograms.get("log10_edges") or [], histograms.get("counts") or []
    used = [i for counts in layers for i, count in enumerate(counts) if count]
    if not used:
        return edges, layers
    decades = [i for i, edge in enumerate(edges) if edge == int(edge) and edge <= -4]
    first = max((i for i in decades if i <= min(used)), default=0)
    return edges[first:], [counts[first:] for counts in layers]


def _sparsity(run: RunLog) -> str:
    over_time = _l0_over_time(run)
    edges, layers = _density(run)
    # Many layers are small multiples; a few are charts like the others.
    small = len(layers) > SMALL_FROM
    size = (200.0, 130.0) if small else (WIDTH, HEIGHT)
    dead = run.result.get("n_dead_per_layer")
    cards = []
    for i, counts in enumerate(layers):
        silent = value_at(dead, i)
        note = f"<span>dead <b>{number(silent)}</b></span>" if silent is not None else ""
        chart = histogram(f"Density of layer {i}", edges, counts, x_label=LOG_SHARE, size=size)
        title = f"layer {i}" if small else f"Feature density, layer {i}"
        cards.append(card(title, "" if small else "number of features", chart, note))
    if small:
        heading = "<h3>Feature density: number of features</h3>"
        return grid([over_time]) + heading + grid(cards, "grid small")
    if not layers and over_time:
        none = empty_chart("measured at the first evaluation")
        cards.append(card("Feature density", "number of features", none))
    return grid([over_time, *cards])


def _layers(run: RunLog) -> str:
    r = run.result
    l0, dead = r.get("l0_per_layer") or [], r.get("n_dead_per_layer") or []
    recent = run.dead_in_training
    n = max(len(l0), len(dead), len(recent))
    if not n:
        return ""
    rows = [
        [
            f"layer {i}",
            number(value_at(l0, i)),
            number(value_at(dead, i)),
            number(value_at(recent, i)),
            number(value_at(r.get("nmse_per_layer") or [], i + 1)),
        ]
        for i in range(n)
    ]
    window = run.dead_window
    told = "training, window unknown" if window is None else f"last {window:,} training tokens"
    head = ["", "L0", "dead (held-out)", f"dead ({told})", "NMSE"]
    return table(head, rows)


def _events(run: RunLog) -> str:
    rows = []
    for e in run.events:
        if e["kind"] in ("start", "checkpoint"):
            continue
        rest = {k: v for k, v in e.items() if k not in ("kind", "step", "wall_s")}
        rows.append([str(e["kind"]), number(e.get("step")), json.dumps(rest, ensure_ascii=False)])
    return table(["what", "step", "more"], rows, "events") if rows else ""


def _run_facts(run: RunLog) -> str:
    facts = [["folder", run.folder.resolve().name]]
    if run.train:
        facts.append(["steps recorded", number(len(run.train))])
    saved = [e for e in run.events if e["kind"] == "checkpoint"]
    if saved:
        facts.append(["checkpoints written", number(len(saved))])
    for start in (e for e in run.events if e["kind"] == "start"):
        told = {k: v for k, v in start.items() if k not in ("kind", "step", "wall_s")}
        facts += [
            [k.replace("_", " "), number(v) if isinstance(v, (int, float)) else str(v)]
            for k, v in told.items()
        ]
    facts += [[k, str(v)] for k, v in (run.summary.get("versions") or {}).items()]
    config = (
        f"<details open><summary>config.yaml</summary><pre>{escape(run.config)}</pre></details>"
        if run.config
        else ""
    )
    return table(["", ""], facts, "facts") + config

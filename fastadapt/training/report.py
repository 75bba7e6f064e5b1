"""Report of a run as one page, ``report.html``, created from the run directory only.

The measures are those of `fastadapt.evaluation` (arXiv 2602.20904): KL is KL(target ‖ model) in
nats per predicted token, NMSE is ‖ĥ - h‖²/‖h‖², L0 is active features per token per layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastadapt.io.atomic import disk_errors
from fastadapt.reporting.figures import Figure, Series
from fastadapt.reporting.formatting import duration, number, percent
from fastadapt.reporting.page import render_page
from fastadapt.training.logs.hints import hints
from fastadapt.training.logs.run_log import RunLog, comparison, read_run, value_at
from fastadapt.training.run_dir import RESUME_HINT

#: By key of a training record: title, unit, and the keys of evaluation records that hold the
#: adapter's and the hybrid's values.
CURVES: dict[str, tuple[str, str, str | None, str | None]] = {
    "loss": ("Total loss", "weighted sum of all terms", None, None),
    "kl": ("Output KL", "nats per token", "kl_adapter", "kl_hybrid"),
    "top1_error": ("Top-1 error", "share of tokens", "top1_error_adapter", "top1_error_hybrid"),
    "nmse": ("NMSE", "mean over layers", "nmse_mean", "nmse_mean_hybrid"),
    "nmse_token": ("NMSE per token", "mean over tokens and layers", None, None),
    "bridge_adapter_to_target": ("Bridge: adapter → target", "nats per token", None, None),
    "bridge_target_to_adapter": ("Bridge: target → adapter", "nats per token", None, None),
    "sparsity": ("Sparsity", "λ times the penalty", None, None),
    "sparsity_weight": ("λ", "weight of the sparsity penalty", None, None),
    "l0": ("L0", "active features per token and layer", "l0_mean", None),
}
SMALL_FROM = 6
LOG_SHARE = "log10 of share of tokens"
OPTIMISATION: dict[str, tuple[str, str, str | None, str | None]] = {
    "lr": ("Learning rate", "", None, None),
    "grad_norm": ("Gradient norm", "before clipping", None, None),
    "tokens_per_s": ("Speed", "tokens per second", None, None),
}


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run directory, which may be unfinished.

    Args:
        run_dir: run directory; every file in it may be missing.

    Returns:
        The path of the page.

    Raises:
        RunError: the page cannot be written.
    """
    run = read_run(run_dir)
    path = run.folder / "report.html"
    over_time, densities = _l0_over_time(run), _densities(run)
    # Charts of many layers are small multiples; those of a few layers have full size.
    small = len(densities) > SMALL_FROM
    if small:
        densities = [replace(f, title=f"layer {i}", y_label="") for i, f in enumerate(densities)]
    with disk_errors(path, RESUME_HINT):
        render_page(
            path,
            "run.html.j2",
            title=run.folder.resolve().name,
            subject="transcoder adapters",
            finished=bool(run.summary),
            state=_state(run),
            tiles=_tiles(run),
            hints=hints(run.result, run.sparsity, run.target_l0),
            comparison=None if run.result.get("kl_adapter") is None else comparison(run.result),
            curves=_curves(run, CURVES, log=None),
            sparsity=over_time if small else over_time + (densities or _no_density(over_time)),
            densities=densities if small else [],
            layers=_layers(run),
            optimisation=_curves(run, OPTIMISATION, log=False),
            events=_events(run),
            facts=_facts(run),
            config=run.config,
        )
    return path


def _state(run: RunLog) -> str:
    if run.summary:
        return "finished"
    step = run.train[-1].get("step") if run.train else None
    return "not finished" + (f" at step {number(step)}" if step is not None else "")


def _tiles(run: RunLog) -> list[tuple[str, str, str]]:
    r = run.result
    tiles = [
        ("KL recovered", percent(r.get("kl_recovered_vs_hybrid")), "of the hybrid's KL to target"),
        ("KL to target", number(r.get("kl_adapter")), f"hybrid {number(r.get('kl_hybrid'))} nats"),
        (
            "Top-1 error",
            percent(r.get("top1_error_adapter")),
            f"hybrid {percent(r.get('top1_error_hybrid'))}",
        ),
        ("Tokens", number(r.get("tokens")), f"in {duration(r.get('wall_s'))}"),
    ]
    if r.get("adapter_kind", "transcoder") == "transcoder":
        tiles.insert(-1, ("L0", number(r.get("l0_mean")), "features per token and layer"))
    return tiles


def smooth(ys: Sequence[float], window: int) -> list[float]:
    """Return trailing means over the finite values among the last ``window``; NaN if none is.

    Example:
        >>> smooth([1.0, 3.0, math.nan], 2)
        [1.0, 2.0, 3.0]
    """
    means = []
    for i in range(len(ys)):
        finite = [y for y in ys[max(0, i - window + 1) : i + 1] if math.isfinite(y)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def _column(records: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    pairs = [(r.get("step", 0), r[key]) for r in records if isinstance(r.get(key), int | float)]
    return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]


def _curves(
    run: RunLog, specs: dict[str, tuple[str, str, str | None, str | None]], log: bool | None
) -> list[Figure]:
    """Return a figure for each recorded measure."""
    figures = []
    for key, (title, unit, held_out, reference) in specs.items():
        xs, ys = _column(run.train, key)
        held_xs, held_ys = _column(run.evals, held_out) if held_out else ([], [])
        reference_ys = _column(run.evals, reference)[1] if reference else []
        window = max(1, len(xs) // 40)
        series = []
        if reference_ys:
            series.append(Series("hybrid", "reference", [], reference_ys[-1:]))
        if window > 1:
            series.append(Series("", "every step", xs, ys))
        if xs:
            series.append(Series("train", "train", xs, smooth(ys, window)))
        if held_xs:
            series.append(Series("held-out", "held-out", held_xs, held_ys))
        if xs or held_xs:
            figures.append(
                Figure(key, title, "step", unit, series, y_log=log, values_in_legend=True)
            )
    return figures


def _l0_over_time(run: RunLog) -> list[Figure]:
    records = [r for r in run.train if r.get("l0_per_layer")]
    if not records:
        return []
    xs = [float(r.get("step", 0)) for r in records]
    window = max(1, len(xs) // 40)
    series = [
        Series(
            f"layer {i}",
            "layer",
            xs,
            smooth([float(value_at(r["l0_per_layer"], i) or 0) for r in records], window),
        )
        for i in range(len(records[-1]["l0_per_layer"]))
    ]
    unit = "active features per token, log axis"
    return [Figure("l0-layers", "L0 per layer over time", "step", unit, series, y_log=True)]


def _density(run: RunLog) -> tuple[list[float], list[list[int]]]:
    """Return density edges and counts per layer, without low decades empty in every layer.

    Decades above 1e-4 are never removed.
    """
    histograms = run.result.get("feature_density_histogram") or {}
    edges, layers = histograms.get("log10_edges") or [], histograms.get("counts") or []
    used = [i for counts in layers for i, count in enumerate(counts) if count]
    if not used:
        return edges, layers
    decades = [i for i, edge in enumerate(edges) if edge == int(edge) and edge <= -4]
    first = max((i for i in decades if i <= min(used)), default=0)
    return edges[first:], [counts[first:] for counts in layers]


def _densities(run: RunLog) -> list[Figure]:
    edges, layers = _density(run)
    dead = run.result.get("n_dead_per_layer")
    return [
        Figure(
            f"density-{i}",
            f"Feature density, layer {i}",
            LOG_SHARE,
            "number of features",
            [Series("", "density", edges, [float(count) for count in counts])],
            mark="bars",
            note="" if value_at(dead, i) is None else f"{number(value_at(dead, i))} dead",
            empty="no feature fired",
        )
        for i, counts in enumerate(layers)
    ]


def _no_density(over_time: list[Figure]) -> list[Figure]:
    """Return an empty figure in place of the densities before the first evaluation."""
    empty = "measured at the first evaluation"
    title, unit = "Feature density", "number of features"
    return [Figure("density", title, LOG_SHARE, unit, empty=empty)] if over_time else []


def _layers(run: RunLog) -> tuple[list[str], list[list[str]]] | None:
    r = run.result
    l0, dead = r.get("l0_per_layer") or [], r.get("n_dead_per_layer") or []
    recent = run.dead_in_training
    n = max(len(l0), len(dead), len(recent))
    if not n:
        return None
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
    since = "training, window unknown" if window is None else f"last {window:,} training tokens"
    return ["", "L0", "dead (held-out)", f"dead ({since})", "NMSE"], rows


def _details(event: dict[str, Any]) -> dict[str, Any]:
    return {key: v for key, v in event.items() if key not in ("kind", "step", "wall_s")}


def _events(run: RunLog) -> list[list[str]]:
    return [
        [str(e["kind"]), number(e.get("step")), json.dumps(_details(e), ensure_ascii=False)]
        for e in run.events
        if e["kind"] not in ("start", "checkpoint")
    ]


def _facts(run: RunLog) -> list[list[str]]:
    facts = [["folder", run.folder.resolve().name]]
    if run.train:
        facts.append(["steps recorded", number(len(run.train))])
    if checkpoints := sum(e["kind"] == "checkpoint" for e in run.events):
        facts.append(["checkpoints written", number(checkpoints)])
    for start in (e for e in run.events if e["kind"] == "start"):
        facts += [
            [key.replace("_", " "), number(v) if isinstance(v, (int, float)) else str(v)]
            for key, v in _details(start).items()
        ]
    return facts + [[key, str(v)] for key, v in (run.summary.get("versions") or {}).items()]

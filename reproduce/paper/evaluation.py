"""Measures of claims about ``eval.json``: outputs, partial replacement and benchmarks.

A measure returns None if the file lacks the part or the models that the claim is about.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from fastadapt.evaluation.comparison import SAME_L0
from fastadapt.reporting.formatting import number, percent
from fastadapt.reporting.tables import Interval, shown
from fastadapt.study.report import verdict
from reproduce.paper.finding import NOT_MEASURABLE, Finding, Measure, Result, joined, meet


def _models(result: Result, kind: str, variant: str = "") -> list[Any]:
    """Return the compared models of a kind, one per group of seeds, from dense to sparse."""
    groups = (result.get("seeds") or {}).get("groups", [])
    repeated = {run for group in groups for run in group["runs"][1:]}
    models = [
        m
        for m in result["students"]
        if (m["kind"], m["variant"]) == (kind, variant) and m["name"] not in repeated
    ]
    return sorted(models, key=lambda m: -(m.get("l0") or 0))


def _mean_scores(result: Result) -> Mapping[str, Any]:
    """Return the scores of each model on the mean of the benchmarks, or on the only one."""
    benchmarks = result.get("benchmarks") or {}
    return benchmarks.get("mean") or next(iter(benchmarks.values()), {})


# --- outputs and parts (sections 4.1, 4.2) --------------------------------------------------------


def order(result: Result) -> Finding | None:
    """Base, hybrid, adapters from sparse to dense, skyline: each nearer to the target."""
    gaps = result.get("order")
    if not gaps:
        return None
    names = [gaps[0]["above"], *(gap["below"] for gap in gaps)]
    errors = [percent(result["faithfulness"][name]["top1_error"]["mean"]) for name in names]
    held = {"yes": "yes", "tie": "yes, not clearly", "no": "no"}
    verdicts = [held.get(gap["holds"], NOT_MEASURABLE) for gap in gaps]
    value = ", ".join(f"{name} {error}" for name, error in zip(names, errors, strict=True))
    return Finding(value, joined(verdicts))


def subsets(result: Result) -> Finding | None:
    """No part of an adapter has a larger KL than the whole."""
    curves = result.get("partial")
    adapters = [m for m in _models(result, "transcoder") if m["name"] in (curves or {})]
    if not curves or not adapters:
        return None
    worst = [curves[m["name"]]["excess"]["worst"] for m in adapters]
    value = max(worst, key=lambda excess: excess["mean"])
    verdicts = [verdict(excess, 0.0, above=False) for excess in worst]
    return Finding(f"largest excess {shown(value)} nats", joined(verdicts))


def monotone(result: Result) -> Finding | None:
    """The KL falls with each further layer of the target."""
    curves = result.get("partial")
    adapters = [m["name"] for m in _models(result, "transcoder") if m["name"] in (curves or {})]
    if not curves or not adapters:
        return None
    falls = {
        name: max(
            before["mean"] - after["mean"]
            for family in ("first", "last")
            for before, after in pairwise(curves[name][family])
        )
        for name in adapters
    }
    rising = [name for name, fall in falls.items() if fall > 0]
    value = f"largest fall with one more replaced layer {number(max(falls.values()))} nats"
    if not rising:
        return Finding("the KL rises with every replaced layer", "yes, by the estimates")
    return Finding(value, f"no for {len(rising)} of {len(adapters)}, by the estimates")


def bridge(result: Result) -> Finding | None:
    """With only the last layers replaced, adapters trained without the bridge have a larger KL."""
    pairs = result.get("bridge_seeds") or result.get("bridge")
    if not pairs:
        return None
    values, verdicts = [], []
    for pair in pairs:
        gaps = pair["last"][1:-1]
        values.append(
            f"{pair['without']} − {pair['with']}: " + ", ".join(shown(gap) for gap in gaps)
        )
        verdicts += [verdict(gap, 0.0, above=True) for gap in gaps]
    return Finding("; ".join(values) + " nats for the last 1, 2, ... layers", joined(verdicts))


def against(name: str) -> Measure:
    """Return a measure: a group of runs has a larger KL than the first other group of adapters."""

    def measure(result: Result) -> Finding | None:
        seeds = result.get("seeds") or {}
        l0 = {group["name"]: group.get("l0") for group in seeds.get("groups", [])}
        for gap in seeds.get("differences", []):
            if name in (gap["above"], gap["below"]):
                other = gap["below"] if gap["above"] == name else gap["above"]
                if any(m["name"] == other for m in _models(result, "transcoder")):
                    value = gap["kl"] if gap["above"] == name else _negated(gap["kl"])
                    text = f"{name} − {other}: {shown(value)} nats"
                    holds = verdict(value, 0.0, above=True)
                    a, b = l0[name], l0[other]
                    if a and b:
                        text += f" at L0 {number(a)} and {number(b)}"
                        if abs(a - b) > SAME_L0 * max(a, b):
                            return _with_fewer_features(result, name, a, text)
                    return Finding(text, holds)
        return None

    return measure


def _with_fewer_features(result: Result, name: str, l0: float, text: str) -> Finding:
    """Compare a group with the densest adapter of at most its L0: at equal L0 that has a lower KL.

    A group with a lower KL than that adapter shows nothing.
    """
    measured = result["faithfulness"]
    others = [
        model
        for model in _models(result, "transcoder")
        if not model["variant"] and model["l0"] and model["l0"] <= l0 and model["name"] in measured
    ]
    if not others:
        return Finding(text, f"{NOT_MEASURABLE}: L0 differs")
    sparser = max(others, key=lambda model: model["l0"])
    ours, theirs = measured[name]["kl"], measured[sparser["name"]]["kl"]
    text += (
        f"; {name} {shown(ours)}, {sparser['name']} {shown(theirs)} at L0 {number(sparser['l0'])}"
    )
    if ours["mean"] <= theirs["mean"]:
        return Finding(text, f"{NOT_MEASURABLE}: L0 differs")
    return Finding(text, "yes, not clearly" if meet(ours, theirs) else "yes")


def _negated(value: Interval) -> Interval:
    ends = {"mean": value["mean"], "low": value["high"], "high": value["low"]}
    return {key: None if end is None else -end for key, end in ends.items()}


def baseline(kind: str) -> Measure:
    """Return a measure: KL and top-1 error of a baseline, beside the nearest adapters."""

    def measure(result: Result) -> Finding | None:
        measured = result.get("faithfulness") or {}
        runs = [m["name"] for m in _models(result, kind) if m["name"] in measured]
        if not runs:
            return None
        values = [
            f"{name}: KL {shown(measured[name]['kl'])}, "
            f"top-1 error {shown(measured[name]['top1_error'], percent)}"
            for name in runs
        ]
        return Finding("; ".join(values), "no number in the paper")

    return measure


# --- benchmarks (section 4.3, appendices B and D) -------------------------------------------------


def gain(result: Result) -> Finding | None:
    """Adapters recover 50 to 90% of the target's gain in accuracy over the base."""
    scores = _mean_scores(result)
    shares = {}
    for model in _models(result, "transcoder"):
        share = scores.get(model["name"], {}).get("sampled", {}).get("recovered_from_base")
        if share and share["mean"] is not None:
            shares[f"L0 {number(model['l0'])}"] = share
    if not shares:
        return None
    verdicts = []
    for share in shares.values():
        ends = [verdict(share, 0.5, above=True), verdict(share, 0.9, above=False)]
        verdicts.append(next((end for end in ends if end.startswith("no")), joined(ends)))
    return Finding(
        ", ".join(f"{name}: {shown(share, percent)}" for name, share in shares.items()),
        joined(verdicts),
    )


def lengths(result: Result) -> Finding | None:
    """Responses of adapters are as long as the target's."""
    scores = _mean_scores(result)
    target = scores.get("target", {}).get("sampled")
    adapters = [m["name"] for m in _models(result, "transcoder") if m["name"] in scores]
    if not target or not adapters:
        return None
    values = {name: scores[name]["sampled"]["length"] for name in adapters}
    meets = [meet(value, target["length"]) for value in values.values()]
    text = ", ".join(f"{name} {shown(value)}" for name, value in values.items())
    verdicts = ["yes, not clearly" if meet else "no" for meet in meets]
    return Finding(f"target {shown(target['length'])}, {text} tokens", joined(verdicts))


def refit(name: str) -> Measure:
    """Return a measure: refitting norms changes neither accuracy nor length of the hybrid."""

    def measure(result: Result) -> Finding | None:
        scores = _mean_scores(result)
        if name not in scores or "hybrid" not in scores:
            return None
        norms, hybrid = scores[name]["sampled"], scores["hybrid"]["sampled"]
        text = "; ".join(
            f"{label} {shown(values['accuracy'], percent)}, {shown(values['length'])} tokens"
            for label, values in ((name, norms), ("hybrid", hybrid))
        )
        verdicts = [
            "yes, not clearly" if meet(norms[key], hybrid[key]) else "no"
            for key in ("accuracy", "length")
        ]
        return Finding(text, joined(verdicts))

    return measure


def few_shot(result: Result) -> Finding | None:
    """Examples in the prompt do not help the hybrid."""
    modes = _mean_scores(result).get("hybrid", {})
    shots = {mode: values["accuracy"] for mode, values in modes.items() if "shot" in mode}
    if not shots or "sampled" not in modes:
        return None
    zero = modes["sampled"]["accuracy"]
    parts = {"zero-shot": zero, **shots}
    better = [v["mean"] > zero["mean"] and not meet(v, zero) for v in shots.values()]
    unclear = [meet(v, zero) for v in shots.values()]
    verdicts = [
        "no" if b else "yes, not clearly" if u else "yes"
        for b, u in zip(better, unclear, strict=True)
    ]
    text = ", ".join(f"{mode} {shown(value, percent)}" for mode, value in parts.items())
    return Finding(text, joined(verdicts))


def degenerate(result: Result) -> Finding | None:
    """The hybrid's responses degenerate more often than those of adapters."""
    scores = _mean_scores(result)
    adapters = [m["name"] for m in _models(result, "transcoder") if m["name"] in scores]
    names = ["target", "hybrid", *adapters]
    if not adapters or not {"target", "hybrid"} <= scores.keys():
        return None
    shares = {name: scores[name]["sampled"]["degenerate"] for name in names}
    text = ", ".join(f"{name} {percent(share)}" for name, share in shares.items())
    if not any(shares.values()):
        return Finding(text, f"{NOT_MEASURABLE}: no response degenerates here")
    holds = all(shares["hybrid"] > shares[name] for name in adapters)
    return Finding(text, f"{'yes' if holds else 'no'}, by the estimates")

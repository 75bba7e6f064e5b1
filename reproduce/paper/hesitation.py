"""Measures of claims about features of hesitation, from ``contrast.json`` and ``study.json``.

A measure returns None if the file lacks the arms that the claim is about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastadapt.reporting.formatting import number, percent
from fastadapt.reporting.tables import shown
from fastadapt.study.conditions import BIAS
from fastadapt.study.report import RATE, verdict
from reproduce.paper.finding import NOT_MEASURABLE, Finding, Measure, Result, joined, meet

# --- places where a word belongs (contrast.json) --------------------------------------------------


def _place(result: Result, kind: str, sets: Sequence[str], *, random: bool = False) -> Any:
    """Return the first model of a kind with one of these sets, in their order; None without."""
    return next(
        (
            model
            for name in sets
            for model in result["models"]
            if (model["kind"], model["set"], model["random"]) == (kind, name, random)
        ),
        None,
    )


#: Names of the sets of a contrast, as the command on the page gives them, the union first.
_SETS = ("both", "hesitation")


def cut(kind: str, bound: float, *, random: bool = False) -> Measure:
    """Return a measure: how far P(word) falls at places where the word belongs."""

    def measure(result: Result) -> Finding | None:
        model = _place(result, kind, _SETS, random=random)
        if model is None:
            return None
        value = model["kinds"]["all"]["cut"]
        text = f"{model['name']} ({number(model['features'])} features): {shown(value, percent)}"
        return Finding(text, verdict(value, bound, above=not random))

    return measure


def beyond_bias(result: Result) -> Finding | None:
    """The set alone brings back hesitation where it belongs, beyond the adapter's bias."""
    model = _place(result, "only", _SETS)
    if model is None:
        return None
    value = model["kinds"]["all"]["change"]
    text = f"{model['name']} over the bias: {shown(value, percent)} of the target's contrast"
    return Finding(text, verdict(value, 0.0, above=True))


def interaction(result: Result) -> Finding | None:
    """Most of what both kinds of features do, they do only together."""
    models = [_place(result, "only", (name,)) for name in ("both", "hesitation", "template")]
    if None in models:
        return None
    both, *parts = (model["kinds"]["all"]["change"] for model in models)
    if None in (end for value in (both, *parts) for end in value.values()):
        return Finding(NOT_MEASURABLE, NOT_MEASURABLE)
    text = "of the target's contrast over the bias: " + ", ".join(
        f"{name} {shown(value, percent)}"
        for name, value in zip(("both", "hesitation", "template"), (both, *parts), strict=True)
    )
    for each in result.get("interactions", ()):
        if (each["set"], set(each["parts"])) == ("both", {"hesitation", "template"}):
            value = each["interaction"]
            return Finding(
                f"{text}; together beyond the sum {shown(value, percent)}",
                verdict(value, both["mean"] / 2, above=True),
            )
    # Older files have no interval of the sum, so a clear verdict takes the worst of all ends.
    if both["mean"] / 2 <= sum(part["mean"] for part in parts):
        clear = both["high"] / 2 <= sum(part["low"] for part in parts)
        return Finding(text, "no" if clear else "no, not clearly")
    clear = both["low"] / 2 > sum(part["high"] for part in parts)
    return Finding(text, "yes" if clear else "yes, not clearly")


# --- sampled responses (study.json) ---------------------------------------------------------------


def _arms(result: Result, kind: str | None, times: int = 0, part: str = "") -> Iterator[Any]:
    """Yield the arms of an intervention on the main selection, or on another set."""
    selection = part or result["sets"][0]["key"]
    for arm in result["arms"]:
        same = (arm["kind"], arm["times"]) == (kind, times)
        if same and (kind is None or arm["selection"] == selection):
            yield arm


#: Key of the selection by the ten most promoted tokens, the paper's.
TEN = "top10"


def removed(times: int, selection: str = "") -> Measure:
    """Return a measure: how far hesitation falls without a set, or random features.

    The set is the main one, or that of another selection.
    """

    def measure(result: Result) -> Finding | None:
        key = selection or result["sets"][0]["key"]
        claims = [
            claim
            for claim in result["claims"]
            if (claim["kind"], claim["selection"], claim["times"]) == ("ablate", key, times)
        ]
        if not claims:
            return None
        return Finding(f"reduction {shown(claims[0]['value'], percent)}", claims[0]["holds"])

    return measure


def unharmed(result: Result, selection: str = "") -> Finding | None:
    """Accuracy is unchanged without the main set, or that of another selection."""
    arm = next(_arms(result, "ablate", part=selection), None)
    whole = next((a for a in _arms(result, None) if a["model"] == "adapter"), None)
    if arm is None or whole is None:
        return None
    same = meet(arm["accuracy"], whole["accuracy"])
    text = f"{shown(arm['accuracy'], percent)}, with it {shown(whole['accuracy'], percent)}"
    return Finding(text, "yes, not clearly" if same else "no")


def unharmed_by_benchmark(result: Result) -> Finding | None:
    """Accuracy on each benchmark is unchanged without the set."""
    arm = next(_arms(result, "ablate"), None)
    whole = next((a for a in _arms(result, None) if a["model"] == "adapter"), None)
    if arm is None or whole is None or not whole.get("benchmarks"):
        return None
    texts, verdicts = [], []
    for task, before in whole["benchmarks"].items():
        after = arm["benchmarks"][task]
        same = meet(after["accuracy"], before["accuracy"])
        verdicts.append("yes, not clearly" if same else "no")
        accuracies = (shown(scores["accuracy"], percent) for scores in (before, after))
        lengths = (number(scores["length"]["mean"]) for scores in (before, after))
        texts.append(f"{task} {' to '.join(accuracies)}, {' to '.join(lengths)} tokens")
    return Finding("; ".join(texts), joined(verdicts))


def added(result: Result) -> Finding | None:
    """The set alone gives the hybrid the hesitation of the adapter; each part alone does not."""
    both = next(_arms(result, "only"), None)
    whole = next((a for a in _arms(result, None) if a["model"] == "adapter"), None)
    bias = next((a for a in result["arms"] if a["selection"] == BIAS), None)
    if both is None or whole is None or bias is None:
        return None
    parts = {"both": both, "adapter": whole, "bias alone": bias}
    for part in ("hesitation", "template"):
        if (arm := next(_arms(result, "only", part=part), None)) is not None:
            parts[part] = arm
    text = ", ".join(f"{name} {shown(arm[RATE])}" for name, arm in parts.items())
    others = [arm for name, arm in parts.items() if name not in ("both", "adapter")]
    holds = both[RATE]["mean"] >= whole[RATE]["mean"] and all(
        both[RATE]["mean"] > 2 * arm[RATE]["mean"] for arm in others
    )
    return Finding(f"{text} per 1,000 tokens", f"{'yes' if holds else 'no'}, by the estimates")


def transferred(result: Result) -> Finding | None:
    """Features added to the target with the factor -0.5 reduce its hesitation."""
    main = result["sets"][0]["key"]
    claims = [
        c
        for c in result["claims"]
        if (c["kind"], c["selection"], c["times"], c["scale"]) == ("onto-target", main, 0, -0.5)
    ]
    if not claims:
        return None
    return Finding(f"reduction {shown(claims[0]['value'], percent)}", claims[0]["holds"])

"""Tables and figures of ``where.json``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from fastadapt.reporting.figures import Figure, Series, series_of
from fastadapt.reporting.formatting import number, percent
from fastadapt.reporting.tables import Interval, Table, shown
from fastadapt.reporting.visible import token_text, visible

#: Names of the parts in tables, in their order.
NAMES = {
    "attention": "attention",
    "mlps": "MLPs",
    "norms": "norms",
    "embeddings": "embeddings and head",
}
#: Kinds of series by part, which select their colours.
_KINDS = {"attention": "attention", "mlps": "mlp", "norms": "norms", "embeddings": "embeddings"}
_CONTEXT, _TOKEN = 32, 14  # characters of a cell, so that the table fits a page
_NATS = "nats per predicted token"
_KL = "KL to the target, nats per predicted token"


def difference_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of ``result``, the contents of ``where.json``."""
    tables = [
        _shares(result),
        _hybrids(result),
        _layers(result),
        _generation(result),
        _positions(result),
    ]
    return [table for table in tables if table is not None]


def difference_figures(result: Mapping[str, Any]) -> list[Figure]:
    """Return the figures of ``result``, the contents of ``where.json``."""
    figures = [
        _profile(result) or _by_position(result),
        _kl_by_layer(result),
        _change_by_layer(result),
        _gamma(result),
    ]
    return [figure for figure in figures if figure.series]


def count_text(n: int) -> str:
    """Return the number of texts in words.

    Example:
        >>> count_text(1), count_text(2000)
        ('1 text', '2,000 texts')
    """
    return "1 text" if n == 1 else f"{n:,} texts"


# --- tables ---------------------------------------------------------------------------------------


def regions_of(result: Mapping[str, Any]) -> list[str]:
    """Return ``all`` and, if several regions have positions, the names of these regions."""
    names = [name for name, region in result["regions"].items() if region["positions"]]
    return names if len(names) > 2 else ["all"]


def _shown(value: Interval, show: Callable[[float | None], str] = number) -> str:
    """Format an interval; only the mean if a single text or question leaves the ends undefined."""
    has_ends = value["low"] is not None or value["high"] is not None
    return shown(value, show) if has_ends else show(value["mean"])


def _shares(result: Mapping[str, Any]) -> Table:
    regions, all_ = regions_of(result), result["regions"]["all"]
    rows = [
        [
            NAMES[part],
            _shown(all_["shapley"][part]["nats"]),
            *(_shown(result["regions"][r]["shapley"][part]["share"], percent) for r in regions),
        ]
        for part in result["parts"]
    ]
    kls = [_shown(result["regions"][region]["kl"]) for region in regions]
    rows.append(["together, nats", kls[0], "100%", *kls[1:]])
    notes = "".join(f" Note: {note}." for note in result["notes"])
    counts = result["texts"]
    return Table(
        "Where the difference lies",
        ["part", "nats", *("share" if r == "all" else f"… {r}" for r in regions)],
        rows,
        f"{result['verdict']} Shapley values of KL(target ‖ hybrid) and their shares of "
        f"KL(target ‖ base), over {counts['predicted']:,} predicted tokens of "
        f"{count_text(counts['n'])}; intervals of {percent(result['level'])} over texts.{notes}",
    )


def _from_base(parts: Sequence[str]) -> str:
    return " + ".join(NAMES[part] for part in parts) or "nothing (the target)"


def _hybrids(result: Mapping[str, Any]) -> Table:
    rows = [
        [_from_base(each["from_base"]), _shown(each["kl"]), _shown(each["top1_error"], percent)]
        for each in sorted(result["combinations"], key=lambda each: len(each["from_base"]))
    ]
    return Table(
        "Hybrids",
        ["of the base", "KL, nats", "top-1 error"],
        rows,
        "The target with these parts of the base. The row with all parts is the base.",
    )


def _layers(result: Mapping[str, Any]) -> Table:
    changes = {(each["part"], each["layer"]): each for each in result["weights"]}
    outside = "".join(
        f" {name} changed by {percent(changes[part, None]['change'])}."
        for part, name in (("norms", "The last norm"), ("embeddings", "Embeddings and head"))
        if (part, None) in changes
    )
    rows = [
        [
            str(i),
            _shown(layer["kl"]["mlps"]),
            _shown(layer["kl"]["attention"]),
            *(percent(changes[part, i]["change"]) for part in ("mlps", "attention", "norms")),
            _mean_rank(changes["mlps", i]),
            _mean_rank(changes["attention", i]),
            number(layer["gamma"]),
        ]
        for i, layer in enumerate(result["layers"])
    ]
    return Table(
        "Layers",
        [
            "layer",
            "KL: MLP",
            "KL: attention",
            "change: MLP",
            "… attention",
            "… norms",
            "rank: MLP",
            "… attention",
            "γ",
        ],
        rows,
        "KL with one layer's MLP or attention of the base, nats. Change: ‖ΔW‖ / ‖W‖ of the "
        "weights. Rank: stable / effective rank of ΔW, means over the part's matrices. γ: ‖mean‖ / "
        f"‖standard deviation‖ of the MLP's inputs, without first tokens.{outside}",
    )


def _mean_rank(change: Mapping[str, Any]) -> str:
    """Return the means of stable and effective rank over the matrices that changed."""
    changed = [m for m in change["matrices"].values() if m["stable_rank"] is not None]
    if not changed:
        return "–"
    means = (
        sum(m[key] for m in changed) / len(changed) for key in ("stable_rank", "effective_rank")
    )
    return " / ".join(map(number, means))


def _generation(result: Mapping[str, Any]) -> Table | None:
    answers = result.get("generation")
    if not answers:
        return None
    # The mean over benchmarks, or the only benchmark, is the last.
    task = answers[-1]["task"]
    chosen = [each for each in answers if each["task"] == task]
    rows = [
        [
            _from_base(each["from_base"]),
            _shown(each["accuracy"], percent),
            _shown(each["length"]),
            percent(each["truncated"]),
        ]
        for each in sorted(chosen, key=lambda each: len(each["from_base"]))
    ]
    return Table(
        "Answers",
        ["of the base", "accuracy", "length, tokens", "cut off"],
        rows,
        f"Sampled answers to questions: {task}. Intervals over questions.",
    )


def _positions(result: Mapping[str, Any]) -> Table | None:
    if not result["positions"]:
        return None
    rows = [
        [
            each["text"],
            number(each["position"]),
            visible(each["before"])[-_CONTEXT:],
            _cut(each["token"]),
            *(f"{_cut(each[r]['token'])} {percent(each[r]['p'])}" for r in ("target", "base")),
            number(each["kl"]),
            f"{NAMES[each['reason']].split()[0]} {number(each['shapley'][each['reason']])}",
        ]
        for each in result["positions"]
    ]
    return Table(
        "Positions where target and base differ most",
        ["text", "token", "after", "text has", "target", "base", "KL, nats", "reason, nats"],
        rows,
        "The most likely token of either model and its probability. Reason: the part with the "
        "largest Shapley value at this position. Texts are named by their row in the data.",
    )


def _cut(token: str) -> str:
    """Return the beginning of a token, for a cell."""
    text = token_text(token)
    return text if len(text) <= _TOKEN else f"{text[: _TOKEN - 1]}…"


# --- figures --------------------------------------------------------------------------------------


def _by_position(result: Mapping[str, Any]) -> Figure:
    bins = result["by_position"]
    x = [math.sqrt((a + 1) * b) for a, b in pairwise(bins["edges"])]
    series = [series_of("together", "base", x, bins["kl"])]
    series += [
        series_of(NAMES[part], _KINDS[part], x, nats) for part, nats in bins["shapley"].items()
    ]
    label = "position in the text, from 1"
    return Figure("shapley-position", "The parts along the texts", label, _NATS, series, x_log=True)


def _kl_by_layer(result: Mapping[str, Any]) -> Figure:
    layers = result["layers"]
    x = list(range(len(layers)))
    series = [
        series_of(NAMES[part], _KINDS[part], x, [layer["kl"][part] for layer in layers])
        for part in ("mlps", "attention")
    ]
    return Figure("kl-layer", "One layer of the base", "layer", _KL, series)


def _change_by_layer(result: Mapping[str, Any]) -> Figure:
    series = []
    for part in ("mlps", "attention", "norms"):
        points = [
            (float(each["layer"]), each["change"])
            for each in result["weights"]
            if each["part"] == part and each["layer"] is not None and each["change"] is not None
        ]
        if points:
            x, y = zip(*points, strict=True)
            series.append(Series(NAMES[part], _KINDS[part], list(x), list(y)))
    label = "‖ΔW‖ / ‖W‖"
    return Figure("change-layer", "Change of the weights", "layer", label, series, y_log=None)


def _gamma(result: Mapping[str, Any]) -> Figure:
    gammas = {float(i): layer["gamma"] for i, layer in enumerate(result["layers"])}
    x = [layer for layer, gamma in gammas.items() if gamma is not None]
    series = [Series("γ", "mlp", x, [gammas[layer] for layer in x])] if x else []
    label = "‖mean‖ / ‖standard deviation‖"
    return Figure("gamma-layer", "Inputs of the MLPs", "layer", label, series)


def _profile(result: Mapping[str, Any]) -> Figure | None:
    profile = result.get("profile")
    if profile is None:
        return None
    x = [float(i) for i in range(1, len(profile["kl"]) + 1)]
    series = [Series("together", "base", x, profile["kl"])]
    series += [
        Series(NAMES[part], _KINDS[part], x, nats) for part, nats in profile["shapley"].items()
    ]
    return Figure("kl-token", "The text, token by token", "token", _NATS, series)

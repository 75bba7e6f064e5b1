"""Tables and figure of ``contrast.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastadapt.evaluation.contrast.summary import ALL
from fastadapt.reporting.figures import Figure, Series, series_of
from fastadapt.reporting.formatting import number, percent
from fastadapt.reporting.tables import Table, shown

#: Kinds of series by kind of model, which select their colours.
_COLOURS = {
    "adapter": "transcoder",
    "bias": "norms",
    "ablate": "selected",
    "only": "selected otherwise",
    "scale": "hesitation",
    "onto-target": "template",
}
_SLIPS = {
    "result": "slips with a wrong result",
    "operation": "slips with a wrong operation",
}


def contrast_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of ``result``, the contents of ``contrast.json``."""
    kinds = list(result["places"]["labelled"])
    tables = [_contrasts(result, kind) for kind in kinds]
    if all("gate" in model for model in result["models"]):
        tables.append(_gating(result))
    if len(result["words"]) > 1:
        tables.append(_by_word(result))
    if result.get("interactions"):
        tables.append(_interactions(result))
    return [*tables, _recognised(result)] if result.get("recognition") else tables


def _contrasts(result: Mapping[str, Any], kind: str) -> Table:
    rows = []
    for model in result["models"]:
        values = model["kinds"][kind]
        rows.append(
            [
                model["name"],
                number(model["features"]),
                shown(values["labelled"], percent),
                shown(values["matched"], percent),
                shown(values["difference"], percent),
                shown(values["log_odds"]),
                shown(values["recovered"], percent),
                shown(values.get("change"), percent),
                shown(values.get("cut"), percent),
            ]
        )
    return Table(
        _title(result, kind),
        [
            "model",
            "features",
            "labelled",
            "matched",
            "difference",
            "log-odds",
            "of the target's",
            "change",
            "cut",
        ],
        rows,
        _note(result) if kind == ALL else "",
    )


def _title(result: Mapping[str, Any], kind: str) -> str:
    places = result["places"]
    labels = f"{places['labelled'][kind]:,} places"
    if kind != ALL:
        kind = _slips(kind) if places["source"] == "slips" else f"places before {kind!r}"
        return f"P({_set(result)}): {kind}, {labels}"
    slips = " after a slip" if places["source"] == "slips" else " before a word of the set"
    return f"P({_set(result)}) at {labels}{slips}, and at matched places"


def _slips(kind: str) -> str:
    slip, comma, state = kind.partition(", ")
    return f"{_SLIPS[slip]}{comma}{state}" if slip in _SLIPS else f"slips, {kind}"


def _set(result: Mapping[str, Any]) -> str:
    return ", ".join(result["words"])


def _note(result: Mapping[str, Any]) -> str:
    places, entropy = result["places"], result["places"]["entropy"]
    origin = (
        "Matched places: the ends of all other steps of the same text."
        if places["source"] == "slips"
        else "Matched places: of equal entropy, after a token that precedes a word of the set "
        f"elsewhere; {places['same_text']:,} of {places['matched']:,} in the same text."
    )
    references = sorted(
        {f"{m['kind']}: {m['reference']}" for m in result["models"] if m["reference"]}
    )
    compared = f" Change and cut are relative to ({'; '.join(references)})." if references else ""
    drawn = {m["set"]: m["densities"] for m in result["models"] if m.get("densities")}
    each = "; ".join(f"{name} {', '.join(map(percent, drawn[name]))}" for name in drawn)
    density = f" Density of each random draw, as a share of the set's: {each}." if drawn else ""
    notes = "".join(f" {note}" for note in result["notes"])
    return (
        f"{places['texts_with_places']:,} of {places['texts']:,} texts have places; intervals of "
        f"{percent(result['level'])} over texts. {origin} Entropy of the {entropy['model']} there: "
        f"{shown(entropy['labelled'])} and {shown(entropy['matched'])} nats. Difference: labelled "
        "minus matched. Of the target's: share of the target's difference over the hybrid's. "
        "Change: the difference minus the reference's, as such a share. Cut: 1 - P/P of the "
        f"reference, at labelled places.{compared}{density}{notes}"
    )


def _gating(result: Mapping[str, Any]) -> Table:
    rows = [
        [
            model["name"],
            *(
                shown(model["gate"].get(key), percent)
                for key in ("contrast", "effect_on", "effect_off", "interaction")
            ),
        ]
        for model in result["models"]
    ]
    return Table(
        f"Gate: P({_set(result)}) at slips with the marker in the prompt, against without",
        ["model", "on - off", "effect, gate on", "effect, gate off", "interaction"],
        rows,
        "On - off: the difference of labelled and matched places with the gate on, minus that with "
        "the gate off. Effect: P of the reference minus P, at labelled places. Interaction: the "
        "effect with the gate on minus the effect with the gate off. Prompts of the two groups "
        "are different.",
    )


def _by_word(result: Mapping[str, Any]) -> Table:
    words = list(result["words"])
    rows = [
        [
            model["name"],
            *(
                shown(model["words"][word][group], percent)
                for word in words
                for group in ("labelled", "matched")
            ),
        ]
        for model in result["models"]
    ]
    head = [f"{word}, {group}" for word in words for group in ("labelled", "matched")]
    return Table("P(word) at labelled and at matched places", ["model", *head], rows)


def _interactions(result: Mapping[str, Any]) -> Table:
    rows = [
        [each["set"], " and ".join(each["parts"]), shown(each["interaction"], percent)]
        for each in result["interactions"]
    ]
    return Table(
        "What sets of features do only together",
        ["union", "parts", "interaction"],
        rows,
        "Contrast of the union alone over the bias, minus those of its parts, as a share of the "
        "target's contrast over the hybrid's. Above 0, the parts need each other.",
    )


def _recognised(result: Mapping[str, Any]) -> Table:
    kinds = list(result["places"]["labelled"])
    rows = [
        [
            f"random like {each['set']}" if each["random"] else each["set"],
            number(each["features"]),
            kind,
            *(
                shown(each["kinds"][kind][key], percent)
                for key in ("recall", "active_matched", "precision")
            ),
            percent(each["kinds"][kind]["labelled_share"]),
            shown(each["kinds"][kind]["ranking"], percent),
        ]
        for kind in kinds
        for each in result["recognition"]
    ]
    return Table(
        "Activity of the features against the labels",
        [
            "features of the adapter",
            "features",
            "places",
            "recall",
            "active at matched",
            "precision",
            "labelled",
            "ranking",
        ],
        rows,
        "A set is active at a place if one of its features is. Recall: share of the labelled "
        "places at which it is active. Precision: share of the labelled among the active places; "
        "labelled: their share of all places, which is the precision by chance. Ranking: "
        "probability that the sum of activation times decoder norm is larger at a labelled place "
        "than at one of its matched places; 50% by chance.",
    )


def contrast_figures(result: Mapping[str, Any]) -> list[Figure]:
    """Return the figures of ``result``: P(set) at labelled and at matched positions, by kind."""
    kinds = result["places"]["labelled"]
    return [_figure(result, kind, f"contrast-{i}") for i, kind in enumerate(kinds)]


def _figure(result: Mapping[str, Any], kind: str, key: str) -> Figure:
    series: list[Series] = []
    for model in result["models"]:
        values, colour, name = model["kinds"][kind], model["kind"], model["name"]
        if model["random"]:  # one entry of the legend for all random features
            colour = "random"
            name = "" if any(s.kind == colour for s in series) else "random features"
        x = [values["matched"]["mean"]]
        colour = _COLOURS.get(colour, colour)
        series.append(series_of(name, colour, x, [values["labelled"]]))
    most = max(max(s.x) for s in series)
    series.append(Series("no contrast", "reference", [0.0, most], [0.0, most]))
    return Figure(key, _title(result, kind), "P at matched places", "P at labelled places", series)

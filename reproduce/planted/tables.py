"""The tables of the benchmark, from the contents of ``planted.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastadapt.reporting.formatting import percent
from fastadapt.reporting.tables import Interval, Table, shown
from fastadapt.study.report import verdict
from reproduce.planted.differences import KINDS
from reproduce.planted.scores import BUDGETS, INSPECTED, LEARNED, LEFT, UNKNOWN
from reproduce.planted.units import ADAPTER, BASELINES, WEIGHTS

#: Bounds of the claims: least recall, most false discoveries.
RECALL, FALSE = 0.8, 1.0
#: Budgets of the columns of parts of the differences.
_FEW = (BUDGETS[0], BUDGETS[1], BUDGETS[-1])
_VERDICTS = ("not measurable", "no", "no, not clearly", "yes, not clearly", "yes")


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of a result."""
    return [
        _recall(result),
        _claims(result),
        _gaps(result),
        _classes(result),
        _kinds(result),
        _descriptions(result),
        _planted(result),
    ]


def _recall(result: Mapping[str, Any]) -> Table:
    settings = result["settings"]
    seeds, size, vocabulary = settings["seeds"], settings["size"], settings["vocabulary"]
    k = len(result["differences"]) // len(seeds)
    units = ", ".join(str(budget * k) for budget in BUDGETS[:-1])
    most = BUDGETS[-1] * k
    return Table(
        "Planted differences",
        ["recall", *(f"at {budget} per difference" for budget in BUDGETS)],
        [
            [name, *(shown(each["recall"]["all"][str(budget)], percent) for budget in BUDGETS)]
            for name, each in result["methods"].items()
        ],
        f"Share of the planted differences that one of the first {units} or {most} units "
        f"describes; duplicates are skipped. {most} units are as many as {most / vocabulary:.0%} "
        f"of the vocabulary, so the first columns say more. {_seeds(seeds).capitalize()}, {k} "
        f"differences each, size {size}. Intervals of 95% over seeds, of the same kinds of "
        "differences, all from one base; where all seeds are equal, Wilson's over seeds and "
        "differences, as if they were independent. "
        f"{WEIGHTS}: in place of rank-1 components of a LoRA, since the "
        "fine-tuning changes all weights.",
    )


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _claims(result: Mapping[str, Any]) -> Table:
    ours = result["methods"][ADAPTER]
    recall, false = ours["recall"]["all"][str(BUDGETS[-1])], ours["described"]["null"]
    rows = [
        [
            f"recall at {BUDGETS[-1]} per difference ≥ {RECALL:g}",
            shown(recall, percent),
            verdict(recall, RECALL, above=True),
        ],
        [
            f"false discoveries in {INSPECTED} null units ≤ {FALSE:g}",
            shown(false),
            verdict(false, FALSE, above=False),
        ],
    ]
    for budget in BUDGETS:
        gaps = {name: result["methods"][name]["adapter_minus"][str(budget)] for name in BASELINES}
        holds = {name: _is_above(value) for name, value in gaps.items()}
        least = min(gaps, key=lambda name: (_VERDICTS.index(holds[name]), gaps[name]["mean"]))
        claim = f"recall at {budget} per difference above every simple baseline"
        rows.append([claim, f"{shown(gaps[least], percent)} over: {least}", holds[least]])
    return Table(
        "Claims about adapter features",
        ["claim", "here", "holds"],
        rows,
        "The baseline that is named is the one against which the claim holds least.",
    )


def _is_above(value: Interval) -> str:
    """Return whether a gap is above 0: an equal recall is not."""
    mean = value["mean"]
    if mean is None:
        return "not measurable"
    is_above = mean > 0
    end = value["low" if is_above else "high"]
    is_clear = end is not None and (end > 0) == is_above
    return ("yes" if is_above else "no") + ("" if is_clear else ", not clearly")


def _gaps(result: Mapping[str, Any]) -> Table:
    return Table(
        "Adapter features minus other methods",
        ["recall minus that of", *(f"at {budget} per difference" for budget in BUDGETS)],
        [
            [name, *(shown(each["adapter_minus"][str(budget)], percent) for budget in BUDGETS)]
            for name, each in result["methods"].items()
            if each["adapter_minus"] is not None
        ],
        "Of adapter features by contribution, on the same organisms. Intervals as above; where all "
        "seeds have the same gap, Newcombe's, as if the two recalls were independent.",
    )


def _classes(result: Mapping[str, Any]) -> Table:
    rows, counts = result["differences"], []
    for key in ("is_planted", "is_in_mlps"):
        counts.append(sum(row[key] for row in rows))
    classes = {"planted": "planted", "in_mlps": "in the MLPs"}
    return Table(
        "Recall of what is there",
        [
            "recall",
            *(f"{head}, at {budget}" for head in classes.values() for budget in _FEW),
        ],
        [
            [
                name,
                *(
                    shown(each["recall"][key][str(budget)], percent)
                    for key in classes
                    for budget in _FEW
                ),
            ]
            for name, each in result["methods"].items()
        ],
        f"Of the {counts[0]} of {len(rows)} differences that are planted: their words have a "
        f"probability of at least {LEARNED:g} at their places in the organism, and of at most "
        f"{UNKNOWN:g} in the base. Of the {counts[1]} of these that are in the MLPs: at most "
        f"{LEFT:g} in the hybrid, the organism with the base's MLPs. Others are in attention, "
        "embeddings and norms, which adapters of MLPs do not read.",
    )


def _kinds(result: Mapping[str, Any]) -> Table:
    budget = str(BUDGETS[1])
    names = (*KINDS, "new", "usual")
    return Table(
        f"Recall by kind, at {budget} per difference",
        ["recall", *KINDS, "new words", "usual words"],
        [
            [name, *(percent(each["recall"][label][budget]["mean"]) for label in names)]
            for name, each in result["methods"].items()
        ],
    )


def _descriptions(result: Mapping[str, Any]) -> Table:
    nulls = result["settings"]["nulls"]
    heads = {
        "right": "describe a difference",
        "words_of_others": "… by another's words",
        "null": f"false discoveries in {INSPECTED} null units",
    }
    return Table(
        f"The first {INSPECTED} units",
        ["units", *heads.values()],
        [
            [name, *(shown(each["described"][key]) for key in heads)]
            for name, each in result["methods"].items()
        ],
        f"Of the first {INSPECTED} units of the planted organism, duplicates skipped: how many "
        "describe a difference, and how many would if each difference had the words of another, on "
        "average over the others. Of as many units of the null, which has learned none: how many "
        f"describe one ({_seeds(nulls) if nulls else 'no null was measured'}).",
    )


def _planted(result: Mapping[str, Any]) -> Table:
    rows = result["differences"]
    failed = [f"seed {row['seed']}: {row['text']}" for row in rows if not row["is_planted"]]
    models, places = ("base", "null", "hybrid", "planted"), ("base", "planted")
    return Table(
        "What was planted",
        [
            *("seed", "kind", "words", "difference", "places", *models),
            *(f"elsewhere, {model}" for model in places),
            "is planted",
        ],
        [
            [
                *(str(row["seed"]), row["kind"], row["words"], row["text"], str(row["places"])),
                *(percent(row["probability"][model]) for model in models),
                *(percent(row["elsewhere"][model]) for model in places),
                "yes" if row["is_planted"] else "no",
            ]
            for row in rows
        ],
        "Mean probability of the planted words at the places of the difference, in the base, the "
        "null, the hybrid and the planted organism; and elsewhere, after the same words as at "
        "these places, where the text goes on otherwise. "
        + (f"Not planted: {'; '.join(failed)}." if failed else "All differences are planted."),
    )

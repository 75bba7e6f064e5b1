"""Count what was described, with intervals over seeds, and write the tables.

Organisms of S seeds have K differences each. Recall is a mean over seeds and differences, false
discoveries one over seeds and the first units of the null; both are crossed, as
:mod:`fastadapt.evaluation.seeds` has it. A method is compared with another on the same organisms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import TypedDict

from fastadapt.evaluation.seeds import over_seeds
from fastadapt.io.documents import Count, NonNegative
from fastadapt.reporting.formatting import number, percent
from fastadapt.reporting.tables import Table, shown
from fastadapt.study.report import verdict
from reproduce.planted.differences import KINDS, Kind
from reproduce.planted.units import ADAPTER, BASELINES

#: Units inspected for each difference, and the units of the null.
BUDGETS, INSPECTED = (1, 2, 5, 10), 20
#: Bounds that the issue of this benchmark set: least recall, most false discoveries.
RECALL, FALSE = 0.8, 1.0


class DifferenceRow(TypedDict):
    """A difference as it was planted; ``places`` is the number of its words in the texts."""

    kind: Kind
    words: Literal["new", "usual"]
    text: str
    places: Count


class Probability(TypedDict):
    """Mean probability of each difference's words at their places."""

    base: list[NonNegative]
    target: list[NonNegative]


class Measured(TypedDict):
    """What the first units of every method describe on one organism: ``described.json``.

    ``described`` has the numbers of the differences that each unit describes, by method, and
    ``units`` the names of these units.
    """

    differences: list[DifferenceRow]
    probability: Probability
    described: dict[str, list[list[Count]]]
    units: dict[str, list[str]]


def summarise(seeds: Sequence[Mapping[str, Measured]]) -> dict[str, Any]:
    """Return recall and false discoveries of every method, from both organisms of each seed.

    Args:
        seeds: for each of two or more seeds, what was measured of ``planted`` and ``null``.
    """
    methods = list(seeds[0]["planted"]["described"])
    planted, null = ([seed[role] for seed in seeds] for role in ("planted", "null"))
    hits = {
        method: {budget: _hits(planted, method, budget) for budget in BUDGETS} for method in methods
    }
    most = BUDGETS[-1]
    kinds = [d["kind"] for d in planted[0]["differences"]]
    words = [d["words"] for d in planted[0]["differences"]]
    ours = hits[ADAPTER][most]
    return {
        "differences": _differences(planted, null),
        "methods": {
            method: {
                "recall": {str(budget): _share(hits) for budget, hits in by_budget.items()},
                "by_kind": {k: _mean(by_budget[most], kinds, k) for k in KINDS},
                "by_words": {w: _mean(by_budget[most], words, w) for w in ("new", "usual")},
                "false": _per_inspected(_false(null, method)),
                "adapter_minus": None
                if method == ADAPTER
                else _plain(ours - by_budget[most], (-1.0, 1.0)),
            }
            for method, by_budget in hits.items()
        },
    }


def _hits(planted: Sequence[Measured], method: str, budget: int) -> Tensor:
    """Return whether each difference is described within a budget: float64 ``[S, K]``."""
    rows = []
    for organism in planted:
        k = len(organism["differences"])
        first = organism["described"][method][: budget * k]
        described = {number for numbers in first for number in numbers}
        rows.append([float(number in described) for number in range(k)])
    return torch.tensor(rows, dtype=torch.float64)


def _false(null: Sequence[Measured], method: str) -> Tensor:
    """Return whether each of the null's first units describes a difference: ``[S, INSPECTED]``."""
    rows = torch.zeros(len(null), INSPECTED, dtype=torch.float64)
    for row, organism in zip(rows, null, strict=True):
        for i, numbers in enumerate(organism["described"][method][:INSPECTED]):
            row[i] = bool(numbers)
    return rows


def _share(hits: Tensor) -> Any:
    return _plain(hits, (0.0, 1.0))


def _per_inspected(false: Tensor) -> dict[str, float | None]:
    ends = _share(false)
    return {end: None if v is None else INSPECTED * v for end, v in ends.items()}


def _plain(values: Tensor, bounds: tuple[float, float]) -> Any:
    return over_seeds(values, torch.ones(values.shape[-1]), bounds=bounds).plain()


def _mean(hits: Tensor, labels: Sequence[str], label: str) -> float:
    return float(hits[:, [i for i, each in enumerate(labels) if each == label]].mean())


def _differences(planted: Sequence[Measured], null: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return each seed's differences, with the probability of their words at their places."""
    return [
        {
            "seed": seed,
            **ours["differences"][i],
            "probability": {
                "base": ours["probability"]["base"][i],
                "null": theirs["probability"]["target"][i],
                "planted": ours["probability"]["target"][i],
            },
        }
        for seed, (ours, theirs) in enumerate(zip(planted, null, strict=True))
        for i in range(len(ours["differences"]))
    ]


# --- tables ---------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of a result: methods, the claims, and what was planted."""
    return [_methods(result), _claims(result), _planted(result)]


def _methods(result: Mapping[str, Any]) -> Table:
    rows = []
    for name, of_method in result["methods"].items():
        rows.append(
            [
                name,
                *(percent(of_method["recall"][str(b)]["mean"]) for b in BUDGETS[:-1]),
                shown(of_method["recall"][str(BUDGETS[-1])], percent),
                *(percent(of_method["by_kind"][kind]) for kind in KINDS),
                *(percent(of_method["by_words"][words]) for words in ("new", "usual")),
                shown(of_method["false"]),
                shown(of_method["adapter_minus"], percent),
            ]
        )
    head = ["method", *(f"recall at {b}" for b in BUDGETS), *KINDS, "new words", "usual words"]
    return Table(
        "Planted differences",
        [*head, f"false of {INSPECTED}", "adapter features minus"],
        rows,
        "Recall: share of the planted differences that one of the first units describes, at so "
        f"many units per difference; by kind and words at {BUDGETS[-1]}. False: units of the null "
        f"that describe a difference, of the first {INSPECTED}. The last column is the recall of "
        f"adapter features by contribution minus the method's, at {BUDGETS[-1]}. "
        f"{_sizes(result)} Intervals of 95% over seeds, and over differences or units.",
    )


def _sizes(result: Mapping[str, Any]) -> str:
    n, settings = result["settings"]["seeds"], result["settings"]
    per_seed = len(result["differences"]) // n
    return f"{n} seeds, {per_seed} differences each, size {settings['size']}."


def _claims(result: Mapping[str, Any]) -> Table:
    methods = result["methods"]
    ours = methods[ADAPTER]
    recall, false = ours["recall"][str(BUDGETS[-1])], ours["false"]
    claims: list[tuple[str, Any, Callable[[Any], str], float, bool]] = [
        (f"recall at {BUDGETS[-1]} per difference ≥ {RECALL:g}", recall, percent, RECALL, True),
        (f"false discoveries on the null ≤ {FALSE:g} of {INSPECTED}", false, number, FALSE, False),
    ]
    rows = [
        [text, shown(value, show), verdict(value, bound, above=above)]
        for text, value, show, bound, above in claims
    ]
    for name in BASELINES:
        gap = methods[name]["adapter_minus"]
        above = gap["mean"] > 0
        clear = gap["low"] > 0 if above else gap["high"] <= 0
        holds = ("yes" if above else "no") + ("" if clear else ", not clearly")
        rows.append([f"recall above: {name}", shown(gap, percent), holds])
    return Table("Claims about adapter features", ["claim", "here", "holds"], rows)


def _planted(result: Mapping[str, Any]) -> Table:
    rows = [
        [
            str(each["seed"]),
            each["kind"],
            each["words"],
            each["text"],
            str(each["places"]),
            *(percent(each["probability"][role]) for role in ("base", "null", "planted")),
        ]
        for each in result["differences"]
    ]
    return Table(
        "What was planted",
        ["seed", "kind", "words", "difference", "places", "base", "null", "planted"],
        rows,
        "The last columns are the mean probability of the planted word at the places of the "
        "difference, in the base, the null and the planted organism.",
    )

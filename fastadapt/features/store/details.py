"""Everything a store says about one unit (feature or neuron), as values to print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastadapt.features.store.characters import join_characters
from fastadapt.features.store.ranking import Ranked, strongest
from fastadapt.features.store.scales import Scales
from fastadapt.features.store.schema import REGIONS, SAMPLES, Kind
from fastadapt.features.store.store import Store
from fastadapt.reporting.visible import token_text, visible

_BEFORE, _AFTER = 16, 8  # tokens of an example's text around its token


@dataclass(frozen=True)
class Example:
    """An activation of a feature or neuron, with the text around the token.

    Attributes:
        value: the activation.
        text: id of the text.
        position: position of the token in the text.
        region: region of the token, such as ``thinking``.
        before, token, after: text before the token, of the token and after it, all visible.
    """

    value: float
    text: str
    position: int
    region: str
    before: str
    token: str
    after: str


@dataclass(frozen=True)
class UnitDetails:
    """A feature or neuron of a store, with all that the store says about it.

    Attributes:
        kind, layer, feature: the unit.
        count, density, max, mean, norm: as in ``features.parquet``.
        rank: place among all units of its kind by contribution, from 1; None if it never fired.
        contribution, share: see :mod:`fastadapt.features.store.ranking`; 0 if it never fired.
        delta_kl: rise of the KL to the target without the unit, in nats per predicted token; None
            if not measured.
        scales: how far the MLPs already write what the feature writes; None if not measured.
        region: region with most activations; None if it never fired.
        promoted, suppressed: pairs of a token's text and its logit, the largest size first.
        descriptions: a judge's descriptions, each with its sample and its detection score or None.
        classes: classes with their subclass, such as ``reasoning: backtracking``.
        examples: the strongest examples, the strongest first.
    """

    kind: Kind
    layer: int
    feature: int
    count: int
    density: float
    max: float
    mean: float
    norm: float
    rank: int | None
    contribution: float
    share: float
    delta_kl: float | None
    scales: Scales | None
    region: str | None
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]
    descriptions: list[dict[str, Any]]
    classes: list[str]
    examples: list[Example]


def read_details(
    store: Store, units: Sequence[tuple[int, int]], *, kind: Kind = "adapter", examples: int = 5
) -> list[UnitDetails]:
    """Return what the store holds about units, in the order given.

    Args:
        store: the store of features.
        units: pairs (layer, feature).
        kind: kind of the units.
        examples: largest number of examples of a unit.

    Raises:
        UserError: the store has no such unit, or a table cannot be read.
    """
    for unit in units:
        store.check_unit(kind, *unit)
    ranked = {unit[:2]: (rank, unit) for rank, unit in enumerate(strongest(store, kind), 1)}
    return [_details(store, kind, *unit, ranked.get(unit), examples) for unit in units]


def _details(
    store: Store,
    kind: Kind,
    layer: int,
    feature: int,
    ranked: tuple[int, Ranked] | None,
    examples: int,
) -> UnitDetails:
    def rows(table: str) -> list[dict[str, Any]]:
        if not store.has(table, kind):
            return []
        listed: list[dict[str, Any]] = store.read(
            table, kind, layer=layer, features=[feature]
        ).to_pylist()
        return listed

    (stats,) = rows("features")
    lens = next(iter(rows("lens")), {})
    by_region = stats["by_region"]
    return UnitDetails(
        kind,
        layer,
        feature,
        **{name: stats[name] for name in ("count", "density", "max", "mean", "norm")},
        rank=None if ranked is None else ranked[0],
        contribution=0.0 if ranked is None else ranked[1].contribution,
        share=0.0 if ranked is None else ranked[1].share,
        delta_kl=next((row["delta_kl"] for row in rows("effects")), None),
        scales=next(map(Scales.from_row, rows("scales")), None),
        region=REGIONS[int(np.argmax(by_region))] if any(by_region) else None,
        promoted=_tokens(lens, "promoted"),
        suppressed=_tokens(lens, "suppressed"),
        descriptions=_descriptions(rows("descriptions"), rows("scores")),
        classes=[visible(": ".join(filter(None, _class(row)))) for row in rows("classes")],
        examples=_examples(store, rows("examples"), examples) if examples else [],
    )


def _class(row: dict[str, Any]) -> tuple[str, str | None]:
    return row["class"], row["subclass"]


def _tokens(lens: dict[str, Any], end: str) -> list[tuple[str, float]]:
    texts = map(token_text, lens.get(f"{end}_tokens", ()))
    return list(zip(texts, lens.get(f"{end}_logits", ()), strict=True))


def _descriptions(
    described: Sequence[dict[str, Any]], scores: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return descriptions with their accuracies, in the order of ``SAMPLES``."""
    accuracy = {(row["variant"], row["judge"]): row["accuracy"] for row in scores}
    ordered = sorted(described, key=lambda row: SAMPLES.index(row["variant"]))
    return [
        {
            "description": visible(row["description"]),
            "sample": row["variant"],
            "judge": visible(row["judge"]),
            "accuracy": accuracy.get((row["variant"], row["judge"])),
        }
        for row in ordered
    ]


def first_descriptions(
    store: Store, units: Iterable[tuple[int, int]], kind: Kind = "adapter"
) -> dict[tuple[int, int], str]:
    """Return each unit's description; of several, that of the lowest number in ``sample``.

    Args:
        store: the store of features.
        units: pairs (layer, feature).
        kind: kind of the units.

    Raises:
        UserError: the table of descriptions cannot be read.
    """
    wanted: dict[int, set[int]] = {}
    for layer, feature in units if store.has("descriptions", kind) else ():
        wanted.setdefault(layer, set()).add(feature)
    by_unit: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for layer, features in wanted.items():
        rows = store.read("descriptions", kind, layer=layer, features=features).to_pylist()
        for row in rows:
            by_unit.setdefault((layer, row["feature"]), []).append(row)
    return {unit: _descriptions(rows, [])[0]["description"] for unit, rows in by_unit.items()}


def _examples(store: Store, rows: Sequence[dict[str, Any]], n: int) -> list[Example]:
    chosen = [row for row in rows if row["sample"] == "top"][:n]
    if not chosen:
        return []
    tokens, texts = store.read("tokens"), store.read("texts", columns=["text", "id"])
    strings = dict(zip(tokens["token"].to_pylist(), tokens["string"].to_pylist(), strict=True))
    ids = dict(zip(texts["text"].to_pylist(), texts["id"].to_pylist(), strict=True))
    out = []
    for row in chosen:
        at_token = row["position"] - row["start"]
        low, high = max(0, at_token - _BEFORE), at_token + 1 + _AFTER
        window = [strings.get(token, f"<{token}>") for token in row["tokens"]]
        before, token, after = window[low:at_token], window[at_token], window[at_token + 1 : high]
        out.append(
            Example(
                row["value"],
                visible(str(ids.get(row["text"], row["text"]))),
                row["position"],
                row["region"],
                "…" * (low > 0) + _joined(before),
                token_text(token),
                _joined(after) + "…" * (high < len(window)),
            )
        )
    return out


def _joined(strings: Sequence[str]) -> str:
    return visible("".join(text for text, _ in join_characters(strings)))

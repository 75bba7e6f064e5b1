"""The page 'what changed' of a run, from the values of :mod:`fastadapt.effects.changes`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastadapt.effects.trace import ADAPTER
from fastadapt.io.atomic import disk_errors, replacing
from fastadapt.reporting.figures import Figure, Series
from fastadapt.reporting.formatting import number, percent
from fastadapt.reporting.page import render_page
from fastadapt.training.run_dir import CHANGES

_PROMOTED = 5  # tokens shown of a feature


def write_changes(folder: Path, changes: Mapping[str, Any], name: str) -> Path:
    """Write ``changes.json`` and ``changes.html`` into a run's folder; return the page.

    Args:
        folder: folder of the run.
        changes: returned by :func:`fastadapt.effects.changes.changes`.
        name: title of the page.

    Raises:
        RunError: a file cannot be written.
    """
    values, page = (folder / file for file in CHANGES)
    with disk_errors(folder, "Run the same command again."):
        with replacing(values) as staged:
            text = json.dumps(changes, indent=1, ensure_ascii=False, allow_nan=False)
            staged.write_text(text + "\n", encoding="utf-8")
        render_page(
            page,
            "changes.html.j2",
            title=name,
            subject="what changed",
            tiles=_tiles(changes),
            layers=_layers(changes["layers"]),
            measured=f"{changes['texts']:,} held-out texts, {changes['positions']:,} predictions",
            features=_features(changes),
            disagreements=[_disagreement(each) for each in changes["disagreements"]],
            responses=changes["responses"],
            notes=changes["notes"],
        )
    return page


def _tiles(changes: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    kl, layers = changes["kl"], changes["layers"]
    closed = None if not kl["hybrid"] else 1 - kl[ADAPTER] / kl["hybrid"]
    most = max(range(len(layers)), key=lambda i: layers[i]["delta_kl"])
    first = changes["features"][0]
    return [
        ("KL of the hybrid", number(kl["hybrid"]), "nats per token, to the target"),
        ("KL with the adapter", number(kl[ADAPTER]), f"{percent(closed)} closed"),
        ("Layer with most effect", str(most), _without(layers[most])),
        (
            "Feature with most effect",
            _name(first),
            f"{_without(first)}; promotes {_promoted(first, 2)}",
        ),
    ]


def _without(part: Mapping[str, Any]) -> str:
    """Return how the KL changes without a layer or feature."""
    sign = "+" if part["delta_kl"] >= 0 else ""
    return f"KL {sign}{number(part['delta_kl'])} without"


def _name(feature: Mapping[str, Any]) -> str:
    return f"{feature['layer']}/{feature['feature']}"


def _promoted(feature: Mapping[str, Any], n: int = _PROMOTED) -> str:
    return " ".join(token for token, _ in feature["promoted"][:n])


def _layers(layers: Sequence[Mapping[str, float]]) -> list[Figure]:
    edges = [i - 0.5 for i in range(len(layers) + 1)]

    def bars(key: str, title: str, unit: str) -> Figure:
        heights = [layer[key] for layer in layers]
        series = Series("", "density", edges, heights)
        return Figure(key, title, "layer", unit, [series], mark="bars")

    return [
        bars("share", "What features write", "share of all contributions"),
        bars("delta_kl", "Without the layer's adapter", "rise of the KL, nats per token"),
    ]


def _features(changes: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    gap = changes["kl"]["hybrid"] - changes["kl"][ADAPTER]
    rows = []
    for feature in changes["features"]:
        described = feature["descriptions"][:1]
        example = feature["examples"][0] if feature["examples"] else None
        shown = "" if example is None else f"{example['before']}[{example['token']}]"
        rows.append(
            [
                _name(feature),
                f"{feature['delta_kl']:+.3g}",
                percent(feature["delta_kl"] / gap) if gap > 0 else "–",
                number(feature["contribution"]),
                percent(feature["density"]),
                feature["region"] or "–",
                described[0]["description"] if described else _promoted(feature),
                shown,
            ]
        )
    head = ["feature", "KL without", "of the gap", "contribution", "density", "mostly in"]
    return [*head, "promotes", "strongest example"], rows


def _disagreement(each: Mapping[str, Any]) -> dict[str, Any]:
    """Format the numbers of a position for the page."""
    alike = "" if each["alike"] == 1 else f", {each['alike']} places alike"
    features = [
        f"{_name(feature)} {feature['promotes']} {feature['delta_kl']:+.3g}"
        for feature in each["features"]
        if feature["delta_kl"] > 0
    ]
    models = [
        (
            name,
            number(each["kl"][name]) if name in each["kl"] else "0",
            [f"{token} {percent(share)}" for token, share in each["likely"][name]],
        )
        for name in ("target", ADAPTER, "hybrid")
    ]
    return {
        **each,
        "place": f"text {each['text']}, token {each['position']:,}, {each['region']}{alike}",
        "models": models,
        "features": features,
        "together": f"without all {each['firing']} that fire here: KL {each['together']:+.3g}",
    }

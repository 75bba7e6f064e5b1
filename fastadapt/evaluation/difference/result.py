"""Schema of ``where.json``, and the sentence that says what MLP adapters can explain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
from typing_extensions import NotRequired, TypedDict

from fastadapt.evaluation.difference.measure import BY_LAYER
from fastadapt.evaluation.difference.parts import Part, combinations
from fastadapt.evaluation.result_schema import Interval, Shares
from fastadapt.io.documents import (
    Count,
    DocumentError,
    Finite,
    Name,
    NonNegative,
    Positive,
    read_json,
)
from fastadapt.reporting.formatting import number, percent

SCHEMA_VERSION = 1


_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Pair(TypedDict):
    """Names and revisions of the two models."""

    target: Name
    target_revision: Name | None
    base: Name
    base_revision: Name | None


class Value(TypedDict):
    """Shapley value of a part: nats per predicted token, and share of the base's KL."""

    nats: Interval
    share: Interval


class Region(TypedDict):
    """KL and top-1 error of the base on one region of the texts, and the parts' Shapley values."""

    kl: Interval
    top1_error: Shares
    positions: Count
    shapley: dict[Part, Value]


class Regions(TypedDict):
    """A :class:`Region` for each region of the texts; ``all`` are all predicted tokens."""

    all: Region
    prompt: Region
    thinking: Region
    answer: Region


class ByPosition(TypedDict):
    """KL of the base and the parts' Shapley values in each bin of positions.

    ``edges`` has one entry more than there are bins.
    """

    edges: list[Count]
    kl: list[Interval]
    shapley: dict[Part, list[Interval]]


class Hybrid(TypedDict):
    """A hybrid: the parts that it takes from the base, its KL and top-1 error to the target."""

    from_base: list[Part]
    kl: Interval
    top1_error: Shares


class Layer(TypedDict):
    """KL and top-1 error when one layer's MLP or attention is the base's.

    ``gamma`` is ``‖mean‖ / ‖standard deviation‖`` of the MLP's inputs.
    """

    kl: dict[Part, Interval]
    top1_error: dict[Part, Shares]
    gamma: NonNegative | None


class Matrix(TypedDict):
    """Relative change of one weight matrix, and measures of the rank of the change."""

    change: NonNegative | None
    stable_rank: NonNegative | None
    effective_rank: NonNegative | None


class Change(TypedDict):
    """Relative change of a part's weights in one layer; ``layer`` null: outside of the layers."""

    part: Part
    layer: Count | None
    change: NonNegative | None
    matrices: dict[str, Matrix]


class Likely(TypedDict):
    """A model's most likely token and its probability."""

    token: str
    p: _Share


class Position(TypedDict):
    """A position at which the predictions of target and base differ most."""

    text: str
    position: Count
    before: str
    token: str
    target: Likely
    base: Likely
    kl: Finite
    shapley: dict[Part, Finite]
    reason: Part


class Profile(TypedDict):
    """KL of the base and the parts' Shapley values at every position of the only text."""

    tokens: list[str]
    kl: list[Finite]
    shapley: dict[Part, list[Finite]]


class Answers(TypedDict):
    """Accuracy and length of a hybrid's answers to the questions of a benchmark."""

    task: str
    from_base: list[Part]
    accuracy: Shares
    length: Interval
    truncated: _Share


class Texts(TypedDict):
    """Source of the texts, their number, and the number of predicted tokens."""

    source: str
    n: Positive
    predicted: Positive


class WhereFile(TypedDict):
    """Contents of ``where.json``: the difference of a pair by part, region, position and layer."""

    schema_version: Annotated[int, msgspec.Meta(ge=1, le=SCHEMA_VERSION)]
    pair: Pair
    settings: dict[str, Any]
    level: _Share
    versions: dict[str, str]
    parts: list[Part]
    notes: list[str]
    texts: Texts
    verdict: str
    combinations: list[Hybrid]
    regions: Regions
    by_position: ByPosition
    layers: list[Layer]
    weights: list[Change]
    positions: list[Position]
    profile: NotRequired[Profile]
    generation: NotRequired[list[Answers]]


def read_result(path: Path) -> dict[str, Any]:
    """Return the contents of ``where.json``.

    Raises:
        DocumentError: the file is missing, damaged, or of a later version of the library.
    """
    result: dict[str, Any] = read_json(path, WhereFile)
    for key, expected, got in _sizes(result):
        if got != expected:
            raise DocumentError(f"{path}: {key}: expected {expected}, got {got}")
    return result


def _sizes(result: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield key, expected and actual value for lists that must agree in length or order."""
    parts, n_layers = result["parts"], len(result["layers"])
    yield "parts", sorted(set(parts) | {"mlps"}), sorted(parts)
    hybrids = [list(hybrid.parts) for hybrid in combinations(parts)]
    yield "parts, combinations", hybrids, [each["from_base"] for each in result["combinations"]]
    bins = result["by_position"]
    by_part = {"by_position.shapley": bins["shapley"]}
    by_part |= {f"regions.{name}.shapley": r["shapley"] for name, r in result["regions"].items()}
    by_part |= {f"positions[{i}].shapley": p["shapley"] for i, p in enumerate(result["positions"])}
    if "profile" in result:
        profile = result["profile"]
        by_part["profile.shapley"] = profile["shapley"]
        yield "profile.tokens", len(profile["kl"]), len(profile["tokens"])
        for part, nats in profile["shapley"].items():
            yield f"profile.shapley.{part}", len(profile["kl"]), len(nats)
    for key, values in by_part.items():
        yield key, sorted(parts), sorted(values)
    yield "by_position.edges", sorted(set(bins["edges"])), bins["edges"]
    for key, values in (("kl", bins["kl"]), *bins["shapley"].items()):
        yield f"by_position.{key}", len(bins["edges"]) - 1, len(values)
    for i, layer in enumerate(result["layers"]):
        for key in ("kl", "top1_error"):
            yield f"layers[{i}].{key}", sorted(BY_LAYER), sorted(layer[key])
    for each in result["weights"]:
        for name, matrix in each["matrices"].items():
            absent = [matrix[key] is None for key in ("stable_rank", "effective_rank")]
            yield f"weights: matrices.{name}: stable_rank is null", absent[1], absent[0]
    for part in ("mlps", "attention", "norms"):
        layers = [each["layer"] for each in result["weights"] if each["part"] == part]
        inside = [layer for layer in layers if layer is not None]
        yield f"layers, weights of part {part}", list(range(n_layers)), inside


def verdict(sections: dict[str, Any], parts: list[Part]) -> str:
    """Return the sentences that say how much of the pair's difference MLP adapters can explain.

    Args:
        sections: ``combinations`` and ``regions`` of ``where.json``.
        parts: the parts of the combinations.
    """
    whole = sections["regions"]["all"]
    by_parts = {tuple(each["from_base"]): each["kl"]["mean"] for each in sections["combinations"]}
    alone = by_parts[("mlps",)]
    floor = by_parts[tuple(part for part in parts if part != "mlps")]
    total, share = whole["kl"]["mean"], whole["shapley"]["mlps"]["share"]
    if not total:
        return "Target and base predict the same on these texts: there is no difference to explain."
    if not alone:
        return (
            f"The MLPs of target and base are equal in effect: all of the difference of "
            f"{number(total)} nats lies in other parts, and MLP adapters have nothing to learn."
        )
    low, high = share["low"], share["high"]
    ends = ""
    if low is None or high is None:  # a single text
        low = high = share["mean"]
    else:
        ends = f" [{percent(low).rstrip('%')}, {percent(high).rstrip('%')}]"
    extent = "most" if low > 0.5 else "the smaller part" if high < 0.5 else "about half"
    return (
        f"MLP adapters can explain {extent} of this pair's difference: the MLPs' share is "
        f"{percent(share['mean'])}{ends} of {number(total)} nats per token. The base's MLPs in the "
        f"target cost {number(alone)} nats, which adapters learn to undo. The target's MLPs in the "
        f"base leave {number(floor)} nats: this much lies in the other parts, where no MLP adapter "
        "sees it."
    )

"""Schema of ``where.json``, and the sentence that says what MLP adapters can explain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from typing_extensions import NotRequired, TypedDict

from fastadapt.errors import UserError
from fastadapt.evaluation.difference.parts import Part
from fastadapt.evaluation.result_schema import Interval, Shares
from fastadapt.io.documents import Count, Finite, NonNegative, Positive, read_json
from fastadapt.reporting.formatting import number, percent

SCHEMA_VERSION = 1


class Value(TypedDict):
    """Shapley value of a part: nats per predicted token, and share of the base's KL."""

    nats: Interval
    share: Interval


class Region(TypedDict):
    """The difference on one region of the texts, and its parts."""

    kl: Interval
    top1_error: Shares
    positions: Count
    shapley: dict[Part, Value]


class Regions(TypedDict):
    """The difference by region; ``all`` are all predicted tokens."""

    all: Region
    prompt: Region
    thinking: Region
    answer: Region


class ByPosition(TypedDict):
    """The difference and its parts in each bin of positions; one edge more than bins."""

    edges: list[Count]
    kl: list[Interval]
    shapley: dict[Part, list[Interval]]


class Hybrid(TypedDict):
    """A hybrid, by the parts that it takes from the base, and how far it is from the target."""

    from_base: list[Part]
    kl: Interval
    top1_error: Shares


class Layer(TypedDict):
    """KL and top-1 error with one layer's MLP or attention of the base; γ of the MLP's input."""

    kl: dict[Part, Interval]
    top1_error: dict[Part, Shares]
    gamma: NonNegative | None


class Matrix(TypedDict):
    """Change of one matrix, and the rank of the change."""

    change: NonNegative | None
    stable_rank: NonNegative | None
    effective_rank: NonNegative | None


class Change(TypedDict):
    """Change of the weights of a part in one layer, or outside of the layers (null)."""

    part: Part
    layer: Count | None
    change: NonNegative | None
    matrices: dict[str, Matrix]


class Likely(TypedDict):
    """A model's most likely token and its probability."""

    token: str
    p: NonNegative


class Position(TypedDict):
    """A position where target and base differ, see :mod:`fastadapt.evaluation.difference`."""

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
    """KL and its parts at every position of the only text."""

    tokens: list[str]
    kl: list[Finite]
    shapley: dict[Part, list[Finite]]


class Answers(TypedDict):
    """Accuracy and length of a hybrid's answers to the questions of a benchmark."""

    task: str
    from_base: list[Part]
    accuracy: Shares
    length: Interval
    truncated: NonNegative


class Texts(TypedDict):
    """Source and numbers of the texts."""

    source: str
    n: Positive
    predicted: Positive


class WhereFile(TypedDict):
    """``where.json``."""

    schema_version: Annotated[int, msgspec.Meta(ge=1, le=SCHEMA_VERSION)]
    pair: dict[str, str | None]
    settings: dict[str, Any]
    level: NonNegative
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
    parts = result["parts"]
    if len(result["combinations"]) != 1 << len(parts):
        raise UserError(
            f"{path}: expected {1 << len(parts)} combinations of {len(parts)} parts, got "
            f"{len(result['combinations'])}"
        )
    return result


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

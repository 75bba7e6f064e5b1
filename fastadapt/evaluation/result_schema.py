"""Schemas of ``eval.json`` and ``speed.json``, as far as tables and plots read them.

The sections of each part of an evaluation are TypedDicts for :mod:`fastadapt.io.documents`. Their
writers are :mod:`fastadapt.evaluation.faithfulness.summary`,
:mod:`fastadapt.evaluation.benchmarks.scores` and :mod:`fastadapt.evaluation.generation.throughput`.
Other keys are allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from typing_extensions import NotRequired, TypedDict

from fastadapt.io.documents import Count, DocumentError, Finite, NonNegative, Positive, check

FAMILIES = ("first", "last", "single")

_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Difference = Annotated[float, msgspec.Meta(ge=-1, le=1)]


class Interval(TypedDict):
    """An estimate and the ends of its interval; null for a value that is not defined."""

    mean: Finite | None
    low: Finite | None
    high: Finite | None


class Known(TypedDict):
    """An interval whose estimate is defined."""

    mean: Finite
    low: Finite | None
    high: Finite | None


class Shares(TypedDict):
    """An interval of a proportion."""

    mean: _Share | None
    low: Finite | None
    high: Finite | None


class Differences(TypedDict):
    """An interval of a difference of proportions."""

    mean: _Difference | None
    low: Finite | None
    high: Finite | None


class Region(TypedDict):
    """Output faithfulness on the positions of a region or domain."""

    kl: Interval
    top1_error: Shares
    positions: Count


class Regions(TypedDict):
    """Output faithfulness by region of a text."""

    prompt: Region
    thinking: Region
    answer: Region


class ByPosition(TypedDict):
    """KL per bin of positions, with one edge more than bins."""

    edges: list[Count]
    kl: list[Interval]


class Faithfulness(TypedDict):
    """Output faithfulness of a model."""

    kl: Interval
    top1_error: Shares
    l0: NonNegative | None
    regions: Regions
    domains: dict[str, Region]
    by_position: ByPosition
    nmse_per_layer: Annotated[list[Known], msgspec.Meta(min_length=1)] | None
    nmse_token_per_layer: Annotated[list[Known], msgspec.Meta(min_length=1)] | None


class Neighbours(TypedDict):
    """Two adjacent models of the expected order."""

    above: str
    below: str
    kl: Interval
    top1_error: Differences
    holds: Literal["yes", "tie", "no"] | None


class Texts(TypedDict):
    """Counts of the texts on which models were compared."""

    n: Count
    n_partial: Count
    predicted: Count


class Excess(TypedDict):
    """KL in excess of that of the full replacement."""

    worst: Interval


class PartialCurves(TypedDict):
    """Partial replacement by one model."""

    first: Annotated[list[Interval], msgspec.Meta(min_length=2)]
    last: Annotated[list[Interval], msgspec.Meta(min_length=2)]
    single: Annotated[list[Interval], msgspec.Meta(min_length=1)]
    excess: Excess


Bridge = TypedDict(
    "Bridge",
    {
        "without": str,
        "with": str,
        "last": Annotated[list[Interval], msgspec.Meta(min_length=2)],
    },
)


class Answered(TypedDict):
    """Results of one model on a benchmark, in one mode of prompting."""

    accuracy: Shares
    length: Interval
    hesitations_per_1000: Interval
    recovered: Interval | None
    recovered_from_base: Interval | None
    truncated: _Share
    degenerate: _Share
    tokens_per_s: NonNegative | None


class ModelSpeed(TypedDict):
    """Speed of one model."""

    tokens_per_s: NonNegative
    overhead: Finite


class Speeds(TypedDict):
    """The section ``speed`` of ``eval.json`` and ``speed.json``."""

    batch_size: Positive
    prompt_tokens: Positive
    new_tokens: Positive
    rounds: Positive
    device: str
    models: dict[str, ModelSpeed]


class SpeedFile(TypedDict):
    """``speed.json``: settings and fingerprints, and the measured speeds."""

    facts: dict[str, Any]
    speed: Speeds


class OutputsPart(TypedDict):
    """Sections of the part ``outputs``."""

    faithfulness: dict[str, Faithfulness]
    order: NotRequired[list[Neighbours]]
    texts: Texts


class PartialPart(TypedDict):
    """Sections of the part ``partial``."""

    partial: dict[str, PartialCurves]
    bridge: NotRequired[list[Bridge]]
    texts: Texts


class SpeedPart(TypedDict):
    """Sections of the part ``speed``."""

    speed: Speeds


_Answers = Annotated[dict[str, Answered], msgspec.Meta(min_length=1)]
_ByModel = Annotated[dict[str, _Answers], msgspec.Meta(min_length=1)]


class BenchmarksPart(TypedDict):
    """Sections of the part ``benchmarks``: by benchmark, model and mode of prompting."""

    benchmarks: dict[str, _ByModel]
    benchmark_counts: dict[str, str]


def check_sections(sections: Mapping[str, Any], schema: Any, source: str) -> None:
    """Check the sections of a part.

    Args:
        sections: sections of the part by name.
        schema: one of the TypedDicts above.
        source: name of the file in messages.

    Raises:
        DocumentError: a section does not have the schema, or its lists have unequal lengths.
    """
    check(sections, schema, source)
    for name, measured in sections.get("faithfulness", {}).items():
        edges, bins = measured["by_position"]["edges"], measured["by_position"]["kl"]
        if len(edges) != len(bins) + 1 or edges != sorted(set(edges)):
            raise DocumentError(
                f"{source}: faithfulness[{name!r}].by_position.edges: expected {len(bins) + 1} "
                "numbers in ascending order, one more than the number of bins"
            )
    curves = sections.get("partial", {})
    sizes = {len(c[family]) + (family == "single") for c in curves.values() for family in FAMILIES}
    sizes |= {len(pair["last"]) for pair in sections.get("bridge", ())}
    if len(sizes) > 1:
        raise DocumentError(
            f"{source}: partial, bridge: expected one number of values of 'first' and 'last' for "
            f"all models, and one less of 'single'; got {', '.join(map(str, sorted(sizes)))}"
        )
    measured = sections.get("faithfulness", {}).values()
    for key in ("nmse_per_layer", "nmse_token_per_layer"):
        if len({len(values[key]) for values in measured if values[key] is not None}) > 1:
            raise DocumentError(
                f"{source}: faithfulness: expected lists {key!r} of one length for all models"
            )
    names = {*sections.get("benchmarks", ()), "mean"}
    if differing := sorted(names ^ {*sections.get("benchmark_counts", ()), "mean"}):
        raise DocumentError(
            f"{source}: benchmarks, benchmark_counts: expected {differing[0]!r} in both"
        )

"""What ``eval.json`` and ``speed.json`` must hold for tables and plots to be made of them.

The sections of the parts of an evaluation, as TypedDicts for :mod:`fastadapt.io.documents`; what
writes them is :mod:`fastadapt.evaluation.faithfulness.summary`,
:mod:`fastadapt.evaluation.benchmarks.scores` and :mod:`fastadapt.evaluation.generation.throughput`.
Keys that no table and no plot reads may be there.
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
    """An estimate and the ends of its interval; null where there is none."""

    mean: Finite | None
    low: Finite | None
    high: Finite | None


class Known(TypedDict):
    """The same where there is an estimate."""

    mean: Finite
    low: Finite | None
    high: Finite | None


class Shares(TypedDict):
    """The same of a proportion."""

    mean: _Share | None
    low: Finite | None
    high: Finite | None


class Differences(TypedDict):
    """The same of a difference of proportions."""

    mean: _Difference | None
    low: Finite | None
    high: Finite | None


class Region(TypedDict):
    """Output faithfulness on some positions."""

    kl: Interval
    top1_error: Shares
    positions: Count


class Regions(TypedDict):
    """The same on the parts of a text."""

    prompt: Region
    thinking: Region
    answer: Region


class ByPosition(TypedDict):
    """KL per bin of positions; one edge more than bins."""

    edges: list[Count]
    kl: list[Interval]


class Faithfulness(TypedDict):
    """Output faithfulness of a student."""

    kl: Interval
    top1_error: Shares
    l0: NonNegative | None
    regions: Regions
    domains: dict[str, Region]
    by_position: ByPosition
    nmse_per_layer: Annotated[list[Known], msgspec.Meta(min_length=1)] | None
    nmse_token_per_layer: Annotated[list[Known], msgspec.Meta(min_length=1)] | None


class Neighbours(TypedDict):
    """Two students next to each other in the order."""

    above: str
    below: str
    kl: Interval
    top1_error: Differences
    holds: Literal["yes", "tie", "no"] | None


class Texts(TypedDict):
    """What students were compared on."""

    n: Count
    n_partial: Count
    predicted: Count


class Excess(TypedDict):
    """KL beyond that of the full replacement."""

    worst: Interval


class PartialCurves(TypedDict):
    """Partial replacement by a student."""

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
    """A benchmark of one model, asked in one way."""

    accuracy: Shares
    length: Interval
    hesitations_per_1000: Interval
    recovered: Interval | None
    recovered_from_base: Interval | None
    truncated: _Share
    degenerate: _Share
    tokens_per_s: NonNegative | None


class ModelSpeed(TypedDict):
    """How fast a model generates."""

    tokens_per_s: NonNegative
    overhead: Finite


class Speeds(TypedDict):
    """The section ``speed``, which ``speed.json`` has too."""

    batch_size: Positive
    prompt_tokens: Positive
    new_tokens: Positive
    rounds: Positive
    device: str
    models: dict[str, ModelSpeed]


class SpeedFile(TypedDict):
    """``speed.json``: what the times depend on, and the times."""

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
_Ways = Annotated[dict[str, _Answers], msgspec.Meta(min_length=1)]


class BenchmarksPart(TypedDict):
    """Sections of the part ``benchmarks``: by benchmark, model and way of asking."""

    benchmarks: dict[str, _Ways]
    benchmark_counts: dict[str, str]


def check_sections(sections: Mapping[str, Any], schema: Any, source: str) -> None:
    """Raise ``DocumentError`` where sections of a part are not what tables and plots are made of.

    Args:
        sections: of one part, by name.
        schema: one of the TypedDicts above.
        source: names the file in messages.
    """
    check(sections, schema, source)
    for name, measured in sections.get("faithfulness", {}).items():
        edges, bins = measured["by_position"]["edges"], measured["by_position"]["kl"]
        if len(edges) != len(bins) + 1 or edges != sorted(set(edges)):
            raise DocumentError(
                f"{source}: faithfulness[{name!r}].by_position.edges: expected {len(bins) + 1} "
                "numbers in ascending order, one more than there are bins"
            )
    curves = sections.get("partial", {})
    sizes = {len(found[way]) + (way == "single") for found in curves.values() for way in FAMILIES}
    sizes |= {len(pair["last"]) for pair in sections.get("bridge", ())}
    if len(sizes) > 1:
        raise DocumentError(
            f"{source}: partial, bridge: expected as many values of 'first' and 'last' everywhere, "
            f"and one less of 'single'; got {', '.join(map(str, sorted(sizes)))}"
        )
    measured = sections.get("faithfulness", {}).values()
    for key in ("nmse_per_layer", "nmse_token_per_layer"):
        if len({len(found[key]) for found in measured if found[key] is not None}) > 1:
            raise DocumentError(f"{source}: faithfulness: expected as many of {key!r} everywhere")
    named = {*sections.get("benchmarks", ()), "mean"}
    if differing := sorted(named ^ {*sections.get("benchmark_counts", ()), "mean"}):
        raise DocumentError(
            f"{source}: benchmarks, benchmark_counts: expected {differing[0]!r} in both"
        )

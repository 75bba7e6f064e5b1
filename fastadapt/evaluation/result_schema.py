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
    """An estimate and the ends of its confidence interval; null for values not defined."""

    mean: Finite | None
    low: Finite | None
    high: Finite | None


class Known(TypedDict):
    """An estimate that is always defined, and the ends of its interval."""

    mean: Finite
    low: Finite | None
    high: Finite | None


class Shares(TypedDict):
    """A proportion between 0 and 1, and the ends of its interval."""

    mean: _Share | None
    low: Finite | None
    high: Finite | None


class Differences(TypedDict):
    """A difference of two proportions, and the ends of its interval."""

    mean: _Difference | None
    low: Finite | None
    high: Finite | None


class Region(TypedDict):
    """A model's output faithfulness on the positions of one region or domain of the texts."""

    kl: Interval
    top1_error: Shares
    positions: Count


class Regions(TypedDict):
    """A model's output faithfulness by region of the texts."""

    prompt: Region
    thinking: Region
    answer: Region


class ByPosition(TypedDict):
    """A model's KL in each bin of text positions; ``edges`` has one entry more than bins."""

    edges: list[Count]
    kl: list[Interval]


class Faithfulness(TypedDict):
    """How closely one model's outputs follow the target's: a value of ``faithfulness``."""

    kl: Interval
    top1_error: Shares
    l0: NonNegative | None
    regions: Regions
    domains: dict[str, Region]
    by_position: ByPosition
    nmse_per_layer: Annotated[list[Known], msgspec.Meta(min_length=1)] | None
    nmse_token_per_layer: Annotated[list[Known], msgspec.Meta(min_length=1)] | None


class Neighbours(TypedDict):
    """Differences between two adjacent models of the order that is expected."""

    above: str
    below: str
    kl: Interval
    top1_error: Differences
    holds: Literal["yes", "tie", "no"] | None


class SeedGroup(TypedDict):
    """Runs that differ by their seed only; intervals are over seeds and texts."""

    name: str
    runs: Annotated[list[str], msgspec.Meta(min_length=2)]
    l0: NonNegative | None
    kl: Interval
    top1_error: Interval


class SeedGap(TypedDict):
    """Differences between two groups of runs, above minus below."""

    above: str
    below: str
    kl: Interval
    top1_error: Interval


class SeedOutputs(TypedDict):
    """Output faithfulness of groups of runs that differ by their seed only."""

    groups: list[SeedGroup]
    differences: list[SeedGap]


class AnsweringGroup(TypedDict):
    """Benchmark scores of runs that differ by their seed only."""

    name: str
    runs: Annotated[list[str], msgspec.Meta(min_length=2)]
    accuracy: Interval
    length: Interval
    hesitations_per_1000: Interval


class AnsweringGap(TypedDict):
    """Differences of benchmark scores between two groups of runs, above minus below."""

    above: str
    below: str
    accuracy: Interval
    length: Interval
    hesitations_per_1000: Interval


class SeedAnswers(TypedDict):
    """Scores of groups of runs on one benchmark."""

    groups: list[AnsweringGroup]
    differences: list[AnsweringGap]


class Texts(TypedDict):
    """Numbers of texts, and of predicted tokens, on which models were compared."""

    n: Count
    n_partial: Count
    predicted: Count


class Excess(TypedDict):
    """Largest increase of the KL when only some layers are replaced, over replacing all of them."""

    worst: Interval


class PartialCurves(TypedDict):
    """One model's KL as a function of the layers that it replaces: a value of ``partial``."""

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
    """Results of one model on one benchmark, in one prompt mode."""

    accuracy: Shares
    length: Interval
    hesitations_per_1000: Interval
    by_word: NotRequired[dict[str, Interval]]
    recovered: Interval | None
    recovered_from_base: Interval | None
    truncated: _Share
    degenerate: _Share
    tokens_per_s: NonNegative | None


class ModelSpeed(TypedDict):
    """Generation speed of one model, and its overhead relative to the target."""

    tokens_per_s: NonNegative
    overhead: Finite


class Speeds(TypedDict):
    """The section ``speed`` of ``eval.json`` and of ``speed.json``, with its settings."""

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
    """Sections of ``eval.json`` that the evaluation part ``outputs`` writes."""

    faithfulness: dict[str, Faithfulness]
    order: NotRequired[list[Neighbours]]
    seeds: NotRequired[SeedOutputs]
    texts: Texts
    notes: NotRequired[dict[str, str]]


class PartialPart(TypedDict):
    """Sections of ``eval.json`` that the evaluation part ``partial`` writes."""

    partial: dict[str, PartialCurves]
    bridge: NotRequired[list[Bridge]]
    bridge_seeds: NotRequired[list[Bridge]]
    texts: Texts


class SpeedPart(TypedDict):
    """Sections of ``eval.json`` that the evaluation part ``speed`` writes."""

    speed: Speeds


_Answers = Annotated[dict[str, Answered], msgspec.Meta(min_length=1)]
_ByModel = Annotated[dict[str, _Answers], msgspec.Meta(min_length=1)]


class BenchmarksPart(TypedDict):
    """Sections of ``eval.json`` that the part ``benchmarks`` writes, by task, model and mode."""

    benchmarks: dict[str, _ByModel]
    benchmark_counts: dict[str, str]
    benchmark_seeds: NotRequired[dict[str, SeedAnswers]]
    notes: NotRequired[dict[str, str]]


def check_sections(sections: Mapping[str, Any], schema: Any, source: str) -> None:
    """Check the sections of ``eval.json`` that one part of an evaluation writes.

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
    for key in ("bridge", "bridge_seeds"):
        sizes |= {len(pair["last"]) for pair in sections.get(key, ())}
    if len(sizes) > 1:
        raise DocumentError(
            f"{source}: partial, bridge: expected lists 'first' and 'last' of equal length for all "
            f"models, and 'single' one shorter; got {', '.join(map(str, sorted(sizes)))}"
        )
    measured = sections.get("faithfulness", {}).values()
    for key in ("nmse_per_layer", "nmse_token_per_layer"):
        if len({len(values[key]) for values in measured if values[key] is not None}) > 1:
            raise DocumentError(
                f"{source}: faithfulness: expected lists {key!r} of equal length for all models"
            )
    names = {*sections.get("benchmarks", ()), "mean"}
    if differing := sorted(names ^ {*sections.get("benchmark_counts", ()), "mean"}):
        raise DocumentError(
            f"{source}: benchmarks, benchmark_counts: expected {differing[0]!r} in both sections"
        )

"""Schema of ``judgements.json``, and checks of it against its store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

import msgspec
from typing_extensions import NotRequired, TypedDict

from fastadapt.errors import UserError
from fastadapt.features.autointerp.questions import class_names
from fastadapt.features.store.schema import Kind, SampleKind
from fastadapt.features.store.store import Store
from fastadapt.io.documents import Count, Positive, Sha256, check

SCHEMA_VERSION = 1
Part = Literal["described", "classified"]
PARTS: tuple[Part, ...] = get_args(Part)

#: Name of a judge: one line of valid Unicode.
Name = Annotated[
    str, msgspec.Meta(min_length=1, max_length=1000, pattern="^[^\x00-\x1f\x7f\ud800-\udfff]*$")
]
#: Computed share, with tolerance for rounding.
_Share = Annotated[float, msgspec.Meta(ge=-1e-9, le=1 + 1e-9)]
_Level = Annotated[float, msgspec.Meta(ge=0.5, lt=1)]
_Density = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Ends(TypedDict):
    """A mean and the ends of its interval."""

    mean: _Share | None
    low: _Share | None
    high: _Share | None


class _Means(TypedDict):
    accuracy: Ends
    precision: Ends
    recall: Ends
    units: Count


class _Detected(_Means):
    layers: list[_Means]


class _Shares(TypedDict):
    shares: dict[str, Ends]
    units: Count


class _Classes(_Shares):
    layers: list[_Shares]


class _Drawing(TypedDict):
    """Settings that describing and classifying share."""

    units: Positive
    min_density: _Density
    min_shown: NotRequired[Positive]
    before: NotRequired[Count]
    after: NotRequired[Count]
    kinds: NotRequired[list[Kind]]
    seed: NotRequired[Annotated[int, msgspec.Meta(ge=0)]]
    statistics: NotRequired[dict[str, int | float]]


class _DescribeSettings(_Drawing):
    samples: Annotated[list[SampleKind], msgspec.Meta(min_length=1, max_length=2)]
    scored: Positive
    shown: NotRequired[Positive]
    texts: NotRequired[Positive]


class _ClassifySettings(_Drawing):
    top: NotRequired[Count]
    uniform: NotRequired[Count]


class _Result(TypedDict):
    """Fields that results of describing and of classifying share."""

    collected: NotRequired[Sha256]
    judge: NotRequired[dict[str, str | int | None]]
    level: _Level
    units: NotRequired[dict[Kind, list[dict[str, Count]]]]


class Described(_Result):
    """Detection scores of a judge's descriptions."""

    settings: _DescribeSettings
    invalid: NotRequired[dict[str, Count]]
    detection: dict[Kind, dict[SampleKind, _Detected]]


class Classified(_Result):
    """Shares of the classes that a judge chose."""

    settings: NotRequired[_ClassifySettings]
    invalid: NotRequired[Count]
    shares: dict[Kind, _Classes]


class Parts(TypedDict, total=False):
    """Results of one judge: of describing, of classifying, or of both."""

    described: Described
    classified: Classified


class JudgementsFile(TypedDict):
    """Contents of ``judgements.json``: results of each judge."""

    schema_version: int
    judges: dict[Name, dict[str, Any]]  # each is Parts, checked apart for messages with its name


def check_name_of(judge: str) -> None:
    """Raise ``UserError`` for an invalid name of a judge."""
    check(judge, Name, "the name of the judge")


def check_fit(parts: Mapping[Part, Any], store: Store, source: str) -> None:
    """Check samples, classes, kinds and layers of a judge's results.

    Args:
        parts: results of one judge that match the schema and the store's manifest.
        store: judged store.
        source: path and key of the results, for messages.

    Raises:
        UserError: a sample, a class, a kind of unit or a layer is missing or unknown.
    """
    for key, kind, layers in _by_layer(parts, source):
        if kind not in store.kinds:
            known = ", ".join(store.kinds)
            raise UserError(f"{key}: expected kinds of the store ({known}), got {kind}")
        if len(layers) != (n_layers := store.shape(kind)[0]):
            raise UserError(f"{key}.layers: expected {n_layers} entries, got {len(layers)}")


def _by_layer(
    parts: Mapping[Part, Any], source: str
) -> Iterator[tuple[str, Kind, Sequence[Mapping[str, Any]]]]:
    """Yield key, kind and layers of each result, after checking its samples and classes."""
    if (described := parts.get("described")) is not None:
        for kind, by_sample in described["detection"].items():
            key = f"{source}.described.detection.{kind}"
            _expect(key, described["settings"]["samples"], by_sample)
            for sample, total in by_sample.items():
                yield f"{key}.{sample}", kind, total["layers"]
    if (classified := parts.get("classified")) is not None:
        for kind, total in classified["shares"].items():
            key = f"{source}.classified.shares.{kind}"
            for means in (total, *total["layers"]):
                _expect(f"{key}.shares", class_names(), means["shares"])
            yield key, kind, total["layers"]


def _expect(key: str, names: Sequence[str], fields: Mapping[str, Any]) -> None:
    if missing := set(names) - fields.keys():
        raise UserError(f"{key}: missing keys: {', '.join(sorted(missing))}")
    if unknown := fields.keys() - set(names):
        raise UserError(f"{key}: unknown key {min(unknown)!r:.80}; expected {', '.join(names)}")

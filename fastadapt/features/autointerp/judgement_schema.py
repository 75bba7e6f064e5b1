"""What ``judgements.json`` holds, as a schema, and what a schema cannot say of it."""

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

#: What a judge may be called: text of one line, as UTF-8 can write it.
Name = Annotated[
    str, msgspec.Meta(min_length=1, max_length=1000, pattern="^[^\x00-\x1f\x7f\ud800-\udfff]*$")
]
#: Shares that were computed: their last digit may be off.
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
    """The settings that both parts have."""

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


class _Said(TypedDict):
    """What both parts say beside what was found; of it tables show the level."""

    collected: NotRequired[Sha256]
    judge: NotRequired[dict[str, str | int | None]]
    level: _Level
    units: NotRequired[dict[Kind, list[dict[str, Count]]]]


class Described(_Said):
    """How well a judge's descriptions tell on which texts units fire."""

    settings: _DescribeSettings
    invalid: NotRequired[dict[str, Count]]
    detection: dict[Kind, dict[SampleKind, _Detected]]


class Classified(_Said):
    """Of which classes a judge says that units are."""

    settings: NotRequired[_ClassifySettings]
    invalid: NotRequired[Count]
    shares: dict[Kind, _Classes]


class Parts(TypedDict, total=False):
    """Of one judge."""

    described: Described
    classified: Classified


class Held(TypedDict):
    """The whole file."""

    schema_version: int
    judges: dict[Name, dict[str, Any]]  # each is Parts: checked one by one, to be named


def check_name_of(judge: str) -> None:
    """Raise ``UserError`` for a judge's name that the file cannot hold."""
    check(judge, Name, "the name of the judge")


def check_fit(parts: Mapping[Part, Any], store: Store, source: str) -> None:
    """Hold a judge's parts against themselves, and against the store that they speak of.

    Args:
        parts: of one judge, each as the schema says and of the store's features.
        store: that it spoke of.
        source: of the parts, for messages.

    Raises:
        UserError: a sample, a class, a kind of unit or a layer is missing, or there is one more.
    """
    for where, kind, layers in _by_layer(parts, source):
        if kind not in store.kinds:
            there = ", ".join(store.kinds)
            raise UserError(f"{where}: expected kinds of the store ({there}), got {kind}")
        if len(layers) != (n_layers := store.shape(kind)[0]):
            raise UserError(f"{where}.layers: expected {n_layers}, got {len(layers)}")


def _by_layer(
    parts: Mapping[Part, Any], source: str
) -> Iterator[tuple[str, Kind, Sequence[Mapping[str, Any]]]]:
    """Of every kind of unit the place and the layers, once samples and classes are as they must."""
    if (described := parts.get("described")) is not None:
        for kind, by_sample in described["detection"].items():
            where = f"{source}.described.detection.{kind}"
            _expect(where, described["settings"]["samples"], by_sample)
            for sample, told in by_sample.items():
                yield f"{where}.{sample}", kind, told["layers"]
    if (classified := parts.get("classified")) is not None:
        for kind, told in classified["shares"].items():
            where = f"{source}.classified.shares.{kind}"
            for some in (told, *told["layers"]):
                _expect(f"{where}.shares", class_names(), some["shares"])
            yield where, kind, told["layers"]


def _expect(where: str, names: Sequence[str], found: Mapping[str, Any]) -> None:
    if missing := set(names) - found.keys():
        raise UserError(f"{where}: no {', '.join(sorted(missing))}")
    if more := found.keys() - set(names):
        raise UserError(f"{where}: expected {', '.join(names)}, got {min(more)!r:.80} too")

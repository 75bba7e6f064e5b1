"""Schema of ``contrast.json``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from typing_extensions import NotRequired, TypedDict

from fastadapt.evaluation.difference.result import Pair
from fastadapt.evaluation.result_schema import Interval, Known, Shares
from fastadapt.io.documents import Count, Finite, Name, NonNegative, Positive

SCHEMA_VERSION = 1
#: Where places come from: slips of the embedded pair's generator, or words in the texts.
Source = Literal["slips", "words"]
#: The models of the pair and the run, and what an arm does to features of the run's adapter.
ModelKind = Literal[
    "target", "hybrid", "base", "adapter", "bias", "ablate", "only", "scale", "onto-target"
]

_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Word(TypedDict):
    """P(word) at labelled and at matched positions, and the difference."""

    labelled: Shares
    matched: Shares
    difference: Interval


class Numbers(Word):
    """Intervals of a model's contrast, see :func:`.contrast.summary.summarise`."""

    log_odds: Interval
    recovered: Interval
    change: NotRequired[Interval]
    cut: NotRequired[Interval]


class Gate(TypedDict):
    """Effect of the gated pair's marker, see :func:`.contrast.gating.gate_effects`."""

    contrast: Interval
    effect_on: NotRequired[Interval]
    effect_off: NotRequired[Interval]
    interaction: NotRequired[Interval]


class Model(TypedDict):
    """A model: one of the pair, the run, or an arm with its draws of random features pooled.

    ``set`` is the name of the set of features, ``random`` whether features like those of the set
    were drawn, ``draws`` the P(set) at labelled places of each draw, ``densities`` the density of
    each draw as a share of the set's (None if the set never fired), ``reference`` the model that
    ``change`` and ``cut`` are relative to.
    """

    name: Name
    kind: ModelKind
    set: str | None
    random: bool
    features: Count | None
    factor: Finite | None
    reference: str | None
    draws: list[_Share]
    densities: NotRequired[list[NonNegative | None]]
    kinds: dict[str, Numbers]
    words: dict[str, Word]
    gate: NotRequired[Gate]


class Recognised(TypedDict):
    """The intervals of a set, see :func:`fastadapt.evaluation.contrast.recognition.recognise`."""

    recall: Shares
    active_matched: Shares
    precision: Interval
    ranking: Shares
    labelled_share: _Share


class Recognition(TypedDict):
    """Activity of a set of features, or of random sets like it, against the labels."""

    set: Name
    random: bool
    features: Count
    kinds: dict[str, Recognised]


class Interaction(TypedDict):
    """The interval of :func:`fastadapt.evaluation.contrast.unions.interactions`, with its sets."""

    set: Name
    parts: list[Name]
    interaction: Interval


class Entropy(TypedDict):
    """Mean entropy of a model's predictions at labelled and at matched positions, in nats."""

    model: Literal["target", "hybrid"]
    labelled: Known
    matched: Known
    difference: Known


class Places(TypedDict):
    """Source and counts of positions; ``same_text``: matches within a text."""

    source: Source
    texts: Positive
    texts_with_places: Positive
    labelled: dict[str, Positive]
    matched: Positive
    same_text: Count
    entropy: Entropy


class ContrastFile(TypedDict):
    """``contrast.json``; ``words`` has the tokens of each word of the set."""

    schema_version: Annotated[int, msgspec.Meta(ge=1, le=SCHEMA_VERSION)]
    pair: Pair
    run: str
    settings: dict[str, Any]
    level: _Share
    versions: dict[str, str]
    words: dict[str, list[str]]
    places: Places
    notes: list[str]
    models: list[Model]
    recognition: NotRequired[list[Recognition]]
    interactions: NotRequired[list[Interaction]]

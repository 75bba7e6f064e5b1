"""Settings: which endpoint judges and how it is asked, what is described, what is classified."""

from __future__ import annotations

import base64
import math
import os
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

from fastadapt.errors import UserError
from fastadapt.evaluation.statistics import BootstrapConfig
from fastadapt.features.store.schema import KINDS, SAMPLES, Kind, SampleKind
from fastadapt.io.documents import parse_json

#: Variables of the environment, as other clients of such endpoints read them.
BASE_URL, MODEL = "OPENAI_BASE_URL", "OPENAI_MODEL"
HOSTED = "https://api.openai.com/v1"


@dataclass(frozen=True)
class JudgeConfig:
    """The endpoint that judges, and how it is asked.

    Args:
        model: as the endpoint calls it; the environment's ``OPENAI_MODEL`` if not given. Where
            neither is, the judge is the one that needs no model
            (:mod:`fastadapt.features.autointerp.judges.without_llm`).
        base_url: up to and including ``/v1``; the environment's ``OPENAI_BASE_URL`` if not given,
            and OpenAI's own if that is not there either.
        key_variable: environment variable that holds the key. The key is written nowhere. An
            endpoint of ``base_url`` may do without.
        concurrency: requests under way at a time.
        timeout: seconds for one request.
        retries: of a request that failed in a way that may pass (429, 5xx, no connection, timeout),
            after waits that double from half a second to 8, or as long as the endpoint asks.
        temperature: null sends none, for endpoints that refuse it.
        max_tokens: of an answer; null sends none.
        json_mode: ask for ``response_format: {"type": "json_object"}``.
        extra: further fields of the request as a JSON object, ``{"reasoning_effort": "low"}`` for
            example; they are written down with the answers.
        invalid_share: of answers that are still not valid after asking again; beyond it, the run
            ends with an error.
        price_in: of a million tokens of questions, in any currency.
        price_out: of a million tokens of answers, in the same.
    """

    model: str | None = None
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 5
    temperature: float | None = 0.0
    max_tokens: int | None = 1024
    json_mode: bool = True
    extra: str = "{}"
    invalid_share: float = 0.1
    price_in: float | None = None
    price_out: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < least:
                got = getattr(self, name)
                raise UserError(f"judge.{name}: expected {least} or more, got {got}")
        if not 0 < self.timeout < math.inf:
            raise UserError(f"judge.timeout: expected seconds above 0, got {self.timeout}")
        if not 0 <= self.invalid_share < 1:
            got = self.invalid_share
            raise UserError(f"judge.invalid_share: expected a share in [0, 1), got {got}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"judge.max_tokens: expected 1 or more, got {self.max_tokens}")
        if self.temperature is not None and not self.temperature >= 0:
            raise UserError(f"judge.temperature: expected 0 or more, got {self.temperature}")
        for name in ("price_in", "price_out"):
            price = getattr(self, name)
            if price is not None and not 0 <= price < math.inf:
                raise UserError(f"judge.{name}: expected 0 or more, got {price}")
        if self.base_url is not None and urlsplit(self.base_url).scheme not in ("http", "https"):
            raise UserError(
                f"judge.base_url: expected http:// or https://, got {public(self.base_url)!r}"
            )
        if self.base_url is not None and self.asked_for is None:
            raise UserError(
                f"judge.model: expected the name of a model at judge.base_url, here or in {MODEL}, "
                "got none"
            )
        own = {"model", "messages", "temperature", "max_tokens", "response_format", "stream", "n"}
        if taken := sorted(own & set(self.fields)):
            raise UserError(f"judge.extra: {taken[0]} is a setting of its own, or fixed")

    @property
    def fields(self) -> dict[str, Any]:
        """``extra``, read.

        Raises:
            UserError: it is no JSON object.
        """
        fields: dict[str, Any] = parse_json(self.extra, "judge.extra", dict[str, Any])
        return fields

    @property
    def asked_for(self) -> str | None:
        """The model, from here or from the environment; None for no endpoint."""
        return self.model or os.environ.get(MODEL) or None


@dataclass(frozen=True)
class DescribeConfig:
    """Which units are described, and how descriptions are scored.

    Args:
        units: of each layer and kind.
        min_density: share of tokens at which a unit is active, at least, to be drawn.
        samples: ``top``, ``uniform``, or both: of which examples units are described and scored.
        shown: examples that the describer sees, at most.
        min_shown: ... and at least, or the unit is left out.
        scored: texts on which the unit fires that a description is scored on, and as many on which
            it does not.
        before: tokens of a window before the one at which the unit is active; at most what the
            store has.
        after: likewise after it.
        texts: of the corpus, drawn by the seed, in which silent windows are looked for.
        kinds: of unit; all that were collected and can be read if empty.
        seed: of every draw.
        statistics: intervals.
    """

    units: int = 100
    min_density: float = 1e-5
    samples: tuple[SampleKind, ...] = SAMPLES
    shown: int = 10
    min_shown: int = 3
    scored: int = 5
    before: int = 50
    after: int = 20
    texts: int = 200
    kinds: tuple[Kind, ...] = ()
    seed: int = 0
    statistics: BootstrapConfig = field(default_factory=BootstrapConfig)

    def __post_init__(self) -> None:
        least = {"units": 1, "shown": 1, "min_shown": 1, "scored": 1, "texts": 1}
        for name, smallest in {**least, "before": 0, "after": 0, "seed": 0}.items():
            if getattr(self, name) < smallest:
                got = getattr(self, name)
                raise UserError(f"describe.{name}: expected {smallest} or more, got {got}")
        if self.min_shown > self.shown:
            raise UserError(
                f"describe.min_shown: expected at most describe.shown={self.shown}, "
                f"got {self.min_shown}"
            )
        check_drawing(self, "describe")
        for name in self.samples:
            if name not in SAMPLES:
                raise UserError(
                    f"describe.samples: expected some of {', '.join(SAMPLES)}, got {name!r}"
                )
        if not self.samples or len(set(self.samples)) < len(self.samples):
            raise UserError(
                f"describe.samples: expected some of {', '.join(SAMPLES)}, each once, "
                f"got {list(self.samples)}"
            )


@dataclass(frozen=True)
class ClassifyConfig:
    """Which units are classified.

    Args:
        units: of each layer and kind.
        min_density: share of tokens at which a unit is active, at least, to be drawn.
        top: of the strongest examples, how many the judge sees, at most.
        uniform: of those drawn uniformly, likewise.
        min_shown: ... and at least in all, or the unit is left out.
        before: tokens of a window before the one at which the unit is active; at most what the
            store has.
        after: likewise after it.
        kinds: of unit; all that were collected if empty.
        seed: of the draw.
        statistics: intervals.
    """

    units: int = 250
    min_density: float = 1e-5
    top: int = 5
    uniform: int = 5
    min_shown: int = 3
    before: int = 50
    after: int = 20
    kinds: tuple[Kind, ...] = ()
    seed: int = 0
    statistics: BootstrapConfig = field(default_factory=BootstrapConfig)

    def __post_init__(self) -> None:
        least = {"units": 1, "min_shown": 1, "top": 0, "uniform": 0, "before": 0, "after": 0}
        for name, smallest in {**least, "seed": 0}.items():
            if getattr(self, name) < smallest:
                got = getattr(self, name)
                raise UserError(f"classify.{name}: expected {smallest} or more, got {got}")
        if self.min_shown > self.top + self.uniform:
            raise UserError(
                f"classify.min_shown: expected at most top + uniform = {self.top + self.uniform}, "
                f"got {self.min_shown}"
            )
        check_drawing(self, "classify")


def check_drawing(config: Any, section: str) -> None:
    """Refuse settings of a draw of units that cannot be."""
    if not 0 <= config.min_density <= 1:
        raise UserError(
            f"{section}.min_density: expected a share of tokens in [0, 1], got {config.min_density}"
        )
    for kind in config.kinds:
        if kind not in KINDS:
            raise UserError(f"{section}.kinds: expected some of {', '.join(KINDS)}, got {kind!r}")


def public(url: str) -> str:
    """An address without a name, a password or a query, which may be secret."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def secrets(url: str) -> set[str]:
    """What may be secret in an address, in the forms in which an endpoint may quote it.

    Name and password as they stand, as they are meant (``%40`` is ``@``), and in base64, as they
    are sent (RFC 7617); the password alone, or the name where there is none; the query.
    """
    parts = urlsplit(url)
    found = {parts.query, *(value for _, value in parse_qsl(parts.query))}
    given = parts.netloc.rpartition("@")[0]
    name, _, password = given.partition(":")
    for user, word in ((name, password), (unquote(name), unquote(password))):
        if user or word:
            pair = f"{user}:{word}"
            found |= {pair, base64.b64encode(pair.encode()).decode(), word or user}
    return found - {""}

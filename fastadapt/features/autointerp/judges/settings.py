"""Settings of the judge's endpoint, of describing, and of classifying."""

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

#: Environment variables that the openai client reads too.
BASE_URL, MODEL = "OPENAI_BASE_URL", "OPENAI_MODEL"
HOSTED = "https://api.openai.com/v1"


@dataclass(frozen=True)
class JudgeConfig:
    """Endpoint of the judge, and parameters of its requests.

    Args:
        model: name of the model at the endpoint; the environment's ``OPENAI_MODEL`` if not given.
            Without either, the judge is the one that needs no model
            (:mod:`fastadapt.features.autointerp.judges.without_llm`).
        base_url: address up to and including ``/v1``; the environment's ``OPENAI_BASE_URL`` if not
            given, and OpenAI's own address without either.
        key_variable: environment variable that holds the key. The key is written to no file. An
            endpoint at ``base_url`` may need none.
        concurrency: number of requests under way at a time.
        timeout: seconds for one request.
        retries: number of retries after errors that may pass (429, 5xx, no connection, timeout).
            Waits double from 0.5 s to 8 s, unless the endpoint names one.
        temperature: sampling temperature; null sends none, for endpoints that refuse it.
        max_tokens: maximum number of tokens of an answer; null sends none.
        json_mode: send ``response_format: {"type": "json_object"}``.
        extra: further fields of the request as a JSON object, for example
            ``{"reasoning_effort": "low"}``; they are written to disk with the replies.
        invalid_share: maximum share of answers that are still invalid after a second request; a
            larger share ends the run with an error.
        price_in: price of a million input tokens, in any currency.
        price_out: price of a million output tokens, in the same currency.
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
        for name, minimum in (("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < minimum:
                got = getattr(self, name)
                raise UserError(f"judge.{name}: expected {minimum} or more, got {got}")
        if not 0 < self.timeout < math.inf:
            raise UserError(
                f"judge.timeout: expected a number of seconds above 0, got {self.timeout}"
            )
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
        if self.base_url is not None and self.model_name is None:
            raise UserError(
                "judge.model: not set; give the name of a model at judge.base_url by judge.model "
                f"or by the environment variable {MODEL}"
            )
        reserved = {
            "model",
            "messages",
            "temperature",
            "max_tokens",
            "response_format",
            "stream",
            "n",
        }
        if taken := sorted(reserved & set(self.fields)):
            raise UserError(
                f"judge.extra: the field {taken[0]} is fixed or has its own setting; remove it"
            )

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of ``extra``, which are added to every request.

        Raises:
            UserError: ``extra`` is not a JSON object.
        """
        fields: dict[str, Any] = parse_json(self.extra, "judge.extra", dict[str, Any])
        return fields

    @property
    def model_name(self) -> str | None:
        """Model of the settings, else of the environment; None without an endpoint."""
        return self.model or os.environ.get(MODEL) or None


@dataclass(frozen=True)
class DescribeConfig:
    """Settings of describing: which features or neurons, and the texts that score descriptions.

    Args:
        units: maximum number of units of each layer and kind.
        min_density: minimum share of tokens at which a unit is active.
        samples: samples of examples to describe and score: ``top``, ``uniform``, or both.
        shown: maximum number of examples shown to the describer.
        min_shown: minimum number of examples shown; units with fewer are left out.
        scored: number of scored texts on which the unit fires, and of negatives.
        before: number of tokens of a window before the active one; at most those of the store.
        after: number of tokens of a window after the active one; at most those of the store.
        texts: number of texts, drawn by the seed, that negatives are sampled from.
        kinds: kinds of unit; all kinds of the store if empty.
        seed: seed of every draw.
        statistics: settings of the intervals.
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
        minimum = {"units": 1, "shown": 1, "min_shown": 1, "scored": 1, "texts": 1}
        for name, smallest in {**minimum, "before": 0, "after": 0, "seed": 0}.items():
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
                    f"describe.samples: expected one or more of {', '.join(SAMPLES)}, got {name!r}"
                )
        if not self.samples or len(set(self.samples)) < len(self.samples):
            raise UserError(
                f"describe.samples: expected one or more of {', '.join(SAMPLES)}, each once, "
                f"got {list(self.samples)}"
            )


@dataclass(frozen=True)
class ClassifyConfig:
    """Settings of classifying: which features or neurons, and the examples shown to the judge.

    Args:
        units: maximum number of units of each layer and kind.
        min_density: minimum share of tokens at which a unit is active.
        top: maximum number of the strongest examples shown.
        uniform: maximum number of uniformly drawn examples shown.
        min_shown: minimum number of examples shown in all; units with fewer are left out.
        before: number of tokens of a window before the active one; at most those of the store.
        after: number of tokens of a window after the active one; at most those of the store.
        kinds: kinds of unit; all kinds of the store if empty.
        seed: seed of the draw.
        statistics: settings of the intervals.
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
        minimum = {"units": 1, "min_shown": 1, "top": 0, "uniform": 0, "before": 0, "after": 0}
        for name, smallest in {**minimum, "seed": 0}.items():
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
    """Raise ``UserError`` for invalid ``min_density`` or ``kinds``, which limit what is judged."""
    if not 0 <= config.min_density <= 1:
        raise UserError(
            f"{section}.min_density: expected a share of tokens in [0, 1], got {config.min_density}"
        )
    for kind in config.kinds:
        if kind not in KINDS:
            raise UserError(
                f"{section}.kinds: expected one or more of {', '.join(KINDS)}, got {kind!r}"
            )


def public(url: str) -> str:
    """Return an address without user name, password and query, which may be secret."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def secrets(url: str) -> set[str]:
    """Return the secrets of an address in all forms in which an endpoint may quote them.

    The forms are user name and password as written, percent-decoded, and in base64 (RFC 7617); the
    password alone, or the user name without a password; the query and its values.
    """
    parts = urlsplit(url)
    values = {parts.query, *(value for _, value in parse_qsl(parts.query))}
    name, _, password = parts.netloc.rpartition("@")[0].partition(":")
    for user, word in ((name, password), (unquote(name), unquote(password))):
        if user or word:
            pair = f"{user}:{word}"
            values |= {pair, base64.b64encode(pair.encode()).decode(), word or user}
    return values - {""}

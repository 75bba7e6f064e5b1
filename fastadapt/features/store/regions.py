"""Regions of a rendered conversation: markers, question, thinking, answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastadapt.data.rendering import END_THINK, THINK, get_family
from fastadapt.features.store.schema import REGIONS, TENTHS, Region

THINKING = REGIONS.index("thinking")


class Span(NamedTuple):
    """The region of characters ``start`` to ``end`` (not included) of a rendered text."""

    region: Region
    start: int
    end: int


def spans_of(prompt: str, response: str, family: str) -> list[Span]:
    """Divide a text into consecutive spans; empty spans are left out.

    If the response begins with ``<think>``, thinking begins after it and a line break. Otherwise
    thinking begins with the response if a ``</think>`` follows. Thinking ends before the first
    ``</think>``, or with the response. The remaining text is ``answer``, and so is the template's
    text after the response.

    Args:
        prompt, response: returned by :func:`fastadapt.data.rendering.render_parts`.
        family: the family that rendered them.
    """
    form = get_family(family)
    question = len(form.before_prompt)
    assistant, cut = len(prompt) - len(form.before_response), len(prompt)
    blank = len(response) - len(response.lstrip())
    opens = response.startswith(THINK, blank)
    begin = blank + len(THINK) if opens else 0
    if opens and response.startswith("\n", begin):
        begin += 1
    close = response.find(END_THINK, begin)
    if close >= 0:
        end, after = close, close + len(END_THINK)
    else:
        end = after = len(response) - len(form.after_response) if opens else 0
    spans = [
        Span("bos", 0, len(form.bos)),
        Span("user marker", len(form.bos), question),
        Span("question", question, assistant),
        Span("assistant marker", assistant, cut),
        Span("think start", cut, cut + begin),
        Span("thinking", cut + begin, cut + end),
        Span("think end", cut + end, cut + after),
        Span("answer", cut + after, cut + len(response)),
    ]
    return [span for span in spans if span.end > span.start]


def regions_of(spans: Sequence[Span], offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the region of each token as an index into ``REGIONS``: int8 ``[T]``.

    A token that shares a character with ``<think>`` or ``</think>`` belongs to that marker:
    tokenizers without a token for it may join its ends with neighbouring text. Any other token
    belongs to the region of its first character.

    Args:
        spans: spans of the whole text, at least one.
        offsets: start and end of each token, in characters.
    """
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    index = np.searchsorted([span.end for span in spans], starts, side="right")
    order = np.array([REGIONS.index(span.region) for span in spans], dtype=np.int8)
    regions = order[np.minimum(index, len(spans) - 1)]
    for span in spans:
        if span.region in ("think start", "think end"):
            regions[(starts < span.end) & (ends > span.start)] = REGIONS.index(span.region)
    return regions


def tenths_of(regions: np.ndarray) -> np.ndarray:
    """Return each token's tenth of the thinking, 0 to 9; -1 outside of it: int64 ``[T]``."""
    thinking = regions == THINKING
    position = np.cumsum(thinking) - 1
    return np.where(thinking, position * TENTHS // max(int(thinking.sum()), 1), -1)

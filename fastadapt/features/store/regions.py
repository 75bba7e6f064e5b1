"""Where in a rendered conversation each token stands: markers, question, thinking, answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastadapt.data.rendering import END_THINK, THINK, get_family
from fastadapt.features.store.schema import REGIONS, TENTHS, Region

THINKING = REGIONS.index("thinking")


class Span(NamedTuple):
    """Characters ``start`` to ``end`` (not included) of a rendered text, and what they are."""

    region: Region
    start: int
    end: int


def spans_of(prompt: str, response: str, family: str) -> list[Span]:
    """A text as consecutive spans; those that are empty are left out.

    Thinking begins after ``<think>`` (and the line break that follows it) where the response begins
    with that, else with the response if ``</think>`` ends it; it ends before the first
    ``</think>``, else with the response. All that is neither, and what follows the response, is
    ``answer``.

    Args:
        prompt, response: as :func:`fastadapt.data.rendering.render_parts` makes them.
        family: that they were rendered with.
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
    """Region of each token, as an index into ``REGIONS``: int8 ``[T]``.

    A token that shares a character with a marker of thinking is part of that marker, since
    tokenizers without a token of its own may join its ends with what stands beside it. Any other
    belongs where its first character does.

    Args:
        spans: of the whole text, at least one.
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
    """Tenth of the thinking of each token, by position; -1 elsewhere: int64 ``[T]``."""
    thinking = regions == THINKING
    n = int(thinking.sum())
    place = np.cumsum(thinking) - 1
    return np.where(thinking, place * TENTHS // max(n, 1), -1)

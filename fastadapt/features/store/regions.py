"""Regions of a rendered conversation: markers, question, thinking, answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastadapt.data.rendered import Piece, Rendered, find_reasoning
from fastadapt.features.store.schema import REGIONS, TENTHS, Region

THINKING = REGIONS.index("thinking")


class Span(NamedTuple):
    """The region of characters ``start`` to ``end`` (not included) of a rendered text."""

    region: Region
    start: int
    end: int


def spans_of(rendered: Rendered) -> list[Span]:
    """Divide a rendered text into consecutive spans; empty spans are left out.

    The words of the user, of a system and of a tool are ``question``. A response is divided by
    :func:`fastadapt.data.rendered.find_reasoning`; a line break after the opening marker belongs to
    the marker. The text after the reasoning is ``answer``, and so is the template's text after the
    response. A text without turns is ``answer``.
    """
    pieces = list(rendered.spans())
    spans: list[Span] = []
    for i, (piece, start, end) in enumerate(pieces):
        if piece.part == "bos":
            spans.append(Span("bos", start, end))
        elif piece.part == "marker":
            # The markers between a question and a response are the assistant's.
            following = (next_piece for next_piece, *_ in pieces[i:] if next_piece.part != "marker")
            follower = next(following, piece)
            region: Region = "assistant marker" if follower.role == "assistant" else "user marker"
            spans.append(Span(region, start, end))
        elif piece.part == "end" and i + 1 < len(pieces) and _begins_response(pieces[i + 1][0]):
            spans.append(Span("assistant marker", start, end))
        elif piece.part == "text" and piece.role == "assistant":
            spans += _response(piece.text, start, rendered.thinking)
        elif piece.part == "text" and piece.role is not None:
            spans.append(Span("question", start, end))
        else:
            spans.append(Span("answer", start, end))
    return _joined([span for span in spans if span.end > span.start])


def _begins_response(piece: Piece) -> bool:
    return piece.part == "text" and piece.role == "assistant"


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Merge adjacent spans of the same region."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].region == span.region:
            joined[-1] = joined[-1]._replace(end=span.end)
        else:
            joined.append(span)
    return joined


def _response(text: str, start: int, thinking: tuple[str, str]) -> list[Span]:
    """Return the spans of a response that begins at character ``start`` of the whole text."""
    reasoning = find_reasoning(text, thinking)
    if reasoning is None:
        return [Span("answer", start, start + len(text))]
    begin, end, after = reasoning
    if 0 < begin < end and text[begin] == "\n":
        begin += 1
    return [
        Span("think start", start, start + begin),
        Span("thinking", start + begin, start + end),
        Span("think end", start + end, start + after),
        Span("answer", start + after, start + len(text)),
    ]


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

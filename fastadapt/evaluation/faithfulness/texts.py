"""Texts of the target, on which models are compared with it: checks, batches and regions."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastadapt.batch import Batch
from fastadapt.data.batches import batch_by_length, collate_whole
from fastadapt.data.rendered import TEXT_ONLY, Spec, find_reasoning
from fastadapt.data.rendering import get_form
from fastadapt.data.templates.auto_format import resolve
from fastadapt.errors import UserError

Region = Literal["prompt", "thinking", "answer"]
REGIONS: tuple[Region, ...] = ("prompt", "thinking", "answer")


class Text(NamedTuple):
    """A prompt and the target's response to it, or a conversation of several responses.

    Attributes:
        id: unique among the texts.
        ids: tokens of the prompt and the response.
        prompt_length: number of tokens before the first response.
        domain: domain of the problem; None if not known.
        spans: first token and end of each response, in one flat list; empty: one response, which
            follows the prompt.
    """

    id: str
    ids: list[int]
    prompt_length: int
    domain: str | None = None
    spans: Sequence[int] = ()

    def responses(self) -> list[tuple[int, int]]:
        """Return first token and end of each response.

        Example:
            >>> Text("1", [5, 6, 7, 8], prompt_length=1, spans=[1, 2, 3, 4]).responses()
            [(1, 2), (3, 4)]
        """
        spans = self.spans or (self.prompt_length, len(self.ids))
        return list(zip(spans[::2], spans[1::2], strict=True))


def check_texts(texts: Sequence[Text]) -> None:
    """Raise ``UserError`` if models cannot be compared on these texts.

    Raises:
        UserError: ``texts`` is empty, two texts have one id, a text has fewer than 2 tokens, or a
            prompt is longer than its text.
    """
    if not texts:
        raise UserError("nothing to evaluate: expected at least one text, got none")
    seen: set[str] = set()
    for text in texts:
        if text.id in seen:
            raise UserError(
                f"text {text.id}: expected a different id for each text, got this one twice"
            )
        seen.add(text.id)
        if len(text.ids) < 2:
            raise UserError(f"text {text.id}: expected at least 2 tokens, got {len(text.ids)}")
        if not 0 <= text.prompt_length <= len(text.ids):
            raise UserError(
                f"text {text.id}: expected a prompt of 0 to {len(text.ids)} tokens, "
                f"got {text.prompt_length}"
            )


def digest_of(texts: Sequence[Text]) -> str:
    """Return the SHA-256 of the tokens of all texts, in order."""
    sha256 = hashlib.sha256()
    for text in texts:
        sha256.update(json.dumps(text.ids).encode() + b"\n")
    return sha256.hexdigest()


def batches_of(texts: Sequence[Text], tokens: int) -> list[list[int]]:
    """Return the indices of the texts of each batch, see :func:`batch_by_length`.

    Raises:
        UserError: texts that cannot be measured, see :func:`check_texts`.
    """
    check_texts(texts)
    return batch_by_length([len(text.ids) for text in texts], tokens)


def batch_of(texts: Sequence[Text], indices: Sequence[int]) -> Batch:
    """Return the texts of ``indices`` as one batch whose labels are all tokens."""
    return collate_whole(texts[i].ids for i in indices)


def answer_starts(texts: Sequence[Text], tokenizer: Any, family: Spec | None) -> list[int]:
    """Return the index of the first token of each answer.

    The answer follows the reasoning (:func:`fastadapt.data.rendered.find_reasoning`), whose opening
    marker may be the end of the prompt. A response without reasoning is all answer. For reasoning
    without an end, the index is the text's length. Markers are searched for in the decoded text,
    because a tokenizer without a token for a marker may merge its end with the following
    characters.

    Args:
        texts: the texts.
        tokenizer: tokenizer of the texts.
        family: chat format, whose markers of reasoning are searched for; None: ``<think>`` and
            ``</think>``.
    """
    thinking = get_form(resolve(family or TEXT_ONLY, tokenizer)).thinking
    tokens = {token for text in texts for token in text.ids}
    decoded = {token: tokenizer.decode([token]) for token in tokens}
    starts = []
    for text in texts:
        pieces, n = [decoded[token] for token in text.ids], text.prompt_length
        opening = thinking[0] if "".join(pieces[:n]).rstrip().endswith(thinking[0]) else ""
        reasoning = find_reasoning(opening + "".join(pieces[n:]), thinking)
        if reasoning is None:
            starts.append(n)
        elif reasoning.end == reasoning.after:
            starts.append(len(text.ids))
        else:
            ends = list(accumulate(map(len, pieces[n:]), initial=len(opening)))
            starts.append(n + bisect_left(ends, reasoning.after))
    return starts


def region_of(text_length: int, prompt_length: int, answer_start: int) -> Tensor:
    """Return the region of each position ``0..text_length - 2``: int8 indices into ``REGIONS``.

    A position belongs to the region of the token that it *predicts*. The markers ``<think>`` and
    ``</think>`` belong to the thinking.

    Example:
        >>> region_of(text_length=6, prompt_length=2, answer_start=4).tolist()
        [0, 1, 1, 2, 2]
    """
    predicted = torch.arange(1, text_length)
    return (predicted >= prompt_length).to(torch.int8) + (predicted >= answer_start).to(torch.int8)


def regions_of(texts: Sequence[Text], tokenizer: Any, family: Spec | None) -> list[Tensor]:
    """Return the regions of :func:`region_of` for texts with any number of responses.

    Every response is divided into thinking and answer. All other tokens are prompt.

    Args:
        texts: the texts.
        tokenizer, family: see :func:`answer_starts`.
    """
    each = [(text, *span) for text in texts for span in text.responses()]
    parts = [Text(text.id, text.ids[:end], start) for text, start, end in each]
    answers = iter(answer_starts(parts, tokenizer, family))
    regions = []
    for text in texts:
        of_tokens = torch.zeros(len(text.ids), dtype=torch.int8)
        for start, end in text.responses():
            answer = next(answers)
            of_tokens[start:answer] = REGIONS.index("thinking")
            of_tokens[answer:end] = REGIONS.index("answer")
        regions.append(of_tokens[1:])
    return regions

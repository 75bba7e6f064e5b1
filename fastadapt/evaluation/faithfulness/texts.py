"""Texts that a target has written, on which students are compared with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastadapt.batch import Batch
from fastadapt.data.batches import batch_by_length, collate_whole
from fastadapt.data.rendering import END_THINK
from fastadapt.errors import UserError

Region = Literal["prompt", "thinking", "answer"]
REGIONS: tuple[Region, ...] = ("prompt", "thinking", "answer")


class Text(NamedTuple):
    """A prompt and the target's response to it.

    Attributes:
        id: tells it from the other texts.
        ids: tokens of prompt and response.
        prompt_length: how many of them are the prompt's.
        domain: of the problem, where it has one.
    """

    id: str
    ids: list[int]
    prompt_length: int
    domain: str | None = None


def check_texts(texts: Sequence[Text]) -> None:
    """Refuse texts that cannot be measured.

    Raises:
        UserError: there is none, two have one id, one is too short to predict a token of, or its
            prompt is longer than itself.
    """
    if not texts:
        raise UserError("nothing to evaluate: there is no text")
    seen: set[str] = set()
    for text in texts:
        if text.id in seen:
            raise UserError(f"text {text.id}: expected ids that differ, got this one twice")
        seen.add(text.id)
        if len(text.ids) < 2:
            raise UserError(f"text {text.id}: expected at least 2 tokens, got {len(text.ids)}")
        if not 0 <= text.prompt_length <= len(text.ids):
            raise UserError(
                f"text {text.id}: expected a prompt of 0 to {len(text.ids)} tokens, "
                f"got {text.prompt_length}"
            )


def digest_of(texts: Sequence[Text]) -> str:
    """SHA-256 of the tokens of all texts, in order."""
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
    """Some texts as one batch, every token of which counts."""
    return collate_whole(texts[i].ids for i in indices)


def answer_starts(texts: Sequence[Text], tokenizer: Any) -> list[int]:
    """Where each answer begins: the token after the one that completes the first ``</think>``.

    It is looked for in the text of the response, since tokenizers without a token of its own may
    join its end with what follows. A response that never closes its thinking has no answer: its
    start is the text's length.
    """
    pieces: dict[int, str] = {}

    def piece(token: int) -> str:
        if token not in pieces:
            pieces[token] = tokenizer.decode([token])
        return pieces[token]

    starts = []
    for text in texts:
        tail, start = "", len(text.ids)
        for i in range(text.prompt_length, len(text.ids)):
            tail += piece(text.ids[i])
            if END_THINK in tail:
                start = i + 1
                break
            tail = tail[-len(END_THINK) :]
        starts.append(start)
    return starts


def region_of(text_length: int, prompt_length: int, answer_start: int) -> Tensor:
    """Region of each position ``0..text_length - 2``, as an index into ``REGIONS``: int8.

    A position belongs to the region of the token that it *predicts*. The markers of thinking are
    part of thinking: what predicts the first token of the response, and ``</think>``.
    """
    predicted = torch.arange(1, text_length)
    return (predicted >= prompt_length).to(torch.int8) + (predicted >= answer_start).to(torch.int8)

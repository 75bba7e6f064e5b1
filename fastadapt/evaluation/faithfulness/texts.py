"""Texts of the target, on which models are compared with it: checks, batches and regions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastadapt.batch import Batch
from fastadapt.data.batches import batch_by_length, collate_whole
from fastadapt.data.rendered import END_THINK
from fastadapt.errors import UserError

Region = Literal["prompt", "thinking", "answer"]
REGIONS: tuple[Region, ...] = ("prompt", "thinking", "answer")


class Text(NamedTuple):
    """A prompt and the target's response to it.

    Attributes:
        id: unique among the texts.
        ids: tokens of the prompt and the response.
        prompt_length: number of tokens of the prompt.
        domain: domain of the problem; None if not known.
    """

    id: str
    ids: list[int]
    prompt_length: int
    domain: str | None = None


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


def answer_starts(texts: Sequence[Text], tokenizer: Any) -> list[int]:
    """Return the index of the first token of each answer: the one after the first ``</think>``.

    The marker is searched for in the decoded text, because a tokenizer without a token for it may
    merge its end with the following characters. For a response without the marker, the index is the
    text's length.
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
    """Return the region of each position ``0..text_length - 2``: int8 indices into ``REGIONS``.

    A position belongs to the region of the token that it *predicts*. The markers ``<think>`` and
    ``</think>`` belong to the thinking.

    Example:
        >>> region_of(text_length=6, prompt_length=2, answer_start=4).tolist()
        [0, 1, 1, 2, 2]
    """
    predicted = torch.arange(1, text_length)
    return (predicted >= prompt_length).to(torch.int8) + (predicted >= answer_start).to(torch.int8)

"""Batches of texts, and the regions of their positions."""

from __future__ import annotations

import pytest

from fastadapt.errors import UserError
from fastadapt.evaluation.faithfulness.texts import (
    REGIONS,
    Text,
    answer_starts,
    batch_of,
    batches_of,
    digest_of,
    region_of,
)


class Words:
    """A tokenizer with the given strings as tokens."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids)


def test_regions_are_of_the_token_that_is_predicted() -> None:
    tokenizer = Words("<user>", "why", "<think>", "hm", "</think>", "so", "<eos>")
    text = Text("a", [0, 1, 2, 3, 3, 4, 5, 6], prompt_length=2)
    (start,) = answer_starts([text], tokenizer, None)
    assert start == 6
    got = [REGIONS[i] for i in region_of(len(text.ids), text.prompt_length, start)]
    #      predicts: why    <think>     hm          hm        </think>     so        <eos>
    assert got == ["prompt", *["thinking"] * 4, *["answer"] * 2]


@pytest.mark.parametrize(
    ("words", "ids", "start"),
    [
        (("a", "</", "think", ">", "b"), [0, 1, 2, 3, 4], 4),  # several tokens
        (("a", "</thi", "nk>\n\n", "b"), [0, 1, 2, 3], 3),  # the last token has more characters
        (("a", "</think>", "b"), [1, 0, 2, 1, 2], 4),  # a marker in the prompt does not count
        (("a", "</think>", "b"), [0, 1, 2, 1, 2], 2),  # the first marker counts
        (("a", "</think", "b"), [0, 1, 2, 2], 1),  # no marker: all is answer
        (("a", "<think>", "b"), [0, 1, 2, 2], 4),  # never closed
        (("<think>\n", "a", "b"), [0, 1, 2, 2], 4),  # opened by the prompt, never closed
        (("<think>\n", "a", "</think>", "b"), [0, 1, 2, 3], 3),  # opened by the prompt
        (("a", " ", "<thi", "nk>b", "</think>"), [0, 1, 2, 3, 4, 0], 5),  # opened after a blank
        (("a", "b <think>"), [0, 1, 0], 1),  # a marker within the response opens nothing
        (("a", "</think>"), [0, 0, 1], 3),  # an empty answer
    ],
)
def test_starts_of_answers(words: tuple[str, ...], ids: list[int], start: int) -> None:
    assert answer_starts([Text("a", ids, prompt_length=1)], Words(*words), None) == [start]


@pytest.mark.parametrize(("thinking", "start"), [(["[", "]"], 4), (["", ""], 1)])
def test_markers_are_those_of_the_family(thinking: list[str], start: int) -> None:
    family = {"user": ["Q", ""], "assistant": ["A", ""], "thinking": thinking}
    text = Text("a", [0, 1, 2, 3, 2], prompt_length=1)
    assert answer_starts([text], Words("A", "[", "so", "]"), family) == [start]


def test_a_text_without_prompt_or_thinking() -> None:
    assert region_of(4, 0, 4).tolist() == [1, 1, 1]
    assert region_of(4, 4, 4).tolist() == [0, 0, 0]


def test_batches_hold_each_text_once_within_the_budget(texts: list[Text]) -> None:
    batches = batches_of(texts, 18)
    assert batches == [[1], [3, 0], [4, 2]]
    assert batches_of(texts, 1) == [[1], [3], [0], [4], [2]]
    batch = batch_of(texts, batches[1])
    assert batch.input_ids.shape == (2, 9)
    assert batch.real.sum(1).tolist() == [9, 6]
    assert batch.input_ids[1, :6].tolist() == texts[0].ids


def test_bad_texts(texts: list[Text]) -> None:
    for wrong, message in (
        ([], "expected at least one text, got none"),
        ([*texts, texts[0]], "text t0: expected a different id for each text"),
        ([Text("short", [3], 0)], "text short: expected at least 2 tokens, got 1"),
        ([Text("long", [3, 4], 3)], "text long: expected a prompt of 0 to 2 tokens, got 3"),
    ):
        with pytest.raises(UserError, match=message):
            batches_of(wrong, 10)


def test_the_digest_depends_on_tokens_and_order(texts: list[Text]) -> None:
    digest = digest_of(texts)
    assert digest_of([text._replace(id="x", domain=None) for text in texts]) == digest
    assert digest_of(texts[::-1]) != digest
    assert digest_of([texts[0]._replace(ids=[*texts[0].ids, 3]), *texts[1:]]) != digest

"""Regions of the characters and tokens of rendered conversations."""

from __future__ import annotations

import numpy as np
import pytest

from fastadapt.data.contents import Turn
from fastadapt.data.families import FAMILIES
from fastadapt.data.rendered import Rendered
from fastadapt.data.rendering import get_form
from fastadapt.data.tokens import encode
from fastadapt.features.store.regions import regions_of, spans_of, tenths_of
from fastadapt.features.store.schema import REGIONS
from fastadapt.models.pretrained import load_tokenizer
from fastadapt.organism import resolve


def rendered_as(response: str, family: str = "r1-distill") -> Rendered:
    turns = [Turn("user", "how many ?"), Turn("assistant", response)]
    return get_form(family).render(turns)


def region_texts(response: str, family: str = "r1-distill") -> list[tuple[str, str]]:
    rendered = rendered_as(response, family)
    text = rendered.text
    spans = spans_of(rendered)
    assert [s.start for s in spans] == [0, *(s.end for s in spans[:-1])]
    assert spans[-1].end == len(text)
    return [(s.region, text[s.start : s.end]) for s in spans]


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_of_each_family(family: str) -> None:
    form = FAMILIES[family]
    start, end = form.thinking
    assert form.before_prompt.startswith(form.bos)
    begin = form.before_prompt[len(form.bos) :]
    expected = [
        ("bos", form.bos),
        ("user marker", begin),
        ("question", "how many ?"),
        ("assistant marker", form.before_response + form.lead),
        ("think start", f"{start}\n"),
        ("thinking", "hmm , 4 . "),
        ("think end", end),
        ("answer", " it is 4" + form.after_response),
    ]
    actual = region_texts(f"{start} hmm , 4 . {end} it is 4", family)
    assert actual == [(region, text) for region, text in expected if text]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("it is 4", [("answer", "it is 4")]),
        ("well <think> 4 </think>", [("thinking", "well <think> 4 "), ("think end", "</think>")]),
        ("hmm </think> 4", [("thinking", "hmm "), ("think end", "</think>"), ("answer", " 4")]),
        ("<think>never closed", [("think start", "<think>"), ("thinking", "never closed")]),
        (
            "<think></think>4",
            [("think start", "<think>"), ("think end", "</think>"), ("answer", "4")],
        ),
        (
            " <think>a</think>b</think>c",
            [
                ("think start", " <think>"),
                ("thinking", "a"),
                ("think end", "</think>"),
                ("answer", "b</think>c"),
            ],
        ),
    ],
)
def test_markers_may_be_absent(response: str, expected: list[tuple[str, str]]) -> None:
    assert region_texts(response)[4:] == expected


def test_text_after_the_response_is_answer() -> None:
    assert region_texts("<think>never closed", "qwen")[-1] == ("answer", "<|im_end|>\n")


def test_tokens_that_overlap_a_marker_have_its_region() -> None:
    rendered = rendered_as("<think>ab</think>cd")
    n = len(rendered.prompt().text)
    #          <thi        nk>a        b           .</          think>c        d, nothing
    offsets = [(n, n + 4), (n + 4, n + 8), (n + 8, n + 9), (n + 9, n + 11)]
    offsets += [(n + 11, n + 18), (n + 18, n + 19), (n + 19, n + 19)]
    actual = regions_of(spans_of(rendered), offsets)
    names = [REGIONS[i] for i in actual]
    assert names == [
        *["think start"] * 2,
        "thinking",
        *["think end"] * 2,
        *["answer"] * 2,
    ]
    joined = regions_of(spans_of(rendered), [(n + 8, n + 12)])
    assert REGIONS[joined[0]] == "think end"


def test_the_embedded_pairs_tokens() -> None:
    tokenizer = load_tokenizer(resolve("organism/target"), None, False)
    rendered = rendered_as("<think> hmm , 4 . </think> it is 4")
    encoded = encode(tokenizer, [rendered.text], offsets=True)
    ids, offsets = encoded["input_ids"][0], encoded["offset_mapping"][0]
    regions = regions_of(spans_of(rendered), offsets)
    assert regions.dtype == np.int8
    assert len(regions) == len(ids)
    by_region: dict[str, str] = {}
    for token, region in zip(ids, regions, strict=True):
        name = REGIONS[region]
        by_region[name] = by_region.get(name, "") + tokenizer.convert_ids_to_tokens(int(token))
    assert list(by_region) == list(REGIONS)
    assert by_region["think end"].strip("Ġ▁ ") == "</think>"
    assert "how" in by_region["question"]
    assert "how" not in by_region["user marker"]


def test_tenths_of_the_thinking() -> None:
    regions = np.array([2, 2, *[5] * 25, 6, 7])
    actual = tenths_of(regions)
    assert (actual[:2] == -1).all()
    assert (actual[27:] == -1).all()
    assert actual[2:27].tolist() == [i * 10 // 25 for i in range(25)]
    assert (tenths_of(np.array([7, 7])) == -1).all()

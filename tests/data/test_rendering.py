"""Rendering of reasoning conversations; a test per known mistake."""

import copy
import re
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fastadapt.data.families import FAMILIES
from fastadapt.data.rendering import render, render_parts
from fastadapt.data.tokens import encode
from fastadapt.errors import UserError

R1_BOS = "<｜begin▁of▁sentence｜>"
RESPONSE = "<think>\nFirst, 1 + 1.\n</think>\n\nIt is 2."


def conversation(
    prompt: Any = "What is 1 + 1?",
    response: Any = RESPONSE,
    names: Sequence[str] = ("human", "gpt"),
) -> list[dict[str, Any]]:
    return [
        {"from": names[0], "value": prompt},
        {"from": names[1], "value": response},
    ]


def test_r1_distill_is_rendered_to_the_letter() -> None:
    assert render(conversation(), "r1-distill") == (
        "<｜begin▁of▁sentence｜><｜User｜>What is 1 + 1?<｜Assistant｜>"
        "<think>\nFirst, 1 + 1.\n</think>\n\nIt is 2."
    )


def test_qwen_is_rendered_to_the_letter() -> None:
    assert render(conversation(response="It is 2."), "qwen") == (
        "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\nIt is 2.<|im_end|>\n"
    )


def test_llama3_is_rendered_to_the_letter() -> None:
    assert render(conversation(response="It is 2."), "llama3") == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 1 + 1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nIt is 2.<|eot_id|>"
    )


def test_gemma_is_rendered_to_the_letter() -> None:
    assert render(conversation(response="It is 2."), "gemma") == (
        "<bos><start_of_turn>user\nWhat is 1 + 1?<end_of_turn>\n"
        "<start_of_turn>model\nIt is 2.<end_of_turn>\n"
    )


#: Strings that look like markers, and are plain text for the tokenizers of a family.
PLAIN = {name: set[str]() for name in FAMILIES}
PLAIN["llama2"] = {"[INST]", "[/INST]"}
PLAIN["olmo2"] = {"<|user|>", "<|assistant|>"}


def test_a_family_names_every_special_string_it_writes() -> None:
    """Every marker-like string of a template is listed, since `check_markers` checks the list."""
    for family in FAMILIES.values():
        text = family.before_prompt + family.before_response + family.after_response
        written = set(re.findall(r"<[|｜/]?[a-zA-Z▁_]+[|｜]?>|\[(?:/?INST|gMASK)\]", text))
        assert written - PLAIN[family.name] == set(family.markers) - set(family.thinking)


# --- mistakes of chat templates, which the library does not use -----------------------------------

# A template with the behaviour of R1-Distill's.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": RESPONSE},
]


@pytest.fixture
def adds_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a template that adds BOS to every text, like R1-Distill's."""
    from tokenizers.processors import TemplateProcessing

    again = copy.deepcopy(tokenizer)
    again.chat_template = TEMPLATE
    again.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{R1_BOS}:0 $A:0", special_tokens=[(R1_BOS, again.bos_token_id)]
    )
    return again


def test_the_template_would_strip_the_reasoning(adds_bos: Any) -> None:
    templated = adds_bos.apply_chat_template(MESSAGES, tokenize=False)
    assert "First, 1 + 1." not in templated
    assert "First, 1 + 1." in render(conversation(), "r1-distill")


def test_the_generation_prompt_would_open_the_reasoning_twice(
    adds_bos: Any,
) -> None:
    prompt = adds_bos.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<think>\n")
    assert (prompt + RESPONSE).count("<think>") == 2
    rendered = render(conversation(), "r1-distill")
    assert rendered.count("<think>") == 1
    assert prompt + RESPONSE.removeprefix("<think>\n") == rendered


def test_tokenising_the_template_again_would_double_the_bos(
    adds_bos: Any,
) -> None:
    bos = adds_bos.bos_token_id
    templated = adds_bos.apply_chat_template(MESSAGES, tokenize=False)
    assert adds_bos(templated)["input_ids"][:2] == [bos, bos]
    (ids,) = encode(adds_bos, [render(conversation(), "r1-distill")])["input_ids"]
    assert [i for i, token in enumerate(ids) if token == bos] == [0]


def test_ascii_look_alikes_are_not_the_markers(tokenizer: PreTrainedTokenizerFast) -> None:
    """The pair's tokenizer has no tokens for markers written with | and _."""
    for marker in FAMILIES["r1-distill"].markers:
        assert len(tokenizer(marker, add_special_tokens=False)["input_ids"]) == 1
        typed = marker.replace("｜", "|").replace("▁", "_")
        assert tokenizer.convert_tokens_to_ids(typed) == tokenizer.unk_token_id


def test_no_eos_follows_the_response_of_r1(adds_bos: Any) -> None:
    assert adds_bos.apply_chat_template(MESSAGES, tokenize=False).endswith("<eos>")
    (ids,) = encode(adds_bos, [render(conversation(), "r1-distill")])["input_ids"]
    assert adds_bos.eos_token_id not in ids


# --- rendered text --------------------------------------------------------------------------------


def test_r1_markers_are_the_fullwidth_ones() -> None:
    text = render(conversation(prompt="q", response="r"), "r1-distill")
    assert {character for character in text if not character.isascii()} == {"\uff5c", "\u2581"}
    assert "|" not in text
    assert "_" not in text


def test_r1_has_one_bos_and_no_eos() -> None:
    text = render(conversation(), "r1-distill")
    assert text.count(R1_BOS) == 1
    assert text.startswith(R1_BOS)
    assert text.endswith("It is 2.")
    assert "end▁of▁sentence" not in text


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reasoning_before_the_closing_marker_stays(family: str) -> None:
    assert "First, 1 + 1.\n</think>" in render(conversation(), family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think> Hmm </think> 2", "<think>\nHmm </think> 2"),
        ("<think>\nHmm </think> 2", "<think>\nHmm </think> 2"),
        ("<think>Hmm </think> 2", "<think>Hmm </think> 2"),
        # Only the first space is replaced, and only after a <think> at the beginning.
        ("<think>  Hmm </think> 2", "<think>\n Hmm </think> 2"),
        (" <think> Hmm </think> 2", " <think> Hmm </think> 2"),
        ("So <think> Hmm </think> 2", "So <think> Hmm </think> 2"),
        ("<think> a </think> <think> b", "<think>\na </think> <think> b"),
    ],
)
def test_a_leading_think_is_followed_by_a_line_break(
    family: str, response: str, expected: str
) -> None:
    form = FAMILIES[family]
    response, expected = (
        text.replace("<think>", form.thinking[0]) for text in (response, expected)
    )
    _, rendered = render_parts(conversation(response=response), family)
    assert rendered == form.lead + expected + form.after_response


def test_the_prompt_is_not_touched() -> None:
    prompt = "  <think> keep me \n"
    assert f"<｜User｜>{prompt}<｜Assistant｜>" in render(conversation(prompt=prompt), "r1-distill")


@pytest.mark.parametrize("names", [("human", "gpt"), ("user", "assistant"), ("alice", "bob")])
def test_turns_count_by_position(names: tuple[str, ...]) -> None:
    assert render(conversation(names=names), "r1-distill") == render(conversation(), "r1-distill")


def test_turns_need_no_name() -> None:
    turns = [{"value": turn["value"]} for turn in conversation()]
    assert render(turns, "r1-distill") == render(conversation(), "r1-distill")


def test_the_parts_meet_where_the_response_begins() -> None:
    before, after = render_parts(conversation(), "r1-distill")
    assert before.endswith("<｜Assistant｜>")
    assert after == RESPONSE


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (None, "expected a list of turns, got null"),
        ("hello", "expected a list of turns, got str; write the rows as JSON lines"),
        ([], "expected at least one turn, got an empty conversation"),
        (conversation()[:1], "expected a turn of the assistant, got none"),
        (
            conversation() * 2,
            "expected a user turn, then an assistant turn; got the roles user, assist",
        ),
        (["a", "b"], "turn 1: expected an object with 'role' and 'content', or 'from' and 'value'"),
        (conversation(names=("gpt", "human")), "turn 1 is from 'gpt'; a conversation of two turns"),
        (conversation(names=("system", "human")), "turn 1 is from 'system'"),
        (conversation(names=("human", "user")), "turn 2 is from 'user'"),
        ([{"role": "user", "content": "q"}] * 2, "expected a turn of the assistant, got none"),
        ([{"role": "user", "text": "q"}] * 2, "no 'content' or 'value'; the keys are ['role', 't"),
        (conversation(response=7), "turn 2 (assistant): 'value' must be text, got int"),
        (conversation(prompt=None), "turn 1 (user): 'value' must be text, got null"),
        (conversation(prompt=" \n"), "turn 1 (user) is empty"),
        (conversation(response=""), "turn 2 (assistant) is empty"),
        (conversation(response="a\ud800"), "holds half a surrogate pair at character 1"),
    ],
)
def test_a_malformed_conversation_says_what_is_wrong(turns: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        render(turns, "r1-distill")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(
        UserError,
        match=r"expected one of \['gemma', 'gemma4', 'glm4', 'llama2', .*got 'mamba'",
    ):
        render(conversation(), "mamba")

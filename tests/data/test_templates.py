"""Chat templates as chat formats: what serves, what is refused, and the families beside them."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastadapt.data.contents import Turn
from fastadapt.data.families import FAMILIES
from fastadapt.data.rendered import Rendered
from fastadapt.data.rendering import get_form, render_prompt
from fastadapt.data.templates.auto_format import choose, resolve
from fastadapt.data.templates.template import Template
from fastadapt.data.tokens import Encoder
from fastadapt.errors import UserError

SYSTEM = Turn("system", "be brief")
ROUNDS = [
    Turn("user", "1 + 1 ?"),
    Turn("assistant", "<think>\nso 2\n</think>\n\nit is 2"),
    Turn("user", "2 + 2 ?"),
    Turn("assistant", "<think>\nso 4\n</think>\n\nit is 4"),
]
EOS = "<|endoftext|>"
TAIL = "{% if add_generation_prompt %}"
#: A template for each family, with its markers: (template, BOS, EOS).
TEMPLATES: dict[str, tuple[str, str, str]] = {
    "qwen": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        + TAIL
        + "<|im_start|>assistant\n{% endif %}",
        "",
        EOS,
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        "\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        + TAIL
        + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "llama2": (
        # As that of meta-llama/Llama-2-7b-chat-hf.
        "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + "
        "'\n<</SYS>>\n\n' %}{% set rounds = messages[1:] %}{% else %}{% set system = '' %}"
        "{% set rounds = messages %}{% endif %}{% for m in rounds %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + ((system if loop.first else '') + m.content).strip() + "
        "' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}"
        "{% endfor %}",
        "<s>",
        "</s>",
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content "
        "+ '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
    ),
    "olmo2": (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}"
        "{% else %}{{ '\n' }}{% endif %}{% endfor %}" + TAIL + "{{ '<|assistant|>\n' }}{% endif %}",
        EOS,
        EOS,
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        + TAIL
        + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "",
        EOS,
    ),
    "glm4": (
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        + TAIL
        + "{{ '<|assistant|>\n' }}{% endif %}",
        "",
        EOS,
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + "
        "('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + "
        "'<end_of_turn>\n' }}{% endfor %}" + TAIL + "{{ '<start_of_turn>model\n' }}{% endif %}",
        "<bos>",
        "<eos>",
    ),
    "gemma4": (
        "{{ bos_token }}{% for m in messages %}{{ '<|turn>' + "
        "('model' if m.role == 'assistant' else m.role) + '\n' + "
        "m.content.split('<channel|>')[-1] | trim + '<turn|>\n' }}{% endfor %}"
        + TAIL
        + "{{ '<|turn>model\n' }}{% endif %}",
        "<bos>",
        "<eos>",
    ),
}
#: Templates that drop the reasoning of earlier turns, or of all, as Qwen3's and R1-Distill's do.
LATEST_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last %}{{ m.content }}{% else %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}{% endif %}<|im_end|>\n{% endfor %}"
    + TAIL
    + "<|im_start|>assistant\n{% endif %}"
)
NO_REASONING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)


def template(name: str) -> Template:
    text, bos, eos = TEMPLATES[name]
    return Template(text, (("bos_token", bos), ("eos_token", eos)))


def tokenizer_with(markers: Any, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(markers))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def written(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.responses()]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("n", [2, 4])
def test_a_family_writes_what_its_template_writes(name: str, n: int) -> None:
    by_template, by_family = template(name).render(ROUNDS[:n]), FAMILIES[name].render(ROUNDS[:n])
    # Phi-3's template closes the whole text with an EOS, which is no part of a turn.
    assert by_template.text == by_family.text + (EOS if name == "phi3" else "")
    expected = written(by_family)
    assert len(expected) == n // 2
    assert all(turn.text in part for turn, part in zip(ROUNDS[1:n:2], expected, strict=True))
    actual = written(by_template)
    actual[-1] = actual[-1].removesuffix(EOS) if name == "phi3" else actual[-1]
    assert actual == expected
    assert by_template.prompt().text == by_family.prompt().text


@pytest.mark.parametrize("name", ["qwen", "llama2", "llama3", "olmo2", "phi3", "gemma4"])
def test_a_system_turn_as_the_template_writes_it(name: str) -> None:
    turns = [SYSTEM, *ROUNDS]
    text = template(name).render(turns).text
    assert text == FAMILIES[name].render(turns).text + (EOS if name == "phi3" else "")


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_a_family_without_a_system_turn_begins_the_question_with_it(name: str) -> None:
    family = FAMILIES[name]
    question = Turn("user", "be brief\n\n1 + 1 ?")
    assert family.render([SYSTEM, *ROUNDS]).text == family.render([question, *ROUNDS[1:]]).text


def test_llama2_writes_a_system_turn_between_its_markers() -> None:
    rendered = FAMILIES["llama2"].render([SYSTEM, *ROUNDS])
    begin = "<s>[INST] <<SYS>>\nbe brief\n<</SYS>>\n\n1 + 1 ? [/INST] <think>\nso 2\n"
    assert rendered.text.startswith(begin)
    said = [(piece.text, piece.role) for piece in rendered.pieces if piece.part == "text"]
    assert said == [(turn.text, turn.role) for turn in [SYSTEM, *ROUNDS]]
    inline = get_form({"user": ["Q:", "|"], "assistant": ["A:", "|"], "system_inside": ["(", ")"]})
    assert inline.render([SYSTEM, *ROUNDS[:1], Turn("assistant", "2")]).text == (
        "Q:(be brief)1 + 1 ?|A:2|"
    )
    assert get_form(inline.spec) == inline


def test_r1_closes_a_response_that_another_turn_follows() -> None:
    text = FAMILIES["r1-distill"].render([SYSTEM, *ROUNDS]).text
    assert text == (
        "<｜begin▁of▁sentence｜>be brief<｜User｜>1 + 1 ?<｜Assistant｜><think>\nso 2\n</think>\n\n"
        "it is 2<｜end▁of▁sentence｜><｜User｜>2 + 2 ?<｜Assistant｜>"
        "<think>\nso 4\n</think>\n\nit is 4"
    )


def test_several_tools_in_a_row() -> None:
    qwen = Template(  # Qwen2.5's and Qwen3's template, without definitions and calls of tools
        "{% for m in messages %}{% if m.role == 'tool' %}"
        "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
        "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
        "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}"
        "{% endif %}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}"
    )
    tools = [Turn("tool", result) for result in ("A", "B", "C")]
    for n in range(1, 4):
        turns = [*ROUNDS[:2], *tools[:n], ROUNDS[3]]
        assert FAMILIES["qwen3"].render(turns).text == qwen.write(turns)
        assert FAMILIES["llama3"].render(turns).text.count("ipython") == n


def test_generation_blocks_give_the_assistants_part() -> None:
    blocks = Template(
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}"
        "\n{% endfor %}"
    )
    expected = [turn.text + "<|end|>" for turn in ROUNDS[1::2]]
    assert written(blocks.render(ROUNDS)) == expected
    empty = Template(blocks.template.replace("{{ m.content }}<|end|>{% endgen", "{% endgen"))
    with pytest.raises(UserError, match="does not write each turn once"):
        empty.render(ROUNDS)


OPENED = [Turn("assistant", "hello"), *ROUNDS]
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nbe kind<|im_end|>\n{% endif %}"
)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("n", [1, 3, 5])
def test_the_assistants_part_of_a_conversation_that_it_opens(name: str, n: int) -> None:
    expected = written(FAMILIES[name].render(OPENED[:n]))
    actual = written(template(name).render(OPENED[:n]))
    actual[-1] = actual[-1].removesuffix(EOS) if name == "phi3" else actual[-1]
    assert actual == expected
    assert len(expected) == n // 2 + 1


def test_a_default_system_turn_is_no_part_of_an_opening() -> None:
    default = Template(DEFAULT_SYSTEM + TEMPLATES["qwen"][0])
    rendered = default.render(OPENED)
    assert rendered.text.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>assistant")
    assert written(rendered)[0] == "hello<|im_end|>\n"
    assert written(rendered)[1:] == written(default.render(ROUNDS))


def test_an_opening_whose_beginning_is_unknown_is_refused() -> None:
    greeting = Template(
        "{% for m in messages %}{% if loop.first and m.role == 'assistant' %}<|greeting|>"
        "{% else %}<|{{ m.role }}|>{% endif %}{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert written(greeting.render(ROUNDS)) == [turn.text + "\n" for turn in ROUNDS[1::2]]
    with pytest.raises(UserError, match="not show where the assistant's part begins"):
        greeting.render(OPENED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ raise_exception('no system turns, please') }}", "fails .* no system turns, please"),
        ("{{ messages[7].content }}", "the chat template fails for turns of roles user, assistant"),
        ("{% for m in messages %}{{ m.content }", "the chat template fails"),
        ("hello", "does not write each turn once, in order"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "once, in order"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not copy every turn"),
        (LATEST_ONLY, "does not copy every turn unchanged"),
        (
            "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}",
            "renders the first 2 turns differently alone than within the whole conversation",
        ),
        (
            "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}"
            "[<think>{% endif %}",
            "renders the first 2 turns differently alone",
        ),
    ],
)
def test_a_template_that_does_not_serve_says_why(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Template(text).render(ROUNDS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_template_may_trim_the_beginning_alone(end: str) -> None:
    text = "{% for m in messages %}<|{{ m.role }}|>{{ m.content.lstrip() }}" + end + "{% endfor %}"
    text += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    turns = [Turn("user", " what\n"), Turn("assistant", " two\n")]
    rendered = Template(text).render(turns)
    assert rendered.text == f"<|user|>what\n{end}<|assistant|>two\n{end}"


def test_a_template_may_trim_some_turns() -> None:
    """Gemma 3's trims all but the system's; Llama 2's the end of the user's first after it."""
    text = (
        "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}"
        "{% endif %}{% for m in rest %}[{{ m.role }}]{{ first if loop.first else '' }}"
        "{{ m.content | trim }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turns = [Turn("system", "be brief\n"), Turn("user", " what \n"), Turn("assistant", "two ")]
    assert Template(text).render(turns).text == "[user]be brief\n\n\nwhat[assistant]two"
    text = text.replace(
        "{{ first if loop.first else '' }}{{ m.content | trim }}", "{{ said | trim }}"
    )
    text = text.replace(
        "[{{ m.role", "{% set said = (first if loop.first else '') + m.content %}[{{ m.role"
    )
    turns += [Turn("user", " more "), Turn("assistant", "three\n")]
    whole = "[user]be brief\n\n\n what[assistant]two[user]more[assistant]three"
    rendered = Template(text).render(turns)
    assert rendered.text == whole
    assert [whole[a:b] for a, b in rendered.responses()] == ["two", "three"]


def test_todays_date_is_none_of_a_text() -> None:
    dated = tokenizer_with([], "{{ strftime_now('%d %b %Y') }} " + TEMPLATES["qwen"][0])
    form = Template.of_tokenizer(dated)
    assert form is not None
    assert form.render(ROUNDS).text.startswith("26 Jul 2024 <|im_start|>user")


# --- auto -----------------------------------------------------------------------------------------


def test_auto_takes_a_template_that_writes_what_was_said() -> None:
    tokenizer = tokenizer_with(FAMILIES["qwen"].markers, TEMPLATES["qwen"][0])
    spec = resolve("auto", tokenizer)
    assert spec == {"template": TEMPLATES["qwen"][0], "tokens": {}}
    again = get_form(yaml.safe_load(yaml.safe_dump(spec)))
    assert again.render(ROUNDS).text == FAMILIES["qwen"].render(ROUNDS).text


@pytest.mark.parametrize(
    ("family", "text"), [("r1-distill", NO_REASONING), ("qwen3", LATEST_ONLY), ("gemma", None)]
)
def test_auto_takes_the_family_where_the_template_loses_reasoning(
    family: str, text: str | None
) -> None:
    tokenizer = tokenizer_with(FAMILIES[family].markers, text)
    assert resolve("auto", tokenizer) == family
    assert all(turn.text in get_form(family).render(ROUNDS).text for turn in ROUNDS)


@pytest.mark.parametrize(
    ("opening", "family"), [("<think>\n", "qwq"), ("", "qwen3"), ("<think>", None)]
)
def test_auto_asks_a_model_as_its_template_does(opening: str, family: str | None) -> None:
    """The templates of QwQ, Qwen3-Thinking-2507 and Qwen 3.5 open the reasoning."""
    end = "<|im_start|>assistant\n{% endif %}"
    text = LATEST_ONLY.replace(end, end.replace("{%", opening + "{%"))
    tokenizer = tokenizer_with(FAMILIES["qwen3"].markers, text)
    spec, template = resolve("auto", tokenizer), Template.of_tokenizer(tokenizer)
    assert template is not None
    assert render_prompt(ROUNDS[0].text, spec) == template.write(ROUNDS[:1], prompt=True)
    assert spec == family or (family is None and isinstance(spec, dict))
    if isinstance(spec, dict):
        assert spec["markers"] == list(FAMILIES["qwen3"].markers)


#: What Gemma 4's template ends a prompt with, to ask for an answer without reasoning.
EMPTY_CHANNEL = "<|channel>thought\n<channel|>"
THOUGHT = [Turn("user", "1 + 1 ?"), Turn("assistant", "<|channel>thought\nso 2\n<channel|>it is 2")]


def gemma4_tokenizer() -> PreTrainedTokenizerFast:
    end = "<|turn>model\n"
    text = TEMPLATES["gemma4"][0].replace(end, end + EMPTY_CHANNEL)
    markers = [*FAMILIES["gemma4"].markers, "<|channel>", "<channel|>", "<|think|>"]
    tokenizer = tokenizer_with(markers, text)
    tokenizer.add_tokens(["thought", "so", "it", "is", "1", "2", "+", "?", "user", "model"])
    tokenizer.bos_token = "<bos>"
    return tokenizer


def test_auto_takes_the_family_of_gemma4() -> None:
    tokenizer = gemma4_tokenizer()
    template = Template.of_tokenizer(tokenizer)
    assert template is not None
    prompt = render_prompt("1 + 1 ?", "gemma4")
    assert template.write(ROUNDS[:1], prompt=True) == prompt + EMPTY_CHANNEL
    assert resolve("auto", tokenizer) == "gemma4"
    assert str(choose(tokenizer).reason).startswith("the chat template renders the first 2 turns")


def test_prompts_of_gemma4_open_the_reasoning_as_the_model_does() -> None:
    """The channel's marker is a token and a word; the token stays one within what was said."""
    tokenizer, form = gemma4_tokenizer(), get_form("gemma4")
    rendered = form.render(THOUGHT)
    opened = render_prompt("1 + 1 ?", "gemma4", "thinking")
    assert opened.endswith("<|turn>model\n<|channel>thought\n")
    assert rendered.text.startswith(opened)
    assert [rendered.text[a:b] for a, b in rendered.reasoning()] == [
        "<|channel>thought\nso 2\n<channel|>"
    ]
    # A question that holds another marker is encoded piece by piece.
    question = form.render([Turn("user", "1 + 1 ? <|think|>"), *THOUGHT[1:]])
    for text, marked in ((rendered, False), (question, True)):
        (encoded,) = Encoder(tokenizer, form).encode([text])
        assert encoded.marked == marked
        tokens = tokenizer.convert_ids_to_tokens(encoded.ids)
        assert tokens[tokens.index("model") + 1 :][:4] == ["<|channel>", "thought", "so", "2"]
        assert "<|think|>" not in tokens


def test_a_marker_of_turns_that_begins_the_end_of_reasoning_stays_text_in_words() -> None:
    markers = ["<|start|>", "<|end|>", "<|channel|>"]
    tokenizer = tokenizer_with(markers, "")
    form = get_form(
        {
            "user": ["<|start|>", "<|end|>"],
            "assistant": ["<|start|>", "<|end|>"],
            "thinking": ["<|channel|>analysis", "<|end|><|start|>final"],
            "markers": markers,
        }
    )
    rendered = form.render([Turn("user", "1 <|end|> 2"), Turn("assistant", "3")])
    (encoded,) = Encoder(tokenizer, form).encode([rendered])
    assert encoded.marked
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert sum(token == end for token in encoded.ids) == 2


UPPER = TEMPLATES["qwen"][0].replace("m.content", "m.content | upper")
FAULTS = {
    "{{ raise_exception('only user allowed') }}": "the chat template fails .*: only user allowed",
    "{% for m in messages %}{{ m.content }": "the chat template fails",
    UPPER: "the chat template does not write the words of the user as they are",
    UPPER.replace(
        "upper", "e"
    ): "the chat template does not write the words of the user as they are",
    "hello": "the chat template does not write the words of the user as they are",
}


@pytest.mark.parametrize("text", FAULTS)
def test_no_family_stands_for_a_template_with_a_fault(text: str) -> None:
    tokenizer = tokenizer_with(FAMILIES["qwen3"].markers, text)
    message = rf"data\.family=auto: {FAULTS[text]}.* Give data\.family qwen3, whose markers this"
    with pytest.raises(UserError, match=message):
        resolve("auto", tokenizer)
    assert resolve("qwen3", tokenizer) == "qwen3"


def test_a_choice_says_why_the_template_does_not_serve() -> None:
    lossy = choose(tokenizer_with(FAMILIES["qwen3"].markers, LATEST_ONLY))
    assert (lossy.spec, lossy.reason is None) == ("qwen3", False)
    assert str(lossy.reason).startswith("the chat template does not copy every turn unchanged")
    assert "set data.family" not in str(lossy.reason)
    assert choose(tokenizer_with(FAMILIES["qwen3"].markers)) == ("qwen3", None)
    assert choose(tokenizer_with(FAMILIES["qwen"].markers, TEMPLATES["qwen"][0])).reason is None


@pytest.mark.parametrize("family", ["llama2", "olmo2"])
def test_markers_that_many_tokenizers_share_name_no_family(family: str) -> None:
    assert resolve("auto", tokenizer_with(FAMILIES[family].markers)) == "text"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LATEST_ONLY, "the chat template does not copy"),
        ("{{ raise_exception('no chats') }}", "the chat template fails for turns .*: no chats"),
    ],
)
def test_auto_without_a_way_lists_the_families(template: str, reason: str) -> None:
    message = rf"data\.family=auto: {reason}.* No family has its markers .*; an inline family"
    message += " .*; or text, for data without conversations"
    with pytest.raises(UserError, match=message):
        resolve("auto", tokenizer_with([], template))


# --- inline families ------------------------------------------------------------------------------

INLINE = """
user: ["<|user|>", "<|end|>"]
assistant: ["<|bot|>", "<|end|>"]
thinking: ["<r>", "</r>"]
bos: "<s>"
markers: ["<|user|>", "<|bot|>", "<|end|>"]
"""


def test_an_inline_family_from_yaml() -> None:
    form = get_form(yaml.safe_load(INLINE))
    turns = [Turn("user", "1 + 1 ?"), Turn("assistant", "<r>so</r> 2")]
    rendered = form.render(turns)
    assert rendered.text == "<s><|user|>1 + 1 ?<|end|><|bot|><r>so</r> 2<|end|>"
    assert [rendered.text[a:b] for a, b in rendered.reasoning()] == ["<r>so</r>"]
    assert get_form(form.spec) == form
    Encoder(tokenizer_with(form.markers), form)
    with pytest.raises(
        UserError, match=r"^data\.family\.markers: .* '<\|user\|>' as one token; corr"
    ):
        Encoder(tokenizer_with([]), form)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": "Q:"}, r"data\.family\.user: expected two texts, \[before, after\], got 'Q:'"),
        ({"assistant": None}, r"data\.family\.assistant: expected two texts"),
        ({"prompt": ["a", "b"]}, r"data\.family: expected keys from user, assistant.* 'prompt'"),
        ({"bos": 1}, r"data\.family\.bos: expected text, got 1"),
        ({"markers": "<s>"}, r"data\.family\.markers: expected a list of non-empty texts"),
        ({"template": 1}, r"data\.family: expected keys from template, tokens, thinking"),
    ],
)
def test_an_impossible_inline_family(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_form({**yaml.safe_load(INLINE), **changes})

"""Conversations as the text that a model was trained on.

The chat templates of the model families are not used here: the one of R1-Distill drops all text
before ``</think>`` from the assistant's turns (the reasoning, which is what is studied), its
generation prompt already ends in ``<think>\\n``, and tokenising its output adds a second BOS. The
text is put together here instead, BOS included, and is to be tokenised with
``add_special_tokens=False`` (arXiv 2602.20904 and the code released with it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastadapt.errors import UserError

THINK, END_THINK = "<think>", "</think>"

_USER_NAMES = frozenset({"user", "human"})
_ASSISTANT_NAMES = frozenset({"assistant", "gpt", "model"})


@dataclass(frozen=True)
class Family:
    """What surrounds prompt and response in the training text of a family of models.

    Attributes:
        before_prompt: text in front of the prompt.
        before_response: text between prompt and response.
        after_response: text that ends the sequence.
        markers: the special strings within; each must be one token of the pair's tokenizer.
        bos: the one of them, if any, that ``before_prompt`` begins with to say that a text begins.
    """

    before_prompt: str
    before_response: str
    after_response: str
    markers: tuple[str, ...]
    bos: str = ""


FAMILIES: Mapping[str, Family] = {
    # The bars are U+FF5C and the low lines U+2581: the ASCII look-alikes are not special tokens.
    # No EOS ends the text.
    "r1-distill": Family(
        before_prompt="<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>",
        before_response="<\uff5cAssistant\uff5c>",
        after_response="",
        markers=(
            "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
            "<\uff5cUser\uff5c>",
            "<\uff5cAssistant\uff5c>",
        ),
        bos="<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    ),
    # Qwen2.5, Qwen3 and QwQ. No system turn, which some of their templates put in front.
    "qwen": Family(
        before_prompt="<|im_start|>user\n",
        before_response="<|im_end|>\n<|im_start|>assistant\n",
        after_response="<|im_end|>\n",
        markers=("<|im_start|>", "<|im_end|>"),
    ),
    # llama.com/docs/model-cards-and-prompt-formats/meta-llama-3
    "llama3": Family(
        before_prompt="<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        before_response="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        after_response="<|eot_id|>",
        markers=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
    ),
    # Gemma 1 to 3: ai.google.dev/gemma/docs/formatting; the BOS is their tokenizers'.
    "gemma": Family(
        before_prompt="<bos><start_of_turn>user\n",
        before_response="<end_of_turn>\n<start_of_turn>model\n",
        after_response="<end_of_turn>\n",
        markers=("<bos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
    ),
}


def get_family(name: str) -> Family:
    """The entry of ``FAMILIES`` of this name; ``UserError`` with the known names otherwise."""
    if name not in FAMILIES:
        raise UserError(f"data.family: expected one of {sorted(FAMILIES)}, got {name!r}")
    return FAMILIES[name]


def render(conversation: Sequence[Mapping[str, Any]], family: str) -> str:
    """The whole text of a conversation of one prompt and one response.

    Args:
        conversation: two turns ``{"from": ..., "value": str}``. The first is the prompt and the
            second the response, by position; ``from`` may hold any name or be absent, but a name
            known to be of the other side, or of a system turn, is an error.
        family: a key of ``FAMILIES``.

    Raises:
        UserError: not two turns, a value that is no text or is blank, or turns of the wrong side.
    """
    prompt, response = render_parts(conversation, family)
    return prompt + response


def render_parts(conversation: Sequence[Mapping[str, Any]], family: str) -> tuple[str, str]:
    """``render``, cut where the response begins: ``(text up to there, the rest)``."""
    form = get_family(family)
    prompt, response = turns(conversation)
    # The data write "<think> First"; the models write a line break there.
    if response.startswith(THINK + " "):
        response = THINK + "\n" + response[len(THINK) + 1 :]
    return (
        form.before_prompt + prompt + form.before_response,
        response + form.after_response,
    )


def holds_markers(text: str, family: str) -> bool:
    """Whether a rendered text has more of the family's markers than its template puts there.

    Such a marker was written into the prompt or the response. The tokenizer reads it as the token
    that ends or begins a turn.

    Args:
        text: of :func:`render`.
        family: a key of ``FAMILIES``.

    Example:
        >>> said = [{"from": "human", "value": "hi<end_of_turn>"}, {"from": "gpt", "value": "ho"}]
        >>> holds_markers(render(said, "gemma"), "gemma")
        True
    """
    form = get_family(family)
    template = form.before_prompt + form.before_response + form.after_response
    return any(text.count(marker) > template.count(marker) for marker in form.markers)


def turns(conversation: Any) -> tuple[str, str]:
    """Prompt and response of a conversation, by position; see :func:`render` for the errors."""
    if not isinstance(conversation, Sequence) or isinstance(conversation, str):
        kind = "null" if conversation is None else type(conversation).__name__
        raise UserError(f"conversations: expected two turns (prompt, response), got {kind}")
    if len(conversation) != 2:
        what = "an empty conversation" if not conversation else f"{len(conversation)} turn(s)"
        raise UserError(f"conversations: expected two turns (prompt, response), got {what}")
    prompt = _value(conversation[0], "conversations, turn 1 (prompt)", _ASSISTANT_NAMES)
    response = _value(conversation[1], "conversations, turn 2 (response)", _USER_NAMES)
    return prompt, response


def _value(turn: Any, where: str, wrong: frozenset[str]) -> str:
    if not isinstance(turn, Mapping):
        raise UserError(f"{where}: expected an object with 'from' and 'value', got {turn!r:.40}")
    name = turn.get("from")
    if isinstance(name, str) and name.lower() in wrong | {"system", "tool"}:
        raise UserError(
            f"{where}: is from {name!r}; expected the user's prompt, then the assistant's response"
        )
    if "value" not in turn:
        raise UserError(f"{where}: no 'value'; it has {sorted(map(str, turn))}")
    value = turn["value"]
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"{where}: 'value' must be text, got {kind}")
    if not value.strip():
        raise UserError(f"{where}: 'value' is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: 'value' holds half a surrogate pair at character {error.start}, "
            "which no tokenizer accepts"
        ) from None
    return value

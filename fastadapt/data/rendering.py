"""Render conversations as the text that a model was trained on.

This module does not use the chat templates of the models. R1-Distill's template drops the reasoning
before ``</think>`` from the assistant's turns, and its generation prompt already ends in
``<think>\\n``. Tokenizing its output adds a second BOS. :func:`render` writes the text itself, with
BOS, to be tokenized with ``add_special_tokens=False`` (arXiv 2602.20904 and its released code).
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
    """Template of the training text of a family of models.

    Attributes:
        before_prompt: text before the prompt.
        before_response: text between prompt and response.
        after_response: text that ends the sequence.
        markers: special strings of the template. Each must be one token of the pair's tokenizer.
        bos: the BOS marker with which ``before_prompt`` begins, or an empty string.
    """

    before_prompt: str
    before_response: str
    after_response: str
    markers: tuple[str, ...]
    bos: str = ""


FAMILIES: Mapping[str, Family] = {
    # The special tokens contain U+FF5C and U+2581, not the ASCII characters | and _. The text does
    # not end in EOS.
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
    # Qwen2.5, Qwen3 and QwQ, without the system turn that some of their templates add.
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
    # Gemma 1 to 3: ai.google.dev/gemma/docs/formatting. Their tokenizers add the BOS.
    "gemma": Family(
        before_prompt="<bos><start_of_turn>user\n",
        before_response="<end_of_turn>\n<start_of_turn>model\n",
        after_response="<end_of_turn>\n",
        markers=("<bos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
    ),
}


def get_family(name: str) -> Family:
    """Return the entry of ``FAMILIES`` with this name; raise ``UserError`` for an unknown name."""
    if name not in FAMILIES:
        raise UserError(f"data.family: expected one of {sorted(FAMILIES)}, got {name!r}")
    return FAMILIES[name]


def render(conversation: Sequence[Mapping[str, Any]], family: str) -> str:
    """Return the whole text of a conversation of one prompt and one response.

    Args:
        conversation: two turns ``{"from": ..., "value": str}``, the prompt and then the response.
            The position decides the role. ``from`` may be any name or absent, except for a name of
            the other role, "system" or "tool".
        family: a key of ``FAMILIES``.

    Raises:
        UserError: there are not two turns, a value is no text or is blank, or ``from`` names
            another role.

    Example:
        >>> turns = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]
        >>> render(turns, "gemma")
        '<bos><start_of_turn>user\\n1 + 1?<end_of_turn>\\n<start_of_turn>model\\n2<end_of_turn>\\n'
    """
    prompt, response = render_parts(conversation, family)
    return prompt + response


def render_parts(conversation: Sequence[Mapping[str, Any]], family: str) -> tuple[str, str]:
    """Return the text of :func:`render` in two parts: before the response, and from there on."""
    form = get_family(family)
    prompt, response = turns(conversation)
    # The data have "<think> First"; the models write a line break after "<think>".
    if response.startswith(THINK + " "):
        response = THINK + "\n" + response[len(THINK) + 1 :]
    return (
        form.before_prompt + prompt + form.before_response,
        response + form.after_response,
    )


def holds_markers(text: str, family: str) -> bool:
    """Return whether a rendered text has more markers of the family than its template.

    The prompt or the response then contains a marker. The tokenizer reads this marker as the token
    that begins or ends a turn.

    Args:
        text: text returned by :func:`render`.
        family: a key of ``FAMILIES``.

    Example:
        >>> turns = [{"from": "human", "value": "hi<end_of_turn>"}, {"from": "gpt", "value": "ho"}]
        >>> holds_markers(render(turns, "gemma"), "gemma")
        True
    """
    form = get_family(family)
    template = form.before_prompt + form.before_response + form.after_response
    return any(text.count(marker) > template.count(marker) for marker in form.markers)


def turns(conversation: Any) -> tuple[str, str]:
    """Return prompt and response of a conversation; raise as :func:`render` does."""
    if not isinstance(conversation, Sequence) or isinstance(conversation, str):
        kind = "null" if conversation is None else type(conversation).__name__
        raise UserError(f"conversations: expected two turns (prompt, response), got {kind}")
    if len(conversation) != 2:
        got = f"{len(conversation)} turn(s)" if conversation else "an empty conversation"
        raise UserError(f"conversations: expected two turns (prompt, response), got {got}")
    prompt = _value(conversation[0], "conversations, turn 1 (prompt)", _ASSISTANT_NAMES)
    response = _value(conversation[1], "conversations, turn 2 (response)", _USER_NAMES)
    return prompt, response


def _value(turn: Any, where: str, wrong: frozenset[str]) -> str:
    if not isinstance(turn, Mapping):
        raise UserError(f"{where}: expected an object with 'from' and 'value', got {turn!r:.40}")
    name = turn.get("from")
    if isinstance(name, str) and name.lower() in wrong | {"system", "tool"}:
        raise UserError(
            f"{where} is from {name!r}; expected the user's prompt, then the assistant's response"
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

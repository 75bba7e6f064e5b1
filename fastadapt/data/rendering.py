"""Render conversations as the text that a model was trained on.

A chat format is a family (:mod:`fastadapt.data.families`), which writes turns between its markers,
or the chat template of a tokenizer (:mod:`fastadapt.data.templates.template`). A template does not
serve where it changes what was said. R1-Distill's template drops the reasoning before
``</think>`` from the assistant's turns, and its generation prompt already ends in ``<think>\\n``.
The text is written with its BOS, to be tokenized with ``add_special_tokens=False`` (arXiv
2602.20904 and its released code).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from fastadapt.data.contents import Turn, read_turns
from fastadapt.data.families import FAMILIES, get_family, inline_family
from fastadapt.data.rendered import (
    END_THINK,
    TEXT_ONLY,
    THINK,
    Form,
    Prefill,
    Rendered,
    Spec,
)
from fastadapt.data.templates.template import Template
from fastadapt.errors import UserError, require


@dataclass(frozen=True)
class TextOnly:
    """Chat format of data without conversations: rendering a conversation raises an error."""

    spec: Spec = TEXT_ONLY
    markers: tuple[str, ...] = ()
    thinking: tuple[str, str] = (THINK, END_THINK)
    opening: str = ""

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """Raise ``UserError``: conversations need a family."""
        raise UserError(
            f"data.family is {TEXT_ONLY!r}, for plain text and token ids, but the data hold "
            f"conversations; set data.family to one of {sorted(FAMILIES)}, or to an inline family"
        )


def get_form(spec: Spec) -> Form:
    """Return the chat format that a name, an inline family or a recorded template stands for.

    Args:
        spec: a key of ``FAMILIES``; "text"; a mapping with the attributes of
            :class:`~fastadapt.data.families.Family`; or a mapping with ``template``
            (:class:`fastadapt.data.templates.template.Template`).

    Raises:
        UserError: an unknown name, or a mapping with an unknown key or an impossible value.

    Example:
        >>> get_form({"user": ["Q: ", "\\n"], "assistant": ["A:", "\\n"], "lead": " "}).render(
        ...     [Turn("user", "1 + 1?"), Turn("assistant", "2")]
        ... ).text
        'Q: 1 + 1?\\nA: 2\\n'
    """
    if spec == TEXT_ONLY:
        return TextOnly()
    if isinstance(spec, Mapping):
        if "template" in spec:
            return Template.from_spec(spec)
        return inline_family(spec)
    return get_family(spec)


# --- prompts --------------------------------------------------------------------------------------


def opening_of(form: Form, prefill: Prefill | None) -> str:
    """Return the text with which prompts open the assistant's turn.

    Args:
        form: the chat format.
        prefill: ``thinking``: the marker of reasoning and a line break; ``none``: no text, so that
            the model itself decides whether to reason; None: as the form's own template does.

    Raises:
        UserError: another value, or ``thinking`` for a form without a marker of reasoning.

    Example:
        >>> opening_of(get_form("r1-distill"), None), opening_of(get_form("qwen"), None)
        ('<think>\\n', '')
        >>> opening_of(get_form("r1-distill"), "none"), opening_of(get_form("qwen"), "thinking")
        ('', '<think>\\n')
    """
    if prefill is None:
        return form.opening
    if prefill == "none":
        return ""
    require(prefill == "thinking", "prefill", " or ".join(get_args(Prefill)), prefill)
    if not form.thinking[0]:
        raise UserError(
            "prefill: expected none, since the chat format has no marker that opens reasoning "
            "(data.family.thinking), got thinking"
        )
    return form.opening or f"{form.thinking[0]}\n"


def render_prompt(prompt: str, family: Spec, prefill: Prefill | None = None) -> str:
    """Return the text of a user's prompt, from which a model goes on.

    Args:
        prompt: the user's text.
        family: see :func:`get_form`.
        prefill: see :func:`opening_of`.

    Raises:
        UserError: the prompt is blank, or see :func:`opening_of`.

    Example:
        >>> render_prompt("1 + 1?", "qwq")
        '<|im_start|>user\\n1 + 1?<|im_end|>\\n<|im_start|>assistant\\n<think>\\n'
    """
    return prompt_pieces(prompt, family, prefill).text


def prompt_pieces(prompt: str, family: Spec, prefill: Prefill | None = None) -> Rendered:
    """Return the text of :func:`render_prompt` in pieces, which say what the user wrote."""
    form = get_form(family)
    user, reply = turns([{"from": "user", "value": prompt}, {"from": "assistant", "value": "?"}])
    rendered = form.render([Turn("user", user), Turn("assistant", reply)])
    return rendered.prompt(opening_of(form, prefill))


# --- conversations of two turns -------------------------------------------------------------------


def render(conversation: Sequence[Mapping[str, Any]], family: Spec) -> str:
    """Return the whole text of a conversation of one prompt and one response.

    Args:
        conversation: two turns ``{"from": ..., "value": str}``, the prompt and then the response.
            The position decides the role. ``from`` may be any name or absent, except for a name of
            the other role, "system" or "tool".
        family: see :func:`get_form`.

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


def render_parts(conversation: Sequence[Mapping[str, Any]], family: Spec) -> tuple[str, str]:
    """Return the text of :func:`render` in two parts: before the response, and from there on."""
    form = get_form(family)
    prompt, response = turns(conversation)
    rendered = form.render([Turn("user", prompt), Turn("assistant", response)])
    before = rendered.prompt().text
    return before, rendered.text[len(before) :]


def turns(conversation: Any) -> tuple[str, str]:
    """Return prompt and response of a conversation; raise as :func:`render` does."""
    said = read_turns(conversation)
    if [turn.role for turn in said] != ["user", "assistant"]:
        raise UserError(
            "conversations: expected a user turn, then an assistant turn; got the roles "
            + ", ".join(turn.role for turn in said[:4])
            + ", ..." * (len(said) > 4)
        )
    return said[0].text, said[1].text

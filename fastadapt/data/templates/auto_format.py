"""Choose the chat format of a tokenizer: its own template, or the family whose markers it knows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from fastadapt.data.contents import Turn
from fastadapt.data.families import FAMILIES, Family
from fastadapt.data.rendered import AUTO, TEXT_ONLY, Spec
from fastadapt.data.templates.template import Template
from fastadapt.data.tokens import is_one_token
from fastadapt.errors import UserError


class Choice(NamedTuple):
    """The chat format for which "auto" stands.

    Attributes:
        spec: the format.
        reason: why the tokenizer's chat template does not serve; None if it does, or if the
            tokenizer has none.
    """

    spec: Spec
    reason: str | None = None


def resolve(spec: Spec, tokenizer: Any) -> Spec:
    """Return the chat format of a tokenizer for "auto", or ``spec`` itself for anything else.

    Raises:
        UserError: see :func:`choose`.
    """
    return choose(tokenizer).spec if spec == AUTO else spec


def choose(tokenizer: Any) -> Choice:
    """Choose the chat format for which "auto" stands.

    The tokenizer's chat template is taken if it writes the words of the user and of an assistant
    that reasons as they are, in one and in two rounds. If it loses the reasoning, or does not show
    which part the assistant writes, the family of ``FAMILIES`` is taken whose markers are tokens of
    the tokenizer, with the text with which the template opens the reasoning when it asks a model.
    Without a template and without such a family, the form is "text", for data without
    conversations.

    Raises:
        UserError: the template cannot be used, and no family fits; or it fails or changes words
            besides reasoning, so that no family writes what it should write.
    """
    template, name = Template.of_tokenizer(tokenizer), family_of(tokenizer)
    if template is None:
        if not getattr(tokenizer, "chat_template", None) or name is None:
            return Choice(name or TEXT_ONLY)
        return Choice(name, "the tokenizer has several chat templates and no default")
    if (reason := _refusal(template)) is None:
        return Choice(template.spec)
    fault = _fault(template)
    if name is not None:
        spec = _with_opening(FAMILIES[name], template)
        if fault is None:
            return Choice(spec, reason)
        known = spec if isinstance(spec, str) else name
        raise UserError(
            f"data.family=auto: {fault}. Give data.family {known}, whose markers this tokenizer "
            "has, if it is the format of this model, or text for data without conversations"
        )
    raise UserError(
        f"data.family=auto: {fault or reason}. No family has its markers in this tokenizer either; "
        f"expected one of {sorted(FAMILIES)}; an inline family with the texts before and after "
        f"each turn; or {TEXT_ONLY}, for data without conversations"
    )


def family_of(tokenizer: Any) -> str | None:
    """Return the family with the most markers, if all are tokens of the tokenizer; else None.

    A family is recognised only by tokens around its turns. BOS and EOS alone, which many
    tokenizers share, are not enough.
    """
    known = [
        family
        for family in FAMILIES.values()
        if any(marker in family.before_response for marker in family.markers)
        and all(is_one_token(tokenizer, marker) for marker in family.markers)
    ]
    return max(known, key=lambda family: len(family.markers)).name if known else None


def _with_opening(family: Family, template: Template) -> Spec:
    """Return the family that opens the reasoning as a template does when it asks a model."""
    try:
        prompt = template.write([Turn("user", "a question")], prompt=True)
    except UserError:
        return family.spec
    _, marker, opening = prompt.rpartition(family.before_response)
    opens, closes = (text in opening for text in family.thinking)
    if not marker or not opens or closes:
        return family.spec
    wanted = replace(family, opening=opening)
    for other in (family, *FAMILIES.values()):
        if replace(wanted, name=other.name, markers=other.markers) == other:
            return other.spec
    return replace(wanted, name="").spec


def _refusal(template: Template) -> str | None:
    """Return why a chat template cannot be used, or None if it can."""
    opening, closing = template.thinking
    rounds = [
        Turn("user", "a question"),
        Turn("assistant", f"{opening}\nsome thoughts\n{closing}\n\nan answer"),
        Turn("user", "another question"),
        Turn("assistant", f"{opening}\nmore thoughts\n{closing}\n\nanother answer"),
    ]
    for turns in (rounds[:2], rounds):
        try:
            template.render(turns)
        except UserError as error:
            return _without_hint(error)
    return None


def _fault(template: Template) -> str | None:
    """Return why a chat template fails for conversations without reasoning, or None.

    The template fails, or does not write every turn's words once and in order.
    """
    rounds = [
        Turn("user", "A question: 1 < 2?"),
        Turn("assistant", "An answer: 'yes' & \"so\""),
        Turn("user", "Another one: x_1 > 2?"),
        Turn("assistant", "It's \u00e9, not E."),
    ]
    for turns in (rounds[:2], rounds):
        try:
            text = template.write(turns)
        except UserError as error:
            return _without_hint(error)
        for turn in turns:
            _, words, text = text.partition(turn.text)
            if not words:
                return f"the chat template does not write the words of the {turn.role} as they are"
    return None


def _without_hint(error: UserError) -> str:
    return str(error).partition("; set data.family")[0]

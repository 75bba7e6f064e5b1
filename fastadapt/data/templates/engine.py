"""Run the chat template of a tokenizer in the sandbox of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastadapt.data.contents import Turn
from fastadapt.errors import UserError


def run_template(
    template: str,
    turns: Sequence[Turn],
    tokens: Mapping[str, str],
    *,
    prompt: bool = False,
    spans: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text that a template writes, and the character spans of its generation blocks.

    Args:
        template: Jinja text.
        turns: the conversation.
        tokens: special tokens that the template names, such as ``bos_token``.
        prompt: end the text where a model is asked to go on.
        spans: find the spans; without, none are returned.

    Raises:
        UserError: the template cannot be read, or raises an error.

    Example:
        >>> run_template("{% for m in messages %}[{{ m.content }}]{% endfor %}",
        ...              [Turn("user", "1 + 1?")], {})
        ('[1 + 1?]', [])
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        render: Any = render_jinja_template
        texts, blocks = render(
            conversations=[messages],
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=spans,
            **tokens,
        )
    # A template is a program: it may raise any error of Python.
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise _failed(turns, error) from None
    except (AttributeError, RecursionError, OverflowError, MemoryError) as error:
        raise _failed(turns, error) from None
    return texts[0], blocks[0] if spans else []


def _failed(turns: Sequence[Turn], error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    roles = ", ".join(turn.role for turn in turns)
    return UserError(f"the chat template fails for turns of roles {roles}: {reason:.200}")

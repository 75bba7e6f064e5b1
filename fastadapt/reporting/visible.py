"""Text of models and data sets, shown so that no character acts on a terminal or a page."""

from __future__ import annotations

import unicodedata


def visible(text: str) -> str:
    """Return a text on one line that a terminal shows as it is: no character is invisible.

    Line breaks and tabs become symbols. Other control characters, and characters that are invisible
    or change the order of the text around them, become their code points.

    Example:
        >>> visible("a\\nb\\x1b[2J\\u202e")
        'a↵b⟨U+001B⟩[2J⟨U+202E⟩'
    """
    return "".join(_SYMBOLS.get(c) or _code_point(c) for c in text)


def visible_lines(text: str) -> str:
    """Return a text whose lines are :func:`visible`, with its line breaks.

    Example:
        >>> visible_lines("a\\tb\\nc")
        'a⇥b\\nc'
    """
    return "\n".join(map(visible, text.split("\n")))


_SYMBOLS = {"\n": "↵", "\r": "␍", "\t": "⇥"}
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})  # categories of Unicode


def _code_point(character: str) -> str:
    hidden = unicodedata.category(character) in _HIDDEN
    return f"⟨U+{ord(character):04X}⟩" if hidden else character


def token_text(token: str) -> str:
    """Return a token's text, visible, with symbols for spaces at its ends.

    Example:
        >>> token_text(" wait")
        '␣wait'
    """
    text = visible(token)
    left, right = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    inner = text.strip(" ")
    return "␣" * left + inner + "␣" * right if inner else "␣" * len(text)

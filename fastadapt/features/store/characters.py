"""Text of tokens that hold part of a character.

A byte-level vocabulary splits characters of several bytes over tokens. The text of such a token
shows the bytes that are no whole character in hexadecimal, as in ``⟨E4 BD⟩``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

_SHOWN = re.compile("⟨((?:[0-9A-F]{2} )*[0-9A-F]{2})⟩")
_FALLBACK = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's name of a byte
_MOST = 16  # tokens that may share characters


def show_bytes(raw: bytes) -> str:
    """Return bytes as text, with bytes that are not part of a character in hexadecimal.

    Example:
        >>> show_bytes(b" a\\xe4\\xbd")
        ' a⟨E4 BD⟩'
    """
    text = raw.decode("utf-8", "surrogateescape")
    return re.sub(
        "[\udc80-\udcff]+",
        lambda match: f"⟨{match[0].encode('utf-8', 'surrogateescape').hex(' ').upper()}⟩",
        text,
    )


def token_bytes(name: str, decoded: str) -> bytes | None:
    """Return the bytes of a token of a byte-level vocabulary; None if they are not known.

    Args:
        name: the token's name in the vocabulary.
        decoded: the token's text, with U+FFFD for broken characters; the bytes must agree with it.
    """
    if match := _FALLBACK.fullmatch(name):
        return bytes.fromhex(match[1])
    table = _byte_of_letter()
    if not all(letter in table for letter in name):
        return None
    raw = bytes(table[letter] for letter in name)
    return raw if raw.decode("utf-8", "replace").lstrip() == decoded.lstrip() else None


@cache
def _byte_of_letter() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def join_characters(strings: Sequence[str]) -> list[tuple[str, int]]:
    """Join tokens that share a character; return pieces of text with their numbers of tokens.

    Args:
        strings: texts of consecutive tokens.

    Example:
        >>> join_characters([" so", "⟨E4⟩", "⟨BD A0⟩", "⟨E5⟩", "."])
        [(' so', 1), ('你', 2), ('⟨E5⟩', 1), ('.', 1)]
    """
    pieces, place = [], 0
    while place < len(strings):
        piece = strings[place], 1
        raw = b""
        for n, string in enumerate(strings[place : place + _MOST], start=1):
            if not _SHOWN.search(string):
                break
            raw += _bytes_of(string)
            try:
                piece = raw.decode(), n
            except UnicodeDecodeError:
                continue
            break
        pieces.append(piece)
        place += piece[1]
    return pieces


def _bytes_of(string: str) -> bytes:
    parts: list[Any] = _SHOWN.split(string)  # text and bytes in turn
    parts[::2] = [part.encode() for part in parts[::2]]
    parts[1::2] = [bytes.fromhex(part) for part in parts[1::2]]
    return b"".join(parts)

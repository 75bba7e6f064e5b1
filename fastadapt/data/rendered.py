"""A conversation rendered as text, in pieces of which each has a known role."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from fastadapt.data.contents import Role, Turn

THINK, END_THINK = "<think>", "</think>"
#: Family of data without conversations: plain text and token ids.
TEXT_ONLY = "text"
#: ``data.family`` of a tokenizer's chat format, see :mod:`fastadapt.data.templates.auto_format`.
AUTO = "auto"

Spec = str | dict[str, Any]
"""A chat format as in a configuration: a name, or a mapping of an inline family or template."""

Part = Literal["bos", "marker", "text", "end"]

Prefill = Literal["thinking", "none"]
"""Whether prompts open the assistant's reasoning; None in its place: as the form's own template."""


class Piece(NamedTuple):
    """A piece of a rendered text.

    Attributes:
        text: its characters.
        part: "bos"; "marker", template text that the model reads; "text", what was said in a turn;
            "end", template text that the assistant writes itself, before or after its words.
        role: role of the turn; None for text that belongs to no turn.
    """

    text: str
    part: Part
    role: Role | None


class Reasoning(NamedTuple):
    """Reasoning in a response, as positions of characters.

    Attributes:
        begin: after the opening marker; 0 if the response has none.
        end: before the closing marker, or the length of the response.
        after: after the closing marker, or the length of the response.
    """

    begin: int
    end: int
    after: int


def find_reasoning(response: str, thinking: tuple[str, str]) -> Reasoning | None:
    """Return where a response reasons; None if it does not.

    If the response begins with the opening marker, its reasoning begins there. Otherwise its
    reasoning begins with the response if the closing marker follows. It ends with the first closing
    marker, or with the response.

    Args:
        response: text of the response.
        thinking: opening and closing marker; empty without.

    Example:
        >>> find_reasoning("<think>so</think>4", ("<think>", "</think>"))
        Reasoning(begin=7, end=9, after=17)
        >>> find_reasoning("it is 4", ("<think>", "</think>")) is None
        True
    """
    opening, closing = thinking
    blank = len(response) - len(response.lstrip())
    opens = bool(opening) and response.startswith(opening, blank)
    begin = blank + len(opening) if opens else 0
    close = response.find(closing, begin) if closing else -1
    if close >= 0:
        return Reasoning(begin, close, close + len(closing))
    return Reasoning(begin, len(response), len(response)) if opens else None


@dataclass(frozen=True)
class Rendered:
    """A conversation rendered as text, in pieces of which each has a known role.

    Attributes:
        pieces: the text in consecutive pieces.
        thinking: markers around the assistant's reasoning.
    """

    pieces: tuple[Piece, ...]
    thinking: tuple[str, str] = (THINK, END_THINK)

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(piece.text for piece in self.pieces)

    def spans(self) -> Iterator[tuple[Piece, int, int]]:
        """Yield each piece with the positions of its first character and after its last."""
        start = 0
        for piece in self.pieces:
            yield piece, start, start + len(piece.text)
            start += len(piece.text)

    def responses(self) -> list[tuple[int, int]]:
        """Return the character spans that the assistant writes, a span per turn."""
        spans: list[tuple[int, int]] = []
        for piece, start, end in self.spans():
            if piece.role != "assistant" or piece.part not in ("text", "end"):
                continue
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, end))
        return [(start, end) for start, end in spans if end > start]

    def reasoning(self) -> list[tuple[int, int]]:
        """Return the character spans of the assistant's reasoning, its markers included."""
        return [
            (start, start + reasoning.after)
            for piece, start, _ in self.spans()
            if piece.role == "assistant"
            and piece.part == "text"
            and (reasoning := find_reasoning(piece.text, self.thinking)) is not None
        ]

    def prompt(self, opening: str = "") -> Rendered:
        """Return the pieces before the assistant's last response, from which a model goes on.

        Args:
            opening: text that begins the response, after what the template has there; see
                :func:`fastadapt.data.rendering.opening_of`.
        """
        begin = self.responses()[-1][0]
        before = [piece for piece, start, _ in self.spans() if start < begin]
        if opening:
            lead = "".join(
                p.text for p, start, _ in self.spans() if start == begin and p.part == "end"
            )
            text = opening if opening.startswith(lead) else lead + opening
            before.append(Piece(text, "end", "assistant"))
        return Rendered(tuple(before), self.thinking)


class Form(Protocol):
    """Chat format: writes the turns of a conversation as one text.

    Attributes:
        spec: name or mapping from which ``rendering.get_form`` makes this form again.
        markers: special strings that each must be one token of the pair's tokenizer.
        thinking: markers around the assistant's reasoning.
        opening: text with which the form's own template opens the assistant's turn when a model is
            asked; empty if the model begins its turn.
    """

    @property
    def spec(self) -> Spec: ...
    @property
    def markers(self) -> tuple[str, ...]: ...
    @property
    def thinking(self) -> tuple[str, str]: ...
    @property
    def opening(self) -> str: ...

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """Return the text of a conversation; raise ``UserError`` for turns it cannot write."""

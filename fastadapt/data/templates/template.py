"""Render conversations with the chat template of a tokenizer.

A template is a program, so its text is taken apart by rendering: each turn's words are replaced by
a placeholder, which shows the template's own text around every turn. The words are put back, and
the result must equal what the template writes for them. A template that drops, rewrites or moves
what was said is refused; white space at the ends of a turn may be removed.

The assistant's part of a turn is what a ``{% generation %}`` block holds. Without such a block it
begins where the prompt of a generation ends and ends where a rendering that stops at this turn
ends; both must agree with the rendering of the whole conversation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any

from fastadapt.data.contents import Role, Turn
from fastadapt.data.rendered import END_THINK, THINK, Part, Piece, Rendered, Spec
from fastadapt.data.templates.engine import run_template
from fastadapt.errors import UserError

#: Text of a placeholder: private characters, which no data set and no template holds.
_PLACEHOLDER = "\ue0f0{}\ue0f1"
_PLACED = re.compile("(\ue0f0\\d+\ue0f1)")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: Templates that write today's date would give other tokens tomorrow, so the date is fixed.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}"
    "{%- if format == '%Y-%m-%d' -%}2024-07-26{%- else -%}26 Jul 2024{%- endif -%}"
    "{%- endmacro -%}"
)


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template as a chat format.

    Attributes:
        template: Jinja text.
        tokens: special tokens that the template names, such as ``bos_token``.
        thinking: markers around the assistant's reasoning.
        frames: the template's own text, by roles of turns, as far as it is known.
    """

    template: str
    tokens: tuple[tuple[str, str], ...] = ()
    thinking: tuple[str, str] = (THINK, END_THINK)
    frames: dict[tuple[Role, ...], tuple[Piece, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Template:
        """Build a template from a mapping as :attr:`spec` returns it.

        Raises:
            UserError: an unknown key, or a value of another type.
        """
        for key in spec:
            if key not in ("template", "tokens", "thinking"):
                known = "template, tokens, thinking"
                raise UserError(f"data.family: expected keys from {known}; got {key!r}")
        template, tokens = spec["template"], spec.get("tokens", {})
        thinking = spec.get("thinking", (THINK, END_THINK))
        if not isinstance(template, str):
            raise UserError(f"data.family.template: expected text, got {template!r:.60}")
        if not isinstance(tokens, Mapping) or not _are_texts([*tokens, *tokens.values()]):
            raise UserError(f"data.family.tokens: expected names with texts, got {tokens!r:.60}")
        if isinstance(thinking, str) or not _are_texts(thinking) or len(thinking) != 2:
            raise UserError(f"data.family.thinking: expected two texts, got {thinking!r:.60}")
        return cls(template, tuple(tokens.items()), (thinking[0], thinking[1]))

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> Template | None:
        """Return the template of a tokenizer, with a fixed date; None if it has none."""
        if not getattr(tokenizer, "chat_template", None):
            return None
        try:
            template = tokenizer.get_chat_template()
        except ValueError:  # several templates, none of which is the default
            return None
        if "strftime_now" in template:
            template = _FIXED_DATE + template
        named = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
        return cls(template, tuple((key, t) for key, t in named.items() if key in template))

    @property
    def spec(self) -> Spec:
        """Mapping from which :meth:`from_spec` makes this template again."""
        spec: dict[str, Any] = {"template": self.template, "tokens": dict(self.tokens)}
        if self.thinking != (THINK, END_THINK):
            spec["thinking"] = list(self.thinking)
        return spec

    @property
    def markers(self) -> tuple[str, ...]:
        """Empty, since a template's markers are special tokens of the tokenizer already."""
        return ()

    @cached_property
    def opening(self) -> str:
        """Text after the assistant's marker with which the template asks a model to go on."""
        user, assistant = Turn("user", _PLACEHOLDER.format(0)), Turn("assistant", "?")
        before = self.render([user, assistant]).prompt().text
        wanted = self.write([user], prompt=True)
        return wanted.removeprefix(before) if wanted.startswith(before) else ""

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """Return the text of a conversation.

        Raises:
            UserError: the template fails, changes what was said, or does not show which part of
                its text the assistant writes.
        """
        roles = tuple(turn.role for turn in turns)
        if roles not in self.frames:
            self.frames[roles] = self._take_apart(roles)
        whole = self.write(turns)
        pieces = _with_words(self.frames[roles], [turn.text for turn in turns], whole)
        rendered = Rendered(tuple(piece for piece in pieces if piece.text), self.thinking)
        if rendered.text == whole:
            return rendered
        raise UserError(
            "the chat template does not copy every turn unchanged (it drops, moves or rewrites "
            "part of one); set data.family to a known chat format instead"
        )

    def write(self, turns: Sequence[Turn], *, prompt: bool = False) -> str:
        """Return what the template writes; raise ``UserError`` if it fails.

        Args:
            turns: the conversation.
            prompt: end the text where a model is to go on.
        """
        return run_template(self.template, turns, dict(self.tokens), prompt=prompt)[0]

    def _take_apart(self, roles: tuple[Role, ...]) -> tuple[Piece, ...]:
        """Return the pieces of a conversation of these roles, with placeholders for the words."""
        turns = [Turn(role, _PLACEHOLDER.format(i)) for i, role in enumerate(roles)]
        marked = _GENERATION.search(self.template) is not None
        whole, written = run_template(self.template, turns, dict(self.tokens), spans=marked)
        parts = _PLACED.split(whole)
        if parts[1::2] != [turn.text for turn in turns]:
            raise UserError(
                f"the chat template does not write each turn once, in order, for turns of roles "
                f"{', '.join(roles)}; set data.family to a known chat format instead"
            )
        if not marked:
            written = self._written(turns, whole)
        pieces: list[Piece] = []
        start = 0
        for i, part in enumerate(parts):
            turn = turns[min(i // 2, len(turns) - 1)]
            if i % 2:
                inside = any(a <= start and start + len(part) <= b for a, b in written)
                if marked and turn.role == "assistant" and not inside:
                    raise UserError(
                        "the chat template's {% generation %} block does not hold the assistant's "
                        "words; set data.family to a known chat format instead"
                    )
                pieces.append(Piece(part, "text", turn.role))
            elif part:
                pieces += self._divide(part, start, written, turn.role, first=i == 0)
            start += len(part)
        return tuple(pieces)

    def _divide(
        self,
        text: str,
        start: int,
        written: Sequence[tuple[int, int]],
        role: Role,
        *,
        first: bool,
    ) -> list[Piece]:
        """Divide the template's text between two turns at the bounds of the assistant's spans."""
        end = start + len(text)
        cuts = sorted({start, end, *(c for span in written for c in span if start < c < end)})
        pieces = []
        bos = dict(self.tokens).get("bos_token", "")
        if first and bos and text.startswith(bos):
            pieces.append(Piece(bos, "bos", None))
            cuts = sorted({start + len(bos), *(c for c in cuts if c > start + len(bos))})
        for a, b in pairwise(cuts):
            inside = any(lo <= a and b <= hi for lo, hi in written)
            piece = text[a - start : b - start]
            # What the assistant writes belongs to its turn, whichever turn comes next.
            pieces.append(Piece(piece, "end", "assistant") if inside else _marker(piece, role))
        return pieces

    def _written(self, turns: Sequence[Turn], whole: str) -> list[tuple[int, int]]:
        """Locate the character spans that the assistant writes, by rendering fewer turns."""
        spans = []
        for i, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            said = whole.index(turn.text)
            begin = self.write(turns[:i], prompt=True) if i else self._before_first(whole[:said])
            until = whole if i + 1 == len(turns) else self.write(turns[: i + 1])
            until = self._open_ended(until, whole)
            if not (
                whole.startswith(begin)
                and len(begin) <= said
                and whole.startswith(until)
                and len(until) >= said + len(turn.text)
            ):
                raise UserError(
                    f"the chat template renders the first {i + 1} turns differently alone than "
                    "within the whole conversation, so it is unknown which tokens are the "
                    "assistant's; set data.family to a known chat format instead, or to a template "
                    "with {% generation %} blocks"
                )
            spans.append((len(begin), len(until)))
        return spans

    def _before_first(self, before: str) -> str:
        """Return the part of the text before an assistant's first turn that the assistant reads.

        No prompt of a generation precedes such a turn. It begins with the marker of a turn that
        answers the user.
        """
        user, answer = (
            Turn("user", _PLACEHOLDER.format(0)),
            Turn("assistant", _PLACEHOLDER.format(1)),
        )
        whole, prompt = self.write([user, answer]), self.write([user], prompt=True)
        question = self._open_ended(self.write([user]), prompt)
        marker, lead = prompt[len(question) :], whole[len(prompt) :].partition(answer.text)[0]
        if not (
            whole.startswith(prompt)
            and prompt.startswith(question)
            and before.endswith(marker + lead)
        ):
            raise UserError(
                "the chat template does not show where the assistant's part begins in a "
                "conversation that the assistant opens; set data.family to a known chat format "
                "instead, or to a template with {% generation %} blocks"
            )
        return before.removesuffix(lead)

    def _open_ended(self, text: str, longer: str) -> str:
        """Return a rendering without the EOS that closes a text, not a turn."""
        eos = dict(self.tokens).get("eos_token", "")
        if eos and text.endswith(eos) and not longer.startswith(text):
            return text.removesuffix(eos)
        return text


def _with_words(frame: Sequence[Piece], texts: Sequence[str], whole: str) -> list[Piece]:
    """Return a frame with each turn's words as a rendering has them.

    A template may remove white space at the ends of a turn's words, of some turns only: Gemma 3's
    trims all but the system's.
    """
    words, pieces, begin = iter(texts), [], 0
    for i, piece in enumerate(frame):
        if piece.part == "text":
            text = next(words)
            between = takewhile(lambda other: other.part != "text", frame[i + 1 :])
            after = "".join(other.text for other in between)
            # The longest that fits: after the last words nothing may follow that tells them apart.
            trimmed = (text, text.lstrip(), text.rstrip(), text.strip())
            fits = (each for each in trimmed if whole.startswith(each + after, begin))
            piece = piece._replace(text=next(fits, text))
        pieces.append(piece)
        begin += len(piece.text)
    return pieces


def _marker(text: str, role: Role) -> Piece:
    part: Part = "marker"
    return Piece(text, part, role)


def _are_texts(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(v, str) for v in values)

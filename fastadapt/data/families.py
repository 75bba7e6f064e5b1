"""Chat formats of model families: the text around each turn of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from fastadapt.data.contents import ROLES, Turn
from fastadapt.data.rendered import END_THINK, THINK, Piece, Rendered, Spec
from fastadapt.errors import UserError


@dataclass(frozen=True)
class Family:
    """Text before and after each turn, for a family of models.

    Attributes:
        user, assistant: text before and after a turn of the user or the assistant.
        system: the same of a system turn. Without it, the system's text begins the user's first
            turn.
        system_inside: text before and after the system's text within the user's first turn; without
            it, a blank line follows the system's text.
        tool: the same of a tool's turn; without it, such turns are refused.
        tool_next: text between the words of two tools' turns in a row; without it, the text after
            the first and before the second.
        bos: text at the beginning.
        lead: text before the assistant's words that the model writes itself.
        between: text after a turn of the assistant that another turn follows, which the assistant
            does not write.
        thinking: markers around the assistant's reasoning.
        opening: text after ``lead`` with which the family's own template opens the assistant's turn
            when a model is asked; the model then does not decide whether to reason. The texts of
            the data contain it as the beginning of the response.
        markers: special strings; each must be one token of the pair's tokenizer.
        name: key of ``FAMILIES``; empty for an inline family.
    """

    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None = None
    system_inside: tuple[str, str] | None = None
    tool: tuple[str, str] | None = None
    tool_next: str = ""
    bos: str = ""
    lead: str = ""
    between: str = ""
    thinking: tuple[str, str] = (THINK, END_THINK)
    opening: str = ""
    markers: tuple[str, ...] = ()
    name: str = ""

    @property
    def spec(self) -> Spec:
        """Name or mapping from which ``fastadapt.data.rendering.get_form`` makes this family."""
        if self.name:
            return self.name
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
            if value and key != "name"
        }

    @property
    def before_prompt(self) -> str:
        """Text before the prompt of a conversation of two turns."""
        return self.bos + self.user[0]

    @property
    def before_response(self) -> str:
        """Text between prompt and response."""
        return self.user[1] + self.assistant[0]

    @property
    def after_response(self) -> str:
        """Text that ends the sequence."""
        return self.assistant[1]

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """Return the text of a conversation.

        Raises:
            UserError: a tool's turn, if the family has no template for it.
        """
        pieces = [Piece(self.bos, "bos", None)]
        pending: list[Piece] = []  # a system's text for the user's first turn
        for i, (role, text) in enumerate(turns):
            frame = getattr(self, role)
            if role == "system" and frame is None:
                pending = self._system_pieces(text)
                continue
            if frame is None:
                family = f"the chat family {self.name!r}" if self.name else "data.family"
                hint = "define an inline family" if self.name else f"add {role} to it"
                raise UserError(
                    f"turn {i + 1}: {family} has no template for the role {role!r}; {hint}"
                )
            before, after = frame
            if role == "tool" and self.tool_next:
                if i and turns[i - 1].role == "tool":
                    before = ""
                if i + 1 < len(turns) and turns[i + 1].role == "tool":
                    after = self.tool_next
            pieces.append(Piece(before, "marker", role))
            if role == "assistant":
                pieces.append(Piece(self.lead, "end", role))
                text = self._with_line_break(text)
            elif pending and role == "user":
                pieces += pending
                pending = []
            pieces.append(Piece(text, "text", role))
            pieces.append(Piece(after, "end" if role == "assistant" else "marker", role))
            if role == "assistant" and i + 1 < len(turns):
                pieces.append(Piece(self.between, "marker", turns[i + 1].role))
        if pending:
            raise UserError("turn 1: a system turn needs a turn of the user after it")
        return Rendered(tuple(piece for piece in pieces if piece.text), self.thinking)

    def _system_pieces(self, text: str) -> list[Piece]:
        """Return the pieces of a system's text within the user's first turn."""
        if self.system_inside is None:
            return [Piece(text + "\n\n", "text", "system")]
        before, after = self.system_inside
        return [
            Piece(before, "marker", "system"),
            Piece(text, "text", "system"),
            Piece(after, "marker", "system"),
        ]

    def _with_line_break(self, text: str) -> str:
        # The data have "<think> First"; the models write a line break after "<think>".
        opening = self.thinking[0]
        if opening and text.startswith(opening + " "):
            return opening + "\n" + text[len(opening) + 1 :]
        return text


def _named(**families: Family) -> Mapping[str, Family]:
    named = ((key.replace("_", "-"), family) for key, family in families.items())
    return {name: replace(family, name=name) for name, family in named}


_IM = ("<|im_start|>", "<|im_end|>")
_QWEN = Family(
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    tool=("<|im_start|>user\n<tool_response>\n", "\n</tool_response><|im_end|>\n"),
    tool_next="\n</tool_response>\n<tool_response>\n",
    markers=_IM,
)
_OPENING = f"{THINK}\n"
_LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n"

FAMILIES: Mapping[str, Family] = _named(
    # The special tokens contain U+FF5C and U+2581, not the ASCII characters | and _. The text does
    # not end in EOS; in R1's template, EOS separates a response from the next turn. The embedded
    # pair has this family: all reasoning on which its target was trained begins with <think>.
    r1_distill=Family(
        user=("<\uff5cUser\uff5c>", ""),
        assistant=("<\uff5cAssistant\uff5c>", ""),
        system=("", ""),
        bos="<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        between="<\uff5cend\u2581of\u2581sentence\uff5c>",
        opening=_OPENING,
        markers=(
            "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
            "<\uff5cUser\uff5c>",
            "<\uff5cAssistant\uff5c>",
        ),
    ),
    # Qwen2.5, without the system turn that some templates add.
    qwen=_QWEN,
    # QwQ's markers are Qwen2.5's, and its template opens the reasoning.
    qwq=replace(_QWEN, opening=_OPENING),
    # Qwen3 has tokens for the markers of its reasoning. Its template drops earlier reasoning.
    qwen3=replace(_QWEN, markers=(*_IM, THINK, END_THINK)),
    # llama.com/docs/model-cards-and-prompt-formats/meta-llama-3
    llama3=Family(
        user=(_LLAMA3.format("user"), "<|eot_id|>"),
        assistant=(_LLAMA3.format("assistant"), "<|eot_id|>"),
        system=(_LLAMA3.format("system"), "<|eot_id|>"),
        tool=(_LLAMA3.format("ipython"), "<|eot_id|>"),
        bos="<|begin_of_text|>",
        markers=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    # llama.com/docs/model-cards-and-prompt-formats/meta-llama-2: BOS begins every turn of the user.
    llama2=Family(
        user=("[INST] ", " [/INST]"),
        assistant=("", " </s>"),
        system_inside=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        bos="<s>",
        lead=" ",
        between="<s>",
        markers=("<s>", "</s>"),
    ),
    # Mistral 7B Instruct v0.3, whose tokenizer has tokens for the instruction's markers.
    mistral=Family(
        user=("[INST] ", "[/INST]"),
        assistant=("", "</s>"),
        bos="<s>",
        lead=" ",
        markers=("<s>", "</s>", "[INST]", "[/INST]"),
    ),
    # OLMo 2 Instruct: the names of roles are plain text.
    olmo2=Family(
        user=("<|user|>\n", "\n"),
        assistant=("<|assistant|>\n", "<|endoftext|>"),
        system=("<|system|>\n", "\n"),
        bos="<|endoftext|>",
        between="\n",
        markers=("<|endoftext|>",),
    ),
    phi3=Family(
        user=("<|user|>\n", "<|end|>\n"),
        assistant=("<|assistant|>\n", "<|end|>\n"),
        system=("<|system|>\n", "<|end|>\n"),
        markers=("<|user|>", "<|assistant|>", "<|end|>"),
    ),
    # GLM-4-0414. The marker of the next turn ends a response.
    glm4=Family(
        user=("<|user|>\n", ""),
        assistant=("<|assistant|>\n", ""),
        system=("<|system|>\n", ""),
        bos="[gMASK]<sop>",
        markers=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
    ),
    # Gemma 1 to 3: ai.google.dev/gemma/docs/formatting. Their tokenizers add the BOS.
    gemma=Family(
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant=("<start_of_turn>model\n", "<end_of_turn>\n"),
        bos="<bos>",
        markers=("<bos>", "<start_of_turn>", "<end_of_turn>"),
    ),
    # ai.google.dev/gemma/docs/core/prompt-formatting-gemma4. Templates of some sizes ask a model
    # with an empty channel of thoughts after its marker, which past turns lack.
    gemma4=Family(
        user=("<|turn>user\n", "<turn|>\n"),
        assistant=("<|turn>model\n", "<turn|>\n"),
        system=("<|turn>system\n", "<turn|>\n"),
        bos="<bos>",
        thinking=("<|channel>thought", "<channel|>"),
        markers=("<bos>", "<|turn>", "<turn|>"),
    ),
)


def get_family(name: str) -> Family:
    """Return the entry of ``FAMILIES`` with this name; raise ``UserError`` for an unknown name."""
    if name not in FAMILIES:
        raise UserError(f"data.family: expected one of {sorted(FAMILIES)}, got {name!r}")
    return FAMILIES[name]


def inline_family(spec: Mapping[str, Any]) -> Family:
    """Build a family from a mapping; raise ``UserError`` for an unknown key or an invalid value."""
    known = [field.name for field in fields(Family) if field.name != "name"]
    for key in spec:
        if key not in known:
            raise UserError(f"data.family: expected keys from {', '.join(known)}; got {key!r}")
    values: dict[str, Any] = {}
    for key, value in spec.items():
        if key in (*ROLES, "system_inside", "thinking"):
            if not _is_texts(value) or len(value) != 2:
                raise UserError(
                    f"data.family.{key}: expected two texts, [before, after], got {value!r:.60}"
                )
            values[key] = tuple(value)
        elif key == "markers":
            if not _is_texts(value) or not all(value):
                raise UserError(
                    f"data.family.markers: expected a list of non-empty texts, got {value!r:.60}"
                )
            values[key] = tuple(value)
        elif isinstance(value, str):
            values[key] = value
        else:
            raise UserError(f"data.family.{key}: expected text, got {value!r:.60}")
    for key in ("user", "assistant"):
        if key not in values:
            raise UserError(f"data.family.{key} is missing: expected two texts, [before, after]")
    return Family(**values)


def _is_texts(value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and all(isinstance(text, str) for text in value)

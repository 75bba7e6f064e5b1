"""Encode rendered text as token ids, and check these against tokenizer and model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from fastadapt.data.rendered import Form, Piece, Rendered
from fastadapt.errors import UserError
from fastadapt.models.pretrained import added_bos

Markers = Literal["text", "tokens"]


class Encoded(NamedTuple):
    """The tokens of a rendered text.

    Attributes:
        ids: token ids.
        offsets: first character and end of each token; empty if not requested.
        marked: whether a turn's words hold a marker or another special token.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    marked: bool


class Encoder:
    """Encodes rendered texts with the tokenizer of a pair.

    Special tokens of the template become tokens. The same strings inside a turn's words stay text
    (``split_special_tokens``), apart from the markers of the assistant's reasoning.

    Args:
        tokenizer: a transformers tokenizer. Its settings for truncation and padding are ignored.
        form: the chat format that rendered the texts.
        markers: "text", or "tokens": special tokens in a turn's words become tokens.

    Raises:
        UserError: a marker of the form is not one token of the tokenizer.
    """

    def __init__(self, tokenizer: Any, form: Form, markers: Markers = "text") -> None:
        check_markers(tokenizer, form)
        self._tokenizer, self._as_tokens = tokenizer, markers == "tokens"
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {str(token) for token in added if token.special} | set(form.markers)
        # Gemma 4's marker of reasoning is a token and a word; a marker without a token is text. A
        # marker of turns with which one of reasoning begins stays text in a turn's words.
        known = {str(token) for token in added}
        begins = {t for t in known if any(m.startswith(t) for m in form.thinking)}
        thinking = begins - set(form.markers) | known & set(form.thinking)
        special -= {*form.thinking, *thinking, ""}
        self._special, self._thinking = _any_of(special), _any_of(thinking)
        self._any = _any_of(special | thinking)
        #: Markers that ``split_special_tokens`` does not split.
        plain = {str(token) for token in added if not token.special}
        self._unsplit = _any_of(plain & set(form.markers) - set(form.thinking))

    def encode(self, texts: Sequence[Rendered], *, offsets: bool = False) -> list[Encoded]:
        """Return the tokens of each text.

        Raises:
            UserError: the tokenizer joins a text across its markers, so that markers in a turn's
                words cannot stay text.
        """
        encoded = encode(self._tokenizer, [text.text for text in texts], offsets=offsets)
        results = []
        for i, text in enumerate(texts):
            marked = any(
                piece.part == "text" and self._special.search(piece.text) for piece in text.pieces
            )
            places = encoded["offset_mapping"][i] if offsets else []
            result = Encoded(encoded["input_ids"][i], places, marked)
            results.append(self._encode_apart(text) if marked and not self._as_tokens else result)
        return results

    def encode_text(self, text: str) -> Encoded:
        """Return the tokens of plain text, after the tokenizer's BOS if it adds one.

        A text whose own BOS is a token (``data.markers``) gets no second one.
        """
        (encoded,) = self.encode([Rendered((Piece(text, "text", None),))], offsets=True)
        bos = added_bos(self._tokenizer)
        if encoded.ids[:1] == bos:
            bos = []
        return Encoded([*bos, *encoded.ids], [(0, 0)] * len(bos) + encoded.offsets, encoded.marked)

    def _encode_apart(self, text: Rendered) -> Encoded:
        """Encode the text between the template's markers apart, so that words form no marker."""
        plain = Rendered(
            tuple(
                piece._replace(text=self._special.sub("x", piece.text))
                if piece.part == "text"
                else piece
                for piece in text.pieces
            )
        )
        whole = encode(self._tokenizer, [plain.text])["input_ids"][0]
        if self._encode_stretches(plain).ids != whole:
            raise UserError(
                "a turn's words hold a special token, and this tokenizer cannot encode them as "
                "text; remove the row, or set data.markers to tokens (fastadapt data: --markers "
                "tokens) to read it as that token"
            )
        return self._encode_stretches(text)

    def _encode_stretches(self, text: Rendered) -> Encoded:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, stretch, is_token in self._stretches(text):
            if is_token:
                ids.append(self._tokenizer.convert_tokens_to_ids(stretch))
                offsets.append((start, start + len(stretch)))
                continue
            encoded = _call(self._tokenizer, [stretch], offsets=True, split_special_tokens=True)
            ids += encoded["input_ids"][0]
            offsets += [(start + a, start + b) for a, b in encoded["offset_mapping"][0]]
        return Encoded(ids, offsets, True)

    def _stretches(self, text: Rendered) -> Iterator[tuple[int, str, bool]]:
        """Yield position and text of each stretch of text, and whether it is a single token."""
        pending, begin = "", 0
        for piece, start, _ in text.spans():
            if not pending:
                begin = start
            words = piece.part == "text"
            end = 0
            for match in (self._thinking if words else self._any).finditer(piece.text):
                pending += piece.text[end : match.start()]
                yield from self._cut(pending, begin)
                yield start + match.start(), match[0], True
                end = match.end()
                pending, begin = "", start + end
            pending += piece.text[end:]
        yield from self._cut(pending, begin)

    def _cut(self, text: str, begin: int) -> Iterator[tuple[int, str, bool]]:
        """Cut a stretch of text after each first character of a marker, and yield the pieces."""
        start = 0
        for match in self._unsplit.finditer(text):
            cut = match.start() + 1
            yield begin + start, text[start:cut], False
            start = cut
        if start < len(text):
            yield begin + start, text[start:], False


def encode(tokenizer: Any, texts: Sequence[str], *, offsets: bool = False) -> Any:
    """Encode rendered texts without special tokens, truncation or padding.

    Args:
        tokenizer: a transformers tokenizer. Its settings for truncation and padding are ignored.
        texts: rendered texts, BOS included.
        offsets: also return ``offset_mapping``, the first and last character of each token.

    Returns:
        ``{"input_ids": [[...], ...]}``, a list of ids per text.
    """
    return _call(tokenizer, texts, offsets=offsets)


def _call(tokenizer: Any, texts: Sequence[str], *, offsets: bool, **options: Any) -> Any:
    return tokenizer(
        list(texts),
        add_special_tokens=False,  # BOS is in the text
        return_attention_mask=False,
        return_offsets_mapping=offsets,
        verbose=False,
        **options,
    )


def _any_of(texts: set[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the texts, longer ones first; without texts, never."""
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def is_one_token(tokenizer: Any, text: str) -> bool:
    """Return whether a text is one token of the tokenizer."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id


def check_markers(tokenizer: Any, form: Form) -> None:
    """Raise ``UserError`` if a marker of a chat format is not one token of the tokenizer."""
    spec = form.spec
    for marker in form.markers:
        if not is_one_token(tokenizer, marker):
            inline = not isinstance(spec, str)
            name = "data.family.markers" if inline else f"data.family={spec!r}"
            hint = "correct or remove it" if inline else "give the family of this pair"
            raise UserError(
                f"{name}: the tokenizer does not know its marker {marker!r} as one token; {hint}"
            )


def check_ids(ids: Sequence[int] | Tensor, n_rows: int, name: str) -> None:
    """Check that the model has an embedding for every token.

    Tokens that were added to a tokenizer without resizing the model have none.

    Args:
        ids: at least one id, in host memory.
        n_rows: rows of the model's embedding.
        name: name of the text in the message.

    Raises:
        UserError: an id is below 0, or ``n_rows`` or more.

    Example:
        >>> check_ids([3, 40], 40, "row 2")
        Traceback (most recent call last):
            ...
        fastadapt.errors.UserError: row 2: expected tokens below 40, the rows of the model's \
embedding, got token 40. Resize the embedding to the tokenizer, or leave such texts out
    """
    lowest = int(ids.min()) if isinstance(ids, Tensor) else min(ids)
    if lowest < 0:
        raise UserError(f"{name}: expected tokens of 0 or more, got token {lowest:,}")
    highest = int(ids.max()) if isinstance(ids, Tensor) else max(ids)
    if highest >= n_rows:
        raise UserError(
            f"{name}: expected tokens below {n_rows:,}, the rows of the model's embedding, got "
            f"token {highest:,}. Resize the embedding to the tokenizer, or leave such texts out"
        )

"""Tokens of the rows of a source, and which of them the losses on the output count."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

from fastadapt.data.rendered import AUTO, Rendered, Spec
from fastadapt.data.rendering import get_form
from fastadapt.data.sources import BadRows, Row
from fastadapt.data.templates.auto_format import resolve
from fastadapt.data.tokens import Encoded, Encoder, Markers
from fastadapt.errors import UserError

Loss = Literal["all", "assistant", "thinking"]

_CHUNK = 128  # rows per call of the tokenizer


class Tokenised(NamedTuple):
    """A row with its rendered text, its tokens, and the token ranges that losses count.

    Attributes:
        row: the row.
        rendered: its rendered conversation; None for plain text and token ids.
        encoded: its tokens.
        labels: first token and end of each stretch that the losses on the output count, in one
            flat list.
    """

    row: Row
    rendered: Rendered | None
    encoded: Encoded
    labels: list[int]


class RowTokeniser:
    """Renders and tokenizes rows in one chat format.

    Args:
        tokenizer: transformers tokenizer of the pair.
        family, markers, loss: see :class:`fastadapt.data.sequences.DataConfig`.
        offsets: also return the characters of each token.

    Raises:
        UserError: the tokenizer does not know the family's markers.
    """

    def __init__(
        self,
        tokenizer: Any,
        family: Spec = AUTO,
        *,
        markers: Markers = "text",
        loss: Loss = "all",
        offsets: bool = False,
    ) -> None:
        self.form = get_form(resolve(family, tokenizer))
        self.encoder = Encoder(tokenizer, self.form, markers)
        self._loss: Loss = loss
        self._offsets = offsets or loss != "all"

    def tokenise(self, rows: Iterable[Row], bad: BadRows) -> Iterator[Tokenised]:
        """Yield the tokens of each row; ``bad`` takes the rows that cannot be used."""
        stream = iter(rows)
        while chunk := list(islice(stream, _CHUNK)):
            rendered = self._render(chunk, bad)
            encoded = self._encode(chunk, rendered, bad)
            for i, row in enumerate(chunk):
                if row.content.turns and i not in encoded:
                    continue
                try:
                    yield self._label(row, rendered.get(i), encoded.get(i))
                except UserError as error:
                    bad.take(error, row.where)

    def _render(self, rows: Sequence[Row], bad: BadRows) -> dict[int, Rendered]:
        rendered = {}
        for i, row in enumerate(rows):
            if row.content.turns:
                try:
                    rendered[i] = self.form.render(row.content.turns)
                except UserError as error:
                    bad.take(error, row.where)
        return rendered

    def _encode(
        self, rows: Sequence[Row], rendered: Mapping[int, Rendered], bad: BadRows
    ) -> dict[int, Encoded]:
        texts = list(rendered.values())
        try:
            together = self.encoder.encode(texts, offsets=self._offsets) if texts else []
            return dict(zip(rendered, together, strict=True))
        except UserError:
            pass  # raised again for its row below
        encoded = {}
        for i, text in rendered.items():
            try:
                encoded[i] = self.encoder.encode([text], offsets=self._offsets)[0]
            except UserError as error:
                bad.take(error, rows[i].where)
        return encoded

    def _label(self, row: Row, rendered: Rendered | None, encoded: Encoded | None) -> Tokenised:
        """Return a row's tokens and labels; raise ``UserError`` for too few of either."""
        content = row.content
        if content.ids is not None:
            encoded = Encoded(list(content.ids), [], False)
        elif content.text is not None:
            encoded = self.encoder.encode_text(content.text)
        assert encoded is not None
        n = len(encoded.ids)
        if n < 2:
            raise UserError(f"the text has {n} token(s), expected at least 2")
        if self._loss == "all" or rendered is None:
            return Tokenised(row, rendered, encoded, [0, n])
        spans = rendered.responses() if self._loss == "assistant" else rendered.reasoning()
        labels = _token_spans(spans, encoded.offsets, len(rendered.text))
        if not labels:
            what = "response" if self._loss == "assistant" else "assistant's reasoning"
            others = "all counts" if self._loss == "assistant" else "assistant and all count"
            raise UserError(
                f"the {what} has no token (data.loss is {self._loss}; {others} other tokens)"
            )
        return Tokenised(row, rendered, encoded, labels)


def _token_spans(
    spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]], n_characters: int
) -> list[int]:
    """Return first token and end of each run of tokens that begin within spans."""
    starts = [start for start, _ in offsets]
    stretches: list[int] = []
    for begin, end in spans:
        first = bisect_left(starts, begin)
        last = len(starts) if end == n_characters else bisect_left(starts, end)
        if stretches and stretches[-1] == first:
            stretches[-1] = last
        elif last > first:
            stretches += [first, last]
    return stretches

"""Filter the rows of a source, and tokenize the rows that can still be drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Event
from typing import Any, NamedTuple

from fastadapt.data.contents import Content
from fastadapt.data.prepare.candidate_store import CandidateStore
from fastadapt.data.prepare.selection import (
    OTHER_DOMAIN,
    OTHER_REASON,
    ROWS,
    TOO_LONG,
    PrepareConfig,
    Shortlist,
    content_hashes,
    lacks_thinking,
    row_key,
)
from fastadapt.data.prepare.source_stream import SourceStream
from fastadapt.data.sources import BadRows, Row
from fastadapt.data.tokenised import RowTokeniser
from fastadapt.errors import UserError

Record = dict[str, Any]
Sink = Callable[[Record], None]

#: Columns that are copied if a source has them.
OPTIONAL = ("domain", "difficulty", "source")

_COMMIT_ROWS = 1000  # rows of the source between commits; a kill loses at most these
_ENCODE_ROWS = 64  # conversations per call of the tokenizer, which needs 100 bytes per token
_MAX_REASONS = 40  # messages may quote what a row holds


class _PendingRow(NamedTuple):
    """A row that passed every filter, but whose tokens are not counted yet."""

    row: int
    domain: str
    values: Mapping[str, Any]
    content: Content


class FilterPass:
    """One pass over the source, which fills the store with candidates."""

    def __init__(
        self,
        config: PrepareConfig,
        stream: SourceStream,
        store: CandidateStore,
        shortlist: Shortlist,
        tokeniser: RowTokeniser,
    ) -> None:
        self._config, self._stream, self._store = config, stream, store
        self._shortlist, self._tokeniser = shortlist, tokeniser
        self._domains = config.quotas()["train"]
        self._pending: list[_PendingRow] = []
        self._row = store.read
        self._n_added = 0

    def run(self, report: Sink, stop: Event | None) -> bool:
        """Read until the source ends or ``stop`` is set; return whether the source ended."""
        store = self._store
        if store.done:
            return True
        for where, values in self._stream.rows(store.cursor, self._skip):
            self._filter(where, values)
            self._row += 1
            if self._row - store.read >= _COMMIT_ROWS:
                self._count_tokens()
                store.commit(self._row, self._stream.cursor())
                report(self._progress(self._stream.fraction))
                if stop is not None and stop.is_set():
                    return False
        self._count_tokens()
        store.commit(self._row, None, done=True)
        report(self._progress(1.0))
        return True

    def _progress(self, fraction: float | None) -> Record:
        return {"kind": "read", "rows": self._row, "kept": self._n_added, "fraction": fraction}

    def _skip(self, error: UserError) -> None:
        """Count a row of a file that cannot be read."""
        self._leave_out(error)
        self._row += 1

    def _leave_out(self, error: UserError, where: str = "") -> None:
        bad = BadRows("skip")
        bad.take(error, where)
        for reason in bad.counts:
            self._count(reason)

    def _count(self, reason: str) -> None:
        counts = self._store.counts["left_out"]
        counts[reason if reason in counts or len(counts) < _MAX_REASONS else OTHER_REASON] += 1

    def _filter(self, where: str, values: Mapping[str, Any]) -> None:
        domain = values.get("domain") if self._config.has_domains else ROWS
        if not isinstance(domain, str) or domain not in self._domains:
            self._count(OTHER_DOMAIN)
            return
        self._store.counts["domains"][domain] += 1
        try:
            content = self._stream.layout.read(values)
        except UserError as error:
            self._leave_out(error, where)
            return
        thinking = self._tokeniser.form.thinking
        reason = lacks_thinking(content, thinking) if self._config.thinking == "required" else None
        if reason is not None:
            self._count(reason)
        elif self._shortlist.admits(domain, row_key(self._config.seed, self._row)):
            self._pending.append(_PendingRow(self._row, domain, values, content))
            if len(self._pending) == _ENCODE_ROWS:
                self._count_tokens()

    def _count_tokens(self) -> None:
        """Render and tokenize the pending rows; store those of at most ``max_tokens`` tokens."""
        pending, self._pending = {row.row: row for row in self._pending}, []
        refused = _Refused("skip")
        rows = (Row(str(n), n, row.content, {}) for n, row in pending.items())
        for tokenised in self._tokeniser.tokenise(rows, refused):
            row, n = pending[tokenised.row.number], len(tokenised.encoded.ids)
            if n > self._config.max_tokens:
                self._store.refuse(row.row, row.domain, TOO_LONG)
                continue
            self._store.add(
                row.row,
                row.domain,
                content_hashes(row.content),
                n,
                _output_columns(row),
                marked=tokenised.encoded.marked,
            )
            self._n_added += 1
        for number, reason in refused.reasons.items():
            self._store.refuse(number, pending[number].domain, reason)


@dataclass
class _Refused(BadRows):
    """Record of the rows that cannot be rendered.

    Attributes:
        reasons: reason by number of the row.
    """

    reasons: dict[int, str] = field(default_factory=dict)

    def take(self, error: UserError, where: str = "") -> None:
        """Record why a row cannot be rendered; ``where`` is the row's number."""
        self.reasons[int(where)] = str(error)


def _output_columns(row: _PendingRow) -> Record:
    """Return the columns to write; None for a value that the column's type cannot hold."""
    difficulty = row.values.get("difficulty")
    if isinstance(difficulty, float) and difficulty.is_integer():
        difficulty = int(difficulty)  # some writers store integers with nulls as floats
    fits = type(difficulty) is int and -(2**63) <= difficulty < 2**63
    return {
        **output_content(row.content),
        "domain": text_or_none(row.values.get("domain")),
        "source": text_or_none(row.values.get("source")),
        "difficulty": difficulty if fits else None,
    }


def output_content(content: Content) -> Record:
    """Return a row's content as a column of the output, which training reads as the same content.

    Example:
        >>> output_content(Content(text="abc"))
        {'text': 'abc'}
    """
    if content.ids is not None:
        return {"input_ids": list(content.ids)}
    if content.text is not None:
        return {"text": content.text}
    return {"messages": [{"role": turn.role, "content": turn.text} for turn in content.turns]}


def text_or_none(value: Any) -> str | None:
    """Return ``value`` if it is text that UTF-8 can encode, else None.

    Example:
        >>> text_or_none("a"), text_or_none("\\ud800"), text_or_none(3)
        ('a', None, None)
    """
    if not isinstance(value, str):
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return value

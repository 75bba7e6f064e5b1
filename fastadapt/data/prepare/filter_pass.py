"""Filter the rows of a source, and tokenize the rows that can still be drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Event
from typing import Any, NamedTuple

from fastadapt.data import rendering
from fastadapt.data.prepare.candidate_store import CandidateStore
from fastadapt.data.prepare.selection import (
    OTHER_DOMAIN,
    PrepareConfig,
    Shortlist,
    conversation_hash,
    parse_row,
    prompt_hash,
    row_key,
)
from fastadapt.data.prepare.source_stream import SourceStream
from fastadapt.data.sources import COLUMN
from fastadapt.data.tokens import encode

Record = dict[str, Any]
Sink = Callable[[Record], None]

#: Columns that a source must have, and columns that are copied if it has them.
REQUIRED, OPTIONAL = (COLUMN, "domain"), ("difficulty", "source")

_COMMIT_ROWS = 1000  # rows of the source between commits; a kill loses at most these
_ENCODE_ROWS = 64  # conversations per call of the tokenizer, which needs 100 bytes per token


class _PendingRow(NamedTuple):
    """A row that passed every filter, but whose tokens are not counted yet."""

    row: int
    values: Mapping[str, Any]
    turns: tuple[str, str]


class FilterPass:
    """One pass over the source, which fills the store with candidates."""

    def __init__(
        self,
        config: PrepareConfig,
        stream: SourceStream,
        store: CandidateStore,
        shortlist: Shortlist,
        tokenizer: Any,
    ) -> None:
        self._config, self._stream, self._store = config, stream, store
        self._shortlist, self._tokenizer = shortlist, tokenizer
        self._domains = config.quotas()["train"]
        self._pending: list[_PendingRow] = []
        self._n_added = 0

    def run(self, report: Sink, stop: Event | None) -> bool:
        """Read until the source ends or ``stop`` is set; return whether the source ended."""
        store = self._store
        if store.done:
            return True
        row = store.read
        for _, values in self._stream.rows(store.cursor):
            self._filter(row, values)
            row += 1
            if row % _COMMIT_ROWS == 0:
                self._count_tokens()
                store.commit(row, self._stream.cursor())
                report(self._progress(row, self._stream.fraction))
                if stop is not None and stop.is_set():
                    return False
        self._count_tokens()
        store.commit(row, None, done=True)
        report(self._progress(row, 1.0))
        return True

    def _progress(self, rows: int, fraction: float | None) -> Record:
        return {"kind": "read", "rows": rows, "kept": self._n_added, "fraction": fraction}

    def _filter(self, row: int, values: Mapping[str, Any]) -> None:
        turns = parse_row(values, self._domains)
        counts = self._store.counts
        if turns != OTHER_DOMAIN:
            counts["domains"][values["domain"]] += 1
        if isinstance(turns, str):
            counts["left_out"][turns] += 1
            return
        if self._shortlist.admits(values["domain"], row_key(self._config.seed, row)):
            self._pending.append(_PendingRow(row, values, turns))
            if len(self._pending) == _ENCODE_ROWS:
                self._count_tokens()

    def _count_tokens(self) -> None:
        """Render and tokenize the pending rows; store those of at most ``max_tokens`` tokens."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        texts = [rendering.render(row.values[COLUMN], self._config.family) for row in pending]
        for row, ids in zip(pending, encode(self._tokenizer, texts)["input_ids"], strict=True):
            domain = row.values["domain"]
            if len(ids) > self._config.max_tokens:
                self._store.add_too_long(row.row, domain)
                continue
            hashes = prompt_hash(row.turns[0]), conversation_hash(*row.turns)
            self._store.add(row.row, domain, hashes, len(ids), _output_columns(row.values))
            self._n_added += 1


def _output_columns(values: Mapping[str, Any]) -> Record:
    """Return the copied columns of a row; None for a value that the column's type cannot hold."""
    difficulty, source = values.get("difficulty"), values.get("source")
    if isinstance(difficulty, float) and difficulty.is_integer():
        difficulty = int(difficulty)  # some writers store integers with nulls as floats
    fits = type(difficulty) is int and -(2**63) <= difficulty < 2**63
    names = [text_or_none(turn.get("from", turn.get("role"))) for turn in values[COLUMN]]
    said = zip(names, rendering.turns(values[COLUMN]), strict=True)
    turns = [{"from": name, "value": text} for name, text in said]
    return {
        COLUMN: turns,
        "domain": values["domain"],
        "source": text_or_none(source),
        "difficulty": difficulty if fits else None,
    }


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

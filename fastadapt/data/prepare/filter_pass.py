"""A source on its way to the spool: filters first, then the tokens of what can still be drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Event
from typing import Any, NamedTuple

from fastadapt.data.prepare.candidate_store import Spool
from fastadapt.data.prepare.selection import (
    OTHER_DOMAIN,
    PrepareConfig,
    Shortlist,
    conversation_hash,
    look_at,
    prompt_hash,
    row_key,
)
from fastadapt.data.prepare.source_stream import Stream
from fastadapt.data.rendering import render
from fastadapt.data.sources import COLUMN
from fastadapt.data.tokens import encode

Record = dict[str, Any]
Sink = Callable[[Record], None]

#: Columns of a source: those it has, and those that are kept where it has them.
REQUIRED, CARRIED = (COLUMN, "domain"), ("difficulty", "source")

_COMMIT_ROWS = 1000  # rows of the source between commits: what a kill costs, at most
_ENCODE_ROWS = 64  # conversations handed to the tokenizer at once: a token takes it 100 bytes


class _Waiting(NamedTuple):
    """A row that passed every test but that of its length."""

    row: int
    values: Mapping[str, Any]
    turns: tuple[str, str]


class Reading:
    """The source, on its way to the spool."""

    def __init__(
        self,
        config: PrepareConfig,
        stream: Stream,
        spool: Spool,
        shortlist: Shortlist,
        tokenizer: Any,
    ) -> None:
        self._config, self._stream, self._spool = config, stream, spool
        self._shortlist, self._tokenizer = shortlist, tokenizer
        self._domains = config.quotas()["train"]
        self._waiting: list[_Waiting] = []
        self._kept = 0

    def run(self, tell: Sink, stop: Event | None) -> bool:
        """Read to the end of the source, or until told to stop; whether it was the end."""
        spool = self._spool
        if spool.done:
            return True
        row = spool.read
        for _, values in self._stream.rows(spool.cursor):
            self._look(row, values)
            row += 1
            if row % _COMMIT_ROWS == 0:
                self._count_tokens()
                spool.commit(row, self._stream.cursor())
                tell({"kind": "read", "rows": row, **self._standing()})
                if stop is not None and stop.is_set():
                    return False
        self._count_tokens()
        spool.commit(row, None, done=True)
        tell({"kind": "read", "rows": row, **self._standing(), "fraction": 1.0})
        return True

    def _standing(self) -> Record:
        return {"kept": self._kept, "fraction": self._stream.fraction}

    def _look(self, row: int, values: Mapping[str, Any]) -> None:
        found = look_at(values, self._domains)
        counts = self._spool.counts
        if found != OTHER_DOMAIN:
            counts["domains"][values["domain"]] += 1
        if isinstance(found, str):
            counts["left_out"][found] += 1
            return
        if self._shortlist.admits(values["domain"], row_key(self._config.seed, row)):
            self._waiting.append(_Waiting(row, values, found))
            if len(self._waiting) == _ENCODE_ROWS:
                self._count_tokens()

    def _count_tokens(self) -> None:
        """Render and tokenise the rows that wait, and keep those that are short enough."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        texts = [render(w.values[COLUMN], self._config.family) for w in waiting]
        for each, ids in zip(waiting, encode(self._tokenizer, texts)["input_ids"], strict=True):
            domain = each.values["domain"]
            if len(ids) > self._config.max_tokens:
                self._spool.too_long(each.row, domain)
                continue
            hashes = prompt_hash(each.turns[0]), conversation_hash(*each.turns)
            self._spool.keep(each.row, domain, hashes, len(ids), _carried(each.values))
            self._kept += 1


def _carried(values: Mapping[str, Any]) -> Record:
    """What is written of a row beside tokens and place; None for what its column cannot hold."""
    difficulty, source = values.get("difficulty"), values.get("source")
    if isinstance(difficulty, float) and difficulty.is_integer():
        difficulty = int(difficulty)  # integers with nulls, as some writers give them
    fits = type(difficulty) is int and -(2**63) <= difficulty < 2**63
    turns = [{"from": text_or_none(t.get("from")), "value": t["value"]} for t in values[COLUMN]]
    return {
        COLUMN: turns,
        "domain": values["domain"],
        "source": text_or_none(source),
        "difficulty": difficulty if fits else None,
    }


def text_or_none(value: Any) -> str | None:
    """``value`` where it is text that UTF-8 holds; else None: half a surrogate pair is no text."""
    if not isinstance(value, str):
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return value

"""Recognise the columns of a data set, and read a row as turns, text or token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastadapt.data.turns import Turn, check_turns, read_text, read_turns
from fastadapt.errors import UserError

Kind = Literal["conversation", "prompt and response", "text", "token ids"]

#: Names of columns by what they hold.
CONVERSATIONS = ("conversations", "messages", "conversation")
PROMPTS = ("prompt", "instruction", "question", "query", "problem")
RESPONSES = ("response", "completion", "output", "answer", "solution")
TEXTS = ("text", "content")
IDS = ("input_ids", "tokens")
#: Columns that go with a prompt: more of the user's words, and the system's.
INPUT, SYSTEMS = "input", ("system", "system_prompt")
#: Rows from which the columns are recognised.
PEEKED = 20


@dataclass(frozen=True)
class Content:
    """What a row holds: one of turns, text and token ids.

    Attributes:
        turns: turns of a conversation.
        text: plain text.
        ids: token ids.
    """

    turns: tuple[Turn, ...] = ()
    text: str | None = None
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Layout:
    """What the columns of a data set hold.

    Attributes:
        kind: how a row is read.
        columns: columns that every row must have: one, or those of prompt and response.
        beside: columns that a row may have: ``input`` and a column of system turns.
    """

    kind: Kind
    columns: tuple[str, ...]
    beside: tuple[str, ...] = ()

    def __str__(self) -> str:
        listed = " and ".join(map(repr, (*self.columns, *self.beside)))
        return f"{self.kind} in {listed}"

    def read(self, row: Mapping[str, Any]) -> Content:
        """Return the content of a row.

        Raises:
            UserError: a value of the wrong form; see :func:`fastadapt.data.turns.read_turns`.
        """
        first = self.columns[0]
        if self.kind == "conversation":
            return Content(turns=tuple(read_turns(row[first], first)))
        if self.kind == "prompt and response":
            return Content(turns=self._read_pair(row))
        if self.kind == "text":
            text = read_text(row[first], first, "text")
            if not text.strip():
                raise UserError(f"{first} is empty")
            return Content(text=text)
        ids = row[first]
        if not _are_ids(ids):
            raise UserError(f"{first}: expected a list of token ids, got {ids!r:.60}")
        return Content(ids=tuple(ids))

    def _read_pair(self, row: Mapping[str, Any]) -> tuple[Turn, ...]:
        prompt, response = (row[name] for name in self.columns)
        where = " and ".join(self.columns)
        if _is_list(prompt) and _is_list(response) and not _are_parts(prompt):
            return tuple(read_turns([*prompt, *response], where))
        said = read_text(prompt, self.columns[0], self.columns[0])
        turns = []
        for name in self.beside:
            value = row.get(name)
            if value is None:
                continue
            text = read_text(value, name, name)
            if name == INPUT:
                said += f"\n\n{text}" if text.strip() else ""
            else:
                turns.append(Turn("system", text))
        turns.append(Turn("user", said))
        answer = read_text(response, self.columns[1], self.columns[1])
        return tuple(check_turns([*turns, Turn("assistant", answer)], where))


def find_layout(rows: Sequence[Mapping[str, Any]], columns: str | None, where: str) -> Layout:
    """Return what the columns of a data set hold.

    Columns are recognised by name, if their values have the form. ``CONVERSATIONS``, ``TEXTS`` and
    ``IDS`` name single columns; ``PROMPTS`` and ``RESPONSES`` name pairs.

    Args:
        rows: the first rows.
        columns: ``data.columns``: the name of the column to read, or of prompt and response,
            separated by a comma; None: recognise them.
        where: name of the source, for messages.

    Raises:
        UserError: no column or several are recognised, or a named one is missing.

    Example:
        >>> find_layout([{"question": "1 + 1?", "answer": "2"}], None, "rows.jsonl").columns
        ('question', 'answer')
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    examples = {name: _first(rows, name) for name in names}
    if columns is not None:
        return _chosen(columns, examples, where)
    found = [
        *(Layout("conversation", (n,)) for n in CONVERSATIONS if _is_list(examples.get(n))),
        *_pairs(names),
        *(Layout("text", (n,)) for n in TEXTS if isinstance(examples.get(n), str)),
        *(Layout("token ids", (n,)) for n in IDS if _are_ids(examples.get(n))),
    ]
    if len(found) == 1:
        return found[0]
    # Of a known column whose values have no form, the row says what is wrong.
    named = [name for name in (*CONVERSATIONS, *TEXTS) if name in names]
    if not found and len(named) == 1:
        return Layout("conversation" if named[0] in CONVERSATIONS else "text", (named[0],))
    listed = ", ".join(map(repr, names)) or "none"
    if not found:
        raise UserError(
            f"{where}: no column 'conversations', 'messages', 'text' or 'input_ids', and no prompt "
            f"with a response; the columns are {listed}. Name the column, or prompt,response, with "
            "data.columns"
        )
    choices = " or ".join(",".join(layout.columns) for layout in found)
    raise UserError(
        f"{where}: several columns may hold the data ({'; '.join(map(str, found))}); set "
        f"data.columns to {choices}"
    )


def _pairs(names: Sequence[str]) -> list[Layout]:
    beside = tuple(name for name in (INPUT, *SYSTEMS) if name in names)
    return [
        Layout("prompt and response", (prompt, response), beside)
        for prompt in PROMPTS
        for response in RESPONSES
        if prompt in names and response in names
    ]


def _chosen(columns: str, examples: Mapping[str, Any], where: str) -> Layout:
    chosen = tuple(name.strip() for name in columns.split(","))
    for name in chosen:
        if name not in examples:
            listed = ", ".join(map(repr, examples)) or "none"
            raise UserError(f"{where}: no column {name!r} (data.columns); the columns are {listed}")
    if len(chosen) > 2:
        raise UserError(f"data.columns: expected one column, or prompt,response; got {columns!r}")
    if len(chosen) == 2:
        beside = tuple(n for n in (INPUT, *SYSTEMS) if n in examples and n not in chosen)
        return Layout("prompt and response", chosen, beside)
    example = examples[chosen[0]]
    if isinstance(example, str):
        return Layout("text", chosen)
    return Layout("token ids" if _are_ids(example) else "conversation", chosen)


def _first(rows: Sequence[Mapping[str, Any]], name: str) -> Any:
    return next((row[name] for row in rows if row.get(name) is not None), None)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _are_parts(value: Sequence[Any]) -> bool:
    """Return whether a list holds parts of one content, not turns."""
    return all(
        isinstance(part, str)
        or (isinstance(part, Mapping) and "type" in part and "role" not in part)
        for part in value
    )


def _are_ids(value: Any) -> bool:
    return _is_list(value) and all(type(token) is int and token >= 0 for token in value)

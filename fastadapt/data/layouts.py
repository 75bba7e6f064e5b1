"""Which columns of a data set hold its content.

Columns are recognised by name and by the form of their values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastadapt.data.contents import (
    Content,
    Turn,
    are_parts,
    check_turns,
    is_list,
    read_text,
    read_turns,
    unread_keys,
)
from fastadapt.errors import UserError

Kind = Literal["conversation", "prompt and response", "text", "token ids"]

#: Names of columns by what they hold.
CONVERSATIONS = ("conversations", "messages", "conversation")
PROMPTS = ("prompt", "instruction", "question", "query", "problem")
RESPONSES = ("response", "completion", "output", "answer", "solution")
TEXTS = ("text", "content")
IDS = ("input_ids", "tokens")
#: Columns that go with a prompt's text: more of the user's words. With turns too: the system's.
INPUT, SYSTEMS = "input", ("system", "system_prompt")
#: Columns, and keys of turns, that some programs read as a part of the text or of its labels.
SIGNIFICANT = (
    *(INPUT, *SYSTEMS, "tools", "functions", "history", "documents", "context", "passage"),
    *("reasoning", "reasoning_content", "reasoning_trace", "thinking", "thought", "thoughts"),
    *("cot", "chain_of_thought", "rationale", "labels", "loss_mask"),
)
SIGNIFICANT_KEYS = ("weight", "train", "loss")
#: Rows from which the columns are recognised.
PEEKED = 20


@dataclass(frozen=True)
class Layout:
    """Kind of content that a data set has, and the columns that hold it.

    Attributes:
        kind: how a row is read.
        columns: columns that every row must have: one, or those of prompt and response.
        beside: columns that a row may have: ``input`` and columns of system turns.
        names: columns of the first rows.
        keys: keys of the first rows' turns that are not read.
    """

    kind: Kind
    columns: tuple[str, ...]
    beside: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        beside = (name for name in self.beside if name in self.names)
        listed = " and ".join(map(repr, (*self.columns, *beside)))
        return f"{self.kind} in {listed}"

    @property
    def system_columns(self) -> tuple[str, ...]:
        """Columns of system turns beside turns, which earlier versions did not read."""
        if self.kind != "conversation" and INPUT in (*self.columns, *self.beside):
            return ()  # a prompt and a response that are text
        return tuple(name for name in self.beside if name in self.names)

    def unread(self, *, significant: bool = False) -> list[str]:
        """Return the columns of the first rows, and keys of their turns, that are not read.

        Args:
            significant: only those that some programs read as a part of the text or its labels.

        Example:
            >>> rows = [{"text": "a b", "id": 3, "labels": [1]}]
            >>> find_layout(rows, None, "rows.jsonl").unread()
            ["'id'", "'labels'"]
        """
        used = (*self.columns, *self.beside)
        columns = [name for name in self.names if name not in used]
        keys = list(self.keys)
        if significant:
            columns = [name for name in columns if name in SIGNIFICANT]
            keys = [key for key in keys if key in SIGNIFICANT_KEYS]
        return [*map(repr, columns), *(f"{key!r} of turns" for key in keys)]

    def read(self, row: Mapping[str, Any]) -> Content:
        """Return the content of a row.

        Raises:
            UserError: a value of the wrong form; see :func:`fastadapt.data.contents.read_turns`.
        """
        first = self.columns[0]
        if self.kind == "conversation":
            return Content(turns=self._with_system(read_turns(row[first], first), row))
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
        if is_list(prompt) and is_list(response) and not are_parts(prompt):
            return self._with_system(read_turns([*prompt, *response], where), row)
        said = read_text(prompt, self.columns[0], self.columns[0])
        if INPUT in self.beside and row.get(INPUT) is not None:
            text = read_text(row[INPUT], INPUT, INPUT)
            said += f"\n\n{text}" if text.strip() else ""
        answer = read_text(response, self.columns[1], self.columns[1])
        turns = check_turns([Turn("user", said), Turn("assistant", answer)], where)
        return self._with_system(turns, row)

    def _with_system(self, turns: Sequence[Turn], row: Mapping[str, Any]) -> tuple[Turn, ...]:
        """Return the turns after the system turn of a column, if the row has one."""
        for name in self.beside:
            if name == INPUT or row.get(name) is None:
                continue
            text = read_text(row[name], name, name)
            if not text.strip():
                continue
            if turns[0].role != "system":
                turns = [Turn("system", text), *turns]
            elif turns[0].text.strip() != text.strip():
                raise UserError(
                    f"{name}: expected one system turn, got another one here than before the "
                    "other turns; remove one of them, or name the columns to read with data.columns"
                )
        return tuple(turns)


def find_layout(rows: Sequence[Mapping[str, Any]], columns: str | None, where: str) -> Layout:
    """Find the kind of content of a data set, and the columns that hold it.

    Columns are recognised by name, if their values have the form. ``CONVERSATIONS``, ``TEXTS`` and
    ``IDS`` name single columns; ``PROMPTS`` and ``RESPONSES`` name pairs.

    Args:
        rows: the first rows.
        columns: ``data.columns``: the name of the column to read; of a system column and of the
            turns; or of prompt and response, separated by a comma. None: recognise them.
        where: name of the source, for messages.

    Raises:
        UserError: no column or several are recognised, or a named one is missing.

    Example:
        >>> find_layout([{"question": "1 + 1?", "answer": "2"}], None, "rows.jsonl").columns
        ('question', 'answer')
    """
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    shown = {name: _first(rows, name) for name in names}
    layout = _recognised(shown, where) if columns is None else _chosen(columns, shown, where)
    turns = () if layout.kind in ("text", "token ids") else layout.columns
    keys = unread_keys(row.get(name) for row in rows for name in turns)
    return replace(layout, names=names, keys=keys)


def _recognised(examples: Mapping[str, Any], where: str) -> Layout:
    systems = _systems(examples)
    candidates = [
        *(Layout("conversation", (n,), systems) for n in CONVERSATIONS if is_list(examples.get(n))),
        *_pairs(examples),
        *(Layout("text", (n,)) for n in TEXTS if isinstance(examples.get(n), str)),
        *(Layout("token ids", (n,)) for n in IDS if _are_ids(examples.get(n))),
    ]
    if len(candidates) == 1:
        return candidates[0]
    # Of a known column whose values have no form, the row says what is wrong.
    named: list[tuple[Kind, str]] = [
        *(("conversation", n) for n in CONVERSATIONS if n in examples),
        *(("text", n) for n in TEXTS if n in examples),
        *(("token ids", n) for n in IDS if is_list(examples.get(n))),
    ]
    if not candidates and len(named) == 1:
        return Layout(named[0][0], named[0][1:])
    listed = ", ".join(map(repr, examples)) or "none"
    if not candidates:
        raise UserError(
            f"{where}: no column 'conversations', 'messages', 'text' or 'input_ids', and no pair "
            f"of a prompt and a response; the columns are {listed}. Set data.columns (or "
            "--columns) to a column's name, or to two: prompt,response"
        )
    choices = " or ".join(",".join(layout.columns) for layout in candidates)
    shown = "; ".join(str(replace(layout, names=tuple(examples))) for layout in candidates)
    raise UserError(
        f"{where}: several columns may hold the data ({shown}); set "
        f"data.columns (or --columns) to {choices}"
    )


def _pairs(names: Mapping[str, Any]) -> list[Layout]:
    return [
        Layout("prompt and response", (prompt, response), _beside(names[prompt]))
        for prompt in PROMPTS
        for response in RESPONSES
        if prompt in names and response in names
    ]


def _beside(prompt: Any) -> tuple[str, ...]:
    """Return the columns that may go with a prompt: with turns, those of system turns alone."""
    return SYSTEMS if is_list(prompt) and not are_parts(prompt) else (INPUT, *SYSTEMS)


def _systems(examples: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of columns that may hold system turns, apart from columns of other form.

    A column that the first rows lack may come in a later row.
    """

    def may_hold(value: Any) -> bool:
        return value is None or isinstance(value, str) or (is_list(value) and are_parts(value))

    return tuple(name for name in SYSTEMS if may_hold(examples.get(name)))


def _chosen(columns: str, examples: Mapping[str, Any], where: str) -> Layout:
    chosen = tuple(name.strip() for name in columns.split(","))
    for name in chosen:
        if name not in examples:
            listed = ", ".join(map(repr, examples)) or "none"
            raise UserError(f"{where}: no column {name!r} (data.columns); the columns are {listed}")
    if len(chosen) > 2:
        raise UserError(
            "data.columns: expected one column, or those of prompt and response separated by a "
            f"comma; got {columns!r}"
        )
    if len(chosen) == 2:
        if chosen[0] in SYSTEMS and is_list(examples[chosen[1]]):
            return Layout("conversation", chosen[1:], chosen[:1])
        beside = tuple(n for n in _beside(examples[chosen[0]]) if n not in chosen)
        return Layout("prompt and response", chosen, beside)
    example = examples[chosen[0]]
    if isinstance(example, str):
        return Layout("text", chosen)
    is_ids = is_list(example) and all(type(token) is int for token in example)
    return Layout("token ids" if is_ids else "conversation", chosen)


def _first(rows: Sequence[Mapping[str, Any]], name: str) -> Any:
    return next((row[name] for row in rows if row.get(name) is not None), None)


def _are_ids(value: Any) -> bool:
    return is_list(value) and all(type(token) is int and token >= 0 for token in value)

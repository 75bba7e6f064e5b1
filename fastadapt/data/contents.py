"""What a row of a data set holds: turns of a conversation, text, or token ids.

Data sets store turns under several names and in several forms; columns are recognised by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from fastadapt.errors import UserError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)

#: Names of each role in public data sets, in lower case.
NAMES: Mapping[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "function_response", "observation", "ipython"), "tool"),
}
#: Keys of a turn that hold its role and its text, by data sets of each kind.
_KEYS = (("role", "content"), ("from", "value"))
#: Keys of a turn that hold text or calls beside its content, which would be lost.
_BESIDE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


class Turn(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: "system", "user", "assistant" or "tool".
        text: what was said.
    """

    role: Role
    text: str


def read_turns(value: Any, column: str = "conversations") -> list[Turn]:
    """Return the turns of a conversation; leave an empty system turn out.

    In a conversation of two ``from``/``value`` turns without names of roles, the first is the
    user's and the second the assistant's.

    Args:
        value: list of ``{"role": ..., "content": ...}`` or ``{"from": ..., "value": ...}``. A
            content is text or a list of parts ``{"type": "text", "text": ...}``, which are joined.
        column: column of the value, for messages.

    Raises:
        UserError: no list of turns, a role or content that is missing or unknown, an empty turn of
            the user or the assistant, no turn of the assistant, a second system turn, or content
            that is no text.

    Example:
        >>> read_turns([{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}])
        [Turn(role='user', text='1 + 1?'), Turn(role='assistant', text='2')]
    """
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise UserError(f"{column}: expected a list of turns, got {_kind(value)}")
    if not value:
        raise UserError(f"{column}: expected at least one turn, got an empty conversation")
    turns = []
    for i, entry in enumerate(value):
        where = f"{column}, turn {i + 1}"
        name_key, text_key = _keys(entry, where)
        by_position: Role | None = None
        if text_key == "value" and len(value) == 2:
            by_position = ("user", "assistant")[i]
        role = _role(entry.get(name_key), by_position, where)
        turns.append(Turn(role, read_text(entry.get(text_key), f"{where} ({role})", text_key)))
    return check_turns(turns, column)


def check_turns(turns: Sequence[Turn], where: str) -> list[Turn]:
    """Return turns without an empty system turn; raise as :func:`read_turns` does."""
    checked = [turn for turn in turns if turn.role != "system" or turn.text.strip()]
    for i, (role, text) in enumerate(turns):
        if not text.strip() and role in ("user", "assistant"):
            raise UserError(f"{where}, turn {i + 1} ({role}) is empty")
        if role == "system" and i:
            raise UserError(f"{where}, turn {i + 1}: a system turn can only be the first turn")
    if all(turn.role != "assistant" for turn in checked):
        raise UserError(f"{where}: expected a turn of the assistant, got none")
    return checked


def read_text(value: Any, where: str, key: str) -> str:
    """Return a turn's text, or the joined texts of its parts; raise ``UserError`` if not text."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        value = "".join(_part(part, f"{where}, part {i + 1}") for i, part in enumerate(value))
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} must be text, got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {key!r} holds half a surrogate pair at character {error.start}, "
            "which no tokenizer accepts"
        ) from None
    return value


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or part.get("type", "text") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
        raise UserError(f"{where}: expected a string or a part of type 'text', got {kind!r:.40}")
    return read_text(part.get("text"), where, "text")


def _keys(entry: Any, where: str) -> tuple[str, str]:
    if not isinstance(entry, Mapping):
        raise UserError(
            f"{where}: expected an object with 'role' and 'content', or 'from' and 'value', got "
            f"{entry!r:.40}"
        )
    for key in _BESIDE:
        if entry.get(key):
            raise UserError(
                f"{where}: {key!r} is not supported; write its content into the turn's text as the "
                "model does"
            )
    # Arrow gives every turn all keys of its column, null where a turn has none.
    for keys in _KEYS:
        if entry.get(keys[1]) is not None:
            return keys
    for keys in _KEYS:
        if keys[1] in entry:
            return keys
    raise UserError(f"{where}: no 'content' or 'value'; the keys are {sorted(map(str, entry))}")


def _role(name: Any, by_position: Role | None, where: str) -> Role:
    role = NAMES.get(name.lower()) if isinstance(name, str) else None
    if role is None and by_position is not None:
        return by_position
    if role is None:
        known = ", ".join(NAMES)
        raise UserError(f"{where}: expected a role ({known}), got {name!r:.40}")
    if by_position is not None and role != by_position:
        raise UserError(
            f"{where} is from {name!r}; a conversation of two turns is the user's prompt, then the "
            "assistant's response"
        )
    return role


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


# --- columns --------------------------------------------------------------------------------------

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
    """Kind of content that a data set has, and the columns that hold it.

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
            UserError: a value of the wrong form; see :func:`fastadapt.data.contents.read_turns`.
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
    """Find the kind of content of a data set, and the columns that hold it.

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
    candidates = [
        *(Layout("conversation", (n,)) for n in CONVERSATIONS if _is_list(examples.get(n))),
        *_pairs(names),
        *(Layout("text", (n,)) for n in TEXTS if isinstance(examples.get(n), str)),
        *(Layout("token ids", (n,)) for n in IDS if _are_ids(examples.get(n))),
    ]
    if len(candidates) == 1:
        return candidates[0]
    # Of a known column whose values have no form, the row says what is wrong.
    named = [name for name in (*CONVERSATIONS, *TEXTS) if name in names]
    if not candidates and len(named) == 1:
        return Layout("conversation" if named[0] in CONVERSATIONS else "text", (named[0],))
    listed = ", ".join(map(repr, names)) or "none"
    if not candidates:
        raise UserError(
            f"{where}: no column 'conversations', 'messages', 'text' or 'input_ids', and no prompt "
            f"with a response; the columns are {listed}. Name the column, or prompt,response, with "
            "data.columns (other commands: --columns)"
        )
    choices = " or ".join(",".join(layout.columns) for layout in candidates)
    raise UserError(
        f"{where}: several columns may hold the data ({'; '.join(map(str, candidates))}); set "
        f"data.columns (other commands: --columns) to {choices}"
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
        raise UserError(
            "data.columns: expected one column, or those of prompt and response separated by a "
            f"comma; got {columns!r}"
        )
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
    """Return whether a list holds parts of one turn's content, rather than turns."""
    return all(
        isinstance(part, str)
        or (isinstance(part, Mapping) and "type" in part and "role" not in part)
        for part in value
    )


def _are_ids(value: Any) -> bool:
    return _is_list(value) and all(type(token) is int and token >= 0 for token in value)

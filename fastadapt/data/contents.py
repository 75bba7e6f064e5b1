"""What a row of a data set holds: turns of a conversation, text, or token ids.

Data sets store turns under several names and in several forms. :mod:`fastadapt.data.layouts` finds
the columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
        hint = (
            "; write the rows as JSON lines (.jsonl) or Parquet, whose columns hold lists"
            if isinstance(value, str)
            else ""
        )
        raise UserError(f"{column}: expected a list of turns, got {_kind(value)}{hint}")
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
    """Return a text, or the joined texts of its parts.

    Raises:
        UserError: the value is no text, or several texts, which may be alternatives or turns.
    """
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if len(value) > 1 and all(isinstance(part, str) for part in value):
            raise UserError(
                f"{where}: expected one text, got a list of {len(value)}, which may be "
                "alternatives or turns; write one text, turns as messages, or parts "
                '{"type": "text", "text": ...}'
            )
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


def unread_keys(values: Iterable[Any]) -> tuple[str, ...]:
    """Return the keys of turns that :func:`read_turns` does not read, if a turn has a value there.

    Args:
        values: conversations, as they are stored; values of another form are passed over.

    Example:
        >>> unread_keys([[{"role": "user", "content": "1 + 1?", "weight": 0, "name": None}]])
        ('weight',)
    """
    read = {*(key for keys in _KEYS for key in keys), *_BESIDE}
    turns = (turn for value in values if is_list(value) for turn in value)
    entries = (turn for turn in turns if isinstance(turn, Mapping))
    keys = (key for entry in entries for key, value in entry.items() if value is not None)
    return tuple(dict.fromkeys(str(key) for key in keys if key not in read))


def is_list(value: Any) -> bool:
    """Return whether a value of a row is a list."""
    return isinstance(value, (list, tuple))


def are_parts(value: Sequence[Any]) -> bool:
    """Return whether a list holds parts of one turn's content, rather than turns."""
    return all(
        isinstance(part, str)
        or (isinstance(part, Mapping) and "type" in part and "role" not in part)
        for part in value
    )

"""Read JSON and YAML that anyone may have written: bounded in size and depth, checked by a schema.

Every reader of a document in this library goes through here. A document that is too large, nested
too deeply, not UTF-8, not JSON or YAML, that gives a key twice or holds an integer of thousands of
digits is a :class:`DocumentError` that names the file; a value of another type than its schema says
is one that also names the key.

A schema is a type as :mod:`msgspec` understands it: a ``TypedDict``, ``list[int]``,
``Annotated[int, msgspec.Meta(ge=1)]``, and so on. It is strict: ``true`` and ``1.0`` are no
integers, and ``"1"`` is no number. A key that a ``TypedDict`` does not declare stays as it is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NoReturn

import msgspec
import yaml

from fastadapt.errors import UserError
from fastadapt.io.files import open_regular

MAX_BYTES = 1 << 28
MAX_DEPTH = 64
#: Values in a YAML document, each alias counted as often as it is used: a bound on expansion.
MAX_VALUES = 1_000_000
#: Of an integer: what prints within Python's limit of 4,300 digits.
MAX_BITS = 14_000

#: Sizes in a schema: whole numbers that every format and tensor library can hold.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
#: Numbers that a float holds; JSON's ``1e400`` is read as infinity, which JSON cannot hold.
Finite = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]
NonNegative = Annotated[float, msgspec.Meta(ge=0, le=1e300)]
#: A text that may name a file, a folder or a model: no control character, no half of a surrogate
#: pair, and no longer than Linux takes a path.
Name = Annotated[str, msgspec.Meta(max_length=4095, pattern=r"^[^\x00-\x1f\x7f\ud800-\udfff]*\Z")]
_HALF = re.compile("[\ud800-\udfff]")
#: SHA-256 in lower-case hexadecimal.
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class DocumentError(UserError):
    """A document cannot be read, or a value in it is not what its schema says."""


class RepeatedKeyError(yaml.constructor.ConstructorError):
    """A key is given twice in a mapping of a YAML document."""


def read_json(path: str | os.PathLike[str], schema: Any = Any, *, constants: bool = False) -> Any:
    """Return the contents of a JSON file, checked against a schema.

    Args:
        path: of the file.
        schema: a type; see the module's text.
        constants: whether ``NaN`` and ``Infinity``, which are not JSON, are read as numbers.

    Raises:
        DocumentError: the file is missing or cannot be read, or does not hold such a document.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp(), "sizes.json")
        >>> _ = path.write_text('{"width": 3}')
        >>> read_json(path, dict[str, int])
        {'width': 3}
    """
    return parse_json(read_bytes(path), str(path), schema, constants=constants)


def read_yaml(path: str | os.PathLike[str], schema: Any = Any) -> Any:
    """Return the contents of a YAML file, checked against a schema; see :func:`read_json`."""
    return parse_yaml(read_bytes(path), str(path), schema)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a regular file of at most ``MAX_BYTES``, whatever they mean.

    Raises:
        DocumentError: it is missing, cannot be read, is larger, or is a pipe or a device.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise DocumentError(f"{path} is missing") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise DocumentError(f"{path} cannot be read: {reason}") from error
    if len(content) > MAX_BYTES:
        raise DocumentError(f"{path} has more than {MAX_BYTES:,} bytes")
    return content


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a file as it is; see :func:`read_bytes`.

    Raises:
        DocumentError: also where it is not UTF-8.
    """
    return _decode(read_bytes(path), str(path))


def parse_json(
    text: str | bytes, source: str, schema: Any = Any, *, constants: bool = False
) -> Any:
    """Return the value of a JSON text; ``source`` names the text in messages.

    Raises:
        DocumentError: see :func:`read_json`.
    """
    try:
        decoded = _decode(text, source)
        value = json.loads(
            decoded,
            object_pairs_hook=_object,
            parse_constant=None if constants else _refuse_constant,
        )
    except RecursionError:
        raise DocumentError(f"{source} is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        if isinstance(error, DocumentError):
            raise
        raise DocumentError(f"{source} is not valid JSON: {_reason(error)}") from error
    _check_json(decoded, value, source)
    check(value, schema, source)
    return value


def parse_line(text: str | bytes, source: str, schema: Any = Any) -> Any:
    """Return the value of one line of a file of JSON lines, ``NaN`` and ``Infinity`` included.

    As :func:`parse_json`, at a third less time. Without a schema, half of a surrogate pair is left
    in its text: of somebody's data, not all columns are used.

    Args:
        text: of the line.
        source: names file and line in messages.
        schema: a type; see the module's text.

    Raises:
        DocumentError: the line is not UTF-8 or not JSON, or not what the schema says.
    """
    decoded = _decode(text, source)
    try:
        value = _LINE.decode(decoded)
    except RecursionError:
        raise DocumentError(f"{source}: malformed JSON: it is nested too deep") from None
    except ValueError as error:
        if isinstance(error, DocumentError):
            raise
        place, reason = "", str(error)
        if isinstance(error, json.JSONDecodeError):
            place, reason = f" at column {error.colno}", error.msg
        raise DocumentError(f"{source}: malformed JSON{place}: {reason}") from None
    if schema is Any and decoded.count("[") + decoded.count("{") > MAX_DEPTH:
        _check_depth(value, source)
    elif schema is not Any:
        _check_json(decoded, value, source)
    check(value, schema, source)
    return value


def parse_yaml(text: str | bytes, source: str, schema: Any = Any) -> Any:
    """Return the value of a YAML text; ``source`` names the text in messages.

    Raises:
        DocumentError: see :func:`read_json`. Also where tags ask for anything but plain values.
    """
    decoded = _decode(text, source)
    try:
        value = _load_yaml(decoded)
    except RecursionError:
        raise DocumentError(f"{source} is nested more than {MAX_DEPTH} levels deep") from None
    # All but the first come from values that look like dates or numbers, or have a tag that says
    # so, and are none.
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        ArithmeticError,
        TypeError,
        AttributeError,
    ) as e:
        if isinstance(e, DocumentError):
            raise
        raise DocumentError(f"{source} is not valid YAML: {_reason(e)}") from e
    _check_depth(value, source)
    _check_scalars(value, source)
    check(value, schema, source)
    return value


def check(value: Any, schema: Any, source: str) -> None:
    """Raise :class:`DocumentError` where ``value`` is not what ``schema`` says, naming the key.

    Example:
        >>> check({"layers": [1, "2"]}, dict[str, list[int]], "card.json")
        Traceback (most recent call last):
            ...
        fastadapt.io.documents.DocumentError: card.json: ['layers'][1]: expected int, got str
    """
    if schema is Any:
        return
    try:
        msgspec.convert(value, schema, strict=True)
    except msgspec.ValidationError as error:
        reason, key = _split(str(error))
        where = f"{source}: {_named(value, schema, key)}" if key else source
        raise DocumentError(f"{where}: {reason}") from None
    except (RecursionError, OverflowError, UnicodeEncodeError) as error:
        raise DocumentError(f"{source}: {_reason(error)}") from error


def same(a: Any, b: Any) -> bool:
    """Whether two values of JSON are equal; ``true`` is not 1, 1.0 is.

    Example:
        >>> same({"n": [1, 2.0]}, {"n": [1, 2]}), same([True], [1])
        (True, False)
    """
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


# --- parts ----------------------------------------------------------------------------------------


def _decode(text: str | bytes, source: str) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{source} is not UTF-8: {error.reason} at byte {error.start}"
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r:.80} occurs twice")
            seen.add(key)
    return values


#: Of single lines: made once, since lines are many.
_LINE = json.JSONDecoder(object_pairs_hook=_object)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _reason(error: Exception) -> str:
    """The first 200 characters of an error's message, in one line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} at line {mark.line + 1}, column {mark.column + 1}"
    return " ".join((str(error) or type(error).__name__).split())[:200]


def _check_json(text: str, value: Any, source: str) -> None:
    """Check what ``text`` may hold, by a glance at it: documents are many, such values few."""
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value, source)
    if "\\ud" in text or "\\uD" in text:
        _check_scalars(value, source)


def _check_depth(value: Any, source: str) -> None:
    """Raise where values lie deeper than ``MAX_DEPTH``."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise DocumentError(f"{source} is nested more than {MAX_DEPTH} levels deep")


def _check_scalars(value: Any, source: str) -> None:
    """Raise where a text holds half a surrogate pair, or an integer cannot be printed."""
    pending = [(source, value)]
    while pending:
        where, one = pending.pop()
        if isinstance(one, dict):
            for key, child in one.items():
                pending += [
                    (where, key),
                    (f"{where}{'.' if where != source else ': '}{key}", child),
                ]
        elif isinstance(one, (list, tuple)):
            pending += [(f"{where}[{i}]", child) for i, child in enumerate(one)]
        elif isinstance(one, str) and _HALF.search(one):
            raise DocumentError(f"{where}: half of a surrogate pair in {one!r:.80}")
        elif isinstance(one, int) and one.bit_length() > MAX_BITS:
            raise DocumentError(f"{where}: an integer of {one.bit_length():,} bits")


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value


def _split(message: str) -> tuple[str, str]:
    """Reason and key of a message of msgspec: "Expected `int`, got `str` - at `$.a[1]`"."""
    found = re.fullmatch(r"(.*?)(?: - at `(?:key in )?\$(.*)`)?", message, re.DOTALL)
    assert found is not None
    reason = found[1].replace("`", "")
    return reason[:1].lower() + reason[1:], (found[2] or "").removeprefix(".")


def _named(value: Any, schema: Any, key: str) -> str:
    """``key`` with each ``[...]``, an entry of an object of any keys, named.

    msgspec does not say which entry is at fault; the one with which alone the error stays is.
    """
    steps: list[Any] = []
    *before, last = key.split("[...]")
    text = ""
    for part in before:
        steps += [name or int(index) for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", part)]
        parent = value
        for step in steps:
            parent = parent[step]
        for name, entry in parent.items() if isinstance(parent, dict) else ():
            alone = _replaced(value, steps, {name: entry})
            try:
                msgspec.convert(alone, schema, strict=True)
            except msgspec.ValidationError as error:
                if _split(str(error))[1] == key:
                    break
        else:
            return key  # the key itself is at fault
        value, text = alone, f"{text}{part}[{name!r:.80}]"
        steps.append(name)
    return text + last


def _replaced(value: Any, steps: Sequence[Any], new: Any) -> Any:
    """A copy of ``value`` with ``new`` at the end of ``steps``; what is beside them is shared."""
    if not steps:
        return new
    copy = value.copy()
    copy[steps[0]] = _replaced(value[steps[0]], steps[1:], new)
    return copy


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, whose aliases and keys are checked before anything is made of them."""

    def check(self, node: yaml.Node) -> None:
        """Raise where aliases expand too far, or a key is given twice, as YAML 1.2 forbids."""
        self._values_in(node, {}, 0)

    def _values_in(self, node: yaml.Node, known: dict[int, int], depth: int) -> int:
        """Values below a node, those behind an alias counted as often as it is used."""
        if id(node) in known:
            return known[id(node)]
        if depth > MAX_DEPTH:
            raise RecursionError
        known[id(node)] = MAX_VALUES + 1  # an alias to what it lies in has no end
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        count = 1 + sum(self._values_in(child, known, depth + 1) for child in children)
        if count > MAX_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"this expands to more than {MAX_VALUES:,} values", node.start_mark
            )
        known[id(node)] = count
        return count

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
                continue  # a key that is no scalar is refused where the mapping is made
            key = self.construct_object(key_node)
            if key in seen:
                raise RepeatedKeyError(
                    None, None, f"the key {key!r:.80} occurs twice", key_node.start_mark
                )
            seen.add(key)


def _load_yaml(text: str) -> Any:
    """The value of a YAML text of one document."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        loader.check(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()

"""Read untrusted JSON and YAML with bounds on size and depth, and check it against a schema.

All documents in this library are read by this module. It raises :class:`DocumentError`, which names
the file, if a document is too large, nested too deeply, not UTF-8, not JSON or YAML, repeats a key,
or holds an integer of thousands of digits. If a value does not match the schema, the error also
names the key.

A schema is a type that :mod:`msgspec` supports: a ``TypedDict``, ``list[int]``,
``Annotated[int, msgspec.Meta(ge=1)]``, and so on. It is strict: ``true`` and ``1.0`` are no
integers, and ``"1"`` is no number. Keys that a ``TypedDict`` does not declare are not checked.
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
from fastadapt.io.files import one_line, open_regular

MAX_BYTES = 1 << 28
MAX_DEPTH = 64
#: Values in a YAML document after the expansion of its aliases.
MAX_VALUES = 1_000_000
#: Bits of an integer, which prints within Python's limit of 4,300 digits.
MAX_BITS = 14_000

#: Sizes in a schema: integers that every format and tensor library can represent.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
#: Finite floats. Python reads JSON's ``1e400`` as infinity, which JSON cannot represent.
Finite = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]
NonNegative = Annotated[float, msgspec.Meta(ge=0, le=1e300)]
#: Names of files, folders or models: no control characters, no half of a surrogate pair, and at
#: most the length of a path on Linux.
Name = Annotated[str, msgspec.Meta(max_length=4095, pattern=r"^[^\x00-\x1f\x7f\ud800-\udfff]*\Z")]
_HALF = re.compile("[\ud800-\udfff]")
#: A mapping with at least one key.
Mapped = Annotated[dict[str, Any], msgspec.Meta(min_length=1)]
#: SHA-256 in lower-case hexadecimal.
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class DocumentError(UserError):
    """A document cannot be read, or a value in it does not match its schema."""


class RepeatedKeyError(yaml.constructor.ConstructorError):
    """A key occurs twice in a mapping of a YAML document."""


def read_json(path: str | os.PathLike[str], schema: Any = Any, *, constants: bool = False) -> Any:
    """Return the contents of a JSON file, checked against a schema.

    Args:
        path: path of the file.
        schema: a type; see the module's docstring.
        constants: read ``NaN`` and ``Infinity``, which are not JSON, as numbers.

    Raises:
        DocumentError: the file is missing, cannot be read, or does not match the schema.

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
    """Return the bytes of a regular file of at most ``MAX_BYTES``.

    Raises:
        DocumentError: the file is missing, cannot be read, is larger, or is a pipe or a device.
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
        raise DocumentError(f"{path} has more than {MAX_BYTES:,} bytes, the most that is read")
    return content


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a file; see :func:`read_bytes`.

    Raises:
        DocumentError: the file cannot be read, or is not UTF-8.
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
    """Return the value of one line of a file of JSON lines; accept ``NaN`` and ``Infinity``.

    This takes a third less time than :func:`parse_json`. Without a schema, half of a surrogate pair
    is no error, since it may occur in a column that is not used.

    Args:
        text: text of the line.
        source: name of file and line, for messages.
        schema: a type; see the module's docstring.

    Raises:
        DocumentError: the line is not UTF-8, is not JSON, or does not match the schema.

    Example:
        >>> parse_line('{"loss": NaN}', "metrics.jsonl, line 1")
        {'loss': nan}
    """
    decoded = _decode(text, source)
    try:
        value = _LINE.decode(decoded)
    except RecursionError:
        raise DocumentError(f"{source}: malformed JSON: nested too deeply") from None
    except ValueError as error:
        if isinstance(error, DocumentError):
            raise
        column, reason = "", str(error)
        if isinstance(error, json.JSONDecodeError):
            column, reason = f" at column {error.colno}", error.msg
        raise DocumentError(f"{source}: malformed JSON{column}: {reason}") from None
    if schema is Any and decoded.count("[") + decoded.count("{") > MAX_DEPTH:
        _check_depth(value, source)
    elif schema is not Any:
        _check_json(decoded, value, source)
    check(value, schema, source)
    return value


def parse_yaml(text: str | bytes, source: str, schema: Any = Any) -> Any:
    """Return the value of a YAML text; ``source`` names the text in messages.

    Raises:
        DocumentError: see :func:`read_json`; or a tag requests an object of Python.

    Example:
        >>> parse_yaml("pair: {dtype: float32}", "run.yaml")
        {'pair': {'dtype': 'float32'}}
    """
    decoded = _decode(text, source)
    try:
        value = _load_yaml(decoded)
    except RecursionError:
        raise DocumentError(f"{source} is nested more than {MAX_DEPTH} levels deep") from None
    # All but YAMLError come from malformed values that PyYAML takes for dates or numbers, because
    # of their form or tag.
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
    """Raise :class:`DocumentError`, which names the key, if ``value`` does not match ``schema``.

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
    """Return whether two JSON values are equal. 1.0 equals 1, but ``true`` does not.

    Example:
        >>> same({"n": [1, 2.0]}, {"n": [1, 2]}), same([True], [1])
        (True, False)
    """
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


# --- parsing and checking -------------------------------------------------------------------------


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


#: Decoder of single lines, created once for speed.
_LINE = json.JSONDecoder(object_pairs_hook=_object)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _reason(error: Exception) -> str:
    """Return the first 200 characters of an error's message, in one line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} at line {mark.line + 1}, column {mark.column + 1}"
    return one_line(error)


def _check_json(text: str, value: Any, source: str) -> None:
    """Check depth and scalars of ``value``; skip a check that the text shows to be unnecessary."""
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value, source)
    if "\\ud" in text or "\\uD" in text:
        _check_scalars(value, source)


def _check_depth(value: Any, source: str) -> None:
    """Raise :class:`DocumentError` if values are nested deeper than ``MAX_DEPTH``."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise DocumentError(f"{source} is nested more than {MAX_DEPTH} levels deep")


def _check_scalars(value: Any, source: str) -> None:
    """Raise :class:`DocumentError` for half a surrogate pair or an integer beyond ``MAX_BITS``."""
    pending = [(source, value)]
    while pending:
        where, node = pending.pop()
        if isinstance(node, dict):
            for key, child in node.items():
                pending += [
                    (where, key),
                    (f"{where}{'.' if where != source else ': '}{key}", child),
                ]
        elif isinstance(node, (list, tuple)):
            pending += [(f"{where}[{i}]", child) for i, child in enumerate(node)]
        elif isinstance(node, str) and _HALF.search(node):
            raise DocumentError(f"{where}: half of a surrogate pair in {node!r:.80}")
        elif isinstance(node, int) and node.bit_length() > MAX_BITS:
            raise DocumentError(
                f"{where}: expected an integer of at most {MAX_BITS:,} bits, got "
                f"{node.bit_length():,} bits"
            )


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value


def _split(message: str) -> tuple[str, str]:
    """Split a message of msgspec, "Expected `int`, got `str` - at `$.a[1]`", in reason and key."""
    match = re.fullmatch(r"(.*?)(?: - at `(?:key in )?\$(.*)`)?", message, re.DOTALL)
    assert match is not None
    reason = match[1].replace("`", "")
    return reason[:1].lower() + reason[1:], (match[2] or "").removeprefix(".")


def _named(value: Any, schema: Any, key: str) -> str:
    """Return ``key`` with each ``[...]`` replaced by the name of the entry.

    msgspec writes ``[...]`` for any entry of an object without declared keys. The entry that causes
    the error is the one for which an object with this entry alone gives the same error.
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
            return key  # no value causes the error, so the key does
        value, text = alone, f"{text}{part}[{name!r:.80}]"
        steps.append(name)
    return text + last


def _replaced(value: Any, steps: Sequence[Any], new: Any) -> Any:
    """Return a copy of ``value`` with ``new`` at the end of ``steps``; share all other values."""
    if not steps:
        return new
    copy = value.copy()
    copy[steps[0]] = _replaced(value[steps[0]], steps[1:], new)
    return copy


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which checks aliases and keys before it constructs values."""

    def check(self, node: yaml.Node) -> None:
        """Raise if aliases expand too far, or a key occurs twice, which YAML 1.2 forbids."""
        self._count_values(node, {}, 0)

    def _count_values(self, node: yaml.Node, known: dict[int, int], depth: int) -> int:
        """Count the values below a node after the expansion of aliases."""
        if id(node) in known:
            return known[id(node)]
        if depth > MAX_DEPTH:
            raise RecursionError
        known[id(node)] = MAX_VALUES + 1  # an alias to one of its own ancestors expands forever
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        count = 1 + sum(self._count_values(child, known, depth + 1) for child in children)
        if count > MAX_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"aliases expand to more than {MAX_VALUES:,} values", node.start_mark
            )
        known[id(node)] = count
        return count

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
                continue  # the constructor of the mapping refuses keys that are no scalars
            key = self.construct_object(key_node)
            if key in seen:
                raise RepeatedKeyError(
                    None, None, f"the key {key!r:.80} occurs twice", key_node.start_mark
                )
            seen.add(key)


def _load_yaml(text: str) -> Any:
    """Return the value of a YAML text of one document."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        loader.check(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()

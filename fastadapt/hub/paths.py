"""Replace paths of this machine in the documents of a run, before others read them."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from fastadapt.errors import UserError

_LEFT = r"(?<![\w./\\~%+\-)\]}>])"  # a slash after these is inside a name, a number or a tag
_BODY = r"""[^\s"'`<>|,;()\[\]{}]"""
#: Where a folder also begins: after an escaped newline, and after an option of one letter.
_AFTER = r"(?<=\\[nrt])|(?<=[\s'\"]-\w)|(?<=^-\w)"
_ROOT = r"(?:(?<!:)/+|/)(?=[^/\\\s])"  # two slashes after a colon belong to an address
#: A path from the root, the home folder or a drive, a file: address, or a path with ``..``. After a
#: bracket, as in ``[/INST]`` and ``</think>``, a path has two parts or more.
_PATH = re.compile(
    rf"{_LEFT}(?:file:/+|~[\w.-]*[\\/]|[a-z]:[\\/]|\\\\|(?<![<\[{{]){_ROOT}"
    rf"|{_ROOT}(?={_BODY}+/)){_BODY}*|(?:{_BODY}*[\\/])?\.\.[\\/]{_BODY}*",
    re.IGNORECASE,
)
#: What is a path even in a chat format, whose markers and templates have slashes: three parts.
_CERTAIN = re.compile(rf"{_LEFT}(?:file:/+|~/|/)[\w.-]+(?:/[\w.-]+){{2,}}|(?<![^\s'\"])\.\./\S*")
#: Keys of chat formats. Their texts are never rewritten, since a rewritten format is another one.
_FORMATS = frozenset({"family"})


def portable(value: Any) -> Any:
    """Return a document in which every path of this machine is the name of its file or folder.

    Raises:
        UserError: a chat format has a path, or two keys of a mapping become one.

    Example:
        >>> portable({"data": {"train": "/home/me/chats.jsonl"}, "made": "read from ../a/b.json"})
        {'data': {'train': 'chats.jsonl'}, 'made': 'read from b.json'}
    """
    if isinstance(value, Mapping):
        pairs = {
            portable(k): _checked_format(v) if k in _FORMATS else portable(v)
            for k, v in value.items()
        }
        if len(pairs) != len(value):
            raise UserError(
                f"expected keys that differ without this machine's folders, got {list(value)}; "
                "rename one of them in the run's files"
            )
        return pairs
    if isinstance(value, list):
        return [portable(item) for item in value]
    return _without_paths(value) if isinstance(value, str) else value


def _without_paths(text: str) -> str:
    home = _home()
    if home:  # whose name may have spaces; /root is in /root/a, but not in ann/root-7b
        text = re.sub(rf"(?:(?<![\w.~-])|{_AFTER}){re.escape(home)}(?![\w-]|\.\w)", "~", text)
    if _PATH.match(text):
        return _name(text)
    return _PATH.sub(lambda match: _name(match[0]), text)


def _name(path: str) -> str:
    name = PureWindowsPath(path.rstrip("/\\")).name  # splits at both separators
    return "local" if name in ("", ".", "..") else name


def _checked_format(value: Any) -> Any:
    for text in _texts(value):
        if match := _CERTAIN.search(text):
            raise UserError(
                "family: expected a chat format without paths of this machine, got "
                f"{match[0]!r}; remove it from config.yaml and adapter/fastadapt.json of the run"
            )
    return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _home() -> str:
    home = os.path.expanduser("~")
    return home.rstrip("/\\") if os.path.isabs(home) else ""


def check_private(files: Mapping[str, Path | bytes], run: str | os.PathLike[str]) -> None:
    """Raise ``UserError`` if a file names the home folder, or the run's folder, of this machine.

    Of a file of weights, the header is read.

    Args:
        files: contents by name; a path for a file of weights.
        run: folder of the run.
    """
    folders = filter(None, {_home(), os.path.abspath(run), os.path.realpath(run)})
    forms = {form for folder in folders for form in (folder, json.dumps(folder)[1:-1])}
    start = rf"(?:(?<![\w.-])|{_AFTER})".encode()
    pattern = re.compile(start + rb"(?:" + _any_of(forms) + rb")(?![\w-])")
    for name, content in files.items():
        if match := pattern.search(content if isinstance(content, bytes) else _header(content)):
            raise UserError(
                f"nothing was uploaded: {name} would name {match[0].decode()}, a folder of this "
                "machine; remove it from the run's files"
            )


def _any_of(texts: Iterable[str]) -> bytes:
    return b"|".join(re.escape(os.fsencode(text)) for text in sorted(texts))


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(length)

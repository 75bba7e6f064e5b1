"""Paths from outside: what is typed, what files and requests name, and what lies there.

A name becomes a path inside one folder and nowhere else; a path that is typed is one that a system
can open; and what is read is a regular file, since a pipe would be waited for without end.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from fastadapt.errors import UserError

#: Bytes of a name: what common file systems hold.
MAX_NAME_BYTES = 255
#: Bytes of a whole path, without the NUL that Linux counts in.
MAX_PATH_BYTES = 4095

_LOOP = "a link that leads to itself"
#: What may lie in place of a file, and how it is called.
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
)


def check_name(name: object, source: str) -> str:
    """Return a plain file name; raise ``UserError`` where ``name`` is anything else.

    A plain name has one part: no separator of any system, no drive, not ``.`` or ``..``, no control
    character, at most 255 bytes.

    Args:
        name: from a file, a request or a command.
        source: of the name, for messages.

    Example:
        >>> check_name("model-00001.safetensors", "index")
        'model-00001.safetensors'
        >>> check_name("../x", "index")
        Traceback (most recent call last):
        fastadapt.errors.UserError: index: expected the name of a file in its folder, got '../x'
    """
    if not isinstance(name, str) or not _is_plain(name):
        raise UserError(f"{source}: expected the name of a file in its folder, got {name!r:.80}")
    return name


def inside(folder: Path, *names: object, source: str, follow_links: bool = False) -> Path:
    """Return ``folder/name/...`` for plain names, which is inside ``folder`` after links, too.

    Args:
        folder: which may itself be a link.
        names: each a plain name (:func:`check_name`).
        source: of the names, for messages.
        follow_links: whether a link may lead out of the folder. True only for reading models: the
            hub's cache consists of links.

    Raises:
        UserError: a name is not plain, or leads out of the folder.
    """
    path = folder
    for name in names:
        path = path / check_name(name, source)
    if _leads_nowhere(path):
        raise UserError(f"{source}: {path} is {_LOOP}")
    if not follow_links and not _real(path).is_relative_to(_real(folder)):
        raise UserError(f"{source}: {path} is a link that leads out of {folder}")
    return path


def typed_path(text: str | os.PathLike[str], source: str) -> Path:
    """Return the path that was typed, or that a file holds; ``~`` is the home folder.

    Args:
        text: the path.
        source: the option or the key, for messages.

    Raises:
        UserError: no system could open it: it is longer than 4,095 bytes or a part of it than 255,
            it has a NUL or what UTF-8 cannot write, or there is no such user.

    Example:
        >>> typed_path("x" * 300, "--output")
        Traceback (most recent call last):
        fastadapt.errors.UserError: --output: expected a path whose parts have at most 255 bytes, \
got 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # of an unknown user
        raise UserError(f"{source}: no home folder is known for {_short(text)}") from None
    if (expected := _cannot_open(str(path))) is not None:
        raise UserError(f"{source}: expected a path {expected}, got {_short(text)}")
    return path


def has_file(path: Path) -> bool:
    """Return whether a file is there, which may be absent.

    Raises:
        UserError: what is there is no regular file: a folder, a pipe, a link to nothing.
    """
    if not os.path.lexists(path):
        return False
    if _leads_nowhere(path):
        raise UserError(f"{path} is {_LOOP}")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise UserError(f"{path} is a link to what is not there") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    for is_kind, called in _KINDS:
        if is_kind(mode):
            raise UserError(f"{path} is {called}; expected a file")
    return True


def unusable_path(error: Exception) -> str | None:
    """Return what is wrong with a path that no file system holds; None for any other error.

    Example:
        >>> unusable_path(OSError(errno.ENAMETOOLONG, "", "x" * 300))[:60]
        'File name too long: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'
    """
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"{os.strerror(error.errno)}: {error.filename!s:.200}"
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return f"expected the name of a file, got {error.object!r:.200}: half a character"
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return f"expected the name of a file, got one with a null character ({error})"
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return str(error)[:300]
    return None


def in_model(file: Path, source: str) -> Path:
    """Return a file of a model's folder, which is in it after links, too.

    In the hub's cache, ``snapshots/<commit>/<name>`` is a link into the repository's ``blobs``.

    Raises:
        UserError: a link leads anywhere else.
    """
    folder, end = os.path.realpath(file.parent), os.path.realpath(file)
    held = [folder]
    if os.path.basename(os.path.dirname(folder)) == "snapshots":
        held.append(os.path.join(folder, os.pardir, os.pardir, "blobs"))
    if not any(Path(end).is_relative_to(os.path.abspath(own)) for own in held):
        raise UserError(f"{source}: {file} is a link that leads out of {folder}")
    return file


def _leads_nowhere(path: str | os.PathLike[str]) -> bool:
    """Whether links go round in a circle."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ELOOP
    except ValueError:
        return False
    return False


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises on circles


def _cannot_open(path: str) -> str | None:
    """What is to be expected of a path in place of this one, if no system could open it."""
    try:
        encoded = path.encode("utf-8")
    except UnicodeEncodeError:
        return "that UTF-8 can write"
    if b"\0" in encoded:
        return "without a NUL"
    if max(map(len, encoded.split(b"/"))) > MAX_NAME_BYTES:
        return f"whose parts have at most {MAX_NAME_BYTES} bytes"
    if len(encoded) > MAX_PATH_BYTES:
        return f"of at most {MAX_PATH_BYTES:,} bytes"
    return None


def _short(text: object) -> str:
    """Text of a message in its first letters, whatever it holds."""
    told = ascii(os.fspath(text) if isinstance(text, os.PathLike) else text)
    return told if len(told) <= 80 else f"{told[:60]}..."


def _is_plain(name: str) -> bool:
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError:  # half of a pair of surrogates
        return False
    special = any(c in "/\\:" or ord(c) < 32 or ord(c) == 127 for c in name)
    return 0 < size <= MAX_NAME_BYTES and name not in (".", "..") and not special

"""Check names and paths from the command line, files and requests.

A name may only become a path inside one folder. A typed path must be one that a system can open.
Only regular files are read, since reading a pipe may block forever.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from fastadapt.errors import UserError

#: Bytes of a name that common file systems support.
MAX_NAME_BYTES = 255
#: Bytes of a whole path on Linux, without the NUL at its end.
MAX_PATH_BYTES = 4095

_LOOP = "a link that leads to itself"
#: Kinds of files that are no regular file, with their names in messages.
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
)


def check_name(name: object, source: str) -> str:
    """Return ``name`` if it is a plain file name, else raise ``UserError``.

    A plain name is one path component of at most 255 bytes: no separator or drive of any system, no
    control character, and neither ``.`` nor ``..``.

    Args:
        name: name from a file, a request or a command.
        source: origin of the name, for messages.

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
    """Return ``folder/name/...``, a path that is inside ``folder`` after resolving links.

    Args:
        folder: a folder, or a link to a folder.
        names: plain names, see :func:`check_name`.
        source: origin of the names, for messages.
        follow_links: allow links that lead out of the folder. True only for reading models, since
            the hub's cache consists of links.

    Raises:
        UserError: a name is not plain, or a link leads out of the folder.
    """
    path = folder
    for name in names:
        path = path / check_name(name, source)
    if _is_loop(path):
        raise UserError(f"{source}: {path} is {_LOOP}")
    if not follow_links and not _real(path).is_relative_to(_real(folder)):
        raise UserError(f"{source}: {path} is a link that leads out of {folder}")
    return path


def typed_path(text: str | os.PathLike[str], source: str) -> Path:
    """Return a path from the command line or a file, with ``~`` expanded.

    Args:
        text: the path.
        source: option or key of the path, for messages.

    Raises:
        UserError: no system can open the path: it is longer than 4,095 bytes, a part is longer than
            255 bytes, it contains a NUL or text that UTF-8 cannot encode, or its user is unknown.

    Example:
        >>> typed_path("x" * 300, "--output")
        Traceback (most recent call last):
        fastadapt.errors.UserError: --output: expected a path whose parts have at most 255 bytes, \
got 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # unknown user
        raise UserError(f"{source}: no home folder is known for {_short(text)}") from None
    if (expected := _cannot_open(str(path))) is not None:
        raise UserError(f"{source}: expected a path {expected}, got {_short(text)}")
    return path


def has_file(path: Path) -> bool:
    """Return whether the path is a regular file; False if the path does not exist.

    Raises:
        UserError: the path is something else, such as a folder, a pipe or a broken link.
    """
    if not os.path.lexists(path):
        return False
    if _is_loop(path):
        raise UserError(f"{path} is {_LOOP}")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise UserError(f"{path} is a link to a path that does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise UserError(f"{path} is {name}; expected a file")
    return True


def unusable_path(error: Exception) -> str | None:
    """Return the message for a path that no file system supports, or None for other errors.

    Example:
        >>> unusable_path(OSError(errno.ENAMETOOLONG, "", "x" * 300))[:60]
        'File name too long: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'
    """
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"{os.strerror(error.errno)}: {error.filename!s:.200}"
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return f"expected the name of a file, got {error.object!r:.200} (half a surrogate pair)"
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return f"expected the name of a file, got one with a null character ({error})"
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return str(error)[:300]
    return None


def in_model(file: Path, source: str) -> Path:
    """Return ``file`` if it is inside its model's folder after resolving links.

    In the hub's cache, ``snapshots/<commit>/<name>`` is a link into the repository's ``blobs``.

    Raises:
        UserError: a link leads elsewhere.
    """
    folder, target = os.path.realpath(file.parent), os.path.realpath(file)
    allowed = [folder]
    if os.path.basename(os.path.dirname(folder)) == "snapshots":
        allowed.append(os.path.join(folder, os.pardir, os.pardir, "blobs"))
    if not any(Path(target).is_relative_to(os.path.abspath(parent)) for parent in allowed):
        raise UserError(f"{source}: {file} is a link that leads out of {folder}")
    return file


def _is_loop(path: str | os.PathLike[str]) -> bool:
    """Return whether links of the path lead back to themselves."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ELOOP
    except ValueError:
        return False
    return False


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises on loops


def _cannot_open(path: str) -> str | None:
    """Return the requirement that a path does not meet, for a message, or None if it meets all."""
    try:
        encoded = path.encode("utf-8")
    except UnicodeEncodeError:
        return "that UTF-8 can encode"
    if b"\0" in encoded:
        return "without a NUL"
    if max(map(len, encoded.split(b"/"))) > MAX_NAME_BYTES:
        return f"whose parts have at most {MAX_NAME_BYTES} bytes"
    if len(encoded) > MAX_PATH_BYTES:
        return f"of at most {MAX_PATH_BYTES:,} bytes"
    return None


def _short(text: object) -> str:
    """Return the first characters of an ASCII representation of ``text``."""
    shown = ascii(os.fspath(text) if isinstance(text, os.PathLike) else text)
    return shown if len(shown) <= 80 else f"{shown[:60]}..."


def _is_plain(name: str) -> bool:
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    special = any(c in "/\\:" or ord(c) < 32 or ord(c) == 127 for c in name)
    return 0 < size <= MAX_NAME_BYTES and name not in (".", "..") and not special

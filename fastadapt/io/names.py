"""Turn a name that a file or a request gives into a path, inside one folder and nowhere else."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from fastadapt.errors import UserError

#: Bytes of a name: what common file systems hold.
MAX_NAME_BYTES = 255


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
    if not follow_links and not Path(os.path.realpath(path)).is_relative_to(folder.resolve()):
        raise UserError(f"{source}: {path} is a link that leads out of {folder}")
    return path


def has_file(path: Path) -> bool:
    """Return whether a file is there, which may be absent.

    Raises:
        UserError: what is there is no regular file: a folder, a pipe, a link to nothing.
    """
    if not os.path.lexists(path):
        return False
    if not path.is_file():
        raise UserError(f"{path} is no regular file")
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


def _is_plain(name: str) -> bool:
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError:  # half of a pair of surrogates
        return False
    special = any(c in "/\\:" or ord(c) < 32 or ord(c) == 127 for c in name)
    return 0 < size <= MAX_NAME_BYTES and name not in (".", "..") and not special

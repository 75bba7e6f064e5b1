"""Open regular files only, and format errors in one line. The files are untrusted."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack
from typing import BinaryIO


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading, without blocking on a pipe that has no writer.

    Raises:
        OSError: the file cannot be opened, or is no regular file.

    Example:
        >>> open_regular("/dev/zero")
        Traceback (most recent call last):
        OSError: [Errno 22] Not a regular file: '/dev/zero'
    """
    with ExitStack() as opened:
        file = opened.enter_context(open(path, "rb", opener=_open_nonblocking))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
        opened.pop_all()
    return file


def one_line(error: Exception) -> str:
    """Return the first 200 characters of an error's message, in one line.

    Example:
        >>> one_line(ValueError("a\\n  b"))
        'a b'
    """
    return " ".join((str(error) or type(error).__name__).split())[:200]


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
